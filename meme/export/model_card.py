"""The model card of an exported ensemble: what it is, how it is used, its scores with their protocol, its licence."""

import statistics
from importlib.metadata import version
from pathlib import Path

from meme.config.schema import Config, FirstStageConfig
from meme.scoring.metrics import NAMES

_USE = """\
```python
import meme.diffusers_model  # before diffusers: pip install meme-nas
from diffusers import DiffusionPipeline

folder = "."  # this folder
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
pipeline(batch_size=4, seed=0).images[0].save("sample.png")
```

`pipeline.py` is the code that `trust_remote_code` is about. It imports `meme`, which the package meme-nas installs, and nothing
of the search. Other schedulers of diffusers fit:
`pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)`.
"""


def model_card(config: Config, scores: dict, licence: str) -> str:
    """Return the card as Markdown with Hugging Face's header. ``scores`` is an ``evaluation.json``, or empty."""
    sections = {
        f"# {config.name}": _what_it_is(config),
        "## Use": _USE.strip(),
        "## Scores": _scores(scores),
        "## Protocol": _protocol(config),
        "## Licence": _licence(config, licence),
    }
    header = (
        f"---\nlicense: {licence}\nlibrary_name: diffusers\ntags:\n- diffusers\n- unconditional-image-generation\n- meme\n---"
    )
    return "\n\n".join([header, *(f"{title}\n\n{text}" for title, text in sections.items())]) + "\n"


def _what_it_is(config: Config) -> str:
    kind = "latents of a first stage, which comes with it" if config.first_stage else "pixels"
    pixels = config.pixels
    lines = [
        f"{len(config.experts)} denoising experts (MEME, Lee et al., AAAI 2024, arXiv 2306.04990), each for its own interval of "
        f"{config.diffusion.timesteps} timesteps, on {kind}. Images: {pixels.size} x {pixels.size}, "
        f"{'grey' if pixels.channels == 1 else 'colour'}.",
        "",
        "| Expert | Timesteps | p | Attention channels of each level |",
        "|---|---|---|---|",
    ]
    for number, expert in enumerate(config.experts, start=1):
        pairs = zip(expert.low_channels, config.network.widths, strict=False)
        split = ", ".join(f"{low} of {width}" for low, width in pairs) or f"not split ({config.network.family})"
        lines.append(f"| {number} | {expert.interval[0]} to {expert.interval[1] - 1} | {expert.p:g} | {split} |")
    return "\n".join(lines)


def _scores(scores: dict) -> str:
    if not scores:
        return "None are recorded: `python -m meme evaluate` on the trained folder, before the export, leaves them here."
    lines = ["| Metric | Mean | Standard deviation over sampling seeds |", "|---|---|---|"]
    for metric, found in scores["metrics"].items():
        values = found["values"]
        spread = f"{statistics.stdev(values):.3g}" if len(values) > 1 else "one seed, so not known"
        lines.append(f"| {NAMES.get(metric, metric)} | {found['mean']:.5g} | {spread} |")
    cost = f"{scores['macs'] / 1e6:,.2f}M multiply-accumulates an image and step, {scores['params']:,} parameters"
    return "\n".join([*lines, "", f"Scored with {scores['protocol']}. {cost}."])


def _protocol(config: Config) -> str:
    training, sampling = config.training, config.sampling
    started = " from given weights" if training.initial_weights else ""
    return "\n".join(
        [
            f"- Data: {Path(config.data).name}",
            f"- Training: {training.steps:,} steps of {training.batch_size} images an expert{started}, AdamW at "
            f"{training.learning_rate:g}, averaged weights (decay {training.ema_decay:g}), seed {training.seed}",
            f"- Sampling: {sampling.sampler}, {sampling.steps} steps",
            f"- Made with meme-nas {version('meme-nas')}, torch {version('torch')}, diffusers {version('diffusers')}",
        ]
    )


def _licence(config: Config, licence: str) -> str:
    known = "not stated by whoever exported them" if licence == "unknown" else licence
    stage = f" The first stage is `{_public_name(config.first_stage)}`, under its own licence." if config.first_stage else ""
    return f"Weights: {known}; the terms of the training data apply to them. `pipeline.py`: Apache-2.0, as meme-nas.{stage}"


def _public_name(stage: FirstStageConfig) -> str:
    """Return the name of the first stage on the hub, or that of its folder, without the path on the exporter's disk."""
    source = stage.source
    return source.rstrip("/").rpartition("/")[2] if source.startswith(("/", "~", ".")) else source
