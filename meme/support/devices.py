"""The differences between devices: the number formats that networks calculate in, and waiting for asynchronous work."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from meme.support.precision import Precision

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolved(device: torch.device | str, precision: Precision) -> Precision:
    """Return the precision that ``auto`` means: bf16 on a GPU of NVIDIA or AMD, fp32 elsewhere."""
    if precision != "auto":
        return precision
    return "bf16" if torch.device(device).type == "cuda" else "fp32"


@contextmanager
def calculating_in(device: torch.device | str, precision: Precision) -> Iterator[None]:
    """Run networks on ``device`` in ``precision`` within the context. Weights stay float32; products are rounded.

    No other code makes an autocast context.
    """
    kind, numbers = torch.device(device).type, resolved(device, precision)
    with torch.autocast(kind, _DTYPES.get(numbers, torch.bfloat16), enabled=numbers in _DTYPES), exact_convolutions(precision):
        yield


@contextmanager
def exact_convolutions(precision: Precision) -> Iterator[None]:
    """Keep convolutions on a GPU from rounding float32 to TF32, as torch lets them, if ``precision`` is fp32."""
    before = torch.backends.cudnn.allow_tf32
    if precision != "fp32" or not before:
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def wait_for(device: torch.device | str) -> None:
    """Wait until ``device`` has finished all submitted work, so that its time can be measured."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
