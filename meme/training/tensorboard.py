"""Losses of a training in TensorBoard's format, with one run per expert."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from meme.errors import UserError
from meme.training.trainer import Progress, expert_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class LossCurves(AbstractContextManager["LossCurves", None]):
    """A callback that writes every ``Progress`` to ``folder``. A resumed training adds to what is there.

    Raises ``UserError`` where TensorBoard is not installed.
    """

    def __init__(self, folder: Path):
        try:
            from torch.utils.tensorboard import SummaryWriter  # an extra, and slow to import
        except ImportError:
            raise UserError("tensorboard: it is not installed; pip install 'meme-nas[tensorboard]'") from None
        self._new = SummaryWriter
        self._folder, self._writers = folder, dict[int, "SummaryWriter"]()

    def __call__(self, progress: Progress) -> None:
        if progress.expert not in self._writers:
            run = self._folder / expert_file(self._folder, progress.expert).stem
            self._writers[progress.expert] = self._new(run, purge_step=progress.step)
        self._writers[progress.expert].add_scalar("loss", progress.loss, progress.step)

    def __exit__(self, *exception: object) -> None:
        for writer in self._writers.values():
            writer.close()
