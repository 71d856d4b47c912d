"""The transform of the frequency analysis: log amplitude over frequency on the half diagonal of the Fourier plane.

Park and Kim 2022, "How Do Vision Transformers Work?", as the paper's Appendix E follows it. Here the amplitudes are those of
the orthonormal transform, so that white noise of unit variance has amplitude 1 (root mean square) at every size; the relative
log amplitude does not depend on that choice. And pi itself, where the size is even, belongs to the half diagonal.

Shapes: ``B`` images, ``C`` channels, ``S`` pixels a side, ``K = S // 2 + 1`` frequencies.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

FLOOR = 1e-6  # least amplitude that is told from none: the rounding of float32, and Park and Kim's own guard of the logarithm
_EULER_GAMMA = 0.5772156649015329


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The mean of the log amplitudes of some images, or feature maps, over all their channels."""

    frequencies: Tensor
    """(K,) float64, in units of pi and of both axes alike: from 0 to 1 where S is even, to (S - 1) / S where it is odd."""
    log_amplitude: Tensor
    """(K,) float64, natural logarithm."""
    count: int
    """Images averaged over."""

    @property
    def relative_log_amplitude(self) -> Tensor:
        """Return (K,) float64: the log amplitude minus that of frequency 0, as the figures of both papers show it."""
        return self.log_amplitude - self.log_amplitude[0]


class MeanSpectrum:
    """The mean spectrum of images that arrive in batches. Up to float64 rounding it does not depend on how they are batched."""

    def __init__(self):
        self._size = 0  # S of all images; 0 before the first
        self._total = torch.zeros((), dtype=torch.float64)  # then (K,): sum of log amplitudes
        self._maps = 0  # images x channels in that sum
        self._images = 0

    def add(self, images: Tensor) -> None:
        """Add images of any real type (B, C, S, S). Raises ``ValueError`` if they are not square or differ in size from earlier
        ones."""
        logs = log_amplitudes(images)
        size = images.shape[-1]
        if self._size not in (0, size):
            raise ValueError(f"images: {size} pixels a side cannot be averaged with {self._size}")
        self._size = size
        self._total = self._total + logs.sum(dim=(0, 1), dtype=torch.float64)
        self._maps += logs.shape[0] * logs.shape[1]
        self._images += logs.shape[0]

    def result(self) -> Spectrum:
        """Return the mean so far, on the CPU. Raises ``ValueError`` before the first image."""
        if not self._maps:
            raise ValueError("images: there is no spectrum of none")
        return Spectrum(half_diagonal(self._size), (self._total / self._maps).cpu(), self._images)


def half_diagonal(size: int) -> Tensor:
    """Return the frequencies of images with ``size`` pixels a side: (K,) float64, in units of pi."""
    return 2 * torch.arange(size // 2 + 1, dtype=torch.float64) / size


def spectrum(images: Tensor) -> Spectrum:
    """Return the mean spectrum of one batch (B, C, S, S)."""
    mean = MeanSpectrum()
    mean.add(images)
    return mean.result()


def log_amplitudes(images: Tensor) -> Tensor:
    """Return the natural logarithms of the amplitudes at frequencies (w, w), w from 0 to pi: (B, C, S, S) to (B, C, K).

    No value is below log(``FLOOR``). Raises ``ValueError`` for images that are not square, since their diagonal has no single
    frequency, and for an empty batch.
    """
    if images.ndim != 4 or images.shape[-1] != images.shape[-2] or not images.numel():
        raise ValueError(f"images: must be square and at least one, (B, C, S, S), not {tuple(images.shape)}")
    values = (images if images.dtype == torch.float64 else images.float()).contiguous()  # thrice as fast as channels_last
    coefficients = torch.fft.rfft2(values, norm="ortho").diagonal(dim1=-2, dim2=-1)  # (S, K): its diagonal has all K
    return coefficients.abs().clamp(min=FLOOR).log()


def white_noise(frequencies: Tensor) -> Tensor:
    """Return the expected log amplitude of Gaussian white noise of unit variance, at frequencies in units of pi: (K,) to (K,)
    float64.

    The coefficients of a real image are real at 0 and at pi and complex between. Both have the same power, but the mean of the
    logarithm is -(gamma + log 2) / 2 of the real ones and -gamma / 2 of the complex: flat, less 0.35 at both ends.
    """
    is_real = ((frequencies == 0) | (frequencies == 1)).double()
    return -(_EULER_GAMMA + is_real * math.log(2)) / 2
