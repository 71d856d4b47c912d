"""The verbs of ``python -m meme``: each works on a config, or on the folder of a trained ensemble."""

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from meme.cli.console import console, emit, remarks
from meme.config.presets import preset, preset_names
from meme.config.schema import Config
from meme.data.images import Images, TrainingData, check_outside
from meme.data.survey import Survey, suggested_commands, suggested_preset, survey, survey_lines
from meme.diffusion.ensemble import Ensemble
from meme.errors import UserError
from meme.export.diffusers_folder import EVALUATION, export_diffusers, find_trained
from meme.network.pretrained import summary as takeover_summary
from meme.paper.ablation_tables import markdown, print_report, report_of
from meme.paper.ablations import Ablation, Training
from meme.paper.ablations import run as run_recipe
from meme.paper.cost_table import cost_rows, print_table
from meme.pipeline import Score, draw, evaluate, load_ensemble, open_reference, pick_device, train, training_data, with_scale
from meme.scoring.features import FeatureKind, FeatureSpace, choose_features
from meme.scoring.metrics import NAMES, Metric, fewest_images, offered_metrics, protocol, require_images
from meme.support.files import check_writable, expanded, write_text
from meme.support.grids import save_grid
from meme.support.precision import Precision
from meme.training.tensorboard import LossCurves
from meme.training.trainer import TRUNK, OnProgress, steps_done
from meme.training.trainer import Progress as TrainingProgress
from meme.training.trunk import with_trunk_share

if TYPE_CHECKING:
    import pandas as pd


