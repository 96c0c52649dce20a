"""Frequencies of every kind against the library's, from both forms of configuration; angles in float32."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from quire.core.errors import ModelLoadError
from quire.kernels.rotary import rotate_reference
from quire.models.rope import RotaryEmbedding, rope_settings

HEAD_DIM = 16
TRAINED = 64
LLAMA3: dict[str, Any] = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN: dict[str, Any] = {"factor": 4.0, "original_max_position_embeddings": TRAINED}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn sharpened": YARN | {"attention_factor": 1.5},
    "yarn mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2},
    "yarn untruncated": YARN | {"truncate": False},
    "longrope": {
        "short_factor": [1.0 + i / 10 for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 32,
        "factor": 2.0,
    },
}


def _embedding(config):
    return RotaryEmbedding(rope_settings(config, HEAD_DIM), torch.device("cpu"))


@pytest.mark.parametrize("length", [16, 48, 200])
@pytest.mark.parametrize("form", ["old", "new"])
@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_equal_the_librarys(kind, form, length):
    name = kind.split()[0]
    rope = {"rope_type": name, "rope_theta": 5e5} | KINDS[kind]
    reference = LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=TRAINED, rope_parameters=rope
    )
    expected, factor = ROPE_INIT_FUNCTIONS[name](reference, seq_len=length)
    if form == "new":
        config = {"max_position_embeddings": TRAINED, "rope_parameters": rope}
    else:
        scaling = {"type": name} | KINDS[kind]
        config = {"max_position_embeddings": TRAINED, "rope_theta": 5e5, "rope_scaling": scaling}
    embedding = _embedding(config)
    lengths = torch.tensor([length, length])
    got = embedding.frequencies(lengths).expand(2, -1)
    torch.testing.assert_close(got[1], expected)
    assert embedding.attention_factor == pytest.approx(factor)


def test_dynamic_frequencies_are_the_plain_ones_within_the_trained_length():
    plain = _embedding({"max_position_embeddings": TRAINED})
    dynamic = _embedding({"max_position_embeddings": TRAINED, "rope_scaling": {"type": "dynamic", "factor": 4.0}})
    lengths = torch.tensor([1, TRAINED, TRAINED + 1, 8 * TRAINED])
    frequencies = dynamic.frequencies(lengths)
    assert torch.equal(frequencies[0], frequencies[1])
    torch.testing.assert_close(frequencies[1], plain.frequencies(lengths))
    assert (frequencies[3][1:] < frequencies[2][1:]).all() and (frequencies[2][1:] < frequencies[1][1:]).all()


def test_angles_are_float32_whatever_the_model_computes_in():
    """Position 30011 is not a bfloat16 number: rounding it first would turn the first pair by whole radians."""
    cos, _ = _embedding({"max_position_embeddings": 2**16})(
        torch.tensor([30011]), torch.tensor([2**16]), torch.bfloat16
    )
    assert cos.dtype == torch.bfloat16
    assert cos[0, 0].item() == pytest.approx(torch.tensor(30011.0).cos().item(), abs=4e-3)


def test_partial_rotation_leaves_the_rest_alone():
    embedding = _embedding({"max_position_embeddings": TRAINED, "partial_rotary_factor": 0.5})
    heads = torch.randn(3, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    cos, sin = embedding(torch.tensor([0, 1, 2]), torch.full((3,), 3), torch.float32)
    turned = rotate_reference(heads, cos, sin)
    assert torch.equal(turned[..., 8:], heads[..., 8:])
    assert torch.equal(turned[0], heads[0])
    torch.testing.assert_close(turned.norm(dim=-1), heads.norm(dim=-1))
    assert (turned[1:, :, :8] - heads[1:, :, :8]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("scaling", "reason"),
    [
        ({"rope_type": "spiral"}, "unknown rotary scaling kind 'spiral'"),
        ({"rope_type": "linear"}, "lacks factor"),
        ({"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}, "must have 8 entries"),
        ({"full_attention": {"rope_type": "default"}}, "differ between layer types"),
    ],
)
def test_unusable_settings_are_refused(scaling, reason):
    with pytest.raises(ModelLoadError, match=reason):
        rope_settings({"max_position_embeddings": TRAINED, "rope_parameters": scaling}, HEAD_DIM)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_keys_that_are_turned_lie_where_they_would_have_been_rotated_to(kind: str) -> None:
    """Also back, and without sharpening twice; frequencies are those of the sequence's length."""
    scaling = {"rope_type": kind.split()[0]} | KINDS[kind]
    config = {"max_position_embeddings": TRAINED, "rope_theta": 500.0, "rope_scaling": scaling}
    rotary, length = RotaryEmbedding(rope_settings(config, HEAD_DIM), torch.device("cpu")), 3 * TRAINED
    keys = torch.randn(40, 2, HEAD_DIM, generator=torch.Generator().manual_seed(0))

    def rotated(positions: torch.Tensor) -> torch.Tensor:
        return rotate_reference(keys, *rotary(positions, torch.full_like(positions, length), torch.float32))

    places = torch.arange(40) * 4
    steps, far = torch.arange(40) - places, rotated(places)
    turned, expected = rotary.turned(far, steps, length), rotated(torch.arange(40))
    torch.testing.assert_close(turned, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(rotary.turned(far.bfloat16(), torch.zeros_like(steps), length), far.bfloat16())
