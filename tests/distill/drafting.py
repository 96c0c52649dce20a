"""Tiny targets to distil from, and a stand-in for the serving engine."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from quire.core.request import SamplingParams

VOCAB = 8192  # that of the shipped tokenizer, which goes with the checkpoints


def tiny_target(layers: int = 3, tied: bool = True, seed: int = 0) -> PreTrainedModel:
    """A random Llama with 24 feed-forward neurons."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, tie_word_embeddings=tied, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.1)
    frozen: PreTrainedModel = model.eval().requires_grad_(False)
    return frozen


def save(model: PreTrainedModel, folder: Path) -> str:
    """The model as a checkpoint."""
    model.save_pretrained(folder)
    return str(folder)


class Parrot:
    """Continues a prompt with its own tokens."""

    def generate(
        self, checkpoint: str, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams]
    ) -> list[list[int]]:
        assert Path(checkpoint, "config.json").is_file()
        pairs = zip(prompts, params, strict=True)
        return [[prompt[i % len(prompt)] for i in range(one.max_tokens or 0)] for prompt, one in pairs]

    def step_seconds(self, checkpoint: str, sizes: Sequence[int]) -> dict[int, float]:
        return {size: 1e-3 * size for size in sizes}
