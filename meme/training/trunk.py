"""The trunk: one network trained on all timesteps, from which every expert of an ensemble starts.

eDiff-I (Balaji et al. 2022) and TDC (Zhang et al. 2023) train their experts in this way. ``training.trunk_steps`` is the length
of its training. 0 means no trunk, as in the paper.
"""

import torch
from torch import Tensor, nn

from meme.config.presets import PAPER_SHARES, hand_made_split
from meme.config.schema import Config
from meme.errors import UserError

TRUNK_ROW = 2  # of the paper's four experts, the one whose split the trunk has: neither end of the range


def with_trunk_share(config: Config, share: float) -> Config:
    """Return ``config`` with ``share`` of all its training steps given to a trunk, and the rest dealt out to the experts.

    The sum of all steps stays the same, to one step an expert. 0 is no trunk. Raises ``UserError`` for a share below 0 or not
    below 1, and where the share leaves an expert no step.
    """
    if not 0 <= share < 1:
        raise UserError(f"trunk_share: must be at least 0 and below 1, not {share:g}")
    training, count = config.training, len(config.experts)
    total = count * training.steps + training.trunk_steps
    trunk = round(share * total)
    steps = (total - trunk) // count
    if steps < 1:
        raise UserError(f"trunk_share: {share:g} of {total} steps leaves {count} experts no step of their own")
    return config.with_(training={"trunk_steps": trunk, "steps": steps})


def trunk_config(config: Config) -> Config:
    """Return the config of the trunk: a single expert on all timesteps, trained for ``config.training.trunk_steps``.

    In the iU-Net its split is that of the paper's second expert, whatever the experts of ``config`` have, so that configs
    that differ in their experts share one trunk.
    """
    network = config.network
    split = hand_made_split(network, TRUNK_ROW, len(PAPER_SHARES)) if network.splits_channels else ()
    trunk = {"interval": (0, config.diffusion.timesteps), "p": 1.0, "low_channels": split}
    training = {"steps": config.training.trunk_steps, "trunk_steps": 0}
    return config.with_(name=f"{config.name}-trunk", experts=[trunk], training=training)


@torch.no_grad()
def start_from_trunk(expert: nn.Module, trunk: nn.Module) -> None:
    """Overwrite the weights of ``expert`` with those of ``trunk``, as far as it has them.

    Where their splits differ, both tensors are slices of a largest one (see ``meme.network.initialization``): the expert takes
    what lies in both slices, and keeps its fresh weights elsewhere. Layers that the trunk lacks stay fresh.
    """
    theirs = dict(trunk.named_modules())
    for name, layer in expert.named_modules():
        if name not in theirs:
            continue
        for kind, own in layer.named_parameters(recurse=False):
            taken = getattr(theirs[name], kind, None)
            if not isinstance(taken, Tensor):
                continue
            own_slice, taken_slice = _slice_of(layer, kind), _slice_of(theirs[name], kind)
            if own_slice and taken_slice:
                _take_common_slice(own, taken, own_slice, taken_slice)
            elif taken.shape == own.shape:
                own.copy_(taken)


def _slice_of(layer: nn.Module, kind: str) -> tuple | None:
    """Return the slice that a layer's tensor is, as (shape of the largest tensor, index), by channels where the layer has that.
    Return None where it is no slice."""
    by_channels: dict = getattr(layer, "channels_of", {})
    return by_channels.get(kind) or getattr(layer, "slice_of", {}).get(kind)


def _take_common_slice(own: Tensor, taken: Tensor, own_slice: tuple, taken_slice: tuple) -> None:
    """Copy into ``own`` the elements of ``taken`` that both slices have; each slice is (shape of the largest tensor, index)."""
    (shape, own_index), (_, taken_index) = own_slice, taken_slice
    largest, is_taken = own.new_zeros(shape), torch.zeros(shape, dtype=torch.bool, device=own.device)
    largest[taken_index] = taken.to(own.device)
    is_taken[taken_index] = True
    own.copy_(torch.where(is_taken[own_index], largest[own_index], own))
