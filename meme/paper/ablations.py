"""The paper's ablations as recipes: which rows are trained over which seeds, and what each of them scored.

A recipe is data. `meme.paper.ablation_tables` draws its table. Rows that several recipes share are trained and scored once:
under one ``out`` a training lies in a folder named by what determines it, with its scores beside its weights.
"""

import csv
import difflib
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

import filelock
import torch

from meme.config.presets import SOFT_PROBABILITIES, experts_of, preset, preset_names
from meme.config.schema import Config, stable_id
from meme.data.images import Images, TrainingData
from meme.diffusion.ensemble import Ensemble
from meme.errors import UserError
from meme.pipeline import OnMessage, Score, evaluate, open_reference, pick_device, train, training_data
from meme.scoring.features import FeatureKind, FeatureSpace, choose_features
from meme.support.files import expanded, write_text
from meme.training.trainer import Progress

_SOFT, _CONSTANT, _HARD = SOFT_PROBABILITIES, (0.6,) * 4, (1.0,) * 4


@dataclass(frozen=True)
class Row:
    """One way to train, on any family of presets."""

    words: str
    preset: str
    """Row of ``meme.config.presets`` whose network and training it has, less the family."""
    probabilities: tuple[float, ...] = ()
    """p of every expert; none: the preset as it is, a network alone."""
    ffhq_fid: float | None = None
    """The FID that Tables 6 and 7 print for it, where Tables 1 and 2, which are in `meme.paper.printed`, lack it."""


# As in presets, where a row has one there: a row of that name and these p is that preset.
ROWS = {
    "ldm-l":                 Row("LDM-L", "ldm-l"),
    "lite-ldm":              Row("Lite-LDM", "lite-ldm"),
    "ldm-s":                 Row("LDM-S", "ldm-s"),
    "iu-ldm-s":              Row("iU-LDM-S", "iu-ldm-s"),
    "multi-expert":          Row("soft Multi-Expert", "multi-expert", _SOFT),
    "multi-expert-constant": Row("Multi-Expert with p = 0.6", "multi-expert", _CONSTANT, 10.13),
    "multi-expert-hard":     Row("hard Multi-Expert", "multi-expert", _HARD),
    "multi-expert-hard-1":   Row("N = 1", "multi-expert", _HARD[:1]),
    "multi-expert-hard-2":   Row("N = 2", "multi-expert", _HARD[:2], 10.97),
    "multi-expert-hard-6":   Row("N = 6", "multi-expert", (1.0,) * 6, 10.28),
    "meme":                  Row("soft MEME", "meme", _SOFT),
    "meme-constant":         Row("MEME with p = 0.6", "meme", _CONSTANT, 9.08),
    "meme-hard":             Row("hard MEME", "meme", _HARD),
}  # fmt: skip

Line = tuple[str, dict[str, str]]
"""A line of a table: its label as the paper prints it, and for every column of FIDs the row that is trained."""


@dataclass(frozen=True)
class Recipe:
    """One of the paper's tables."""

    title: str
    head: str
    """Heading of the labels."""
    lines: tuple[Line, ...]
    differences: tuple[tuple[str, str], ...]
    """Pairs of rows (a, b) of interest: the FID of a less that of b."""
    sources: dict[str, str]
    """Whose figures stand beside ours: by family, and for all other families those of ffhq."""
    prints_costs: bool = False
    """True if the paper's table has parameters and MACs."""
    further_lines: tuple[Line, ...] = ()
    """Trained on request only."""
    words: dict[str, str] = field(default_factory=dict)
    """Names of rows in this recipe, where they differ from those in `ROWS`."""


_FFHQ = "FFHQ, DDIM-200, 50,000 samples"

