"""The library's modelling code on our attention: parity with its own, and refusal of what would be silently wrong."""

from typing import Any

import pytest
import torch
from transformers import BloomConfig, FalconConfig, LlamaConfig, MambaConfig, MptConfig, T5Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from quire.core.errors import ModelLoadError
from quire.models.probe import AttentionCall
from quire.models.transformers_runner import TransformersRunner

from .conftest import VOCAB, load
from .dense_context import Chunk, DenseCache, check_parity, run_step

GQA: dict[str, Any] = {"num_key_value_heads": 2}
MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", GQA),
    "mistral": ("mistral", GQA | {"sliding_window": 5}),
    "gemma2": ("gemma2", GQA | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}),
    "gemma3": ("gemma3_text", GQA | {"head_dim": 8, "sliding_window": 5, "layer_types": None}),
    "phi3": ("phi3", GQA | {"sliding_window": 6}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt2": ("gpt2", {}),
    "starcoder2": ("starcoder2", GQA | {"sliding_window": 5}),
    "olmo2": ("olmo2", GQA),
    "granite": ("granite", GQA | {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}),
    "mixtral": ("mixtral", GQA | {"num_local_experts": 4, "sliding_window": 5}),
    "qwen3_moe": ("qwen3_moe", GQA | MOE | {"num_experts": 4, "head_dim": 8}),
    "gpt_oss sinks": ("gpt_oss", GQA | {"num_local_experts": 4, "head_dim": 8, "sliding_window": 4}),
    "glm": ("glm", GQA | {"head_dim": 8}),
    "cohere": ("cohere", GQA | {"logit_scale": 0.25}),
    "deepseek": (
        "deepseek_v2",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
}
LENGTH_ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e4}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 3.0, 4.0, 5.0],
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_librarys_own_attention(tiny, case):
    model_type, settings = CASES[case]
    made = tiny(model_type, **settings)
    runner = made.load("transformers")
    assert isinstance(runner, TransformersRunner)
    check_parity(runner, made.model, VOCAB)


def test_the_spec_holds_what_the_layers_really_pass(tiny):
    deepseek = tiny("deepseek_v2", **CASES["deepseek"][1]).load().spec
    assert (deepseek.num_heads, deepseek.num_kv_heads, deepseek.head_dim) == (4, 4, 16)
    gemma = tiny("gemma2", **CASES["gemma2"][1]).load().spec
    assert gemma.windows == (5, None, 5)
    assert (gemma.num_layers, gemma.num_kv_heads, gemma.vocab_size) == (3, 2, VOCAB)


def _length_rope(tiny, kind):
    model_type, rope = LENGTH_ROPES[kind]
    settings = GQA | {"max_position_embeddings": 16, "rope_parameters": rope}
    if kind == "longrope":
        settings |= {"max_position_embeddings": 64, "original_max_position_embeddings": 16, "sliding_window": None}
    return tiny(model_type, **settings)


@pytest.mark.parametrize("kind", LENGTH_ROPES)
def test_length_dependent_rope_is_per_sequence(tiny, kind):
    """Each sequence of a mixed batch gets the frequencies of its own length, whatever ran before it."""
    made = _length_rope(tiny, kind)
    runner = made.load("transformers")
    check_parity(runner, made.model, VOCAB)
    check_parity(runner, made.model, VOCAB)


@pytest.mark.parametrize("kind", LENGTH_ROPES)
def test_native_and_library_agree_on_sequences_that_will_grow(tiny, kind):
    """Ten tokens now, forty in the end: both runners use the frequencies of forty from the start."""
    made = _length_rope(tiny, kind)
    if kind == "longrope":
        made = tiny("llama", **GQA, max_position_embeddings=64, rope_parameters=_llama_longrope())
    ids = torch.arange(3, 13)
    chunks = [Chunk(0, ids, 0, 40), Chunk(1, ids, 0, 12)]
    native = run_step(made.load("native"), DenseCache(), chunks)
    library = run_step(made.load("transformers"), DenseCache(), chunks)
    torch.testing.assert_close(native, library, atol=1e-4, rtol=1e-4)
    assert (native[0] - native[1]).abs().max() > 1e-3


def _llama_longrope():
    return LENGTH_ROPES["longrope"][1] | {"original_max_position_embeddings": 16, "factor": 4.0}


REFUSED = {
    "bloom": BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "falcon": FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "mpt": MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4, expansion_ratio=2),
    "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_bypass_our_attention_are_refused(tmp_path, name):
    AutoModelForCausalLM.from_config(REFUSED[name]).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"call the registered attention|attends over a KV cache|without a mask"):
        load(tmp_path)


def test_encoder_decoders_are_refused(tmp_path):
    config = T5Config(vocab_size=VOCAB, d_model=32, d_ff=32, num_layers=1, num_heads=4, d_kv=8)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="encoder-decoder"):
        load(tmp_path)


def test_a_model_that_attends_differently_is_refused(tiny, monkeypatch):
    """The comparison with eager attention notices what counting calls cannot."""
    made = tiny("olmo2", **GQA)
    monkeypatch.setattr("quire.models.probe.DenseContext.attend", _ignoring_attend)
    with pytest.raises(ModelLoadError, match="does not give the logits of its own attention"):
        made.load("transformers")


def _ignoring_attend(self, layer, query, key, value, **options):
    self.calls.append(AttentionCall(layer, query.shape[1], key.shape[1], key.shape[2], value.shape[2]))
    return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1)


def test_missing_weights_are_an_error_not_a_random_layer(tmp_path):
    config = LlamaConfig(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.num_attention_heads = config.num_key_value_heads = 4
    model = AutoModelForCausalLM.from_config(config)
    weights = model.state_dict()
    del weights["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ModelLoadError, match=r"lacks the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(tmp_path, "transformers")


def test_windows_that_contradict_the_configuration_are_refused(tiny, monkeypatch):
    """The spec's windows decide which pages are dropped: a layer that sees further must not be served with them."""
    made = tiny("mistral", **GQA, sliding_window=5)
    monkeypatch.setattr("quire.models.spec.attention_windows", lambda checkpoint, config, layers: (None,) * layers)
    with pytest.raises(ModelLoadError, match="window of 5 tokens"):
        made.load("transformers")


def test_layers_that_keep_the_context_to_themselves_are_refused(tiny):
    made = tiny("stablelm", **GQA)
    with pytest.raises(ModelLoadError, match="do not hand keyword arguments on"):
        made.load()
