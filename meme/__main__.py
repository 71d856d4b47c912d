"""``python -m meme``."""

from meme.cli.verbs import main

if __name__ == "__main__":
    main()
