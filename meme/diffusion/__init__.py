"""The forward process, the losses, the samplers, and the ensemble that they denoise with."""
