"""One search from settings to results: set up, run, score the finalists again, export, report."""

import os
import platform
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from threadpoolctl import threadpool_limits

from meme.config import Config
from meme.console import console, remarks
from meme.cost import ensemble_cost
from meme.data import Images
from meme.ensemble import Ensemble
from meme.features import FeatureSpace
from meme.files import written_whole
from meme.pipeline import evaluate, pick_device, train
from meme.survey import SMALLEST
from meme_nas.audit import SEEDS, Audit, agreements, audited_winner, signals_of
from meme_nas.bank import ExpertBank
from meme_nas.console import SearchDisplay
from meme_nas.costs import Costs
from meme_nas.engines import Engine
from meme_nas.export import Kept, export_configs
from meme_nas.forecast import PASSES_A_STEP, search_seconds
from meme_nas.joint import Joint
from meme_nas.objective import STATES, Basis, Objective, open_basis, restore_ensemble
from meme_nas.pareto import front
from meme_nas.portrait import portrait
from meme_nas.promotion import factorised
from meme_nas.report import page, write_report
from meme_nas.report_words import audit_verdict, duration, metric_name, quantity
from meme_nas.settings import LEAST_LAG, SearchSettings
from meme_nas.strategy import Strategy, winner
from meme_nas.study import Study, recorded_settings, trial_folder
from meme_nas.summary import Portrait, Rescored, Summary
from meme_nas.trial_log import TrialRecord
from meme_nas.watch import Watch
from search_spaces.domain import size
from search_spaces.space import build_space

STRATEGIES: dict[str, Callable[[SearchSettings, Study], Strategy]] = {"factorised": factorised, "joint": Joint}
LONG = 2 * 3600  # seconds; longer searches are told of a smaller network
FRESH_SEEDS = (1_001, 1_002, 1_003)  # of sampling noise that no trial was scored with


def run(settings: SearchSettings) -> Summary:
    """Search until the budget is spent, then leave everything in the study's folder. Run again, it goes on."""
    config = settings.full_config()
    Costs(settings, build_space(config, settings.dimensions)).check()
    basis = _basis(settings, config)
    images, space = basis.images, basis.space
    settings = settled(settings, space)
    scored_on = {"data": f"{images.name} {basis.data.content_id}", "features": f"{space.name} {space.feature_id}"}
    study = Study(settings.folder, settings.in_force() | scored_on, settings.objectives, settings.storage)
    if study.mended:
        remarks.print(study.mended)
    try:
        ExpertBank(bank_of(settings), basis.data, basis.held_out)  # one of other data is refused before anything runs
        search = STRATEGIES[settings.strategy_name](settings, study)
        audit = Audit(settings, search) if settings.audit_factor else None
        if not search.spent[0] and not settings.ray_address:  # other machines are not timed from here
            remarks.print("\n".join(_forecast(settings)))
        with _watched(settings, search, basis):
            _search(settings, search, audit, basis)
            summary = _finish(settings, search, audit, basis)
    finally:
        study.close()
    _say_results(settings, summary)
    return summary


def settled(settings: SearchSettings, space: FeatureSpace) -> SearchSettings:
    """``settings`` with what was left open decided once, here: workers must not choose features anew, and a study that goes on
    keeps the lag of its proposals."""
    recorded = recorded_settings(settings.folder).get("proposal_lag")
    lag = settings.proposal_lag or recorded or max(LEAST_LAG, settings.workers or 0, room_for_trials(settings))
    return settings.model_copy(update={"features": space.kind, "proposal_lag": lag})


def _basis(settings: SearchSettings, config: Config) -> Basis:
    """Data and feature space, opened in the driver first: what is wrong with them is said before anything runs."""
    weights, strict = settings.inception_weights, settings.strict
    return open_basis(config, settings.device, weights, strict=strict, on_message=remarks.print)


