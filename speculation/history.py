"""`TokenHistory`: the known tokens of every slot, on the host, for those who propose what comes next."""

import numpy as np

from ..core.plan import IntArray, SlotAssignment


class TokenHistory:
    """Tokens of N slots of up to `max_length` each; memory is taken from the system as it is written."""

    def __init__(self, num_slots: int, max_length: int) -> None:
        self.tokens: IntArray = np.zeros((num_slots, max_length), np.int32)
        """[N, max_length]; what lies past a slot's known tokens is stale."""
        self.known: IntArray = np.zeros(num_slots, np.int32)
        """[N]: known tokens."""
        self.namespaces: list[tuple[object, ...]] = [()] * num_slots
        """[N]: see `SlotAssignment.namespace`."""

    def assign(self, assignment: SlotAssignment) -> None:
        """A sequence enters the slot with its prompt and what it has generated already."""
        ids = assignment.prompt_ids + assignment.output_ids
        self.tokens[assignment.slot, : len(ids)] = ids
        self.known[assignment.slot] = len(ids)
        self.namespaces[assignment.slot] = assignment.namespace

    def append(self, slots: IntArray, tokens: IntArray, counts: IntArray | None = None) -> None:
        """More tokens for each of the distinct slots [S]: of [S, n] the first `counts` [S], or all."""
        known, more = self.known[slots], tokens.shape[1]
        if more == 1 and counts is None:  # step after step, while drafts pay
            self.tokens[slots, known] = tokens[:, 0]
        elif (
            counts is None or known.max() + more <= self.tokens.shape[1]
        ):  # what is too much lies behind the known ones
            self.tokens[slots[:, None], known[:, None] + np.arange(more)] = tokens
        else:
            rows, columns = np.nonzero(np.arange(more) < counts[:, None])
            self.tokens[slots[rows], known[rows] + columns] = tokens[rows, columns]
        self.known[slots] = known + (more if counts is None else counts)

    def extend(self, slot: int, tokens: tuple[int, ...]) -> None:
        """More tokens for one slot, as many as it may have: what a grammar forces beyond its sequence ends before."""
        start = int(self.known[slot])
        tokens = tokens[: self.tokens.shape[1] - start]
        self.tokens[slot, start : start + len(tokens)] = tokens
        self.known[slot] = start + len(tokens)

    def of(self, slot: int) -> IntArray:
        """The slot's known tokens, a view."""
        return self.tokens[slot, : self.known[slot]]
