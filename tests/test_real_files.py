"""Folders as other programs, cameras and people leave them: each kind is read right, or refused in one sentence."""

import io
import json
import os
import shlex
import struct
import subprocess
import zipfile
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from meme.cli.commands import check_output, train_config
from meme.cli.console import remarks
from meme.cli.parsing import with_homes
from meme.config.presets import preset
from meme.config.schema import Config
from meme.data.decoding import has_extension
from meme.data.images import Images, check_outside, open_images
from meme.data.survey import Spread, suggested_commands, survey, survey_lines
from meme.errors import UserError, shell_command
from meme.pipeline import open_reference
from meme.scoring.features import choose_features, classifier
from meme.scoring.metrics import measure
from meme.support.files import remove_partials, written_whole


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEME_CACHE", str(folder))
    return folder


def noise(height: int = 8, width: int = 8, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def put(path: Path, content: bytes | Image.Image) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else encoded(content))
    return path


def opened(source: Path, channels: int = 3, **options) -> Images:
    return open_images(source, size=8, channels=channels, **options)


# EXIF

SHORT, LONG, RATIONAL, SIGNED = 3, 4, 5, 10
ORIENTATION = 0x112


def jpeg_with_exif(body: bytes) -> bytes:
    plain = encoded(noise(40, 48), "JPEG", quality=95)
    segment = b"Exif\0\0" + body
    return plain[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + plain[2:]


def exif(*entries: tuple[int, int, int, bytes], after: bytes = b"") -> bytes:
    """A little-endian TIFF header with these entries: tag, type, count and four bytes of value."""
    packed = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + packed + struct.pack("<I", 0) + after


TURNED = (ORIENTATION, SHORT, 1, struct.pack("<HH", 6, 0))
BEHIND = struct.pack("<I", 8 + 2 + 2 * 12 + 4)  # what comes after two entries
ODD = {
    "text where a fraction belongs": exif(TURNED, (0x11A, 2, 3, b"ab\0\0")),
    "bytes where a fraction belongs": exif(TURNED, (0x11A, 7, 4, b"abcd")),
    "one byte where a fraction belongs": exif(TURNED, (0x11A, 1, 1, b"\x48\0\0\0")),
    "a negative fraction over zero": exif(TURNED, (0x11A, RATIONAL, 1, BEHIND), after=struct.pack("<ii", -1, 0)),
    "a value beyond the end": exif(TURNED, (0x10F, 2, 40, struct.pack("<I", 60_000))),
    "an IFD that is its own": exif(TURNED, (0x8769, LONG, 1, struct.pack("<I", 8))),
    "a signed fraction as an IFD": exif(TURNED, (0x8825, SIGNED, 1, BEHIND), after=struct.pack("<ii", 8, 1)),
    "two values": exif((ORIENTATION, SHORT, 2, struct.pack("<HH", 6, 6))),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_tag_does_not_keep_an_image_from_being_turned(tmp_path, kind):
    put(tmp_path / "a.jpg", jpeg_with_exif(ODD[kind]))
    put(tmp_path / "b.jpg", jpeg_with_exif(exif(TURNED)))
    images = opened(tmp_path, strict=True)
    assert np.array_equal(images.pixels[0], images.pixels[1])
    upright = put(tmp_path / "plain" / "a.jpg", encoded(noise(40, 48), "JPEG", quality=95))
    expected = Image.open(upright).transpose(Image.Transpose.ROTATE_270).resize((8, 8), Image.BICUBIC, box=(0, 4, 40, 44))
    assert np.array_equal(images.pixels[0], np.asarray(expected).transpose(2, 0, 1))


@pytest.mark.parametrize("body", [b"", b"hello, no TIFF", exif((ORIENTATION, SHORT, 1, struct.pack("<HH", 9, 0)))])
def test_an_orientation_that_is_none_leaves_an_image_as_it_is(tmp_path, body):
    put(tmp_path / "a.jpg", jpeg_with_exif(body))
    put(tmp_path / "b.jpg", encoded(noise(40, 48), "JPEG", quality=95))
    images = opened(tmp_path, strict=True)
    assert np.array_equal(images.pixels[0], images.pixels[1])


# Colour, and more than 8 bits


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "LA", "CMYK"])
def test_grey_images_stored_in_colour_are_grey(tmp_path, mode):
    for seed in range(4):
        grey = noise(16, 16, seed).convert("L")
        put(
            tmp_path / f"{seed}.tif", encoded(grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode), "TIFF")
        )
    assert opened(tmp_path, channels=1).colour_share == 0 == survey(str(tmp_path)).colour_share
    open_reference(preset("digits-meme").with_(data=str(tmp_path)))


