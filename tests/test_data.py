"""Images from folders, zips and CIFAR-10's batches; their cache; and batches as functions of (seed, step)."""

import io
import os
import shutil
import struct
import time
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import meme.data.decoding
import meme.data.sources
from meme.data.images import Images, Skipped, batch_indices, open_images
from meme.errors import UserError

CIFAR_ZIP = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10-train.zip"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEME_CACHE", str(folder))
    return folder / "data"


@pytest.fixture
def no_decoding(monkeypatch):
    """Call to make every later decoding an error that is no UserError."""

    def forbid():
        monkeypatch.setattr(meme.data.sources, "_decode", None)
        monkeypatch.setattr(meme.data.sources, "_decode_or_skip", None)

    return forbid


def noise(height: int, width: int, seed: int = 0, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def classes_folder(root: Path) -> Path:
    """Two classes of two and three 8x8 images."""
    for seed, name in enumerate(["dog/b.png", "dog/a.png", "cat/x.png", "cat/deep/y.png", "cat/z.png"]):
        save(root / name, noise(8, 8, seed))
    return root


def zip_of(folder: Path, target: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):  # an order other than the sorted one
            archive.write(path, prefix + path.relative_to(folder).as_posix())
    return target


def single(folder: Path, image: Image.Image | np.ndarray, size: int, channels: int, **options) -> np.ndarray:
    """The one image of a folder as read back: (C, size, size)."""
    save(folder / "a.png", image, **options)
    return open_images(folder, size=size, channels=channels).pixels[0]


def refused(source, *parts: str, **options) -> None:
    with pytest.raises(UserError) as caught:
        open_images(source, **{"size": 8, "channels": 3, **options})
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


# Digits


@pytest.mark.parametrize(("size", "channels"), [(8, 1), (8, 3), (16, 1)])
def test_digits_come_in_any_size_and_colour(size, channels):
    digits = open_images("digits", size=size, channels=channels)
    assert digits.pixels.shape == (1797, channels, size, size) and digits.pixels.dtype == np.uint8
    assert digits.labels.dtype == np.int64 and digits.classes == tuple("0123456789")
    assert len(digits) == 1797 and digits.name == "digits" and digits.skipped == ()


def test_digits_keep_their_values_and_spread_them_over_the_bytes():
    from sklearn.datasets import load_digits

    pixels = open_images("digits", size=8, channels=1).pixels[:, 0]
    assert pixels.min() == 0 and pixels.max() == 255
    assert np.array_equal(np.round(pixels / 255 * 16), load_digits().images)


def test_digits_as_colour_repeat_the_grey_and_differ_in_id():
    grey, colour = (open_images("digits", size=8, channels=channels) for channels in (1, 3))
    assert np.array_equal(colour.pixels, grey.pixels.repeat(3, axis=1))
    assert colour.content_id != grey.content_id
    assert grey.content_id == open_images("digits", size=8, channels=1).content_id


def test_the_path_digits_is_a_folder_not_the_embedded_set(tmp_path, monkeypatch):
    save(tmp_path / "digits" / "a.png", noise(8, 8))
    monkeypatch.chdir(tmp_path)
    assert len(open_images(Path("digits"), size=8, channels=3)) == 1
    assert len(open_images("./digits", size=8, channels=3)) == 1


def test_tensor_maps_bytes_to_minus_one_to_one():
    pixels = np.arange(256, dtype=np.uint8).reshape(4, 1, 8, 8)
    images = Images("x", pixels, None, (), "id", ())
    tensor = images.tensor([3, 0, 0])
    assert tensor.shape == (3, 1, 8, 8) and tensor.dtype == torch.float32
    assert tensor[1].flatten()[0] == -1 and tensor[0].flatten()[-1] == 1
    assert torch.equal(tensor[1], tensor[2])
    assert np.array_equal(np.round((tensor.numpy() + 1) * 127.5), pixels[[3, 0, 0]])
    assert torch.equal(images.tensor(torch.tensor([3, 0, 0])), tensor)


# Folders, zips and classes


def test_a_folder_of_folders_is_labelled_and_sorted(tmp_path):
    images = open_images(classes_folder(tmp_path / "pets"), size=8, channels=3)
    assert images.name == "pets" and images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 1, 1]
    expected = [noise(8, 8, seed).transpose(2, 0, 1) for seed in (3, 2, 4, 1, 0)]  # deep/y, x, z; a, b
    assert np.array_equal(images.pixels, expected)


