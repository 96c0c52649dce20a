"""What steps cost on this machine, found by a few steps of short sequences before the first request."""

import itertools
from collections.abc import Callable, Sequence

import numpy as np

from ..core.ids import SlotId
from ..core.messages import EngineInfo
from ..core.plan import BatchPlan, Decodes, IntArray, PageGrants, SlotAssignment, StepOutput
from ..core.request import SamplingParams
from ..core.speculation import DraftMethod
from ..speculation.drafter import Draw, Proposals
from ..speculation.history import TokenHistory
from .proposed import Proposed

_COUNTS = (1, 8, 2, 4, 16, 32, 64)
"""In the order in which they are worth knowing, should there be no time for all."""
_REPEATS = 5
_ROW_SECONDS = 0.2
_DRAFT_SECONDS = 0.1
_DEPTH = 4
"""Tokens of the proposals that are timed."""


class AnyTokens:
    """A drafter that always proposes as much as it may, whatever it is: for steps that are only timed."""

    method: DraftMethod = "ngram"
    num_bytes = 0

    def assign(self, slot: int) -> None:
        """See `Drafter`."""

    def clear(self) -> None:
        """See `Drafter`."""

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        """See `Drafter`."""
        return Proposals(np.zeros((len(slots), int(most.max())), np.int32), most)


class CostProbe:
    """Times steps of sequences of one full page and a token, in the engine's first slots and pages."""

    def __init__(self, info: EngineInfo, most: int, num_slots: int, max_rows: int) -> None:
        """most: draft tokens of a sequence; max_rows: of a step."""
        heads, size = info.model.num_layers * info.model.num_kv_heads, info.page_size
        self._start = size if info.max_model_len > size + most else 0
        self._most = min(most, info.max_model_len - 1 - self._start)
        columns = -(-(self._start + 1 + self._most) // size)
        slots = min(num_slots, info.num_pages // (heads * columns), max(_COUNTS))
        self._max_rows = min(max_rows, slots * (1 + self._most))
        self.num_pages = slots * heads * columns
        """Pages that were written, the first ones."""
        # The last three tokens have come up before, and no more than these: n-grams find something to propose, yet
        # leave it to a model where there is one too.
        places = range(self._start, -1, -1)
        prompt = tuple((i % 4 if i % 4 < 3 else 3 + i // 4) % info.model.vocab_size for i in places)
        params, seed = SamplingParams(temperature=0.0), 0
        length, start = info.max_model_len, self._start
        # Each in a namespace of its own, so that none drafts with what was computed for another.
        self._assignments = tuple(
            SlotAssignment(SlotId(slot), params, seed, (), prompt, (), length, start, namespace=(slot,))
            for slot in range(slots)
        )
        pages = np.arange(self.num_pages, dtype=np.int32)
        of_slot = pages % (heads * columns)
        self._grants = PageGrants(pages // (heads * columns), of_slot // columns, of_slot % columns, pages)

    def rows(self, step: Callable[[BatchPlan], StepOutput], rehearse: bool) -> list[tuple[int, float]]:
        """(rows, seconds) of steps, ascending; sequences bring as many draft tokens as they may (`AnyTokens`).

        rehearse: whether the first step of each size is another one, because kernels are compiled and graphs captured.
        """
        if self.num_pages == 0:
            return []

        def seconds(rows: int) -> float:
            step(BatchPlan((), self._assignments))
            output = step(self._plan(rows, 1 + self._most))
            return output.forward_seconds + output.sample_seconds

        step(BatchPlan((), self._assignments, grants=self._grants))
        counts = [count for count in _COUNTS if count <= self._max_rows]
        for count in counts if rehearse else ():
            seconds(count)
        return _measure(counts, seconds, _ROW_SECONDS)

    def drafts(
        self, step: Callable[[BatchPlan], object], propose: Callable[[BatchPlan], Proposed]
    ) -> list[tuple[int, float]]:
        """(sequences, seconds per token of depth) of proposals, ascending. `step` need only take in assignments for
        who drafts with a cache of its own."""
        depth = min(_DEPTH, self._most)
        if self.num_pages == 0 or depth == 0:
            return []

        def seconds(sequences: int) -> float:
            proposed = propose(self._plan(sequences * (1 + depth), 1 + depth))
            return proposed.seconds / max(1, int(proposed.counts.max()))

        step(BatchPlan((), self._assignments))
        slots = len(self._assignments)
        propose(self._plan(slots * (1 + depth), 1 + depth))  # the drafter reads what is known
        return _measure([count for count in _COUNTS if count <= slots], seconds, _DRAFT_SECONDS)

    def _plan(self, rows: int, width: int) -> BatchPlan:
        """A step of so many rows, at most `width` a sequence."""
        count = -(-rows // width)
        slots, starts = np.arange(count, dtype=np.int32), np.full(count, self._start, np.int32)
        ids = np.full(count, self._assignments[0].prompt_ids[-1], np.int32)
        drafts = (np.minimum(width, rows - slots * width) - 1).astype(np.int32)
        asked = (drafts, drafts) if drafts.any() else ()
        return BatchPlan((), decodes=Decodes(slots, starts, ids, *asked))


def _measure(counts: Sequence[int], seconds: Callable[[int], float], budget: float) -> list[tuple[int, float]]:
    """Least `seconds` by count, ascending: of the first two counts, and of more while the budget lasts.

    All counts are tried in turn, so that a machine that is busy for a while spoils one time of each; the first two
    twice at least, for what is found much too dear here is hardly ever tried again. What is left of that goes where
    more takes less: nothing takes longer than something larger did.
    """
    times: dict[int, float] = {}
    spent = 0.0
    for turn, count in itertools.product(range(_REPEATS), counts):
        if spent > budget and (turn > 1 or count not in counts[:2]):
            continue
        taken = seconds(count)
        times[count] = min(taken, times.get(count, taken))
        spent += taken
    least = float("inf")
    found: list[tuple[int, float]] = []
    for count, taken in sorted(times.items(), reverse=True):
        least = min(least, taken)
        found.append((count, least))
    return found[::-1]