def read_config(source: str | Path) -> Config:
    """Return a preset by its name, or read a config from a YAML file."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return Config.load(path)
    return preset(str(source))


def with_data(config: Config, data: str | None) -> Config:
    """Return ``config`` with other data. A path becomes absolute, since a process that reads the config may run in another
    folder."""
    if data is None:
        return config
    return config.with_(data=data if data == "digits" else str(expanded(data).absolute()))


def check_output(config: Config, output: Path, field: str = "out") -> None:
    """Raise ``UserError`` where ``output`` lies inside the folder of the config's images, since results would be read as
    images."""
    if config.data and config.data != "digits":
        check_outside(Path(os.path.realpath(expanded(config.data))), output, field)


def with_first_stage(config: Config, source: str | None) -> Config:
    """Return ``config`` with the autoencoder of a folder or hub name. Raises ``UserError`` where the config denoises pixels."""
    if source is None:
        return config
    if config.first_stage is None:
        raise UserError(f"first_stage: {config.name} denoises pixels and takes none")
    local = expanded(source)
    found = str(local.absolute()) if local.exists() else source
    return config.with_(first_stage={"source": found})


def with_initial_weights(config: Config, path: Path | None) -> Config:
    """Return ``config`` with experts that start from the published U-Net, or the experts of this program, at ``path``."""
    return config if path is None else config.with_(training={"initial_weights": str(path.absolute())})


def train_config(
    source: str | Path,
    *,
    data: str | None = None,
    first_stage: str | None = None,
    init_from: Path | None = None,
    trunk_share: float | None = None,
    steps: int | None = None,
    precision: Precision | None = None,
    out: Path | None = None,
    device: str = "auto",
    strict: bool = False,
    follow_links: bool = False,
    fresh: bool = False,
    tensorboard: bool = False,
    train: Callable[..., Ensemble] = train,
) -> Path:
    """Train every expert of a preset or YAML config; return the folder of the trained ensemble.

    The same call resumes an interrupted training, and one with more ``steps`` continues a finished one. The folder is ``out``.
    Without it, a YAML file's ensemble goes beside the file, in a folder of its name, and a preset's into ``results/NAME-full``.
    With ``fresh``, images are read again even where the cache holds them. With ``follow_links``, links that lead out of their
    folder are followed. ``tensorboard`` writes loss curves into the folder. ``train`` may replace ``meme.pipeline.train``.
    """
    config = with_initial_weights(with_data(with_first_stage(read_config(source), first_stage), data), init_from)
    config = config.with_(follow_links=True) if follow_links else config
    config = config.with_(training=_given(steps=steps, precision=precision))
    config = config if trunk_share is None else with_trunk_share(config, trunk_share)
    folder = out or _default_folder(source)
    check_output(config, folder)
    chosen = pick_device(device)
    if config.training.initial_weights:
        remarks.print(takeover_summary(config, Path(config.training.initial_weights)))
    images = open_reference(config, strict=strict, fresh=fresh, on_message=remarks.print)
    trained_on = training_data(config, images, chosen, remarks.print)
    _say_where_it_goes_on(folder, config, trained_on)
    with LossCurves(folder / "tensorboard") if tensorboard else nullcontext() as curves:
        skipped = _train_shown(
            config, curves, lambda show: train(config, trained_on, folder=folder, device=chosen, on_progress=show)
        )
    console.print(f"trained {len(config.experts)} experts x {config.training.steps} steps: {folder}")
    emit({"folder": folder, "experts": len(config.experts), "steps": config.training.steps, "skipped": skipped})
    return folder


def _train_shown(config: Config, curves: LossCurves | None, train: Callable[[OnProgress], object]) -> int:
    """Run ``train`` behind progress bars. Print and return the number of skipped steps."""
    with _progress() as bar:
        tasks = {number: bar.add_task(f"expert {number}", total=config.training.steps) for number in _numbers(config)}
        if config.training.trunk_steps:
            tasks[TRUNK] = bar.add_task("trunk", total=config.training.trunk_steps)
        skipped = dict.fromkeys(tasks, 0)

        def on_progress(progress: TrainingProgress) -> None:
            if curves:
                curves(progress)
            skipped[progress.expert] = progress.skipped
            label = f"{_network_name(progress.expert)}  loss {progress.loss:.4f}"
            bar.update(tasks[progress.expert], completed=progress.step, description=label)

        train(on_progress)
    for number, count in skipped.items():
        if count:
            remarks.print(f"{_network_name(number)}: skipped {count} of its steps, as their gradients were not finite")
    return sum(skipped.values())


def _network_name(number: int) -> str:
    return f"expert {number}" if number != TRUNK else "trunk"


def _given(**options: Any) -> dict[str, Any]:
    """Return the options that are not None, which are those that the user gave."""
    return {name: value for name, value in options.items() if value is not None}


def _say_where_it_goes_on(folder: Path, config: Config, data: TrainingData) -> None:
    """Print from which step finished experts whose training is made longer resume."""
    config = with_scale(config, data)
    for number in _numbers(config):
        finished, state = steps_done(folder, config, number, data)
        if 0 < finished < config.training.steps and state:
            remarks.print(f"expert {number} goes on from step {state}")
        elif 0 < finished < config.training.steps:
            remarks.print(f"expert {number} starts over: {folder} has its weights at step {finished} but no state to go on from")


def open_ensemble(
    folder: Path, device: torch.device, *, first_stage: str | None, one_at_a_time: bool, precision: Precision | None = None
) -> Ensemble:
    """Open a trained ensemble, to be sampled in ``precision``. ``first_stage`` replaces the first stage that it was trained
    with."""
    ensemble = load_ensemble(folder, device, one_at_a_time=one_at_a_time)
    config = with_first_stage(ensemble.config, first_stage)
    ensemble.config = config.with_(sampling={"precision": precision}) if precision else config
    return ensemble


def sample_folder(
    folder: Path,
    *,
    count: int = 64,
    seed: int = 0,
    out: Path | None = None,
    first_stage: str | None = None,
    one_at_a_time: bool = False,
    precision: Precision | None = None,
    device: str = "auto",
) -> Path:
    """Draw ``count`` images from a trained ensemble into one PNG; return its path."""
    if count < 1:
        raise UserError(f"count: must be at least 1, not {count}")
    chosen = pick_device(device)
    ensemble = open_ensemble(folder, chosen, first_stage=first_stage, one_at_a_time=one_at_a_time, precision=precision)
    path = out or folder / "samples.png"
    check_output(ensemble.config, path)
    check_writable(path.parent)  # before the work
    images = torch.cat([batch.cpu() for batch in draw(ensemble, count, seed, chosen)])
    save_grid(path, images)
    console.print(f"{count} samples: {path}")
    emit({"samples": count, "seed": seed, "path": path})
    return path


def evaluate_folder(
    folder: Path,
    *,
    metrics: Sequence[Metric] = (),
    seeds: int = 3,
    samples: int | None = None,
    features: FeatureKind | None = None,
    inception_split: int | None = None,
    inception_weights: Path | None = None,
    first_stage: str | None = None,
    one_at_a_time: bool = False,
    precision: Precision | None = None,
    device: str = "auto",
) -> list[Score]:
    """Score a trained ensemble with ``seeds`` sampling seeds; print mean and spread with the protocol.

    Without ``metrics``, all that the feature space offers are computed. The scores are written into the folder as
    ``evaluation.json``.
    """
    if seeds < 1:
        raise UserError(f"seeds: must be at least 1, not {seeds}")
    chosen = pick_device(device)
    ensemble = open_ensemble(folder, chosen, first_stage=first_stage, one_at_a_time=one_at_a_time, precision=precision)
    scoring = _given(samples=samples, inception_split=inception_split)
    config = ensemble.config = ensemble.config.with_(evaluation=scoring)
    images = open_reference(config, on_message=remarks.print)
    kind = features or config.evaluation.features
    space = choose_features(kind, images, inception_weights=inception_weights, device=chosen, on_message=remarks.print)
    metrics = tuple(metrics) or _fitting_metrics(space, images, config.evaluation.samples)
    scores = [
        evaluate(ensemble, images, space, metrics=metrics, seed=config.evaluation.seed + offset, device=chosen)
        for offset in range(seeds)
    ]
    scored = protocol(images, space, config.evaluation.samples, metrics, config.evaluation.inception_split)
    how = f"{scored}, {_sampling_protocol(config)}, {seeds} sampling seeds"
    record = _evaluation(scores, metrics, how)
    _print_scores(scores, metrics)
    console.print(f"({how})")
    emit({"folder": folder} | record)
    try:  # last: scores that were printed are not lost where the folder may only be read
        write_text(folder / EVALUATION, json.dumps(record, indent=2))
    except OSError as error:
        raise UserError(f"{folder / EVALUATION}: the scores above can't be written there ({error.strerror})") from None
    return scores


def _sampling_protocol(config: Config) -> str:
    """Describe how images were drawn, for the protocol line."""
    how = [f"{config.sampling.sampler} {config.sampling.steps} steps"]
    how += [config.sampling.precision] if config.sampling.precision != "auto" else []
    return ", ".join([*how, *(["classes in turn"] if config.network.classes else [])])


def _fitting_metrics(space: FeatureSpace, images: Images, samples: int) -> tuple[Metric, ...]:
    """Return the metrics that the feature space offers and for which there are enough images. Print the names of the others."""
    offered, count = offered_metrics(space), min(len(images), samples)
    fitting = tuple(metric for metric in offered if fewest_images(metric) <= count)
    if few := [metric for metric in offered if metric not in fitting]:
        remarks.print(f"left out, since {count} images are too few: {', '.join(few)}")
    if not fitting:
        require_images(offered, len(images), images.name)
    return fitting


def _evaluation(scores: list[Score], metrics: Sequence[Metric], how: str) -> dict:
    """Return an evaluation as stored: each metric's mean and its value for each sampling seed, and the ensemble's cost."""
    values = {metric: [score.measured[metric].value for score in scores] for metric in metrics}
    return {
        "metrics": {metric: {"mean": statistics.fmean(found), "values": found} for metric, found in values.items()},
        "protocol": how,
        "macs": scores[0].macs,
        "params": scores[0].params,
        "latency_ms": scores[0].latency_ms,
        "date": time.strftime("%Y-%m-%d"),
    }


def _print_scores(scores: list[Score], metrics: Sequence[Metric]) -> None:
    """Print a line for each metric, with its mean and standard deviation over the sampling seeds, then the ensemble's cost."""
    for metric in metrics:
        values = [score.measured[metric].value for score in scores]
        spread = f" +- {statistics.stdev(values):.4g}" if len(values) > 1 else ""
        console.print(f"{NAMES[metric]:<16} {statistics.fmean(values):.5g}{spread}")
    first = scores[0]
    console.print(
        f"{first.macs / 1e6:.2f}M MACs an image and step, {first.params:,} parameters, {first.latency_ms:.2f} ms an image"
    )


