"""The seam that samplers, losses and distillation stand on: anything that undoes noise."""

from __future__ import annotations

from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from .process import GaussianProcess, Prediction


@runtime_checkable
class Denoiser(Protocol):
    """Maps (noisy input, time, conditioning) to a prediction, under the process it was trained for.

    ``process`` is the noise process; ``prediction`` names what ``__call__`` returns ("eps", "v", "x0", ...),
    which ``process.convert`` turns into any other. Time is continuous in [0, 1], 1 = noise, and may be one
    number, one per picture, or any shape that broadcasts against ``z`` (per frame, per element; the rule is
    in `sfumato.noise.process`).
    """

    @property
    def process(self) -> GaussianProcess:
        """What it was trained under."""
        ...

    @property
    def prediction(self) -> Prediction:
        """What a call returns."""
        ...

    def __call__(
        self, z: Float[Tensor, "batch *dims"], t: Float[Tensor, "..."] | float, cond: Any = None
    ) -> Tensor:
        """The prediction for ``z`` at time ``t``, of the shape of ``z``."""
        ...


DiscretePrediction = Literal["posterior", "score", "rates"]


class DiscreteProcess(Protocol):
    """How tokens are destroyed: a Markov chain in continuous time that changes each token by itself.

    Time is continuous in [0, 1], 1 = noise, as for a `GaussianProcess`.
    """

    @property
    def states(self) -> int:
        """How many values a token has, the mask included."""
        ...

    def diffuse(
        self, x: Int[Tensor, "batch *dims"], t: Float[Tensor, "..."] | float, uniform: Float[Tensor, "batch *dims"]
    ) -> Int[Tensor, "batch *dims"]:
        """Tokens at time ``t`` of the clean ``x``. The same ``uniform`` numbers in [0, 1) at two times couple the two
        monotonically; with an absorbing state that is one path: what is masked early is masked later, too."""
        ...

    def convert(
        self,
        pred: Float[Tensor, "batch *dims states"],
        x: Int[Tensor, "batch *dims"],
        t: Float[Tensor, "..."] | float,
        source: DiscretePrediction,
        target: DiscretePrediction,
    ) -> Float[Tensor, "batch *dims states"]:
        """A prediction of kind ``source`` at (x, t), as one of kind ``target``:

        - ``"posterior"``: p(x0 = y | x_t) for each token, given all of them;
        - ``"score"``: the ratio p_t(x with y there) / p_t(x), 1 at the token's own value;
        - ``"rates"``: how often per unit of time a token jumps to y as time runs back; 0 at its own value.
        """
        ...


@runtime_checkable
class DiscreteDenoiser(Protocol):
    """A `Denoiser` of tokens: maps (tokens, time, conditioning) to what each of them may have been, or may become.

    ``process`` is the chain it was trained for; ``prediction`` names what ``__call__`` returns, which
    ``process.convert`` turns into what a sampler needs: rates for tau-leaping, Gillespie's rule and the choice of their
    steps, posteriors for a last step that leaves no noise.
    """

    @property
    def process(self) -> DiscreteProcess:
        """What it was trained under."""
        ...

    @property
    def prediction(self) -> DiscretePrediction:
        """What a call returns."""
        ...

    def __call__(
        self, x: Int[Tensor, "batch *dims"], t: Float[Tensor, "..."] | float, cond: Any = None
    ) -> Float[Tensor, "batch *dims states"]:
        """The prediction for the tokens ``x`` at time ``t``, a number for every value of each."""
        ...
