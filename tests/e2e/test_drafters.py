"""Every drafter before a real target: the text is the target's own, whatever is proposed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from quire.core.config import EngineConfig
from quire.core.request import SamplingParams
from quire.engine.cache import KVCache
from quire.models.native import NativeRunner
from quire.models.runner import ModelRunner
from quire.speculation.draft_cache import DraftLayout
from quire.speculation.drafter import Drafter
from quire.speculation.hybrid import HybridDrafter
from quire.speculation.layerskip import LayerskipDrafter
from quire.speculation.model import ModelDrafter
from quire.speculation.ngram import NgramDrafter

from ..engine.harness import Harness, Sequence, make_engine
from ..models.conftest import CPU, load
from .test_parity import GQA

PROMPTS = [torch.randint(3, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 17, 41)]
TOKENS, LENGTH = 24, 100
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "seeded": SamplingParams(temperature=0.8, top_p=0.9, seed=3),
}


@pytest.fixture(scope="module", params=["llama", "windows"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    kinds: dict[str, Callable[[], transformers.PretrainedConfig]] = {
        "llama": lambda: transformers.LlamaConfig(**GQA),
        "windows": lambda: transformers.MistralConfig(**GQA, sliding_window=11),
    }
    folder: Path = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    transformers.AutoModelForCausalLM.from_config(kinds[request.param]()).eval().save_pretrained(folder)
    return load(folder)


def run(runner: ModelRunner, method: str | None, params: SamplingParams, sizes: tuple[int, ...]) -> list[Sequence]:
    """All prompts together, up to exactly `TOKENS` tokens each, with drafts of changing lengths."""
    engine = make_engine(runner, max_model_len=LENGTH)
    if method is not None:
        engine.draft_with(drafter_of(method, runner, engine.cache), EngineConfig(model="m"))
    harness = Harness(engine, drop_windows=True)
    sequences = [harness.add(slot, prompt, params, slot) for slot, prompt in enumerate(PROMPTS)]
    turn = 0
    while open_ := [s for s in sequences if len(s.output_ids) < TOKENS]:
        left = TOKENS - 1 - max(len(s.output_ids) for s in open_)
        harness.drafts = 0 if method is None else min(sizes[turn % len(sizes)], left)
        harness.step([(s, min(9, len(s.tokens) - s.computed)) for s in open_])
        turn += 1
    return sequences


def drafter_of(method: str, runner: ModelRunner, cache: KVCache) -> Drafter:
    if method == "ngram":
        return NgramDrafter(6, LENGTH)
    assert isinstance(runner, NativeRunner)
    if method == "layerskip":
        return LayerskipDrafter(runner, 1, cache, CPU)
    draft = runner if method == "itself" else runner.first(2)
    model = ModelDrafter(draft, DraftLayout(6, LENGTH, 4, 600), CPU, runner)
    return HybridDrafter(NgramDrafter(6, LENGTH), model) if method == "hybrid" else model


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("method", ["ngram", "layerskip", "itself", "first layers", "hybrid"])
def test_text_is_the_targets_own(runner: ModelRunner, method: str, params: str) -> None:
    alone = [sequence.tokens for sequence in run(runner, None, PARAMS[params], (0,))]
    sequences = run(runner, method, PARAMS[params], (4, 1, 0, 3))
    assert [sequence.tokens for sequence in sequences] == alone
    drafted = sum(output.drafted for sequence in sequences for output in sequence.outputs)
    right = sum(max(0, len(output.token_ids) - 1) for sequence in sequences for output in sequence.outputs)
    assert drafted or method == "ngram"
    # A draft that is the target itself, with the very noise of the target, is always right.
    assert right == drafted or method != "itself"
