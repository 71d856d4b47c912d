"""Differences between devices: names, number formats of calculations, and waiting for asynchronous work."""

import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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


@dataclass(frozen=True)
class DeviceKind:
    """Devices on which a network takes about the same time."""

    type: str
    """As torch has it: cpu, cuda, mps."""
    name: str
    """A GPU's, or a CPU's model and the number of threads."""


def device_kind(device: torch.device | str, threads: int) -> DeviceKind:
    """Return the kind of ``device``, one of this machine, for a process that calculates with ``threads`` threads on a CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return DeviceKind("cuda", torch.cuda.get_device_name(device))
    if device.type == "cpu":
        return DeviceKind("cpu", f"{_cpu_name()}, {threads} thread{'s' * (threads > 1)}")
    return DeviceKind(device.type, f"{device.type} of {_cpu_name()}")


@cache
def _cpu_name() -> str:
    """Return the model of this machine's CPU, or what comes nearest to it where the system does not name one."""
    with suppress(OSError, subprocess.SubprocessError):
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        fields = dict(_fields(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")))
        if named := fields.get("model name"):
            return named
        if parts := [fields[name] for name in ("CPU implementer", "CPU part", "CPU variant") if name in fields]:  # of ARM
            return f"{platform.machine()} {' '.join(parts)}"
    return platform.processor() or platform.machine() or "CPU"


def _fields(text: str) -> Iterator[tuple[str, str]]:
    """Yield names and values of lines such as ``model name : value``."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        yield name.strip(), " ".join(value.split())
