"""``python -m meme train / sample / evaluate / cost``."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from meme.cli import exits_with_a_sentence
from meme.config import Config


def train(
    config: Annotated[str, tyro.conf.Positional],
    data: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    strict: bool = False,
) -> None:
    """Train every expert of a preset or YAML config; run again, it goes on where it was.

    Args:
        config: a preset's name, or a YAML file such as results/digits-meme/winner.yaml.
        data: digits, or a folder or zip of images. None: what the config names.
        out: folder for the trained ensemble. None: beside the YAML and named like it.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        strict: refuse a data set with unreadable files instead of skipping them.
    """
    from meme.commands import train_config

    train_config(config, data=data, out=out, device=device, strict=strict)


def sample(
    folder: Annotated[Path, tyro.conf.Positional],
    count: int = 64,
    seed: int = 0,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Draw images from a trained ensemble into one PNG.

    Args:
        folder: a trained ensemble, e.g. results/digits-meme/winner.
        count: images to draw.
        seed: of the noise they start from.
        out: the PNG. None: samples.png in the folder.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    from meme.commands import sample_folder

    sample_folder(folder, count=count, seed=seed, out=out, device=device)


def evaluate(
    folder: Annotated[Path, tyro.conf.Positional],
    seeds: int = 3,
    samples: int | None = None,
    features: Literal["auto", "inception", "classifier", "random"] | None = None,
    inception_weights: Path | None = None,
    device: str = "auto",
) -> None:
    """Score a trained ensemble: FID over several sampling seeds, MACs, parameters, latency.

    Args:
        folder: a trained ensemble, e.g. results/digits-meme/winner.
        seeds: how many sampling seeds.
        samples: images to draw for each. None: as the config says.
        features: feature space of the FID. None: as the config says.
        inception_weights: Inception's TorchScript file, for machines with no network.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    from meme.commands import evaluate_folder

    evaluate_folder(folder, seeds=seeds, samples=samples, features=features, inception_weights=inception_weights, device=device)


def cost(configs: tyro.conf.Positional[list[str]] = []) -> None:  # noqa: B006
    """Parameters and MACs of every expert, attention counted.

    Args:
        configs: presets or YAML files. None: all presets.
    """
    from meme.commands import print_costs

    print_costs(configs)


def main(arguments: list[str] | None = None) -> None:
    with exits_with_a_sentence(Config):
        verbs = {verb.__name__: verb for verb in (train, sample, evaluate, cost)}
        tyro.extras.subcommand_cli_from_dict(verbs, prog="python -m meme", args=arguments)


if __name__ == "__main__":
    main()
