"""The tables of ``meme.analysis.spectra`` as figures like the paper's, PNG beside CSV.

All figures show the relative log amplitude over the frequency on the half diagonal, as Fig. 2, 3 and 6 do.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from meme.analysis.spectra import COLUMNS, expert_distances
from meme.analysis.spectrum import white_noise
from meme.support.files import written_whole

DOTS_PER_INCH = 150
FEW_FREQUENCIES = 9  # a curve of at most this number of frequencies has a dot at each
PANELS = 4  # columns of the figures of experts
X_LABEL, Y_LABEL = "frequency / π", "relative log amplitude (ln)"
_DASHES = ("-", "--", "-.", ":")


def write_latents(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write a table of ``meme.analysis.spectra.latents`` as ``latents.csv`` and ``latents.png`` (Fig. 2) in ``folder``; return
    their paths."""
    return [write_table(table, folder / "latents.csv"), _save(draw_latents(table), folder / "latents.png")]


def write_features(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write a table of ``meme.analysis.spectra.features`` as ``features.csv`` and ``features.png`` (Fig. 3) in ``folder``;
    return their paths."""
    return [write_table(table, folder / "features.csv"), _save(draw_features(table), folder / "features.png")]


def write_experts(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Write a table of ``meme.analysis.spectra.experts`` in ``folder`` and return the paths of its files:

    - ``experts.csv``, and ``experts.png`` (Fig. 6): all experts given the same input
    - ``experts-own.png``: every expert in its own interval, at several depths
    - ``experts-distance.csv``: ``meme.analysis.spectra.expert_distances``
    """
    return [
        write_table(table, folder / "experts.csv"),
        _save(draw_experts(table), folder / "experts.png"),
        _save(draw_own_intervals(table), folder / "experts-own.png"),
        write_table(expert_distances(table), folder / "experts-distance.csv"),
    ]


def draw_latents(table: pd.DataFrame) -> Figure:
    """Draw Fig. 2: one panel with a line for each timestep. The clean data are black, the expectation of white noise is
    dotted."""
    figure, (axes,) = _panels(1, 1, width=6.4, height=4.4)
    colours = _colours_of(table["timestep"])
    frequencies = table["frequency"].unique()
    noise = white_noise(torch.from_numpy(frequencies))
    for t, curve in table.groupby("timestep"):
        _plot(axes, curve, color=colours.to_rgba(t))
    _plot(axes, table[table["timestep"].isna()], color="black", linewidth=2, label="clean data")
    axes.plot(frequencies, noise - noise[0], color="black", linestyle=":", zorder=5, label="white noise, expected")
    figure.colorbar(colours, ax=axes, label="timestep $t$")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    _label(figure, [axes], 1, f"Spectra of $x_t$, {_mean_over(table)}")
    return figure


def draw_features(table: pd.DataFrame) -> Figure:
    """Draw Fig. 3: a panel for each layer in the order of execution, with a line for each timestep."""
    layers = list(table.groupby("depth", sort=True))
    columns = _columns_for(len(layers))
    figure, panels = _panels(math.ceil(len(layers) / columns), columns)
    colours = _colours_of(table["timestep"])
    for axes, (_, layer) in zip(panels, layers, strict=False):
        _title(axes, _two_lines(layer["layer"].iloc[0]))
        for t, curve in layer.groupby("timestep"):
            _plot(axes, curve, color=colours.to_rgba(t))
    figure.colorbar(colours, ax=panels, label="timestep $t$", aspect=40)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    _label(figure, panels[: len(layers)], columns, f"{table['ensemble'].iloc[0]}: spectra of the features, {_mean_over(table)}")
    return figure


def draw_experts(table: pd.DataFrame) -> Figure:
    """Draw Fig. 6, at the last layer of the encoder: a row for each ensemble, a column for each of up to four timesteps, and a
    line for each expert. All experts of a panel are given the same input."""
    ensembles = list(table.groupby("ensemble", sort=False))
    times = _spread(sorted(table["timestep"].unique()), PANELS)
    figure, panels = _panels(len(ensembles), len(times), top=0.9)
    for row, (name, rows) in enumerate(ensembles):
        layer = rows[rows["depth"] == _ends(rows)[1]]
        for column, t in enumerate(times):
            axes = panels[row * len(times) + column]
            _title(axes, f"{name}, $t$ = {t}\n{layer['layer'].iloc[0]}")
            _plot_experts(axes, layer[layer["timestep"] == t])
    _expert_legend(figure, table)
    _label(figure, panels, len(times), f"Experts given the same input, {_mean_over(table)}")
    return figure


def draw_own_intervals(table: pd.DataFrame) -> Figure:
    """Draw the spectra of every expert, averaged over the timesteps of its own interval.

    There is a row for each ensemble, and a column each for the first and last layer of the encoder, the middle and the last
    layer of the decoder. Each expert has a line.
    """
    own = table[table["own"]]
    ensembles = list(own.groupby("ensemble", sort=False))
    figure, panels = _panels(len(ensembles), PANELS, top=0.9)
    for row, (name, rows) in enumerate(ensembles):
        for column, depth in enumerate(_ends(rows)):
            axes, layer = panels[row * PANELS + column], rows[rows["depth"] == depth]
            _title(axes, f"{name}\n{layer['layer'].iloc[0]}")
            _plot_experts(axes, layer.groupby(["expert", "frequency"], as_index=False)["relative_log_amplitude"].mean())
    _expert_legend(figure, own)
    each = own.groupby(["ensemble", "expert"])["timestep"].nunique().max()
    _label(figure, panels, PANELS, f"Experts in their own intervals, {each} timesteps each, {_mean_over(table)}")
    return figure


def write_table(table: pd.DataFrame, path: Path) -> Path:
    """Write a table as CSV and return its path. The file appears whole or not at all."""
    with written_whole(path) as partial:
        table.to_csv(partial, index=False)
    return path


def read_table(path: Path) -> pd.DataFrame:
    """Read a table of ``meme.analysis.spectra`` from its CSV, without loss, so that its figure can be drawn again in other
    ways."""
    return pd.read_csv(path, dtype=COLUMNS, float_precision="round_trip")


def _save(figure: Figure, path: Path) -> Path:
    with written_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=DOTS_PER_INCH)
    return path


