"""`LayerskipDrafter`: the target drafts with its own first layers, over its own KV pages.

Self-speculation by early exit (LayerSkip, Elhoushi et al. 2024; Draft & Verify, Zhang et al. 2023). Keys and values of
a lower layer do not depend on the layers above, so what drafting stores for its tokens is what verification stores
there once more: nothing needs to be caught up, kept valid or freed.
"""

import numpy as np
import torch

from ..core.plan import IntArray
from ..core.speculation import DraftMethod
from ..models.native import NativeRunner
from ..models.placement import Placement
from .chain import draft_chain, single_rows, to_proposals
from .drafter import Draw, Proposals
from .history import TokenHistory
from .target import TargetCache


class LayerskipDrafter:
    """Fulfils `Drafter`. Slots that propose have pages for as many entries more as they may propose tokens."""

    method: DraftMethod = "layerskip"
    num_bytes = 0

    def __init__(self, target: NativeRunner, num_layers: int, cache: TargetCache, place: Placement) -> None:
        """num_layers: 1 to one less than the target has."""
        self._runner = target.first(num_layers)
        self._cache, self._place = cache, place

    def assign(self, slot: int) -> None:
        """See `Drafter`; nothing is remembered."""

    def clear(self) -> None:
        """See `Drafter`; nothing is remembered."""

    @torch.inference_mode()
    def propose(self, history: TokenHistory, slots: IntArray, most: IntArray, draw: Draw) -> Proposals:
        """See `Drafter`. Of each slot all known tokens but the newest have been computed."""
        members = np.argsort(-most, kind="stable").astype(np.int32)
        wanted, chosen = most[members], slots[members]
        last = history.known[chosen] - 1
        # Their logical positions, where these are others, verification writes.
        places = self._cache.rotary_starts(chosen, last)
        numbers = np.stack([chosen, places, history.tokens[chosen, last]]).astype(np.int64)
        slot_rows, positions, ids = torch.from_numpy(numbers).to(self._place.device)
        longest = self._cache.longest(chosen, wanted.tolist())
        table, kept = self._cache.tables(slot_rows, longest)
        layers = self._runner.spec.num_layers
        context = single_rows(
            self._cache.pool,
            self._cache.entry_positions,
            (table[:, :layers], kept[:, :layers]),
            positions,
            longest,
            self._place.backend,
        )
        # Where frequencies depend on how long a sequence gets, which is not known here, some drafts are worse for it.
        lengths = positions + 1
        rows = torch.arange(len(slots), device=self._place.device)
        logits = self._runner.forward(ids, positions, lengths, context, rows)
        context.kept.add_(1)
        context.positions.add_(1)
        drawn = draft_chain(self._runner, logits, context, lengths, members, wanted, draw)
        return to_proposals(drawn, members, wanted, most)
