"""A trained ensemble as a model of diffusers: what the pipeline of an exported folder is made of.

Import this module before diffusers: beside a CPU-only torch, diffusers cannot import torchvision by itself.
Shapes: ``B`` batch, ``C H W`` what is denoised, an image or its latent.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from meme.config.schema import Config
from meme.data.first_stage import FirstStage
from meme.diffusion.ensemble import Ensemble
from meme.diffusion.sampler import guided, starting_noise, to_uint8
from meme.errors import UserError
from meme.network.unet import build_expert
from meme.support.seeding import generator
from meme.support.torchvision_compat import make_torchvision_importable

make_torchvision_importable()

from diffusers import AutoencoderKL, ConfigMixin, ModelMixin, SchedulerMixin, VQModel  # noqa: E402
from diffusers.configuration_utils import register_to_config  # noqa: E402

Autoencoder: TypeAlias = VQModel | AutoencoderKL
_VARIANCES = ("learned", "learned_range")  # of schedulers that take a variance beside the noise


class Experts(ModelMixin, ConfigMixin):
    """All experts of an ensemble, and the settings they were trained with. ``forward(x, t)`` runs the expert whose interval
    holds t.

    ``settings`` is a `meme.config.schema.Config` as a mapping. ``save_pretrained`` and ``from_pretrained`` keep it as
    ``config.json`` beside one safetensors file. Raises pydantic's ``ValidationError`` for settings that contradict each other.
    """

    @register_to_config
    def __init__(self, settings: dict[str, Any]):
        super().__init__()
        self.settings = Config.model_validate(settings)
        experts = [build_expert(self.settings, number + 1) for number in range(len(self.settings.experts))]
        self.experts = nn.ModuleList(experts)
        self.ensemble = Ensemble(self.settings, experts)
        self.register_state_dict_post_hook(_contiguous)  # safetensors holds nothing else, and channels_last is not

    def forward(self, x: Tensor, t: float, labels: Tensor | None = None) -> Tensor:
        """Return the noise predicted in x_t (B, C, H, W), with a learned variance (B, 2C, H, W); float32. ``labels`` (B,) count
        from 0."""
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last)
        return self.ensemble.denoise(x, t, labels)

    def denoiser(
        self, scheduler: SchedulerMixin, count: int, labels: Sequence[int] | None = None, guidance_scale: float | None = None
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of x_t and t whose result is the input that ``scheduler`` takes: the noise, with the variance only
        where it takes one.

        ``labels`` are the classes of ``count`` images, from 0. None gives image i the class i modulo their number, as ``meme
        sample`` does. ``guidance_scale`` None is the trained ensemble's. Raises ``UserError`` for labels or a scale that the
        network cannot take.
        """
        scale = self.settings.sampling.guidance_scale if guidance_scale is None else guidance_scale
        classes = self.settings.network.classes
        _check_guidance(classes, count, labels, scale)
        chosen = torch.tensor([index % max(classes, 1) for index in range(count)] if labels is None else list(labels))
        denoise = guided(self, chosen.to(self.device), scale, classes)
        channels = None if scheduler.config.get("variance_type") in _VARIANCES else self.settings.image.channels
        return lambda x, t: denoise(x, t.item())[:, :channels]

    def starting_noise(self, count: int, seed: int) -> Tensor:
        """Return standard normal noise (B, C, H, W) on the experts' device: that of ``meme sample``. Image i's is a function of
        (seed, i)."""
        return starting_noise(self.settings.image, seed, 0, count).to(self.device).contiguous(memory_format=torch.channels_last)

    def decode(self, x: Tensor, autoencoder: Autoencoder | None) -> np.ndarray:
        """Turn denoised images or latents (B, C, H, W) into images: float32 (B, H, W, channels) in [0, 1], multiples of
        1/255."""
        stage, image = self.settings.first_stage, self.settings.image
        if stage is not None:
            if autoencoder is None:
                raise ValueError("autoencoder: this ensemble denoises latents, which only their first stage can decode")
            pixels = self.settings.pixels
            shapes = {"latent_shape": _shape(image), "pixel_shape": _shape(pixels)}
            first_stage = FirstStage(config=stage, id="", model=autoencoder, device=autoencoder.device, **shapes)
            x = first_stage.decode(x / (stage.scale_factor or 1.0))
        return to_uint8(x).permute(0, 2, 3, 1).cpu().numpy().astype(np.float32) / 255


def fresh_noise(scheduler: SchedulerMixin, settings: Config, count: int, seed: int, t: Tensor) -> dict[str, Any]:
    """Return the arguments of ``scheduler.step`` at ``t`` that it takes: DDIM's eta, and one source of fresh noise per
    image."""
    sources = [generator(seed, "fresh noise", index, str(t.item())) for index in range(count)]
    offered = {"generator": sources, "eta": settings.sampling.eta}
    return {name: offered[name] for name in offered.keys() & inspect.signature(scheduler.step).parameters.keys()}


def _shape(image) -> tuple[int, int, int]:
    return image.channels, image.size, image.size


def _check_guidance(classes: int, count: int, labels: Sequence[int] | None, scale: float) -> None:
    if not classes and (labels is not None or scale != 1):
        raise UserError("labels and guidance_scale: this ensemble knows no classes; leave them out")
    if labels is not None and not (len(labels) == count and all(0 <= label < classes for label in labels)):
        raise UserError(f"labels: needs one for each of {count} images, from 0 to {classes - 1}, not {list(labels)}")


def _contiguous(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: dict) -> None:
    for name, tensor in state.items():
        state[name] = tensor.contiguous()
