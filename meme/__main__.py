"""``python -m meme train / sample / evaluate / analyze / ablate / cost``."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from meme.cli import exits_with_a_sentence
from meme.config import Config


def train(
    config: Annotated[str, tyro.conf.Positional],
    data: str | None = None,
    first_stage: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    strict: bool = False,
) -> None:
    """Train every expert of a preset or YAML config; run again, it goes on where it was.

    Args:
        config: a preset's name, or a YAML file such as results/digits-meme/winner.yaml.
        data: digits, or a folder or zip of images. None: what the config names.
        first_stage: the autoencoder of a latent preset: a folder as diffusers writes it, or a hub name. None: what the config
            names.
        out: folder for the trained ensemble. None: beside the YAML and named like it.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        strict: refuse a data set with unreadable files instead of skipping them.
    """
    from meme.commands import train_config

    train_config(config, data=data, first_stage=first_stage, out=out, device=device, strict=strict)


def sample(
    folder: Annotated[Path, tyro.conf.Positional],
    count: int = 64,
    seed: int = 0,
    out: Path | None = None,
    first_stage: str | None = None,
    one_at_a_time: bool = False,
    device: str = "auto",
) -> None:
    """Draw images from a trained ensemble into one PNG.

    Args:
        folder: a trained ensemble, e.g. results/digits-meme/winner.
        count: images to draw.
        seed: of the noise they start from.
        out: the PNG. None: samples.png in the folder.
        first_stage: the autoencoder of a latent ensemble, if it is no longer where it was trained.
        one_at_a_time: keep one expert in memory, and the states of all images on disk between experts.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    from meme.commands import sample_folder

    sample_folder(folder, count=count, seed=seed, out=out, first_stage=first_stage, one_at_a_time=one_at_a_time, device=device)


def evaluate(
    folder: Annotated[Path, tyro.conf.Positional],
    metrics: tuple[Literal["fid", "sfid", "kid", "inception_score", "precision", "recall"], ...] = (),
    seeds: int = 3,
    samples: int | None = None,
    features: Literal["auto", "inception", "classifier", "random"] | None = None,
    inception_weights: Path | None = None,
    first_stage: str | None = None,
    one_at_a_time: bool = False,
    device: str = "auto",
) -> None:
    """Score a trained ensemble over several sampling seeds: FID and its relatives, MACs, parameters, latency.

    Args:
        folder: a trained ensemble, e.g. results/digits-meme/winner.
        metrics: which of them. None: all that the feature space offers.
        seeds: how many sampling seeds.
        samples: images to draw for each; they are not kept. None: as the config says.
        features: feature space of the metrics. None: as the config says.
        inception_weights: Inception's TorchScript file, for machines with no network.
        first_stage: the autoencoder of a latent ensemble, if it is no longer where it was trained.
        one_at_a_time: keep one expert in memory, and the states of all images on disk between experts.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    from meme.commands import evaluate_folder

    evaluate_folder(
        folder,
        metrics=metrics,
        seeds=seeds,
        samples=samples,
        features=features,
        inception_weights=inception_weights,
        first_stage=first_stage,
        one_at_a_time=one_at_a_time,
        device=device,
    )


def analyze(
    kind: Annotated[Literal["latents", "features", "experts"], tyro.conf.Positional],
    sources: Annotated[tuple[str, ...], tyro.conf.Positional],
    data: str | None = None,
    images: int = 10_000,
    timesteps: tuple[int, ...] = (),
    out: Path | None = None,
    seed: int = 0,
    device: str = "auto",
) -> None:
    """Frequency analysis: the paper's Fig. 2 (latents), 3 (features) or 6 (experts), as PNG and CSV.

    Args:
        kind: latents shows x_t by timestep, features every layer by timestep, experts expert against expert.
        sources: for latents a preset, a YAML file or a trained folder; for features a trained folder; for experts one or
            more, side by side.
        data: digits, or a folder or zip of images. None: what the config names.
        images: how many are averaged over, at most all.
        timesteps: which t are looked at. Empty: eleven over all of T; for experts three of every interval.
        out: folder of the files. None: analysis in the trained folder.
        seed: of the choice of images and their noise.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    from meme.commands import analyze_sources

    analyze_sources(kind, sources, data=data, images=images, timesteps=timesteps, out=out, seed=seed, device=device)


def ablate(
    recipe: Annotated[Literal["probabilities", "experts", "assignment", "architecture"], tyro.conf.Positional],
    family: str = "digits",
    data: str | None = None,
    first_stage: str | None = None,
    steps: int | None = None,
    seeds: int = 3,
    sampling_seeds: int = 1,
    samples: int | None = None,
    features: Literal["auto", "inception", "classifier", "random"] | None = None,
    equal_total: bool = False,
    all_rows: bool = False,
    out: Path | None = None,
    device: str = "auto",
) -> None:
    """Train the rows of one of the paper's ablations over several seeds; print its table with ours beside it.

    Run again, it goes on where it was; rows that recipes share are trained once.

    Args:
        recipe: probabilities (Table 6), experts (Table 7), assignment (hard against soft) or architecture (Tables 1 and 2).
        family: presets to train: digits, cifar10, ffhq, celebahq or celeba64.
        data: digits, or a folder or zip of images. None: what the presets name.
        first_stage: the autoencoder of families that denoise latents: a folder or hub name. None: the presets'.
        steps: training steps an expert; networks alone get as many times more as in the presets. None: the presets'.
        seeds: training seeds; one alone has no spread.
        sampling_seeds: sampling seeds to average over for each training seed.
        samples: images to draw for each score. None: as the presets say.
        features: feature space of the FID. None: as the presets say.
        equal_total: recipe experts: all experts together get the steps of four, however many they are.
        all_rows: recipe architecture: also LDM-L and Lite-LDM.
        out: folder for trainings and tables. None: results/ablations/ and the family.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
    """
    from meme.ablations import Ablation
    from meme.commands import run_ablation

    run_ablation(
        Ablation(
            recipe,
            family,
            data=data,
            first_stage=first_stage,
            steps=steps,
            seeds=seeds,
            sampling_seeds=sampling_seeds,
            samples=samples,
            features=features,
            equal_total=equal_total,
            all_rows=all_rows,
            out=out,
            device=device,
        )
    )


def cost(configs: tyro.conf.Positional[list[str]] = [], json: bool = False) -> None:  # noqa: B006
    """Parameters and MACs of every expert, beside the paper's figures.

    Args:
        configs: presets or YAML files. None: all presets.
        json: print a list of records for programs instead of a table.
    """
    from meme.commands import print_costs

    print_costs(configs, as_json=json)


def main(arguments: list[str] | None = None) -> None:
    with exits_with_a_sentence(Config):
        verbs = {verb.__name__: verb for verb in (train, sample, evaluate, analyze, ablate, cost)}
        tyro.extras.subcommand_cli_from_dict(verbs, prog="python -m meme", args=arguments)


if __name__ == "__main__":
    main()