def _search(settings: SearchSettings, search: Strategy, audit: Audit | None, basis: Basis) -> None:
    """Let an engine work through the budget, then through the audit, before which there is a report to read meanwhile."""
    if search.done:
        remarks.print(f"the budget of {settings.budget} is spent; give a larger --budget to go on")
        if audit is None or audit.done:
            return
    workers = workers_for(settings)
    objective, engine = _objective(settings), _engine(settings, workers)
    try:
        with threadpool_limits(1, user_api="blas"):  # more would wait for cores that trials have
            if not search.done:
                _run_trials(settings, search, objective, engine, workers)
            if audit and not audit.done:
                _report_before_audit(settings, search, basis)
                _run_audit(audit, objective, engine)
    finally:
        engine.close()
    if search.repeats:
        remarks.print(f"{search.repeats} proposals repeated an earlier trial and cost nothing")
    if search.exhausted:
        remarks.print("the search ends early: no candidate is left that is new and keeps the limits")


def _watched(settings: SearchSettings, search: Strategy, basis: Basis) -> AbstractContextManager[Watch | None]:
    """The report of what is known so far, served while it lasts, where that was asked for."""
    if not settings.watch:
        return nullcontext()
    facts = _facts(settings, basis.images, basis.space)

    def so_far() -> str:
        return page(_so_far(settings, search, facts), live=True)

    watch = Watch(so_far, lambda: search.study.ensembles.finished, settings.watch_port)
    remarks.print(f"the report so far: {watch.address}", markup=False)
    return watch


def _so_far(settings: SearchSettings, search: Strategy, facts: dict[str, str]) -> Summary:
    """What is known without scoring anything again."""
    trials = list(search.study.trials)  # the search may go on adding to its own
    return Summary(
        title=f"MEME search: {settings.preset_name}",
        folder=settings.folder,
        trials=trials,
        winner=winner(trials, settings.objectives),
        importance=search.study.importance(),
        facts=facts,
        metric=settings.first_objective,
    )


def _report_before_audit(settings: SearchSettings, search: Strategy, basis: Basis) -> None:
    """Something to read and to look at while the audit runs."""
    so_far = _so_far(settings, search, _facts(settings, basis.images, basis.space))
    path = settings.folder / "report.html"
    write_report(replace(so_far, portraits=_portraits(settings, so_far.trials, so_far.winner, basis)), path)
    remarks.print(f"the report before the audit: {path}", markup=False)


def _objective(settings: SearchSettings) -> Objective:
    weights = settings.inception_weights and settings.inception_weights.absolute()  # workers run elsewhere
    return Objective(
        settings.folder.absolute(),
        bank_of(settings).absolute(),
        settings.device,
        settings.cpus_per_trial,
        weights,
        settings.first_objective,
        settings.bank_gib,
    )


def _run_trials(settings: SearchSettings, search: Strategy, objective: Objective, engine: Engine, workers: int) -> None:
    """Show each trial and keep trials.csv current."""
    with SearchDisplay(search, workers, remarks) as display:
        seen, kept = -1, Kept(settings.folder, settings.objectives)

        def on_change() -> None:
            nonlocal seen
            display.update()
            finished = search.study.ensembles.finished
            if finished != seen:
                seen = finished
                kept.update(search.study.trials)

        try:
            engine.run(search, objective, on_change)
        finally:
            on_change()
    if not search.done:  # Ray Tune swallows interruptions and returns
        raise KeyboardInterrupt


def _run_audit(audit: Audit, objective: Objective, engine: Engine) -> None:
    words = f"audit: {len(audit.chosen)} configurations, trained {audit.settings.audit_factor} times longer with {SEEDS} seeds"
    with remarks.status(words) as status:
        engine.run(audit, objective, lambda: status.update(f"{words}: {audit.spent[0]} done"))
    if not audit.done:
        raise KeyboardInterrupt


def bank_of(settings: SearchSettings) -> Path:
    """Folder of the experts that the search trains."""
    return settings.bank or settings.folder / "bank"


