"""What drafter tests share: a history that a pretended target extends, greedy draws, and the library's greedy text."""

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from quire.core.ids import SlotId
from quire.core.plan import NO_TOKEN, IntArray, SlotAssignment
from quire.core.request import SamplingParams
from quire.core.speculation import CaughtUp
from quire.kernels.draft_chain_cpu import DrawRules
from quire.speculation.drafter import Drafter, Proposals
from quire.speculation.history import TokenHistory

D = TypeVar("D", bound=Drafter)


class GreedyDraw:
    """Takes the likeliest token, and checks that it is asked as the protocol says."""

    def __init__(self, most: IntArray, vocab_size: int, *, whole: bool = True) -> None:
        """whole: whether chains may be drawn by a kernel, unasked."""
        self.whole = whole
        self.limits = self.most = most
        self.vocab_size = vocab_size
        self.drawn = np.zeros(len(most), np.int32)
        self.seen: dict[tuple[int, int], Tensor] = {}

    def __call__(self, logits: Tensor, members: IntArray, depth: int) -> Tensor:
        assert logits.shape == (len(members), self.vocab_size) and logits.dtype == torch.float32
        assert len(set(members.tolist())) == len(members)
        assert (self.drawn[members] == depth).all() and (self.most[members] > depth).all()
        self.drawn[members] += 1
        self.seen |= {(member, depth): row.clone() for member, row in zip(members.tolist(), logits, strict=True)}
        return logits.argmax(-1)

    def rules(self, members: IntArray, active: Sequence[int]) -> DrawRules | None:
        assert (self.drawn[members] == 0).all()
        assert list(active) == [(self.most[members] > depth).sum() for depth in range(len(active))]
        return DrawRules.likeliest(len(members)) if self.whole else None


class NeverDraw:
    """The draw of drafters that sample from no distribution."""

    limits: IntArray = np.empty(0, np.int32)

    def __call__(self, logits: Tensor, members: IntArray, depth: int) -> Tensor:
        raise AssertionError("nothing is to be drawn")

    def rules(self, members: IntArray, active: Sequence[int]) -> DrawRules | None:
        raise AssertionError("nothing is to be drawn")


class World(Generic[D]):
    """A history and a drafter that works on it."""

    def __init__(self, drafter: D, num_slots: int, max_length: int, vocab_size: int) -> None:
        self.drafter, self.vocab_size = drafter, vocab_size
        self.history = TokenHistory(num_slots, max_length)
        self.caught_up = CaughtUp()
        """In the last proposal."""
        self.whole = True
        """See `GreedyDraw`."""
        self.logits: dict[tuple[int, int], Tensor] = {}
        """Of the last proposal, unless whole chains were drawn, by sequence and depth."""

    def enter(self, slot: int, tokens: Sequence[int], namespace: object = "") -> None:
        """A new sequence in the slot."""
        params, most = SamplingParams(), self.history.tokens.shape[1]
        prompt, own = tuple(tokens), (namespace,)
        self.history.assign(SlotAssignment(SlotId(slot), params, 0, (), prompt, (), most, namespace=own))
        self.drafter.assign(slot)

    def propose(self, slots: Sequence[int], most: Sequence[int], drawn: Sequence[int] | None = None) -> list[list[int]]:
        """What the drafter proposes for the slots, by greedy draws, of which there may be `drawn`."""
        limits = np.array(most, np.int32)
        draw = GreedyDraw(limits, self.vocab_size, whole=self.whole)
        if drawn is not None:
            draw.limits = np.array(drawn, np.int32)
        proposals = self.drafter.propose(self.history, np.array(slots, np.int32), limits, draw)
        self.caught_up, self.logits = proposals.caught_up, draw.seen
        return lists(proposals, limits)

    def tokens(self, slot: int) -> list[int]:
        """The slot's known tokens."""
        return self.history.of(slot).tolist()


def lists(proposals: Proposals, most: IntArray) -> list[list[int]]:
    """The proposals as lists, after a check of their form."""
    assert proposals.tokens.dtype == proposals.counts.dtype == np.int32
    assert len(proposals.tokens) == len(proposals.counts) == len(most)
    assert (proposals.counts <= most).all()
    beyond = np.arange(proposals.tokens.shape[1]) >= proposals.counts[:, None]
    assert (proposals.tokens[beyond] == NO_TOKEN).all() and (proposals.tokens[~beyond] >= 0).all()
    return [row[:count].tolist() for row, count in zip(proposals.tokens, proposals.counts.tolist(), strict=True)]


@torch.inference_mode()
def greedy(model: PreTrainedModel, tokens: Sequence[int], count: int, vocab_size: int | None = None) -> list[int]:
    """The library's own greedy continuation within `vocab_size`, each token computed from scratch."""
    ids = list(tokens)
    for _ in range(count):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, :vocab_size].argmax()))
    return ids[len(tokens) :]