def _panels(rows: int, columns: int, width: float = 2.6, height: float = 2.1, top: float = 0.6) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure of equal panels with common axes, read row by row. A panel's size and the title's height are in
    inches."""
    figure = Figure(figsize=(width * columns + 0.9, height * rows + top), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel())
    for axes in panels:
        axes.grid(alpha=0.3)
        axes.set_xlim(-0.03, 1.03)
    return figure, panels


def _plot(axes: Axes, curve: pd.DataFrame, **style: Any) -> None:
    marker: dict[str, Any] = {"marker": "o", "markersize": 3.5} if len(curve) <= FEW_FREQUENCIES else {}
    axes.plot(curve["frequency"], curve["relative_log_amplitude"], **{"linewidth": 1.3} | marker | style)


def _plot_experts(axes: Axes, curves: pd.DataFrame) -> None:
    for number, curve in curves.groupby("expert"):
        _plot(axes, curve, **_style_of(number))


def _style_of(expert: int) -> dict:
    """Return the colour and dashes of an expert. They are the same in every panel and figure, whichever other experts are
    drawn."""
    return {"color": f"C{(expert - 1) % 10}", "linestyle": _DASHES[(expert - 1) % len(_DASHES)]}


def _expert_legend(figure: Figure, table: pd.DataFrame) -> None:
    numbers = sorted(table["expert"].unique())
    lines = [Line2D([], [], **_style_of(number)) for number in numbers]
    names = [f"expert {number}" for number in numbers]
    names[0] += " (least noise)"
    figure.legend(lines, names, loc="outside lower center", ncols=min(len(lines), 5), frameon=False)


def _colours_of(timesteps: pd.Series) -> ScalarMappable:
    """Map timesteps to a sequential colour scale, without its lightest end, which is hard to see on white."""
    colours = ListedColormap(colormaps["viridis"](np.linspace(0, 0.92, 256)))
    return ScalarMappable(Normalize(timesteps.min(), max(timesteps.max(), timesteps.min() + 1)), colours)


def _columns_for(panels: int) -> int:
    """Return the number of columns: up to four panels make one row; more make rows of the four to six panels that leave the
    fewest places empty."""
    return panels if panels <= PANELS else min((4, 5, 6), key=lambda columns: (-panels % columns, -columns))


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, fontsize=9)


def _label(figure: Figure, panels: Sequence[Axes], columns: int, title: str) -> None:
    """Add a title, and name the axes at the left and below the lowest panel of every column."""
    figure.suptitle(title, fontsize=11)
    figure.supylabel(Y_LABEL, fontsize=10)
    for axes in panels[-columns:]:
        axes.set_xlabel(X_LABEL)
        axes.tick_params(labelbottom=True)


def _mean_over(table: pd.DataFrame) -> str:
    return f"mean over {table['images'].max():,} images and all channels"


def _ends(rows: pd.DataFrame) -> list[int]:
    """Return the depths of the first and last layer of the encoder, the middle, and the last layer of the decoder."""
    encoder = rows.loc[rows["layer"].str.startswith("enc "), "depth"]
    return [encoder.min(), encoder.max(), encoder.max() + 1, rows["depth"].max()]


def _spread(items: Sequence, count: int) -> list:
    """Return up to ``count`` of the items: the middles of ``count`` equal parts."""
    count = min(count, len(items))
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]


def _two_lines(layer: str) -> str:
    """Break a layer's name, such as ``enc 3 iFormer 32x4x4``, so that its shape has a line of its own."""
    return "\n".join(layer.rsplit(" ", 1))
