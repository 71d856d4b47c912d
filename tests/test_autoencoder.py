"""The first stage: parity with diffusers, what it refuses, and the cache of latents."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import CIFAR
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import meme.data.first_stage
import meme.data.latents
from meme.config.schema import FirstStageConfig, ImageConfig
from meme.data.first_stage import PUBLISHED, FirstStage, open_first_stage
from meme.data.images import Images, batch_indices, open_images
from meme.data.latents import Latents, latents_of
from meme.errors import UserError
from meme.support.torchvision_compat import make_torchvision_importable

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
VQ, KL = {"downsample": 4}, {"kind": "kl", "downsample": 2}
VQ_LATENT, KL_LATENT = ImageConfig(channels=3, size=8), ImageConfig(channels=4, size=16)
GREY, GREY_LATENT = {"downsample": 2, "image_channels": 1}, ImageConfig(channels=2, size=4)


def tiny(name: str, levels: int, **arguments):
    """A small model of diffusers with random weights, whose codes are as far apart as its latents."""
    make_torchvision_importable()
    import diffusers

    torch.manual_seed(0)
    model = getattr(diffusers, name)(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        **arguments,
    )
    if name == "VQModel":
        torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Images:
    """Every 250th image of CIFAR-10, with its class."""
    if not CIFAR.is_file():
        pytest.skip(f"needs CIFAR-10 at {CIFAR}")
    folder = tmp_path_factory.mktemp("cifar")
    with zipfile.ZipFile(CIFAR) as archive:
        for name in [name for name in archive.namelist() if name.endswith(".jpg")][::250]:
            archive.extract(name, folder)
    return open_images(folder, size=32, channels=3)


@pytest.fixture(scope="module")
def digits() -> Images:
    whole = open_images("digits", size=8, channels=1)
    return replace(whole, pixels=whole.pixels[:24], labels=whole.labels[:24], content_id="first-24-digits")


@pytest.fixture(scope="module")
def models():
    return {
        "vq": tiny("VQModel", 3, latent_channels=3, num_vq_embeddings=64),
        "kl": tiny("AutoencoderKL", 2, latent_channels=4),
        "grey": tiny("VQModel", 2, in_channels=1, out_channels=1, latent_channels=2, num_vq_embeddings=16),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, models) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {name: folder / name for name in models}


@pytest.fixture
def source(saved, tmp_path) -> Path:
    """A copy of the VQ model that a test may spoil."""
    return shutil.copytree(saved["vq"], tmp_path / "vq")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MEME_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "latents"


def open_vq(source: Path) -> FirstStage:
    return open_first_stage(FirstStageConfig(source=str(source), **VQ), VQ_LATENT)


def grey_latents(saved, digits, scale_factor: float | None = None, **options) -> Latents:
    config = FirstStageConfig(source=str(saved["grey"]), scale_factor=scale_factor, **GREY)
    return latents_of(digits, config, GREY_LATENT, **options)


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def reweigh(folder: Path, change) -> None:
    """Replace the weights by what ``change`` makes of them."""
    safetensors.torch.save_file(change(safetensors.torch.load_file(folder / WEIGHTS)), folder / WEIGHTS)


# --- The published first stages -------------------------------------------------------------------


def ldm_parameters(multipliers, channels, codes, *, attention):
    """Parameters of LDM's VQ model with 128 channels, two blocks a level and attention at the coarsest, from its description."""

    def convolution(inputs, outputs, side):
        return inputs * outputs * side**2 + outputs

    def block(inputs, outputs):
        shortcut = convolution(inputs, outputs, 1) if inputs != outputs else 0
        return 2 * inputs + convolution(inputs, outputs, 3) + 2 * outputs + convolution(outputs, outputs, 3) + shortcut

    def attend(width):
        return 2 * width + 4 * convolution(width, width, 1)

    def half(blocks, widths, attended):
        """One path through the levels, its change of resolution between them, and the middle."""
        total, previous = 0, widths[0]
        for width in widths:
            total += block(previous, width) + (blocks - 1) * block(width, width)
            total += blocks * attend(width) if attention and width == attended else 0
            previous = width
        return total + 2 * block(attended, attended) + attend(attended)

    widths = [128 * multiplier for multiplier in multipliers]
    last = widths[-1]
    encoder = convolution(3, 128, 3) + half(2, widths, last)
    encoder += sum(convolution(width, width, 3) for width in widths[:-1]) + 2 * last + convolution(last, channels, 3)
    decoder = convolution(channels, last, 3) + half(3, widths[::-1], last)
    decoder += sum(convolution(width, width, 3) for width in widths[1:]) + 2 * 128 + convolution(128, 3, 3)
    return encoder + decoder + 2 * convolution(channels, channels, 1) + codes * channels


