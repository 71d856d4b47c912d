"""One expert trained by several processes: which part of a batch is whose, and how their gradients become one.

Every process takes its rows of the same batch, timesteps and noise, so that the mean of their gradients is that of the whole
batch: two processes train what one does, but for the order of float sums. The processes are those of ``torch.distributed``;
who starts them is no matter of this package.
"""

from dataclasses import dataclass

from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from meme.errors import UserError


@dataclass(frozen=True)
class Shard:
    """The part of one process. The first one alone writes files and reports."""

    rank: int = 0
    ranks: int = 1

    @classmethod
    def of_this_process(cls) -> "Shard":
        """In the process group that this process has joined; ``WHOLE`` where there is none."""
        return cls(distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else WHOLE

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def check(self, batch_size: int) -> None:
        """``UserError`` for a batch that can't be dealt out evenly: then the mean of the parts would not be that of the whole."""
        if batch_size % self.ranks:
            raise UserError(f"training.batch_size: {batch_size} can't be dealt out evenly to {self.ranks} processes of an expert")

    def rows(self, whole: Tensor) -> Tensor:
        """(B, ...) to this process's (B / ranks, ...)."""
        size = len(whole) // self.ranks
        return whole[self.rank * size : (self.rank + 1) * size]

    def joined(self, network: nn.Module) -> nn.Module:
        """``network``, its gradients averaged over the processes as they arise."""
        return DistributedDataParallel(network, broadcast_buffers=False) if self.ranks > 1 else network

    def mean(self, value: Tensor) -> float:
        """Over the processes, the same number in each."""
        if self.ranks > 1:
            value = value.clone()
            distributed.all_reduce(value)
        return float(value) / self.ranks


WHOLE = Shard()
