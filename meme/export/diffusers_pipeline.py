"""The pipeline of an exported folder, which holds a copy of this file as pipeline.py. It needs ``pip install meme-nas``.

Image i is a function of (weights, seed, i); with the scheduler that comes with the folder it is the one ``meme sample`` draws.
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, SchedulerMixin

from meme.diffusers_model import Autoencoder, Experts, fresh_noise


class MemePipeline(DiffusionPipeline):
    """``pipe(batch_size=4, seed=0).images``; ``output_type`` pil or np; ``num_inference_steps`` None: as it was trained to be."""

    _optional_components = ["vae"]  # noqa: RUF012

    def __init__(self, experts: Experts, scheduler: SchedulerMixin, vae: Autoencoder | None = None):
        super().__init__()
        self.register_modules(experts=experts, scheduler=scheduler, vae=vae)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int | None = None,
        seed: int = 0,
        labels: list[int] | None = None,
        guidance_scale: float | None = None,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        settings, scheduler = self.experts.settings, self.scheduler
        scheduler.set_timesteps(num_inference_steps or settings.sampling.steps)
        denoise = self.experts.denoiser(scheduler, batch_size, labels, guidance_scale)
        x = self.experts.starting_noise(batch_size, seed) * scheduler.init_noise_sigma
        for t in self.progress_bar(scheduler.timesteps):
            predicted = denoise(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(predicted, t, x, **fresh_noise(scheduler, settings, batch_size, seed, t)).prev_sample
        images = self.experts.decode(x, self.vae)
        return ImagePipelineOutput(images=self.numpy_to_pil(images) if output_type == "pil" else images)
