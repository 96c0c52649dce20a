"""What the scheduler must know of model and pool, and how many pages a sequence needs."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ..core.errors import ConfigError
from ..core.model_spec import pages_needed
from ..core.plan import IntArray
from ..core.pruning import PolicyInfo, Refinement
from ..core.speculation import DraftInfo
from .table import NO_WINDOW


@dataclass(frozen=True)
class SchedulerConfig:
    """Limits and shapes; raises `ConfigError` when the pool cannot hold a single token."""

    num_pages: int
    """Pages of the KV pool."""
    page_size: int
    """Entries of one page."""
    num_layers: int
    num_kv_heads: int
    windows: tuple[int | None, ...]
    """Per layer: sliding window in tokens (an entry is seen while query - entry < window), None for full."""
    max_num_seqs: int
    """Most sequences that run at once (= slots of the engine)."""
    max_batch_tokens: int
    """Most tokens of one step."""
    max_waiting: int
    """Most sequences that wait."""
    max_model_len: int
    """Most tokens of a sequence, prompt and output together."""
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    max_stream_len: int = 0
    """As `max_model_len` where positions close up as it forgets (`PruneParams.positions`), if that is more."""
    model: str = ""
    """Name of the model whose keys and values the pool holds."""
    rope_length: int | None = None
    """See `core.model_spec.ModelSpec.rope_length`."""
    prefix_cache: bool = True
    """Keep computed prefixes for requests that begin alike."""
    num_host_pages: int = 0
    """Pages of the host pool, for what leaves the device; 0: there is none."""
    page_bytes: int = 0
    """Bytes of one page."""
    max_cache_ttl: float = 3600.0
    """Longest time, in seconds, that a request can have its prompt kept for after its end; 0: nothing is pinned."""
    policies: dict[str, PolicyInfo] = field(default_factory=dict)
    """Pruning policies by name."""
    refinements: tuple[Refinement, ...] = ()
    """Wrappers of their scores that work with the model."""
    prunes_under_pressure: bool = False
    """Before a sequence is preempted, those that allow it are pruned."""
    policy: str = "fcfs"
    """Of `scheduler.policy.POLICIES`."""
    max_itl: float | None = None
    """Seconds that a step which decodes should stay within; None: no target."""
    max_waiting_tokens: int | None = None
    """Most prompt tokens that wait, unless one request alone has more."""
    queue_timeout: float | None = None
    """Seconds in which a request must start."""
    draft: DraftInfo | None = None
    """Who proposes tokens; None: nobody."""

    def __post_init__(self) -> None:
        assert len(self.windows) == self.num_layers
        assert all(window is None or window >= 1 for window in self.windows)
        for name in ("num_pages", "page_size", "num_kv_heads", "max_num_seqs", "max_batch_tokens", "max_waiting"):
            assert getattr(self, name) >= 1, name
        assert self.max_model_len >= 2
        if self.pages_needed(1) > self.num_pages:
            raise ConfigError(
                f"the KV pool has {self.num_pages:,} pages but one token alone takes {self.pages_needed(1):,}; "
                "give it more memory (kv_memory)",
                param="kv_memory",
            )

    @property
    def num_rows(self) -> int:
        """Heads of all layers: rows of a page table."""
        return self.num_layers * self.num_kv_heads

    @cached_property
    def row_windows(self) -> IntArray | None:
        """Window per row of a page table, int32 [R]; None if no layer has one."""
        if not any(self.windows):
            return None
        per_layer = [NO_WINDOW if window is None else window for window in self.windows]
        return np.repeat(np.asarray(per_layer, np.int32), self.num_kv_heads)

    @cached_property
    def max_pinned(self) -> int:
        """Most pages that may be pinned: half the pool."""
        return self.num_pages // 2

    @cached_property
    def full_rows(self) -> npt.NDArray[np.intp]:
        """Rows without a window: those that can be pruned."""
        if self.row_windows is None:
            return np.arange(self.num_rows)
        return np.flatnonzero(self.row_windows == NO_WINDOW)

    def pages_needed(self, entries: int) -> int:
        """Most pages a sequence holds at any time until it has computed `entries` tokens."""
        return pages_needed(
            self.windows,
            self.num_kv_heads,
            entries,
            page_size=self.page_size,
            max_batch_tokens=self.max_batch_tokens,
        )

    def pages_pruned(self, entries: int, length: int) -> int:
        """The same of a sequence of `length` tokens whose layers without a window never hold more than `entries`."""
        spared = -(-max(length, entries) // self.page_size) - -(-entries // self.page_size)
        return self.pages_needed(max(length, entries)) - len(self.full_rows) * spared

    @cached_property
    def least_chunk(self) -> int:
        """Tokens to which chunks of a prompt that is pruned meanwhile are cut down where pages are short."""
        return min(self.max_batch_tokens, max(self.page_size, self.max_batch_tokens // 4))

    @cached_property
    def max_length(self) -> int:
        """Most tokens of an unpruned sequence, prompt and output, that context and pool allow.

        The last token needs no page: it is never computed.
        """
        low, high = 1, self.max_model_len - 1
        while low < high:
            middle = (low + high + 1) // 2
            if self.pages_needed(middle) <= self.num_pages:
                low = middle
            else:
                high = middle - 1
        return low + 1

    @cached_property
    def watermark(self) -> int:
        """Pages that admission leaves free for the sequences that already run: 1 %, at least one page per head."""
        return max(self.num_pages // 100, self.num_rows)