def test_one_coloured_pixel_makes_colour_and_the_noise_of_a_lossy_format_none(tmp_path):
    grey = Image.merge("RGB", [noise(200, 200).convert("L")] * 3)
    put(tmp_path / "lossy.webp", encoded(grey, "WEBP", quality=80))
    put(tmp_path / "lossy.jpg", encoded(grey, "JPEG", quality=60))
    assert opened(tmp_path).colour_share == 0
    grey.putpixel((190, 3), (255, 0, 0))
    put(tmp_path / "spot.png", grey)
    assert opened(tmp_path).colour_share == pytest.approx(1 / 3)


def ramp(most: int, kind: type = np.uint16) -> Image.Image:
    return Image.fromarray(np.linspace(0, most, 64).round().astype(kind).reshape(8, 8))


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_sixteen_bits_are_scaled_by_those_in_use_and_that_is_said(tmp_path, bits):
    put(tmp_path / "a.png", ramp(2**bits - 1))
    put(tmp_path / "b.png", ramp(2 ** (bits - 1)))  # darker, in the same scale
    said: list[str] = []
    images = opened(tmp_path, channels=1, on_message=said.append)
    full = np.linspace(0, 255, 64).reshape(8, 8)
    assert np.abs(images.pixels[0, 0] - full).max() <= 1 and np.abs(images.pixels[1, 0] - full / 2).max() <= 1
    assert images.white == 2**bits - 1
    expected = f"the 16-bit grey images of {images.name} use {bits} bits: {2**bits - 1:,} is taken as white"
    assert said == ([] if bits == 16 else [expected])
    assert opened(tmp_path, channels=1).white == images.white  # from the cache


