"""How data is recovered: time grids, samplers and guidance, for any `sfumato.noise.Denoiser`."""

from . import times
from .consistency import consistency
from .guidance import Clipped, Guided
from .rolling import roll, rollout
from .s2n import S2N
from .samplers import addim, ddim, ddpm, dpmpp_2m, heun, predict, prediction_error
from .scheduler import from_scheduler

__all__ = [
    "S2N",
    "Clipped",
    "Guided",
    "addim",
    "consistency",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "from_scheduler",
    "heun",
    "predict",
    "prediction_error",
    "roll",
    "rollout",
    "times",
]
