"""Train one expert in several processes: the division of a batch among them, and the averaging of their gradients.

Every process takes its rows of the same batch, timesteps and noise, so that the mean of their gradients is that of the whole
batch. Two processes train the same weights as one, except for the order of float sums. The processes are those of
``torch.distributed``; this package does not start them.
"""

from dataclasses import dataclass

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from meme.errors import UserError


@dataclass(frozen=True)
class Shard:
    """The part of a batch that one process handles. Only the first process writes files and reports."""

    rank: int = 0
    ranks: int = 1

    @classmethod
    def of_this_process(cls) -> "Shard":
        """Return the part of this process in the process group that it has joined; ``WHOLE`` where there is none."""
        return cls(distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else WHOLE

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def check(self, batch_size: int) -> None:
        """Raise ``UserError`` for a batch that cannot be divided evenly, since the mean of the parts would not be that of the
        whole."""
        if batch_size % self.ranks:
            raise UserError(f"training.batch_size: {batch_size} can't be dealt out evenly to {self.ranks} processes of an expert")

    def rows(self, whole: Tensor) -> Tensor:
        """Return this process's rows: (B, ...) to (B / ranks, ...)."""
        size = len(whole) // self.ranks
        return whole[self.rank * size : (self.rank + 1) * size]

    def joined(self, network: nn.Module) -> nn.Module:
        """Wrap ``network`` so that its gradients are averaged over the processes as they arise."""
        return DistributedDataParallel(network, broadcast_buffers=False) if self.ranks > 1 else network

    def mean(self, value: Tensor) -> float:
        """Return the mean of ``value`` over the processes, the same number in each."""
        if self.ranks > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return float(value) / self.ranks


WHOLE = Shard()
