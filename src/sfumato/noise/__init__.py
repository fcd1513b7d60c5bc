"""How data is destroyed: schedules in log-SNR, the Gaussian process, and what denoisers are."""

from .blurring import BlurringProcess, Constant
from .denoiser import Denoiser, DiscreteDenoiser, DiscretePrediction, DiscreteProcess
from .process import GaussianProcess, Prediction
from .rolling import Window
from .schedule import (
    Cosine,
    DiscreteSchedule,
    Karras,
    LinearBeta,
    RectifiedFlow,
    ScaledLinearBeta,
    Schedule,
)
from .shift import Bounded, Interpolated, Shifted

__all__ = [
    "BlurringProcess",
    "Bounded",
    "Constant",
    "Cosine",
    "Denoiser",
    "DiscreteDenoiser",
    "DiscretePrediction",
    "DiscreteProcess",
    "DiscreteSchedule",
    "GaussianProcess",
    "Interpolated",
    "Karras",
    "LinearBeta",
    "Prediction",
    "RectifiedFlow",
    "ScaledLinearBeta",
    "Schedule",
    "Shifted",
    "Window",
]
