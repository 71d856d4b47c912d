"""The cost of networks beside the paper's figures: the verb ``cost`` of ``python -m meme``."""

from dataclasses import asdict, dataclass

from rich.console import Console
from rich.table import Table

from meme.config.schema import Config
from meme.paper.printed import PRINTED, printed_params
from meme.scoring.cost import expert_cost, paper_macs

TABLE_WIDTH = 108  # a narrower terminal wraps lines rather than lose digits


@dataclass(frozen=True)
class CostRow:
    """The cost of one expert. Figures of the paper are None where it has no such row."""

    config: str
    expert: int
    params: int
    """As the paper counts them: without the embeddings of classes."""
    params_paper: float | None
    params_difference: float | None
    """(ours - paper) / paper, as are all differences."""
    macs: int
    """Of one image, attention counted."""
    macs_convention: int
    """As the paper prints MACs: ``meme.scoring.cost.paper_macs``."""
    macs_paper: float | None
    macs_difference: float | None


def cost_rows(config: Config) -> list[CostRow]:
    """Return a row for every expert of ``config``. For presets, the paper's figures stand beside ours."""
    return [_row(config, number) for number in range(1, len(config.experts) + 1)]


def _row(config: Config, number: int) -> CostRow:
    architecture = config.image, config.network, config.expert(number)
    cost, convention = expert_cost(*architecture), paper_macs(*architecture)
    params = cost.params - cost.class_params
    printed, row = printed_params(config.name, number), PRINTED.get(config.name)
    params_paper = float(printed) * 1e6 if printed else None
    macs_paper = float(row.macs) * 1e9 if row and row.macs else None
    return CostRow(
        config.name,
        number,
        params,
        params_paper,
        _difference(params, params_paper),
        cost.macs,
        convention,
        macs_paper,
        _difference(convention, macs_paper),
    )


def print_table(rows: list[CostRow], console: Console) -> None:
    """Print the rows for a person. Experts with the same cost share a line."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("preset", no_wrap=True)
    for heading in ("expert", "params M", "paper", "diff %", "MACs G", "paper's way G", "paper", "diff %"):
        table.add_column(heading, justify="right", no_wrap=True)
    for first, last in _alike(rows):
        experts = f"{first.expert}" if first is last else f"{first.expert}-{last.expert}"
        table.add_row(
            first.config if first.expert == 1 else "",
            experts,
            f"{first.params / 1e6:.3f}",
            *_beside(first.params_paper, 1e6, first.params_difference),
            f"{first.macs / 1e9:.3f}",
            f"{first.macs_convention / 1e9:.3f}",
            *_beside(first.macs_paper, 1e9, first.macs_difference),
        )
    Console(width=max(console.width, TABLE_WIDTH), highlight=False, markup=False, emoji=False).print(table)
    console.print("MACs G: one image, attention counted. The paper's way: three images, latent diffusion's attention left out.")
    console.print("The paper prints few digits, and nothing for rows whose columns are empty.")


def _alike(rows: list[CostRow]) -> list[tuple[CostRow, CostRow]]:
    """Return the first and last row of every run of experts of one config that differ in nothing but their number."""
    runs: list[tuple[CostRow, CostRow]] = []
    for row in rows:
        if runs and _without_number(runs[-1][1]) == _without_number(row):
            runs[-1] = (runs[-1][0], row)
        else:
            runs.append((row, row))
    return runs


def _without_number(row: CostRow) -> dict:
    return asdict(row) | {"expert": None}


def _difference(ours: float, paper: float | None) -> float | None:
    return None if paper is None else (ours - paper) / paper


def _beside(paper: float | None, unit: float, difference: float | None) -> tuple[str, str]:
    return ("", "") if paper is None or difference is None else (f"{paper / unit:g}", f"{100 * difference:+.2f}")