def room_for_trials(settings: SearchSettings) -> int:
    """Trials that the cores (and GPUs) of this machine, or of the cluster to join, hold at a time."""
    if settings.engine == "ray" and settings.ray_address:
        from meme_nas.engines import ray_cluster

        ray_cluster.join(settings.ray_address)
        return max(1, ray_cluster.room(settings.cpus_per_trial, _gpus_a_trial(settings)))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = cores // settings.cpus_per_trial
    if pick_device(settings.device).type == "cuda":
        room = min(room, int(torch.cuda.device_count() / settings.gpus_per_trial))
    return max(1, room)


def workers_for(settings: SearchSettings) -> int:
    """Trials at a time: as told, else what the machine holds; no more than proposals or the budget leave work for."""
    return min(settings.workers or room_for_trials(settings), settings.proposal_lag or LEAST_LAG, settings.budget)


def _gpus_a_trial(settings: SearchSettings) -> float:
    """The share of a GPU that a trial on Ray takes: 0 where there is none, or none is wanted."""
    if settings.ray_address and settings.device == "auto":
        from meme_nas.engines import ray_cluster

        ray_cluster.join(settings.ray_address)  # unless it is: before a full training, and where a study goes on, it is not
        on_gpu = ray_cluster.has_gpus()
    else:
        on_gpu = pick_device(settings.device).type == "cuda"
    return settings.gpus_per_trial if on_gpu else 0


def _engine(settings: SearchSettings, workers: int) -> Engine:
    if settings.engine == "local":
        from meme_nas.engines.local import LocalEngine

        remarks.print(f"{workers} trials at a time in processes of this machine")
        return LocalEngine(workers, gpus=torch.cuda.device_count() if settings.device in ("auto", "cuda") else 0)
    from meme_nas.engines.ray import RayEngine

    remarks.print(f"joining the Ray cluster at {settings.ray_address} ..." if settings.ray_address else "starting Ray ...")
    engine = RayEngine(
        workers,
        settings.cpus_per_trial,
        _gpus_a_trial(settings),
        settings.folder,
        address=settings.ray_address,
        dashboard_host=settings.dashboard_host,
        inputs=settings.inputs,
    )
    remarks.print(f"{workers} trials at a time on Ray; dashboard: {engine.dashboard or 'could not be started'}")
    if engine.asks_for_token:
        remarks.print("  (it asks for the token that this prints: .venv/bin/ray get-auth-token)")
    return engine


def _finish(settings: SearchSettings, search: Strategy, audit: Audit | None, basis: Basis) -> Summary:
    """Export configs, score winner and yardsticks with fresh noise, copy the winner's samples, write the report."""
    folder, trials = settings.folder, search.study.trials
    audited = audit.results() if audit else []
    best = audited_winner(audited, settings.objectives) or winner(trials, settings.objectives)
    export_configs(folder, trials, settings, best)
    summary = Summary(
        title=f"MEME search: {settings.preset_name}",
        folder=folder,
        trials=trials,
        winner=best,
        finalists=_score_again(settings, trials, best, basis),
        importance=search.study.importance(),
        facts=_facts(settings, basis.images, basis.space),
        audited=audited,
        agreements=agreements(audited, signals_of(audited, search)) if audited else [],
        portraits=_portraits(settings, trials, best, basis),
        metric=settings.first_objective,
    )
    if best:
        with written_whole(folder / "samples.png") as partial:
            shutil.copyfile(trial_folder(folder, best.number) / "samples.png", partial)
    write_report(summary, folder / "report.html")
    shutil.rmtree(folder / STATES, ignore_errors=True)  # of use while cascades are scored only
    return summary


