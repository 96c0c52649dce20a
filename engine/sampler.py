"""`Sampler`: from a step's logits to `SequenceOutput`s, every row by its own slot's parameters.

Randomness is a function of (the sequence's seed, the new token's absolute position, token id), see `kernels.noise`: the
same request gives the same tokens alone, in any batch, chunked or preempted.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.plan import BatchPlan, SequenceOutput, SequencePlan, TokenLogprob
from ..kernels import sampling
from .inputs import LogitLayout
from .slots import FREQUENCY, MIN_P, PRESENCE, REPETITION, TEMPERATURE, TOP_P, DrawKind, SlotState, SlotTable

NON_FINITE = "the model produced non-finite values"


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of logits that gives a sequence its next token."""

    slot: int
    state: SlotState
    position: int
    """Absolute position of the new token."""

    @property
    def generated(self) -> int:
        """Tokens generated before this one."""
        return self.position - self.state.prompt_length


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

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.table = SlotTable(num_slots, vocab_size, device)
        self.device = device

    def run(self, plan: BatchPlan, layout: LogitLayout, logits: Tensor) -> tuple[SequenceOutput, ...]:
        """Outputs of the plan's sequences from logits [R, V] float32, rows as `layout` says.

        A sequence with a row that is not finite gets an error instead; reads the device once, or twice with
        log-probabilities.
        """
        if not layout.rows:
            return (SequenceOutput(),) * len(plan.sequences)
        rows = [self._row(plan.sequences[sequence]) for sequence, _ in layout.sampled]
        indices = [row for _, row in layout.sampled]
        healthy = sampling.finite_rows(logits)
        tokens = self._draw(logits, rows, indices)
        flat = torch.cat([tokens, healthy.long()]).tolist()
        drawn, finite = flat[: len(rows)], flat[len(rows) :]
        failed = _failed_sequences(plan, layout, finite)
        logprobs = self._logprobs(logits, self._wanted(plan, layout, drawn))
        outputs: list[SequenceOutput] = []
        chosen = {sequence: (token,) for (sequence, _), token in zip(layout.sampled, drawn, strict=True)}
        for index in range(len(plan.sequences)):
            if index in failed:
                outputs.append(SequenceOutput(error=NON_FINITE))
                continue
            of_output, of_prompt = (tuple(logprobs.get((index, kind), ())) for kind in (False, True))
            outputs.append(SequenceOutput(chosen.get(index, ()), of_output, of_prompt))
        return tuple(outputs)

    def _row(self, sequence: SequencePlan) -> _Row:
        return _Row(sequence.slot, self.table.states[sequence.slot], sequence.start + len(sequence.token_ids))

    def _wanted(self, plan: BatchPlan, layout: LogitLayout, drawn: Sequence[int]) -> list[_LogprobRequest]:
        """Log-probabilities of drawn tokens, where asked for, and of scored prompt tokens."""
        wanted = []
        for (index, row), token in zip(layout.sampled, drawn, strict=True):
            top = self.table.states[plan.sequences[index].slot].params.logprobs
            if top is not None:
                wanted.append(_LogprobRequest(index, row, token, top, of_prompt=False))
        for index, first in layout.scored:
            top = self.table.states[plan.sequences[index].slot].params.prompt_logprobs or 0
            for offset, token in enumerate(plan.sequences[index].score_ids):
                wanted.append(_LogprobRequest(index, first + offset, token, top, of_prompt=True))
        return wanted

    def _draw(self, logits: Tensor, rows: Sequence[_Row], indices: list[int]) -> Tensor:
        """Next tokens [len(rows)] int64 (on the device), counted for penalties."""
        if not rows:
            return torch.empty(0, dtype=torch.int64, device=self.device)
        numbers = torch.tensor([[row.slot for row in rows], [row.position for row in rows]], device=self.device)
        slots, positions = numbers
        everything = len(indices) == len(logits)
        logits = logits if everything else logits[torch.tensor(indices, device=self.device)]
        logits = self._adjust(logits, rows, slots, shared=everything)
        kinds = [row.state.kind for row in rows]
        tokens = torch.empty_like(slots)
        for kind in set(kinds):
            if len(set(kinds)) == 1:
                tokens = self._draw_kind(kind, logits, slots, positions)
                break
            members = self._where([k == kind for k in kinds])
            tokens[members] = self._draw_kind(kind, logits[members], slots[members], positions[members])
        if any(row.state.penalised for row in rows):
            members = self._where([row.state.penalised for row in rows])
            self.table.count_outputs(slots[members], tokens[members])
        return tokens

    def _draw_kind(self, kind: DrawKind, logits: Tensor, slots: Tensor, positions: Tensor) -> Tensor:
        """Rows that are all drawn the same way."""
        if kind == "greedy":
            return sampling.greedy_tokens(logits)
        strengths, keys = self.table.strengths[slots], self.table.keys[slots]
        temperature, top_p, min_p = (strengths[:, column] for column in (TEMPERATURE, TOP_P, MIN_P))
        seeds, top_k = keys.unbind(1)
        if kind == "full":
            return sampling.sample_full(logits, temperature, min_p, seeds, positions)
        return sampling.sample_truncated(logits, temperature, top_k, top_p, min_p, seeds, positions)

    def _adjust(self, logits: Tensor, rows: Sequence[_Row], slots: Tensor, *, shared: bool) -> Tensor:
        """Penalties, bias and minimum length; copies `shared` logits before it changes them."""
        penalised = [row.state.penalised for row in rows]
        bias = [(i, token, b) for i, row in enumerate(rows) for token, b in row.state.bias]
        short = [(i, row) for i, row in enumerate(rows) if row.generated < row.state.params.min_tokens]
        masked = [(i, token) for i, row in short for token in row.state.stop_ids]
        if not (any(penalised) or bias or masked):
            return logits
        logits = logits.clone() if shared else logits
        if any(penalised):
            members = self._where(penalised)
            owners = slots[members]
            strengths = self.table.strengths[owners]
            counts, in_prompt = self.table.output_counts[owners], self.table.in_prompt[owners]
            columns = (strengths[:, column] for column in (REPETITION, PRESENCE, FREQUENCY))
            logits[members] = sampling.adjust_penalties(logits[members], counts, in_prompt, *columns)
        if bias:
            at, token, amount = zip(*bias, strict=True)
            sampling.adjust_bias(logits, *self._pairs(at, token), torch.tensor(amount, device=self.device))
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

    def _where(self, flags: Sequence[bool]) -> Tensor:
        """Indices [N] int64 of the true flags."""
        return torch.tensor([i for i, flag in enumerate(flags) if flag], device=self.device)

    def _pairs(self, first: Sequence[int], second: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Two int64 tensors in one transfer."""
        both = torch.tensor([first, second], device=self.device)
        return both[0], both[1]


def _failed_sequences(plan: BatchPlan, layout: LogitLayout, finite: Sequence[int]) -> set[int]:
    """Sequences that have a row of logits that is not finite."""
    failed = {sequence for sequence, row in layout.sampled if not finite[row]}
    for sequence, first in layout.scored:
        if not all(finite[first : first + len(plan.sequences[sequence].score_ids)]):
            failed.add(sequence)
    return failed
