"""The protocol of drafters: what proposes the tokens that the target model then verifies.

A drafter sees the tokens of every slot (`TokenHistory`) and proposes up to a few more. It need not be right, only often
enough, and it never decides what is said: verification does. Its own state (a cache, an index) may lag behind the
history: it catches up when it is asked, so that a sequence which never speculates costs it nothing.
Letters: S sequences asked, N slots, V vocabulary, k most tokens of a proposal.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from ..core.plan import IntArray
from ..core.speculation import CaughtUp, DraftMethod
from ..kernels.draft_chain_cpu import DrawRules
from .history import TokenHistory


class Draw(Protocol):
    """Draws the next draft token of each sequence, as the user's parameters would draw from the target's logits."""

    @property
    def limits(self) -> IntArray:
        """[S]: of those asked, how many tokens are to be drawn of each at most, where there is another way."""
        ...

    def rules(self, members: IntArray, active: Sequence[int]) -> DrawRules | None:
        """For a kernel that draws whole chains: how the tokens of the sequences `members` [S] are drawn, of the first
        `active[d]` of them that at depth d. Who gets rules draws all of these tokens by them, and calls for none.

        None where that takes more than logits: what was drawn before, or which tokens are wanted or not.
        """
        ...

    def __call__(self, logits: Tensor, members: IntArray, depth: int) -> Tensor:
        """Tokens [M] int64 on the device from logits [M, V] float32 of the sequences `members` [M], indices into those
        asked, as their draft token number `depth` (from 0); every earlier one must have been drawn so too."""
        ...


@dataclass(frozen=True, slots=True)
class Proposals:
    """Draft tokens of S sequences, on the host."""

    tokens: IntArray
    """[S, k], padded with `core.plan.NO_TOKEN`."""
    counts: IntArray
    """[S]: tokens of each, 0 to k."""
    parents: IntArray | None = None
    """[S, k]: which of the sequence's tokens each follows, an earlier one, or -1: the last known token; those that
    follow the same one differ. Of what breaks these rules nothing is verified from there on. None, and wherever each
    follows the one before it: chains."""
    caught_up: CaughtUp = field(default_factory=CaughtUp)
    """What a model with a cache of its own did to come to propose."""


class Drafter(Protocol):
    """Proposes continuations of the tokens in a history."""

    method: DraftMethod

    @property
    def num_bytes(self) -> int:
        """Of weights and cache of its own."""
        ...

    def assign(self, slot: int) -> None:
        """Another sequence has entered the slot: whatever is remembered of it is void."""
        ...

    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        """Up to `most` [S] >= 1 tokens to follow all known tokens of each of the slots [S], which are distinct.

        A drafter that samples from distributions takes every token from `draw`; one that just has candidates (n-gram)
        does not call it. Whether a drawn token is proposed may depend on those before it, not on which one it is: it
        is part of the draw that verification corrects. No proposal is as good as a short one: nothing fails for want of
        one.

        A tree is verified by walking it: at each of its tokens the target draws the next one with the noise of (seed,
        position), and goes on where a token that follows says the same. So the text is the one that the target would
        have drawn alone, however the tree came about. The rejection rule, which accepts more of what was drawn, holds
        for chains alone; so which tokens were drawn must not decide whether they become a tree or a chain.
        """
        ...

    def clear(self) -> None:
        """Forget all slots."""
        ...


@runtime_checkable
class Foresight(Protocol):
    """A drafter that can tell next to for free who has something to propose, so that others need not be asked."""

    def foresee(self, history: TokenHistory, slots: IntArray) -> IntArray:
        """[S]: how many tokens it would propose without drawing any, at least, to follow all known tokens of each of
        the slots [S], which are distinct; 0 to `MAX_DRAFT_TOKENS`."""
        ...


@runtime_checkable
class Memory(Protocol):
    """A drafter with a cache, which may have what it needs of a sequence before it is asked to propose for it."""

    def recall(self, history: TokenHistory, slots: IntArray) -> IntArray:
        """[S]: how many leading tokens of each of the slots [S], which have been assigned anew, it need not compute, if
        nothing is lost until it is asked."""
        ...