RECIPES = {
    "probabilities": Recipe(
        "three settings of the expertization probabilities",
        "Expert strategy",
        (
            ("[1.0, 1.0, 1.0, 1.0]", {"Multi-Expert": "multi-expert-hard", "MEME": "meme-hard"}),
            ("[0.6, 0.6, 0.6, 0.6]", {"Multi-Expert": "multi-expert-constant", "MEME": "meme-constant"}),
            ("[0.8, 0.4, 0.2, 0.1]", {"Multi-Expert": "multi-expert", "MEME": "meme"}),
        ),
        (
            ("multi-expert-constant", "multi-expert-hard"),
            ("multi-expert", "multi-expert-constant"),
            ("multi-expert", "multi-expert-hard"),
            ("meme-constant", "meme-hard"),
            ("meme", "meme-constant"),
            ("meme", "meme-hard"),
        ),
        {"ffhq": f"Table 6: {_FFHQ}"},
    ),
    "experts": Recipe(
        "the number of experts",
        "#Expert",
        (
            ("1", {"FID": "multi-expert-hard-1"}),
            ("2", {"FID": "multi-expert-hard-2"}),
            ("4", {"FID": "multi-expert-hard"}),
            ("6", {"FID": "multi-expert-hard-6"}),
        ),
        (
            ("multi-expert-hard-2", "multi-expert-hard-1"),
            ("multi-expert-hard", "multi-expert-hard-2"),
            ("multi-expert-hard-6", "multi-expert-hard"),
        ),
        {"ffhq": f"Table 7: {_FFHQ}"},
        words={"multi-expert-hard": "N = 4"},
    ),
    "assignment": Recipe(
        "hard against soft experts",
        "Model",
        (
            ("Multi-Expert (w/o Soft)", {"FID": "multi-expert-hard"}),
            ("Multi-Expert", {"FID": "multi-expert"}),
            ("MEME (w/o Soft)", {"FID": "meme-hard"}),
            ("MEME", {"FID": "meme"}),
        ),
        (("multi-expert", "multi-expert-hard"), ("meme", "meme-hard")),
        {"ffhq": f"Table 1: {_FFHQ}"},
        prints_costs=True,
    ),
    "architecture": Recipe(
        "one architecture against many",
        "Model",
        (
            ("LDM-S", {"FID": "ldm-s"}),
            ("iU-LDM-S", {"FID": "iu-ldm-s"}),
            ("Multi-Expert", {"FID": "multi-expert"}),
            ("MEME", {"FID": "meme"}),
        ),
        (("multi-expert", "ldm-s"), ("iu-ldm-s", "ldm-s"), ("meme", "iu-ldm-s"), ("meme", "multi-expert"), ("meme", "ldm-l")),
        {
            "ffhq": f"Table 1: {_FFHQ}",
            "celebahq": "Table 1: CelebA-HQ, DDIM-50, 50,000 samples",
            "celeba64": "Table 2: CelebA at 64 pixels, DDIM-50, 10,000 samples",
        },
        prints_costs=True,
        further_lines=(("LDM-L", {"FID": "ldm-l"}), ("Lite-LDM", {"FID": "lite-ldm"})),
    ),
}

FAMILIES = tuple(name.removesuffix("-multi-expert") for name in preset_names() if name.endswith("-multi-expert"))


@dataclass(frozen=True)
class Training:
    """One row with one training seed, which determines initial weights, order of the data, timesteps and noise."""

    row: str
    config: Config


