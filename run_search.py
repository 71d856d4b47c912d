"""Search the conv/attention split of every expert of a MEME ensemble: ``python run_search.py --budget 50``."""

import sys

from meme.cli import exits_with_a_sentence, read_settings
from meme_nas.run import describe, retrain_winner, run
from meme_nas.settings import SearchSettings


def main(arguments: list[str] | None = None) -> None:
    with exits_with_a_sentence(SearchSettings):
        settings = read_settings(SearchSettings, arguments, "run_search.py")
        if settings.dry_run:
            describe(settings)
            return
        run(settings)
        if settings.retrain:
            retrain_winner(settings)


if __name__ == "__main__":
    sys.exit(main())
