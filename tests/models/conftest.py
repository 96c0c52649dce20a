"""Tiny random checkpoints, made once per session by the library's own classes, each beside its eager reference."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from quire.kernels.backend import resolve_backend
from quire.models.loading import load_runner
from quire.models.placement import Placement
from quire.models.runner import ModelRunner

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CPU = Placement(torch.device("cpu"), torch.float32, resolve_backend(torch.device("cpu"), torch.float32))


@dataclass(frozen=True)
class Tiny:
    """A checkpoint folder and the library's model that was saved into it."""

    folder: Path
    model: PreTrainedModel

    def load(self, runner: str = "auto", **options: Any) -> ModelRunner:
        """The checkpoint through `load_runner`, in float32 on the CPU."""
        return load(self.folder, runner, **options)


def load(folder: Path | str, runner: str = "auto", **options: Any) -> ModelRunner:
    """`load_runner` with the tests' defaults."""
    defaults: dict[str, Any] = {"place": CPU, "trust_remote_code": False}
    progress = options.pop("on_progress", lambda phase, done, total: None)
    return load_runner(str(folder), on_progress=progress, **defaults | {"runner": runner} | options)


def make_checkpoint(folder: Path, model_type: str, settings: dict[str, Any]) -> Tiny:
    """A random model of `model_type`, with weights large enough that attention and biases matter, saved to `folder`."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**SIZES | settings)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.copy_(noise * 0.15 if parameter.dim() > 1 else parameter + noise * 0.1)
    model.save_pretrained(folder)
    return Tiny(folder, model)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """`tiny(model_type, **settings)`: a checkpoint, made at first asking and shared; do not change its files."""
    made: dict[str, Tiny] = {}

    def make(model_type: str, **settings: Any) -> Tiny:
        key = f"{model_type} {sorted(settings.items(), key=repr)}"
        if key not in made:
            made[key] = make_checkpoint(tmp_path_factory.mktemp(model_type), model_type, settings)
        return made[key]

    return make


@pytest.fixture
def broken(tmp_path: Path) -> Tiny:
    """A fresh Llama checkpoint in several shards that a test may damage."""
    made = make_checkpoint(tmp_path / "model", "llama", {"num_key_value_heads": 2})
    for file in made.folder.glob("*.safetensors"):
        file.unlink()
    made.model.save_pretrained(made.folder, max_shard_size="40KB")
    return made
