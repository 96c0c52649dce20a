"""`LaunchedStep`: what the engine keeps of a step between its launch and its end."""

from dataclasses import dataclass, field

from torch import Tensor

from ..core.plan import BatchPlan, CaughtUp, IntArray
from .inputs import LogitLayout
from .observe import StepObserver
from .recording import Drawn
from .timer import Moment


@dataclass(frozen=True, slots=True)
class LaunchedStep:
    """A step on its way through the device. One that computes no token is nothing but its plan."""

    plan: BatchPlan
    layout: LogitLayout | None = None
    logits: Tensor | None = None
    """[R, V] float32; overwritten when another step is launched."""
    drawn: Drawn | None = None
    """None if nothing is sampled or scored."""
    moments: tuple[Moment, Moment, Moment] | None = None
    """Start and end of the forward pass, and the end of sampling."""
    observer: StepObserver | None = None
    """Who waits to hear which draft tokens were right."""
    draft_seconds: float = 0.0
    caught_up: CaughtUp = field(default_factory=CaughtUp)
    decoded: IntArray | None = None
    """Tokens of the plan's decodes and sequences, where they are there already; then `drawn` is None."""
