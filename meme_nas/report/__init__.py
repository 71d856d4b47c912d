"""HTML report of a search."""
