"""One search from settings to results: set up, run, audit, score again. ``meme_nas.finish`` exports and prints the results."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial

from rich.text import Text

from meme.cli.console import remarks
from meme.config.schema import Config
from meme.scoring.features import FeatureSpace
from meme.scoring.metrics import require_images
from meme.support.files import settle_paths
from meme.support.threads import threads
from meme_nas.display import SearchDisplay
from meme_nas.engines.placement import (
    check_engine,
    check_places,
    open_engine,
    open_measuring,
    room_for_trials,
    training_of,
    workers_for,
)
from meme_nas.engines.stages import OnChange, Stage, Stages
from meme_nas.finish import LivePortraits, Portraits, conclude, facts_of, report_before_audit, say_results, so_far
from meme_nas.forecast import effort_lines, forecast_lines
from meme_nas.record.study import Study, recorded_settings
from meme_nas.report.live import Watch
from meme_nas.report.page import page
from meme_nas.report.summary import Summary
from meme_nas.rescoring.audit import Audit
from meme_nas.rescoring.base import Rescoring
from meme_nas.rescoring.chosen import Chosen
from meme_nas.rescoring.confirmation import Confirmation
from meme_nas.rescoring.finalists import Finalists
from meme_nas.rescoring.probabilities import Probabilities
from meme_nas.results import Kept
from meme_nas.settings import LEAST_LAG, SearchSettings
from meme_nas.strategies.base import Strategy
from meme_nas.strategies.joint import Joint
from meme_nas.strategies.rungs import factorised
from meme_nas.surrogate.costs import Costs
from meme_nas.worker.bank import ExpertBank
from meme_nas.worker.latency import LatencyMeter, LatencyRecord, RecordedLatency
from meme_nas.worker.objective import Basis, Objective, open_basis
from search_spaces.space import build_space

TABLE_SECONDS = 1.0  # least time between two writes of trials.csv
HAND_OVER_SECONDS = 1.0  # time from the record of a task to its start in a worker, which driver work in between would delay
STRATEGIES: dict[str, Callable[..., Strategy]] = {"factorised": factorised, "joint": Joint}


def run(settings: SearchSettings) -> Summary:
    """Search until the budget is spent, write all results to the study's folder, and return their summary.

    Another call with the same settings resumes the search. Raises ``UserError`` if settings, data or machine make it impossible.
    """
    settle_paths()
    config = settings.full_config()
    check_places(settings, config)
    check_engine(settings)
    with _latency_of_trials(settings) as latency:
        Costs(settings, build_space(config, settings.searched), latency).check()
        return _run(settings, config, latency)


def _run(settings: SearchSettings, config: Config, latency: RecordedLatency | None) -> Summary:
    basis = _basis(settings, config)
    images, space = basis.images, basis.space
    require_images((settings.first_objective,), len(images), images.name)
    settings = settled(settings, space)
    scored_on = {"data": f"{images.name} {basis.data.content_id}", "features": f"{space.name} {space.feature_id}"}
    study = Study(settings.folder, settings.in_force() | scored_on, settings.objectives, settings.storage)
    if study.mended:
        remarks.print(study.mended)
    try:
        ExpertBank(settings.bank_folder, basis.data, basis.held_out)  # raises for a bank of other data, before anything runs
        search = STRATEGIES[settings.strategy_name](settings, study, latency=latency)
        if search.warm_said:
            remarks.print(search.warm_said)
        audit = Audit(settings, search) if settings.audit_factor else None
        if not search.spent[0] and not settings.ray_address:  # other machines cannot be timed from here
            remarks.print("\n".join([effort_lines(settings)[0], *forecast_lines(settings)]))
        if (steps := settings.trunk_steps_of(config)) and not search.spent[0]:
            remarks.print(f"first, one network is trained on all timesteps, from which every candidate starts: {steps:,} steps")
        with _watched(settings, search, basis):
            chosen, portraits = Chosen(settings, search, audit), Portraits(settings, basis)
            confirmation = Confirmation(settings, search, chosen) if settings.confirm_share else None
            finalists = Finalists(settings, search, chosen)
            rescorings = [stage for stage in (audit, chosen.probabilities, confirmation, finalists) if stage]
            report_early = partial(report_before_audit, settings, search, basis, portraits)
            _search(settings, search, rescorings, _objective(settings, config, basis), report_early)
            summary = conclude(settings, search, chosen, finalists, confirmation, basis, portraits)
    finally:
        study.close()
    say_results(settings, summary)
    return summary


def settled(settings: SearchSettings, space: FeatureSpace) -> SearchSettings:
    """Return ``settings`` with feature space and proposal lag filled in.

    They are decided once, in the driver: all workers must use the same features, and a resumed study keeps its proposal lag.
    """
    recorded = recorded_settings(settings.folder).get("proposal_lag")
    lag = settings.proposal_lag or recorded or max(LEAST_LAG, settings.workers or 0, room_for_trials(settings))
    return settings.model_copy(update={"features": space.kind, "proposal_lag": lag})


@contextmanager
def _latency_of_trials(settings: SearchSettings) -> Iterator[RecordedLatency | None]:
    """Open the measurement of latency in a process like a trial's; None if latency is neither minimised nor limited."""
    if not settings.asks_latency:
        yield None
        return
    record = LatencyRecord(settings.folder.absolute())
    measuring = open_measuring(settings, LatencyMeter(record.study, settings.device, settings.cpus_per_trial), record.device)
    try:
        yield RecordedLatency(record, measuring, remarks.print)
    finally:
        measuring.close()


