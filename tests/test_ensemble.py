"""Experts as one denoiser: identical experts are one model, and each is asked for exactly the timesteps of its interval."""

import gc
import weakref

import pytest
import torch
from test_sampler import SAMPLERS
from torch import nn

from meme.config.presets import preset
from meme.config.schema import Config, even_intervals
from meme.data.images import open_images
from meme.diffusion.ensemble import Ensemble, OneAtATime, expert_at
from meme.diffusion.sampler import draw_images, sampling_timesteps
from meme.network.unet import build_expert
from meme.pipeline import draw, load_ensemble
from meme.training.trainer import expert_file, save_expert

BASE = preset("digits-meme").with_(sampling={"steps": 20, "batch_size": 2})


DIGITS = open_images("digits", size=8, channels=1)


def config_of(*intervals: tuple[int, int], **sampling) -> Config:
    """The base with equal experts on these intervals."""
    experts = [{"interval": interval, "low_channels": (8, 16)} for interval in intervals]
    return BASE.with_(experts=experts, sampling=sampling)


def drawn(ensemble: Ensemble, count: int = 3) -> torch.Tensor:
    config = ensemble.config
    return torch.cat(list(draw_images(ensemble.denoise, count, config, seed=0)))


class Marker(nn.Module):
    """Writes down which expert was asked for which timesteps."""

    def __init__(self, number: int, asked: list):
        super().__init__()
        self.number, self.asked = number, asked

    def forward(self, x, t):
        self.asked.append((self.number, t.tolist()))
        return x


def asked_of(config: Config, count: int) -> list[tuple[int, list[int]]]:
    asked = []
    drawn(Ensemble(config, [Marker(number + 1, asked) for number in range(len(config.experts))]), count)
    return asked


@torch.no_grad()
def trained_looking(config: Config) -> nn.Module:
    """An expert none of whose layers is zero."""
    expert = build_expert(config, 1)
    source = torch.Generator().manual_seed(0)
    for weight in expert.parameters():
        weight.add_(torch.randn(weight.shape, generator=source) * 0.05)
    return expert.eval()


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("sampling", SAMPLERS.values(), ids=SAMPLERS)
def test_identical_experts_are_one_model_bit_for_bit(count, sampling):
    alone, shared = (config_of(*even_intervals(number, 1000), **sampling) for number in (1, count))
    states = [trained_looking(alone).state_dict()] * count
    experts = [build_expert(shared, number + 1).eval() for number in range(count)]
    for expert, state in zip(experts, states, strict=True):
        expert.load_state_dict(state)
    expected = drawn(Ensemble(alone, [trained_looking(alone)]))
    assert torch.equal(drawn(Ensemble(shared, experts)), expected)
    assert len(expected.unique()) > 10  # not all black or white


def test_a_different_expert_changes_the_images():
    config = config_of((0, 500), (500, 1000))
    one = trained_looking(config)
    other = build_expert(config.with_(training={"seed": 1}), 2).eval()
    assert not torch.equal(drawn(Ensemble(config, [one, one])), drawn(Ensemble(config, [one, other])))


UNEVEN = ((0, 51), (51, 52), (52, 900), (900, 1000))


def test_each_expert_is_asked_for_its_timesteps_in_order_from_noise_to_data():
    config = config_of(*UNEVEN)
    by_hand = [(4, 951), (4, 901), *((3, t) for t in range(851, 52, -50)), (2, 51), (1, 1)]
    assert asked_of(config, count=2) == [(number, [t, t]) for number, t in by_hand]


def test_every_batch_passes_all_experts():
    config = config_of((0, 500), (500, 1000))
    times = sampling_timesteps(config.diffusion, config.sampling)
    assert asked_of(config, count=3) == [(1 + (t >= 500), [t] * size) for size in (2, 1) for t in times]


def test_an_interval_holds_its_first_timestep_and_not_its_end():
    config = config_of(*UNEVEN)
    assert [expert_at(config, t) for t in (0, 50, 51, 52, 899, 900, 999)] == [1, 1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("t", [-1, 1000])
def test_a_timestep_outside_the_schedule_is_refused(t):
    with pytest.raises(ValueError, match=f"must be 0 to 999, not {t}"):
        expert_at(BASE, t)


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_number_of_experts_is_refused(count):
    with pytest.raises(ValueError, match=f"the config has 4, not {count}"):
        Ensemble(BASE, [nn.Identity() for _ in range(count)])


def test_predictions_are_float32_in_the_shape_asked_for():
    config = config_of((0, 1000))
    predicted = Ensemble(config, [trained_looking(config)]).denoise(torch.zeros(3, 1, 8, 8), 7)
    assert (predicted.dtype, predicted.shape) == (torch.float32, (3, 1, 8, 8))


# One expert in memory at a time


def one_at_a_time(count: int):
    loaded = []
    return OneAtATime(count, lambda number: loaded.append(number) or Marker(number, [])), loaded


def test_an_expert_is_loaded_when_it_is_asked_for_and_kept_until_another_is():
    experts, loaded = one_at_a_time(3)
    assert len(experts) == 3 and not loaded
    assert experts[2] is experts[2] and experts[0] is not experts[2]
    assert loaded == [3, 1, 3]


def test_an_expert_is_let_go_before_the_next_is_loaded():
    held = []

    def load(number: int) -> nn.Module:
        gc.collect()
        assert not [reference for reference in held if reference() is not None]
        expert = nn.Identity()
        held.append(weakref.ref(expert))
        return expert

    experts = OneAtATime(3, load)
    for index in (2, 1, 0):
        experts[index](torch.zeros(1))


def test_there_are_as_many_as_said():
    experts, _ = one_at_a_time(2)
    assert len(list(experts)) == 2
    for index in (-1, 2):
        with pytest.raises(IndexError):
            experts[index]


def test_timesteps_are_cut_where_another_expert_takes_over():
    config = config_of(*UNEVEN)
    times = sampling_timesteps(config.diffusion, config.sampling)
    cut = Ensemble(config, [nn.Identity()] * 4).hand_overs(times)
    assert cut == [[951, 901], list(range(851, 52, -50)), [51], [1]]


@pytest.mark.parametrize("sampling", SAMPLERS.values(), ids=SAMPLERS)
def test_images_are_the_same_bit_for_bit_with_one_expert_in_memory(tmp_path, sampling):
    config = config_of(*even_intervals(4, 1000), **sampling)
    for number in range(1, 5):
        expert = trained_looking(config.with_(training={"seed": number}))
        save_expert(expert, config, number, DIGITS, expert_file(tmp_path, number))
    config.save(tmp_path / "config.yaml")
    resident, swapped = (load_ensemble(tmp_path, one_at_a_time=each) for each in (False, True))
    whole, cut = (torch.cat(list(draw(ensemble, 5, seed=3))) for ensemble in (resident, swapped))
    assert torch.equal(whole, cut)
    assert len(whole.unique()) > 10


def test_with_one_expert_in_memory_each_is_loaded_once_for_all_images():
    config = config_of((0, 500), (500, 1000))
    experts, loaded = one_at_a_time(2)
    list(draw(Ensemble(config, experts), 5, seed=0))
    assert loaded == [2, 1]