def test_where_zero_means_white_sixteen_bits_are_inverted_as_eight_are(tmp_path):
    values = np.linspace(0, 65_535, 64).round().astype(np.uint16).reshape(8, 8)
    negative = {262: 0}  # the tag that says it; Pillow writes 8 bits inverted for it, and 16 as they are
    put(tmp_path / "narrow.tif", encoded(Image.fromarray((values // 257).astype(np.uint8)), "TIFF", tiffinfo=negative))
    put(tmp_path / "wide.tif", encoded(Image.fromarray(65_535 - values), "TIFF", tiffinfo=negative))
    narrow, wide = opened(tmp_path, channels=1).pixels[:, 0].astype(int)
    assert np.abs(narrow - values // 257).max() <= 1 and np.abs(wide - narrow).max() <= 1


def test_integers_beyond_sixteen_bits_are_refused_as_floats_are(tmp_path):
    put(tmp_path / "a.tif", encoded(ramp(2**20, np.int32), "TIFF"))
    put(tmp_path / "b.tif", encoded(Image.fromarray(np.full((8, 8), -1, np.int32)), "TIFF"))
    put(tmp_path / "c.tif", encoded(ramp(65_535, np.int32), "TIFF"))
    images = opened(tmp_path, channels=1)
    assert len(images) == 1
    assert {each.reason for each in images.skipped} == {"32-bit pixels outside 0 to 65,535, whose white is not defined"}


def test_the_transparent_value_of_a_sixteen_bit_image_becomes_white(tmp_path):
    values = np.full((8, 8), 20_000, np.uint16)
    values[:4] = 40_000
    put(tmp_path / "a.png", encoded(Image.fromarray(values), transparency=20_000))
    pixels = opened(tmp_path, channels=1).pixels[0, 0]
    assert (pixels[4:] == 255).all() and (pixels[:4] == round(40_000 / 257)).all()


# Formats, and names that say nothing

HEIC = b"\0\0\0\x18ftypheic" + bytes(40)


def as_zip(folder: Path) -> Path:
    target = folder.with_suffix(".zip")
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder).as_posix())
    return target


@pytest.mark.skipif(find_spec("pillow_heif") is not None, reason="here HEIC can be read")
@pytest.mark.parametrize("kind", [lambda folder: folder, as_zip])
def test_formats_that_pillow_lacks_are_counted_with_what_to_do(tmp_path, kind):
    folder = tmp_path / "iphone"
    for number in range(5):
        put(folder / f"IMG_{number}.HEIC", HEIC)
    put(folder / "a.JPG", encoded(noise(), "JPEG"))
    put(folder / "raw.nef", b"II*\0" + bytes(40))
    put(folder / "notes.txt", b"text")
    source = kind(folder)
    said: list[str] = []
    assert len(opened(source, on_message=said.append)) == 1
    assert said[0].startswith("6 of 7 files could not be read") and "pip install 'meme-nas[heif]'" in said[0]
    with pytest.raises(UserError, match="6 of 7 files could not be read, and strict allows none"):
        opened(source, strict=True)
    (folder / "a.JPG").unlink()
    with pytest.raises(UserError, match=r"has no readable image: IMG_0.HEIC is HEIC, which needs the package pillow-heif"):
        opened(kind(folder))


HEADS = {
    "heim": b"\0\0\0\x18ftypheim",
    "cr3": b"\0\0\0\x18ftypcrx ",
    "jxl": b"\xff\x0a",
    "jxl-box": b"\0\0\0\x0cJXL \r\n\x87\n",
    "exr": b"\x76\x2f\x31\x01",
}
FOREIGN = ["a.nrw", "a.3fr", "a.X3F", "a.dcm", "a.jxr", "a.eps", "a.psb", "a.fits"]


@pytest.mark.parametrize("kind", [lambda folder: folder, as_zip])
def test_more_formats_are_counted_by_name_and_by_content(tmp_path, kind):
    folder = tmp_path / "mixed"
    for name in FOREIGN:
        put(folder / name, b"x" * 40)
    for name, head in HEADS.items():
        put(folder / name, head + bytes(60))
    put(folder / "film", b"\0\0\0\x18ftypmp42" + bytes(60))
    put(folder / "notes", b"P1 is what this text begins with")
    for name, options in {"JPEG2000": {"no_jp2": True}, "QOI": {}, "DDS": {}, "PPM": {}, "TIFF": {"big_tiff": True}}.items():
        put(folder / name.lower(), encoded(noise(), name, **options))
    images = opened(kind(folder))
    assert len(images) == 5
    assert sorted(each.name for each in images.skipped) == sorted([*FOREIGN, *HEADS])
    assert all(", which " in each.reason for each in images.skipped)  # what it is, and what to do


def test_a_file_that_asks_for_absurd_memory_is_skipped_and_short_memory_is_told(tmp_path, monkeypatch):
    put(tmp_path / "a.png", noise())
    put(tmp_path / "b.jpg", encoded(noise(), "JPEG"))

    def refuse(image):
        raise MemoryError

    monkeypatch.setattr("PIL.JpegImagePlugin.JpegImageFile.load", refuse)
    images = opened(tmp_path)
    assert dict(images.skipped) == {"b.jpg": "damaged: asks for more memory than its pixels take"} and len(images) == 1
    monkeypatch.setattr("meme.data.decoding._MOST_BYTES_A_PIXEL", 2**55)
    with pytest.raises(UserError, match=r"data: there is not enough memory to decode b\.jpg"):
        opened(tmp_path, fresh=True)


@pytest.mark.parametrize("kind", [lambda folder: folder, as_zip])
def test_files_without_an_extension_are_looked_at(tmp_path, kind):
    folder = tmp_path / "scraped"
    for number, name in enumerate(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"]):
        put(folder / f"image_{number}", encoded(noise(seed=number), name))
    put(folder / "scan.0001", noise())
    put(folder / "README", b"no image")
    put(folder / "photo", HEIC)
    put(folder / "a.cache", noise())  # an extension that says something else
    images = opened(kind(folder))
    assert len(images) == 7 and [each.name for each in images.skipped] == ["photo"]
    if find_spec("pillow_heif") is None:
        assert images.skipped[0].reason.startswith("HEIC, which needs the package pillow-heif")


def test_what_counts_as_an_extension():
    assert has_extension("a.png") and has_extension("a.tar.gz") and has_extension("x.1/a.b2")
    assert not has_extension("a") and not has_extension("x.d/a.001") and not has_extension("a.")


LEFT = ["@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg", "#recycle/a.png", "$RECYCLE.BIN/a.png", "x/@eaDir/b.png", "lost+found/c.png"]
LEFT += ["System Volume Information/a.png", ".thumbnails/a.png", "__MACOSX/a.png", "._a.png", "Thumbs.db", "@Recycle/a.png"]
LEFT += ["@__thumb/s100a.png", "@tmp/a.png", "FOUND.000/a.png", "Recycled/a.png", "~snapshot/a.png", "_gsdata_/a.png"]


@pytest.mark.parametrize("kind", [lambda folder: folder, as_zip])
def test_folders_that_systems_leave_are_passed_over(tmp_path, kind):
    folder = tmp_path / "photos"
    for name in [*LEFT, "a.png", "@anna/mine.png"]:
        put(folder / name, noise())
    assert len(opened(kind(folder), strict=True)) == 2


# Links


def test_links_out_of_the_folder_are_followed_where_that_is_asked_for(tmp_path, capsys):
    store, folder = tmp_path / "store", tmp_path / "subset"
    put(store / "one" / "a.png", noise(seed=1))
    put(store / "two" / "b.png", noise(seed=2))
    put(folder / "c.png", noise(seed=3))
    (folder / "a.png").symlink_to(store / "one" / "a.png")
    (folder / "two").symlink_to(store / "two")
    (store / "two" / "back").symlink_to(folder)
    assert len(opened(folder)) == 1
    said: list[str] = []
    images = opened(folder, follow_links=True, on_message=said.append)
    assert len(images) == 3
    assert said[0] == f"links lead out of subset to {store / 'one'}, {store / 'two'}"
    assert dict(images.skipped) == {"two/back": "a linked folder that was listed before"}
    found = survey(str(folder), follow_links=True)
    assert found.images == 3 and ("links lead to", str(store / "one")) in survey_lines(found)
    larger = replace(found, shorter_side=Spread(32, 32, 32))
    assert all(" --follow-links" in command for command in suggested_commands(larger)) and suggested_commands(larger)
    config = preset("thumbnails-meme").with_(data=str(folder), follow_links=True)
    assert len(open_reference(config)) == 3  # the config remembers it, for workers and for evaluate


# The cache


def test_a_file_replaced_by_one_of_equal_name_size_and_time_is_noticed(tmp_path):
    path = put(tmp_path / "a.bmp", encoded(noise(seed=1), "BMP"))
    os.utime(path, (1_000_000_000, 1_000_000_000))
    before = opened(tmp_path)
    new = put(tmp_path.parent / "new.bmp", encoded(noise(seed=2), "BMP"))
    os.utime(new, (1_000_000_000, 1_000_000_000))
    new.replace(path)
    assert opened(tmp_path).content_id != before.content_id


def test_fresh_reads_again(tmp_path, monkeypatch):
    put(tmp_path / "a.png", noise())
    reads: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), read_bytes(path))[1])
    for options in ({}, {}, {"fresh": True}):
        opened(tmp_path, **options)
    assert len(reads) == 2


# Outputs among the data


def test_what_a_command_leaves_must_not_lie_among_the_images(tmp_path, monkeypatch):
    put(tmp_path / "photos" / "a.png", noise())
    config = preset("thumbnails-meme").with_(data=str(tmp_path / "photos"))
    for place in ("photos", "photos/results/x", "photos/../photos/out"):
        with pytest.raises(UserError, match="out: .* lies inside the data .*; name a folder outside"):
            check_output(config, tmp_path / place)
    for place in ("out", "photos2", "photos/.cache/x", "photos/@eaDir"):
        check_output(config, tmp_path / place)
    with pytest.raises(UserError, match="out: "):
        train_config("thumbnails-meme", data=str(tmp_path / "photos"), out=tmp_path / "photos" / "out", device="cpu")
    monkeypatch.setenv("MEME_CACHE", str(tmp_path / "photos" / "cache"))
    with pytest.raises(UserError, match="MEME_CACHE: "):
        opened(tmp_path / "photos")
    assert sorted(path.name for path in (tmp_path / "photos").iterdir()) == ["a.png"]


def test_a_zip_has_no_inside(tmp_path):
    put(tmp_path / "photos" / "a.png", noise())
    check_outside(as_zip(tmp_path / "photos"), tmp_path / "photos.zip" / "x", "out")


# Too few images, and folders that are no classes


@pytest.mark.parametrize("count, refused", [(1, "fid"), (2, "precision"), (3, "precision"), (4, None)])
def test_metrics_need_images_enough(tmp_path, count, refused):
    for seed in range(count):
        put(tmp_path / f"{seed}.png", noise(seed=seed))
    images = opened(tmp_path)
    space = choose_features("random", images)
    batches = [torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8), dtype=np.uint8))]
    if refused:
        with pytest.raises(UserError, match=rf"data: {refused} needs at least \d images, and {images.name} has {count}"):
            measure(batches, images, space, ("fid", "precision"))
    else:
        assert np.isfinite(measure(batches, images, space, ("fid", "precision"))["fid"].value)


