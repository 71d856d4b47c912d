"""The verbs of ``python -m meme``: each works on a config, or on the folder of a trained ensemble."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from meme.ablation_tables import markdown, print_report, report_of
from meme.ablations import Ablation, Training
from meme.ablations import run as run_recipe
from meme.config import Config
from meme.cost_table import cost_rows, print_table, to_json
from meme.ensemble import Ensemble
from meme.errors import UserError
from meme.features import choose_features
from meme.files import write_text
from meme.grids import save_grid
from meme.metrics import Metric, offered_metrics, protocol
from meme.pipeline import Score, draw, evaluate, load_ensemble, open_reference, pick_device, train, training_data
from meme.presets import preset, preset_names
from meme.trainer import Progress as TrainingProgress

console = Console(highlight=False, soft_wrap=True)

NAMES: dict[Metric, str] = {
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "inception_score": "inception score",
    "precision": "precision",
    "recall": "recall",
}


def read_config(source: str | Path) -> Config:
    """A preset by its name, or a config from a YAML file."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return Config.load(path)
    return preset(str(source))


def with_data(config: Config, data: str | None) -> Config:
    """``config`` on other data: a path is kept absolute, since whoever reads the config may run elsewhere."""
    if data is None:
        return config
    return config.with_(data=data if data == "digits" else str(Path(data).absolute()))


def with_first_stage(config: Config, source: str | None) -> Config:
    """``config`` with the autoencoder of a folder or hub name; ``UserError`` where it denoises pixels."""
    if source is None:
        return config
    if config.first_stage is None:
        raise UserError(f"first_stage: {config.name} denoises pixels and takes none")
    found = str(Path(source).absolute()) if Path(source).exists() else source
    return config.with_(first_stage={"source": found})


def train_config(
    source: str | Path,
    *,
    data: str | None = None,
    first_stage: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    strict: bool = False,
) -> Path:
    """Train every expert of a preset or YAML config; return the folder of the trained ensemble.

    Interrupted, the same call goes on where it was. The folder is ``out``, else beside the YAML and named like it, else
    ``results/`` and the preset's name, with ``-full``.
    """
    config = with_data(with_first_stage(read_config(source), first_stage), data)
    folder = out or _default_folder(source)
    chosen = pick_device(device)
    images = open_reference(config, strict=strict, on_message=console.print)
    data = training_data(config, images, chosen, console.print)
    with _progress() as bar:
        tasks = {number: bar.add_task(f"expert {number}", total=config.training.steps) for number in _numbers(config)}

        def on_progress(progress: TrainingProgress) -> None:
            label = f"expert {progress.expert}  loss {progress.loss:.4f}"
            bar.update(tasks[progress.expert], completed=progress.step, description=label)

        train(config, data, folder=folder, device=chosen, on_progress=on_progress)
    console.print(f"trained {len(config.experts)} experts x {config.training.steps} steps: {folder}")
    return folder


def open_ensemble(folder: Path, device: torch.device, *, first_stage: str | None, one_at_a_time: bool) -> Ensemble:
    """A trained ensemble, its first stage perhaps elsewhere than where it was trained."""
    ensemble = load_ensemble(folder, device, one_at_a_time=one_at_a_time)
    ensemble.config = with_first_stage(ensemble.config, first_stage)
    return ensemble


def sample_folder(
    folder: Path,
    *,
    count: int = 64,
    seed: int = 0,
    out: Path | None = None,
    first_stage: str | None = None,
    one_at_a_time: bool = False,
    device: str = "auto",
) -> Path:
    """Draw ``count`` images from a trained ensemble into one PNG; return its path."""
    if count < 1:
        raise UserError(f"count: must be at least 1, not {count}")
    chosen = pick_device(device)
    ensemble = open_ensemble(folder, chosen, first_stage=first_stage, one_at_a_time=one_at_a_time)
    images = torch.cat([batch.cpu() for batch in draw(ensemble, count, seed, chosen)])
    path = out or folder / "samples.png"
    save_grid(path, images)
    console.print(f"{count} samples: {path}")
    return path


def evaluate_folder(
    folder: Path,
    *,
    metrics: Sequence[Metric] = (),
    seeds: int = 3,
    samples: int | None = None,
    features: str | None = None,
    inception_weights: Path | None = None,
    first_stage: str | None = None,
    one_at_a_time: bool = False,
    device: str = "auto",
) -> list[Score]:
    """Score a trained ensemble with ``seeds`` sampling seeds; print mean and spread with the protocol.

    Without ``metrics``, all that the feature space offers.
    """
    if seeds < 1:
        raise UserError(f"seeds: must be at least 1, not {seeds}")
    chosen = pick_device(device)
    ensemble = open_ensemble(folder, chosen, first_stage=first_stage, one_at_a_time=one_at_a_time)
    config = ensemble.config = ensemble.config.with_(evaluation={"samples": samples} if samples else {})
    images = open_reference(config, on_message=console.print)
    kind = features or config.evaluation.features
    space = choose_features(kind, images, inception_weights=inception_weights, device=chosen, on_message=console.print)
    metrics = tuple(metrics) or offered_metrics(space)
    scores = [
        evaluate(ensemble, images, space, metrics=metrics, seed=config.evaluation.seed + offset, device=chosen)
        for offset in range(seeds)
    ]
    _print_scores(scores, metrics)
    sampler = f"{config.sampling.sampler} {config.sampling.steps} steps, {seeds} sampling seeds"
    console.print(f"({protocol(images, space, config.evaluation.samples, metrics)}, {sampler})")
    return scores


