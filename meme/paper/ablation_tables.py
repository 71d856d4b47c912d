"""The results of an ablation: the spread over training seeds, differences paired by seed, sentences no stronger than their
interval, and the paper's table with ours beside it."""

import datetime
import math
import os
import platform
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from scipy import stats

from meme.paper.ablations import RECIPES, ROWS, Ablation, Basis, Scored, preset_name
from meme.paper.printed import PRINTED
from meme.scoring.cost import ensemble_cost

CONFIDENCE = 0.95
NOTHING = "-"


# --- Statistics -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """The FIDs of one row over training seeds."""

    mean: float
    deviation: float | None
    """Standard deviation; None where there is one seed only."""


@dataclass(frozen=True)
class Difference:
    """The FIDs of one row minus those of another with the same training seeds."""

    mean: float
    standard_error: float | None
    interval: tuple[float, float] | None
    """Student's t interval of 95 %; None where there is one seed only."""
    seeds: int


def fids_by_seed(scores: Sequence[Scored], row: str) -> list[float]:
    """Return the FID of ``row`` for each training seed in order, as the mean over its sampling seeds."""
    seeds = sorted({scored.training_seed for scored in scores if scored.row == row})
    return [statistics.fmean(scored.fid for scored in scores if (scored.row, scored.training_seed) == (row, s)) for s in seeds]


def spread(fids: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(fids), statistics.stdev(fids) if len(fids) > 1 else None)


def paired_difference(fids: Sequence[float], others: Sequence[float]) -> Difference:
    """Return the difference of FIDs, paired by seed. Rows share initial weights, data order and noise of a seed, and this
    common part cancels."""
    differences = [a - b for a, b in zip(fids, others, strict=True)]
    count, mean = len(differences), statistics.fmean(differences)
    if count < 2:
        return Difference(mean, None, None, count)
    error = statistics.stdev(differences) / math.sqrt(count)
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * error
    return Difference(mean, error, (mean - reach, mean + reach), count)


Compared = tuple[str, str, Difference]
"""A row, the other one, and their difference."""


# --- Words ----------------------------------------------------------------------------------------


def sentence(row: str, other: str, difference: Difference, printed: float | None, digits: int) -> str:
    """Return the claim about ``row`` against ``other`` that the scores support; ``printed`` is the paper's difference."""
    paper = "" if printed is None else f"; in the paper FID is {_side(printed)} by {abs(printed):.2f}"
    if difference.interval is None:
        return f"{row} against {other}: one training seed has no spread, so nothing is claimed{paper}."
    low, high = difference.interval
    bounds = f"95 % interval {low:+.{digits}f} to {high:+.{digits}f}"
    if low <= 0 <= high:
        undecided = ", which this neither confirms nor contradicts" if paper else ""
        return f"{row} against {other}: no difference shown ({bounds} holds 0, {difference.seeds} seeds){paper}{undecided}."
    verdict = "better" if difference.mean < 0 else "worse"
    agrees = "" if printed is None else ", too" if printed * difference.mean > 0 else ", the other way round"
    found = f"FID is {_side(difference.mean)} by {abs(difference.mean):.{digits}f} ({bounds}, {difference.seeds} seeds)"
    return f"{row} scored {verdict} than {other}: {found}{paper}{agrees}."


def _side(difference: float) -> str:
    return "lower" if difference < 0 else "higher"


# --- The report -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """A table as text."""

    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Report:
    """The content of the printed and written report."""

    title: str
    command: str
    made: str
    """Date, hardware and versions."""
    protocol: str
    table: Cells
    differences: Cells
    sentences: tuple[str, ...]
    notes: tuple[str, ...]


def report_of(ablation: Ablation, scores: Sequence[Scored], basis: Basis) -> Report:
    """Return the report of the scores of ``ablation``."""
    fids = {row: fids_by_seed(scores, row) for row in ablation.rows}
    digits = _digits([value for values in fids.values() for value in values])
    pairs = [pair for pair in RECIPES[ablation.recipe].differences if set(pair) <= set(fids)]
    compared = [(row, other, paired_difference(fids[row], fids[other])) for row, other in pairs]
    return Report(
        title=f"Ablation on {ablation.family}: {RECIPES[ablation.recipe].title} ({_table_in_paper(ablation).partition(':')[0]})",
        command=command(ablation),
        made=f"{datetime.date.today()}, {_machine(basis.device)}",
        protocol=_protocol(ablation, scores, basis),
        table=_table(ablation, {row: spread(values) for row, values in fids.items()}, digits),
        differences=_differences(ablation, compared, digits),
        sentences=_sentences(ablation, compared, digits),
        notes=_notes(ablation, len(compared)),
    )


