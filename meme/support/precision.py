"""Number formats to calculate in."""

from typing import Literal

Precision = Literal["auto", "bf16", "fp16", "fp32"]
