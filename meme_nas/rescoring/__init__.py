"""What doubts a search's result: audit, choice of p, confirmation, last scores."""
