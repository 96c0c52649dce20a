"""`Sampler`: from a step's logits to `SequenceOutput`s, every row by its own slot's parameters.

Randomness is a function of (the sequence's seed, the new token's absolute position, token id), see `kernels.noise`: the
same request gives the same tokens alone, in any batch, chunked or preempted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..core.plan import NO_TOKEN, NON_FINITE, BatchPlan, IntArray, SequenceOutput, TokenLogprob
from ..kernels import sampling
from ..kernels.backend import TRITON_BACKENDS, Backend
from .inputs import LogitLayout
from .slots import DRAW_KINDS, FREQUENCY, MIN_P, PRESENCE, REPETITION, TEMPERATURE, TOP_P, DrawKind, SlotTable
from .staging import Download, upload


@dataclass(frozen=True, slots=True)
class _LogprobRequest:
    """Log-probabilities wanted of one row of logits."""

    sequence: int
    row: int
    """Of the logits."""
    token: int
    top: int
    of_prompt: bool


class Sampler:
    """Draws next tokens and scores prompts; owns the slots' parameters and token counts."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device, backend: Backend = "reference") -> None:
        self.table = SlotTable(num_slots, vocab_size, device)
        self.device = device
        self.backend = backend
        self._fused = backend in TRITON_BACKENDS

    def draw(self, plan: BatchPlan, layout: LogitLayout, logits: Tensor) -> Download:
        """Draw the next tokens, from logits [R, V] float32 laid out so, R > 0; the host does not wait for them.

        What `outputs` takes once it is there: int64 [S + R], the tokens of the S rows that sample, then which rows
        are finite.
        """
        parts = [plan.sequences[index] for index in layout.samplers]
        slots = np.concatenate([plan.decodes.slots, np.array([part.slot for part in parts], np.int32)])
        ends = np.array([part.start + len(part.token_ids) for part in parts], np.int32)
        tokens = self._draw(logits, slots, np.concatenate([plan.decodes.starts + 1, ends]), layout.sampled)
        return Download(torch.cat([tokens, sampling.finite_rows(logits, self.backend).long()]))

    def outputs(
        self, plan: BatchPlan, layout: LogitLayout, logits: Tensor, flat: npt.NDArray[np.int64]
    ) -> tuple[IntArray, tuple[SequenceOutput, ...]]:
        """Tokens [D] of the plan's decodes and outputs of its sequences, from what `draw` gave.

        A sequence with a row that is not finite gets an error instead; reads the device, and the logits, only for
        log-probabilities.
        """
        count, samples = len(plan.decodes), len(layout.sampled)
        drawn, finite = flat[:samples], flat[samples:] > 0
        decoded = np.where(finite[:count], drawn[:count], NO_TOKEN).astype(np.int32)
        return decoded, self._outputs(plan, layout, logits, drawn[count:].tolist(), finite.tolist())

    def _outputs(
        self, plan: BatchPlan, layout: LogitLayout, logits: Tensor, drawn: Sequence[int], finite: Sequence[bool]
    ) -> tuple[SequenceOutput, ...]:
        """Of the plan's sequences; `drawn` are the tokens of the layout's samplers."""
        failed = _failed_sequences(plan, layout, finite)
        logprobs = self._logprobs(logits, self._wanted(plan, layout, drawn))
        chosen = {sequence: (token,) for sequence, token in zip(layout.samplers, drawn, strict=True)}
        outputs: list[SequenceOutput] = []
        for index in range(len(plan.sequences)):
            if index in failed:
                outputs.append(SequenceOutput(error=NON_FINITE))
                continue
            of_output, of_prompt = (tuple(logprobs.get((index, kind), ())) for kind in (False, True))
            outputs.append(SequenceOutput(chosen.get(index, ()), of_output, of_prompt))
        return tuple(outputs)

    def _wanted(self, plan: BatchPlan, layout: LogitLayout, drawn: Sequence[int]) -> list[_LogprobRequest]:
        """Log-probabilities of drawn tokens, where asked for, and of scored prompt tokens."""
        wanted = []
        for index, row, token in zip(layout.samplers, layout.sampler_rows, drawn, strict=True):
            top = self.table.states[plan.sequences[index].slot].params.logprobs
            if top is not None:
                wanted.append(_LogprobRequest(index, row, token, top, of_prompt=False))
        for index, first in layout.scored:
            top = self.table.states[plan.sequences[index].slot].params.prompt_logprobs or 0
            for offset, token in enumerate(plan.sequences[index].score_ids):
                wanted.append(_LogprobRequest(index, first + offset, token, top, of_prompt=True))
        return wanted

    def _draw(self, logits: Tensor, slots: IntArray, positions: IntArray, rows: IntArray) -> Tensor:
        """Next tokens [N] int64 (on the device), counted for penalties, of the slots [N], to stand at positions [N].

        rows [N]: of the logits.
        """
        if not len(slots):
            return torch.empty(0, dtype=torch.int64, device=self.device)
        owners, places = self._pairs(slots, positions)
        everything = len(rows) == len(logits)
        logits = logits if everything else logits[upload(rows, self.device)]
        penalised = self.table.penalised[slots]
        if self._fused and self.table.plain(slots, positions):
            tokens = self._draw_fused(logits, owners, places, penalised=bool(penalised.any()))
        else:
            logits = self._adjust(logits, slots, positions, owners, shared=everything)
            tokens = self._draw_by_kind(logits, slots, owners, places)
        if penalised.any():
            members = self._where(penalised)
            self.table.count_outputs(owners[members], tokens[members])
        self.table.newest[owners] = tokens
        return tokens

    def _draw_by_kind(self, logits: Tensor, slots: IntArray, owners: Tensor, places: Tensor) -> Tensor:
        """Tokens [N] from adjusted logits; `owners` are the slots on the device, `places` the positions."""
        kinds = self.table.kinds[slots]
        if (kinds == kinds[0]).all():
            return self._draw_kind(DRAW_KINDS[kinds[0]], logits, owners, places)
        tokens = torch.empty_like(owners)
        for kind in np.unique(kinds):
            members = self._where(kinds == kind)
            tokens[members] = self._draw_kind(DRAW_KINDS[kind], logits[members], owners[members], places[members])
        return tokens

    def _draw_fused(self, logits: Tensor, slots: Tensor, positions: Tensor, *, penalised: bool) -> Tensor:
        """Tokens [N] of rows that no bias, mask or cut of the distribution asks torch for: all in one pass."""
        from ..kernels.sampling_triton import Penalties, draw_triton  # triton is installed beside a GPU only

        strengths = self.table.strengths[slots]
        seeds = self.table.keys[slots][:, 0]
        penalties = None
        if penalised:
            counts, in_prompt = self.table.output_counts, self.table.in_prompt
            penalties = Penalties(slots, counts, in_prompt, strengths[:, REPETITION : FREQUENCY + 1].contiguous())
        return draw_triton(logits, strengths[:, TEMPERATURE], strengths[:, MIN_P], seeds, positions, penalties)

    def _draw_kind(self, kind: DrawKind, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows that are all drawn the same way."""
        if self._fused and kind != "truncated":
            return self._draw_fused(logits, slots, positions, penalised=False)
        if kind == "greedy":
            return sampling.greedy_tokens(logits, self.backend)
        strengths, keys = self.table.strengths[slots], self.table.keys[slots]
        temperature, top_p, min_p = (strengths[:, column] for column in (TEMPERATURE, TOP_P, MIN_P))
        seeds, top_k = keys.unbind(1)
        if kind == "full":
            return sampling.sample_full(logits, temperature, min_p, seeds, positions)
        return sampling.sample_truncated(logits, temperature, top_k, top_p, min_p, seeds, positions)

    def _adjust(self, logits: Tensor, slots: IntArray, positions: IntArray, owners: Tensor, *, shared: bool) -> Tensor:
        """Penalties, bias and minimum length; `owners` are the slots on the device. Copies `shared` logits first."""
        table = self.table
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
            counts, in_prompt = table.output_counts[owners], table.in_prompt[owners]
            columns = (strengths[:, column] for column in (REPETITION, PRESENCE, FREQUENCY))
            logits[members] = sampling.adjust_penalties(logits[members], counts, in_prompt, *columns)
        if bias:
            at, token, amount = zip(*bias, strict=True)
            sampling.adjust_bias(logits, *self._pairs(at, token), upload(np.array(amount, np.float32), self.device))
        if masked:
            sampling.forbid(logits, *self._pairs(*zip(*masked, strict=True)))
        return logits

    def _logprobs(
        self, logits: Tensor, wanted: Sequence[_LogprobRequest]
    ) -> dict[tuple[int, bool], list[TokenLogprob]]:
        """Log-probabilities under the raw logits, by (sequence, of its prompt?), in the order of `wanted`."""
        results: dict[tuple[int, bool], list[TokenLogprob]] = {}
        if not wanted:
            return results
        rows, tokens = self._pairs([w.row for w in wanted], [w.token for w in wanted])
        chosen, ids, values = sampling.token_logprobs(logits[rows], tokens, max(w.top for w in wanted))
        parts = (chosen.tolist(), ids.tolist(), values.tolist())
        for request, logprob, top_ids, top_values in zip(wanted, *parts, strict=True):
            top = tuple(zip(top_ids[: request.top], top_values[: request.top], strict=True))
            result = TokenLogprob(request.token, logprob, top)
            results.setdefault((request.sequence, request.of_prompt), []).append(result)
        return results

    def _where(self, flags: npt.NDArray[np.bool_]) -> Tensor:
        """Indices [N] int64 of the true flags."""
        return upload(np.flatnonzero(flags), self.device)

    def _pairs(self, first: npt.ArrayLike, second: npt.ArrayLike) -> tuple[Tensor, Tensor]:
        """Two int64 tensors in one transfer."""
        both = upload(np.array([first, second], np.int64), self.device)
        return both[0], both[1]


def _failed_sequences(plan: BatchPlan, layout: LogitLayout, finite: Sequence[bool]) -> set[int]:
    """Sequences that have a row of logits that is not finite."""
    failed = {index for index, row in zip(layout.samplers, layout.sampler_rows, strict=True) if not finite[row]}
    for sequence, first in layout.scored:
        if not all(finite[first : first + len(plan.sequences[sequence].score_ids)]):
            failed.add(sequence)
    return failed
