"""A minimal scheduler for engine tests: it lends pages, drops what windows no longer see, and feeds tokens."""

import random
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from quire.core.config import EngineConfig
from quire.core.ids import SlotId
from quire.core.plan import (
    NO_TOKEN,
    BatchPlan,
    Decodes,
    PageDrop,
    PageGrants,
    SequenceOutput,
    SequencePlan,
    SlotAssignment,
    StepOutput,
)
from quire.core.pruning import PruneParams
from quire.core.request import Grammar, SamplingParams
from quire.engine.engine import Engine
from quire.kernels.backend import resolve_backend
from quire.models.placement import Placement
from quire.models.runner import ModelRunner
from quire.speculation.drafter import Drafter


def make_engine(runner: ModelRunner, drafter: Drafter | None = None, **settings: int | None) -> Engine:
    """An engine on the CPU in float32 with small pages."""
    options: dict[str, Any] = {"page_size": 4, "max_num_seqs": 6, "max_batch_tokens": 64} | settings
    config = EngineConfig(model="fake", **options)
    device = torch.device("cpu")
    place = Placement(device, torch.float32, resolve_backend(device, torch.float32))
    engine = Engine(runner, config, "native", place)
    if drafter is not None:
        engine.draft_with(drafter, config)
    return engine


@dataclass
class Sequence:
    """One running sequence as the scheduler would know it."""

    slot: SlotId
    prompt: list[int]
    params: SamplingParams
    seed: int
    tokens: list[int]
    computed: int = 0
    fresh: bool = True
    pages: dict[int, list[int]] = field(default_factory=dict)  # row -> its pages in order
    kept: dict[int, int] = field(default_factory=dict)  # row -> entries
    outputs: list[SequenceOutput] = field(default_factory=list)
    prune: PruneParams | None = None
    grammar: Grammar | None = None

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[len(self.prompt) :]


