"""Feed broken and hostile files to all readers of files that a user brings or shares.

    python benchmarks/fuzz.py [--inputs 10000] [--readers config checkpoint bank images exif listings environments] [--seed 0]

Each reader gets ``inputs`` files. It must read a file, skip it, or refuse it by a UserError of one printable line. Any other
result is an error, as is a file that takes longer than ``SLOW_SECONDS``. The last line is one JSON object with ``inputs``,
``refused``, ``errors`` and ``slowest_seconds`` of each reader. The status is 1 if there was any error.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import hypothesis
import numpy as np
from hostile import (
    CONFIGS,
    ENVIRONMENTS,
    EXIF_SEGMENTS,
    FOLDERS,
    LISTINGS,
    VARIABLES,
    ZIPS,
    Files,
    bank_files,
    checkpoints,
    jpeg_with_exif,
)
from hypothesis import strategies as st

from meme.cli.parsing import with_homes
from meme.config.presets import preset
from meme.config.schema import Config
from meme.data.decoding import decode_image
from meme.data.images import open_images
from meme.errors import UserError, shell_command
from meme.scoring.features.inception import find_inception
from meme.support.files import cache_folder, settle_paths
from meme.training.interval_loss import Part, hold_out
from meme.training.trainer import Training, _holds, load_expert, train_expert
from meme_nas.engines.placement import check_engine
from meme_nas.settings import SearchSettings
from meme_nas.worker.bank import ExpertBank

SLOW_SECONDS = 10.0
ROUND = 1_000  # inputs of one hypothesis run; each has its own seed

Reader = Callable[[Path], tuple[st.SearchStrategy, Callable[[object], None]]]
"""Function from an empty folder to the strategy of inputs and the function that reads one of them."""


@dataclass
class Tally:
    """Results of one reader's inputs."""

    inputs: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    errors: Counter[str] = field(default_factory=Counter)
    """Number of errors, by exception and by our last line that it passed."""

    def as_json(self) -> dict:
        figures = {"inputs": self.inputs, "refused": self.refused, "errors": sum(self.errors.values())}
        return figures | {"slowest_seconds": round(self.slowest_seconds, 2)}


def configs(folder: Path) -> tuple[st.SearchStrategy, Callable[[bytes], None]]:
    """Read by ``Config.load``. A config that it accepts must have an id and be equal after writing and reading."""
    path, copy = folder / "config.yaml", folder / "copy.yaml"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        config = Config.load(path)
        config.save(copy)
        if Config.load(copy).architecture_id != config.architecture_id:
            raise AssertionError("a config is not what it was when written and read again")

    return CONFIGS, read


def expert_files(folder: Path) -> tuple[st.SearchStrategy, Callable[[bytes], None]]:
    """Read by ``load_expert``, and as the checkpoint of a training to resume."""
    config = preset("digits-meme").with_(training={"steps": 2, "batch_size": 2})
    images = open_images("digits", size=8, channels=1)
    train_expert(config, 1, images, folder=folder)
    training = Training(config, 1, images, "cpu")
    training.expert.zero_grad()
    finished, unfinished = folder / "expert-1.safetensors", folder / "expert-1.training.safetensors"
    training.save(unfinished)
    good = Files([finished.read_bytes(), unfinished.read_bytes()])

    def read(content: bytes) -> None:
        finished.write_bytes(content)
        unfinished.write_bytes(content)
        refusals = []
        for door in (lambda: load_expert(config, 1, folder), go_on):
            try:
                door()
            except UserError as error:
                refusals.append(error)
        if len(refusals) == 2:  # neither a finished expert nor a training to resume
            raise refusals[0]

    def go_on() -> None:
        if not _holds(unfinished, config, 1, images):
            raise UserError("holds no state of this training")
        training.load(unfinished)

    return checkpoints(good), read


def bank(folder: Path) -> tuple[st.SearchStrategy, Callable[[tuple[str, bytes]], None]]:
    """Open a bank in which label, record or weights are replaced, and take an expert from it."""
    config = preset("digits-meme").with_(training={"steps": 2, "batch_size": 2})
    images = open_images("digits", size=8, channels=1)
    data, held_out = hold_out(images)
    few = Part(held_out, np.arange(2), held_out.content_id)
    made = ExpertBank(folder / "bank", data, few)
    banked = made.obtain(config, 1)
    weights = made.weights(banked)
    files = {"label": folder / "bank" / "bank.json", "record": weights.parent / "entry.json", "weights": weights}
    good = {name: path.read_bytes() for name, path in files.items()}

    def read(content: tuple[str, bytes]) -> None:
        name, damaged = content
        files[name].write_bytes(damaged)
        try:
            opened = ExpertBank(folder / "bank", data, few)
            if found := opened.find(config, 1):
                opened.load(config, 1, found)
        finally:
            files[name].write_bytes(good[name])

    return bank_files(good), read


def images(folder: Path) -> tuple[st.SearchStrategy, Callable[[object], None]]:
    """Read folders and zips by ``open_images``."""
    source, archive = folder / "images", folder / "images.zip"

    def read(content: dict[str, bytes] | bytes) -> None:
        if isinstance(content, bytes):
            archive.write_bytes(content)
            open_images(archive, size=8, channels=3)
            return
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for name, file in content.items():
            _put(source, name, file)
        open_images(source, size=8, channels=1)

    return FOLDERS | ZIPS, read


