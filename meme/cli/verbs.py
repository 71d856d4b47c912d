"""``python -m meme train / sample / evaluate / export / data / analyze / ablate / cost``."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from meme.cli.console import Output, printing
from meme.cli.parsing import BY_CONFIG, PARSING, POSITIONAL, check_words, exits_with_a_sentence, hint, with_homes
from meme.config.schema import Config
from meme.support.precision import Precision as NumberFormat

FeatureKind = Literal["auto", "inception", "classifier", "random"]
Data = Annotated[str | None, hint("PATH", BY_CONFIG)]
FirstStage = Annotated[str | None, hint("PATH", BY_CONFIG)]
Features = Annotated[FeatureKind | None, hint("{auto,inception,classifier,random}", BY_CONFIG)]
Device = Annotated[str, hint("DEVICE")]
Precision = Annotated[NumberFormat | None, hint("{auto,bf16,fp16,fp32}", BY_CONFIG)]
Samples = Annotated[int | None, hint("IMAGES", BY_CONFIG)]


@dataclass(frozen=True)
class Resources:
    """Where and how networks run."""

    device: Device = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    one_at_a_time: bool = False
    """Keep one expert in memory, and the states of all images on disk between experts."""
    precision: Precision = None
    """Numbers that networks calculate with: bf16, fp16 or fp32; auto is bf16 on a GPU and fp32 elsewhere."""


@dataclass(frozen=True)
class Machine:
    """Where networks run."""

    device: Device = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""


def train(
    config: Annotated[str, POSITIONAL, hint("CONFIG")],
    data: Data = None,
    first_stage: FirstStage = None,
    init_from: Annotated[Path | None, hint("PATH", "(default: fresh weights)")] = None,
    trunk_share: Annotated[float | None, hint("SHARE", "(default: as the config says; 0 in presets)")] = None,
    steps: Annotated[int | None, hint("STEPS", BY_CONFIG)] = None,
    precision: Precision = None,
    out: Annotated[Path | None, hint("FOLDER", "(default: the YAML's path without .yaml; of a preset results/NAME-full)")] = None,
    strict: bool = False,
    follow_links: bool = False,
    fresh: bool = False,
    tensorboard: bool = False,
    machine: Machine = Machine(),
    output: Output = Output(),  # noqa: B008
) -> None:
    """Train every expert of a preset or YAML config. The same command again resumes an interrupted training.

    Example: python -m meme train ffhq-meme --data path/to/ffhq --device cuda

    Args:
        config: a preset's name, or a YAML file such as results/digits-meme/winner.yaml.
        data: digits, or a folder or zip of images, or a folder of Hugging Face datasets.
        first_stage: the autoencoder of a latent preset: a folder as diffusers writes it, or a hub name.
        init_from: a published U-Net of latent diffusion or ADM (.safetensors or .ckpt), or an expert-N.safetensors of this
            program, which every expert starts from where names and shapes agree; or a folder trained by this program, where
            each expert starts from its namesake.
        trunk_share: share of all training steps, from 0 to below 1, in which one network is trained on all timesteps; every
            expert starts from it. The sum of all steps stays the same.
        steps: training steps an expert; more than a finished training had make it go on.
        precision: numbers that networks calculate with in training; part of what identifies it, as the seed is.
        out: folder for the trained ensemble.
        strict: refuse a data set with unreadable files instead of skipping them.
        follow_links: follow links that lead out of the folder of images, and linked folders; where they lead is printed.
        fresh: read the images again, whatever the cache holds.
        tensorboard: leave curves of the losses in the folder's tensorboard, for TensorBoard.
    """
    from meme.cli.commands import train_config

    with printing(output):
        train_config(
            config,
            data=data,
            first_stage=first_stage,
            init_from=init_from,
            trunk_share=trunk_share,
            steps=steps,
            precision=precision,
            out=out,
            device=machine.device,
            strict=strict,
            follow_links=follow_links,
            fresh=fresh,
            tensorboard=tensorboard,
        )


def sample(
    folder: Annotated[Path, POSITIONAL, hint("FOLDER")],
    count: Annotated[int, hint("IMAGES")] = 64,
    seed: int = 0,
    out: Annotated[Path | None, hint("FILE", "(default: samples.png in the folder)")] = None,
    first_stage: FirstStage = None,
    machine: Resources = Resources(),
    output: Output = Output(),  # noqa: B008
) -> None:
    """Draw images from a trained ensemble into one PNG.

    Example: python -m meme sample results/digits-meme/winner --count 16 --seed 1

    Args:
        folder: a trained ensemble.
        count: images to draw.
        seed: of the noise they start from.
        out: the PNG.
        first_stage: the autoencoder of a latent ensemble, if it is no longer where it was trained.
    """
    from meme.cli.commands import sample_folder

    with printing(output):
        sample_folder(
            folder,
            count=count,
            seed=seed,
            out=out,
            first_stage=first_stage,
            one_at_a_time=machine.one_at_a_time,
            precision=machine.precision,
            device=machine.device,
        )


def evaluate(
    folder: Annotated[Path, POSITIONAL, hint("FOLDER")],
    metrics: Annotated[
        tuple[Literal["fid", "sfid", "kid", "inception_score", "precision", "recall"], ...],
        hint("{fid,sfid,kid,inception_score,precision,recall}", "(default: all that the feature space offers)"),
    ] = (),
    seeds: Annotated[int, hint("SEEDS")] = 3,
    samples: Samples = None,
    features: Features = None,
    inception_split: Annotated[int | None, hint("IMAGES", "(default: ten equal splits)")] = None,
    inception_weights: Annotated[Path | None, hint("FILE", "(default: that of MEME_INCEPTION, or fetched)")] = None,
    first_stage: FirstStage = None,
    machine: Resources = Resources(),
    output: Output = Output(),  # noqa: B008
) -> None:
    """Score a trained ensemble over several sampling seeds: FID and its relatives, MACs, parameters, latency.

    The scores are also left in the folder as evaluation.json, which an export's model card quotes.

    Example: python -m meme evaluate results/digits-meme/winner --metrics fid kid --seeds 5

    Args:
        folder: a trained ensemble.
        metrics: which of them.
        seeds: how many sampling seeds.
        samples: images to draw for each; they are not kept.
        features: feature space of the metrics.
        inception_split: images of a split of the inception score; ADM's evaluator has 5000.
        inception_weights: Inception's TorchScript file, for machines with no network.
        first_stage: the autoencoder of a latent ensemble, if it is no longer where it was trained.
    """
    from meme.cli.commands import evaluate_folder

    with printing(output):
        evaluate_folder(
            folder,
            metrics=metrics,
            seeds=seeds,
            samples=samples,
            features=features,
            inception_split=inception_split,
            inception_weights=inception_weights,
            first_stage=first_stage,
            one_at_a_time=machine.one_at_a_time,
            precision=machine.precision,
            device=machine.device,
        )


def export(
    folder: Annotated[Path, POSITIONAL, hint("FOLDER")],
    format: Literal["diffusers"] = "diffusers",
    out: Annotated[Path | None, hint("FOLDER", "(default: diffusers in the folder)")] = None,
    license: Annotated[str, hint("NAME")] = "unknown",
    output: Output = Output(),  # noqa: B008
) -> None:
    """Write a trained ensemble as a folder that DiffusionPipeline.from_pretrained opens, with a model card.

    Example: python -m meme export results/digits-meme --license cc-by-4.0

    Args:
        folder: a trained ensemble; or a study, whose winner is meant: trained in full if it is, else as its trial left it.
        format: of the export.
        out: folder to write; an earlier export there is replaced.
        license: of the weights, for the model card, as Hugging Face names licences.
    """
    from meme.cli.commands import export_folder

    del format  # there is one so far, and the parser takes no other
    with printing(output):
        export_folder(folder, out=out, licence=license)


def data(
    source: Annotated[str, POSITIONAL, hint("PATH")],
    follow_links: bool = False,
    output: Output = Output(),  # noqa: B008
) -> None:
    """Describe a data set: its images, sizes, modes, classes and unreadable files, and the command to start with.

    Example: python -m meme data path/to/images

    Args:
        source: a folder or zip of images (a folder for each class, if there are classes), CIFAR-10's binary version, a folder
            written by save_to_disk of Hugging Face datasets, parquet files, or digits.
        follow_links: follow links that lead out of the folder, and linked folders; where they lead is listed.
    """
    from meme.cli.commands import describe_data

    with printing(output):
        describe_data(source, follow_links=follow_links)


def analyze(
    kind: Annotated[Literal["latents", "features", "experts"], POSITIONAL],
    sources: Annotated[tuple[str, ...], POSITIONAL, hint("SOURCE")],
    data: Data = None,
    images: Annotated[int, hint("IMAGES")] = 10_000,
    timesteps: Annotated[tuple[int, ...], hint("T", "(default: eleven over all of T; for experts three of every interval)")] = (),
    out: Annotated[Path | None, hint("FOLDER", "(default: analysis in the trained folder)")] = None,
    seed: int = 0,
    machine: Machine = Machine(),
) -> None:
    """Write the frequency analysis: the paper's Fig. 2 (latents), 3 (features) or 6 (experts), as PNG and CSV.

    Example: python -m meme analyze experts results/digits-meme/winner

    Args:
        kind: latents shows x_t by timestep, features every layer by timestep, experts expert against expert.
        sources: for latents a preset, a YAML file or a trained folder; for features a trained folder; for experts one or
            more, side by side.
        data: digits, or a folder or zip of images.
        images: how many are averaged over, at most all.
        timesteps: which t are looked at.
        out: folder of the files.
        seed: of the choice of images and their noise.
    """
    from meme.cli.commands import analyze_sources

    analyze_sources(kind, sources, data=data, images=images, timesteps=timesteps, out=out, seed=seed, device=machine.device)


def ablate(
    recipe: Annotated[Literal["probabilities", "experts", "assignment", "architecture"], POSITIONAL],
    family: Annotated[str, hint("NAME")] = "digits",
    data: Data = None,
    first_stage: FirstStage = None,
    steps: Annotated[int | None, hint("STEPS", "(default: the presets')")] = None,
    seeds: Annotated[int, hint("SEEDS")] = 3,
    sampling_seeds: Annotated[int, hint("SEEDS")] = 1,
    samples: Samples = None,
    features: Features = None,
    equal_total: bool = False,
    all_rows: bool = False,
    out: Annotated[Path | None, hint("FOLDER", "(default: results/ablations/ and the family)")] = None,
    machine: Machine = Machine(),
) -> None:
    """Train the rows of one of the paper's ablations over several seeds; print its table with ours beside it.

    The same command again resumes an interrupted run. Rows that recipes share are trained once.

    Example: python -m meme ablate probabilities --family digits --steps 500

    Args:
        recipe: probabilities (Table 6), experts (Table 7), assignment (hard against soft) or architecture (Tables 1 and 2).
        family: presets to train: digits, tiny, thumbnails, cifar10, ffhq, celebahq or celeba64.
        data: digits, or a folder or zip of images.
        first_stage: the autoencoder of families that denoise latents: a folder or hub name.
        steps: training steps an expert; networks alone get as many times more as in the presets.
        seeds: training seeds; one alone has no spread.
        sampling_seeds: sampling seeds to average over for each training seed.
        samples: images to draw for each score.
        features: feature space of the FID.
        equal_total: recipe experts: all experts together get the steps of four, however many they are.
        all_rows: recipe architecture: also LDM-L and Lite-LDM.
        out: folder for trainings and tables.
    """
    from meme.cli.commands import run_ablation
    from meme.paper.ablations import Ablation

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
            device=machine.device,
        )
    )


def cost(
    configs: Annotated[tuple[str, ...], POSITIONAL, hint("CONFIG", "(default: all presets)")] = (),
    output: Output = Output(),  # noqa: B008
) -> None:
    """Print parameters and MACs of every expert, beside the paper's figures.

    Example: python -m meme cost ffhq-meme

    Args:
        configs: presets or YAML files.
    """
    from meme.cli.commands import print_costs

    with printing(output):
        print_costs(configs)


VERBS = {verb.__name__: verb for verb in (train, sample, evaluate, export, data, analyze, ablate, cost)}


RESUMED = {"train", "ablate"}
"""Verbs that resume when they are run again."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line of ``python -m meme``; ``arguments`` None: those of the process."""
    words = sys.argv[1:] if arguments is None else arguments
    with exits_with_a_sentence(Config, resumes=words[:1] != [] and words[0] in RESUMED):
        words = with_homes(words)
        check_words(VERBS, words)
        tyro.extras.subcommand_cli_from_dict(VERBS, prog="python -m meme", args=words, config=PARSING)
