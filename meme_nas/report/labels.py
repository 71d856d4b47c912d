"""Placement of point labels in a plot, so that they cover neither points nor each other."""

import math
from collections.abc import Sequence
from itertools import pairwise

Point = tuple[float, float]

PLOT_SIZE = (1080, 340)  # pixels of the plot on a wide page; on a narrow one there are no labels
_LETTER_WIDTH, _LINE_HEIGHT = 7.5, 20
_SYMBOL = 10  # pixels around a point that labels should not cover
_OFFSETS = tuple(
    (round(reach * math.cos(angle)), round(0.8 * reach * math.sin(angle)))
    for reach in (42, 64, 90)
    for angle in (math.pi * step / 8 for step in range(16))
)


def offsets(anchors: Sequence[Point], texts: Sequence[str], obstacles: Sequence[Point]) -> list[tuple[int, int]]:
    """Return the offset in pixels from each anchor to the middle of its label.

    Anchors and obstacles are shares of the plot's width and height, from its lower left corner.
    """
    blocks = [_pixels(point) for point in obstacles]
    taken: list[tuple[Point, float]] = []
    chosen = []
    for anchor, text in zip(map(_pixels, anchors), texts, strict=True):
        width = _LETTER_WIDTH * len(text)
        best = min(_OFFSETS, key=lambda offset: _cost(_moved(anchor, offset), width, offset, blocks, taken))
        taken.append((_moved(anchor, best), width))
        chosen.append(best)
    return chosen


def along_steps(corners: Sequence[Point], parts: int = 16) -> list[Point]:
    """Return points along the step line through ``corners``, which moves right first, then down."""
    points = []
    for (x, y), (next_x, next_y) in pairwise(corners):
        for part in range(parts + 1):
            points += [(x + (next_x - x) * part / parts, y), (next_x, y + (next_y - y) * part / parts)]
    return points


def _cost(middle: Point, width: float, offset: Point, blocks: Sequence[Point], taken: Sequence) -> float:
    """Return the penalty of a label: high outside the plot, lower on other labels, lower on points; then by distance."""
    x, y = middle
    outside = not (width / 2 <= x <= PLOT_SIZE[0] - width / 2 and _LINE_HEIGHT / 2 <= y <= PLOT_SIZE[1] - _LINE_HEIGHT / 2)
    on_labels = sum(
        abs(x - other[0]) < (width + other_width) / 2 + 4 and abs(y - other[1]) < _LINE_HEIGHT for other, other_width in taken
    )
    on_points = sum(
        abs(x - block[0]) < width / 2 + _SYMBOL and abs(y - block[1]) < _LINE_HEIGHT / 2 + _SYMBOL for block in blocks
    )
    return 1000 * outside + 100 * on_labels + 10 * on_points + math.hypot(*offset) / 20


def _pixels(point: Point) -> Point:
    """Return a point in pixels from the upper left corner."""
    return point[0] * PLOT_SIZE[0], (1 - point[1]) * PLOT_SIZE[1]


def _moved(point: Point, offset: Point) -> Point:
    return point[0] + offset[0], point[1] + offset[1]
