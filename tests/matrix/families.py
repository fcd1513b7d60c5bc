"""The families of pipelines that every matrix runs on, each by the name of a fixture that is a tiny one."""

FAMILIES = [
    "tiny_sd", "tiny_sdxl", "tiny_pixart", "tiny_sd3", "tiny_flux", "tiny_sana", "tiny_qwen", "tiny_zimage",
    "tiny_flux2", "tiny_omnigen",
]  # fmt: skip

OF_A_KIND = {"tiny_sdxl", "tiny_flux", "tiny_sana", "tiny_qwen", "tiny_flux2", "tiny_omnigen"}
"""Families with an anatomy of which another one is in the list: a U-Net, a transformer with cross-attention, one with
two streams, one with a single stream. Methods that train or search meet these in the slow tests only; what does not
(closed forms, patches, samplers) meets every family always."""
