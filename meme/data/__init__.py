"""Images and latents, and how they become batches. Nothing here knows networks."""
