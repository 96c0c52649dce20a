"""Every metric, defined once, on a registry of its own. Names that vLLM has too are as in vLLM, so dashboards work.

Request times are measured in the server: what a client waits for, tokenizing included. A choice of a request with
n > 1 counts as a request of its own, as in vLLM.
"""

import time
from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from ..core.errors import QuireError
from ..core.messages import DEADLINES, PRIORITY_LEVELS, WATCHDOG_REASONS, EngineStats, FinishReason
from ..core.pruning import PruneCounts
from ..core.request import GRAMMAR_KINDS, GrammarKind
from ..scheduler.client import EngineClient
from .errors import ERROR_TABLE
from .speculation_metrics import SpeculationMetrics

TTFT_BUCKETS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
                80.0, 160.0, 640.0, 2560.0)  # fmt: skip
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0,
                 7.5, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
LATENCY_BUCKETS = (0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0,
                   240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
COUNT_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000)
ITERATION_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TIER_COUNTERS = (
    ("prefix_host_hits_total", "Prompt tokens found in host memory alone, and copied back."),
    ("prefix_pruned_hits_total", "Prompt tokens found as what was left of them by pruning."),
    ("swap_out_sequences_total", "Preempted sequences that were swapped out to host memory."),
    ("swap_in_sequences_total", "Swapped-out sequences that came back as they were."),
    ("swap_out_pages_total", "KV pages copied to host memory, of sequences and of prefixes."),
    ("swap_in_pages_total", "KV pages copied back from host memory."),
    ("swap_out_bytes_total", "Bytes of the KV pages copied to host memory."),
    ("swap_in_bytes_total", "Bytes of the KV pages copied back."),
    ("pins_dropped_total", "Pinned blocks given up early, for a sequence that could not have gone on alone."),
)
"""(field of `EngineStats`, help); named as the field."""
TIER_GAUGES = (
    ("kv_pages_pinned", "pages_pinned", "KV pages of prompts that are kept for the time their requests asked for."),
    ("host_pages_parked", "host_pages_parked", "Host pages of swapped-out sequences."),
    ("host_pages_cached", "host_pages_cached", "Host pages with copies of prefixes."),
    ("host_pages_total", "host_pages_total", "Host pages for swapping."),
)
"""(name, field, help)."""
GRAMMAR_COUNTERS = (
    ("compiled", "grammars_compiled", "Grammars compiled, or found to be unusable."),
    ("compile_seconds", "grammar_compile_seconds", "Processor time of that, beside the steps."),
    ("found", "grammar_cache_hits", "Requests whose grammar was compiled before they came."),
    ("forced_tokens", "grammar_forced_tokens", "Tokens that were not drawn: grammars allowed nothing else."),
)
"""(field of `GrammarCounts`, name, help)."""
PRUNE_REASONS = ("prompt", "decode", "pressure")
ENGINE_STATES = ("starting", "ready", "restarting", "stopped")