def _score_again(
    settings: SearchSettings, trials: Sequence[TrialRecord], best: TrialRecord | None, basis: Basis
) -> list[Rescored]:
    """Winner and yardsticks, each with the same fresh sampling seeds: the winner was picked for its score with the old one."""
    bank = ExpertBank(bank_of(settings), basis.data, basis.held_out)
    chosen = [trial for trial in trials if trial.state == "complete" and (trial.is_yardstick or trial is best)]
    finalists = []
    with remarks.status("scoring winner and yardsticks with fresh noise"):
        for trial in chosen:
            restore_ensemble(trial_folder(settings.folder, trial.number), bank, pick_device(settings.device))
            by_training = [_fresh_scores(settings, trial.config, seed, basis, bank) for seed in settings.seeds]
            means = tuple(map(statistics.fmean, zip(*by_training, strict=True)))
            finalists.append(Rescored(trial, means, settings.full_config().evaluation.samples))
    return finalists


def _banked(config: Config, bank: ExpertBank, device: torch.device) -> Ensemble:
    numbers = range(1, len(config.experts) + 1)
    return Ensemble(config, [bank.load(config, n, bank.obtain(config, n, device), device) for n in numbers])


def _portraits(settings: SearchSettings, trials: Sequence[TrialRecord], best: TrialRecord | None, basis: Basis) -> list[Portrait]:
    """Of the winner, and of the hand-made pattern beside it, both of which were just scored again."""
    device = pick_device(settings.device)
    hand_made = [trial for trial in trials if trial.kind == "hand-made" and trial.state == "complete" and trial is not best]
    chosen = [*([best] if best else []), *hand_made]
    bank, seed = ExpertBank(bank_of(settings), basis.data, basis.held_out), {"seed": settings.seed}
    ensembles = ((trial, _banked(trial.config.with_(training=seed), bank, device)) for trial in chosen)
    return [portrait(trial, ensemble, basis.data, FRESH_SEEDS[0], device) for trial, ensemble in ensembles]


def _fresh_scores(settings: SearchSettings, config: Config, training_seed: int, basis: Basis, bank: ExpertBank) -> list[float]:
    """Of an ensemble in the bank, one a fresh sampling seed, with as many samples as its full training would be scored by."""
    device, metric = pick_device(settings.device), settings.first_objective
    config = config.with_(training={"seed": training_seed}, evaluation={"samples": settings.full_config().evaluation.samples})
    ensemble = _banked(config, bank, device)
    scores = (evaluate(ensemble, basis.images, basis.space, metrics=(metric,), seed=seed, device=device) for seed in FRESH_SEEDS)
    return [score.measured[metric].value for score in scores]


