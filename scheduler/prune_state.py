"""`PruneState`: how far a sequence has forgotten, and when it is to be looked at for that."""

from dataclasses import dataclass

from ..core.plan import IntArray
from ..core.pruning import PruneParams
from ..core.request import Request
from .config import SchedulerConfig
from .footprint import stays_bounded

NEVER = 2**31 - 1
"""More tokens than any sequence has."""


@dataclass(slots=True)
class PruneState:
    """How far a sequence has forgotten. But for the first fields it begins anew on re-entry, unless it was swapped."""

    params: PruneParams
    repeats: bool = False
    """As `PolicyInfo.repeats`."""
    bounded: bool = False
    """As `footprint.stays_bounded`."""
    prefill_end: int = 0
    """Tokens that are pruned as a prompt: those known when it (re-)entered, or the context if that is shorter."""
    last: int = 0
    """Tokens computed when it was last looked at for pruning."""
    pruned: bool = False
    """Entries were forgotten: recomputed from its tokens, the sequence would forget others."""
    counts: IntArray | None = None
    """What the engine would keep, int32 [R], between the commit that says it and the next plan."""
    reason: str = ""
    """Why that was asked."""
    denied: bool = False
    """Nothing came of it: pages are short, or nothing would be dropped. Until more is computed nothing will."""
    repeated: int = 0
    """Leading tokens that the model has repeated, where the policy asks for that."""
    repeating: int = 0
    """Tokens that it repeats in the step in flight."""
    begins_again: bool = False
    """It was preempted with nothing forgotten but by its pruned prefix: with that it will be as it was."""
    context_done: bool = False
    """Its context was pruned, or that was denied, or it began with what others had left of it."""

    @property
    def wakes(self) -> int:
        """Tokens known at which a sequence that decodes must be looked at again; until then it is like any other."""
        if self.counts is not None or self.denied:
            return 0
        if self.params.when == "pressure":
            return NEVER
        if self.repeats:
            return 0 if self.repeated < self.prefill_end else NEVER
        return max(self.last, self.prefill_end) + self.params.every if self.params.every else NEVER

    def context(self, known: int) -> int:
        """How many of `known` tokens are pruned before the others are computed."""
        return min(self.params.context or known, known)

    def enter(self, known: int) -> None:
        """The sequence begins (again) with no page and `known` tokens."""
        self.prefill_end = self.context(known)
        self.last, self.repeated, self.repeating = 0, 0, 0
        if self.params.target(self.prefill_end) == self.prefill_end and self.params.budget != "threshold":
            self.repeated = self.prefill_end  # nothing will be dropped, whatever that would show
        self.pruned = self.denied = self.context_done = False
        self.counts = None

    def begin_pruned(self) -> None:
        """It begins with what others had left of its context, as if it had been pruned itself."""
        self.last = self.repeated = self.prefill_end
        self.pruned = self.context_done = True

    def cancel(self) -> None:
        """What was chosen is not carried out: it is to be asked again."""
        if self.counts is not None:
            self.counts, self.denied = None, True


def prune_state(request: Request, config: SchedulerConfig) -> PruneState | None:
    """None for who asks for nothing, and for who selects what to read but forgets nothing."""
    params = request.prune
    if params is None or not params.forgets or config.policies[params.policy].selects:
        return None
    return PruneState(params, config.policies[params.policy].repeats, stays_bounded(params, config))