@pytest.mark.parametrize(
    ("name", "latent", "expected"),
    [
        ("vq-f4", (3, 64, 64), ldm_parameters((1, 2, 4), 3, 8192, attention=False)),
        ("vq-f8", (4, 32, 32), ldm_parameters((1, 2, 2, 4), 4, 16384, attention=True)),
    ],
)
def test_published_first_stages_have_their_shapes_and_sizes(name, latent, expected):
    make_torchvision_importable()
    from diffusers import VQModel

    with torch.device("meta"), torch.no_grad():
        model = VQModel(**PUBLISHED[name])
        latents = model.encode(torch.empty(1, 3, 256, 256)).latents
        assert latents.shape == (1, *latent)
        assert model.decode(latents).sample.shape == (1, 3, 256, 256)
    parameters = sum(weight.numel() for weight in model.parameters())
    assert parameters == expected
    if name == "vq-f4":
        assert round(parameters / 1e6) == 55  # as Rombach et al. say


# --- Encoding and decoding ------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options", "latent"), [("vq", VQ, VQ_LATENT), ("kl", KL, KL_LATENT)])
def test_both_directions_are_those_of_diffusers(cifar, models, saved, kind, options, latent):
    stage = open_first_stage(FirstStageConfig(source=str(saved[kind]), **options), latent)
    pixels = torch.tensor(cifar.pixels[:5])
    encoded = models[kind].encode(pixels / 127.5 - 1)
    expected = encoded.latents if kind == "vq" else encoded.latent_dist.mean

    latents = stage.encode(pixels)
    assert latents.dtype == torch.float32 and latents.shape == (5, *stage.latent_shape)
    torch.testing.assert_close(latents, expected)
    torch.testing.assert_close(stage.encode(pixels), latents, rtol=0, atol=0)

    far = 3 * latents  # where some images leave [-1, 1]
    decoded = stage.decode(far)
    assert decoded.dtype == torch.float32 and decoded.shape == (5, *stage.pixel_shape)
    torch.testing.assert_close(decoded, models[kind].decode(far).sample.clamp(-1, 1))
    assert models[kind].decode(far).sample.abs().max() > 1


def test_vq_latents_are_not_yet_codes_and_decode_as_the_nearest_codes(digits, models, saved):
    stage = open_first_stage(FirstStageConfig(source=str(saved["grey"]), **GREY), GREY_LATENT)
    latents = stage.encode(torch.tensor(digits.pixels[:4]))
    codes = models["grey"].quantize.embedding.weight
    distances = (latents[:, None] - codes[None, :, :, None, None]).square().sum(dim=2)
    nearest = codes[distances.argmin(dim=1)].permute(0, 3, 1, 2)
    assert distances.amin(dim=1).min() > 0
    torch.testing.assert_close(stage.decode(latents), models["grey"].decode(nearest, force_not_quantize=True).sample.clamp(-1, 1))


