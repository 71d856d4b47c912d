"""The verbs of ``python -m meme``: each works on a config, or on the folder of a trained ensemble."""

import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from meme.config import Config
from meme.cost import ensemble_cost
from meme.errors import UserError
from meme.features import choose_features
from meme.grids import save_grid
from meme.pipeline import Score, claim_folder, draw, evaluate, load_ensemble, open_training_data, pick_device, train
from meme.presets import preset, preset_names
from meme.trainer import Progress as TrainingProgress

console = Console(highlight=False, soft_wrap=True)


def read_config(source: str | Path) -> Config:
    """A preset by its name, or a config from a YAML file."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        return Config.load(path)
    return preset(str(source))


def train_config(
    source: str | Path, *, data: str | None = None, out: Path | None = None, device: str = "auto", strict: bool = False
) -> Path:
    """Train every expert of a preset or YAML config; return the folder of the trained ensemble.

    Interrupted, the same call goes on where it was. The folder is ``out``, else beside the YAML and named like it, else
    ``results/`` and the preset's name, with ``-full``.
    """
    config = read_config(source)
    config = config.with_(data=str(Path(data).absolute()) if data and data != "digits" else data) if data else config
    folder = out or _default_folder(source)
    images = open_training_data(config.data, config.image, strict=strict, on_message=console.print)
    claim_folder(folder, config)
    with _progress() as bar:
        tasks = {number: bar.add_task(f"expert {number}", total=config.training.steps) for number in _numbers(config)}

        def on_progress(progress: TrainingProgress) -> None:
            label = f"expert {progress.expert}  loss {progress.loss:.4f}"
            bar.update(tasks[progress.expert], completed=progress.step, description=label)

        train(config, images, folder=folder, device=pick_device(device), on_progress=on_progress)
    console.print(f"trained {len(config.experts)} experts x {config.training.steps} steps: {folder}")
    return folder


def sample_folder(folder: Path, *, count: int = 64, seed: int = 0, out: Path | None = None, device: str = "auto") -> Path:
    """Draw ``count`` images from a trained ensemble into one PNG; return its path."""
    if count < 1:
        raise UserError(f"count: must be at least 1, not {count}")
    chosen = pick_device(device)
    images = torch.cat([batch.cpu() for batch in draw(load_ensemble(folder, chosen), count, seed, chosen)])
    path = out or folder / "samples.png"
    save_grid(path, images)
    console.print(f"{count} samples: {path}")
    return path


def evaluate_folder(
    folder: Path,
    *,
    seeds: int = 3,
    samples: int | None = None,
    features: str | None = None,
    inception_weights: Path | None = None,
    device: str = "auto",
) -> list[Score]:
    """Score a trained ensemble with ``seeds`` sampling seeds; print mean and spread with the protocol."""
    if seeds < 1:
        raise UserError(f"seeds: must be at least 1, not {seeds}")
    chosen = pick_device(device)
    ensemble = load_ensemble(folder, chosen)
    changes = {"samples": samples} if samples else {}
    config = ensemble.config = ensemble.config.with_(evaluation=changes)
    images = open_training_data(config.data, config.image, on_message=console.print)
    kind = features or config.evaluation.features
    space = choose_features(kind, images, inception_weights=inception_weights, device=chosen, on_message=console.print)
    scores = [evaluate(ensemble, images, space, seed=config.evaluation.seed + offset, device=chosen) for offset in range(seeds)]
    console.print(_sentence(config, scores))
    return scores


def print_costs(sources: list[str]) -> None:
    """Parameters and MACs of every expert of presets or configs (default: all presets)."""
    for source in sources or preset_names():
        config = read_config(source)
        cost = ensemble_cost(config)
        console.print(f"{config.name}: {cost.params:,} parameters, {cost.macs / 1e9:.3f} GMACs an image and step")
        for number, expert in zip(_numbers(config), cost.experts, strict=True):
            console.print(f"  expert {number}: {expert.params:,} parameters, {expert.macs / 1e9:.3f} GMACs")


def _sentence(config: Config, scores: list[Score]) -> str:
    fids = [score.fid for score in scores]
    spread = f" +- {statistics.stdev(fids):.3f}" if len(fids) > 1 else ""
    first = scores[0]
    return (
        f"FID {statistics.fmean(fids):.3f}{spread} over {len(fids)} sampling seeds ({first.features} features, {first.samples} "
        f"samples, {config.sampling.sampler} {config.sampling.steps} steps), {first.macs / 1e6:.2f}M MACs, "
        f"{first.params:,} parameters, {first.latency_ms:.2f} ms an image"
    )


def _default_folder(source: str | Path) -> Path:
    path = Path(source)
    return path.with_suffix("") if path.is_file() else Path("results") / f"{source}-full"


def _numbers(config: Config) -> range:
    return range(1, len(config.experts) + 1)


def _progress() -> Progress:
    label, count = TextColumn("{task.description:<24}"), TextColumn("{task.completed}/{task.total}")
    return Progress(label, BarColumn(), count, TimeRemainingColumn(), console=console)
