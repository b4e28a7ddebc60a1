"""Engines: building them, and reading what they really run."""