def test_a_trained_autoencoder_gives_images_back(cifar, tmp_path):
    """Trained by diffusers alone on images in [-1, 1], so a wrong range or scale on either side would show."""
    model = tiny("AutoencoderKL", 2, latent_channels=4).train().requires_grad_(True)
    images = torch.tensor(cifar.pixels).float() / 127.5 - 1
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        batch = images[batch_indices(len(images), 8, 0, step)][:, :, 8:24, 8:24]
        loss = (model.decode(model.encode(batch).latent_dist.mode()).sample - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "trained")

    stage = open_first_stage(FirstStageConfig(source=str(tmp_path / "trained"), **KL), KL_LATENT)
    pixels = torch.tensor(cifar.pixels[:32])
    truth = images[:32]
    error = (stage.decode(stage.encode(pixels)) - truth).square().mean()
    assert error < 0.5 * (truth - truth.mean(dim=(2, 3), keepdim=True)).square().mean()


def test_many_images_pass_in_parts(digits, saved, monkeypatch):
    stage = open_first_stage(FirstStageConfig(source=str(saved["grey"]), **GREY), GREY_LATENT)
    pixels = torch.tensor(digits.pixels[:7])
    latents = stage.encode(pixels)
    images = stage.decode(latents)
    seen = []
    monkeypatch.setattr(meme.data.first_stage, "_PIXELS_AT_ONCE", 3 * 8 * 8 + 5)
    monkeypatch.setattr(stage.model.encoder, "forward", _noting(stage.model.encoder.forward, seen))
    monkeypatch.setattr(stage.model.decoder, "forward", _noting(stage.model.decoder.forward, seen))
    torch.testing.assert_close(stage.encode(pixels), latents)
    torch.testing.assert_close(stage.decode(latents), images)
    assert seen == [3, 3, 1, 3, 3, 1]
    monkeypatch.setattr(meme.data.first_stage, "_PIXELS_AT_ONCE", 1)
    assert stage.encode(pixels).shape == latents.shape


def _noting(forward, seen: list[int]):
    def noting(x, *rest):
        seen.append(len(x))
        return forward(x, *rest)

    return noting


def test_what_is_no_image_or_latent_of_this_stage_is_refused(saved):
    stage = open_vq(saved["vq"])
    with pytest.raises(ValueError, match="uint8"):
        stage.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(B, 3, 32, 32\), not \(1, 3, 16, 16\)"):
        stage.encode(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"\(B, 3, 8, 8\), not \(1, 4, 8, 8\)"):
        stage.decode(torch.zeros(1, 4, 8, 8))


def test_the_model_is_frozen(saved):
    stage = open_vq(saved["vq"])
    assert not stage.model.training
    assert not any(weight.requires_grad for weight in stage.model.parameters())
    assert not stage.decode(torch.zeros(1, 3, 8, 8, requires_grad=True)).requires_grad


# --- What identifies a first stage ----------------------------------------------------------------


def test_the_id_is_that_of_the_content_wherever_it_lies(saved, source, models, tmp_path):
    expected = open_vq(saved["vq"]).id
    assert len(expected) == 16 and int(expected, 16) >= 0
    assert open_vq(source).id == expected

    edit(source / "config.json", _diffusers_version="0.0.1", _name_or_path="elsewhere")
    assert open_vq(source).id == expected

    inner = FirstStageConfig(source=str(saved["vq"].parent), subfolder="vq", **VQ)
    assert open_first_stage(inner, VQ_LATENT).id == expected

    models["vq"].save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert (tmp_path / "shards" / INDEX).is_file()
    assert open_vq(tmp_path / "shards").id == expected


def test_the_id_changes_with_any_weight_and_with_what_the_config_says(saved, source):
    before = open_vq(saved["vq"]).id
    edit(source / "config.json", norm_num_groups=2)
    other_config = open_vq(source).id
    edit(source / "config.json", norm_num_groups=4)

    def nudge(weights):
        weights["decoder.conv_out.bias"][0] += 1e-3
        return weights

    reweigh(source, nudge)
    assert len({before, other_config, open_vq(source).id}) == 3