def _facts(settings: SearchSettings, images: Images, space: FeatureSpace) -> dict[str, str]:
    full = settings.full_config()
    config = settings.as_proxy(full)
    used = ("meme-nas", "torch", "numpy", "optuna", "ray", "diffusers", "clean-fid", "ptflops")
    versions = ", ".join(f"{name} {found}" for name in used if (found := _installed(name)))
    return {
        "command": shlex.join(["python", *sys.argv]),
        "data": f"{images.name}: {len(images)} images, {config.image.channels} x {config.image.size} x {config.image.size}",
        "feature space": space.name,
        "minimised": ", ".join(settings.objectives),
        "scored on": f"{config.evaluation.samples} samples, {config.sampling.sampler} {config.sampling.steps} steps",
        "winner and yardsticks on": f"{full.evaluation.samples} samples",
        "proxy training": f"{config.training.steps} steps of {config.training.batch_size} an expert",
        "full training": f"{full.training.steps} steps an expert",
        "versions": f"Python {platform.python_version()}, {versions}",
        "hardware": f"{os.cpu_count()} cores, {_gpu()}",
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _installed(name: str) -> str | None:
    """The version of a package; None where it is not installed, as Ray need not be, nor this project where it is run in place."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gpu() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"


def _say_results(settings: SearchSettings, summary: Summary) -> None:
    folder, best, metric = settings.folder, summary.winner, metric_name(summary)
    if best is None:
        console.print(f"no trial was scored; the reasons are in {folder / 'trials.csv'}")
        return
    for finalist in summary.finalists:
        name = f"winner (trial {finalist.trial.number})" if finalist.trial is best else finalist.trial.kind
        macs = quantity(finalist.trial.scored.macs)
        console.print(f"  {name:<20} {metric} {finalist.mean:.3f} +- {finalist.deviation:.3f}  MACs {macs}", highlight=False)
    console.print(f"  ({metric} over {best.scored.features}, {len(FRESH_SEEDS)} fresh sampling seeds, proxy training)")
    if summary.audited:
        console.print(audit_verdict(summary.agreements))
    console.print(
        f"{len(front(summary.trials, settings.objectives))} trials on the Pareto front. Look at {folder / 'report.html'}"
    )
    if not settings.retrain:
        console.print(f"train the winner in full: python -m meme train {folder / 'winner.yaml'}")


def retrain_winner(settings: SearchSettings) -> None:
    """Train the winner in full, draw samples, score it: what ``python -m meme train / sample / evaluate`` do."""
    from meme.commands import evaluate_folder, sample_folder, train_config

    path = settings.folder / "winner.yaml"
    folder = train_config(path, device=settings.device, train=training_of(settings))
    sample_folder(folder, device=settings.device)
    evaluate_folder(folder, device=settings.device, inception_weights=settings.inception_weights)


def training_of(settings: SearchSettings) -> Callable[..., Ensemble]:
    """How the winner's experts are trained: one after the other here, or side by side on Ray."""
    if settings.engine == "local":
        return train
    from meme_nas.engines.ray_training import RayTraining

    return RayTraining(
        cpus=settings.cpus_per_trial,
        on_gpus=_gpus_a_trial(settings) > 0,
        workers_per_expert=settings.workers_per_expert,
        address=settings.ray_address,
        dashboard_host=settings.dashboard_host,
        inputs=settings.inputs,
        on_message=remarks.print,
    )


def describe(settings: SearchSettings) -> None:
    """What ``--dry-run`` prints: the settings in force, the size of the space and the cost of one trial. Trains nothing."""
    config = settings.full_config()
    proxy, cost = settings.as_proxy(config), ensemble_cost(config)
    space = build_space(config, settings.dimensions)
    for name, value in {**settings.in_force(), "data": config.data, "study": settings.folder, "budget": settings.budget}.items():
        console.print(f"{name:<16} {value}", markup=False)
    images_trained = proxy.training.steps * proxy.training.batch_size * len(proxy.experts)
    training = PASSES_A_STEP * images_trained * cost.macs
    sampling = proxy.evaluation.samples * proxy.sampling.steps * cost.macs
    console.print(f"space            {len(space.domains)} dimensions, {size(space.domains):.3g} points")
    console.print(f"hand-made        {quantity(cost.params)} parameters, {quantity(cost.macs)} MACs an image and step")
    console.print(
        f"one trial        {len(proxy.experts)} experts x {proxy.training.steps} steps x {proxy.training.batch_size} images, "
        f"then {proxy.evaluation.samples} samples x {proxy.sampling.steps} steps: about {quantity(training + sampling)} MACs"
    )
    console.print(f"trials at a time {workers_for(settings)} on {pick_device(settings.device)}")
    console.print("\n".join(_forecast(settings)))


def _forecast(settings: SearchSettings) -> list[str]:
    """How long the search will take on this machine, and where that is very long without a GPU, what would take less."""
    seconds = search_seconds(settings, workers_for(settings))
    audit = ", its audit not counted" if settings.audit_factor else ""
    lines = [f"the search takes about {duration(seconds)} on this machine{audit}"]
    if seconds > LONG and pick_device(settings.device).type == "cpu" and settings.preset_name not in (SMALLEST, "digits-meme"):
        smallest = settings.model_copy(update={"preset": SMALLEST, "image_size": None})
        shorter = duration(search_seconds(smallest, workers_for(smallest)))
        lines.append(f"without a GPU, --preset {SMALLEST} ({smallest.full_config().image.size} pixels a side) takes {shorter}")
    return lines
