"""`SwapSpace`: preempted sequences in host memory, and what the next plan copies and puts away for them."""

import itertools

from ..core.plan import IntArray, Park
from ..core.prefix import Bundle
from .config import SchedulerConfig
from .host_tier import HostTier
from .sequence import SequenceState
from .swap import SwapCosts, SwappedTable, Swaps


class SwapSpace:
    """Swaps sequences out and in; their host pages are the tier's, which prefixes use too."""

    def __init__(self, config: SchedulerConfig, host: HostTier) -> None:
        self._config = config
        self._host = host
        self._tickets = itertools.count()
        self._parks: list[Park] = []
        self._unparked: list[int] = []
        self.swapped_out = 0
        """Sequences swapped out so far."""
        self.swapped_in = 0
        """Those that came back."""

    def takes(self, sequence: SequenceState) -> bool:
        """Whether there is room for all that the sequence holds."""
        return self._host.total > 0 and self._host.fits(sequence.table.num_pages)

    def swap_out(self, sequence: SequenceState, costs: SwapCosts) -> None:
        """Copy a sequence's own pages to the host if that pays and there is room; the caller then lets it leave.

        Blocks in the prefix cache are not copied: they stay there, on the device or the host, as long as others' do.
        But all are of a sequence that cannot be computed again. One that prunes is always swapped: what its policy has
        seen of it is not in the pages.
        """
        if not self._host.total:
            return
        finds_again = sequence.is_exact and self._config.prefix_cache
        shared = {n: bundle.digest for n, bundle in enumerate(sequence.blocks) if bundle is not None}
        shared = shared if finds_again else {}
        own = sequence.table.num_pages - len(shared) * self._config.num_rows
        leading = next((n for n in range(len(sequence.blocks)) if n not in shared), len(sequence.blocks))
        again = sequence.num_computed - leading * self._config.page_size
        may_be_computed_again = sequence.is_exact and sequence.request.prune is None
        if may_be_computed_again and not (own and costs.swap_pays(again, own)):
            return
        host = self._host.park(sequence.table.ids(list(shared)))
        if host is None:
            return
        assert sequence.slot is not None
        ticket, table = next(self._tickets), sequence.table
        self._parks.append(Park(sequence.slot, ticket))
        sequence.swapped = SwappedTable(
            ticket, host, table.held, table.kept, shared, len(sequence.blocks), sequence.num_computed
        )
        self.swapped_out += 1

    def bring_back(self, sequence: SequenceState, shared: list[Bundle], pages: IntArray) -> None:
        """Copy a swapped-out sequence's own pages to the device's `pages`; `shared` are the blocks it finds again."""
        assert sequence.swapped is not None
        self._host.unpark(pages, sequence.swapped.host)
        sequence.come_back(shared, pages)
        self.swapped_in += 1

    def discard(self, sequence: SequenceState) -> None:
        """A sequence does not come back as it was swapped out, if it was."""
        if sequence.swapped is not None:
            self._host.discard(sequence.swapped.host)
            self._unparked.append(sequence.swapped.ticket)
            sequence.swapped = None

    def take(self) -> Swaps:
        """What the plan that is made now copies and puts away."""
        swaps = Swaps(tuple(self._parks), tuple(self._unparked), *self._host.take_copies())
        self._parks.clear()
        self._unparked.clear()
        return swaps
