"""What a pruned model must say: a plain dense pass that hides from each query exactly what the engine had forgotten.

`Recorder` watches the engine forget; `expected_logprobs` replays that in the library's own model over whole sequences.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface

from quire.core.plan import BatchPlan
from quire.core.prefix import Bundle
from quire.engine.cache import KVCache
from quire.engine.engine import Engine
from quire.scheduler.loop import EngineLoop

NEVER = 2**31


@dataclass
class Life:
    """A sequence from an assignment to its end or preemption."""

    outputs: int
    """Tokens generated before."""
    forgotten: dict[tuple[int, int, int], int] = field(default_factory=dict)
    """(layer, head, position) -> position of the first query that no longer sees it."""
    passed_over: dict[tuple[int, int, int], set[int]] = field(default_factory=dict)
    """(layer, head, position of a query) -> positions that it did not read."""


class Recorder:
    """Notes per choice what each head has forgotten, and when; checks what a compaction must leave alone."""

    def __init__(self, loop: EngineLoop) -> None:
        self.lives: dict[tuple[str, int], list[Life]] = defaultdict(list)
        self._loop = loop
        engine: Any = loop.engine
        self._engine = engine
        # Their own, not those of a recorder that watched them before.
        self._launch, self._compact = Engine.launch.__get__(engine), KVCache.compact.__get__(engine.cache)
        self._engine.launch = self.launch
        self._engine.cache.compact = self.compact
        self.compactions = 0
        self._contexts: dict[Bundle, dict[tuple[int, int, int], int]] = {}
        """By pruned prefix: what was forgotten of it, and when, as in `Life.forgotten`."""

    def launch(self, plan: BatchPlan) -> Any:
        shared = self._shared_pages(arriving=plan.swap_ins.device)
        pool = self._engine.cache.pool
        before = pool[shared].clone()
        # The slots' occupants before the plan was made are those that are compacted.
        for assignment in plan.assignments:
            if assignment.restored is None:
                self.lives[self._owner(assignment.slot)].append(Life(len(assignment.output_ids)))
        selector_of = self._engine._selection.selector

        def watched(plan: BatchPlan) -> Any:
            selector = selector_of(plan)
            if selector is not None:
                select = selector.select
                selector.select = lambda *call: self._note(plan, call, select(*call))
            return selector

        self._engine._selection.selector = watched
        launched = self._launch(plan)
        self._engine._selection.selector = selector_of
        self._note_pruned_prefixes(plan)
        assert torch.equal(pool[shared], before), "a page that others may read was written"
        return launched

    def _note_pruned_prefixes(self, plan: BatchPlan) -> None:
        """What a plan publishes was forgotten by whoever publishes it; who begins with it, has forgotten the same."""
        begun = {assignment.slot for assignment in plan.assignments if assignment.kept is not None}
        for sequence in self._loop.scheduler._running:
            if sequence.base is not None and sequence.prune is not None:
                life, base = self.lives[sequence.request.id, sequence.index][-1], sequence.base
                if sequence.slot in begun:
                    life.forgotten.update(self._contexts[base])
                    self._check_begun(sequence.slot, sequence.prune.prefill_end, life)
                self._contexts.setdefault(base, dict(life.forgotten))

    def _check_begun(self, slot: int, context: int, life: Life) -> None:
        for head, positions in self._positions(slot).items():
            lost = {position for *where, position in life.forgotten if tuple(where) == head}
            assert [p for p in positions if p < context] == [p for p in range(context) if p not in lost]

    def _note(self, plan: BatchPlan, call: Any, selected: Any) -> Any:
        """Which entries the step's rows leave out in this layer; a row whose draft token is rejected comes again."""
        if selected is None:
            return None
        context, layer, _ = call
        rows = [(index, part, ahead) for index, part in enumerate(plan.parts()) for ahead in range(len(part.token_ids))]
        for piece, (start, count) in enumerate(
            zip(selected.query_start.tolist(), selected.query_lengths, strict=False)
        ):
            for offset, (index, part, ahead) in enumerate(rows[start : start + count]):
                if part.parents:  # who selects has none
                    continue
                query, life = part.start + ahead, self.lives[self._owner(part.slot)][-1]
                for head in range(context.kept.shape[2]):
                    whole = context.page_table[index, layer, head], context.kept[index, layer, head] + ahead
                    some = selected.page_table[piece, head], selected.kept[piece, head] + offset
                    every, read = (
                        set(context.entry_positions[table.long()].flatten()[: int(kept) + 1].tolist())
                        for table, kept in (whole, some)
                    )
                    assert read <= every and query in read
                    life.passed_over.pop((layer, head, query), None)
                    if every - read:
                        life.passed_over[layer, head, query] = every - read
        return selected

    def compact(self, compaction: Any, *rest: Any) -> None:
        cache, slot = self._engine.cache, compaction.slot
        before = self._positions(slot)
        self._compact(compaction, *rest)
        after = self._positions(slot)
        life, now = self.lives[self._owner(slot)][-1], int(cache.computed[slot])
        self.compactions += 1
        for head, positions in before.items():
            assert set(after[head]) <= set(positions) and sorted(after[head]) == after[head]
            for position in set(positions) - set(after[head]):
                life.forgotten[*head, position] = now

    def _owner(self, slot: int) -> tuple[str, int]:
        (sequence,) = [s for s in self._loop.scheduler._running if s.slot == slot]
        return sequence.request.id, sequence.index

    def _shared_pages(self, arriving: np.ndarray) -> Tensor:
        """Pages of published blocks, as they are when the step begins; but not those that are `arriving` with it."""
        scheduler = self._loop.scheduler
        bundles = {bundle for s in scheduler._running for bundle in (*s.blocks, s.base) if bundle is not None}
        bundles |= {*scheduler._cache._index}
        # A pruned prefix that is not known yet is filled by this very step.
        bundles = {bundle for bundle in bundles if bundle.kept is None or bundle in self._contexts}
        pages = [bundle.pages for bundle in bundles if bundle.pages is not None]
        return torch.from_numpy(
            np.setdiff1d(np.concatenate(pages) if pages else np.empty(0, np.int32), arriving)
        ).long()

    def _positions(self, slot: int) -> dict[tuple[int, int], list[int]]:
        cache = self._engine.cache
        found = {}
        for layer in range(cache.layout.num_layers):
            for head in range(cache.layout.num_kv_heads):
                count = int(cache.kept[slot, layer, head])
                pages = cache.page_table[slot, layer, head].long()
                found[layer, head] = cache.entry_positions[pages].flatten()[:count].tolist()
        return found