@pytest.mark.parametrize("part", ["encoder", "decoder", ""])
def test_weights_of_half_precision_compute_in_float32(part, digits, saved, tmp_path):
    """diffusers keeps the stored precisions where the first weight is float32."""
    half = shutil.copytree(saved["grey"], tmp_path / "half")
    reweigh(half, lambda weights: {name: weight.half() if part in name else weight for name, weight in weights.items()})
    stage = open_first_stage(FirstStageConfig(source=str(half), **GREY), GREY_LATENT)
    assert {weight.dtype for weight in stage.model.parameters()} == {torch.float32}
    assert stage.encode(torch.tensor(digits.pixels[:1])).dtype == torch.float32


def test_weights_with_the_attention_names_of_early_diffusers_are_read(saved, source):
    """As the hub's copies of LDM's first stages have them."""
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name: str) -> str:
        for new, old in early.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        return name

    reweigh(source, lambda weights: {renamed(name): weight for name, weight in weights.items()})
    assert any("query" in name for name in safetensors.torch.load_file(source / WEIGHTS))
    assert open_vq(source).id == open_vq(saved["vq"]).id


# --- What is refused ------------------------------------------------------------------------------


def refusal(config: FirstStageConfig, image: ImageConfig = VQ_LATENT) -> str:
    """The sentence a user reads; anything but one line of one UserError fails."""
    with pytest.raises(UserError) as caught:
        open_first_stage(config, image)
    sentence = str(caught.value)
    assert "\n" not in sentence and len(sentence) < 600
    return sentence


def without(*names):
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}


def reshaped(weights):
    return weights | {"encoder.conv_in.bias": torch.zeros(5)}


def poisoned(weights):
    weights["quantize.embedding.weight"][3, 1] = torch.nan
    return weights


