"""The models that the engines run, made where they are not there yet."""

import shutil
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from quire.core.config import embedded_model

MODELS = ("quire-mini", "qwen2-0.5b")


def checkpoint(name: str, folder: Path) -> Path:
    """Folder of one of `MODELS`; a random one is written into `folder`, once."""
    if name == "quire-mini":
        return embedded_model()
    target = folder / name
    if not target.is_dir():
        unfinished = folder / f"{name}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        _random_qwen2(unfinished)
        unfinished.rename(target)
    return target


def _random_qwen2(folder: Path) -> None:
    """Qwen2-0.5B's shape with random weights; its tokenizer, which only has to be there, is quire-mini's."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        dtype="bfloat16",
    )
    torch.manual_seed(0)
    Qwen2ForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded_model() / name, folder / name)