def labelled(labels: np.ndarray, pixels: np.ndarray) -> Images:
    classes = tuple(str(number) for number in range(labels.max() + 1))
    return Images("some", pixels, labels, classes, f"{hash(pixels.tobytes()) & 0xFFFFFFFF:016x}", ())


def brightness(levels: np.ndarray) -> np.ndarray:
    """Grey images of these means, with some noise."""
    spread = np.random.default_rng(0).integers(-20, 21, (len(levels), 1, 8, 8))
    return (levels[:, None, None, None] + spread).clip(0, 255).astype(np.uint8)


SHARDS = np.arange(90) // 30
KINDS = {
    "classes that can be seen": (np.arange(90) % 3, brightness(40 + 80 * (np.arange(90) % 3)), "classifier"),
    "folders by number": (SHARDS, brightness(np.random.default_rng(1).integers(40, 200, 90)), "random"),
    "an image a class": (np.arange(12), brightness(20 * np.arange(12)), "random"),
    "forty to one": (np.arange(41) // 40, brightness(100 + 0 * np.arange(41)), "random"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_that_learned_nothing_is_not_taken(kind, monkeypatch):
    monkeypatch.setattr(classifier, "MIN_STEPS", 60)
    labels, pixels, expected = KINDS[kind]
    images, said = labelled(labels.astype(np.int64), pixels), []
    space = choose_features("auto", images, on_message=said.append)
    assert space.kind == expected
    assert any("no better than guessing the classes" in line for line in said) == (expected == "random")
    assert choose_features("auto", images).feature_id == space.feature_id  # from the cache too


# Brackets, tildes and names that are not UTF-8


@pytest.mark.parametrize("name", ["a[/b].jpg", "[red]x[/red]", "[link=x]", "a[bold", ":smile:"])
def test_square_brackets_are_no_markup(name, capsys):
    remarks.print(f"1 of 2 files: {name}")
    assert capsys.readouterr().out == f"1 of 2 files: {name}\n"


def test_commands_that_are_printed_are_quoted(tmp_path):
    folder = tmp_path / "my [best] photos; rm"
    put(folder / "a.png", noise(32, 32))
    commands = [text for label, text in survey_lines(survey(str(folder))) if label == "start with"]
    assert commands and all(str(folder) in shlex.split(command) for command in commands)


def test_a_printed_command_is_what_a_shell_takes():
    words = ["python", "a b", "it's \n [x]", os.fsdecode(b"caf\xe9 'x' \\")]
    command = shell_command(words)
    assert command.isprintable() and command.isascii()
    echoed = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, check=True).stdout
    assert [os.fsdecode(word) for word in echoed.split(b"\0")[:-1]] == words


def test_a_tilde_is_the_home_folder_wherever_it_stands(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--study=~/x", "--data", "~/photos", "--seed", "3", "--out=a~b"]
    assert with_homes(words) == [f"--study={tmp_path}/x", "--data", f"{tmp_path}/photos", "--seed", "3", "--out=a~b"]
    put(tmp_path / "photos" / "a.png", noise())
    monkeypatch.setenv("MEME_CACHE", "~/cache")
    assert len(opened(Path("~/photos"))) == 1 and (tmp_path / "cache" / "data").is_dir()


def test_a_tilde_with_a_name_is_that_users_home_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert with_homes(["--study=~root/x"]) == [f"--study={os.path.expanduser('~root')}/x"]
    for wrong in ("--study=~nobody-here/x", "~nobody-here/x"):
        with pytest.raises(UserError, match=r"~nobody-here/x: there is no user nobody-here here; .* write \./~nobody-here/x"):
            with_homes([wrong])
    (tmp_path / "~nobody-here").mkdir()
    (tmp_path / "~nobody-here" / "x").touch()
    assert with_homes(["~nobody-here/x", "./~other/x"]) == ["~nobody-here/x", "./~other/x"]


def test_a_config_of_a_path_that_is_not_utf8_is_written_and_read(tmp_path):
    source = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9")
    for seed in range(2):
        put(Path(source) / f"{seed}.png", noise(seed=seed))
    config = preset("thumbnails-meme").with_(data=source)
    config.save(tmp_path / "config.yaml")
    assert Config.load(tmp_path / "config.yaml").data == source
    assert len(open_reference(Config.load(tmp_path / "config.yaml"))) == 2
    json.dumps(config.model_dump(mode="json"))


@settings(max_examples=30)
@given(st.lists(st.sampled_from(["a", "[", "]", "/", ":", "\\", "b"]), max_size=12).map("".join))
def test_any_text_is_printed_as_it_is(text):
    with remarks.capture() as captured:
        remarks.print(text)
    assert captured.get() == f"{text}\n"


# Files of others


def test_only_our_own_half_written_files_are_removed(tmp_path):
    kept = [
        ".movie.mkv.part",
        ".movie.download.part",
        ".notes.yaml.abcd1234.part",
        ".winner.yaml.part",
        "winner.yaml.abcd1234.part",
    ]
    for name in [*kept, ".winner.yaml.abcd1234.part"]:
        (tmp_path / name).write_bytes(b"half")
    remove_partials(tmp_path, r"winner\.yaml")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_what_is_being_written_is_not_removed(tmp_path):
    with written_whole(tmp_path / "winner.yaml") as partial:
        partial.write_text("all of it")
        remove_partials(tmp_path, r"winner\.yaml")
        assert partial.exists()
    assert (tmp_path / "winner.yaml").read_text() == "all of it"
