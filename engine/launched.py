"""`LaunchedStep`: what the engine keeps of a step between its launch and its end."""

from dataclasses import dataclass, field

from torch import Tensor

from ..core.plan import BatchPlan, IntArray, Runs
from ..core.speculation import CaughtUp
from .expansion import Expansion
from .inputs import LogitLayout
from .observe import StepObserver
from .proposed import Proposed
from .recording import Drawn
from .timer import Moment


@dataclass(frozen=True, slots=True)
class Spent:
    """What proposing took."""

    draft_seconds: float = 0.0
    caught_up: CaughtUp = field(default_factory=CaughtUp)

    @staticmethod
    def by(proposed: Proposed) -> "Spent":
        """What these proposals took."""
        return Spent(proposed.seconds, proposed.caught_up)


NOTHING_SPENT = Spent()


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step on its way through the device. One that computes no token is nothing but its plan."""

    plan: BatchPlan
    """As it is computed."""
    layout: LogitLayout | None = None
    logits: Tensor | None = None
    """[R, V] float32; overwritten when another step is launched."""
    drawn: Drawn | None = None
    """None if nothing is sampled or scored."""
    moments: tuple[Moment, Moment, Moment] | None = None
    """Start and end of the forward pass, and the end of sampling."""
    observer: StepObserver | None = None
    """Who waits to hear which draft tokens were right."""
    spent: Spent = NOTHING_SPENT
    decoded: IntArray | None = None
    """Tokens of the plan's decodes and sequences, where they are there already; then `drawn` is None."""
    runs: Runs | None = None
    """Of the plan's decodes, where they are there already."""
    expansion: Expansion | None = None
    """How the plan came to be, where proposals made it another."""