def _print_scores(scores: list[Score], metrics: Sequence[Metric]) -> None:
    """A line for each metric, its mean and standard deviation over the sampling seeds, then what the ensemble costs."""
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
    """The paper's Fig. 2, 3 or 6, as PNG and CSV; return their paths.

    ``latents`` takes a preset, a YAML or a trained folder, ``features`` one trained folder, ``experts`` one or more of them.
    The files go to ``out``, else to ``analysis`` in the first folder, or for a preset ``results/<preset>-analysis``.
    """
    from meme import analysis, figures  # matplotlib is for this verb alone

    if len(sources) != 1 and (kind != "experts" or not sources):
        raise UserError(f"sources: {kind} takes {'one or more' if kind == 'experts' else 'one'}, not {len(sources)}")
    chosen = pick_device(device)
    loaded = {} if kind == "latents" else _ensembles(sources, chosen)
    config = with_data(next(iter(loaded.values())).config if loaded else _config_of(sources[0]), data)
    tensors = training_data(config, open_reference(config, on_message=console.print), chosen, console.print)
    with _progress() as bar:
        task = bar.add_task(kind, total=None)
        options = {"count": images, "seed": seed}
        options["on_progress"] = lambda done, total: bar.update(task, completed=done, total=total)
        if kind == "latents":
            table = analysis.latents(tensors, config.diffusion, timesteps, device=chosen, **options)
        elif kind == "features":
            table = analysis.features(next(iter(loaded.values())), tensors, timesteps, **options)
        else:
            table = analysis.experts(loaded, tensors, timesteps, **options)
    write = {"latents": figures.write_latents, "features": figures.write_features, "experts": figures.write_experts}
    paths = write[kind](table, out or _analysis_folder(sources[0]))
    if kind == "experts":
        for name, mean in analysis.expert_distances(table).groupby("ensemble", sort=False)["distance"].mean().items():
            console.print(f"{name}: given the same input, experts lie {mean:.3f} apart in relative log amplitude (ln)")
    console.print(f"{kind} of {table['images'].max():,} images: {', '.join(str(path) for path in paths)}")
    return paths


def _ensembles(sources: Sequence[str], device: torch.device) -> dict[str, Ensemble]:
    """Trained ensembles by the name of their config, or by their path where two have the same name."""
    loaded = {source: load_ensemble(Path(source), device, one_at_a_time=True) for source in sources}
    names = [ensemble.config.name for ensemble in loaded.values()]
    return {name if names.count(name) == 1 else source: loaded[source] for source, name in zip(loaded, names, strict=True)}


def _config_of(source: str) -> Config:
    """The config of a preset, of a YAML file or of a trained folder."""
    inside = Path(source) / "config.yaml"
    return read_config(inside if inside.is_file() else source)


def _analysis_folder(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        return path / "analysis"
    return path.with_suffix("") / "analysis" if path.is_file() else Path("results") / f"{source}-analysis"


def run_ablation(ablation: Ablation) -> Path:
    """Train, score and compare the rows of one of the paper's ablations; return the table it also prints.

    Interrupted, the same call goes on where it was; rows that an earlier recipe trained in the same folder are taken from there.
    """
    with _progress() as bar:
        task = bar.add_task("opening the data", total=None)

        def on_progress(training: Training, progress: TrainingProgress) -> None:
            label = f"{training.row} seed {training.config.training.seed} expert {progress.expert}"
            bar.update(task, description=label, completed=progress.step, total=progress.steps)

        scores, basis = run_recipe(ablation, on_progress=on_progress, on_message=console.print)
    report = report_of(ablation, scores, basis)
    write_text(ablation.file("md"), markdown(report))
    print_report(report, console)
    console.print(f"written: {ablation.file('md')}, {ablation.file('csv')}")
    return ablation.file("md")


def print_costs(sources: list[str], *, as_json: bool = False) -> None:
    """Parameters and MACs of every expert of presets or configs (default: all presets), the paper's figures beside them."""
    rows = [row for source in sources or preset_names() for row in cost_rows(read_config(source))]
    if as_json:
        print(to_json(rows))
    else:
        print_table(rows, console)


def _default_folder(source: str | Path) -> Path:
    path = Path(source)
    return path.with_suffix("") if path.is_file() else Path("results") / f"{source}-full"


def _numbers(config: Config) -> range:
    return range(1, len(config.experts) + 1)


def _progress() -> Progress:
    label, count = TextColumn("{task.description:<24}"), TextColumn("{task.completed}/{task.total}")
    return Progress(label, BarColumn(), count, TimeRemainingColumn(), console=console)