def test_one_image_beside_the_folders_makes_it_unlabelled(tmp_path):
    save(classes_folder(tmp_path) / "stray.png", noise(8, 8, 9))
    images = open_images(tmp_path, size=8, channels=3)
    assert images.labels is None and images.classes == () and len(images) == 6


def test_a_zip_and_a_folder_of_the_same_images_have_the_same_id(tmp_path):
    folder = classes_folder(tmp_path / "here" / "pets")
    sources = [
        folder,
        folder.parent,  # everything lies under one common folder, which is stripped
        shutil.copytree(folder, tmp_path / "elsewhere"),
        zip_of(folder, tmp_path / "flat.zip"),
        zip_of(folder, tmp_path / "top.zip", prefix="top/train/"),
        zip_of(folder, tmp_path / "windows.zip", prefix="top\\"),
    ]
    opened = [open_images(source, size=8, channels=3) for source in sources]
    assert {images.content_id for images in opened} == {opened[0].content_id}
    assert all(images.classes == ("cat", "dog") for images in opened)
    assert len(opened[0].content_id) == 16 and int(opened[0].content_id, 16) >= 0


def test_the_id_changes_with_a_pixel_a_label_or_a_class_name(tmp_path):
    original = classes_folder(tmp_path / "original")
    pixel = shutil.copytree(original, tmp_path / "pixel")
    save(pixel / "dog/a.png", noise(8, 8, 77))
    label = shutil.copytree(original, tmp_path / "label")
    (label / "cat/z.png").rename(label / "dog/0.png")  # still third of five, now a dog
    name = shutil.copytree(original, tmp_path / "name")
    (name / "dog").rename(name / "wolf")
    assert len({open_images(each, size=8, channels=3).content_id for each in (original, pixel, label, name)}) == 4


