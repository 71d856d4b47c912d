"""The command line of ``python -m meme``."""
