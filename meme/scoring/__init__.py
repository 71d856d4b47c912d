"""How good images are, and what a network costs."""