def _basis(settings: SearchSettings, config: Config) -> Basis:
    """Open data and feature space in the driver, so that their faults are raised before anything runs."""
    weights, strict = settings.inception_weights, settings.strict
    return open_basis(config, settings.device, weights, strict=strict, fresh=settings.fresh, on_message=remarks.print)


def _search(
    settings: SearchSettings,
    search: Strategy,
    rescorings: Sequence[Rescoring],
    objective: Objective,
    report_early: Callable[[], None],
) -> None:
    """Run the search and then its rescorings in one engine."""
    if search.done:
        remarks.print(f"the budget of {settings.budget} is spent; give a larger --budget to go on")
        if all(rescoring.done for rescoring in rescorings):
            return
    workers = workers_for(settings)
    stages = [] if search.done else [Stage(search, lambda: _search_shown(settings, search, workers))]
    shown = {
        Audit: lambda audit: _audit_shown(settings, audit, workers, report_early),
        Probabilities: _probabilities_shown,
        Confirmation: lambda confirmation: _confirmation_shown(settings, confirmation),
        Finalists: _scoring_shown,
    }
    stages += [Stage(rescoring, partial(shown[type(rescoring)], rescoring)) for rescoring in rescorings]
    engine = open_engine(settings, workers)
    try:
        with threads(1), Stages(stages) as source:  # leave the cores to the workers
            engine.run(source, objective, source.on_change)
            if not source.done:  # Ray Tune swallows interruptions and returns
                raise KeyboardInterrupt
    finally:
        engine.close()
    if search.repeats:
        remarks.print(f"{search.repeats} proposals repeated an earlier trial and cost nothing")
    if search.exhausted:
        remarks.print(
            "the search ends before its budget is spent: no candidate is left that is new and keeps the limits; "
            "more --dimensions, or a longer --proxy-steps, would use the rest"
        )


@contextmanager
def _search_shown(settings: SearchSettings, search: Strategy, workers: int) -> Iterator[OnChange]:
    """Show each trial and keep trials.csv current. The table is written at most once a second, as a worker may be waiting."""
    with SearchDisplay(search, workers, remarks) as display:
        seen, due, kept = -1, 0.0, Kept(settings.folder, settings.objectives)

        def on_change() -> None:
            nonlocal seen, due
            display.update()
            finished = search.study.ensembles.finished
            if finished != seen and time.monotonic() >= due:
                kept.update(search.study.trials)
                seen, due = finished, time.monotonic() + TABLE_SECONDS

        try:
            yield on_change
        finally:
            due = 0.0
            on_change()


