"""`ProposalDraw`: how draft tokens are drawn, by the parameters of the sequences that they are for."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.plan import NO_TOKEN, IntArray
from ..kernels import sampling
from ..kernels.draft_chain_cpu import DrawRules
from .chain_rules import chain_rules
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
        table = sampler.table
        penalised = table.penalised[slots].any()
        self._drawn: Tensor | None = None
        """[S, most]: tokens so far, where penalties must count them."""
        if penalised:
            self._drawn = torch.full((len(slots), most), NO_TOKEN, dtype=torch.int64, device=table.device)
        self._walk = sampler.grammars.walk(slots) if sampler.grammars else None
        adjusted = penalised or table.biased[slots].any() or (first < table.min_ends[slots]).any()
        self._adjusted = adjusted
        """Whether somebody's logits change before they are drawn from."""
        self._greedy = not (adjusted or table.kinds[slots].any())
        """Whether only the likeliest token is ever taken; `DRAW_KINDS` begins with that."""
        self._places: IntArray = np.full((len(slots), most), -1, np.int32)
        """[S, most]: which of `_scaled`, in all, a token was drawn from; -1: from none that matters."""
        self._scaled: list[Tensor] = []
        self._kept = 0
        """Rows of them."""

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
