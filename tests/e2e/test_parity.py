"""Exactness of the whole: scheduler, engine and runners together give transformers' own greedy text, token for token.

Float32, tiny random checkpoints. Prompt lengths lie around page and chunk boundaries; batches are mixed; chunks are
small; the pool is too small for all, so that sequences are preempted and recomputed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from quire.core.config import EngineConfig
from quire.core.ids import RequestId
from quire.core.messages import Failed, Tokens, single_events
from quire.core.request import Request, SamplingParams
from quire.scheduler.client import load_in_process
from quire.scheduler.loop import EngineLoop

PAGE = 4
OUTPUT = 14
LENGTHS = (1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)
SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GQA = SHAPE | {"num_key_value_heads": 2}


@dataclass(frozen=True)
class Case:
    """A tiny model: its configuration, and the runner that must serve it."""

    config: Callable[[], transformers.PretrainedConfig]
    runner: str


CASES = {
    "llama": Case(lambda: transformers.LlamaConfig(**GQA, tie_word_embeddings=False), "native"),
    "llama-mqa-tied": Case(
        lambda: transformers.LlamaConfig(**SHAPE, num_key_value_heads=1, tie_word_embeddings=True, head_dim=16),
        "native",
    ),
    "mistral-window": Case(lambda: transformers.MistralConfig(**GQA, sliding_window=11), "native"),
    "qwen2": Case(lambda: transformers.Qwen2Config(**GQA), "native"),
    "qwen3": Case(lambda: transformers.Qwen3Config(**GQA, head_dim=16), "native"),
    "gemma2": Case(
        lambda: transformers.Gemma2Config(**GQA, head_dim=8, query_pre_attn_scalar=8, sliding_window=9), "transformers"
    ),
    "phi3": Case(lambda: transformers.Phi3Config(**GQA), "transformers"),
    "gpt-neox": Case(lambda: transformers.GPTNeoXConfig(**SHAPE), "transformers"),
    "mixtral": Case(lambda: transformers.MixtralConfig(**GQA, num_local_experts=4), "transformers"),
    "llama-through-transformers": Case(lambda: transformers.LlamaConfig(**GQA), "transformers"),
}


@dataclass
class Tiny:
    """A saved checkpoint and what transformers itself generates from each prompt, one by one."""

    folder: Path
    runner: str
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module", params=CASES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tiny]:
    """Each case, saved once."""
    case = CASES[request.param]
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(case.config(), attn_implementation="eager").eval()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    generator = torch.Generator().manual_seed(6)
    prompts = [torch.randint(3, 97, (length,), generator=generator).tolist() for length in LENGTHS]
    yield Tiny(folder, case.runner, prompts, [_reference(model, prompt) for prompt in prompts])


def _reference(model: Any, prompt: list[int]) -> list[int]:
    """Greedy tokens, by a full forward pass for each: no cache whose own rules could interfere."""
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(OUTPUT):
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def _loop(tiny: Tiny, *, max_batch_tokens: int, kv_memory: int | None = None) -> EngineLoop:
    config = EngineConfig(
        model=str(tiny.folder),
        device="cpu",
        dtype="float32",
        runner=tiny.runner,  # type: ignore[arg-type]
        page_size=PAGE,
        max_num_seqs=8,
        max_batch_tokens=max_batch_tokens,
        kv_memory=kv_memory,
    )
    return load_in_process(config)


def _generate(loop: EngineLoop, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    outputs: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        outputs[str(i)] = []
        loop.submit(Request(id=RequestId(str(i)), prompt_ids=tuple(prompt), params=params))
    while loop.has_work:
        for event in single_events(loop.step().events):
            assert not isinstance(event, Failed), event
            if isinstance(event, Tokens):
                outputs[event.request_id] += event.token_ids
        loop.scheduler.check_integrity()
    return [outputs[str(i)] for i in range(len(prompts))]


@pytest.mark.parametrize("max_batch_tokens", [8, 13, 512])
def test_greedy_tokens_equal_transformers(tiny: Tiny, max_batch_tokens: int) -> None:
    loop = _loop(tiny, max_batch_tokens=max_batch_tokens)
    assert loop.engine.info.runner == tiny.runner
    assert _generate(loop, tiny.prompts) == tiny.expected
    assert loop.stats().pages_used == 0


def test_preempted_sequences_go_on_unchanged(tiny: Tiny) -> None:
    plenty = _loop(tiny, max_batch_tokens=24).engine.info
    page_bytes = plenty.kv_bytes // plenty.num_pages
    longest = -(-(max(LENGTHS) + OUTPUT) // PAGE) + 1
    heads = plenty.model.num_layers * plenty.model.num_kv_heads
    loop = _loop(tiny, max_batch_tokens=24, kv_memory=int(1.6 * longest) * heads * page_bytes)
    assert _generate(loop, tiny.prompts) == tiny.expected
    assert loop.stats().preemptions_total > 0
    assert loop.stats().pages_used == 0
