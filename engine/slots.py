"""`SlotTable`: the sampling state of every slot, on the host what decides, on the device what computes."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..core.plan import IntArray, SlotAssignment
from ..core.request import SamplingParams
from .staging import upload

TEMPERATURE, TOP_P, MIN_P, REPETITION, PRESENCE, FREQUENCY = range(6)
"""Columns of `SlotTable.strengths`."""

DrawKind = Literal["greedy", "full", "truncated"]
DRAW_KINDS: tuple[DrawKind, ...] = get_args(DrawKind)
"""In this order each can do what those before it can."""


@dataclass(frozen=True, slots=True)
class SlotState:
    """What one slot's parameters ask for, as far as only some rows need it."""

    params: SamplingParams
    stop_ids: tuple[int, ...]
    """Within the vocabulary; none where a grammar says when they may come."""
    bias: tuple[tuple[int, float], ...]
    """(token within the vocabulary, bias)."""


def draw_kind(params: SamplingParams) -> DrawKind:
    """How a row is drawn: the cheapest way that gives its exact distribution."""
    if params.greedy or params.top_k == 1:
        return "greedy"
    return "truncated" if params.top_k > 0 or params.top_p < 1.0 else "full"


def signed64(number: int) -> int:
    """The int64 with the same 64 bits as `number`."""
    return (number + 2**63) % 2**64 - 2**63