def test_hidden_files_and_other_kinds_are_passed_over(tmp_path):
    save(tmp_path / "a.PNG", noise(8, 8), format="PNG")
    for name in ("notes.txt", "._a.png", ".git/b.png", "__MACOSX/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    for source in (tmp_path, zip_of(tmp_path, tmp_path.parent / "hidden.zip")):
        images = open_images(source, size=8, channels=3, strict=True)
        assert len(images) == 1 and images.skipped == ()


@pytest.mark.parametrize("wrapped", [False, True])
def test_cifar_binary_batches(tmp_path, wrapped):
    folder = tmp_path / "cifar-10-batches-bin" if wrapped else tmp_path
    folder.mkdir(exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    labels = [3, 9, 0, 1, 1, 7]
    records = [bytes([label]) + image.tobytes() for label, image in zip(labels, pixels, strict=True)]
    (folder / "data_batch_1.bin").write_bytes(b"".join(records[:4]))
    (folder / "data_batch_2.bin").write_bytes(b"".join(records[4:]))
    (folder / "test_batch.bin").write_bytes(records[0])
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    (folder / "batches.meta.txt").write_text("\n".join(names.split()) + "\n\n")
    images = open_images(tmp_path, size=32, channels=3)
    assert np.array_equal(images.pixels, pixels) and images.labels.tolist() == labels
    assert images.classes == tuple(names.split())
    small = open_images(tmp_path, size=16, channels=1)
    assert small.pixels.shape == (6, 1, 16, 16) and small.labels.tolist() == labels
    grey_mean = pixels.transpose(0, 2, 3, 1) @ [0.299, 0.587, 0.114]
    assert np.allclose(small.pixels.mean((1, 2, 3)), grey_mean.mean((1, 2)), atol=3)


def test_cifar_batches_that_are_wrong(tmp_path):
    batch = tmp_path / "data_batch_1.bin"
    batch.write_bytes(bytes(3073) + b"x")
    refused(tmp_path, "data:", "data_batch_1.bin", "3073-byte records")
    batch.write_bytes(bytes([10]) + bytes(3072))
    refused(tmp_path, "data:", "labels beyond 9")
    batch.write_bytes(bytes(3073))
    assert open_images(tmp_path, size=32, channels=3).classes == tuple("0123456789")
    (tmp_path / "batches.meta.txt").write_text("cat\ndog\n")
    refused(tmp_path, "data:", "2 classes", "10")


def test_cifar_pickles_are_named_and_never_opened(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"\x80\x04N.")
    refused(tmp_path, "data:", "never unpickled", "binary version")


# One image


def test_shorter_side_resized_and_centre_cropped_like_torch(tmp_path):
    pixels = noise(64, 96)
    resized = torch.nn.functional.interpolate(
        torch.from_numpy(pixels).permute(2, 0, 1)[None], size=(32, 48), mode="bicubic", antialias=True
    )
    result = single(tmp_path, pixels, size=32, channels=3)
    assert np.abs(result.astype(int) - resized[0, :, :, 8:40].numpy().astype(int)).max() <= 2


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(8, 13, (0, 8), (2, 10)), (12, 8, (2, 10), (0, 8))])
def test_an_image_of_the_right_height_or_width_is_cut_but_not_resampled(tmp_path, height, width, rows, columns):
    pixels = noise(height, width)
    assert np.array_equal(single(tmp_path, pixels, size=8, channels=3), pixels[slice(*rows), slice(*columns)].transpose(2, 0, 1))


def test_a_strip_as_long_as_a_street_needs_no_memory(tmp_path):
    assert single(tmp_path, noise(1, 60_000), size=64, channels=3).shape == (3, 64, 64)


def test_downscaling_is_antialiased(tmp_path):
    checks = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    assert np.abs(single(tmp_path, checks.astype(np.uint8), size=8, channels=1).astype(int) - 128).max() <= 6


def grey(value: int, mode: str = "L") -> Image.Image:
    return Image.new("L", (8, 8), value).convert(mode)


def palette_with_transparency() -> Image.Image:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.info["transparency"] = b"\xff\x80"  # colour 1 is half transparent
    return image


