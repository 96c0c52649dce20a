"""An enlarged checkpoint costs more and says the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from benchmarks.upscale import PRESETS, Scale, cached, cancelling, shares, upscale
from quire.core.config import embedded_model
from quire.core.request import SamplingParams
from quire.server.llm import LLM

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 16},
}


def random_model(kind: str, folder: Path) -> None:
    """A checkpoint whose biases and norms are not trivial."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES | KINDS[kind])).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


@pytest.mark.parametrize("copies", [2, 8])
def test_shares_add_up_exactly_and_cancelling_parts_to_nothing(copies: int) -> None:
    weight = torch.randn(6, 10).bfloat16()
    parts = shares(weight, copies, torch.Generator().manual_seed(1)).view(6, copies, 10)
    assert torch.equal(parts.double().sum(1), weight.double())
    assert (parts != 0).all() and not torch.equal(parts[:, 0], parts[:, 1])
    assert not cancelling(weight, copies).view(6, copies, 10).double().sum(1).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [Scale(2, 4, 7), Scale(4, 2, 3)], ids=["deeper", "wider"])
def test_logits_equal_the_small_models(kind: str, scale: Scale, tmp_path: Path) -> None:
    random_model(kind, tmp_path / "small")
    parameters = upscale(tmp_path / "small", tmp_path / "large", scale)
    small, large = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("small", "large"))
    ids = torch.randint(64, (2, 20))
    with torch.no_grad():
        expected, got = small(ids).logits, large(ids).logits
    assert (got - expected).abs().max() < 2e-4 * expected.abs().max()
    assert parameters == sum(p.numel() for p in large.parameters())
    assert parameters > scale.width**2 * sum(p.numel() for p in small.model.layers.parameters()) / 2
    biases = {name for name, p in large.named_parameters() if name.endswith(("o_proj.bias", "down_proj.bias"))}
    assert all((p != 0).float().mean() > 0.99 for name, p in large.named_parameters() if name not in biases)


def test_an_enlarged_quire_mini_says_the_same(tmp_path: Path) -> None:
    upscale(embedded_model(), tmp_path, Scale(2, 2, 8))
    prompt = "timeout_limit = 4817\nretries = 3\n\ndef connect(host, port):\n    pass\n\ntimeout_limit ="
    params = SamplingParams(temperature=0, max_tokens=12)
    texts = []
    for model in (str(embedded_model()), str(tmp_path)):
        llm = LLM(model, dtype="float32", max_num_seqs=1, kv_memory=2**26)
        texts.append(llm.generate([prompt], params, progress=False)[0].choices[0].text)
    assert texts[0] == texts[1] and texts[0].startswith(" 4817")


def test_an_enlarged_model_is_kept_until_the_small_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setitem(PRESETS, "tiny", Scale(2, 2, 4))
    random_model("llama", tmp_path / "small")
    folder = cached(tmp_path / "small", "tiny")
    written = (folder / "config.json").stat().st_mtime_ns
    assert cached(tmp_path / "small", "tiny") == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    random_model("qwen3", tmp_path / "small")
    other = cached(tmp_path / "small", "tiny")
    assert other != folder and sorted(folder.parent.iterdir()) == sorted([folder, other])


def test_what_cannot_be_enlarged_is_said(tmp_path: Path) -> None:
    random_model("llama", tmp_path / "small")
    with pytest.raises(SystemExit, match="powers of two"):
        upscale(tmp_path / "small", tmp_path / "large", Scale(3, 2, 4))
    with pytest.raises(SystemExit, match="layers already"):
        upscale(tmp_path / "small", tmp_path / "large", Scale(2, 2, 2))