def _put(root: Path, name: str, content: bytes) -> None:
    """Write a file ``name`` inside ``root``, if the file system supports such a name."""
    path = root / name.lstrip("/").replace("..", "_").replace("\0", "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except (OSError, ValueError):
        return


def exif(folder: Path) -> tuple[st.SearchStrategy, Callable[[bytes], None]]:
    """Read a whole JPEG with any EXIF data. It must be read, in one of the eight orientations."""
    upright = decode_image(jpeg_with_exif(b""), 8, 1)[0][0]
    turns = {np.rot90(each, turn).tobytes() for each in (upright, upright.T) for turn in range(4)}

    def read(segment: bytes) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, as the program does when it opens images
            pixels, _ = decode_image(jpeg_with_exif(segment), 8, 1)
        if pixels[0].tobytes() not in turns:
            raise AssertionError("an image is not what its EXIF makes of it")

    return EXIF_SEGMENTS, read


def listings(folder: Path) -> tuple[st.SearchStrategy, Callable[[tuple], None]]:
    """Read folders with odd names, links and files of other programs by ``open_images``."""
    source, outside = folder / "images", folder / "outside"
    _put(outside, "a.png", jpeg_with_exif(b""))

    def read(content: tuple[dict[str, bytes | str], bool]) -> None:
        files, follow_links = content
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for name, file in files.items():
            if isinstance(file, bytes):
                _put(source, name, file)
            elif file not in ("/", "/proc/self/fd") or not follow_links:  # do not read all of the machine
                _link(source, name, file)
        said: list[str] = []
        open_images(source, size=8, channels=3, follow_links=follow_links, on_message=said.append)
        if not all(line.isprintable() for line in said):
            raise AssertionError("a message of more than one printable line")

    return LISTINGS, read


def _link(root: Path, name: str, target: str) -> None:
    path = root / name.lstrip("/").replace("..", "_").replace("\0", "")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    except (OSError, ValueError):
        return


def environments(folder: Path) -> tuple[st.SearchStrategy, Callable[[tuple], None]]:
    """Read environment variables and paths in arguments as every command does before it starts its work."""

    def read(content: tuple[dict[str, str], list[str]]) -> None:
        variables, words = content
        kept = dict(os.environ)
        for name in VARIABLES:
            os.environ.pop(name, None)
        try:
            os.environ.update({"MEME_INCEPTION": "off"} | {name: value for name, value in variables.items() if value})
            settle_paths()
            if not cache_folder().is_absolute():
                raise AssertionError("a cache that lies elsewhere for a worker")
            find_inception(None)
            check_engine(SearchSettings())
            if not shell_command(with_homes(words)).isprintable():
                raise AssertionError("a command that is no printable line")
        finally:
            os.environ.clear()
            os.environ.update(kept)

    return ENVIRONMENTS, read


READERS: dict[str, Reader] = {
    "config": configs,
    "checkpoint": expert_files,
    "bank": bank,
    "images": images,
    "exif": exif,
    "listings": listings,
    "environments": environments,
}
NEVER_REFUSED = {"exif"}


def fuzz(reader: str, inputs: int, seed: int = 0) -> Tally:
    """Run ``reader`` on ``inputs`` files, with a folder and a cache of its own."""
    tally = Tally()
    with tempfile.TemporaryDirectory() as scratch, _cache_in(Path(scratch) / "cache"):
        (Path(scratch) / "files").mkdir()
        strategy, read = READERS[reader](Path(scratch) / "files")
        while tally.inputs < inputs:
            _round(strategy, read, tally, min(ROUND, inputs - tally.inputs), seed)
            shutil.rmtree(Path(scratch) / "cache", ignore_errors=True)
            seed += 1
    return tally


def _round(strategy: st.SearchStrategy, read: Callable, tally: Tally, inputs: int, seed: int) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=inputs,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(strategy)
    def one(content: object) -> None:
        _try(read, content, tally)

    one()


def _try(read: Callable, content: object, tally: Tally) -> None:
    tally.inputs += 1
    begun = time.perf_counter()
    try:
        read(content)
    except UserError as error:
        tally.refused += 1
        if not str(error).isprintable():
            tally.errors[f"a sentence of more than one printable line: {str(error)!r:.200}"] += 1
    except Exception as error:
        tally.errors[f"{type(error).__name__} ({str(error)[:80]!r}) from {_our_line(error)}"] += 1
    took = time.perf_counter() - begun
    tally.slowest_seconds = max(tally.slowest_seconds, took)
    if took > SLOW_SECONDS:
        tally.errors[f"slower than {SLOW_SECONDS:g} s"] += 1


def _our_line(error: Exception) -> str:
    """Return our last line in the error's traceback."""
    ours = tuple(f"{os.sep}{package}{os.sep}" for package in ("meme", "meme_nas"))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if any(part in frame.filename for part in ours)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the test itself"


@contextmanager
def _cache_in(folder: Path) -> Iterator[None]:
    """Put the program's cache into ``folder``."""
    before = os.environ.get("MEME_CACHE")
    os.environ["MEME_CACHE"] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ["MEME_CACHE"]
        else:
            os.environ["MEME_CACHE"] = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="files for each reader")
    parser.add_argument("--readers", nargs="+", choices=list(READERS), default=list(READERS))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures, failed = {}, False
    for reader in arguments.readers:
        begun = time.monotonic()
        tally = fuzz(reader, arguments.inputs, arguments.seed)
        figures[reader] = tally.as_json() | {"seconds": round(time.monotonic() - begun)}
        for error, count in tally.errors.most_common():
            failed = True
            print(f"{reader}: {count} x {error}", file=sys.stderr)
    print(json.dumps(figures))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
