"""``python -m meme data``: what it finds in folders, zips, datasets and torchvision's layouts, and what it suggests."""

import builtins
import json
import shlex
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import run_search
from meme.cli.commands import describe_data
from meme.cli.parsing import check_flags, read_settings
from meme.cli.verbs import VERBS, main
from meme.config.presets import preset
from meme.config.schema import Config
from meme.data.images import open_images
from meme.data.survey import Spread, Survey, suggested_commands, suggested_preset, survey
from meme.errors import UserError
from meme.pipeline import LARGEST_ENLARGEMENT
from meme_nas.settings import SearchSettings


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("MEME_CACHE", str(folder))
    return folder


def save(path, width, height, mode="RGB", seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (height, width, channels) if channels > 1 else (height, width)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode).save(path)
    return path


@pytest.fixture
def mixed(tmp_path):
    folder = tmp_path / "mixed"
    save(folder / "cats" / "a.png", 40, 30)
    save(folder / "cats" / "b.png", 100, 80, "RGBA")
    save(folder / "dogs" / "deep" / "c.png", 64, 64, "L")
    (folder / "dogs" / "broken.png").write_bytes(b"not an image")
    whole = save(folder / "dogs" / "half.png", 50, 50).read_bytes()
    (folder / "dogs" / "half.png").write_bytes(whole[:200])
    return folder


def test_a_mixed_folder(mixed):
    found = survey(str(mixed))
    assert found.images == 3
    assert found.shorter_side == Spread(30, 64, 80)
    assert found.longer_side == Spread(40, 64, 100)
    assert found.modes == {"RGB": 1, "RGBA": 1, "L": 1}
    assert found.classes == {"cats": 2, "dogs": 1}
    assert [(each.name, each.reason) for each in found.unreadable] == [
        ("dogs/broken.png", "not an image"),
        ("dogs/half.png", "truncated"),
    ]
    assert found.colour_share == pytest.approx(2 / 3)


def test_what_a_person_and_a_program_are_told(mixed, capsys):
    main(["data", str(mixed)])
    said = capsys.readouterr().out
    for line in (
        f"images         3 in {mixed}",
        "shorter side   30 / 64 / 80 pixels (min / median / max)",
        "classes        2: cats 2, dogs 1",
        "unreadable     2 files",
        "               dogs/half.png: truncated",
        "preset         celeba64-meme",
        f"start with     python run_search.py --data {mixed}"
        + ("" if torch.cuda.is_available() else " --preset thumbnails-meme"),
    ):
        assert line in said.splitlines()
    main(["data", str(mixed), "--json"])
    told = json.loads(capsys.readouterr().out)
    assert told["unreadable"] == [
        {"name": "dogs/broken.png", "reason": "not an image"},
        {"name": "dogs/half.png", "reason": "truncated"},
    ]
    assert told["preset"] == "celeba64-meme"
    assert told["shorter_side"]["median"] == 64
    main(["data", str(mixed), "--quiet"])
    quiet = capsys.readouterr()
    assert quiet.out.startswith("images         3 in")
    assert quiet.err == ""


def test_a_zip_is_the_folder_it_holds(mixed, tmp_path):
    with zipfile.ZipFile(tmp_path / "mixed.zip", "w") as archive:
        for path in sorted(mixed.rglob("*.png")):
            archive.write(path, path.relative_to(mixed))
    folder, packed = survey(str(mixed)), survey(str(tmp_path / "mixed.zip"))
    assert Survey(**{**vars(packed), "source": folder.source}) == folder


def test_digits_splits_and_folders_with_nothing_readable(tmp_path, capsys):
    found = survey("digits")
    assert (found.images, found.modes, sum(found.classes.values())) == (1797, {"L": 1797}, 1797)
    assert suggested_commands(found)[0] == "python run_search.py"
    save(tmp_path / "parted" / "train" / "a.png", 32, 32)
    save(tmp_path / "parted" / "test" / "a.png", 32, 32)
    describe_data(str(tmp_path / "parted"))
    assert "these look like the splits" in capsys.readouterr().out
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_bytes(b"")
    found = survey(str(tmp_path / "bad"))
    assert (found.images, found.shorter_side, suggested_commands(found)) == (0, None, [])
    with pytest.raises(UserError, match="does not exist"):
        survey(str(tmp_path / "nowhere"))


