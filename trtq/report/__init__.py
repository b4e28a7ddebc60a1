"""What people and CI read: text, HTML, JUnit."""