def _table(ablation: Ablation, spreads: dict[str, Spread], digits: int) -> Cells:
    """Return the paper's lines and columns. Where the table has one column of FIDs, it also has the costs of each row."""
    columns, recipe = tuple(ablation.lines[0][1]), RECIPES[ablation.recipe]
    if len(columns) > 1:
        headings = [f"{column}, {whose}" for column in columns for whose in ("paper", "ours")]
    else:
        costs = ["#Param, paper", "MACs, paper"] if recipe.prints_costs else []
        headings = [*costs, "FID, paper", "#Param, ours", "MACs, ours", "steps", "FID, ours"]

    def cells(row: str) -> tuple[str, ...]:
        fids = _printed(ablation, row), _pm(spreads[row], digits)
        if len(columns) > 1:
            return fids
        return (*(_printed_costs(ablation, row) if recipe.prints_costs else ()), fids[0], *_costs(ablation, row), fids[1])

    lines = [(label, *(cell for row in rows.values() for cell in cells(row))) for label, rows in ablation.lines]
    return Cells((recipe.head, *headings), tuple(lines))


def _costs(ablation: Ablation, row: str) -> tuple[str, str, str]:
    """Return our costs: parameters, MACs of an image and step, training steps."""
    config = ablation.config(row)
    cost = ensemble_cost(config)
    params = [expert.params for expert in cost.experts]
    times = f" x{len(params)}" if len(params) > 1 else ""
    return _range(quantity(min(params)), quantity(max(params))) + times, quantity(cost.macs), f"{config.training.steps:,}{times}"


def _range(smallest: str, largest: str) -> str:
    return smallest if smallest == largest else f"{smallest}-{largest}"


def _printed_costs(ablation: Ablation, row: str) -> tuple[str, str]:
    printed = PRINTED.get(preset_name(_source(ablation), row) or "")
    if printed is None:
        return NOTHING, NOTHING
    experts = len(ablation.config(row).experts)
    times = f" x{experts}" if experts > 1 else ""
    params = _range(printed.params[0], printed.params[-1])
    return f"{params}M{times}", f"{printed.macs}G" if printed.macs else NOTHING


def _differences(ablation: Ablation, compared: list[Compared], digits: int) -> Cells:
    headings = ("difference of FIDs", "paper", "ours", "standard error", "95 % interval")
    lines = []
    for row, other, difference in compared:
        printed = _printed_difference(ablation, row, other)
        lines.append(
            (
                f"{_named(ablation, row)} - {_named(ablation, other)}",
                NOTHING if printed is None else f"{printed:+.2f}",
                f"{difference.mean:+.{digits}f}",
                NOTHING if difference.standard_error is None else f"{difference.standard_error:.{digits}f}",
                NOTHING if difference.interval is None else " to ".join(f"{bound:+.{digits}f}" for bound in difference.interval),
            )
        )
    return Cells(headings, tuple(lines))


def _sentences(ablation: Ablation, compared: list[Compared], digits: int) -> tuple[str, ...]:
    return tuple(
        sentence(_named(ablation, row), _named(ablation, other), found, _printed_difference(ablation, row, other), digits)
        for row, other, found in compared
    )


def _named(ablation: Ablation, row: str) -> str:
    return ablation.named(RECIPES[ablation.recipe].words.get(row, ROWS[row].words))


def _source(ablation: Ablation) -> str:
    """Return the family whose figures in the paper stand beside ours."""
    return ablation.family if ablation.family in RECIPES[ablation.recipe].sources else "ffhq"


def _table_in_paper(ablation: Ablation) -> str:
    return RECIPES[ablation.recipe].sources[_source(ablation)]


def _printed_fid(ablation: Ablation, row: str) -> float | None:
    printed = PRINTED.get(preset_name(_source(ablation), row) or "")
    return printed.fid if printed else ROWS[row].ffhq_fid


def _printed(ablation: Ablation, row: str) -> str:
    fid = _printed_fid(ablation, row)
    decimals = 1 if row == "lite-ldm" else 2  # which the paper quotes from another one
    return NOTHING if fid is None else f"{fid:.{decimals}f}"


def _printed_difference(ablation: Ablation, row: str, other: str) -> float | None:
    fid, other_fid = _printed_fid(ablation, row), _printed_fid(ablation, other)
    return None if fid is None or other_fid is None else round(fid - other_fid, 2)


def _pm(found: Spread, digits: int) -> str:
    return f"{found.mean:.{digits}f}" + ("" if found.deviation is None else f" +- {found.deviation:.{digits}f}")


def _digits(values: Sequence[float]) -> int:
    """Return the number of decimals that gives the smallest value three figures. It is at least two, as in the paper."""
    smallest = min(abs(value) for value in values)
    return 2 if smallest == 0 else max(2, 2 - math.floor(math.log10(smallest)))


def quantity(value: float) -> str:
    """Return three figures and a unit: 3.86M."""
    unit, larger = "", list("GMk")
    while value >= 999.5 and larger:
        value, unit = value / 1000, larger.pop()
    return f"{value:#.3g}".rstrip(".") + unit


# --- What a reader must know beside the figures ---------------------------------------------------