@dataclass(frozen=True)
class Ablation:
    """A recipe on a family of presets. A wrong setting is a ``UserError``."""

    recipe: str
    family: str = "digits"
    data: str | None = None
    """``digits``, or the path of a folder or zip of images; None: the preset's."""
    first_stage: str | None = None
    """The autoencoder of families that denoise latents: a folder, or a name on the Hugging Face hub; None: the preset's."""
    steps: int | None = None
    """Training steps an expert; None: the preset's. A network alone gets as many times more as in the presets."""
    seeds: int = 3
    """Training seeds 0, 1, ..., common to all rows."""
    sampling_seeds: int = 1
    """Sampling seeds to average over, for each training seed others."""
    samples: int | None = None
    features: FeatureKind | None = None
    equal_total: bool = False
    """All experts together get the steps of four, however many they are."""
    all_rows: bool = False
    """Also the recipe's further lines, where the family has them."""
    out: Path | None = None
    device: str = "auto"

    def __post_init__(self):
        _allowed("recipe", self.recipe, tuple(RECIPES))
        _allowed("family", self.family, FAMILIES)
        for name in ("steps", "seeds", "sampling_seeds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}: must be at least 1, not {getattr(self, name)}")
        if self.samples is not None and self.samples < 2:
            raise UserError(f"samples: must be at least 2, not {self.samples}")
        if self.first_stage and preset(f"{self.family}-multi-expert").first_stage is None:
            raise UserError(f"first_stage: {self.family} denoises pixels and takes none")
        if self.equal_total and self.recipe != "experts":
            raise UserError(f"equal_total: only recipe experts has rows of different numbers of experts, not {self.recipe}")
        if self.all_rows and not RECIPES[self.recipe].further_lines:
            raise UserError(f"all_rows: only recipe architecture has further rows, not {self.recipe}")

    @property
    def folder(self) -> Path:
        """Return the folder of the trainings. By default all recipes of one family share it, and so share trainings."""
        return self.out or Path("results") / "ablations" / self.family

    def file(self, kind: str) -> Path:
        """Return the path of the table; ``kind`` is csv or md."""
        return self.folder / f"{self.recipe}{'-equal-total' if self.equal_total else ''}.{kind}"

    @property
    def lines(self) -> tuple[Line, ...]:
        """Return the recipe's lines that the family has, labelled as for this family."""
        recipe = RECIPES[self.recipe]
        wanted = recipe.lines + (recipe.further_lines if self.all_rows else ())
        kept = [line for line in wanted if all(preset_name(self.family, ROWS[row].preset) for row in line[1].values())]
        return tuple((self.named(label), columns) for label, columns in kept)

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(row for _, columns in self.lines for row in columns.values())

    def named(self, words: str) -> str:
        """Return a row's description, with its networks called after the family's."""
        return words if f"{self.family}-ldm-s" in preset_names() else words.replace("LDM", "ADM")

    def config(self, row: str, seed: int = 0) -> Config:
        """Return the config to train and score for ``row`` with training seed ``seed``."""
        wanted, probabilities = ROWS[row].preset, ROWS[row].probabilities
        base = preset(preset_name(self.family, wanted) or f"{self.family}-{wanted}")
        experts = experts_of(base.network, probabilities, base.diffusion.timesteps) if probabilities else base.experts
        data = self.data or base.data
        return base.with_(
            name=preset_name(self.family, row) or f"{self.family}-{row}",
            data=data if data in ("", "digits") else _local(data),
            first_stage={"source": _local(self.first_stage)} if self.first_stage else base.first_stage,
            experts=experts,
            training={"steps": self._steps(base, len(experts)), "seed": seed},
            evaluation={"samples": self.samples or base.evaluation.samples},
        )

    @property
    def expert_steps(self) -> int:
        """Return the steps of one expert of four."""
        return self.steps or preset(f"{self.family}-multi-expert").training.steps

    def _steps(self, base: Config, experts: int) -> int:
        if self.equal_total:
            return max(1, round(4 * self.expert_steps / experts))
        return round(self.expert_steps * base.training.steps / preset(f"{self.family}-multi-expert").training.steps)

    def trainings(self) -> list[Training]:
        """Return the trainings seed by seed, so that an unfinished run leaves a table of fewer seeds."""
        return [Training(row, self.config(row, seed)) for seed in range(self.seeds) for row in self.rows]


def _local(source: str) -> str:
    return str(expanded(source).absolute()) if expanded(source).exists() else source


