"""Cascades that share a part of their way are the images that sampling each alone gives, bit for bit."""

import pytest
import torch

from meme.config.presets import preset
from meme.diffusion.ensemble import Ensemble
from meme.network.unet import build_expert
from meme.pipeline import draw
from meme_nas.worker import shared_sampling as cascades
from meme_nas.worker.shared_sampling import StateCache, draw_cascade

CONFIG = preset("digits-meme").with_(
    sampling={"steps": 10, "batch_size": 3},
    evaluation={"samples": 8},
    diffusion={"timesteps": 100},
    experts=[{"interval": (25 * n, 25 * n + 25), "low_channels": (8, 16)} for n in range(4)],
)


def expert(number: int, seed: int) -> torch.nn.Module:
    network = build_expert(CONFIG, number, seed=seed)
    with torch.no_grad():
        network.conv_out.weight.normal_(std=0.02, generator=torch.Generator().manual_seed(10 * number + seed))
    return network.eval()


EXPERTS = {(number, seed): expert(number, seed) for number in range(1, 5) for seed in range(3)}


def cascade(*seeds: int, **changes) -> tuple[Ensemble, list[str]]:
    """Expert n of seed ``seeds[n - 1]``."""
    pairs = list(enumerate(seeds, start=1))
    return Ensemble(CONFIG.with_(**changes), [EXPERTS[pair] for pair in pairs]), [str(pair) for pair in pairs]


def images(batches) -> torch.Tensor:
    return torch.cat(list(batches))


@pytest.fixture
def cache(tmp_path) -> StateCache:
    return StateCache(tmp_path / "states")


@pytest.fixture
def passes(monkeypatch) -> list[int]:
    """First timestep of every run that a batch of images goes through."""
    seen, original = [], cascades.pass_through

    def counted(denoise, x, indices, timesteps, *rest):
        seen.append(timesteps[0])
        return original(denoise, x, indices, timesteps, *rest)

    monkeypatch.setattr(cascades, "pass_through", counted)
    return seen


@pytest.mark.parametrize("sampling", [{}, {"eta": 0.7}, {"sampler": "ddpm"}, {"sampler": "dpm-solver++"}, {"sampler": "unipc"}])
def test_cascades_are_what_drawing_them_alone_gives(cache, sampling):
    for seeds in [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (1, 1, 0, 0), (0, 0, 0, 1), (2, 1, 0, 0)]:
        ensemble, ids = cascade(*seeds, sampling=sampling)
        assert torch.equal(images(draw_cascade(ensemble, ids, 5, cache)), images(draw(ensemble, 8, 5)))


def test_what_earlier_cascades_passed_is_not_passed_again(cache, passes):
    images(draw_cascade(*cascade(0, 0, 0, 0), 0, cache))
    assert len(passes) == 4 * 3  # experts x batches
    passes.clear()
    images(draw_cascade(*cascade(1, 0, 0, 0), 0, cache))
    assert len(passes) == 3 and max(passes) < 25
    passes.clear()
    images(draw_cascade(*cascade(0, 0, 1, 0), 0, cache))
    assert len(passes) == 3 * 3
    passes.clear()
    images(draw_cascade(*cascade(0, 0, 0, 0), 1, cache))
    assert len(passes) == 4 * 3  # other noise


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"eta": 0.5}},
        {"sampling": {"steps": 20}},
        {"evaluation": {"samples": 7}},
        {"diffusion": {"beta_end": 0.03}},
        {"sampling": {"clip": False}},
    ],
)
def test_states_of_other_settings_are_not_taken(cache, passes, changes):
    images(draw_cascade(*cascade(0, 0, 0, 0), 0, cache))
    passes.clear()
    images(draw_cascade(*cascade(0, 0, 0, 0, **changes), 0, cache))
    assert len(passes) == 4 * 3


def test_damaged_states_are_made_again(cache):
    ensemble, ids = cascade(0, 0, 0, 0)
    expected = images(draw_cascade(ensemble, ids, 0, cache))
    for path in cache.folder.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:40])
    assert torch.equal(images(draw_cascade(ensemble, ids, 0, cache)), expected)


def test_the_cache_keeps_its_limit_and_cascades_stay_right(tmp_path):
    one = 8 * 64 * 4 + 128
    small = StateCache(tmp_path / "states", limit_gib=2.5 * one / 2**30)
    for seeds in [(0, 0, 0, 0), (0, 1, 1, 1), (0, 0, 0, 0)]:
        ensemble, ids = cascade(*seeds)
        assert torch.equal(images(draw_cascade(ensemble, ids, 0, small)), images(draw(ensemble, 8, 0)))
        assert len(list(small.folder.glob("*.npy"))) <= 2


def test_an_expert_alone_needs_no_states(cache):
    config = preset("digits-iu-ldm-s").with_(evaluation={"samples": 5})
    ensemble = Ensemble(config, [build_expert(config, 1)])
    assert torch.equal(images(draw_cascade(ensemble, ["x"], 0, cache)), images(draw(ensemble, 5, 0)))
