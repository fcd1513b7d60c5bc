"""Stable Diffusion in one file: the original layout of 1.x, 2.x and XL, read and written by one table of names."""
