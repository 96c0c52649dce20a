"""Which kernels an engine starts with, once they have been tried."""

import logging
from pathlib import Path

import pytest
import torch

from quire.core.config import EngineConfig
from quire.core.errors import ConfigError
from quire.engine import device
from quire.engine.device import choose_placement, trusted
from quire.kernels.kernel_trials import KernelShape
from quire.kernels.self_check import KernelFailure
from quire.models.loading import kernel_shape
from quire.models.placement import Placement

from ..kernels.triton_interpreter import ON_GPU
from ..models.conftest import make_checkpoint

pytestmark = pytest.mark.parametrize("where", [pytest.param("cuda", marks=pytest.mark.gpu)] if ON_GPU else ["cpu"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), "qwen3", settings).folder


def place(where: str) -> Placement:
    return Placement(torch.device(where), torch.float32, "triton")


def test_sound_kernels_are_kept(checkpoint: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "quire"):
        assert trusted(place(where), EngineConfig(model=str(checkpoint))) == place(where)
    assert [record.getMessage()[:35] for record in caplog.records] == ["kernels: triton (11 kinds checked a"]


def test_a_broken_kernel_leaves_it_to_torch(
    checkpoint: Path, where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """But not where somebody asked for it by name."""
    monkeypatch.setattr("quire.kernels.attention_triton.paged_attention_triton", lambda query, *_, **__: query + 1)
    assert trusted(place(where), EngineConfig(model=str(checkpoint))).backend == "reference"
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "plain torch, which is slower: Quire's Triton kernel for attention differs from" in record.getMessage()
    with pytest.raises(ConfigError, match="kernel for attention differs from torch by up to") as caught:
        trusted(place(where), EngineConfig(model=str(checkpoint), attention_backend="triton"))
    assert caught.value.param == "attention_backend"


def test_a_lost_device_is_not_gone_on_with(checkpoint: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = KernelFailure("norm", "raises RuntimeError: illegal memory access", fatal=True)
    monkeypatch.setattr(device, "failed_kernel", lambda *_: failure)
    with pytest.raises(ConfigError, match="cannot be used any more, start with attention_backend reference"):
        trusted(place(where), EngineConfig(model=str(checkpoint)))


def test_the_draft_model_is_tried_too(
    checkpoint: Path, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[KernelShape] = []
    monkeypatch.setattr(device, "failed_kernel", lambda shape, *_: tried.append(shape))
    draft = make_checkpoint(tmp_path, "llama", {"num_key_value_heads": 1, "head_dim": 8}).folder
    trusted(place(where), EngineConfig(model=str(checkpoint), draft=str(draft)))
    assert [(shape.head_dim, shape.head_norm) for shape in tried] == [(16, True), (8, False)]
    tried.clear()
    trusted(place(where), EngineConfig(model=str(checkpoint), draft=str(checkpoint)))
    trusted(place(where), EngineConfig(model=str(checkpoint), draft=str(tmp_path / "nothing")))
    assert len(tried) == 2, "one shape each"


def test_only_triton_is_tried(checkpoint: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "failed_kernel", None)
    for backend in ("auto", "reference") if where == "cpu" else ("reference",):
        config = EngineConfig(model=str(checkpoint), device=where, attention_backend=backend)  # type: ignore[arg-type]
        assert choose_placement(config).backend != "triton"


def test_shapes_are_those_of_the_configuration(checkpoint: Path, where: str) -> None:
    options = {"trust_remote_code": False, "page_size": 16}
    ours = kernel_shape(str(checkpoint), runner="auto", **options)  # type: ignore[arg-type]
    assert (ours.num_kv_heads, ours.head_dim, ours.page_size, ours.rotated, ours.head_norm) == (2, 16, 16, 16, True)
    assert ours.hidden > 0 and ours.feed_forward > 0 and not ours.sinks
    theirs = kernel_shape(str(checkpoint), runner="transformers", **options)  # type: ignore[arg-type]
    assert theirs.sinks and (theirs.rotated, theirs.hidden, theirs.feed_forward) == (0, 0, 0)
