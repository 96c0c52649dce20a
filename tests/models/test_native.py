"""The native runner against the library's own eager model: same logits, same greedy choice, in any batch mix."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from quire.core.errors import ConfigError
from quire.models.native import NativeRunner

from .conftest import CPU, VOCAB
from .dense_context import Chunk, DenseCache, DenseContext, check_parity, run_step

LONG = 512
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gqa": ("llama", {"num_key_value_heads": 2}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "mha tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "wide heads": ("llama", {"num_key_value_heads": 2, "head_dim": 24}),
    "gelu": ("llama", {"hidden_act": "gelu"}),
    "rope linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "rope llama3": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                "rope_theta": 1e4,
            }
        },
    ),
    "rope yarn": (
        "llama",
        {
            "head_dim": 32,
            "max_position_embeddings": LONG,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "rope_theta": 1e4,
            },
        },
    ),
    "rope dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4},
        },
    ),
    "mistral window": ("mistral", {"num_key_value_heads": 2, "sliding_window": 5}),
    "mistral full": ("mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("qwen2", {"num_key_value_heads": 2}),
    "qwen2 windows": (
        "qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "qwen3 windows": (
        "qwen3",
        {
            "num_key_value_heads": 4,
            "head_dim": 16,
            "sliding_window": 4,
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_library(tiny, case):
    model_type, settings = CASES[case]
    made = tiny(model_type, **settings)
    runner = made.load("native")
    assert isinstance(runner, NativeRunner)
    check_parity(runner, made.model, VOCAB)


def test_windows_come_from_the_configuration(tiny):
    assert tiny("mistral", **CASES["mistral window"][1]).load().spec.windows == (5, 5, 5)
    assert tiny("qwen2", **CASES["qwen2 windows"][1]).load().spec.windows == (None, 6, 6)
    assert tiny("qwen2", **CASES["qwen2"][1]).load().spec.windows == (None, None, None)


def test_dynamic_rope_depends_on_the_own_length_only(tiny):
    """A sequence that may grow past the trained length must not change its neighbour's keys."""
    runner = tiny("llama", **CASES["rope dynamic"][1]).load()
    ids = torch.arange(3, 13)

    def logits(*lengths):
        return run_step(runner, DenseCache(), [Chunk(i, ids, 0, length) for i, length in enumerate(lengths)])

    short, long = logits(10, 40)
    torch.testing.assert_close(short, logits(16)[0])
    torch.testing.assert_close(long, logits(40, 10)[0])
    assert (short - long).abs().max() > 1e-3


def test_only_wanted_rows_get_logits(tiny):
    made = tiny("llama", num_key_value_heads=2)
    runner = made.load()
    ids = torch.arange(5, 12)
    with torch.inference_mode():
        expected = made.model(input_ids=ids[None]).logits[0]
    for rows in ([6], [0, 3], []):
        context = DenseContext(DenseCache(), [0], [len(ids)])
        wanted = torch.tensor(rows, dtype=torch.int64)
        got = runner.forward(ids, torch.arange(7), torch.full((7,), 7), context, wanted)
        torch.testing.assert_close(got, expected[rows].reshape(-1, VOCAB), atol=1e-4, rtol=1e-4)


def test_half_precision_stays_close_and_returns_float32(tiny):
    made = tiny("llama", num_key_value_heads=2)
    runner = made.load(place=replace(CPU, dtype=torch.bfloat16))
    ids = torch.arange(5, 25)
    got = run_step(runner, DenseCache(), [Chunk(0, ids, 0, 20)])[0]
    with torch.inference_mode():
        expected = made.model(input_ids=ids[None]).logits[0]
    assert got.dtype == torch.float32
    # 8 bits of mantissa over three layers: a few percent of the logits' scale.
    assert (got - expected).abs().max() < 0.05 * expected.abs().max()


def test_weights_are_frozen_and_not_copied_twice(tiny):
    made = tiny("llama", tie_word_embeddings=True)
    runner = made.load()
    parameters = list(runner.decoder.parameters())
    assert not any(parameter.requires_grad for parameter in parameters)
    assert sum(p.numel() for p in parameters) == sum(p.numel() for p in made.model.parameters())
    assert runner.decoder.head is runner.decoder.embedding


def test_unserved_architectures_are_a_configuration_error(tiny):
    made = tiny("gpt_neox")
    with pytest.raises(ConfigError, match=r"native runner .*GPTNeoXForCausalLM"):
        made.load("native")
