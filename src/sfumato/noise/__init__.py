"""How data is destroyed: schedules in log-SNR, the Gaussian process, and what denoisers are."""

from .blurring import BlurringProcess, Constant
from .chain import ChainDenoiser
from .denoiser import Denoiser, DiscreteDenoiser, DiscretePrediction, DiscreteProcess
from .discrete import Absorbing, GaussianTokens, UniformTokens
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
    "Absorbing",
    "BlurringProcess",
    "Bounded",
    "ChainDenoiser",
    "Constant",
    "Cosine",
    "Denoiser",
    "DiscreteDenoiser",
    "DiscretePrediction",
    "DiscreteProcess",
    "DiscreteSchedule",
    "GaussianProcess",
    "GaussianTokens",
    "Interpolated",
    "Karras",
    "LinearBeta",
    "Prediction",
    "RectifiedFlow",
    "ScaledLinearBeta",
    "Schedule",
    "Shifted",
    "UniformTokens",
    "Window",
]
