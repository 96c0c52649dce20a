"""Drafters that follow a script."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from quire.core.plan import NO_TOKEN, IntArray
from quire.core.speculation import DraftMethod
from quire.speculation.drafter import Draw, Proposals
from quire.speculation.history import TokenHistory


class ScriptedDrafter:
    """Proposes what a function of the slot and its known tokens says; fulfils `Drafter`."""

    method: DraftMethod = "ngram"
    num_bytes = 0

    def __init__(self, guess: Callable[[int, list[int]], list[int]]) -> None:
        self.guess = guess
        self.known: dict[int, list[int]] = {}

    def assign(self, slot: int) -> None:
        self.known.pop(slot, None)

    def clear(self) -> None:
        self.known.clear()

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        tokens = np.full((len(slots), int(most.max())), NO_TOKEN, np.int32)
        counts = np.zeros(len(slots), np.int32)
        for place, (slot, limit) in enumerate(zip(slots.tolist(), most.tolist(), strict=True)):
            self.known[slot] = history.of(slot).tolist()
            guess = self.guess(slot, self.known[slot])[:limit]
            tokens[place, : len(guess)] = guess
            counts[place] = len(guess)
        return Proposals(tokens, counts)


class SamplingDrafter(ScriptedDrafter):
    """Draws its tokens from logits that are a function of the tokens before."""

    method: DraftMethod = "model"

    def __init__(self, logits: Callable[[list[int]], Tensor]) -> None:
        super().__init__(lambda slot, known: [])
        self.logits = logits

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        known = [history.of(slot).tolist() for slot in slots.tolist()]
        tokens = np.full((len(slots), int(most.max())), NO_TOKEN, np.int32)
        for depth in range(int(most.max())):
            # In another order than they were asked for: a draw goes by what it is told.
            members = np.flatnonzero(most > depth).astype(np.int32)[::-1].copy()
            drawn = draw(torch.stack([self.logits(known[member]) for member in members.tolist()]), members, depth)
            for member, token in zip(members.tolist(), drawn.tolist(), strict=True):
                known[member].append(token)
                tokens[member, depth] = token
        return Proposals(tokens, most)
