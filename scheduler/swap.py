"""Swapping a preempted sequence to host memory, or computing it again: what each costs, as measured while serving."""

from dataclasses import dataclass

import numpy as np

from ..core.plan import BatchPlan, IntArray, PageCopies, Park, StepOutput
from ..core.prefix import Bundle

_WEIGHT = 0.2
"""Of the newest measurement in a mean."""
_PROMPT_SHARE = 8
"""A step with so many tokens per sequence measures how fast prompts are computed."""


@dataclass(frozen=True, slots=True, eq=False)
class SwappedTable:
    """A swapped-out sequence's table: where its own pages are, and which shared ones belong between them."""

    ticket: int
    host: IntArray
    """Host pages of its own columns, head by head."""
    held: IntArray
    """Pages of each head, shared ones included, int32 [R]."""
    kept: IntArray
    """Entries of each head, int32 [R]."""
    shared: dict[int, bytes]
    """Column -> digest of the block there, which the prefix cache must still have."""
    num_blocks: int
    """Length of `SequenceState.blocks`."""
    num_computed: int

    def most_pages(self, known: int, page_size: int, most: int) -> int:
        """Pages that all heads hold until `known` tokens are computed, at most `most` where that suffices to begin."""
        entries = self.kept + np.int32(known - self.num_computed)
        bound = int(np.maximum(self.held, -(-entries // page_size)).sum())
        return max(min(most, bound), int(self.held.sum()))

    def blocks(self, found: list[Bundle]) -> list[Bundle | None]:
        """`SequenceState.blocks` with the shared ones `found` again, in the order of `shared`."""
        blocks: list[Bundle | None] = [None] * self.num_blocks
        for column, bundle in zip(self.shared, found, strict=True):
            blocks[column] = bundle
        return blocks


@dataclass(frozen=True, slots=True)
class Swaps:
    """What travels between device and host in one step, as in `core.plan.BatchPlan`."""

    parks: tuple[Park, ...]
    unparked: tuple[int, ...]
    outs: PageCopies
    ins: PageCopies


class SwapCosts:
    """Running means of how fast prompts are computed and pages copied."""

    def __init__(self) -> None:
        self._token_seconds: float | None = None
        """Of computing one token of a prompt."""
        self._page_seconds: float | None = None
        """Of copying one page one way."""

    def observe(self, plan: BatchPlan, output: StepOutput) -> None:
        """Learn from a step."""
        if plan.num_tokens >= _PROMPT_SHARE * (len(plan.sequences) + len(plan.decodes)) and output.forward_seconds > 0:
            self._token_seconds = _mean(self._token_seconds, output.forward_seconds / plan.num_tokens)
        if output.copied_pages:
            self._page_seconds = _mean(self._page_seconds, output.copy_seconds / output.copied_pages)

    def swap_pays(self, tokens: int, pages: int) -> bool:
        """Whether copying `pages` out and in again is cheaper than computing `tokens`; yes while that is not known."""
        if self._token_seconds is None or self._page_seconds is None:
            return True
        return 2 * pages * self._page_seconds < tokens * self._token_seconds


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