class SlotTable:
    """Parameters, seeds and token counts of N slots over a vocabulary of V."""

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.num_slots = num_slots
        self.vocab_size = vocab_size
        self.device = device
        self.states: dict[int, SlotState] = {}
        self.kinds = np.zeros(num_slots, np.int8)
        """[N], on the host as the next seven: which of `DRAW_KINDS`."""
        self.penalised = np.zeros(num_slots, np.bool_)
        """[N]"""
        self.biased = np.zeros(num_slots, np.bool_)
        """[N]: whether its state has a bias, or a grammar binds it."""
        self.unaltered = np.zeros(num_slots, np.bool_)
        """[N]: draws from the logits as they are, but for what its grammar forbids, from `min_ends` on, and is not
        recorded."""
        self.likeliest = np.zeros(num_slots, np.bool_)
        """[N]: so, with no grammar, and gets the likeliest token."""
        self.free = np.zeros(num_slots, np.bool_)
        """[N]: drawn at random with nobody asking for a seed, so that draft tokens may change which token is drawn, not
        how likely each is."""
        self.recorded = np.zeros(num_slots, np.bool_)
        """[N]: `SlotAssignment.record`."""
        self.min_ends = np.zeros(num_slots, np.int64)
        """[N]: first position that an end token may have; 0 where a grammar says that."""
        self.strengths = torch.zeros(num_slots, 6, device=device)
        """[N, 6] float32, see the column names."""
        self.keys = torch.zeros(num_slots, 2, dtype=torch.int64, device=device)
        """[N, 2]: seed (its 64 bits) and top_k."""
        self.newest = torch.zeros(num_slots, dtype=torch.int64, device=device)
        """[N]: the token that the slot sampled last, for a step that is launched before the host knows it."""
        self._newest_host = self.newest.numpy() if device.type == "cpu" else None
        self._counts: Tensor | None = None
        self._in_prompt: Tensor | None = None

    @property
    def output_counts(self) -> Tensor:
        """[N, V] int32: occurrences in the output, kept only for penalised slots; allocated when first needed."""
        if self._counts is None:
            self._counts = torch.zeros(self.num_slots, self.vocab_size, dtype=torch.int32, device=self.device)
        return self._counts

    @property
    def in_prompt(self) -> Tensor:
        """[N, V] bool: tokens of the prompt, kept only for penalised slots; allocated when first needed."""
        if self._in_prompt is None:
            self._in_prompt = torch.zeros(self.num_slots, self.vocab_size, dtype=torch.bool, device=self.device)
        return self._in_prompt

    def assign(self, assignment: SlotAssignment) -> None:
        """A sequence enters the slot; whatever the slot held is forgotten."""
        slot, params = assignment.slot, assignment.params
        penalised = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        bound = assignment.grammar is not None
        self.kinds[slot] = DRAW_KINDS.index(draw_kind(params))
        self.penalised[slot] = penalised
        self.free[slot] = draw_kind(params) != "greedy" and params.seed is None
        self.recorded[slot] = assignment.record
        self.min_ends[slot] = 0 if bound else len(assignment.prompt_ids) + params.min_tokens
        self.states[slot] = state = SlotState(
            params=params,
            stop_ids=() if bound else tuple(i for i in assignment.stop_ids if 0 <= i < self.vocab_size),
            bias=tuple((i, b) for i, b in params.logit_bias.items() if 0 <= i < self.vocab_size),
        )
        self.biased[slot] = bound or bool(state.bias)
        self.unaltered[slot] = not (penalised or state.bias or assignment.record)
        self.likeliest[slot] = self.unaltered[slot] and not bound and draw_kind(params) == "greedy"
        # The kernel that draws all rows together knows greedy ones by a temperature of 0.
        temperature = 0.0 if DRAW_KINDS[self.kinds[slot]] == "greedy" else params.temperature
        strengths = [temperature, params.top_p, params.min_p]
        strengths += [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
        self.strengths[slot] = upload(np.array(strengths, np.float32), self.device)
        top_k = min(max(0, params.top_k), self.vocab_size)
        self.keys[slot] = upload(np.array([signed64(assignment.seed), top_k], np.int64), self.device)
        if penalised:
            self._count(assignment)

    def plain(self, slots: IntArray, positions: IntArray) -> bool:
        """Whether the slots' tokens at these positions are drawn without bias and masks."""
        return not (self.biased[slots] | (positions < self.min_ends[slots])).any()

    def all_likeliest(self, slots: IntArray, positions: IntArray) -> bool:
        """Whether the slots' tokens at these positions are `likeliest`."""
        return bool((self.likeliest[slots] & (positions >= self.min_ends[slots])).all())

    def all_unaltered(self, slots: IntArray, positions: IntArray) -> bool:
        """Whether the slots' tokens at these positions are `unaltered`."""
        return bool((self.unaltered[slots] & (positions >= self.min_ends[slots])).all())

    def _count(self, assignment: SlotAssignment) -> None:
        """Start the slot's counts from its prompt and what it has generated already."""
        prompt = upload(np.array(assignment.prompt_ids, np.int64), self.device)
        output = upload(np.array(assignment.output_ids, np.int64), self.device)
        self.in_prompt[assignment.slot] = False
        self.in_prompt[assignment.slot, prompt] = True
        self.output_counts[assignment.slot] = 0
        self.count_outputs(torch.full_like(output, assignment.slot), output)

    def remember(self, slots: IntArray, tokens: Tensor, owners: Tensor | None = None) -> None:
        """The distinct slots [N] have got tokens [N] int64; owners: they as int64, on a GPU."""
        if self._newest_host is not None:  # a third of the time that torch takes, which counts in a small model's step
            self._newest_host[slots] = tokens.numpy()
        else:
            assert owners is not None
            self.newest.index_copy_(0, owners, tokens)

    def count_outputs(self, slots: Tensor, tokens: Tensor) -> None:
        """One more occurrence of tokens [N] int64 in the outputs of the penalised slots [N] int64."""
        one = torch.ones_like(tokens, dtype=torch.int32)
        self.output_counts.index_put_((slots, tokens), one, accumulate=True)

    def counts_with(self, slots: Tensor, prefix: Tensor | None) -> Tensor:
        """[N, V] int32, a copy: `output_counts` of slots [N] int64, and of the tokens of `Rows.prefix` [N, k]."""
        counts = self.output_counts[slots]
        if prefix is None:
            return counts
        return counts.scatter_add_(1, prefix.clamp(min=0), (prefix >= 0).int())

    def clear(self) -> None:
        """Forget all slots."""
        self.states.clear()
        self.strengths.zero_()
        self.keys.zero_()
