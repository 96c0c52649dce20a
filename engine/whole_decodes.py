"""Steps of nothing but decodes and short drafts on a CPU, as one call of a kernel over the engine's own tables."""

import time
from itertools import chain

import numpy as np

from ..core.plan import MAX_FORCED_TOKENS, NO_TOKEN, BatchPlan, IntArray, Runs, SequencePlan
from ..kernels.decode_step_cpu import DecodeRows, DecodeStepCPU, SlotTables
from ..models.native import NativeRunner
from ..models.runner import ModelRunner
from .cache import KVCache
from .launched import LaunchedStep, Spent
from .proposed import Proposed
from .sampler import Sampler
from .slots import SlotTable


def decode_step(runner: ModelRunner, cache: KVCache, table: SlotTable) -> DecodeStepCPU | None:
    """What computes them; None where no kernel does it in one piece."""
    if cache.device.type != "cpu" or not isinstance(runner, NativeRunner):
        return None
    tables = SlotTables(
        pool=cache.pool,
        entry_positions=cache.entry_positions,
        page_table=cache.page_table,
        kept=cache.kept,
        computed=cache.computed,
        closes_up=cache.closes_up,
        unaltered=table.unaltered,
        min_ends=table.min_ends,
        strengths=table.strengths,
        keys=table.keys,
        newest=table.newest,
    )
    return runner.decode_step(tables, cache.layout.max_model_len)


def decode_rows(plan: BatchPlan, sampler: Sampler) -> DecodeRows | None:
    """What a step computes in which everyone brings its newest token, what a grammar has forced after it, and proposals
    (`drafts` says how many), draws what follows, and wants nothing else; None if it does more."""
    decodes, others = plan.decodes, plan.sequences
    ones = np.ones(len(decodes), np.int32)
    if not others:
        return DecodeRows(decodes.slots, decodes.starts, decodes.token_ids, ones, 0 * ones) if len(decodes) else None
    if not all(_is_plain(part, sampler) for part in others):
        return None
    slots, starts, drafts = ([getattr(part, name) for part in others] for name in ("slot", "start", "drafts"))
    counts, ids = [len(part.token_ids) for part in others], chain.from_iterable(part.token_ids for part in others)
    columns = (
        (decodes.slots, slots),
        (decodes.starts, starts),
        (decodes.token_ids, [*ids]),
        (ones, counts),
        (0 * ones, drafts),
    )
    every_slot, every_start, every_id, every_count, every_draft = (
        np.append(first, rest).astype(np.int32) for first, rest in columns
    )
    return DecodeRows(every_slot, every_start, every_id, every_count, every_draft)


def verified_rows(plan: BatchPlan, proposed: Proposed, sampler: Sampler) -> DecodeRows | None:
    """What a step computes and verifies in which all are decodes, of which some have proposals, chains, that nobody
    alters the target's logits for; None if it does more."""
    decodes = plan.decodes
    starts = decodes.starts + 1
    if plan.sequences or proposed.parents is not None or not sampler.table.all_unaltered(decodes.slots, starts):
        return None
    if sampler.grammars and any(sampler.grammars.bound(decodes.slots)):
        return None
    drafts: IntArray = np.zeros(len(decodes), np.int32)
    rows, width = proposed.asked.rows, int(proposed.counts.max())
    drafts[rows] = proposed.counts
    there = np.arange(1 + width) <= drafts[:, None]
    ids: IntArray = np.full(there.shape, NO_TOKEN, np.int32)
    ids[:, 0], ids[rows, 1:] = decodes.token_ids, proposed.tokens[:, :width]
    places: IntArray | None = None
    if proposed.places is not None:
        of_all: IntArray = np.full(there.shape, -1, np.int32)
        of_all[rows, 1:] = proposed.places[:, :width]
        places = of_all[there]
    return DecodeRows(decodes.slots, decodes.starts, ids[there], 1 + drafts, drafts, True, places, proposed.scaled)


def verify_at_once(plan: BatchPlan, compute: DecodeStepCPU, rows: DecodeRows, proposed: Proposed) -> LaunchedStep:
    """A step of `verified_rows`, verified by one call."""
    started = time.perf_counter()
    step = compute(rows)
    computed = started + step.forward_seconds
    tokens, counts, drafted = step.tokens, step.counts, rows.drafts
    assert tokens is not None
    none = np.zeros_like(drafted)
    by_model = none
    if proposed.drew.any():
        by_model = none.copy()
        by_model[proposed.asked.rows] = proposed.counts * proposed.drew
    return LaunchedStep(
        plan,
        moments=(started, computed, computed + step.sample_seconds),
        spent=Spent.by(proposed),
        decoded=tokens[np.arange(len(tokens)), counts - 1],
        runs=Runs(tokens, counts, drafted, by_model, none),
    )


def _is_plain(part: SequencePlan, sampler: Sampler) -> bool:
    if not part.sample or part.parents or part.score_ids or part.scratch or not part.start:
        return False
    most = 1 + MAX_FORCED_TOKENS if sampler.grammars.binds(part.slot) else 1
    return len(part.token_ids) - part.drafts <= most and sampler.table.states[part.slot].params.logprobs is None
