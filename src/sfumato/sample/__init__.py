"""How data is recovered: time grids, samplers and guidance, for any `sfumato.noise.Denoiser`."""

from . import times
from .consistency import consistency
from .guidance import Clipped, Guided
from .held import held_ddim
from .jumps import JumpSchedule
from .jys import JYS
from .rolling import roll, rollout
from .s2n import S2N
from .samplers import addim, ddim, ddpm, dpmpp_2m, heun, predict, prediction_error
from .scheduler import from_scheduler
from .tokens import euler, k_gillespie, tau_leaping

__all__ = [
    "JYS",
    "S2N",
    "Clipped",
    "Guided",
    "JumpSchedule",
    "addim",
    "consistency",
    "ddim",
    "ddpm",
    "dpmpp_2m",
    "euler",
    "from_scheduler",
    "held_ddim",
    "heun",
    "k_gillespie",
    "predict",
    "prediction_error",
    "roll",
    "rollout",
    "tau_leaping",
    "times",
]
