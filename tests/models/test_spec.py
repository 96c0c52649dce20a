"""What is read off a configuration: context length, windows, heads."""

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quire.core.errors import ModelLoadError
from quire.models.checkpoint import Checkpoint
from quire.models.spec import attention_windows, max_context, model_spec, rope_length


def _config(model_type, **settings):
    return CONFIG_MAPPING[model_type](**{"num_hidden_layers": 4, "max_position_embeddings": 100} | settings)


def _windows(tmp_path, config):
    checkpoint = Checkpoint("name", tmp_path, {"architectures": ["X"]}, {})
    return attention_windows(checkpoint, config, 4)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 4.0}, 100),
        ({"rope_type": "dynamic", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}, 100),
    ],
)
def test_max_context(rope, expected):
    assert max_context(_config("llama", rope_parameters=rope | {"rope_theta": 1e4})) == expected


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, None),
        ({"rope_type": "dynamic", "factor": 4.0}, 100),
        (
            {
                "rope_type": "longrope",
                "factor": 4.0,
                "original_max_position_embeddings": 25,
                "short_factor": [1.0] * 64,
                "long_factor": [2.0] * 64,
            },
            25,
        ),
    ],
)
def test_from_which_length_on_keys_are_rotated_otherwise(rope, expected):
    assert rope_length(_config("llama", rope_parameters=rope | {"rope_theta": 1e4})) == expected


def test_windows(tmp_path):
    assert _windows(tmp_path, _config("llama")) == (None,) * 4
    assert _windows(tmp_path, _config("mistral", sliding_window=8)) == (8,) * 4
    assert _windows(tmp_path, _config("mistral", sliding_window=None)) == (None,) * 4
    assert _windows(tmp_path, _config("gemma2", sliding_window=8)) == (8, None, 8, None)
    assert _windows(tmp_path, _config("qwen2", sliding_window=8)) == (None,) * 4
    on = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    assert _windows(tmp_path, _config("qwen2", **on)) == (None, None, None, 8)


def test_layers_that_are_not_attention_are_refused(tmp_path):
    with pytest.raises(ModelLoadError, match="linear_attention"):
        _windows(tmp_path, _config("qwen3_next"))


def test_heads_and_end_tokens(tmp_path):
    checkpoint = Checkpoint("name", tmp_path, {"architectures": ["LlamaForCausalLM"]}, {})
    config = _config("llama", hidden_size=64, num_attention_heads=8, num_key_value_heads=2, eos_token_id=[3, 4])
    spec = model_spec(checkpoint, config)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.num_layers) == (8, 2, 8, 4)
    assert spec.eos_token_ids == (3, 4)
    assert spec.architecture == "LlamaForCausalLM"
