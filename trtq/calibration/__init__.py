"""Statistics, the methods that turn them into ranges, and the table that holds the result."""
