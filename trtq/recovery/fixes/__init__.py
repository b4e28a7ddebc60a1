"""Label-free fixes that cost nothing at run time."""