def analyze_sources(
    kind: Literal["latents", "features", "experts"],
    sources: Sequence[str],
    *,
    data: str | None = None,
    images: int = 10_000,
    timesteps: Sequence[int] = (),
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> list[Path]:
    """Write the paper's Fig. 2, 3 or 6 as PNG and CSV; return their paths.

    ``latents`` takes a preset, a YAML or a trained folder, ``features`` one trained folder, ``experts`` one or more of them.
    The files go to ``out``, else to ``analysis`` in the first folder, or for a preset ``results/<preset>-analysis``.
    """
    from meme.analysis import figures  # matplotlib is for this verb alone
    from meme.analysis import spectra as analysis

    if len(sources) != 1 and (kind != "experts" or not sources):
        raise UserError(f"sources: {kind} takes {'one or more' if kind == 'experts' else 'one'}, not {len(sources)}")
    chosen = pick_device(device)
    loaded = {} if kind == "latents" else _ensembles(sources, chosen)
    config = with_data(next(iter(loaded.values())).config if loaded else _config_of(sources[0]), data)
    target = _target(config, out or _analysis_folder(sources[0]))
    as_they_are = config.with_(training={"flip": False})
    tensors = training_data(as_they_are, open_reference(config, on_message=remarks.print), chosen, remarks.print)
    with _progress() as bar:
        task = bar.add_task(kind, total=None)
        options: dict[str, Any] = {"count": images, "seed": seed}
        options["on_progress"] = partial(_show_progress, bar, task)
        if kind == "latents":
            table = analysis.latents(tensors, config.diffusion, timesteps, device=chosen, **options)
        elif kind == "features":
            table = analysis.features(next(iter(loaded.values())), tensors, timesteps, **options)
        else:
            table = analysis.experts(loaded, tensors, timesteps, **options)
    write = {"latents": figures.write_latents, "features": figures.write_features, "experts": figures.write_experts}
    paths = write[kind](table, target)
    if kind == "experts":
        _say_distances(analysis.expert_distances(table))
    console.print(f"{kind} of {table['images'].max():,} images: {', '.join(str(path) for path in paths)}")
    return paths


def _say_distances(distances: "pd.DataFrame") -> None:
    for name, mean in distances.groupby("ensemble", sort=False)["distance"].mean().items():
        console.print(f"{name}: given the same input, experts lie {mean:.3f} apart in relative log amplitude (ln)")


def _target(config: Config, folder: Path) -> Path:
    """Return ``folder`` after a check, before any work, that results may be written there."""
    check_output(config, folder)
    check_writable(folder)
    return folder


def _ensembles(sources: Sequence[str], device: torch.device) -> dict[str, Ensemble]:
    """Open trained ensembles. Each is keyed by the name of its config, or by its path where two have the same name."""
    loaded = {source: load_ensemble(Path(source), device, one_at_a_time=True) for source in sources}
    names = [ensemble.config.name for ensemble in loaded.values()]
    return {name if names.count(name) == 1 else source: loaded[source] for source, name in zip(loaded, names, strict=True)}


def _config_of(source: str) -> Config:
    """Return the config of a preset, a YAML file or a trained folder."""
    inside = Path(source) / "config.yaml"
    return read_config(inside if inside.is_file() else source)


def _analysis_folder(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path / "analysis"
    return path.with_suffix("") / "analysis" if path.is_file() else Path("results") / f"{source}-analysis"


def run_ablation(ablation: Ablation) -> Path:
    """Train, score and compare the rows of one of the paper's ablations; return the path of the table, which is also printed.

    The same call resumes an interrupted run. Rows that an earlier recipe trained in the same folder are taken from there.
    """
    check_output(ablation.config(ablation.rows[0]), ablation.folder)
    with _progress() as bar:
        task = bar.add_task("opening the data", total=None)

        def on_progress(training: Training, progress: TrainingProgress) -> None:
            label = f"{training.row} seed {training.config.training.seed} expert {progress.expert}"
            bar.update(task, description=label, completed=progress.step, total=progress.steps)

        scores, basis = run_recipe(ablation, on_progress=on_progress, on_message=remarks.print)
    report = report_of(ablation, scores, basis)
    write_text(ablation.file("md"), markdown(report))
    print_report(report, console)
    console.print(f"written: {ablation.file('md')}, {ablation.file('csv')}")
    return ablation.file("md")


def print_costs(sources: Sequence[str]) -> None:
    """Print parameters and MACs of every expert of presets or configs (default: all presets), with the paper's figures beside
    them."""
    rows = [row for source in sources or preset_names() for row in cost_rows(read_config(source))]
    if not console.quiet:
        print_table(rows, console)
    emit([asdict(row) for row in rows])


def export_folder(folder: Path, *, out: Path | None = None, licence: str = "unknown") -> Path:
    """Write the trained ensemble in ``folder``, or a study's winner, as a folder that diffusers opens; return its path.

    The path is ``out``, or by default ``diffusers`` in the folder.
    """
    trained = find_trained(folder)
    if trained.remark:
        remarks.print(trained.remark)
    target = out or folder / "diffusers"
    check_output(trained.config, target)
    written = export_diffusers(trained, target, licence=licence)
    scored = "with scores" if trained.scores else "without scores: python -m meme evaluate records them"
    console.print(f"exported {trained.config.name}: {written} (its README.md says how to load it; {scored})")
    emit({"folder": written, "ensemble": trained.folder, "name": trained.config.name, "has_scores": bool(trained.scores)})
    return written


def describe_data(source: str, *, follow_links: bool = False) -> Survey:
    """Print what the data set at ``source`` holds, and which commands to start with."""
    with _progress() as bar:
        task = bar.add_task("looking at files", total=None)
        shown = partial(_show_progress, bar, task)
        found = survey(source, shown, follow_links=follow_links)
    gpu = torch.cuda.is_available()
    for label, text in survey_lines(found, gpu=gpu):
        console.print(f"{label:<14} {text}")
    unreadable = [{"name": each.name, "reason": each.reason} for each in found.unreadable]
    suggested = {"preset": suggested_preset(found), "commands": suggested_commands(found, gpu=gpu)}
    emit(asdict(found) | {"unreadable": unreadable} | suggested)
    return found


def _show_progress(bar: Progress, task: TaskID, done: int, total: int) -> None:
    bar.update(task, completed=done, total=total)


def _default_folder(source: str | Path) -> Path:
    path = Path(source)
    return path.with_suffix("") if path.is_file() else Path("results") / f"{source}-full"


def _numbers(config: Config) -> range:
    return range(1, len(config.experts) + 1)


def _progress() -> Progress:
    label = TextColumn("{task.description:<24}", markup=False)
    count = TextColumn("{task.completed}/{task.total}", markup=False)
    return Progress(label, BarColumn(), count, TimeRemainingColumn(), console=remarks)
