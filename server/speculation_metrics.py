"""What /metrics says of speculative decoding; nothing where nobody drafts."""

from collections.abc import Sequence
from itertools import zip_longest

from prometheus_client import CollectorRegistry, Counter, Gauge

from ..core.speculation import DraftInfo, SpeculationCounts


class SpeculationMetrics:
    """Counters with vLLM's names for what vLLM counts too: a draft is one sequence's proposal in one step."""

    def __init__(self, registry: CollectorRegistry, model_name: str, prefix: str) -> None:
        """Define them on `registry`; label all with `model_name`; `prefix` stands before vLLM's names."""
        self._model_name = model_name

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model_name", *labels], registry=registry)

        self._drafts = counter(prefix + "spec_decode_num_drafts", "Proposals of at least one token.")
        self._draft_tokens = counter(prefix + "spec_decode_num_draft_tokens", "Tokens proposed.")
        self._accepted = counter(prefix + "spec_decode_num_accepted_tokens", "Proposed tokens that were accepted.")
        self._accepted_per_position = counter(
            prefix + "spec_decode_num_accepted_tokens_per_pos",
            "Proposed tokens that were accepted, by their place in the proposal, from 0.",
            "position",
        )
        self._lengths = counter(
            "quire:draft_lengths",
            "Lengths that were asked for, once per step and sequence that decodes and may speculate; 0: no draft.",
            "length",
        )
        self._draft_seconds = counter("quire:draft_seconds", "Time spent on proposing.")
        self._step_seconds = counter(
            "quire:speculation_step_seconds", "Time of all steps: what quire:draft_seconds is a part of."
        )
        self._cached_tokens = counter(
            "quire:draft_cached_tokens", "Tokens of sequences that the draft model found in its cache, computed before."
        )
        self._computed_tokens = counter(
            "quire:draft_computed_tokens", "Tokens of sequences that the draft model computed to propose what follows."
        )
        self._info = Gauge(
            "quire:drafter_info",
            "1 for the drafter in use; max_tokens is its longest proposal, fixed whether all are so long.",
            ["model_name", "method", "name", "max_tokens", "fixed"],
            registry=registry,
        )
        self._bytes = Gauge("quire:drafter_bytes", "Bytes of its weights and cache.", ["model_name"], registry=registry)

    def add(self, draft: DraftInfo, now: SpeculationCounts, last: SpeculationCounts) -> None:
        """Take totals of the engine; `last`: those before, or zeros where the engine began anew."""
        model = self._model_name
        self._info.clear()  # of one whose place another took nothing stays
        self._info.labels(model, draft.method, draft.name, str(draft.most), str(draft.fixed).lower()).set(1)
        self._bytes.labels(model).set(draft.num_bytes)
        for metric, more in (
            (self._drafts, now.drafts - last.drafts),
            (self._draft_tokens, now.draft_tokens - last.draft_tokens),
            (self._accepted, now.accepted_tokens - last.accepted_tokens),
            (self._draft_seconds, now.draft_seconds - last.draft_seconds),
            (self._step_seconds, now.step_seconds - last.step_seconds),
            (self._cached_tokens, now.cached_tokens - last.cached_tokens),
            (self._computed_tokens, now.computed_tokens - last.computed_tokens),
        ):
            metric.labels(model).inc(max(0, more))
        self._add_each(self._accepted_per_position, draft.most, now.accepted_per_position, last.accepted_per_position)
        self._add_each(self._lengths, draft.most + 1, now.lengths, last.lengths)

    def _add_each(self, metric: Counter, size: int, now: Sequence[int], last: Sequence[int]) -> None:
        """One series per index, all there from the start: a rate does not see the first event of a new one."""
        for index, (_, total, before) in enumerate(zip_longest(range(size), now, last, fillvalue=0)):
            metric.labels(self._model_name, str(index)).inc(max(0, total - before))
