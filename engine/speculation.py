"""`Speculation`: proposals for the sequences of a step that may have some. Whether they are right, the sampler says."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import NamedTuple

import numpy as np

from ..core.ids import SlotId
from ..core.plan import (
    BatchPlan,
    IntArray,
    Runs,
    SequenceOutput,
    SequencePlan,
    SlotAssignment,
)
from ..core.speculation import MAX_DRAFT_TOKENS
from ..speculation.drafter import Drafter, Foresight, Memory
from ..speculation.history import TokenHistory
from .expansion import Expansion
from .proposal_draw import ProposalDraw
from .proposed import Asked, Proposed, shapes, usable
from .sampler import Sampler
from .trees import MASKED_ROWS, first_chain

_MOST_WAITING = 64
"""Steps that the history may be behind."""


class Report(NamedTuple):
    """What drafters have to say of a step: see `StepOutput`."""

    foreseen: IntArray | None = None
    foresight_seconds: float = 0.0
    recalled: tuple[int, ...] = ()


NOTHING_TOLD = Report()


class Speculation:
    """A drafter, and the known tokens of the slots, which it continues."""

    def __init__(
        self,
        drafter: Drafter,
        sampler: Sampler,
        max_length: int,
        readers: Sequence[Callable[[SlotId], bool]] = (),
    ) -> None:
        """max_length: of a sequence; readers: whether they look at a slot's rows, and take each to follow the one
        before it."""
        self.drafter = drafter
        self._sampler = sampler
        self._readers = readers
        self._history = TokenHistory(sampler.table.num_slots, max_length)
        self._decoded: list[tuple[IntArray, IntArray]] = []
        """Slots and tokens of the last steps' decodes, which are not in the history yet: while nobody drafts, nobody
        reads it, and many steps enter it at once."""

    @property
    def drafter(self) -> Drafter:
        """Who proposes; another may take its place between steps."""
        return self._drafter

    @drafter.setter
    def drafter(self, drafter: Drafter) -> None:
        self._drafter = drafter
        # Asked once: to ask whether somebody fulfils a protocol takes as long as to foresee for a sequence.
        self._foresight = drafter if isinstance(drafter, Foresight) else None
        self._memory = drafter if isinstance(drafter, Memory) else None

    def assign(self, assignment: SlotAssignment) -> None:
        """A sequence enters the slot."""
        self._enter_decoded()
        self._history.assign(assignment)
        self.drafter.assign(assignment.slot)

    def propose(self, plan: BatchPlan) -> Proposed:
        """Proposals for a plan that asks for some."""
        started = time.perf_counter()
        self._enter_decoded()
        asked = Asked.of(plan)
        assert (asked.known == self._history.known[asked.slots]).all(), "the history is of other tokens"
        draw = ProposalDraw(self._sampler, asked.slots, asked.known, int(asked.most.max()), asked.most_drawn)
        proposals = self.drafter.propose(self._history, asked.slots, asked.most, draw)
        parents, chains = shapes(proposals, asked.most)
        counts = usable(proposals, asked.most, self._sampler.table.vocab_size)
        places, scaled = draw.drawn_from(chains) or (None, None)
        seconds = time.perf_counter() - started
        return Proposed(
            asked, proposals.tokens, counts, draw.drew, parents, places, scaled, seconds, proposals.caught_up
        )

    def expand(self, plan: BatchPlan, proposed: Proposed) -> Expansion:
        """The plan with what is proposed."""
        return Expansion.of(plan, proposed, self._with)

    def _with(self, part: SequencePlan, drafts: tuple[int, ...], parents: tuple[int, ...], drew: bool) -> SequencePlan:
        """The sequence's part with its proposals; drew: whether a model drew them."""
        # Grammars and policies that watch attention or select pages know no trees, and a row's mask has only so many
        # bits: there the first path of a tree must do.
        rows, grammars = len(part.token_ids) + len(drafts), self._sampler.grammars
        bound = grammars.binds(part.slot)
        if parents and (bound or rows > MASKED_ROWS or any(reads(part.slot) for reads in self._readers)):
            nodes = first_chain(parents)
            drafts, parents = tuple(drafts[node] for node in nodes), tuple(range(-1, len(nodes) - 1))
        if parents and parents == tuple(range(-1, len(drafts) - 1)):
            parents = ()
        if bound:
            # Of drawn tokens, one that is not allowed stays: that it is rejected is a part of its draw.
            drafts = drafts[: grammars.allowed(part.slot, drafts) + drew]
            parents = parents[: len(drafts)]
        count = len(drafts)
        ids = part.token_ids + drafts
        return replace(part, token_ids=ids, drafts=count, model_drafts=count if drew else 0, parents=parents)

    def note(
        self,
        plan: BatchPlan,
        decoded: IntArray,
        outputs: tuple[SequenceOutput, ...],
        apart: Mapping[int, SequenceOutput],
        runs: Runs | None = None,
    ) -> None:
        """What a step has made known, see `StepOutput`."""
        if runs is not None:
            self._enter_decoded()
            self._history.append(plan.decodes.slots, runs.token_ids, runs.counts)
        elif len(decoded):
            self._decoded.append((plan.decodes.slots, decoded))
        if not (plan.sequences or apart) and len(self._decoded) < _MOST_WAITING:
            return
        accepted = [(plan.decodes.slots[row], output.forced) for row, output in apart.items() if output.forced]
        accepted += [(part.slot, output.token_ids + output.forced)
                     for part, output in zip(plan.sequences, outputs, strict=True) if output.token_ids]  # fmt: skip
        if accepted or len(self._decoded) >= _MOST_WAITING:
            self._enter_decoded()
        for slot, token_ids in accepted:
            self._history.extend(slot, token_ids)

    def report(self, plan: BatchPlan) -> Report:
        """Of a step that was noted."""
        if not (plan.foresee or plan.assignments):
            return NOTHING_TOLD
        foreseen, seconds = self._foresee(plan) if plan.foresee else (None, 0.0)
        return Report(foreseen, seconds, self._recall(plan.assignments) if plan.assignments else ())

    def _recall(self, assignments: Sequence[SlotAssignment]) -> tuple[int, ...]:
        """`StepOutput.recalled`."""
        if self._memory is None:
            return ()
        slots = np.array([assignment.slot for assignment in assignments], np.int32)
        return tuple(self._memory.recall(self._history, slots).tolist())

    def _foresee(self, plan: BatchPlan) -> tuple[IntArray, float]:
        """`StepOutput.foreseen`, and the seconds that it took."""
        started = time.perf_counter()
        self._enter_decoded()
        slots = plan.decodes.slots
        if plan.sequences:
            slots = np.append(slots, [part.slot for part in plan.sequences]).astype(np.int32)
        if self._foresight is not None:
            foreseen = self._foresight.foresee(self._history, slots)
        else:
            foreseen = np.full(len(slots), MAX_DRAFT_TOKENS, np.int32)
        return foreseen, time.perf_counter() - started

    def _enter_decoded(self) -> None:
        # A failed one's NO_TOKEN enters too: that sequence is over, and its slot's next one begins a history anew.
        if len(self._decoded) == 1:
            slots, tokens = self._decoded[0]
            self._history.append(slots, tokens[:, None])
            self._decoded.clear()
            return
        for _, steps in groupby(self._decoded, key=lambda step: step[0].tobytes()):
            together = list(steps)
            self._history.append(together[0][0], np.stack([tokens for _, tokens in together], axis=1))
        self._decoded.clear()

    def clear(self) -> None:
        """Forget all slots."""
        self._decoded.clear()
        self._history.known[:] = 0
        self.drafter.clear()