MODES = {  # a plain image in each mode, and the colour that it must have
    "1": (Image.new("1", (8, 8), 1), (255, 255, 255)),
    "L": (grey(90), (90, 90, 90)),
    "LA": (Image.new("LA", (8, 8), (100, 0)), (255, 255, 255)),
    "P": (Image.new("RGB", (8, 8), (200, 100, 50)).convert("P", palette=Image.Palette.ADAPTIVE), (200, 100, 50)),
    "P with alpha": (palette_with_transparency(), (227, 177, 152)),
    "RGBA": (Image.new("RGBA", (8, 8), (255, 0, 0, 51)), (255, 204, 204)),
    "CMYK": (Image.new("CMYK", (8, 8), (0, 255, 255, 0)), (255, 0, 0)),
    "I;16": (Image.fromarray(np.full((8, 8), 0x8080, np.uint16)), (128, 128, 128)),
    "I": (Image.fromarray(np.full((8, 8), 65535, np.int32)), (255, 255, 255)),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb_or_grey(tmp_path, mode):
    image, colour = MODES[mode]
    ending = "tif" if mode in ("CMYK", "I") else "png"
    save(tmp_path / f"a.{ending}", image)
    rgb = open_images(tmp_path, size=8, channels=3).pixels[0]
    assert np.abs(rgb.astype(int) - np.array(colour)[:, None, None]).max() <= 1
    luma = open_images(tmp_path, size=8, channels=1).pixels[0]
    assert luma.shape == (1, 8, 8)
    assert np.abs(luma.astype(int) - np.dot(colour, [0.299, 0.587, 0.114])).max() <= 2


def test_floating_point_images_are_skipped_with_the_reason(tmp_path):
    save(tmp_path / "a.tif", Image.fromarray(np.zeros((8, 8), np.float32)))
    refused(tmp_path, "a.tif", "floating-point")


def test_exif_orientation_is_applied(tmp_path):
    pixels = noise(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    result = single(tmp_path, pixels, size=8, channels=3, exif=exif)
    assert np.array_equal(result, np.rot90(pixels, k=-1).transpose(2, 0, 1))


# The cache


def test_a_second_open_decodes_nothing_and_gives_the_same(tmp_path, no_decoding):
    folder = classes_folder(tmp_path)
    (folder / "cat" / "bad.png").write_bytes(b"bad")
    first = open_images(folder, size=8, channels=3)
    no_decoding()
    messages = []
    second = open_images(folder, size=8, channels=3, on_message=messages.append)
    assert isinstance(second.pixels, np.memmap) and not second.pixels.flags.writeable
    assert np.array_equal(first.pixels, second.pixels) and np.array_equal(first.labels, second.labels)
    assert (first.content_id, first.classes, first.skipped) == (second.content_id, second.classes, second.skipped)
    assert second.skipped == (Skipped("cat/bad.png", "not an image"),) and len(messages) == 1
    with pytest.raises(TypeError):  # the guard itself works: another size must be decoded
        open_images(folder, size=4, channels=3)


def test_sizes_and_colours_are_cached_beside_each_other(tmp_path, no_decoding):
    classes_folder(tmp_path)
    shapes = [(8, 3), (4, 3), (8, 1)]
    for size, channels in shapes:
        open_images(tmp_path, size=size, channels=channels)
    no_decoding()
    for size, channels in shapes:
        assert open_images(tmp_path, size=size, channels=channels).pixels.shape == (5, channels, size, size)


def test_a_changed_added_or_removed_file_is_noticed(tmp_path):
    folder = classes_folder(tmp_path)
    before = open_images(folder, size=8, channels=3)
    changed = folder / "dog" / "a.png"
    save(changed, 255 - noise(8, 8, 1))
    os.utime(changed, ns=(0, 123_456_789))
    after = open_images(folder, size=8, channels=3)
    assert np.array_equal(after.pixels[3], (255 - noise(8, 8, 1)).transpose(2, 0, 1))
    assert after.content_id != before.content_id
    save(folder / "dog" / "c.png", noise(8, 8, 6))
    assert len(open_images(folder, size=8, channels=3)) == 6
    (folder / "cat" / "x.png").unlink()
    assert len(open_images(folder, size=8, channels=3)) == 5


def test_a_zip_changed_within_its_date_is_noticed(tmp_path):
    first, second = (tmp_path / name for name in ("first", "second"))
    for seed, folder in enumerate((first, second)):
        path = save(folder / "a.bmp", noise(8, 8, seed))  # of equal length
        os.utime(path, (10**9, 10**9))
    source = zip_of(first, tmp_path / "a.zip")
    before = open_images(source, size=8, channels=3)
    zip_of(second, source)
    os.utime(source, (10**9, 10**9))
    assert open_images(source, size=8, channels=3).content_id != before.content_id


def entry_of(cache: Path) -> Path:
    (entry,) = cache.iterdir()  # also: nothing temporary is left behind
    return entry


@pytest.mark.parametrize("damage", ["pixels.npy", "labels.npy", "entry.json", "half", "pickle", "facts", "empty"])
def test_a_broken_entry_is_rebuilt(tmp_path, cache, damage):
    folder = classes_folder(tmp_path)
    before = open_images(folder, size=8, channels=3)
    expected = np.array(before.pixels)
    entry = entry_of(cache)
    if damage == "half":
        (entry / "pixels.npy").write_bytes((entry / "pixels.npy").read_bytes()[:-1])
    elif damage == "pickle":
        np.save(entry / "labels.npy", np.array([print] * 5, dtype=object), allow_pickle=True)
    elif damage == "facts":
        (entry / "entry.json").write_text('{"count": 4, "content_id": "x", "classes": [], "skipped": []}')
    elif damage == "empty":
        (entry / "pixels.npy").write_bytes(b"")
    else:
        (entry / damage).unlink()
    after = open_images(folder, size=8, channels=3)
    assert np.array_equal(after.pixels, expected) and after.content_id == before.content_id
    assert after.labels.tolist() == [0, 0, 0, 1, 1]
    assert entry_of(cache) == entry


def test_another_process_may_win_the_race(tmp_path, cache, monkeypatch):
    folder = classes_folder(tmp_path)
    build = meme.data.images._build

    def overtaken(building, *rest):
        build(building, *rest)
        shutil.copytree(building, cache / building.name.split(".")[1])
        (cache / building.name.split(".")[1] / "of the rival").touch()

    monkeypatch.setattr(meme.data.images, "_build", overtaken)
    assert len(open_images(folder, size=8, channels=3)) == 5
    assert (entry_of(cache) / "of the rival").exists()


def test_a_failure_leaves_no_half_entry(tmp_path, cache, monkeypatch):
    def fails(*_):
        raise MemoryError

    monkeypatch.setattr(meme.data.sources, "_decode", fails)
    with pytest.raises(UserError, match="not enough memory to decode"):
        open_images(classes_folder(tmp_path), size=8, channels=3)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MEME_CACHE", str(tmp_path / "file"))
    refused(classes_folder(tmp_path / "images"), "data:", "MEME_CACHE")


# Bad input


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be this large in 60 bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def damaged_folder(root: Path) -> Path:
    """Two good images and five bad ones."""
    buffer = io.BytesIO()
    Image.fromarray(noise(64, 64)).save(buffer, "PNG")
    root.mkdir(parents=True, exist_ok=True)
    (root / "cut.png").write_bytes(buffer.getvalue()[:3000])
    (root / "text.jpg").write_text("hello")
    (root / "none.gif").write_bytes(b"")
    (root / "bomb.png").write_bytes(png_header(10_001, 10_000))
    (root / "vast.png").write_bytes(png_header(60_000, 60_000))
    save(root / "good.png", noise(8, 8))
    save(root / "good.webp", noise(8, 8, 1))
    return root


def test_unreadable_files_are_named_counted_and_skipped_in_one_line(tmp_path):
    folder = damaged_folder(tmp_path / "images")
    for source in (folder, zip_of(folder, tmp_path / "images.zip")):
        messages = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # none of Pillow's warnings may reach the user
            images = open_images(source, size=8, channels=3, on_message=messages.append)
        assert len(images) == 2
        assert dict(images.skipped) == {
            "bomb.png": "more than 100 megapixels",
            "cut.png": "truncated",
            "none.gif": "empty",
            "text.jpg": "not an image",
            "vast.png": "more than 100 megapixels",
        }
        (message,) = messages
        assert message.startswith("5 of 7 files could not be read and were skipped: ") and "cut.png (truncated)" in message


def test_at_most_five_skipped_files_are_named(tmp_path):
    save(tmp_path / "good.png", noise(8, 8))
    for number in range(8):
        (tmp_path / f"bad{number}.png").write_text("bad")
    messages = []
    open_images(tmp_path, size=8, channels=3, on_message=messages.append)
    assert messages[0].count("bad") == 5 and messages[0].endswith(", and 3 more")


def test_strict_refuses_what_would_be_skipped_even_from_the_cache(tmp_path):
    folder = damaged_folder(tmp_path)
    for _ in range(2):
        refused(folder, "data:", "5 of 7", "cut.png (truncated)", strict=True)
        open_images(folder, size=8, channels=3)


def test_nothing_readable_at_all(tmp_path, cache):
    (tmp_path / "a.png").write_text("bad")
    refused(tmp_path, "data:", "none of 1 files", "a.png (not an image)")
    assert list(cache.iterdir()) == []


def test_paths_that_are_no_source(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "broken.zip").write_bytes(b"PK\x03\x04 and then nothing")
    with zipfile.ZipFile(tmp_path / "without.zip", "w") as archive:
        archive.writestr("notes.txt", "notes")
    whole = zip_of(classes_folder(tmp_path / "pets"), tmp_path / "cut.zip")
    whole.write_bytes(whole.read_bytes()[:-200])
    refused(tmp_path / "missing", "data:", "does not exist", "digits")
    refused(tmp_path / "empty", "data:", "no image in it", "a folder of images")
    refused(tmp_path / "without.zip", "data:", "no image in it")
    refused(tmp_path / "notes.txt", "data:", "neither a folder nor a zip")
    refused(tmp_path / "broken.zip", "data:", "not a whole zip file")
    refused(whole, "data:", "not a whole zip file")
    refused("", "data:", "empty")
    refused("a\0b", "data:", "a\\x00b", "cannot be opened")
    refused("x" * 5000, "data:", "cannot be opened")


@pytest.mark.parametrize(("field", "value"), [("size", 0), ("size", -8), ("channels", 2), ("channels", 4)])
def test_impossible_shapes_name_their_field(field, value):
    refused("digits", f"{field}: {value}", "must be", **{field: value})


def test_a_zip_with_members_not_to_be_trusted(tmp_path):
    good = save(tmp_path / "good.png", noise(8, 8)).read_bytes()
    link = zipfile.ZipInfo("link.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("good.png", "../up.png", "in/../../up.png", "..\\up2.png", "/root.png", "C:\\disk.png"):
            archive.writestr(name, good)
        archive.writestr(link, "/etc/passwd")
    images = open_images(tmp_path / "a.zip", size=8, channels=3)
    assert len(images) == 1
    assert dict(images.skipped) == {
        "../up.png": "a path out of the zip",
        "in/../../up.png": "a path out of the zip",
        "../up2.png": "a path out of the zip",
        "/root.png": "an absolute path",
        "C:/disk.png": "an absolute path",
        "link.png": "a link",
    }


def test_a_zip_that_unpacks_to_a_thousand_times_its_size_is_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("white.bmp", save(tmp_path / "white.bmp", np.full((900, 900, 3), 255, np.uint8)).read_bytes())
        archive.writestr("bomb.png", b"\0" * (20 * 2**20))
        archive.writestr("other.png", b"\0" * 1000, compress_type=zipfile.ZIP_BZIP2)
    images = open_images(tmp_path / "a.zip", size=8, channels=3)
    assert len(images) == 1
    assert [each.name for each in images.skipped] == ["bomb.png", "other.png"]
    assert "a zip bomb: 20971520 bytes" in images.skipped[0].reason
    assert images.skipped[1].reason == "compressed in another way than deflate"


def test_a_zip_that_says_less_than_it_unpacks_to_takes_no_memory(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("good.png", save(tmp_path / "good.png", noise(8, 8)).read_bytes())
        archive.writestr("liar.png", b"\0" * (64 * 2**20))
        info = archive.getinfo("liar.png")
    claimed = struct.pack("<I", 1000)
    content = path.read_bytes().replace(struct.pack("<I", info.file_size), claimed)
    assert content.count(claimed) == 2  # beside the member, and in the directory
    path.write_bytes(content)
    tracemalloc.start()
    images = open_images(path, size=8, channels=3)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [each.name for each in images.skipped] == ["liar.png"] and "CRC" in images.skipped[0].reason
    assert peak < 8 * 2**20


def test_large_images_are_not_decoded_side_by_side(tmp_path, monkeypatch):
    inside, most = [0], [0]
    square = meme.data.decoding._cropped

    def watched(*arguments):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.02)
        inside[0] -= 1
        return square(*arguments)

    monkeypatch.setattr(meme.data.decoding, "_cropped", watched)
    monkeypatch.setattr(meme.data.sources.os, "cpu_count", lambda: 4)
    for number in range(8):
        save(tmp_path / f"{number}.bmp", noise(60, 60, number))  # large enough for threads
    open_images(tmp_path, size=8, channels=3)
    assert most[0] > 1
    most[0] = 0
    monkeypatch.setattr(meme.data.decoding, "LARGE_PIXELS", 1000)
    open_images(tmp_path, size=8, channels=1)
    assert most[0] == 1


@pytest.mark.parametrize("names", [b"x" * 20_000, b"one two"], ids=["too long", "too few"])
def test_the_class_names_of_cifar_may_be_broken_too(tmp_path, names):
    folder = tmp_path / "cifar"
    folder.mkdir()
    (folder / "data_batch_1.bin").write_bytes(bytes(3073))
    (folder / "batches.meta.txt").write_bytes(names)
    refused(folder, "data:", "classes in batches.meta.txt")
    archive = zip_of(folder, tmp_path / "a.zip")
    archive.write_bytes(archive.read_bytes().replace(names, names[:-1] + b"!", 1))
    refused(archive, "data:", "batches.meta.txt")


def test_a_zip_member_with_a_flipped_byte_is_skipped(tmp_path):
    source = zip_of(classes_folder(tmp_path / "pets"), tmp_path / "a.zip")
    with zipfile.ZipFile(source) as archive:
        info = archive.getinfo("dog/a.png")
    contents = bytearray(source.read_bytes())
    contents[info.header_offset + 30 + len(info.filename) + 60] ^= 1
    source.write_bytes(contents)
    images = open_images(source, size=8, channels=3)
    assert [each.name for each in images.skipped] == ["dog/a.png"] and "CRC" in images.skipped[0].reason
    assert len(images) == 4


def test_links_are_followed_inside_the_folder_only(tmp_path):
    outside = save(tmp_path / "outside" / "secret.png", noise(8, 8, 5))
    folder = tmp_path / "images"
    save(folder / "a.png", noise(8, 8))
    (folder / "inside.png").symlink_to(folder / "a.png")
    (folder / "out.png").symlink_to(outside)
    (folder / "relative.png").symlink_to("../outside/secret.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "more").symlink_to(outside.parent)
    images = open_images(folder, size=8, channels=3)
    assert len(images) == 2 and np.array_equal(images.pixels[0], images.pixels[1])
    assert dict(images.skipped) == {
        "loop.png": "a broken link",
        "more": "a linked folder, which only --follow-links enters",
        "out.png": "a link out of the folder, which only --follow-links follows",
        "relative.png": "a link out of the folder, which only --follow-links follows",
    }


def test_a_pipe_called_png_does_not_hang(tmp_path):
    save(tmp_path / "a.png", noise(8, 8))
    os.mkfifo(tmp_path / "pipe.png")
    assert open_images(tmp_path, size=8, channels=3).skipped == (Skipped("pipe.png", "not a regular file"),)


def test_names_cannot_forge_a_line_of_output(tmp_path):
    save(tmp_path / "a.png", noise(8, 8))
    (tmp_path / "x\nerror: \x1b[31mforged.png").write_text("bad")
    (tmp_path / os.fsdecode(b"\xff.png")).write_text("bad")
    messages = []
    open_images(tmp_path, size=8, channels=3, on_message=messages.append)
    assert messages[0].isprintable() and "x\\nerror: \\x1b[31mforged.png (not an image)" in messages[0]
    refused(tmp_path / "no\nsuch", "no\\nsuch")


def test_postscript_in_disguise_is_never_run(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    refused(tmp_path, "a.png (not an image)")


def test_a_file_without_permission_stops_and_is_not_remembered_as_bad(tmp_path, cache, monkeypatch):
    save(tmp_path / "a.png", noise(8, 8))
    locked = save(tmp_path / "b.png", noise(8, 8, 1))
    read_bytes = Path.read_bytes

    def deny(path):
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", deny)
        refused(tmp_path, "data:", "b.png", "Permission denied")
    assert len(open_images(tmp_path, size=8, channels=3, strict=True)) == 2


def test_large_files_are_decoded_by_threads_in_the_same_order(tmp_path):
    means = list(range(0, 200, 5))
    for number, mean in enumerate(means):
        save(tmp_path / f"{number:02}.bmp", np.full((60, 60, 3), mean, np.uint8))  # 10.8 kB each
    images = open_images(tmp_path, size=8, channels=1)
    assert images.pixels.mean((1, 2, 3)).tolist() == means


# Batches


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), batch=st.integers(1, 100), seed=st.integers(0, 2**32), first=st.integers(0, 10**6))
def test_every_epoch_holds_every_image_once(count, batch, seed, first):
    epoch = first * batch // count + 1  # the first to begin after the batch does
    steps = range(first, (epoch + 2) * count // batch + 1)
    row = np.concatenate([batch_indices(count, batch, seed, step) for step in steps])
    start = epoch * count - first * batch
    for begin in (start, start + count):
        assert sorted(row[begin : begin + count]) == list(range(count))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 40), seed=st.integers(0, 2**32), step=st.integers(0, 10**6), batch=st.integers(1, 100))
def test_a_batch_is_a_function_of_its_arguments(count, seed, step, batch):
    indices = batch_indices(count, batch, seed, step)
    assert indices.shape == (batch,) and indices.dtype == np.int64
    batch_indices(count, batch, seed, step + 1000)  # whatever is asked in between
    meme.data.images._epoch_order.cache_clear()
    assert np.array_equal(batch_indices(count, batch, seed, step), indices)
    halves = [batch_indices(count, 1, seed, position) for position in (step * batch, (step + 1) * batch - 1)]
    assert [indices[0], indices[-1]] == [half[0] for half in halves]  # the row does not depend on how it is cut


def test_seeds_and_epochs_give_different_orders():
    orders = [batch_indices(100, 100, seed, step) for seed in (0, 1) for step in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(100)) for order in orders)


def test_a_callers_changes_do_not_reach_the_next_call():
    first = batch_indices(10, 10, 0, 0)
    expected = first.copy()
    first[:] = 0
    assert np.array_equal(batch_indices(10, 10, 0, 0), expected)


# The real thing: 50,000 JPEGs, 10 to 20 s


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    if not CIFAR_ZIP.is_file():
        pytest.skip(f"{CIFAR_ZIP} is not here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEME_CACHE", str(tmp_path_factory.mktemp("cifar")))
        yield open_images(CIFAR_ZIP, size=32, channels=3, strict=True)


def test_cifar_zip_has_all_images_and_classes(cifar):
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert cifar.pixels.shape == (50_000, 3, 32, 32) and cifar.classes == tuple(names.split())
    assert np.bincount(cifar.labels).tolist() == [5000] * 10


def test_cifar_zip_has_the_pixels_of_its_jpegs(cifar):
    with zipfile.ZipFile(CIFAR_ZIP) as archive:
        for index in (0, 4_999, 5_000, 49_999):
            name = f"{cifar.classes[cifar.labels[index]]}/{index % 5000:04}.jpg"
            with Image.open(io.BytesIO(archive.read(name))) as image:
                assert np.array_equal(cifar.pixels[index], np.asarray(image).transpose(2, 0, 1))


def test_cifar_zip_has_the_known_channel_means(cifar):
    assert np.allclose(cifar.pixels[::7].mean((0, 2, 3)) / 255, [0.4914, 0.4822, 0.4465], atol=0.01)
