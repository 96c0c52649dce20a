"""The layer-skip drafter over a real engine's cache: what the first layers say, and a target that does not notice."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from quire.core.config import EngineConfig
from quire.core.ids import SlotId
from quire.core.plan import BatchPlan, Compaction, PageGrants, SequencePlan, SlotAssignment
from quire.core.request import SamplingParams
from quire.engine.engine import Engine
from quire.models.native import NativeRunner
from quire.speculation.layerskip import LayerskipDrafter

from ..e2e.kept_oracle import Life, hide, load_reference
from ..models.conftest import CPU, VOCAB, Tiny, make_checkpoint
from .world import World, greedy

SLOTS, LENGTH, PAGE, OUTPUT = 3, 48, 4, 10
MODELS = {
    "gqa": ("llama", {"num_key_value_heads": 2}),
    "windows": (
        "qwen3",
        {
            "num_key_value_heads": 2,
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def made(request, tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), *MODELS[request.param])


class Target(World[LayerskipDrafter]):
    """A world whose history an engine extends; every slot owns the pages of its longest sequence."""

    def __init__(self, made: Tiny, num_layers: int) -> None:
        runner = made.load("native")
        assert isinstance(runner, NativeRunner)
        config = EngineConfig(model="tiny", page_size=PAGE, max_num_seqs=SLOTS, max_model_len=LENGTH)
        self.engine = Engine(runner, config, "native", CPU)
        drafter = LayerskipDrafter(runner, num_layers, self.engine.cache, CPU)
        super().__init__(drafter, SLOTS, LENGTH, VOCAB)

    def start(self, slot: int, prompt: Sequence[int]) -> None:
        """Compute a prompt and its first token."""
        self.enter(slot, prompt)
        spec = self.engine.spec
        rows, columns = np.divmod(np.arange(spec.num_layers * spec.num_kv_heads * LENGTH // PAGE), LENGTH // PAGE)
        pages = len(rows) * slot + np.arange(len(rows))
        grants = PageGrants(*(part.astype(np.int32) for part in (np.full_like(rows, slot), rows, columns, pages)))
        params = SamplingParams(temperature=0.0)
        assignment = SlotAssignment(SlotId(slot), params, 0, (), tuple(prompt), (), LENGTH)
        self._compute(BatchPlan((SequencePlan(SlotId(slot), 0, tuple(prompt), True),), (assignment,), grants=grants))

    def decode(self, slots: Sequence[int]) -> None:
        """One more token for each slot."""
        parts = [(slot, self.tokens(slot)) for slot in slots]
        self._compute(BatchPlan(tuple(SequencePlan(SlotId(s), len(t) - 1, (t[-1],), True) for s, t in parts)))

    def _compute(self, plan: BatchPlan) -> None:
        for part, output in zip(plan.sequences, self.engine.step(plan).sequences, strict=True):
            self.history.extend(part.slot, output.token_ids)


PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13], [30, 31, 32], [50]]


@pytest.mark.parametrize("num_layers", [1, 2])
def test_drafts_are_those_of_the_truncated_model_and_the_target_is_unharmed(made, num_layers):
    target = Target(made, num_layers)
    truncated = copy.deepcopy(made.model)
    truncated.model.layers = truncated.model.layers[:num_layers]
    truncated.config.num_hidden_layers = num_layers
    for slot, prompt in enumerate(PROMPTS):
        target.start(slot, prompt)
    for turn in range(OUTPUT):
        slots = [(turn + i) % SLOTS for i in range(1 + turn % SLOTS)]
        most = [1 + (turn + slot) % 4 for slot in slots]
        proposals = target.propose(slots, most)
        assert proposals == [greedy(truncated, target.tokens(s), k) for s, k in zip(slots, most, strict=True)]
        target.decode(range(SLOTS))
    for slot, prompt in enumerate(PROMPTS):
        assert target.tokens(slot)[len(prompt) :] == greedy(made.model, prompt, OUTPUT + 1)


def test_pruned_heads_draft_with_what_they_kept(made):
    """Every head forgets other entries, and other numbers of them."""
    target, dice = Target(made, 2), np.random.default_rng(0)
    reference = load_reference(made.folder)
    reference.model.layers = reference.model.layers[:2]
    target.start(0, PROMPTS[0])
    life, entries, shape = Life(0), len(PROMPTS[0]), target.engine.cache.kept.shape[1:]
    counts = dice.integers(1, entries, shape).astype(np.int32)
    keep = torch.zeros(*shape, entries, dtype=torch.int32)
    for layer, head in np.ndindex(*shape):
        kept = np.sort(dice.choice(entries, counts[layer, head], replace=False))
        keep[layer, head, : len(kept)] = torch.from_numpy(kept)
        life.forgotten |= {(layer, head, int(i)): entries for i in np.setdiff1d(np.arange(entries), kept)}
    compaction = Compaction(SlotId(0), counts.flatten(), None)
    target.engine.cache.compact(compaction, range(shape[0]), keep, "reference")
    reference.config.num_hidden_layers = shape[0]  # what is hidden is said of all layers
    for _ in range(4):
        ids = target.tokens(0)
        (got,) = target.propose([0], [4])
        for token in got:
            hide(life, reference.config, len(ids))
            with torch.inference_mode():
                assert token == reference(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
            ids.append(token)
        target.decode([0])


def test_lengths_of_the_cache_stay_as_they_were(made):
    target = Target(made, 2)
    target.start(0, PROMPTS[0])
    before = target.engine.cache.kept.clone(), target.engine.cache.computed.copy()
    target.propose([0], [4])
    assert torch.equal(target.engine.cache.kept, before[0])
    assert np.array_equal(target.engine.cache.computed, before[1])


def test_the_weights_are_the_targets_own(made):
    target = Target(made, 2)
    drafting, whole = target.drafter._runner.decoder, made.load("native").decoder
    assert target.drafter.num_bytes == 0
    assert len(drafting.layers) == 2 and len(whole.layers) == 3