def load_reference(folder: Path) -> Any:
    """The library's model, whose attention hides what `hidden` says."""
    AttentionInterface.register("forgetful", _forgetful_attention)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="forgetful").eval()


attended: dict[int, Tensor] = {}
"""Layer -> [H, T, T]: weights of the last pass."""
_hidden: dict[int, Tensor] = {}
"""Layer -> [K, T, T] bool: query, entry."""


def _forgetful_attention(
    module, query, key, value, attention_mask, *, scaling=None, sliding_window=None, s_aux=None, **_
):
    groups = query.shape[1] // key.shape[1]
    scores = query[0] @ key[0].repeat_interleave(groups, 0).transpose(1, 2) * (scaling or query.shape[-1] ** -0.5)
    place = torch.arange(scores.shape[-1])
    distance = place[:, None] - place
    unseen = (distance < 0) | (distance >= (sliding_window or NEVER))
    unseen = unseen | _hidden[module.layer_idx].repeat_interleave(groups, 0)
    scores = scores.masked_fill(unseen, -torch.inf)
    if s_aux is not None:  # one more logit per head, without a value
        scores = torch.cat([scores, s_aux[:, None, None].expand(-1, scores.shape[1], 1)], -1)
    weights = attended[module.layer_idx] = scores.softmax(-1)[..., : len(place)]
    return (weights @ value[0].repeat_interleave(groups, 0)).transpose(0, 1)[None], None


def hide(life: Life, config: Any, size: int) -> None:
    """Let passes over `size` tokens see what the life had not forgotten."""
    for layer in range(config.num_hidden_layers):
        _hidden[layer] = torch.zeros(config.num_key_value_heads, size, size, dtype=torch.bool)
    for (layer, head, position), first in life.forgotten.items():
        _hidden[layer][head, first:, position] = True
    for (layer, head, query), positions in life.passed_over.items():
        if query < size:  # what was rejected at the end never comes
            _hidden[layer][head, query, list(positions)] = True


@torch.inference_mode()
def expected_logprobs(reference: Any, lives: list[Life], prompt: list[int], output: list[int]) -> Tensor:
    """[len(output), V]: log-probabilities of each generated token's place."""
    ids = [*prompt, *output[:-1]]
    config, size = reference.config, len(ids)
    rows = []
    for number, life in enumerate(lives):
        end = lives[number + 1].outputs if number + 1 < len(lives) else len(output)
        hide(life, config, size)
        logits = reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        start = len(prompt) - 1
        rows.append(logits[start + life.outputs : start + end].log_softmax(-1))
    return torch.cat(rows)
