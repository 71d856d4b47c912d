"""Steps whose gradient is not finite. They are skipped and counted, and too many in a row end the training."""

import math

import torch
from torch import Tensor

from meme.errors import TrainingDiverged
from meme.training.distributed import WHOLE, Shard

MOST_IN_A_ROW = 10  # skipped steps; in a training of fewer than twice as many, half of its steps


def is_skipped(norm: Tensor) -> Tensor:
    """Return 1 where the norm of a gradient () is not finite, else 0, on its device, as torch's fused AdamW takes it."""
    return (~norm.isfinite()).float()


class LossWindow:
    """Losses and skipped steps since the last report. They stay on the device until then, so that no step waits for it."""

    def __init__(self, shard: Shard = WHOLE):
        self._shard = shard
        self._steps: list[tuple[Tensor, Tensor]] = []
        self._in_a_row = 0  # skipped steps at the end of the last window

    def add(self, loss: Tensor, skipped: Tensor) -> None:
        """Add one step: its loss () and whether it was ``skipped`` (), 1 or 0. The loss counts only if the step was not
        skipped."""
        self._steps.append((loss.detach().float(), skipped))

    @property
    def last_was_skipped(self) -> bool:
        """Return whether the latest step was skipped. Waits for the device."""
        return bool(self._steps[-1][1]) if self._steps else self._in_a_row > 0

    def mean(self, number: int, step: int, steps: int) -> float | None:
        """Return the mean loss of the steps taken since the last call, None where none was taken, and begin a new window.

        Raises ``TrainingDiverged`` where too many steps in a row were skipped, or where a loss is not finite though its gradient
        is. ``number``, ``step`` and ``steps`` are the expert's number, its latest step and its last one.
        """
        losses, skipped = (torch.stack(values) for values in zip(*self._steps, strict=True))
        total = self._shard.mean(torch.where(skipped > 0, 0.0, losses).sum())
        flags = [bool(flag) for flag in skipped.tolist()]
        longest, self._in_a_row = _runs(flags, self._in_a_row)
        too_many = longest >= min(MOST_IN_A_ROW, math.ceil(steps / 2))
        if too_many or not math.isfinite(total):
            loss = losses[skipped > 0][-1].item() if any(flags) else total
            raise TrainingDiverged(
                f"expert {number}: loss is {loss} at step {step}, with {longest} steps in a row skipped as their gradients were "
                "not finite; a lower training.learning_rate or a training.gradient_clip may help"
            )
        self._steps.clear()
        return total / flags.count(False) if not all(flags) else None


def _runs(flags: list[bool], before: int) -> tuple[int, int]:
    """Return the lengths of the longest and of the last run of true ``flags``, given that they follow ``before`` true ones."""
    longest = run = before
    for flag in flags:
        run = run + 1 if flag else 0
        longest = max(longest, run)
    return longest, run