def _allowed(field: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = difflib.get_close_matches(value, known, n=1)
        raise UserError(f"{field}: {value!r} is not one of {', '.join(known)}{f'; did you mean {near[0]}?' if near else ''}")


def preset_name(family: str, row: str) -> str | None:
    """Return the preset that is ``row`` of ``family``, whose networks may be ADM's instead of latent diffusion's. Return None
    where there is none."""
    names = (f"{family}-{row}", f"{family}-{row.replace('ldm', 'adm')}")
    return next((name for name in names if name in preset_names()), None)


@dataclass(frozen=True)
class Scored:
    """The score of one training with one sampling seed, which is a line of the CSV."""

    recipe: str
    row: str
    training_seed: int
    sampling_seed: int
    fid: float
    macs: float
    params: int
    experts: int
    steps: int
    """Training steps of each expert."""
    features: str
    samples: int
    sampler: str
    sampling_steps: int
    latency_ms: float
    trained: str
    """Folder of the training, under ``trained/``."""


@dataclass(frozen=True)
class Basis:
    """The data and the feature space that all rows share."""

    images: Images
    data: TrainingData
    space: FeatureSpace
    device: torch.device


OnTraining = Callable[[Training, Progress], None]


def run(
    ablation: Ablation,
    *,
    on_progress: OnTraining = lambda training, progress: None,
    on_message: OnMessage = lambda message: None,
) -> tuple[list[Scored], Basis]:
    """Train and score every row with every seed, unless its score is stored already. The CSV is current after every
    training."""
    trainings = ablation.trainings()
    basis = _open(ablation, on_message)
    scores: list[Scored] = []
    for place, training in enumerate(trainings, start=1):
        found = _scores_of(ablation, training, basis, on_progress)
        scores += found
        write_text(ablation.file("csv"), to_csv(scores))
        fids = ", ".join(f"{scored.fid:.4g}" for scored in found)
        on_message(f"{place}/{len(trainings)} {training.row} seed {training.config.training.seed}: FID {fids}")
    return scores, basis


def _open(ablation: Ablation, on_message: OnMessage) -> Basis:
    device, config = pick_device(ablation.device), ablation.config(ablation.rows[0])
    images = open_reference(config, on_message=on_message)
    space = choose_features(ablation.features or config.evaluation.features, images, device=device, on_message=on_message)
    return Basis(images, training_data(config, images, device, on_message), space, device)


def _scores_of(ablation: Ablation, training: Training, basis: Basis, on_progress: OnTraining) -> list[Scored]:
    """Return the scores of a training. Whatever is missing is trained and scored, and stored beside the weights."""
    folder = ablation.folder / "trained" / f"{training.config.architecture_id}-{basis.data.content_id[:8]}"

    @cache
    def trained() -> Ensemble:
        report = partial(on_progress, training)
        return train(training.config, basis.data, folder=folder, device=basis.device, on_progress=report)

    # Each training seed has noise of its own to sample from, so that the spread over seeds has all there is of luck.
    seeds = [training.config.training.seed + 1000 * repeat for repeat in range(ablation.sampling_seeds)]
    with _claimed(folder):
        return [_scored(ablation.recipe, training, seed, folder, basis, trained) for seed in seeds]


def _scored(recipe: str, training: Training, seed: int, folder: Path, basis: Basis, trained: Callable[[], Ensemble]) -> Scored:
    """Return one score, read from its file if that exists."""
    config = training.config
    path = folder / f"score-{_score_id(config, basis, seed)}.json"
    measured = _read_measured(path)
    if measured is None:
        measured = _measured(evaluate(trained(), basis.images, basis.space, seed=seed, device=basis.device))
        write_text(path, json.dumps(measured))
    return Scored(
        recipe=recipe,
        row=training.row,
        training_seed=config.training.seed,
        sampling_seed=seed,
        experts=len(config.experts),
        steps=config.training.steps,
        sampler=config.sampling.sampler,
        sampling_steps=config.sampling.steps,
        trained=folder.name,
        **measured,
    )


def _claimed(folder: Path) -> filelock.FileLock:
    """Lock a training's folder. A second command that needs the same training waits until it is finished."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {folder} can't be written ({error.strerror})") from None
    return filelock.FileLock(folder / ".lock")


def _score_id(config: Config, basis: Basis, seed: int) -> str:
    """Return an id that is equal for scores of the same samples of the same weights in the same feature space."""
    protocol = [config.sampling.model_dump(), config.evaluation.samples, seed]
    return stable_id([protocol, basis.space.feature_id, basis.images.content_id])


MEASURED = ("fid", "macs", "params", "features", "samples", "latency_ms")


def _measured(score: Score) -> dict[str, Any]:
    """Return the part of a score that is stored."""
    return {name: getattr(score, name) for name in MEASURED}


def _read_measured(path: Path) -> dict[str, Any] | None:
    """Read a stored score. Return None where there is none, or one of another version of this file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: found[name] for name in MEASURED}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def to_csv(scores: list[Scored]) -> str:
    """Return the scores as CSV, one line per score."""
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(Scored)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(scored) for scored in scores)
    return text.getvalue()
