"""A trained ensemble as a folder that diffusers opens."""
