"""Splits of an ensemble between convolution and attention, as a table of experts and levels for the report."""

from dataclasses import dataclass
from typing import Any

from meme.config.schema import Config, ExpertConfig

_SHARE_COLOURS = (
    (237, 242, 250),
    (122, 163, 219),
    (43, 92, 168),
    (24, 56, 124),
)  # from all convolution to all attention


@dataclass(frozen=True)
class Cell:
    """One expert's split at one level."""

    low: int
    width: int
    change: int
    """C_l less that of the pattern it is compared with."""

    @property
    def share(self) -> float:
        return self.low / self.width

    @property
    def colour(self) -> str:
        return colour_of(self.share)

    @property
    def ink(self) -> str:
        return "#fff" if self.share > 0.45 else "#16233b"


def pattern(title: str, config: Config, compared: Config | None) -> dict[str, Any] | None:
    """Return the table of ``config``'s splits, with differences from ``compared`` if both have the same levels and experts.

    None for a network without splits.
    """
    network = config.network
    if compared and (compared.network.widths != network.widths or len(compared.experts) != len(config.experts)):
        compared = None
    levels = [
        {"number": level, "size": config.image.size // 2 ** (level - 1), "width": width}
        for level, width in enumerate(network.widths, start=1)
    ]
    others = compared.experts if compared else config.experts
    experts = [
        {"number": number, "interval": expert.interval, "p": expert.p, "cells": _cells(expert, other, network.widths)}
        for number, (expert, other) in enumerate(zip(config.experts, others, strict=True), start=1)
        if expert.low_channels
    ]
    return {"title": title, "levels": levels, "experts": experts, "compared": compared is not None} if experts else None


def _cells(expert: ExpertConfig, other: ExpertConfig, widths: tuple[int, ...]) -> list[Cell]:
    before = other.low_channels or expert.low_channels
    return [Cell(low, width, low - then) for low, then, width in zip(expert.low_channels, before, widths, strict=True)]


def colour_of(share: float) -> str:
    """Return the CSS colour of an attention ``share`` in [0, 1], interpolated between the scale's colours."""
    place = min(max(share, 0.0), 1.0) * (len(_SHARE_COLOURS) - 1)
    index = min(int(place), len(_SHARE_COLOURS) - 2)
    below, above, part = _SHARE_COLOURS[index], _SHARE_COLOURS[index + 1], place - index
    return "rgb({}, {}, {})".format(*(round(a + part * (b - a)) for a, b in zip(below, above, strict=True)))