class Harness:
    """Drives an engine step by step; pages come back in random order, so no test leans on fresh ones."""

    def __init__(self, engine: Engine, drop_windows: bool = False, drafts: int = 0) -> None:
        """drafts: tokens proposed wherever a token is sampled."""
        self.engine = engine
        self.drop_windows = drop_windows
        self.drafts = drafts
        self.free = list(range(engine.info.num_pages))
        random.Random(1).shuffle(self.free)
        self.rows = engine.spec.num_layers * engine.spec.num_kv_heads

    def add(
        self,
        slot: int,
        prompt: list[int],
        params: SamplingParams | None = None,
        seed: int = 0,
        output: tuple[int, ...] = (),
        prune: PruneParams | None = None,
        grammar: Grammar | None = None,
    ) -> Sequence:
        """A new (or, with `output`, preempted and returning) sequence."""
        params = params or SamplingParams(temperature=0.0)
        sequence = Sequence(SlotId(slot), prompt, params, seed, prompt + list(output), prune=prune, grammar=grammar)
        sequence.pages = {row: [] for row in range(self.rows)}
        sequence.kept = dict.fromkeys(range(self.rows), 0)
        return sequence

    def release(self, sequence: Sequence) -> None:
        """Its pages may go to others."""
        for pages in sequence.pages.values():
            self.free.extend(pages)
            pages.clear()

    def step(self, work: list[tuple[Sequence, int]]) -> list[SequenceOutput]:
        """Compute the next so many known tokens of each sequence."""
        assignments, drops, grants, plans = [], [], [], []
        for sequence, count in work:
            if sequence.fresh:
                assignments.append(self._assignment(sequence))
                sequence.fresh = False
            drops += self._drops(sequence) if self.drop_windows else []
            plans.append(self._part(sequence, count))
            grants += self._grants(sequence, count + plans[-1].drafts)
        columns = np.array(grants, np.int32).reshape(-1, 4).T
        plan = BatchPlan(tuple(plans), tuple(assignments), tuple(drops), PageGrants(*columns))
        outputs = self.engine.step(plan).sequences
        for (sequence, count), output in zip(work, outputs, strict=True):
            stored = count + max(0, len(output.token_ids) - 1)
            sequence.computed += stored
            sequence.tokens.extend(output.token_ids + output.forced)
            sequence.outputs.append(output)
            for row in range(self.rows):
                sequence.kept[row] += stored
        return list(outputs)

    def generate(self, sequence: Sequence, count: int, chunk: int = 1000) -> list[int]:
        """Run the sequence alone until it has `count` new tokens."""
        while len(sequence.output_ids) < count:
            self.step([(sequence, min(chunk, len(sequence.tokens) - sequence.computed))])
        return sequence.output_ids[:count]

    def _assignment(self, sequence: Sequence) -> SlotAssignment:
        stop = (*self.engine.spec.eos_token_ids, *sequence.params.stop_token_ids)
        prompt, output = tuple(sequence.prompt), tuple(sequence.output_ids)
        own: dict[str, Any] = {"prune": sequence.prune, "grammar": sequence.grammar}
        return SlotAssignment(sequence.slot, sequence.params, sequence.seed, stop, prompt, output, 100, **own)

    def _part(self, sequence: Sequence, count: int) -> SequencePlan:
        end = sequence.computed + count
        scores: tuple[int, ...] = ()
        if sequence.params.prompt_logprobs is not None:
            scores = tuple(sequence.prompt[sequence.computed + 1 : end + 1])
        ids = tuple(sequence.tokens[sequence.computed : end])
        sample = end == len(sequence.tokens)
        drafts = self.drafts if sample else 0
        return SequencePlan(sequence.slot, sequence.computed, ids, sample, scores, drafts=drafts)

    def _grants(self, sequence: Sequence, count: int) -> list[tuple[int, int, int, int]]:
        grants: list[tuple[int, int, int, int]] = []
        for row, pages in sequence.pages.items():
            while len(pages) * self.engine.info.page_size < sequence.kept[row] + count:
                grants.append((sequence.slot, row, len(pages), self.free[0]))
                pages.append(self.free.pop(0))
        return grants

    def _drops(self, sequence: Sequence) -> list[PageDrop]:
        drops = []
        for layer, window in enumerate(self.engine.spec.windows):
            kv_heads = self.engine.spec.num_kv_heads
            rows = range(layer * kv_heads, (layer + 1) * kv_heads)
            unseen = 0 if window is None else max(0, sequence.kept[rows[0]] - window + 1) // self.engine.info.page_size
            if unseen:
                drops.append(PageDrop(sequence.slot, np.array(rows, np.int32), unseen))
                for row in rows:
                    self.free.extend(sequence.pages[row][:unseen])
                    del sequence.pages[row][:unseen]
                    sequence.kept[row] -= unseen * self.engine.info.page_size
        return drops


def in_columns(engine: Engine, known: bool) -> None:
    """Pure decode steps reach the engine as columns, as the scheduler sends them; with their tokens only if `known`."""
    step = engine.step

    def convert(plan: BatchPlan) -> StepOutput:
        parts, states = plan.sequences, engine.sampler.table.states
        asks_more = any(
            len(part.token_ids) > 1 or not part.sample or part.slot not in states
            or states[part.slot].params.logprobs is not None
            for part in parts
        )  # fmt: skip
        if asks_more or not parts:
            return step(plan)
        columns = [
            (part.slot, part.start, part.token_ids[0] if known or not part.start else NO_TOKEN) for part in parts
        ]
        drafts = np.array([part.drafts for part in parts], np.int32)
        decodes = Decodes(*np.array(columns, np.int32).T, *((drafts, drafts) if drafts.any() else ()))
        output = step(replace(plan, sequences=(), decodes=decodes))
        return replace(output, sequences=tuple(output.of_decode(row) for row in range(len(parts))))

    engine.step = convert  # type: ignore[method-assign]
