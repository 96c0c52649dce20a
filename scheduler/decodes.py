"""`DecodeBatch`: the sequences in steady decoding, as columns.

Such a sequence computes its newest token and samples the next, step after step. What a step must know of it lies in
arrays, one entry per slot, so planning and checking results cost a few vectorised operations for all of them. A
sequence joins when it has sampled a token and wants nothing else; it leaves with its slot.
"""

import numpy as np
import numpy.typing as npt

from ..core.plan import NO_TOKEN, Decodes, IntArray
from .prune_state import NEVER
from .sequence import SequenceState

Rows = npt.NDArray[np.intp]


class DecodeBatch:
    """Members and their columns. N slots."""

    def __init__(self, num_slots: int) -> None:
        self.members: list[SequenceState] = []
        """In no order: who leaves is replaced by the last."""
        self._rows: dict[int, int] = {}
        """Slot -> place among the members."""
        self._slots: IntArray = np.zeros(num_slots, np.int32)
        """Of the members, parallel to them."""
        self._tokens: IntArray = np.zeros(num_slots, np.int32)
        """[N]: newest token, the one to compute."""
        self._lengths: IntArray = np.zeros(num_slots, np.int32)
        """[N]: known tokens."""
        self._max_lengths: IntArray = np.zeros(num_slots, np.int32)
        self._min_lengths: IntArray = np.zeros(num_slots, np.int32)
        """[N]: end tokens count once so many tokens came before them."""
        self._stops: IntArray = np.full((num_slots, 0), NO_TOKEN, np.int32)
        """[N, widest]: end tokens, padded with what is none."""
        self._room: IntArray = np.zeros(num_slots, np.int32)
        """[N]: as `PageTable.room`."""
        self._wakes: IntArray = np.full(num_slots, NEVER, np.int32)
        """[N]: known tokens at which the sequence wants more than a row: `PruneState.wakes`."""
        self._speculates = np.zeros(num_slots, np.bool_)
        """[N]: whether its tokens may be drafted."""
        self._arrivals = np.zeros(num_slots, np.int64)
        self._joined = np.zeros(num_slots, np.bool_)

    def __len__(self) -> int:
        return len(self.members)

    def join(self, sequence: SequenceState) -> None:
        """The sequence decodes steadily from the next step on."""
        slot = sequence.slot
        assert slot is not None and sequence.decodes_plainly and not self._joined[slot]
        self._rows[slot] = row = len(self.members)
        self._slots[row] = slot
        self.members.append(sequence)
        self._tokens[slot] = sequence.tokens[-1]
        self._lengths[slot] = len(sequence.tokens)
        self._max_lengths[slot] = sequence.max_length
        self._min_lengths[slot] = sequence.num_prompt + sequence.request.params.min_tokens
        self._set_stops(slot, sequence.stop_ids)
        self._room[slot] = sequence.table.room
        self._wakes[slot] = sequence.wakes
        self._speculates[slot] = sequence.request.speculate
        self._arrivals[slot] = sequence.arrival
        self._joined[slot] = sequence.steady = True

    def leave(self, sequence: SequenceState) -> None:
        """The sequence, if it is a member, is none any more."""
        if not sequence.steady:
            return
        assert sequence.slot is not None
        self._joined[sequence.slot] = sequence.steady = False
        row = self._rows.pop(sequence.slot)
        final = self.members.pop()
        if final is not sequence:
            assert final.slot is not None
            self.members[row], self._slots[row], self._rows[final.slot] = final, final.slot, row

    def without_room(self) -> list[SequenceState]:
        """Members that need pages before they can compute their token."""
        lacking = self._room[self._slots[: len(self.members)]] == 0
        return [self.members[row] for row in np.flatnonzero(lacking).tolist()] if lacking.any() else []

    def ahead(self, decodes: Decodes) -> tuple[Decodes, list[SequenceState], list[SequenceState]]:
        """The tokens after those of `decodes`, which are in flight; the members whose they are; who needs pages for it.

        Without those whose length ends or wakes them before. Others may turn out to have ended all the same.
        """
        ends = np.minimum(self._max_lengths[decodes.slots], self._wakes[decodes.slots])
        going = self._joined[decodes.slots] & (decodes.starts + 2 < ends)
        slots, starts = decodes.slots[going], decodes.starts[going] + 1
        members = [self.members[self._rows[slot]] for slot in slots.tolist()]
        lacking = [members[row] for row in np.flatnonzero(self._room[slots] <= 1).tolist()]
        return Decodes(slots, starts, np.full(len(slots), NO_TOKEN, np.int32)), members, lacking

    def take_part(self, decodes: Decodes) -> bool:
        """Whether all members have a row in `decodes`."""
        return int(np.count_nonzero(self._joined[decodes.slots])) == len(self.members)

    def grown(self, sequence: SequenceState) -> None:
        """The member got pages."""
        assert sequence.slot is not None
        self._room[sequence.slot] = sequence.table.room

    def plan(self, budget: int) -> tuple[Decodes, list[SequenceState]]:
        """The next token of every member that has room for it; and who they are.

        If these are too many, of those that are in flight already, and of the `budget` oldest others.
        """
        slots, members = self._slots[: len(self.members)].copy(), self.members.copy()
        able = self._room[slots] > 0
        if len(slots) > budget or not able.all():
            promised = np.array([member.in_flight > 0 for member in members], np.bool_)
            rows = np.lexsort((self._arrivals[slots], ~promised))
            rows = np.sort(rows[able[rows]][: budget + np.count_nonzero(promised)])
            slots, members = slots[rows], [members[row] for row in rows.tolist()]
        return Decodes(slots, self._lengths[slots] - 1, self._tokens[slots]), members

    def speculating(self, decodes: Decodes) -> int:
        """How many rows of `decodes` are of sequences that may draft."""
        return int(np.count_nonzero(self._speculates[decodes.slots]))

    def arrivals(self, decodes: Decodes) -> npt.NDArray[np.int64]:
        """[D]: arrival numbers of the rows' sequences."""
        return self._arrivals[decodes.slots]

    def draft_limits(self, decodes: Decodes, most: int) -> tuple[IntArray, IntArray]:
        """[D] tokens that each row's sequence may still get, and [D] how many of up to `most` it may draft.

        One token always comes from the target, and nothing is drafted past a length at which the sequence wakes.
        """
        slots, known = decodes.slots, decodes.starts + 1
        left = self._max_lengths[slots] - known
        limits = np.clip(np.minimum(left, self._wakes[slots] - known) - 1, 0, most)
        return left, limits * self._speculates[slots]

    def settle(self, decodes: Decodes, sampled: IntArray) -> Rows:
        """Take in the tokens [D] of a step; returns the rows that ended, failed, left meanwhile or wake, ascending.

        Of these nothing is taken in: they are no steady decodes any more.
        """
        assert sampled.shape == decodes.slots.shape, "the engine sampled other rows than it was asked for"
        slots, lengths = decodes.slots, decodes.starts + 2
        self._tokens[slots] = sampled
        self._lengths[slots] = lengths
        self._room[slots] -= 1
        ends = np.minimum(self._max_lengths[slots], self._wakes[slots])
        over = (lengths >= ends) | (sampled == NO_TOKEN) | ~self._joined[slots]
        if self._stops.shape[1]:
            is_stop = (self._stops[slots] == sampled[:, None]).any(axis=1)
            over |= is_stop & (lengths > self._min_lengths[slots])
        return np.flatnonzero(over)

    def check(self) -> None:
        """AssertionError unless the columns say what the members' own states do."""
        assert self._joined.sum() == len(self.members) == len(self._rows)
        for row, member in enumerate(self.members):
            slot = member.slot
            assert slot is not None and member.steady and self._joined[slot], "a member without a slot"
            assert (self._slots[row], self._rows[slot]) == (slot, row)
            assert self._tokens[slot] == member.tokens[-1] and self._lengths[slot] == len(member.tokens)
            assert self._room[slot] == member.table.room and member.decodes_plainly
            assert self._wakes[slot] == member.wakes

    def _set_stops(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self._stops.shape[1]
        if missing > 0:
            self._stops = np.pad(self._stops, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        self._stops[slot] = NO_TOKEN
        self._stops[slot, : len(stop_ids)] = stop_ids