@contextmanager
def _audit_shown(settings: SearchSettings, audit: Audit, workers: int, report_early: Callable[[], None]) -> Iterator[OnChange]:
    """Show the progress of the audit, and write a report to read meanwhile once all workers are busy."""
    words = f"audit: {len(audit.chosen)} configurations, trained {settings.audit_factor} times longer"
    words += f" with {settings.audit_seeds} seeds" if settings.audit_seeds > 1 else ""
    due, is_reported = math.inf, False
    with remarks.status(Text(words)) as status:

        def on_change() -> None:
            nonlocal due, is_reported
            done, planned = audit.spent
            status.update(Text(f"{words}: {done} of {planned} done"))
            if audit.under_way >= min(workers, planned - done):
                due = min(due, time.monotonic() + HAND_OVER_SECONDS)
            if not is_reported and time.monotonic() >= due:
                is_reported = True
                report_early()

        yield on_change


@contextmanager
def _probabilities_shown(probabilities: Probabilities) -> Iterator[OnChange]:
    """Show the progress of the choice of p."""
    words = f"choosing p of the winner's experts among {len(probabilities.alternatives)} alternatives"
    remarks.print(words)
    with remarks.status(Text(words)) as status:
        yield lambda: status.update(f"{words}: {' of '.join(map(str, probabilities.spent))} done")


@contextmanager
def _confirmation_shown(settings: SearchSettings, confirmation: Confirmation) -> Iterator[OnChange]:
    """Show the progress of the confirmation."""
    words = f"confirming the winner: {confirmation.steps:,} steps an expert with {settings.confirm_seeds} seeds"
    remarks.print(words)
    with remarks.status(Text(words)) as status:
        yield lambda: status.update(f"{words}: {' of '.join(map(str, confirmation.spent))} done")


@contextmanager
def _scoring_shown(finalists: Finalists) -> Iterator[OnChange]:
    words = "scoring winner and yardsticks with fresh noise"
    with remarks.status(Text(words)) as status:
        yield lambda: status.update(Text(f"{words}: {' of '.join(map(str, finalists.spent))} done"))


def _watched(settings: SearchSettings, search: Strategy, basis: Basis) -> AbstractContextManager[Watch | None]:
    """Serve the report of the results so far within the context, if the settings ask for that."""
    if not settings.watch:
        return nullcontext()
    facts, portraits = facts_of(settings, basis.images, basis.space), LivePortraits(settings, basis)

    def live_page() -> str:
        summary = so_far(settings, search, facts)
        return page(replace(summary, portraits=portraits.of(summary.trials, summary.winner)), live=True)

    watch = Watch(live_page, lambda: search.study.ensembles.finished, settings.watch_port)
    remarks.print(f"the report so far: {watch.address}")
    return watch


def _objective(settings: SearchSettings, config: Config, basis: Basis) -> Objective:
    weights = settings.inception_weights and settings.inception_weights.absolute()  # workers run in other folders
    return Objective(
        settings.folder.absolute(),
        settings.bank_folder.absolute(),
        settings.device,
        settings.cpus_per_trial,
        weights,
        settings.first_objective,
        settings.bank_gib,
        data=config.data,
        follow_links=config.follow_links,
        expected=basis.ids,
    )


def retrain_winner(settings: SearchSettings) -> None:
    """Train the winner in full, draw samples and score it, as ``python -m meme train``, ``sample`` and ``evaluate`` do."""
    from meme.cli.commands import evaluate_folder, sample_folder, train_config

    path = settings.folder / "winner.yaml"
    folder = train_config(path, device=settings.device, train=training_of(settings))
    sample_folder(folder, device=settings.device)
    evaluate_folder(folder, device=settings.device, inception_weights=settings.inception_weights)
