"""`ProposalDraw`: how draft tokens are drawn, by the parameters of the sequences that they are for."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.plan import NO_TOKEN, IntArray
from ..kernels import sampling
from ..kernels.draft_chain_cpu import DrawRules
from .chain_rules import chain_rules
from .grammar import DraftWalk
from .rows import Rows
from .sampler import Sampler
from .staging import upload


class ProposalDraw:
    """Draws for S sequences, by the parameters of their slots; fulfils `speculation.drafter.Draw`."""

    def __init__(self, sampler: Sampler, slots: IntArray, first: IntArray, most: int, limits: IntArray) -> None:
        """first [S]: position of each sequence's first draft token; most: tokens of a proposal; limits: see `Draw`."""
        self.limits = limits
        self.drew = np.zeros(len(slots), np.bool_)
        """[S]: of whom tokens were drawn."""
        self._sampler = sampler
        self._slots = slots
        self._first = first
        self._most = most
        self._places: IntArray = np.full((len(slots), most), -1, np.int32)
        """[S, most]: which of `_scaled`, in all, a token was drawn from; -1: from none that matters."""
        self._scaled: list[Tensor] = []
        self._kept = 0
        """Rows of them."""

    # Found when they are first asked for: who proposes without a model asks for none.

    @cached_property
    def _penalised(self) -> bool:
        return bool(self._sampler.table.penalised[self._slots].any())

    @cached_property
    def _drawn(self) -> Tensor | None:
        """[S, most]: tokens so far, where penalties must count them."""
        if not self._penalised:
            return None
        size, device = (len(self._slots), self._most), self._sampler.table.device
        return torch.full(size, NO_TOKEN, dtype=torch.int64, device=device)

    @cached_property
    def _walk(self) -> DraftWalk | None:
        grammars = self._sampler.grammars
        return grammars.walk(self._slots) if grammars else None

    @cached_property
    def _adjusted(self) -> bool:
        """Whether somebody's logits change before they are drawn from."""
        table, slots = self._sampler.table, self._slots
        return bool(self._penalised or table.biased[slots].any() or (self._first < table.min_ends[slots]).any())

    @cached_property
    def _greedy(self) -> bool:
        """Whether only the likeliest token is ever taken; `DRAW_KINDS` begins with that."""
        return not (self._adjusted or self._sampler.table.kinds[self._slots].any())

    def __call__(self, logits: Tensor, members: IntArray, depth: int) -> Tensor:
        """See `Draw`. A draft's vocabulary may be padded to another width than the target's."""
        self.drew[members] = True
        table = self._sampler.table
        logits = logits[:, : table.vocab_size]
        if self._greedy:
            return sampling.greedy_tokens(logits, self._sampler.backend)
        if logits.shape[1] < table.vocab_size:
            logits = pad(logits, (0, table.vocab_size - logits.shape[1]), value=float("-inf"))
        slots, prefix, rows = self._slots[members], None, None
        if self._drawn is not None:
            rows = upload(members.astype(np.int64), table.device)
            prefix = self._drawn[rows, :depth] if depth else None
        masks = None if self._walk is None else self._walk.masks(members)
        tokens, scaled = self._sampler.propose(logits, Rows(slots, self._first[members] + depth, prefix, masks=masks))
        if self._walk is not None and masks is not None:
            self._walk.take(members, tokens.tolist())
        if self._drawn is not None:
            self._drawn[rows, depth] = tokens
        if scaled is not None:
            free = members[table.free[slots]]
            self._places[free, depth] = np.arange(self._kept, self._kept + len(scaled))
            self._keep(scaled)
        return tokens

    def rules(self, members: IntArray, active: Sequence[int]) -> DrawRules | None:
        """See `Draw`."""
        if self._adjusted:
            return None
        self.drew[members] = True
        rules = chain_rules(self._sampler.table, self._slots[members], self._first[members], active)
        if len(rules.scaled):
            places = rules.places.numpy()
            self._places[members, : len(places)] = np.where(places < 0, -1, places + self._kept).T
            self._keep(rules.scaled)
        return rules

    def _keep(self, scaled: Tensor) -> None:
        self._scaled.append(scaled)
        self._kept += len(scaled)

    def drawn_from(self, chains: npt.NDArray[np.bool_]) -> tuple[IntArray, Tensor] | None:
        """What the tokens of the sequences that are `chains` [S] were drawn from, as `Proposed` has it; None: nothing
        that matters."""
        if not self._scaled:
            return None
        gapless = (self._places >= 0).cumprod(1, dtype=np.int32) * chains[:, None]
        scaled = self._scaled[0] if len(self._scaled) == 1 else torch.cat(self._scaled)
        return np.where(gapless, self._places, np.int32(-1)), scaled