def as_pickle(folder: Path) -> None:
    torch.save(safetensors.torch.load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def as_pickled_shard(folder: Path) -> None:
    names = list(safetensors.torch.load_file(folder / WEIGHTS))
    as_pickle(folder)
    content = {"metadata": {}, "weight_map": dict.fromkeys(names, "diffusion_pytorch_model.bin")}
    (folder / INDEX).write_text(json.dumps(content))


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOILED = {
    "no config": (lambda f: (f / "config.json").unlink(), "source: there is no config.json"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "source: .*config.json cannot be read"),
    "config is no text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "source: .*config.json cannot be read"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "source: .*config.json is no mapping"),
    "config of no class": (lambda f: (f / "config.json").write_text("{}"), "source: .* holds None, not VQModel"),
    "another network": (lambda f: edit(f / "config.json", _class_name="UNet2DModel"), "source: .* UNet2DModel, not VQModel"),
    "a class that is a list": (lambda f: edit(f / "config.json", _class_name=["VQModel"]), "source: .* not VQModel"),
    "unknown block": (lambda f: edit(f / "config.json", down_block_types=["Nonsense"] * 3), "source: .*describes no autoencoder"),
    "no blocks": (lambda f: edit(f / "config.json", block_out_channels=[]), "source: .*describes no autoencoder"),
    "groups of nothing": (lambda f: edit(f / "config.json", norm_num_groups=0), "source: .*describes no autoencoder"),
    "channels that are words": (lambda f: edit(f / "config.json", in_channels="three"), "source: .*describes no autoencoder"),
    "grey to colour": (lambda f: edit(f / "config.json", in_channels=1), "source: .* does not give back images"),
    "grey": (lambda f: edit(f / "config.json", in_channels=1, out_channels=1), "image_channels: must be 1, .* not 3"),
    "quantised": (lambda f: edit(f / "config.json", quantization_config={"quant_method": "torchao"}), "source: .* quantised"),
    "only a pickle": (as_pickle, "source: .* lacks weights as safetensors"),
    "an index of pickles": (as_pickled_shard, "source: .* lacks weights as safetensors"),
    "an index of nothing": (lambda f: (f / INDEX).write_text("{}"), "source: .* names no weights"),
    "an index that is no JSON": (lambda f: (f / INDEX).write_text("x"), "source: .*index.json cannot be read"),
    "an index without a file": (
        lambda f: (f / INDEX).write_text('{"metadata": {}, "weight_map": {"a": "b.safetensors"}}'),
        "source: .* lacks weights as safetensors",
    ),
    "an index that leads out": (
        lambda f: (f / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": f"../vq/{WEIGHTS}"}})),
        "source: the weights in .* cannot be read",
    ),
    "half a file": (lambda f: cut_in_half(f / WEIGHTS), "source: the weights in .* cannot be read"),
    "an empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "source: the weights in .* cannot be read"),
    "a weight missing": (lambda f: reweigh(f, without("decoder.conv_in.bias")), "source: .* not those of .*decoder.conv_in.bias"),
    "a weight too many": (lambda f: reweigh(f, lambda w: w | {"extra": torch.ones(1)}), "source: .* not those of .*extra"),
    "a weight of another shape": (lambda f: reweigh(f, reshaped), "source: the weights in .* cannot be read"),
    "a weight that is no number": (lambda f: reweigh(f, poisoned), "source: .* not a number"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_spoiled_source_is_one_sentence(case, source):
    spoil, sentence = SPOILED[case]
    spoil(source)
    assert re.match(f"first_stage.{sentence}", refusal(FirstStageConfig(source=str(source), **VQ)))


def test_unpickling_is_never_reached(source, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was read"))
    as_pickled_shard(source)
    refusal(FirstStageConfig(source=str(source), **VQ))
    (source / INDEX).unlink()
    refusal(FirstStageConfig(source=str(source), **VQ))


@pytest.mark.parametrize(
    ("options", "image", "sentence"),
    [
        (VQ | {"kind": "kl"}, VQ_LATENT, "first_stage.kind: must be vq, as .* holds VQModel, not kl"),
        (VQ | {"downsample": 2}, VQ_LATENT, "first_stage.downsample: must be 4, .* not 2"),
        (VQ | {"downsample": 3}, VQ_LATENT, "first_stage.downsample: must be 4, .* not 3"),
        (VQ | {"image_channels": 1}, VQ_LATENT, "first_stage.image_channels: must be 3, .* not 1"),
        (VQ, ImageConfig(channels=4, size=8), "image.channels: must be 3, .* not 4"),
        (VQ | {"subfolder": "vae"}, VQ_LATENT, "first_stage.subfolder: there is no config.json in .*vae;"),
    ],
)
def test_a_config_that_does_not_fit_is_one_sentence(options, image, sentence, saved):
    assert re.match(sentence, refusal(FirstStageConfig(source=str(saved["vq"]), **options), image))


def test_a_kl_model_is_not_read_as_vq(saved):
    sentence = refusal(FirstStageConfig(source=str(saved["kl"]), downsample=2), KL_LATENT)
    assert sentence.startswith("first_stage.kind: must be kl, as ")


def test_a_pipeline_needs_its_subfolder(source):
    (source.parent / "model_index.json").write_text("{}")
    sentence = refusal(FirstStageConfig(source=str(source.parent), **VQ))
    assert sentence.startswith("first_stage.subfolder: there is no config.json") and "vqvae" in sentence
    open_first_stage(FirstStageConfig(source=str(source.parent), subfolder="vq", **VQ), VQ_LATENT)


def test_a_subfolder_is_not_completed_from_the_folder_above(source):
    """diffusers alone would take the weights above."""
    (source / "inner").mkdir()
    shutil.copy(source / "config.json", source / "inner")
    assert "lacks weights" in refusal(FirstStageConfig(source=str(source), subfolder="inner", **VQ))


@pytest.fixture
def offline(monkeypatch, tmp_path) -> Path:
    """The hub's cache, with the network off."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


NO_FOLDERS = ["", "  ", "/no/such/folder", "CompVis/ldm-celebahq-256", "a/b/c", "~nobody/vq", "x" * 5000, "a\0b", __file__]


@pytest.mark.parametrize("name", NO_FOLDERS, ids=lambda name: repr(name[-30:]))
def test_a_source_that_is_no_folder_is_one_sentence(name, offline):
    sentence = refusal(FirstStageConfig(source=name))
    assert sentence.startswith("first_stage.source: ") and "give a folder" in sentence


def test_a_hub_name_is_read_from_the_hubs_cache(saved, offline):
    commit = "0" * 40
    repository = offline / "models--someone--latents"
    shutil.copytree(saved["vq"], repository / "snapshots" / commit / "vqvae")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    config = FirstStageConfig(source="someone/latents", subfolder="vqvae", **VQ)
    assert open_first_stage(config, VQ_LATENT).id == open_vq(saved["vq"]).id
    assert "no config.json" in refusal(FirstStageConfig(source="someone/latents", **VQ))


# --- The cache of latents -------------------------------------------------------------------------


@pytest.fixture
def no_encoding(monkeypatch):
    """Call to make every later encoding an error that is no UserError."""
    return lambda: monkeypatch.setattr(FirstStage, "encode", None)


def test_latents_of_cifar_are_the_encoders_scaled_to_unit_deviation(cifar, saved, cache):
    config = FirstStageConfig(source=str(saved["vq"]), **VQ)
    latents = latents_of(cifar, config, VQ_LATENT)
    stage = open_first_stage(config, VQ_LATENT)
    expected = stage.encode(torch.tensor(cifar.pixels))
    assert (len(latents), latents.name, latents.classes) == (len(cifar), cifar.name, cifar.classes)
    assert latents.labels is cifar.labels
    assert isinstance(latents.values, np.memmap) and not latents.values.flags.writeable
    torch.testing.assert_close(torch.tensor(latents.values), expected)
    assert latents.scale_factor == pytest.approx(1 / expected.std(correction=0).item(), rel=1e-5)
    everything = latents.tensor(range(len(latents)))
    assert everything.dtype == torch.float32
    assert everything.std().item() == pytest.approx(1, rel=1e-4)
    torch.testing.assert_close(stage.decode(everything / latents.scale_factor), stage.decode(expected), atol=1e-3, rtol=0)
    assert {path.name for path in cache.iterdir()} == {f"{cifar.content_id}-{stage.id}{end}" for end in (".npy", ".json")}


@pytest.fixture
def latents(saved, digits) -> Latents:
    return grey_latents(saved, digits)


@given(indices=st.lists(st.integers(0, 23), min_size=1, max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_a_batch_is_the_scaled_rows(indices, latents):
    batch = latents.tensor(indices)
    torch.testing.assert_close(batch, torch.tensor(latents.values[indices]) * latents.scale_factor, rtol=0, atol=0)
    batch.zero_()
    assert latents.values.any()


def test_encoding_is_done_once_in_batches_and_said_once(saved, digits, monkeypatch):
    sizes, messages = [], []
    encode = FirstStage.encode
    monkeypatch.setattr(FirstStage, "encode", lambda stage, pixels: sizes.append(len(pixels)) or encode(stage, pixels))
    first = grey_latents(saved, digits, batch_size=10, on_message=messages.append)
    second = grey_latents(saved, digits, on_message=messages.append)
    assert sizes == [10, 10, 4]
    assert messages == ["Encoding 24 images of digits to latents of 2 x 4 x 4, once"]
    assert np.array_equal(first.values, second.values)
    assert (first.scale_factor, first.content_id) == (second.scale_factor, second.content_id)


def test_a_scale_factor_of_the_config_goes_first_and_shares_the_entry(saved, digits, no_encoding):
    measured = grey_latents(saved, digits)
    no_encoding()
    given_ = grey_latents(saved, digits, scale_factor=0.25)
    assert given_.scale_factor == 0.25
    torch.testing.assert_close(given_.tensor([3]) * (measured.scale_factor / 0.25), measured.tensor([3]))
    again = grey_latents(saved, digits, scale_factor=measured.scale_factor)
    assert again.content_id == measured.content_id != given_.content_id


def test_the_content_id_follows_images_weights_and_scale(saved, digits, tmp_path):
    base = grey_latents(saved, digits, scale_factor=1.0)
    other_images = replace(digits, pixels=255 - digits.pixels, content_id="inverted")
    moved = {"grey": shutil.copytree(saved["grey"], tmp_path / "moved")}
    ids = [base.content_id, grey_latents(saved, other_images, scale_factor=1.0).content_id]
    assert grey_latents(moved, replace(digits, name="other"), scale_factor=1.0).content_id == base.content_id
    reweigh(moved["grey"], lambda weights: {name: weight * 1.01 for name, weight in weights.items()})
    ids.append(grey_latents(moved, digits, scale_factor=1.0).content_id)
    ids.append(grey_latents(saved, digits, scale_factor=2.0).content_id)
    assert len(set(ids)) == 4
    assert all(len(each) == 16 and int(each, 16) >= 0 for each in ids)


def test_other_weights_at_the_same_place_are_encoded_anew(source, cifar, cache):
    few = replace(cifar, pixels=cifar.pixels[:4], content_id="four")
    config = FirstStageConfig(source=str(source), **VQ)
    before = latents_of(few, config, VQ_LATENT)
    reweigh(source, lambda weights: {name: 2 * weight if "quant_conv" in name else weight for name, weight in weights.items()})
    after = latents_of(few, config, VQ_LATENT)
    torch.testing.assert_close(torch.tensor(after.values), 2 * torch.tensor(before.values))
    assert len(list(cache.glob("*.npy"))) == 2


DAMAGES = {
    "no latents": lambda npy, seal: npy.unlink(),
    "no seal": lambda npy, seal: seal.unlink(),
    "an empty file": lambda npy, seal: npy.write_bytes(b""),
    "of another shape": lambda npy, seal: np.save(npy, np.zeros((24, 2, 4, 5), np.float32)),
    "fewer": lambda npy, seal: np.save(npy, np.zeros((23, 2, 4, 4), np.float32)),
    "of another type": lambda npy, seal: np.save(npy, np.zeros((24, 2, 4, 4), np.float64)),
    "objects": lambda npy, seal: np.save(npy, np.array([{}]), allow_pickle=True),
    "not JSON": lambda npy, seal: seal.write_text("{"),
    "not text": lambda npy, seal: seal.write_bytes(b"\xff"),
    "a list": lambda npy, seal: seal.write_text("[1]"),
    "no scale": lambda npy, seal: seal.write_text("{}"),
    "scale that is no number": lambda npy, seal: seal.write_text('{"scale_factor": NaN}'),
    "scale that is a word": lambda npy, seal: seal.write_text('{"scale_factor": "1"}'),
    "scale of zero": lambda npy, seal: seal.write_text('{"scale_factor": 0}'),
    "endless scale": lambda npy, seal: seal.write_text('{"scale_factor": Infinity}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_built_again(damage, saved, digits, cache):
    whole = grey_latents(saved, digits)
    expected, scale_factor = whole.values.copy(), whole.scale_factor
    npy, seal = sorted(cache.iterdir(), key=lambda path: path.suffix, reverse=True)
    contents = npy.read_bytes(), seal.read_bytes()
    damage(npy, seal)
    mended = grey_latents(saved, digits)
    assert np.array_equal(mended.values, expected) and mended.scale_factor == scale_factor
    assert (npy.read_bytes(), seal.read_bytes()) == contents


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=8)
def test_a_file_cut_off_anywhere_is_built_again(data, saved, digits, cache):
    expected = grey_latents(saved, digits).values.copy()
    (npy,) = cache.glob("*.npy")
    content = npy.read_bytes()
    cut = data.draw(st.integers(0, len(content) - 1))
    npy.unlink()
    npy.write_bytes(content[:cut])
    assert np.array_equal(grey_latents(saved, digits).values, expected)


class Stopped(Exception):
    pass


def test_what_stops_encoding_leaves_nothing(saved, digits, cache, monkeypatch):
    encode, seen = FirstStage.encode, []

    def stopping(stage, pixels):
        seen.append(len(pixels))
        if len(seen) == 3:
            raise Stopped
        return encode(stage, pixels)

    monkeypatch.setattr(FirstStage, "encode", stopping)
    with pytest.raises(Stopped):
        grey_latents(saved, digits, batch_size=8)
    assert list(cache.iterdir()) == []
    assert len(grey_latents(saved, digits, batch_size=8)) == 24


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork to start processes quickly")


@needs_fork
def test_a_killed_process_leaves_nothing_that_is_read(saved, digits, cache, monkeypatch):
    encode, seen = FirstStage.encode, []

    def dying(stage, pixels):
        seen.append(len(pixels))
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(stage, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(FirstStage, "encode", dying)
        process = multiprocessing.get_context("fork").Process(target=grey_latents, args=(saved, digits), kwargs={"batch_size": 8})
        process.start()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert all(path.name.startswith(".") for path in cache.iterdir()) and any(cache.iterdir())
    latents = grey_latents(saved, digits)
    stage = open_first_stage(FirstStageConfig(source=str(saved["grey"]), **GREY), GREY_LATENT)
    torch.testing.assert_close(torch.tensor(latents.values), stage.encode(torch.tensor(digits.pixels)))


@needs_fork
def test_processes_that_encode_at_once_agree(saved, digits, cache):
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        several = pool.starmap(_content, [(saved, digits)] * 3, chunksize=1)
    assert len(set(several)) == 1 and several[0] == _content(saved, digits)
    assert len(list(cache.iterdir())) == 2


def _content(saved, digits) -> tuple[bytes, float]:
    latents = grey_latents(saved, digits)
    return latents.values.tobytes(), latents.scale_factor


@pytest.mark.parametrize(("value", "deviation"), [(0.0, "0.0"), (3e38, "(inf|nan)")])
def test_latents_without_a_finite_spread_are_refused(value, deviation, saved, digits, cache, tmp_path):
    broken = {"grey": shutil.copytree(saved["grey"], tmp_path / "broken")}

    def filled(weights):
        return {name: weight.fill_(value) if name.startswith("quant_conv") else weight for name, weight in weights.items()}

    reweigh(broken["grey"], filled)
    with pytest.raises(UserError, match=f"first_stage.source: .*deviation of {deviation}"):
        grey_latents(broken, digits)
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_one_sentence(saved, digits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEME_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="first_stage: cannot write the cache .*MEME_CACHE"):
        grey_latents(saved, digits)


def test_a_cache_that_cannot_be_read_back_is_one_sentence(saved, digits, monkeypatch):
    monkeypatch.setattr(meme.data.latents, "_read_entry", lambda *_: None)
    with pytest.raises(UserError, match="first_stage: the cache .* cannot be read back"):
        grey_latents(saved, digits)


VALUES = arrays.arrays(np.float32, st.integers(2, 60), elements=st.floats(-100, 100, width=32))


@given(values=VALUES.filter(lambda values: values.std() > 1e-3), size=st.integers(1, 60))
def test_the_scale_factor_does_not_depend_on_the_batches(values, size):
    parts = [values[first : first + size] for first in range(0, len(values), size)]
    moments = [(part.size, part.mean(dtype=np.float64), part.var(dtype=np.float64)) for part in parts]
    assert meme.data.latents._scale_factor(moments) == pytest.approx(1 / values.std(dtype=np.float64), rel=1e-5)
