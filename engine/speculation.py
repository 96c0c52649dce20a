"""`Speculation`: proposals for the sequences of a step that may have some. Whether they are right, the sampler says.

In the plan that it returns, and wherever a step is computed, a sequence's `token_ids` end with its proposals,
`drafts` says how many they are, and `model_drafts` how many of them a model drew.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.ids import SlotId
from ..core.plan import (
    NO_TOKEN,
    BatchPlan,
    CaughtUp,
    IntArray,
    SequenceOutput,
    SequencePlan,
    SlotAssignment,
    StepOutput,
)
from ..core.speculation import MAX_DRAFT_TOKENS
from ..kernels import sampling
from ..kernels.draft_chain_cpu import DrawRules
from ..speculation.drafter import Drafter, Foresight, Memory, Proposals
from ..speculation.history import TokenHistory
from .chain_rules import chain_rules
from .rows import DraftDistributions, Rows
from .sampler import Sampler
from .staging import upload
from .trees import MASKED_ROWS, first_chain, valid_nodes

_MOST_WAITING = 64
"""Steps that the history may be behind."""


@dataclass(frozen=True, slots=True)
class Proposed:
    """A plan with its proposals."""

    plan: BatchPlan
    distributions: DraftDistributions | None = None
    """What they were drawn from, if they were drawn and that is to be taken into account."""
    seconds: float = 0.0
    caught_up: CaughtUp = field(default_factory=CaughtUp)


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
        asked = [index for index, part in enumerate(plan.sequences) if part.drafts]
        parts = [plan.sequences[index] for index in asked]
        slots = np.array([part.slot for part in parts], np.int32)
        most = np.array([part.drafts for part in parts], np.int32)
        known = self._history.known[slots]
        assert all(part.start + len(part.token_ids) == end for part, end in zip(parts, known, strict=True))
        limits = [part.drafts if part.model_drafts is None else part.model_drafts for part in parts]
        draw = ProposalDraw(self._sampler, slots, known, int(most.max()), np.array(limits, np.int32))
        proposals = self.drafter.propose(self._history, slots, most, draw)
        shapes, chains = _shapes(proposals, most)
        sequences = list(plan.sequences)
        tokens = _usable(proposals, most, self._sampler.table.vocab_size)
        for index, part, drafts, parents, drew in zip(asked, parts, tokens, shapes, draw.drew.tolist(), strict=True):
            sequences[index] = self._with(part, drafts, parents[: len(drafts)], drew)
        distributions = draw.distributions(asked, chains)
        seconds, caught_up = time.perf_counter() - started, proposals.caught_up
        return Proposed(replace(plan, sequences=tuple(sequences)), distributions, seconds, caught_up)

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
    ) -> None:
        """What a step has made known, see `StepOutput`."""
        if len(decoded):
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

    def report(self, plan: BatchPlan, caught_up: CaughtUp, output: StepOutput) -> StepOutput:
        """The output of a step that was noted, with what drafters have to say of it."""
        if not (plan.foresee or plan.assignments or caught_up.computed):
            return output
        foreseen, seconds = self._foresee(plan) if plan.foresee else (None, 0.0)
        recalled = self._recall(plan.assignments) if plan.assignments else ()
        return replace(output, foreseen=foreseen, foresight_seconds=seconds, caught_up=caught_up, recalled=recalled)

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


def without_proposals(part: SequencePlan) -> SequencePlan:
    """The sequence's part of a step as if nothing had been proposed."""
    return replace(part, token_ids=part.token_ids[: len(part.token_ids) - part.drafts], drafts=0, parents=())


def unspeculative(plan: BatchPlan) -> BatchPlan:
    """The plan where nobody proposes anything."""
    return replace(plan, sequences=tuple(replace(part, drafts=0) for part in plan.sequences))


