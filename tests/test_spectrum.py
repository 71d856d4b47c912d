"""The transform on signals whose spectrum is known, and against the definition written with other operators."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from meme.analysis.spectrum import FLOOR, MeanSpectrum, half_diagonal, log_amplitudes, spectrum, white_noise

SIZES = st.integers(1, 17)
SEEDS = st.integers(0, 2**32)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def radial_frequency(size: int) -> torch.Tensor:
    """(S, S): distance of every coefficient of ``fft2`` from frequency 0."""
    axis = torch.fft.fftfreq(size, dtype=torch.float64)
    return torch.sqrt(axis[:, None] ** 2 + axis[None, :] ** 2)


def power_law(exponent: float, size: int, count: int, *, exact: bool) -> torch.Tensor:
    """(count, 1, S, S): white noise filtered by 1 / f^a; where ``exact``, with all its amplitudes set to that, phases kept."""
    coefficients = torch.fft.fft2(noise(count, 1, size, size))
    if exact:
        coefficients = coefficients / coefficients.abs()
    frequency = radial_frequency(size)
    frequency[0, 0] = 1
    return torch.fft.ifft2(coefficients / frequency**exponent).real


def log_log_slope(images: torch.Tensor) -> float:
    found = spectrum(images)
    inner = (found.frequencies > 0) & (found.frequencies < 1)  # pi itself is biased in noise, see white_noise
    return np.polyfit(found.frequencies[inner].log().numpy(), found.log_amplitude[inner].numpy(), 1)[0]


# Signals whose spectrum is known


@pytest.mark.parametrize("size", [16, 17])
def test_white_noise_is_flat(size):
    found = spectrum(noise(10_000, 2, size, size))
    expected = white_noise(found.frequencies)
    assert torch.allclose(found.log_amplitude, expected, rtol=0, atol=0.04)  # 5 standard errors: 1.11 / sqrt(20,000) each
    complex_ones = found.log_amplitude[1 : (size + 1) // 2]
    assert complex_ones.max() - complex_ones.min() < 0.03
    assert complex_ones.mean() - found.log_amplitude[0] == pytest.approx(math.log(2) / 2, abs=0.04)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("size", [64, 65])
def test_power_laws_have_their_slope(exponent, size):
    assert log_log_slope(power_law(exponent, size, 2, exact=True)) == pytest.approx(-exponent, abs=1e-6)
    assert log_log_slope(power_law(exponent, size, 256, exact=False)) == pytest.approx(-exponent, abs=0.06)


@given(size=st.integers(2, 20), data=st.data())
def test_a_grating_peaks_at_its_frequency(size, data):
    place = data.draw(st.integers(0, size // 2))
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    grating = torch.cos(2 * math.pi * place * (rows + columns).double() / size)
    found = spectrum(grating[None, None])
    is_real = 2 * place in (0, size)  # there both halves of the plane meet in one coefficient
    assert found.log_amplitude[place] == pytest.approx(math.log(size if is_real else size / 2), abs=1e-9)
    others = torch.arange(len(found.frequencies)) != place
    assert (found.log_amplitude[others] == math.log(FLOOR)).all()
    assert found.frequencies[place] == pytest.approx(2 * place / size)


def test_a_grating_along_one_axis_is_not_on_the_diagonal():
    grating = torch.cos(2 * math.pi * 3 * torch.arange(16).double() / 16).expand(16, 16)
    for image in (grating, grating.T):
        assert (spectrum(image[None, None]).log_amplitude == math.log(FLOOR)).all()


@given(size=SIZES, value=st.floats(0.01, 100))
def test_a_constant_has_frequency_zero_only(size, value):
    found = spectrum(torch.full((2, 3, size, size), value, dtype=torch.float64))
    assert found.log_amplitude[0] == pytest.approx(math.log(value * size), abs=1e-9)
    assert (found.log_amplitude[1:] == math.log(FLOOR)).all()


def test_nothing_at_all_is_at_the_floor():
    assert (spectrum(torch.zeros(1, 1, 8, 8)).log_amplitude == torch.tensor(FLOOR).log()).all()


# Properties


@given(size=SIZES, images=st.integers(1, 3), channels=st.integers(1, 3), seed=SEEDS)
def test_it_is_the_half_diagonal_of_the_shifted_plane(size, images, channels, seed):
    x = noise(images, channels, size, size, seed=seed)
    plane = np.fft.fftshift(np.fft.fft2(x.numpy()), axes=(2, 3))
    diagonal = np.log(np.abs(plane) / size).mean(axis=(0, 1)).diagonal()
    towards_minus_pi = diagonal[size // 2 :: -1]  # from the centre; the plane of a real image is symmetric about it
    assert spectrum(x).log_amplitude.numpy() == pytest.approx(towards_minus_pi, abs=1e-9)


@given(size=SIZES, factor=st.floats(0.01, 100), seed=SEEDS)
def test_a_factor_shifts_the_log_amplitude_and_leaves_the_relative_one(size, factor, seed):
    x = noise(2, 2, size, size, seed=seed)
    before, after = spectrum(x), spectrum(factor * x)
    assert torch.allclose(after.log_amplitude, before.log_amplitude + math.log(factor), rtol=0, atol=1e-9)
    assert torch.allclose(after.relative_log_amplitude, before.relative_log_amplitude, rtol=0, atol=1e-9)
    assert after.relative_log_amplitude[0] == 0


@given(size=SIZES, down=st.integers(0, 20), right=st.integers(0, 20), seed=SEEDS)
def test_it_does_not_see_where_things_are(size, down, right, seed):
    x = noise(2, 2, size, size, seed=seed)
    moved = x.roll((down, right), dims=(2, 3))
    assert torch.allclose(spectrum(moved).log_amplitude, spectrum(x).log_amplitude, rtol=0, atol=1e-9)


@given(size=SIZES, cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4), seed=SEEDS)
def test_batches_add_up_to_one(size, cuts, seed):
    x = noise(sum(cuts), 2, size, size, seed=seed)
    mean = MeanSpectrum()
    for batch in x.split(cuts):
        mean.add(batch)
    whole = spectrum(x)
    assert torch.allclose(mean.result().log_amplitude, whole.log_amplitude, rtol=0, atol=1e-12)
    assert mean.result().count == whole.count == sum(cuts)


def test_every_image_and_channel_counts_the_same():
    x = noise(4, 3, 8, 8) * torch.tensor([1.0, 5.0, 25.0])[:, None, None]
    apart = torch.stack([spectrum(each[None, None]).log_amplitude for each in x.flatten(0, 1)])
    assert torch.allclose(spectrum(x).log_amplitude, apart.mean(dim=0), rtol=0, atol=1e-12)


# Shapes, types, errors


@pytest.mark.parametrize(
    ("size", "expected"), [(8, [0, 0.25, 0.5, 0.75, 1]), (7, [0, 2 / 7, 4 / 7, 6 / 7]), (2, [0, 1]), (1, [0])]
)
def test_frequencies_are_in_units_of_pi(size, expected):
    found = spectrum(noise(1, 1, size, size))
    assert found.frequencies.tolist() == pytest.approx(expected)
    assert len(found.log_amplitude) == len(found.relative_log_amplitude) == len(expected)
    assert half_diagonal(size).tolist() == found.frequencies.tolist()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_real_type_gives_float64(dtype):
    x = (noise(8, 1, 8, 8) * 20 + 100).to(dtype)
    found = spectrum(x)
    assert found.log_amplitude.dtype == found.frequencies.dtype == found.relative_log_amplitude.dtype == torch.float64
    assert torch.allclose(found.log_amplitude, spectrum(x.double()).log_amplitude, rtol=0, atol=1e-4)


def test_memory_order_does_not_matter():
    x = noise(2, 3, 8, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(spectrum(last).log_amplitude, spectrum(x).log_amplitude, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 8, 7), (1, 8, 8), (8, 8), (1, 1, 0, 0), (0, 1, 8, 8), (1, 1, 8, 8, 8)])
def test_what_is_not_square_or_empty_is_refused(shape):
    with pytest.raises(ValueError, match="must be square"):
        log_amplitudes(torch.zeros(shape))


def test_sizes_are_not_mixed_even_where_they_have_as_many_frequencies():
    mean = MeanSpectrum()
    mean.add(noise(1, 1, 8, 8))
    with pytest.raises(ValueError, match="9 pixels a side cannot be averaged with 8"):
        mean.add(noise(1, 1, 9, 9))


def test_no_images_have_no_spectrum():
    with pytest.raises(ValueError, match="no spectrum of none"):
        MeanSpectrum().result()


def test_a_result_stands():
    mean = MeanSpectrum()
    mean.add(noise(1, 1, 8, 8))
    result = mean.result()
    before = result.log_amplitude.clone()
    mean.add(noise(3, 1, 8, 8, seed=1))
    assert torch.equal(result.log_amplitude, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.count = 5
