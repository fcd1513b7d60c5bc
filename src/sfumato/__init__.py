"""Train, speed up, customise, edit, erase and audit image diffusion models."""

__version__ = "0.1.0"
