"""`DecodeBatch`: the sequences in steady decoding, as columns.

Such a sequence computes its newest token and samples the next, or drafts, step after step. What a step must know of it
lies in arrays, one entry per member, so planning and checking results cost a few vectorised operations for all of them.
A sequence joins when it has sampled a token and wants nothing else; it leaves with its slot.
"""

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ..core.plan import NO_TOKEN, Decodes, IntArray, StepOutput
from .sequence import SequenceState

Rows = npt.NDArray[np.intp]
_SLOTS, _TOKENS, _LENGTHS, _ENDS, _MIN_LENGTHS, _ROOM, _SPECULATES = range(7)


class DecodeBatch:
    """Members and their columns. N slots."""

    def __init__(self, num_slots: int) -> None:
        self.members: list[SequenceState] = []
        """In no order: who leaves is replaced by the last."""
        self._rows: dict[int, int] = {}
        """Slot -> place among the members."""
        self._columns: IntArray = np.zeros((7, num_slots + 1), np.int32)
        """Parallel to the members; what was written for somebody who left comes to lie in the last place, nobody's."""
        self._slots = self._columns[_SLOTS]
        self._tokens = self._columns[_TOKENS]
        """Newest token, the one to compute."""
        self._lengths = self._columns[_LENGTHS]
        """Known tokens."""
        self._ends = self._columns[_ENDS]
        """Known tokens at which the sequence ends, or wants more than a row: `PruneState.wakes`."""
        self._min_lengths = self._columns[_MIN_LENGTHS]
        """End tokens count once so many tokens came before them."""
        self._room = self._columns[_ROOM]
        """As `PageTable.room`."""
        self._speculates = self._columns[_SPECULATES]
        """Whether its tokens may be drafted."""
        self._undrafted = 0
        """Members whose may not."""
        self._nobody = num_slots
        self._max_lengths = np.zeros(num_slots + 1, np.int32)
        self._arrivals = np.zeros(num_slots + 1, np.int64)
        self._stops: IntArray = np.full((num_slots + 1, 0), NO_TOKEN, np.int32)
        """[N + 1, widest]: end tokens, padded with what is none."""
        self.bound = 0
        """Members whose outputs are bound to grammars."""
        self._whole: list[Decodes] = []
        """What is on its way, or was thought of, with a row of each member in their order."""

    def __len__(self) -> int:
        return len(self.members)

    def join(self, sequence: SequenceState) -> None:
        """The sequence decodes steadily from the next step on."""
        slot = sequence.slot
        assert slot is not None and sequence.decodes_plainly and not sequence.steady
        self._rows[slot] = row = len(self.members)
        self.members.append(sequence)
        known, least = len(sequence.tokens), sequence.num_prompt + sequence.request.params.min_tokens
        ends = min(sequence.max_length, sequence.wakes)
        speculates = sequence.request.speculate
        self._columns[:, row] = (slot, sequence.tokens[-1], known, ends, least, sequence.table.room, speculates)
        self._max_lengths[row] = sequence.max_length
        self._undrafted += not speculates
        self._arrivals[row] = sequence.arrival
        self._set_stops(row, sequence.stop_ids)
        self._whole.clear()
        self.bound += sequence.request.grammar is not None
        sequence.steady = True

    def leave(self, sequence: SequenceState) -> None:
        """The sequence, if it is a member, is none any more."""
        if not sequence.steady:
            return
        assert sequence.slot is not None
        sequence.steady = False
        self.bound -= sequence.request.grammar is not None
        self._undrafted -= not sequence.request.speculate
        row = self._rows.pop(sequence.slot)
        final = self.members.pop()
        if final is not sequence:
            assert final.slot is not None
            self.members[row], self._rows[final.slot] = final, row
            for column in (self._columns.T, self._max_lengths, self._arrivals, self._stops):
                column[row] = column[len(self.members)]
        self._whole.clear()

    def _places(self, decodes: Decodes) -> Rows | slice:
        """Where the rows' sequences are in the columns; the last place if they left."""
        return slice(len(self.members)) if self._is_whole(decodes) else self._found(decodes)

    def _found(self, decodes: Decodes) -> Rows:
        """The same, one by one."""
        return np.array([self._rows.get(slot, self._nobody) for slot in decodes.slots.tolist()], np.intp)

    def _is_whole(self, decodes: Decodes) -> bool:
        return any(decodes is whole for whole in self._whole)

    def without_room(self) -> list[SequenceState]:
        """Members that need pages before they can compute their token."""
        lacking = self._room[: len(self.members)] == 0
        return [self.members[row] for row in lacking.nonzero()[0].tolist()] if lacking.any() else []

    def ahead(self, decodes: Decodes) -> tuple[Decodes, list[SequenceState], list[SequenceState]]:
        """The tokens after those of `decodes`, which are in flight; the members whose they are; who needs pages for it.

        Without those whose length ends or wakes them before. Others may turn out to have ended all the same.
        """
        whole = self._is_whole(decodes)
        places = self._found(decodes)
        going = (places != self._nobody) & (decodes.starts + 2 < self._ends[places])
        places, slots, starts = places[going], decodes.slots[going], decodes.starts[going] + 1
        members = [self.members[place] for place in places.tolist()]
        lacking = [members[row] for row in np.flatnonzero(self._room[places] <= 1).tolist()]
        ahead = Decodes(slots, starts, np.full(len(slots), NO_TOKEN, np.int32))
        if whole and len(members) == len(self.members):
            self._whole.append(ahead)
        return ahead, members, lacking

    def take_part(self, decodes: Decodes) -> bool:
        """Whether all members have a row in `decodes`."""
        if self._is_whole(decodes):
            return True
        return int(np.count_nonzero(self._found(decodes) != self._nobody)) == len(self.members)

    def grown(self, sequence: SequenceState) -> None:
        """The member got pages."""
        assert sequence.slot is not None
        self._room[self._rows[sequence.slot]] = sequence.table.room

    def plan(self, budget: int) -> tuple[Decodes, list[SequenceState]]:
        """The next token of every member that has room for it; and who they are.

        If these are too many, of those that are in flight already, and of the `budget` oldest others.
        """
        members = self.members.copy()
        count = len(members)
        able = self._room[:count] > 0
        if count <= budget and able.all():
            decodes = Decodes(self._slots[:count].copy(), self._lengths[:count] - 1, self._tokens[:count].copy())
            self._whole = [decodes]  # nothing else is on its way
            return decodes, members
        self._whole = []
        promised = np.array([member.in_flight > 0 for member in members], np.bool_)
        rows = np.lexsort((self._arrivals[:count], ~promised))
        rows = np.sort(rows[able[rows]][: budget + np.count_nonzero(promised)])
        decodes = Decodes(self._slots[rows], self._lengths[rows] - 1, self._tokens[rows])
        return decodes, [members[row] for row in rows.tolist()]

    def speculating(self, decodes: Decodes) -> int:
        """How many rows of `decodes` are of sequences that may draft."""
        if not self._undrafted:
            return len(decodes)
        return int(np.count_nonzero(self._speculates[self._places(decodes)]))

    def arrivals(self, decodes: Decodes) -> npt.NDArray[np.int64]:
        """[D]: arrival numbers of the rows' sequences."""
        return self._arrivals[self._places(decodes)].copy()

    def draft_limits(self, decodes: Decodes, most: int) -> tuple[IntArray, IntArray]:
        """[D] tokens that each row's sequence may still get, and [D] how many of up to `most` it may draft.

        One token always comes from the target, and nothing is drafted past a length at which the sequence wakes.
        """
        places, known = self._places(decodes), decodes.starts + 1
        limits = np.minimum(np.maximum(self._ends[places] - known - 1, 0), most)
        return self._max_lengths[places] - known, limits * self._speculates[places]

    def let_draft(self, decodes: Decodes, drafts: IntArray, model_drafts: IntArray) -> Decodes:
        """The same rows, of which some draft: see `Decodes`."""
        drafting = replace(decodes, drafts=drafts, model_drafts=model_drafts)
        self._whole = [drafting if whole is decodes else whole for whole in self._whole]
        return drafting

    def rooms(self, decodes: Decodes) -> IntArray:
        """[D]: entries for which each row's sequence has pages."""
        return self._room[self._places(decodes)].copy()

    def settle(self, decodes: Decodes, output: StepOutput) -> Rows:
        """Take in the tokens of a step; returns the rows that ended, failed, left meanwhile or wake, ascending, and
        with them those that got something else.

        Of these nothing is taken in: they are no steady decodes any more.
        """
        newest, runs = output.decoded, output.runs
        assert newest.shape == decodes.slots.shape, "the engine sampled other rows than it was asked for"
        counts: IntArray | int = 1
        if runs is not None:
            counts, drafts = runs.counts, decodes.drafts
            assert drafts is not None and ((counts - 1 <= runs.drafted) & (runs.drafted <= drafts)).all(), (
                "more was drafted than planned, or accepted than drafted"
            )
        places, lengths = self._places(decodes), decodes.starts + 1 + counts
        self._whole = [whole for whole in self._whole if whole is not decodes]
        self._tokens[places] = newest
        self._lengths[places] = lengths
        self._room[places] -= counts
        over = (lengths >= self._ends[places]) | (newest == NO_TOKEN)
        if output.apart:
            over[[*output.apart]] = True
        if not isinstance(places, slice):
            over |= places == self._nobody
        if self._stops.shape[1]:
            if runs is None:
                is_stop = (self._stops[places] == newest[:, None]).any(axis=1)
                over |= is_stop & (lengths > self._min_lengths[places])
            else:
                over |= self._are_stopped(places, decodes, runs.token_ids)
        return over.nonzero()[0]

    def _are_stopped(self, places: Rows | slice, decodes: Decodes, token_ids: IntArray) -> npt.NDArray[np.bool_]:
        """[D]: whether an end token that counts is among those [D, W] that each row got, which `NO_TOKEN` pads."""
        is_stop = (self._stops[places][:, None] == token_ids[:, :, None]) & (token_ids[:, :, None] != NO_TOKEN)
        lengths = decodes.starts[:, None] + 2 + np.arange(token_ids.shape[1])
        return np.asarray((is_stop.any(axis=2) & (lengths > self._min_lengths[places][:, None])).any(axis=1))

    def check(self) -> None:
        """AssertionError unless the columns say what the members' own states do."""
        assert len(self.members) == len(self._rows)
        assert self._undrafted == sum(not member.request.speculate for member in self.members)
        for row, member in enumerate(self.members):
            slot = member.slot
            assert slot is not None and member.steady, "a member without a slot"
            assert (self._slots[row], self._rows[slot]) == (slot, row)
            assert self._tokens[row] == member.tokens[-1] and self._lengths[row] == len(member.tokens)
            assert self._room[row] == member.table.room and member.decodes_plainly
            assert self._ends[row] == min(member.max_length, member.wakes)
            assert self._arrivals[row] == member.arrival and self._max_lengths[row] == member.max_length
            assert {*self._stops[row].tolist()} - {NO_TOKEN} == {*member.stop_ids}
        assert self.bound == sum(member.request.grammar is not None for member in self.members)
        assert all(np.array_equal(whole.slots, self._slots[: len(self.members)]) for whole in self._whole)

    def _set_stops(self, row: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self._stops.shape[1]
        if missing > 0:
            self._stops = np.pad(self._stops, ((0, 0), (0, missing)), constant_values=NO_TOKEN)
        self._stops[row] = NO_TOKEN
        self._stops[row, : len(stop_ids)] = stop_ids