class Metrics:
    """The registry, what feeds it, and its text form."""

    def __init__(self, client: EngineClient, model_name: str, prefix: str) -> None:
        """Listen to `client`'s stats; label all with `model_name`; `prefix` stands before vLLM's names."""
        self.registry = CollectorRegistry()
        self._prefix = prefix
        self._model_name = model_name
        self._newest = EngineStats()
        """The engine's last report."""
        self._told = EngineStats()
        """The one whose totals the counters hold."""
        self._client = client
        self._define_requests()
        self._define_scheduler()
        self._define_tiers()
        self._define_pruning()
        self._speculation = SpeculationMetrics(self.registry, model_name, prefix)
        self._define_faults()
        self._define_engine(client)
        self._define_http()
        self._define_labels()
        ProcessCollector(registry=self.registry)
        client.add_stats_listener(self.on_stats)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(name, text, ["model_name"], registry=self.registry, buckets=buckets)
        return histogram.labels(self._model_name)

    def _define_requests(self) -> None:
        p = self._prefix
        self._success = Counter(
            p + "request_success",
            "Sequences that ended with their output, by reason.",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self.ttft = self._histogram(p + "time_to_first_token_seconds", "Arrival to first token.", TTFT_BUCKETS)
        self.itl = self._histogram(
            p + "inter_token_latency_seconds", "Between two deliveries of tokens of a sequence.", TOKEN_BUCKETS
        )
        self.tpot = self._histogram(
            p + "request_time_per_output_token_seconds",
            "Mean time per token after the first one, per sequence.",
            TOKEN_BUCKETS,
        )
        self.e2e = self._histogram(p + "e2e_request_latency_seconds", "Arrival to last token.", LATENCY_BUCKETS)
        self.queue = self._histogram(
            p + "request_queue_time_seconds", "Arrival in the engine to first step.", LATENCY_BUCKETS
        )
        self.prompt_length = self._histogram(p + "request_prompt_tokens", "Tokens of the prompt.", COUNT_BUCKETS)
        self.output_length = self._histogram(p + "request_generation_tokens", "Tokens generated.", COUNT_BUCKETS)
        self._bound = Counter(
            "quire:structured_requests",
            "Requests whose output is bound to a grammar, by how that was written.",
            ["model_name", "kind"],
            registry=self.registry,
        )
        self._aborts = Counter(
            "quire:requests_aborted",
            "Requests closed before their end, mostly by clients that went away, by the state they were in.",
            ["model_name", "state"],
            registry=self.registry,
        )
        self._failures = Counter(
            "quire:requests_failed",
            "Requests refused or failed, by kind.",
            ["model_name", "kind"],
            registry=self.registry,
        )

    def _define_scheduler(self) -> None:
        p = self._prefix
        self._running = self._gauge(p + "num_requests_running", "Sequences being computed.")
        self._waiting = self._gauge(p + "num_requests_waiting", "Sequences not yet started, or preempted.")
        self._usage = self._gauge(p + "kv_cache_usage_perc", "Share of KV pages in use; 1 is all of them.")
        self._preemptions = self._counter(p + "num_preemptions", "Sequences sent back to the queue.")
        self._prompt_tokens = self._counter(p + "prompt_tokens", "Prompt tokens computed.")
        self._generation_tokens = self._counter(p + "generation_tokens", "Tokens generated.")
        self._iteration = self._histogram(p + "iteration_tokens_total", "Tokens of a step.", ITERATION_BUCKETS)
        self._prefix_queries = self._counter(
            p + "prefix_cache_queries", "Prompt tokens looked for in the prefix cache when a sequence started."
        )
        self._prefix_hits = self._counter(p + "prefix_cache_hits", "Prompt tokens found there, and not computed.")
        self._pages_used = self._gauge("quire:kv_pages_used", "KV pages in use.")
        self._pages_cached = self._gauge(
            "quire:kv_pages_cached", "KV pages of prefixes that nobody uses now: room that is given up when needed."
        )
        self._pages_total = self._gauge("quire:kv_pages_total", "KV pages of the pool.")
        self._steps = self._counter("quire:engine_steps", "Steps computed.")
        self._step_seconds = self._histogram("quire:engine_step_seconds", "Time of a step.", TOKEN_BUCKETS)
        self._forward_seconds = self._histogram(
            "quire:engine_forward_seconds", "Time of a step in the model's forward pass.", TOKEN_BUCKETS
        )
        self._grammar_seconds = self._counter(
            "quire:grammar_mask_seconds", "Time spent on which tokens grammars allow, a part of the steps."
        )
        self._held = self._gauge(
            "quire:requests_waiting_for_grammar", "Waiting sequences whose grammar is being compiled."
        )
        self._grammars = {field: self._counter(f"quire:{name}", text) for field, name, text in GRAMMAR_COUNTERS}

    def _define_tiers(self) -> None:
        """Memory behind the pool, by the field of `EngineStats` that is shown."""
        self._tier_counters = {field: self._counter(f"quire:{field[:-6]}", text) for field, text in TIER_COUNTERS}
        self._tier_gauges = {field: self._gauge(f"quire:{name}", text) for name, field, text in TIER_GAUGES}

    def _define_pruning(self) -> None:
        """Per policy, which the engine names; nothing before it is ready."""

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter("quire:" + name, text, ["model_name", "policy", *labels], registry=self.registry)

        self._pruned_entries = counter("pruned_entries", "KV entries dropped by pruning, of all heads.")
        self._pruned_pages = counter("prune_pages_freed", "KV pages that pruning made available.")
        self._prune_seconds = counter("prune_seconds", "Time to choose what to keep.")
        self._prunes = counter("prunes", "Prunes, by what they were for.", "reason")
        self._lossy_preemptions = self._counter(
            "quire:lossy_preemptions", "Pruned sequences sent back to the queue: recomputed, they forget other entries."
        )

    def _define_faults(self) -> None:
        """What the scheduler ended, and what it found wrong."""
        self._waiting_tokens = self._gauge("quire:waiting_prompt_tokens", "Prompt tokens of the sequences that wait.")
        labels = ["model_name"]
        self._waiting_priorities = Gauge(
            "quire:requests_waiting_by_priority",
            "Waiting sequences whose priority comes before normal (a number below 0), is normal, or after it.",
            [*labels, "priority"],
            registry=self.registry,
        )
        self._timeouts = Counter(
            "quire:request_timeouts",
            "Requests not started in time (queue) or not ended in time (request).",
            [*labels, "kind"],
            registry=self.registry,
        )
        self._watchdog = Counter(
            "quire:watchdog",
            "Requests ended because the scheduler passed them over without reason: a fault of the server.",
            [*labels, "reason"],
            registry=self.registry,
        )
        self._leaks = self._counter("quire:page_leaks", "KV pages that belonged to nobody, and were taken back.")

    def _define_engine(self, client: EngineClient) -> None:
        """Values read from the client when the metrics are."""
        up = self._gauge("quire:engine_up", "1 while the engine takes requests.")
        up.set_function(partial(_is_in, client, "ready"))
        age = self._gauge("quire:engine_heartbeat_age_seconds", "Since the engine's last sign of life.")
        age.set_function(lambda: client.heartbeat_age)
        restarts = self._gauge("quire:engine_restarts", "How often the engine was started again.")
        restarts.set_function(lambda: client.restarts)
        states = Gauge(
            "quire:engine_state", "1 for the engine's state.", ["model_name", "state"], registry=self.registry
        )
        for state in ENGINE_STATES:
            states.labels(self._model_name, state).set_function(partial(_is_in, client, state))

    def _define_http(self) -> None:
        self._http = Counter(
            "quire:http_requests", "HTTP requests answered.", ["route", "status"], registry=self.registry
        )
        self.open_requests = Gauge("quire:http_requests_open", "HTTP requests being worked on.", registry=self.registry)

    def _define_labels(self) -> None:
        """Begin at 0 what is counted by label: a rate does not see the first event of a series that appears with it."""
        for way in GRAMMAR_KINDS:
            self._bound.labels(self._model_name, way)
        for reason in ("stop", "length"):
            self._success.labels(self._model_name, reason)
        for state in ("waiting", "generating"):
            self._aborts.labels(self._model_name, state)
        for kind in ERROR_TABLE:
            self._failures.labels(self._model_name, kind.__name__)
        for level in PRIORITY_LEVELS:
            self._waiting_priorities.labels(self._model_name, level)
        for deadline in DEADLINES:
            self._timeouts.labels(self._model_name, deadline)
        for fault in WATCHDOG_REASONS:
            self._watchdog.labels(self._model_name, fault)

    def bound(self, kind: GrammarKind) -> None:
        """A request's output is bound to a grammar."""
        self._bound.labels(self._model_name, kind).inc()

    def render(self) -> bytes:
        """The Prometheus text format."""
        self._take_totals()
        return generate_latest(self.registry)

    def on_stats(self, stats: EngineStats) -> None:
        """Take the engine's report of a step, or its heartbeat; its totals count when somebody asks.

        To count them takes a fifth of a millisecond, and a small model's steps take one.
        """
        if stats.steps_total <= self._newest.steps_total:
            self._take_totals()
        if stats.steps_total < self._newest.steps_total:
            # The engine's totals begin again at 0 when it is restarted; a counter must not go back.
            self._newest = self._told = EngineStats()
        if stats.steps_total > self._newest.steps_total:
            self._iteration.observe(stats.batch_tokens)
            self._step_seconds.observe(stats.step_seconds)
            self._forward_seconds.observe(stats.forward_seconds)
        self._newest = stats

    def _take_totals(self) -> None:
        stats, last = self._newest, self._told
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._held.set(stats.held)
        self._usage.set(stats.pages_used / stats.pages_total if stats.pages_total else 0.0)
        self._pages_used.set(stats.pages_used)
        self._pages_cached.set(stats.pages_cached)
        self._pages_total.set(stats.pages_total)
        self._preemptions.inc(max(0, stats.preemptions_total - last.preemptions_total))
        self._prompt_tokens.inc(max(0, stats.prompt_tokens_total - last.prompt_tokens_total))
        self._generation_tokens.inc(max(0, stats.generation_tokens_total - last.generation_tokens_total))
        self._prefix_queries.inc(max(0, stats.prefix_queries_total - last.prefix_queries_total))
        self._prefix_hits.inc(max(0, stats.prefix_hits_total - last.prefix_hits_total))
        self._grammar_seconds.inc(max(0, stats.grammar_seconds_total - last.grammar_seconds_total))
        for field, counter in self._grammars.items():
            counter.inc(max(0, getattr(stats.grammars, field) - getattr(last.grammars, field)))
        for field, counter in self._tier_counters.items():
            counter.inc(max(0, getattr(stats, field) - getattr(last, field)))
        for field, gauge in self._tier_gauges.items():
            gauge.set(getattr(stats, field))
        self._lossy_preemptions.inc(max(0, stats.lossy_preemptions_total - last.lossy_preemptions_total))
        info = self._client.info
        for policy in info.policies if info else ():
            self._add_prunes(policy, stats.prunes.get(policy, PruneCounts()), last.prunes.get(policy, PruneCounts()))
        if info and info.draft:
            self._speculation.add(info.draft, stats.speculation, last.speculation)
        self._waiting_tokens.set(stats.waiting_tokens)
        for level in PRIORITY_LEVELS:
            self._waiting_priorities.labels(self._model_name, level).set(stats.waiting_priorities.get(level, 0))
        self._leaks.inc(max(0, stats.page_leaks_total - last.page_leaks_total))
        for counter, now, before in (
            (self._timeouts, stats.timeouts_total, last.timeouts_total),
            (self._watchdog, stats.watchdog_total, last.watchdog_total),
        ):
            for label, total in now.items():
                counter.labels(self._model_name, label).inc(max(0, total - before.get(label, 0)))
        self._steps.inc(stats.steps_total - last.steps_total)
        self._told = stats

    def _add_prunes(self, policy: str, now: PruneCounts, last: PruneCounts) -> None:
        labels = self._model_name, policy
        self._pruned_entries.labels(*labels).inc(max(0, now.entries - last.entries))
        self._pruned_pages.labels(*labels).inc(max(0, now.pages - last.pages))
        self._prune_seconds.labels(*labels).inc(max(0.0, now.seconds - last.seconds))
        for reason in PRUNE_REASONS:
            more = now.prunes.get(reason, 0) - last.prunes.get(reason, 0)
            self._prunes.labels(*labels, reason).inc(max(0, more))

    def finished(self, reason: FinishReason) -> None:
        """A sequence ended with its output."""
        self._success.labels(self._model_name, reason).inc()

    def aborted(self, generating: bool) -> None:
        """A client went away before or after its first token."""
        self._aborts.labels(self._model_name, "generating" if generating else "waiting").inc()

    def failed(self, error: QuireError) -> None:
        """A request was refused or failed."""
        self._failures.labels(self._model_name, type(error).__name__).inc()

    def answered(self, route: str, status: int) -> None:
        """An HTTP request was answered; `route` is the path's template, never a client's free text."""
        self._http.labels(route, str(status)).inc()


def _is_in(client: EngineClient, state: str) -> float:
    return float(client.status == state)


class SequenceTimer:
    """Times one choice of one request."""

    __slots__ = ("_arrived", "_clock", "_first", "_last", "_metrics", "_tokens")

    def __init__(self, metrics: Metrics, arrived: float, clock: Callable[[], float] = time.perf_counter) -> None:
        """`arrived`: when the HTTP request came in, on `clock`."""
        self._metrics = metrics
        self._arrived = arrived
        self._clock = clock
        self._first = self._last = 0.0
        self._tokens = 0

    def on_tokens(self, count: int) -> None:
        """`count` >= 1 new tokens came."""
        now = self._clock()
        if self._tokens == 0:
            self._first = now
            self._metrics.ttft.observe(now - self._arrived)
        else:
            self._metrics.itl.observe(now - self._last)
        self._last = now
        self._tokens += count

    def on_end(self, reason: FinishReason, prompt_tokens: int, output_tokens: int, queue_seconds: float | None) -> None:
        """The choice is complete; `queue_seconds` is unknown when a stop string ended it."""
        metrics = self._metrics
        metrics.finished(reason)
        metrics.e2e.observe(self._clock() - self._arrived)
        metrics.prompt_length.observe(prompt_tokens)
        metrics.output_length.observe(output_tokens)
        if queue_seconds is not None:
            metrics.queue.observe(queue_seconds)
        if self._tokens > 1:
            metrics.tpot.observe((self._last - self._first) / (self._tokens - 1))
