"""What crosses the border between server and engine process, as msgpack: no pickle, no tensors, no text but errors.

Server -> engine: `Submit`, `Abort`, `ReplaceDraft`, `Shutdown`. Engine -> server: `Progress`, `Ready`, `StartFailed`
while it starts, then a `StepReport` per step (and one a second while idle: the heartbeat), and what came of
`ReplaceDraft`.
"""

from collections.abc import Iterable, Iterator
from typing import Literal

import msgspec

from .errors import ErrorInfo
from .ids import RequestId
from .model_spec import ModelSpec
from .pruning import CacheUse, PolicyInfo, PruneCounts, Refinement
from .request import Request
from .speculation import DraftInfo, SpeculationCounts

FinishReason = Literal["stop", "length", "abort"]
Deadline = Literal["queue", "request"]
"""By when a request must have started (the operator's), and by when ended (its own)."""
DEADLINES: tuple[Deadline, ...] = ("queue", "request")
StuckReason = Literal["stalled", "overtaken", "unplannable"]
"""How it shows that the scheduler has forgotten a sequence: see `scheduler.watchdog`."""
WATCHDOG_REASONS: tuple[StuckReason, ...] = ("stalled", "overtaken", "unplannable")
PRIORITY_LEVELS = ("above", "normal", "below")
"""Priorities below 0 (served sooner), 0, and above 0."""


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """`core.plan.TokenLogprob` on the wire."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Tokens(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """New tokens of one choice of one request."""

    request_id: RequestId
    index: int
    """Which of the `n` choices."""
    token_ids: list[int]
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob] | None = None
    """Of consecutive prompt tokens, from the second on; may come in several messages, without tokens."""
    cached_tokens: int = 0
    """With the choice's first token: prompt tokens not computed, because the prefix cache had them when it started."""
    pinned_tokens: int = 0
    """With the choice's first token: prompt tokens that are kept for the time the request asked for."""
    cache: CacheUse | None = None
    """Of a sequence that prunes, after these tokens."""


class Recorded(msgspec.Struct, frozen=True, tag=True):
    """What the model said at the next tokens of one choice, which come after it; only if `Request.record` asks."""

    request_id: RequestId
    index: int
    rows: list[bytes]
    """Of `core.top_rows`, one per token; there may be more, of tokens behind the end, which do not come."""


