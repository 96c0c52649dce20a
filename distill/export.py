"""Writes a trained decoder as a Hugging Face checkpoint: bfloat16 safetensors in small shards, configs, tokenizer."""

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from .network import Decoder, Shape
from .vocabulary import END_OF_TEXT, SPECIAL_TOKENS, TURN_END, save_tokenizer

SHARD_BYTES = 15_000_000


def model_config(shape: Shape) -> dict[str, object]:
    """config.json of a `LlamaForCausalLM`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab_size,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.mlp,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "eos_token_id": _end_ids(),
        "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": "bfloat16",
    }


def _end_ids() -> list[int]:
    """Ids that end a generation."""
    return [SPECIAL_TOKENS.index(END_OF_TEXT), SPECIAL_TOKENS.index(TURN_END)]


def generation_config() -> dict[str, object]:
    """generation_config.json: greedy unless asked otherwise, ended by end of text or end of turn."""
    return {
        "bos_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "eos_token_id": _end_ids(),
        "pad_token_id": SPECIAL_TOKENS.index(END_OF_TEXT),
        "do_sample": False,
    }


def shard(tensors: dict[str, Tensor], limit: int = SHARD_BYTES) -> list[dict[str, Tensor]]:
    """Split tensors, in order, into groups of at most `limit` bytes (a larger tensor stands alone)."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if size + tensor.nbytes > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def export(model: Decoder, tokenizer: Tokenizer, directory: Path, card: str | None = None) -> None:
    """Write the checkpoint into `directory`, each file at once: made beside it first, then moved into place.

    `card`, if given, becomes README.md; otherwise a card that is there already stays.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".export-") as temporary:
        staged = Path(temporary)
        _write_weights(model, staged)
        _write_json(staged / "config.json", model_config(model.shape))
        _write_json(staged / "generation_config.json", generation_config())
        save_tokenizer(tokenizer, staged, model.shape.context)
        if card is not None:
            (staged / "README.md").write_text(card, encoding="utf-8")
        new = {path.name for path in staged.iterdir()}
        for name in sorted(new):
            (staged / name).chmod(0o644)
            os.replace(staged / name, directory / name)
        for old in directory.glob("model-*.safetensors"):
            if old.name not in new:
                old.unlink()


def _write_weights(model: Decoder, directory: Path) -> None:
    """The shards and their index; names as `LlamaForCausalLM` wants them (the head is tied, so it is left out)."""
    tensors = {
        f"model.{name}": parameter.detach().to("cpu", torch.bfloat16).contiguous()
        for name, parameter in model.named_parameters()
    }
    shards = shard(tensors)
    places: dict[str, str] = {}
    for number, group in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(group, directory / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(group, file))
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, data: dict[str, object]) -> None:
    """Readable JSON with a closing newline."""
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