# torchvision's own layouts


def test_celeba_as_torchvision_lays_it_out(tmp_path):
    for number in range(3):
        save(tmp_path / "celeba" / "img_align_celeba" / f"{number:06}.jpg", 178, 218, seed=number)
    for name in ("list_attr_celeba.txt", "identity_CelebA.txt", "list_eval_partition.txt"):
        (tmp_path / "celeba" / name).write_text("3\n")
    for folder in (tmp_path, tmp_path / "celeba", tmp_path / "celeba" / "img_align_celeba"):
        found = survey(str(folder))
        assert (found.images, found.classes, found.shorter_side) == (3, {}, Spread(178, 178, 178))
        assert suggested_preset(found) == "celeba64-meme"


def test_cifar10_as_torchvision_lays_it_out(tmp_path):
    pickled = tmp_path / "python" / "cifar-10-batches-py"
    pickled.mkdir(parents=True)
    for name in ("data_batch_1", "data_batch_2", "test_batch", "batches.meta"):
        (pickled / name).write_bytes(b"\x80\x04 would be unpickled")
    with pytest.raises(UserError, match=r"Python version, which is never unpickled; take .* cifar-10-binary\.tar\.gz"):
        survey(str(tmp_path / "python"))
    binary = tmp_path / "binary" / "cifar-10-batches-bin"
    binary.mkdir(parents=True)
    records = np.random.default_rng(0).integers(0, 256, (20, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(20) % 10
    (binary / "data_batch_1.bin").write_bytes(records.tobytes())
    found = survey(str(tmp_path / "binary"))
    assert (found.images, found.shorter_side, set(found.classes.values())) == (20, Spread(32, 32, 32), {2})


# Datasets of Hugging Face


@pytest.fixture
def dataset():
    datasets = pytest.importorskip("datasets", reason="needs the package datasets (pip install 'meme-nas[datasets]')")
    datasets.disable_progress_bars()
    source = np.random.default_rng(0)
    images = [Image.fromarray(source.integers(0, 256, (20 + number, 40, 3), dtype=np.uint8)) for number in range(6)]
    features = datasets.Features({"label": datasets.ClassLabel(names=["zebra", "ant"]), "image": datasets.Image()})
    return datasets.Dataset.from_dict({"label": [0, 1, 1, 0, 1, 1], "image": images}, features=features)


def layouts(dataset, folder):
    """The dataset in every form it is read from."""
    import datasets

    dataset.save_to_disk(folder / "saved")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(folder / "splits")
    (folder / "hub" / "data").mkdir(parents=True)
    dataset.to_parquet(folder / "hub" / "data" / "train-00000-of-00001.parquet")
    dataset.select([0]).to_parquet(folder / "hub" / "data" / "test-00000-of-00001.parquet")
    dataset.to_parquet(folder / "alone.parquet")
    return [folder / name for name in ("saved", "splits", "hub", "alone.parquet")]


def test_a_dataset_in_every_form_is_the_same_images(dataset, tmp_path):
    opened = [open_images(path, size=20, channels=3) for path in layouts(dataset, tmp_path)]
    first = opened[0]
    assert first.classes == ("zebra", "ant")  # in the dataset's own order
    assert first.labels.tolist() == [0, 1, 1, 0, 1, 1]
    assert np.array_equal(first.pixels[0], np.array(dataset[0]["image"])[:, 10:30].transpose(2, 0, 1))
    assert {images.content_id for images in opened} == {first.content_id}
    found = survey(str(tmp_path / "hub"))
    assert (found.images, found.classes) == (6, {"zebra": 2, "ant": 4})
    assert (found.shorter_side, found.longer_side) == (Spread(20, 22, 25), Spread(40, 40, 40))


def test_a_changed_dataset_is_noticed(dataset, tmp_path):
    dataset.save_to_disk(tmp_path / "saved")
    before = open_images(tmp_path / "saved", size=8, channels=1)
    dataset.select([3, 2, 1]).save_to_disk(tmp_path / "again")
    for file in (tmp_path / "again").iterdir():
        (tmp_path / "saved" / file.name).write_bytes(file.read_bytes())
    after = open_images(tmp_path / "saved", size=8, channels=1)
    assert np.array_equal(after.pixels, before.pixels[[3, 2, 1]])


def test_rows_without_an_image_or_with_a_broken_one_are_named(tmp_path):
    datasets = pytest.importorskip("datasets", reason="needs the package datasets (pip install 'meme-nas[datasets]')")
    good = save(tmp_path / "good.png", 16, 16).read_bytes()
    rows = [{"bytes": good, "path": None}, None, {"bytes": b"broken", "path": None}, {"bytes": None, "path": "/etc/hostname"}]
    features = datasets.Features({"picture": datasets.Image(decode=False), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_dict({"picture": rows, "label": [1, 2, 3, 4]}, features=features)
    dataset.to_parquet(tmp_path / "rows.parquet")  # save_to_disk would embed what the path names
    found = survey(str(tmp_path / "rows.parquet"))
    assert (found.images, found.classes) == (1, {})
    assert sorted((each.name, each.reason) for each in found.unreadable) == [
        ("row 1", "holds no image"),
        ("row 2", "not an image"),
        ("row 3", "holds no image"),
    ]


def test_datasets_that_are_none_of_images(dataset, tmp_path):
    dataset.remove_columns("image").save_to_disk(tmp_path / "text")
    with pytest.raises(UserError, match="no column of images but label"):
        survey(str(tmp_path / "text"))
    (tmp_path / "torn.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match="no dataset that can be read"):
        survey(str(tmp_path / "torn.parquet"))
    for name in ("test", "validation"):
        dataset.save_to_disk(tmp_path / "untrained" / name)
    (tmp_path / "untrained" / "dataset_dict.json").write_text('{"splits": ["test", "validation"]}')
    with pytest.raises(UserError, match="no split called train but test, validation; name the folder"):
        survey(str(tmp_path / "untrained"))
    assert survey(str(tmp_path / "untrained" / "test")).images == 6


def test_without_the_package_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    imported = builtins.__import__

    def without_datasets(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(UserError, match=r"needs the package datasets: pip install 'meme-nas\[datasets\]'"):
        survey(str(tmp_path))


# Suggestions


def found_with(side, mode, classes=0):
    counts = {f"class {number}": 1 for number in range(classes)}
    coloured = 1000 if mode in ("RGB", "RGBA") else 0
    return Survey("path/to/images", 1000, Spread(side, side, side), Spread(side, side, side), {mode: 1000}, coloured, counts, ())


@settings(max_examples=40)
@given(st.integers(1, 2000), st.sampled_from(["RGB", "L", "RGBA", "1"]), st.sampled_from([0, 2, 1000]), st.booleans())
def test_what_is_suggested_is_taken_and_fits(side, mode, classes, gpu):
    found = found_with(side, mode, classes)
    name, commands = suggested_preset(found), suggested_commands(found, gpu=gpu)
    assert bool(name) == bool(commands) == (side >= 4)
    for command in commands:
        words = shlex.split(command)
        if words[1] == "run_search.py":
            chosen, _ = read_settings(SearchSettings, words[2:], "run_search.py", run_search.GROUPS)
            assert_fits(chosen.full_config(), found)
        else:
            check_flags(VERBS["train"].__annotations__, words[4:])
            assert_fits(preset(words[4]), found)


def assert_fits(config: Config, found: Survey):
    """As `meme.pipeline.open_reference` has it: not enlarged more than it allows, no colours lost, classes as they are."""
    assert config.pixels.size <= LARGEST_ENLARGEMENT * found.shorter_side.median
    assert config.pixels.channels == 3 or found.colour_share <= 0.5
    assert config.network.classes in (0, len(found.classes))