class Finished(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """One choice is complete; comes after its last `Tokens`."""

    request_id: RequestId
    index: int
    reason: FinishReason
    queue_seconds: float = 0.0
    """From arrival in the engine process to the first step that worked on it."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The whole request ends with an error; nothing more comes for any of its choices."""

    request_id: RequestId
    error: ErrorInfo


Event = Tokens | Recorded | Finished | Failed


class Decoded(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """New tokens of many choices, as parallel columns: a `Tokens` with nothing but that, for each row."""

    request_ids: list[RequestId]
    indices: list[int]
    token_ids: list[int]
    """Those of one row after another."""
    counts: list[int] | None = None
    """Tokens of each row; None: one."""

    def runs(self) -> Iterator[list[int]]:
        """Of each row."""
        first = 0
        for count in self.counts or [1] * len(self.indices):
            yield self.token_ids[first : first + count]
            first += count


StepEvent = Event | Decoded


def single_events(events: Iterable[StepEvent]) -> Iterator[Event]:
    """Each event of one choice or request by itself, in order."""
    for event in events:
        if isinstance(event, Decoded):
            rows = zip(event.request_ids, event.indices, event.runs(), strict=True)
            yield from (Tokens(*row) for row in rows)
        else:
            yield event


class GrammarCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What bound outputs took, since the engine started."""

    compiled: int = 0
    """Grammars, whether they turned out to be usable or not."""
    compile_seconds: float = 0.0
    """Processor time of that, beside the steps."""
    found: int = 0
    """Requests whose grammar was compiled before they came."""
    forced_tokens: int = 0
    """Tokens that were not drawn: nothing else was allowed."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """State of scheduler and engine after a step. Totals count since the engine started."""

    running: int = 0
    """Sequences holding a slot."""
    waiting: int = 0
    """Sequences not yet started, or preempted."""
    held: int = 0
    """Those of them whose grammar is being compiled."""
    pages_used: int = 0
    """Pages of running sequences."""
    pages_cached: int = 0
    """Pages of prefixes that no running sequence uses; they are given up when others need the room."""
    pages_total: int = 0
    steps_total: int = 0
    preemptions_total: int = 0
    prompt_tokens_total: int = 0
    """Prompt tokens computed (recomputation after preemption not counted, nor what the prefix cache had)."""
    generation_tokens_total: int = 0
    prefix_queries_total: int = 0
    """Prompt tokens of sequences that started and looked for their prefix in the cache."""
    prefix_hits_total: int = 0
    """Those of them that were found there."""
    prefix_host_hits_total: int = 0
    """Those of them that were in host memory alone and were copied back."""
    prefix_pruned_hits_total: int = 0
    """Those of them whose entries were found pruned."""
    pages_pinned: int = 0
    """Pages of prefixes kept for a time that a request asked for; in use, cached, or in host memory alone."""
    pins_dropped_total: int = 0
    """Pinned blocks given up early, for a sequence that could not have gone on alone."""
    host_pages_parked: int = 0
    """Host pages of swapped-out sequences."""
    host_pages_cached: int = 0
    """Host pages with copies of prefixes."""
    host_pages_total: int = 0
    swap_out_sequences_total: int = 0
    """Preempted sequences that were swapped out."""
    swap_in_sequences_total: int = 0
    """Those that came back so."""
    swap_out_pages_total: int = 0
    """Pages copied to the host, those of prefixes included."""
    swap_in_pages_total: int = 0
    swap_out_bytes_total: int = 0
    swap_in_bytes_total: int = 0
    batch_tokens: int = 0
    """Rows of the last step."""
    step_seconds: float = 0.0
    """The last step: planning, forward pass, sampling, commit."""
    forward_seconds: float = 0.0
    prunes: dict[str, PruneCounts] = {}
    """Totals by policy."""
    lossy_preemptions_total: int = 0
    """Preempted sequences that were pruned before: recomputed, they forget something else."""
    waiting_tokens: int = 0
    """Prompt tokens of the sequences that wait."""
    waiting_priorities: dict[str, int] = {}
    """How many of them there are of each of `PRIORITY_LEVELS`."""
    timeouts_total: dict[str, int] = {}
    """Requests that ended late, by `Deadline`."""
    watchdog_total: dict[str, int] = {}
    """Requests ended because the scheduler passed them over, by `StuckReason`."""
    speculation: SpeculationCounts = SpeculationCounts()
    grammar_seconds_total: float = 0.0
    """Time in computing what grammars allow."""
    grammars: GrammarCounts = GrammarCounts()
    page_leaks_total: int = 0
    """Pages found to belong to nobody while nothing ran, and taken back."""


class StepReport(msgspec.Struct, frozen=True, tag=True):
    """Everything one step produced, in one message; with no events it is a heartbeat."""

    events: list[StepEvent]
    stats: EngineStats


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine settled on at start."""

    model: ModelSpec
    runner: Literal["native", "transformers"]
    device: str
    """Human-readable, e.g. `cpu (2 threads)` or `cuda (NVIDIA H200)`."""
    dtype: str
    max_model_len: int
    """Tokens, prompt and output together."""
    max_stream_len: int = 0
    """The same where positions close up as the sequence forgets (`PruneParams.positions`), if that is more."""
    page_size: int
    num_pages: int
    kv_bytes: int
    num_host_pages: int = 0
    """Pages of the host pool."""
    max_concurrency: float
    """How many requests of `max_model_len` tokens the pool holds at once."""
    policies: dict[str, PolicyInfo] = {}
    """Pruning policies by name."""
    refinements: tuple[Refinement, ...] = ()
    """Wrappers of their scores that work with the model."""
    draft: DraftInfo | None = None
    """Who proposes tokens; None: nobody, and every step gives a sequence one token."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Start-up progress, for people."""

    phase: str
    """E.g. `loading weights`, `warming up`."""
    done: int
    total: int


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine takes requests."""

    info: EngineInfo


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start; its process exits non-zero after this."""

    error: ErrorInfo


class DraftReplaced(msgspec.Struct, frozen=True, tag=True):
    """Another draft model is in use; answers `ReplaceDraft`."""

    draft: DraftInfo


class DraftRefused(msgspec.Struct, frozen=True, tag=True):
    """The old draft model stays in use; answers `ReplaceDraft`."""

    error: ErrorInfo


EngineMessage = StepReport | Progress | Ready | StartFailed | DraftReplaced | DraftRefused


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A new request."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Forget the request, whatever its state; unknown ids are ignored, nothing is answered."""

    request_id: RequestId


class ReplaceDraft(msgspec.Struct, frozen=True, tag=True):
    """Let another draft model take the present one's place, while requests are served. One at a time."""

    folder: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Stop at once and exit 0."""


ClientMessage = Submit | Abort | ReplaceDraft | Shutdown
