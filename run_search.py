"""Search the conv/attention split of every expert of a MEME ensemble: ``python run_search.py --budget 50``."""

import sys

from meme.cli.console import as_a_step, emit, printing
from meme.cli.parsing import NOTHING_FOUND, exits_with_a_sentence, read_settings
from meme_nas.settings import SearchSettings

# Groups of options in --help. A setting outside all groups is listed last.
GROUPS = {
    "search": ("budget", "data", "preset", "image_size", "study", "max_macs", "sampler", "rungs", "seed", "retrain", "dry_run"),
    "report": ("watch", "watch_port"),
    "winner": ("audit_factor", "audit_size", "audit_seeds", "p_share", "confirm_share", "confirm_seeds"),
    "trial": ("proxy_steps", "trunk_share", "samples", "features", "inception_weights", "precision"),
    "data": ("strict", "follow_links", "fresh"),
    "engine": ("engine", "workers", "cpus_per_trial", "gpus_per_trial", "device", "proposal_lag", "workers_per_expert"),
    "cluster": ("ray_address", "storage", "dashboard_host"),
}
EXAMPLE = "python run_search.py --data path/to/images --budget 50"


def main(arguments: list[str] | None = None) -> None:
    with exits_with_a_sentence(SearchSettings):
        settings, output = read_settings(SearchSettings, arguments, "run_search.py", GROUPS, EXAMPLE)
        from meme_nas.forecast import describe  # imports torch and Optuna, which takes seconds; --help must not wait for it
        from meme_nas.report.summary import as_record
        from meme_nas.run import retrain_winner, run

        with printing(output):
            if settings.dry_run:
                describe(settings)
                return
            summary = run(settings)
            if settings.retrain and summary.winner:
                with as_a_step():
                    retrain_winner(settings)
            emit(as_record(summary))
            if summary.winner is None:
                sys.exit(NOTHING_FOUND)


if __name__ == "__main__":
    main()
