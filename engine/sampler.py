"""`Sampler`: from a step's logits to `SequenceOutput`s, every row by its own slot's parameters.

Randomness is a function of (the sequence's seed, the new token's absolute position, token id), see `kernels.noise`: the
same request gives the same tokens alone, in any batch, chunked or preempted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.plan import NO_TOKEN, NON_FINITE, BatchPlan, IntArray, SequenceOutput, SequencePlan
from ..kernels import sampling
from ..kernels.backend import TRITON_BACKENDS, Backend
from ..kernels.distributions import full_logits, truncated_logits
from ..kernels.rejection import draw_drafts, judge_drafts
from ..kernels.sampling import RowMasks
from .grammar import Grammars, Step
from .inputs import LogitLayout
from .logprobs import told_logprobs
from .recording import Drawn, record
from .rows import DraftDistributions, Judged, Rows, bound_rows, sampled_rows
from .slots import DRAW_KINDS, FREQUENCY, MIN_P, PRESENCE, REPETITION, TEMPERATURE, TOP_P, DrawKind, SlotTable
from .staging import Download, upload
from .trees import accepted_tokens, branched

_JUDGED = len(DRAW_KINDS)
"""A row that is drawn in view of a draft token."""


class Sampler:
    """Draws next tokens and scores prompts; owns the slots' parameters and token counts."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, backend: Backend = "reference") -> None:
        self.table = SlotTable(num_slots, vocab_size, device)
        self.grammars = Grammars(vocab_size)
        self.device = device
        self.backend = backend
        self._fused = backend in TRITON_BACKENDS

    def draw(
        self,
        plan: BatchPlan,
        layout: LogitLayout,
        logits: Tensor,
        distributions: DraftDistributions | None = None,
        masks: RowMasks | None = None,
    ) -> Drawn:
        """Draw the next tokens, from logits [R, V] float32 laid out so, R > 0; the host does not wait for them.

        distributions: of the draft tokens, where they were drawn from any; masks: what grammars allow, if that is known
        already. What it gives is for `outputs`.
        """
        rows = sampled_rows(plan, layout, self.table, distributions)
        if self.grammars:
            rows = bound_rows(rows, plan, layout, self.grammars) if masks is None else replace(rows, masks=masks)
        if self.backend == "cpu" and self._are_likeliest(rows, layout):
            survey = sampling.survey_rows(logits)
            self.table.remember(rows.slots, survey[0])
            return Drawn(Download(survey.view(-1)), None)
        recording = record(logits, layout.sampled, self.table.recorded[rows.slots], self.backend)
        tokens = self._draw(logits, rows, layout)
        return Drawn(Download(torch.cat([tokens, sampling.finite_rows(logits, self.backend)])), recording)

    def _are_likeliest(self, rows: Rows, layout: LogitLayout) -> bool:
        """Whether every row of logits gives its likeliest token and is over: one pass finds all there is to know."""
        apart = any(layout.drafted) or len(layout.sampled) < len(layout.rows)
        return not apart and self.table.all_likeliest(rows.slots, rows.positions)

    def propose(self, logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor | None]:
        """Draft tokens [N] int64 from a draft's logits [N, V] float32, as the rows' parameters would draw.

        The second, for those of them that are `SlotTable.free`, is what the tokens were drawn from [F, V], as
        `DraftDistributions` has it. The others are drawn by the very noise that their target will be.
        """
        owners, places = self._pairs(rows.slots, rows.positions)
        free = self.table.free[rows.slots]
        logits = self._adjust(logits, rows, owners, shared=True)
        if not free.any():
            return self._draw_by_kind(logits, rows, owners, places), None
        if free.all():
            return self._propose_freely(logits, rows.slots, owners, places)
        members = self._where(free)
        drawn, scaled = self._propose_freely(logits[members], rows.slots[free], owners[members], places[members])
        tokens, others = torch.empty_like(owners), self._where(~free)
        coupled = Rows(rows.slots[~free], rows.positions[~free])
        tokens[members] = drawn
        tokens[others] = self._draw_by_kind(logits[others], coupled, owners[others], places[others])
        return tokens, scaled

    def _propose_freely(self, logits: Tensor, slots: IntArray, owners: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """`propose` for rows that are all `SlotTable.free`, from adjusted logits."""
        scaled = self._scaled(logits, slots, owners)
        return draw_drafts(scaled, self.table.keys[owners, 0], places, self.backend), scaled

    def outputs(
        self, plan: BatchPlan, layout: LogitLayout, logits: Tensor, sampled: Drawn
    ) -> tuple[IntArray, tuple[SequenceOutput, ...], dict[int, tuple[bytes, ...]]]:
        """Tokens [D] of the plan's decodes, outputs of its sequences, and `StepOutput.recorded`.

        Waits for what `draw` gave. A sequence with a row that is not finite gets an error instead; reads the device
        again, and the logits, only for log-probabilities.
        """
        flat, recorded = sampled.wait()
        count, samples = len(plan.decodes), len(layout.sampled)
        drawn, finite = flat[:samples], flat[samples:] > 0
        decoded = np.where(finite[:count], drawn[:count], NO_TOKEN).astype(np.int32)
        accepted = _accepted(plan, layout, drawn[count:].tolist())
        failed = dict.fromkeys(_failed_sequences(plan, layout, finite.tolist()), NON_FINITE)
        steps = self._follow_grammars(plan, layout, accepted, failed) if self.grammars else {}
        outputs = self._outputs(plan, layout, logits, accepted, failed, steps)
        if any(layout.drafted):
            self._remember_accepted(plan, outputs)
        if recorded:
            outputs = _with_rows(outputs, layout, count, recorded)
        return decoded, outputs, {place: (row,) for place, row in recorded.items() if place < count}

    def told(
        self, plan: BatchPlan, tokens: IntArray
    ) -> tuple[IntArray, tuple[SequenceOutput, ...], dict[int, SequenceOutput]]:
        """`StepOutput.decoded`, outputs and `StepOutput.apart` of a plan whose decodes and sequences drew `tokens`."""
        decodes, others = plan.decodes, plan.sequences
        slots = np.append(decodes.slots, [part.slot for part in others]).astype(np.int32) if others else decodes.slots
        apart = self.follow(slots, tokens)
        rest = enumerate(tokens[len(decodes) :].tolist(), len(decodes))
        outputs = tuple(apart.pop(row) if row in apart else SequenceOutput.of(token) for row, token in rest)
        return tokens[: len(decodes)], outputs, apart

    def follow(self, slots: IntArray, tokens: IntArray) -> dict[int, SequenceOutput]:
        """Let grammars consume the tokens that the slots have got; what else came of it, by row."""
        apart: dict[int, SequenceOutput] = {}
        for slot, row, _ in self.grammars.bound(slots) if self.grammars else ():
            if tokens[row] == NO_TOKEN:
                continue
            step = self._take(slot, (int(tokens[row]),))
            if step.error:
                apart[row] = SequenceOutput(error=step.error)
            elif step.ended or step.forced:
                apart[row] = SequenceOutput(step.token_ids, forced=step.forced, ended=step.ended)
        return apart

    def _take(self, slot: int, token_ids: Sequence[int]) -> Step:
        """Let a slot's grammar consume tokens that its sequence has got, and count those that it forces."""
        step = self.grammars.take(slot, token_ids)
        if step.forced and self.table.penalised[slot]:
            self.table.count_outputs(*self._pairs([slot] * len(step.forced), step.forced))
        return step

    def _follow_grammars(
        self, plan: BatchPlan, layout: LogitLayout, accepted: list[tuple[int, ...]], failed: dict[int, str]
    ) -> dict[int, Step]:
        """Let grammars consume the `accepted` tokens of the layout's samplers, which they may cut short; what came of
        it, by sequence of the plan. Who cannot go on is `failed` from then on."""
        steps: dict[int, Step] = {}
        for place, index in enumerate(layout.samplers):
            slot = plan.sequences[index].slot
            if index in failed or not self.grammars.binds(slot):
                continue
            steps[index] = step = self._take(slot, accepted[place])
            accepted[place] = step.token_ids
            if step.error:
                failed[index] = step.error
        return steps

    def _outputs(
        self,
        plan: BatchPlan,
        layout: LogitLayout,
        logits: Tensor,
        accepted: Sequence[tuple[int, ...]],
        failed: Mapping[int, str],
        steps: Mapping[int, Step],
    ) -> tuple[SequenceOutput, ...]:
        """Of the plan's sequences, of which some have `failed` and why; `accepted` are the tokens of the layout's
        samplers."""
        logprobs = told_logprobs(logits, plan, layout, accepted, self.table, self.backend)
        chosen = dict(zip(layout.samplers, accepted, strict=True))
        outputs: list[SequenceOutput] = []
        for index, part in enumerate(plan.sequences):
            if index in failed:
                outputs.append(SequenceOutput(error=failed[index]))
                continue
            of_output, of_prompt = (tuple(logprobs.get((index, kind), ())) for kind in (False, True))
            output = SequenceOutput(chosen.get(index, ()), of_output, of_prompt)
            if step := steps.get(index):
                output = replace(output, forced=step.forced, ended=step.ended)
            outputs.append(with_drafts(output, part) if part.drafts else output)
        return tuple(outputs)

    def _remember_accepted(self, plan: BatchPlan, outputs: Sequence[SequenceOutput]) -> None:
        """What `_draw` remembers of other rows, of those with drafts; the host knows by now which tokens stay."""
        taken = [(part.slot, output.token_ids) for part, output in zip(plan.sequences, outputs, strict=True)
                 if part.drafts and output.token_ids]  # fmt: skip
        if not taken:
            return
        owners, newest = self._pairs(*zip(*((slot, tokens[-1]) for slot, tokens in taken), strict=True))
        self.table.newest[owners] = newest
        counted = [(slot, token) for slot, tokens in taken if self.table.penalised[slot] for token in tokens]
        if counted:
            self.table.count_outputs(*self._pairs(*zip(*counted, strict=True)))

    def _draw(self, logits: Tensor, rows: Rows, layout: LogitLayout) -> Tensor:
        """Tokens [N] int64 (on the device) of the rows; remembered, but where drafts leave open whether they stay."""
        slots, at = rows.slots, layout.sampled
        if not len(slots):
            return torch.empty(0, dtype=torch.int64, device=self.device)
        owners, places = self._pairs(slots, rows.positions)
        everything = len(at) == len(logits)
        logits = logits if everything else logits[upload(at, self.device)]
        penalised = self.table.penalised[slots]
        if self._fused and rows.judged is None and self.table.plain(slots, rows.positions):
            kind = DRAW_KINDS[self.table.kinds[slots].max()]
            tokens = self._draw_fused(kind, logits, owners, places, penalised=bool(penalised.any()), prefix=rows.prefix)
        else:
            logits = self._adjust(logits, rows, owners, shared=everything)
            tokens = self._draw_by_kind(logits, rows, owners, places)
        if any(layout.drafted):
            stays = _undrafted(len(slots), layout)
            members = self._where(stays)
            self._remember(penalised[stays], slots[stays], owners[members], tokens[members])
        else:
            self._remember(penalised, slots, owners, tokens)
        return tokens

    def _remember(self, penalised: npt.NDArray[np.bool_], slots: IntArray, owners: Tensor, tokens: Tensor) -> None:
        """The slots [N], on the device `owners`, have got tokens [N]; those that are `penalised` [N] count them."""
        if penalised.any():
            members = self._where(penalised)
            self.table.count_outputs(owners[members], tokens[members])
        self.table.remember(slots, tokens, owners)

    def _draw_by_kind(self, logits: Tensor, rows: Rows, owners: Tensor, places: Tensor) -> Tensor:
        """Tokens [N] from adjusted logits; `owners` are the rows' slots on the device, `places` their positions."""
        kinds = self.table.kinds[rows.slots]
        if self._fused:  # one kernel draws rows of all kinds
            kinds[:] = kinds.max()
        if rows.judged is not None:
            kinds[rows.judged.rows] = _JUDGED
        elif (kinds == kinds[0]).all():
            return self._draw_kind(DRAW_KINDS[kinds[0]], logits, owners, places)
        tokens = torch.empty_like(owners)
        for kind in np.unique(kinds):
            members = self._where(kinds == kind)
            arguments = logits[members], owners[members], places[members]
            if rows.judged is not None and kind == _JUDGED:
                tokens[members] = self._judge(rows.judged, rows.slots[rows.judged.rows], *arguments)
            else:
                tokens[members] = self._draw_kind(DRAW_KINDS[kind], *arguments)
        return tokens

    def _judge(self, judged: Judged, slots: IntArray, logits: Tensor, owners: Tensor, places: Tensor) -> Tensor:
        """Tokens [J]: draft tokens where they are accepted."""
        seeds = self.table.keys[owners, 0]
        scaled = self._scaled(logits, slots, owners)
        return judge_drafts(scaled, judged.drafts, judged.scaled, judged.heads, seeds, places, self.backend)

    def _scaled(self, logits: Tensor, slots: IntArray, owners: Tensor) -> Tensor:
        """[N, V]: what `_draw_kind` would draw from the softmax of; no row is greedy."""
        strengths, top_k = self.table.strengths[owners], self.table.keys[owners, 1]
        temperature, top_p, min_p = (strengths[:, column] for column in (TEMPERATURE, TOP_P, MIN_P))
        cut = self.table.kinds[slots] == DRAW_KINDS.index("truncated")
        if cut.all() or self._fused or self.backend == "cpu":  # their kernels see where there is nothing to cut
            return truncated_logits(logits, temperature, top_k, top_p, min_p, self.backend)
        if not cut.any():
            return full_logits(logits, temperature, min_p, self.backend)
        scaled = torch.empty_like(logits)
        whole, some = self._where(~cut), self._where(cut)
        scaled[whole] = full_logits(logits[whole], temperature[whole], min_p[whole])
        scaled[some] = truncated_logits(logits[some], temperature[some], top_k[some], top_p[some], min_p[some])
        return scaled

    def _draw_fused(
        self,
        kind: DrawKind,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        *,
        penalised: bool,
        prefix: Tensor | None = None,
    ) -> Tensor:
        """Tokens [N] of rows that no bias or mask asks torch for: all together, `kind` is the last of their kinds.

        prefix: as `Rows.prefix`.
        """
        from ..kernels.cuts_triton import Truncation  # triton is installed beside a GPU only
        from ..kernels.rows_triton import Penalties
        from ..kernels.sampling_triton import draw_triton

        strengths = self.table.strengths[slots]
        seeds, top_k = self.table.keys[slots].unbind(1)
        penalties = truncation = None
        if penalised:
            columns = strengths[:, REPETITION : FREQUENCY + 1].contiguous()
            penalties = Penalties(slots, self.table.output_counts, self.table.in_prompt, columns, prefix)
        if kind == "truncated":
            truncation = Truncation(top_k, strengths[:, TOP_P])
        heat, min_p = strengths[:, TEMPERATURE], strengths[:, MIN_P]
        return draw_triton(logits, heat, min_p, seeds, positions, penalties, truncation)

    def _draw_kind(self, kind: DrawKind, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows that are all drawn the same way."""
        if self._fused:
            return self._draw_fused(kind, logits, slots, positions, penalised=False)
        if kind == "greedy":
            return sampling.greedy_tokens(logits, self.backend)
        strengths, keys = self.table.strengths[slots], self.table.keys[slots]
        temperature, top_p, min_p = (strengths[:, column] for column in (TEMPERATURE, TOP_P, MIN_P))
        seeds, top_k = keys.unbind(1)
        if kind == "full":
            return sampling.sample_full(logits, temperature, min_p, seeds, positions, self.backend)
        return sampling.sample_truncated(logits, temperature, top_k, top_p, min_p, seeds, positions, self.backend)

    def _adjust(self, logits: Tensor, rows: Rows, owners: Tensor, *, shared: bool) -> Tensor:
        """Penalties, bias, minimum length, grammars; `owners` are the slots on the device. Copies `shared` logits
        first."""
        table, slots, positions = self.table, rows.slots, rows.positions
        penalised, biased, short = table.penalised[slots], table.biased[slots], positions < table.min_ends[slots]
        if not (penalised.any() or biased.any() or short.any()):
            return logits
        states = [table.states[slot] for slot in slots.tolist()]
        bias = [(i, token, b) for i in np.flatnonzero(biased).tolist() for token, b in states[i].bias]
        masked = [(i, token) for i in np.flatnonzero(short).tolist() for token in states[i].stop_ids]
        logits = logits.clone() if shared else logits
        if penalised.any():
            members = self._where(penalised)
            owners = owners[members]
            strengths = table.strengths[owners]
            prefix = None if rows.prefix is None else rows.prefix[members]
            counts, in_prompt = table.counts_with(owners, prefix), table.in_prompt[owners]
            columns = (strengths[:, column] for column in (REPETITION, PRESENCE, FREQUENCY))
            logits[members] = sampling.adjust_penalties(logits[members], counts, in_prompt, *columns)
        if bias:
            at, token, amount = zip(*bias, strict=True)
            sampling.adjust_bias(logits, *self._pairs(at, token), upload(np.array(amount, np.float32), self.device))
        if masked:
            sampling.forbid(logits, *self._pairs(*zip(*masked, strict=True)))
        if rows.masks is not None:
            sampling.forbid_unset(logits, upload(rows.masks.rows, self.device), upload(rows.masks.bits, self.device))
        return logits

    def _where(self, flags: npt.NDArray[np.bool_]) -> Tensor:
        """Indices [N] int64 of the true flags."""
        return upload(np.flatnonzero(flags), self.device)

    def _pairs(self, first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[Tensor, Tensor]:
        """Two int64 tensors in one transfer."""
        both = upload(np.array([first, second], np.int64), self.device)
        return both[0], both[1]


def with_drafts(output: SequenceOutput, part: SequencePlan) -> SequenceOutput:
    """What a sequence got, and what was proposed for it."""
    return replace(output, drafted=part.drafts, model_drafted=part.model_drafts or 0, branched=branched(part))


def _failed_sequences(plan: BatchPlan, layout: LogitLayout, finite: Sequence[bool]) -> set[int]:
    """Sequences that have a row of logits that is not finite."""
    failed = set()
    for index, row, drafted in zip(layout.samplers, layout.sampler_rows, layout.drafted, strict=True):
        if not all(finite[row : row + 1 + drafted]):
            failed.add(index)
    for sequence, first in layout.scored:
        if not all(finite[first : first + len(plan.sequences[sequence].score_ids)]):
            failed.add(sequence)
    return failed


def _accepted(plan: BatchPlan, layout: LogitLayout, drawn: Sequence[int]) -> list[tuple[int, ...]]:
    """Of each of the layout's samplers, what it gets of the tokens drawn."""
    accepted: list[tuple[int, ...]] = []
    first = 0
    for index, drafted in zip(layout.samplers, layout.drafted, strict=True):
        accepted.append(accepted_tokens(plan.sequences[index], drawn[first : first + 1 + drafted]))
        first += 1 + drafted
    return accepted


def _with_rows(
    outputs: Sequence[SequenceOutput], layout: LogitLayout, first: int, recorded: Mapping[int, bytes]
) -> tuple[SequenceOutput, ...]:
    """The outputs with the rows their tokens were drawn from; `first` is the samplers' first place in `recorded`."""
    found = list(outputs)
    for index, drafted in zip(layout.samplers, layout.drafted, strict=True):
        if first in recorded:
            places = range(first, first + len(found[index].token_ids))
            found[index] = replace(found[index], recorded=tuple(recorded[place] for place in places))
        first += 1 + drafted
    return tuple(found)


def _undrafted(count: int, layout: LogitLayout) -> npt.NDArray[np.bool_]:
    """[count]: which of the rows are a sequence's only one."""
    drafted = np.array(layout.drafted)
    of_parts = np.repeat(drafted == 0, drafted + 1)
    return np.concatenate([np.ones(count - len(of_parts), np.bool_), of_parts])