class ProposalDraw:
    """Draws for S sequences, by the parameters of their slots; fulfils `speculation.drafter.Draw`."""

    def __init__(self, sampler: Sampler, slots: IntArray, first: IntArray, most: int, limits: IntArray) -> None:
        """first [S]: position of each sequence's first draft token; most: tokens of a proposal; limits: see `Draw`."""
        self.limits = limits
        self.drew = np.zeros(len(slots), np.bool_)
        """[S]: of whom tokens were drawn."""
        self._sampler = sampler
        self._slots = slots
        self._first = first
        table = sampler.table
        penalised = table.penalised[slots].any()
        self._drawn: Tensor | None = None
        """[S, most]: tokens so far, where penalties must count them."""
        if penalised:
            self._drawn = torch.full((len(slots), most), NO_TOKEN, dtype=torch.int64, device=table.device)
        self._walk = sampler.grammars.walk(slots) if sampler.grammars else None
        adjusted = penalised or table.biased[slots].any() or (first < table.min_ends[slots]).any()
        self._adjusted = adjusted
        """Whether somebody's logits change before they are drawn from."""
        self._greedy = not (adjusted or table.kinds[slots].any())
        """Whether only the likeliest token is ever taken; `DRAW_KINDS` begins with that."""
        self._places: IntArray = np.full((len(slots), most), -1, np.int32)
        """[S, most]: which of `_scaled`, in all, a token was drawn from; -1: from none that matters."""
        self._scaled: list[Tensor] = []
        self._kept = 0
        """Rows of them."""

    def __call__(self, logits: Tensor, members: IntArray, depth: int) -> Tensor:
        """See `Draw`. A draft's vocabulary may be padded to another width than the target's."""
        self.drew[members] = True
        table = self._sampler.table
        logits = logits[:, : table.vocab_size]
        if self._greedy:
            return sampling.greedy_tokens(logits, self._sampler.backend)
        if logits.shape[1] < table.vocab_size:
            logits = pad(logits, (0, table.vocab_size - logits.shape[1]), value=float("-inf"))
        slots, prefix, rows = self._slots[members], None, None
        if self._drawn is not None:
            rows = upload(members.astype(np.int64), table.device)
            prefix = self._drawn[rows, :depth] if depth else None
        masks = None if self._walk is None else self._walk.masks(members)
        tokens, scaled = self._sampler.propose(logits, Rows(slots, self._first[members] + depth, prefix, masks=masks))
        if self._walk is not None and masks is not None:
            self._walk.take(members, tokens.tolist())
        if self._drawn is not None:
            self._drawn[rows, depth] = tokens
        if scaled is not None:
            free = members[table.free[slots]]
            self._places[free, depth] = np.arange(self._kept, self._kept + len(scaled))
            self._keep(scaled)
        return tokens

    def rules(self, members: IntArray, active: Sequence[int]) -> DrawRules | None:
        """See `Draw`."""
        if self._adjusted:
            return None
        self.drew[members] = True
        rules = chain_rules(self._sampler.table, self._slots[members], self._first[members], active)
        if len(rules.scaled):
            places = rules.places.numpy()
            self._places[members, : len(places)] = np.where(places < 0, -1, places + self._kept).T
            self._keep(rules.scaled)
        return rules

    def _keep(self, scaled: Tensor) -> None:
        self._scaled.append(scaled)
        self._kept += len(scaled)

    def distributions(self, asked: list[int], chains: npt.NDArray[np.bool_]) -> DraftDistributions | None:
        """Those of the sequences, which are called `asked` [S], that are `chains` [S]; None if none matters."""
        if not self._scaled:
            return None
        counts = (self._places >= 0).cumprod(1).sum(1) * chains
        places = {index: row[:count] for index, row, count in zip(asked, self._places, counts, strict=True) if count}
        scaled = self._scaled[0] if len(self._scaled) == 1 else torch.cat(self._scaled)
        return DraftDistributions(places, scaled)


def _usable(proposals: Proposals, most: IntArray, vocab_size: int) -> list[tuple[int, ...]]:
    """Tokens of each proposal, up to the first that is none of the target's or whose place in a tree is none."""
    tokens, counts = proposals.tokens, np.minimum(proposals.counts, most)
    inside = (tokens >= 0) & (tokens < vocab_size) & (np.arange(tokens.shape[1]) < counts[:, None])
    if proposals.parents is not None:
        inside &= valid_nodes(tokens, proposals.parents)
    lengths = inside.cumprod(1).sum(1)
    return [tuple(row[:length]) for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]


def _shapes(proposals: Proposals, most: IntArray) -> tuple[list[tuple[int, ...]], npt.NDArray[np.bool_]]:
    """Parents of each proposal, none for chains, and [S] which are chains: by what was handed in, which no token that
    turns out to be unusable may change."""
    parents = proposals.parents
    if parents is None:
        return [()] * len(most), np.ones(len(most), np.bool_)
    order = np.arange(parents.shape[1])
    chains = ((parents == order - 1) | (order >= np.minimum(proposals.counts, most)[:, None])).all(1)
    return [() if chain else tuple(row) for chain, row in zip(chains, parents.tolist(), strict=True)], chains
