"""The families of pipelines that every matrix runs on, each by the name of a fixture that is a tiny one."""

FAMILIES = ["tiny_sd", "tiny_sdxl", "tiny_pixart", "tiny_sd3", "tiny_flux", "tiny_sana"]
