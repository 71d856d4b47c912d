"""Folders of Hugging Face datasets on this disk: written by ``save_to_disk``, or parquet files. Nothing is fetched or
unpickled.

A dataset is a table with a row per image. The package ``datasets`` reads it; it is optional and imported only here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meme.errors import UserError
from meme.support.files import cache_folder, stamp_of

if TYPE_CHECKING:
    from datasets import Dataset

_SPLITS, _STATE = "dataset_dict.json", ("state.json", "dataset_info.json")  # what save_to_disk writes
_SPLIT_NAME = re.compile(r"(train|test|validation|valid|val|dev)(?![a-z])")  # begins the name of a parquet file on the hub
_NAMES = ("image", "img", "images")  # of a column of bytes that does not say it is one of images


@dataclass(frozen=True)
class Rows:
    """The images of a dataset, none of them read yet."""

    sizes: Sequence[int | None]
    """Bytes of every encoded image; None where the row holds none."""
    read: Callable[[int], bytes]
    """The encoded image of a row."""
    labels: tuple[int, ...]
    """From 0; empty where not every row has a class."""
    classes: tuple[str, ...]
    stamp: str
    """Changes when a file of the dataset does."""


def is_dataset(path: Path) -> bool:
    """Return whether ``path`` is a dataset by the names of its files, without reading them."""
    return bool(_saved(path) or _parquet(path))


def open_rows(path: Path, shown: str) -> Rows:
    """Open the rows of the dataset at ``path``; where there are several splits, those of its split called train.

    Raises ``UserError``, with ``shown`` for the path, where ``datasets`` is not installed or cannot read it, and where it has
    no column of images, or several splits of which none is called train.
    """
    try:
        import datasets
    except ImportError:
        advice = "which needs the package datasets: pip install 'meme-nas[datasets]'"
        raise UserError(f"data: {shown} is a dataset of Hugging Face, {advice}") from None
    datasets.disable_progress_bars()
    files = _files(path, shown)
    try:
        if _saved(path):
            dataset = datasets.load_from_disk(str(files[0].parent))
        else:
            dataset = datasets.Dataset.from_parquet([str(file) for file in files], cache_dir=str(cache_folder() / "datasets"))
    except Exception as error:  # of pyarrow, pandas, the file system or datasets itself: they share no base
        raise UserError(f"data: {shown} is no dataset that can be read ({' '.join(str(error).split())[:160]})") from error
    stamp = " ".join(f"{file.name} {facts.st_size} {stamp_of(facts)}" for file, facts in ((each, each.stat()) for each in files))
    return _rows(dataset, stamp, shown)


def _saved(path: Path) -> bool:
    return (path / _SPLITS).is_file() or all((path / name).is_file() for name in _STATE)


def _parquet(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*.parquet") if file.is_file())
    return [path] if path.suffix == ".parquet" and path.is_file() else []


def _files(path: Path, shown: str) -> list[Path]:
    """Return the files of the split to read."""
    if not _saved(path):
        files = _parquet(path)
        names = {file: match[1] if (match := _SPLIT_NAME.match(file.name)) else "" for file in files}
        wanted = _chosen_split(sorted(set(names.values())), shown)
        return [file for file in files if names[file] == wanted]
    if (path / _SPLITS).is_file():
        splits = sorted(each.parent.name for each in path.glob(f"*/{_STATE[0]}"))
        path = path / _chosen_split(splits, shown)
    return [path / _STATE[0], *sorted(path.glob("*.arrow"))]


def _chosen_split(splits: list[str], shown: str) -> str:
    if "train" in splits:
        return "train"
    if len(splits) != 1:
        named = ", ".join(name or "files without a split" for name in splits) or "none"
        raise UserError(f"data: {shown} has no split called train but {named}; name the folder or file of one")
    return splits[0]


def _rows(dataset: "Dataset", stamp: str, shown: str) -> Rows:
    import datasets
    import pyarrow.compute

    column = _image_column(dataset.features, shown)
    try:
        encoded = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        table = encoded.with_format("arrow")[:]
    except Exception as error:
        raise UserError(f"data: column {column} of {shown} holds no images ({' '.join(str(error).split())[:120]})") from error
    sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(table[column], "bytes")).to_pylist()
    labels, classes = _labels(dataset)
    return Rows(sizes, lambda index: encoded[index][column]["bytes"], labels, classes, stamp)


def _image_column(features: dict[str, Any], shown: str) -> str:
    import datasets

    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    found += [name for name in _NAMES if name in features and name not in found]
    if not found:
        raise UserError(f"data: {shown} has no column of images but {', '.join(features)}")
    return next((name for name in found if name in _NAMES), found[0])


def _labels(dataset: "Dataset") -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return labels and class names of the column called label, else of the first that holds classes. Both are empty unless all
    rows have a class."""
    import datasets

    columns = [name for name, kind in dataset.features.items() if isinstance(kind, datasets.ClassLabel)]
    if not columns:
        return (), ()
    column = "label" if "label" in columns else columns[0]
    labels, classes = tuple(dataset[column][:]), tuple(dataset.features[column].names)
    known = all(label is not None and 0 <= label < len(classes) for label in labels)
    return (labels, classes) if known else ((), ())
