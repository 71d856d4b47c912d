"""The networks: U-Nets of latent diffusion and ADM, and the iU-Net on either. They know neither noise nor training."""
