"""Drafters that follow a script."""

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from quire.core.plan import NO_TOKEN, IntArray
from quire.core.speculation import DraftMethod
from quire.speculation.drafter import Drafter, Draw, Proposals
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


class TreeDrafter(ScriptedDrafter):
    """Proposes the trees that a function of slot, known tokens and limit gives: (parent, token) per node."""

    def __init__(self, tree: Callable[[int, list[int], int], list[tuple[int, int]]]) -> None:
        super().__init__(lambda slot, known: [])
        self.tree = tree

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        tokens = np.full((len(slots), int(most.max())), NO_TOKEN, np.int32)
        parents, counts = np.full_like(tokens, 77), np.zeros(len(slots), np.int32)
        for place, (slot, limit) in enumerate(zip(slots.tolist(), most.tolist(), strict=True)):
            self.known[slot] = history.of(slot).tolist()
            nodes = self.tree(slot, self.known[slot], limit)[:limit]
            counts[place] = len(nodes)
            for node, (parent, token) in enumerate(nodes):
                parents[place, node], tokens[place, node] = parent, token
        return Proposals(tokens, counts, parents)


class BranchingDrafter:
    """Hides what another drafter proposes in trees: beside it, other tokens of `vocab`, and what might follow those."""

    num_bytes = 0

    def __init__(self, inner: Drafter, vocab: int, seed: int = 0) -> None:
        self.inner, self.method, self.vocab = inner, inner.method, vocab
        self.dice = random.Random(seed)

    def assign(self, slot: int) -> None:
        self.inner.assign(slot)

    def clear(self) -> None:
        self.inner.clear()

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        found = self.inner.propose(history, slots, np.maximum(1, (2 * most) // 3), draw)
        assert found.parents is None
        tokens = np.full((len(slots), int(most.max())), NO_TOKEN, np.int32)
        parents, counts = np.full_like(tokens, -1), np.zeros(len(slots), np.int32)
        for place, (limit, count) in enumerate(zip(most.tolist(), found.counts.tolist(), strict=True)):
            nodes = self._hide(found.tokens[place, :count].tolist(), limit)
            counts[place] = len(nodes)
            for node, (parent, token) in enumerate(nodes):
                parents[place, node], tokens[place, node] = parent, token
        return Proposals(tokens, counts, parents)

    def _hide(self, path: list[int], limit: int) -> list[tuple[int, int]]:
        nodes: list[tuple[int, int]] = []
        last = -1
        while len(nodes) < limit:
            if path and (limit - len(nodes) <= len(path) or self.dice.random() < 0.5):
                node = last, path.pop(0)
                hidden = [i for i, other in enumerate(nodes) if other == node]
                if not hidden:
                    nodes.append(node)
                last = hidden[0] if hidden else len(nodes) - 1
                continue
            node = self.dice.randrange(-1, len(nodes)), self.dice.randrange(self.vocab)
            if node not in nodes:
                nodes.append(node)
        return nodes