def command(ablation: Ablation) -> str:
    """Return the command that makes this table again."""
    words = ["python", "-m", "meme", "ablate", ablation.recipe]
    for field in fields(Ablation)[1:]:
        value, flag = getattr(ablation, field.name), f"--{field.name.replace('_', '-')}"
        if field.name == "family" or value != field.default:
            words += [flag] if value is True else [flag, shlex.quote(str(value))]
    return " ".join(words)


def _protocol(ablation: Ablation, scores: Sequence[Scored], basis: Basis) -> str:
    first, batches = scores[0], sorted({ablation.config(row).training.batch_size for row in ablation.rows})
    seeds = "training seed 0" if ablation.seeds == 1 else f"training seeds 0 to {ablation.seeds - 1}"
    noise = "one sampling seed" if ablation.sampling_seeds == 1 else f"{ablation.sampling_seeds} sampling seeds"
    return (
        f"{first.features} features, {first.samples:,} samples of {first.sampling_steps} {first.sampler} steps against all "
        f"{len(basis.images):,} images of {basis.images.name}; trained on batches of {' or '.join(map(str, batches))}; {seeds}, "
        f"{noise} each."
    )


def _notes(ablation: Ablation, comparisons: int) -> tuple[str, ...]:
    spread_over_seeds = (
        "Ours is mean +- standard deviation over training seeds, each with initial weights, order of the data and noise of its "
        "own, common to all rows; so differences are taken seed by seed. Their intervals are Student's t, each for one "
        f"comparison alone: of {comparisons} here, the chance that some interval leaves 0 out by luck is more than 5 %."
    )
    one_seed = "Ours is of one training seed: its luck is unknown, and no difference is claimed."
    costs = () if len(ablation.lines[0][1]) > 1 else (_of_costs(ablation),)
    return _of_paper(ablation), _of_training(ablation), *costs, spread_over_seeds if ablation.seeds > 1 else one_seed


def _of_costs(ablation: Ablation) -> str:
    ours = "MACs, ours: of one image, attention counted, the mean over the sampler's steps"
    paper = "the paper's: of three images, latent diffusion's attention left out"
    prints_macs = any(_printed_costs(ablation, row)[1] != NOTHING for row in ablation.rows)
    return f"{ours}; {paper}." if RECIPES[ablation.recipe].prints_costs and prints_macs else f"{ours}."


def _of_paper(ablation: Ablation) -> str:
    said = f"The paper's figures are of {_table_in_paper(ablation)}, clean-fid's Inception, printed without a spread."
    missing = " It has no table for one expert." if ablation.recipe == "experts" else ""
    if ablation.family == _source(ablation):
        return f"{said}{missing} Values compare only where ours are of the same protocol."
    return f"{said}{missing} Compare the order of rows, not the values, which are of other data, features and sampling."


def _of_training(ablation: Ablation) -> str:
    steps = {row: ablation.config(row).training.steps for row in ablation.rows}
    if ablation.equal_total:
        return (
            f"Held equal: the experts of a row together are trained {4 * ablation.expert_steps:,} steps, however many they are."
        )
    if "ldm-s" in steps:
        times = steps["ldm-s"] / ablation.expert_steps
        return f"Held equal: every expert is trained {ablation.expert_steps:,} steps, and a small network alone " + (
            "as many." if times == 1 else f"{times:g} times as many, as long as the experts of a row together."
        )
    held = f"Held equal: every expert is trained {ablation.expert_steps:,} steps"
    grows = ablation.recipe == "experts"
    return f"{held}, as in the paper, so that more experts cost more training." if grows else f"{held}."


def _machine(device: torch.device) -> str:
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU used"
    threads = torch.get_num_threads()
    cores = f"{threads} thread{'s' if threads > 1 else ''} on {os.cpu_count()} cores of {_cpu()}"
    return f"{cores}, {gpu}; Python {platform.python_version()}, torch {torch.__version__}"


def _cpu() -> str:
    """Return the processor's name, which only Linux gives in full."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


# --- Drawing --------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """Return the report as the text of a Markdown file."""
    parts = [
        f"# {report.title}",
        f"    {report.command}",
        f"{report.made}.",
        report.protocol,
        _pipes(report.table),
        _pipes(report.differences),
        "\n".join(f"- {line}" for line in report.sentences),
        "\n".join(f"- {line}" for line in report.notes),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _pipes(cells: Cells) -> str:
    lines = [cells.headings, ("---",) * len(cells.headings), *cells.lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_report(report: Report, console: Console) -> None:
    """Print the report on the terminal."""
    console.print(f"\n{report.title}", style="bold")
    console.print(report.protocol)
    for cells in (report.table, report.differences):
        drawn = _drawn(cells)
        width = (
            Console(width=1000, markup=False).measure(drawn).maximum
        )  # a narrower terminal wraps lines rather than lose digits
        Console(width=max(console.width, width), file=console.file, highlight=False, markup=False, emoji=False).print(drawn)
    for line in (*report.sentences, *report.notes):
        console.print(f"- {line}")


def _drawn(cells: Cells) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, heading in enumerate(cells.headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=True)
    for line in cells.lines:
        table.add_row(*line)
    return table
