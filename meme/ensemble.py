"""Experts and their intervals as one ``denoise(x, t)``. It does not know how sampling works."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from meme.config import Config


class Ensemble(nn.Module):
    """The cascade of experts: at timestep t the one whose interval holds t denoises."""

    def __init__(self, config: Config, experts: Sequence[nn.Module]):
        super().__init__()
        if len(experts) != len(config.experts):
            raise ValueError(f"experts: the config has {len(config.experts)}, not {len(experts)}")
        self.config = config
        self.experts = nn.ModuleList(experts)

    def denoise(self, x: Tensor, t: int) -> Tensor:
        """Predicted noise in x_t: (B, C, H, W) to the same, one ``t`` for the whole batch; float32 whatever the device."""
        expert = self.experts[expert_at(self.config, t) - 1]
        timesteps = torch.full((x.shape[0],), t, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda"):
            return expert(x, timesteps).float()


def expert_at(config: Config, t: int) -> int:
    """Number of the expert (1 = least noise) whose interval holds timestep ``t``."""
    for number, expert in enumerate(config.experts, start=1):
        if expert.interval[0] <= t < expert.interval[1]:
            return number
    raise ValueError(f"t: must be 0 to {config.experts[-1].interval[1] - 1}, not {t}")
