"""What a drafter is shown: all known tokens, though many steps went by in which nobody asked it."""

from typing import cast

import numpy as np
import torch

from quire.core.ids import SlotId
from quire.core.plan import BatchPlan, Decodes, IntArray, SequenceOutput, SequencePlan, SlotAssignment
from quire.core.request import SamplingParams
from quire.engine.sampler import Sampler
from quire.engine.speculation import Speculation
from quire.speculation.drafter import Drafter, Draw, Proposals
from quire.speculation.history import TokenHistory

from ..models.conftest import CPU

VOCAB, SLOTS = 50, 4


class Looker:
    """Proposes nothing; remembers what it was shown."""

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def assign(self, slot: int) -> None:
        pass

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        self.seen = {slot: history.of(slot).tolist() for slot in slots.tolist()}
        return Proposals(np.zeros((len(slots), 1), np.int32), np.zeros(len(slots), np.int32))


def test_tokens_of_many_steps_are_known_when_somebody_asks() -> None:
    sampler, looker, rng = Sampler(SLOTS, VOCAB, torch.device("cpu"), CPU.backend), Looker(), np.random.default_rng(1)
    speculation = Speculation(cast(Drafter, looker), sampler, max_length=1000)
    known: dict[int, list[int]] = {}

    def enter(slot: int) -> None:
        known[slot] = rng.integers(VOCAB, size=5).tolist()
        given = SlotAssignment(SlotId(slot), SamplingParams(), 1, (), tuple(known[slot]), (), 999)
        sampler.table.assign(given)
        speculation.assign(given)

    for slot in range(SLOTS):
        enter(slot)
    for step in range(200):
        slots = np.arange(SLOTS, dtype=np.int32)
        if step % 70 > 50:  # others take part
            slots = rng.permutation(SLOTS)[:3].astype(np.int32)
        tokens = rng.integers(VOCAB, size=len(slots)).astype(np.int32)
        apart = {1: SequenceOutput((int(tokens[1]),), forced=(3, 4))} if step % 9 == 0 else {}
        for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
            known[slot].append(token)
        if apart:
            known[int(slots[1])] += [3, 4]
        drafter = next((slot for slot in range(SLOTS) if slot not in slots), None)
        parts: tuple[SequencePlan, ...] = ()
        outputs: tuple[SequenceOutput, ...] = ()
        if drafter is not None:
            known[drafter] += [7, 8]
            parts = (SequencePlan(SlotId(drafter), 0, (1,), sample=True),)
            outputs = (SequenceOutput((7, 8)),)
        speculation.note(BatchPlan(parts, decodes=Decodes(slots, slots, tokens)), tokens, outputs, apart)
        if step in (3, 90, 199):
            asking = [SequencePlan(SlotId(slot), len(ids) - 1, (ids[-1],), sample=True, drafts=2)
                      for slot, ids in known.items()]  # fmt: skip
            speculation.propose(BatchPlan(tuple(asking)))
            assert looker.seen == known
        if step in (40, 91):
            enter(2)
