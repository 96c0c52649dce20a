"""Makes a larger checkpoint that computes the same function: `python -m benchmarks.upscale MODEL OUT --preset 0.5b`.

A small trained model makes every draft and every pruned cache look useless, for its time is overhead; a large random
one has nothing to say. The enlarged model costs what a large one costs and speaks the small one's language, so that
speculation and pruning can be measured at realistic cost ratios. No matrix has zeros, and none can be skipped:

* width: the residual stream, the heads and the feed-forward neurons are there `width` (`feed_forward`) times, all
  copies equal. What reads them is divided among the copies, w = (2 w) + (-w) or (w / 2) + (w / 2), element by element
  at random; such shares are exact in every floating-point type.
* depth: the added layers are random. Their heads and neurons come in equal copies too, and what reads these takes the
  second half with the sign turned: contributions cancel.

RMSNorm over equal copies is RMSNorm over one. Llama, Mistral, Qwen2, Qwen3 and what is built like them. The logits
equal the small model's up to rounding, which grows with the number of layers.
"""

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.utils import logging

from quire.kernels.compiler import cache_folder

SUPPORTED = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Scale:
    """How much larger."""

    width: int
    """Copies of the residual stream and of the heads; a power of two."""
    feed_forward: int
    """Copies of the feed-forward neurons; a power of two."""
    layers: int
    """Of the enlarged model."""


PRESETS = {"0.1b": Scale(2, 2, 12), "0.5b": Scale(2, 4, 34), "8b": Scale(8, 16, 32)}
"""Of quire-mini, about what Quire's users serve; names are parameters."""


def shares(weight: Tensor, copies: int, generator: torch.Generator) -> Tensor:
    """[N, E] -> [N, copies * E]: parts that add up to the weight exactly, none of them zero where the weight is not."""
    if copies == 1:
        return weight
    kind = torch.randint(3, weight.shape, generator=generator)
    factors = torch.tensor([2.0, -1.0, 0.5])[kind].to(weight.dtype)
    halves = (weight * factors, weight * (1 - factors))
    return torch.cat([shares(half, copies // 2, generator) for half in halves], dim=1)


def cancelling(weight: Tensor, copies: int) -> Tensor:
    """[N, E] -> [N, copies * E]: parts that add up to zero."""
    half = torch.cat([weight] * (copies // 2), dim=1)
    return torch.cat([half, -half], dim=1)


def enlarge_layer(
    layer: dict[str, Tensor], scale: Scale, generator: torch.Generator, *, silent: bool
) -> dict[str, Tensor]:
    """A decoder layer's tensors by their names within it; `silent`: it adds nothing to the residual stream."""
    enlarged = {}
    for name, tensor in layer.items():
        stream, inner = scale.width, scale.feed_forward if ".mlp." in f".{name}" else scale.width
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            enlarged[name] = tensor
        elif tensor.dim() == 1:
            is_inner = name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", "gate_proj.bias", "up_proj.bias"))
            tensor = torch.zeros_like(tensor) if silent and name.endswith(("o_proj.bias", "down_proj.bias")) else tensor
            enlarged[name] = tensor.repeat(inner if is_inner else stream)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            read = cancelling(tensor, inner) if silent else shares(tensor, inner, generator)
            enlarged[name] = read.repeat(stream, 1)
        else:
            enlarged[name] = shares(tensor, stream, generator).repeat(inner, 1)
    return enlarged


def enlarged_layers(
    state: dict[str, Tensor], depth: int, scale: Scale, generator: torch.Generator
) -> Iterator[dict[str, Tensor]]:
    """The layers of the enlarged model, full names; those of the `depth` small ones are spread evenly among them."""
    real = {(index * scale.layers) // depth: index for index in range(depth)}
    for number in range(scale.layers):
        prefix = f"model.layers.{real.get(number, number % depth)}."
        layer = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        if number not in real:
            layer = {name: _random_like(tensor, generator) for name, tensor in layer.items()}
        enlarged = enlarge_layer(layer, scale, generator, silent=number not in real)
        yield {f"model.layers.{number}.{name}": tensor for name, tensor in enlarged.items()}


def _random_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Normal, of the tensor's own mean and deviation."""
    noise = torch.randn(tensor.shape, generator=generator)
    return (noise * tensor.float().std() + tensor.float().mean()).to(tensor.dtype)


def enlarged_config(config: PretrainedConfig, scale: Scale) -> PretrainedConfig:
    """The configuration of the enlarged model. Raises SystemExit for what cannot be enlarged so."""
    architecture = (config.architectures or ["?"])[0]
    if architecture not in SUPPORTED:
        raise SystemExit(f"{architecture} cannot be enlarged; supported: {', '.join(SUPPORTED)}")
    for copies in (scale.width, scale.feed_forward):
        if copies < 2 or copies & (copies - 1):
            raise SystemExit(f"width and feed-forward must be powers of two from 2 on, got {copies}")
    if scale.layers < config.num_hidden_layers:
        raise SystemExit(f"the model has {config.num_hidden_layers} layers already, {scale.layers} were asked for")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise SystemExit("a model with sliding windows cannot be enlarged: an added layer would need one too")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    changes = {
        "head_dim": head_dim,
        "hidden_size": config.hidden_size * scale.width,
        "num_attention_heads": config.num_attention_heads * scale.width,
        "num_key_value_heads": config.num_key_value_heads * scale.width,
        "intermediate_size": config.intermediate_size * scale.feed_forward,
        "num_hidden_layers": scale.layers,
        "layer_types": None,
    }
    return type(config).from_dict(config.to_dict() | changes)


def upscale(source: Path, target: Path, scale: Scale, seed: int = 0) -> int:
    """Write the enlarged checkpoint, a file per layer; returns its parameters."""
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(source)
    larger = enlarged_config(config, scale)
    state = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()
    generator = torch.Generator().manual_seed(seed)
    target.mkdir(parents=True, exist_ok=True)
    outer = {
        "model.embed_tokens.weight": state["model.embed_tokens.weight"].repeat(1, scale.width),
        "model.norm.weight": state["model.norm.weight"].repeat(scale.width),
    }
    if config.tie_word_embeddings:  # the head reads every copy: each counts for its part, and a power of two is exact
        outer["model.norm.weight"] = outer["model.norm.weight"] / scale.width
    else:
        outer["lm_head.weight"] = shares(state["lm_head.weight"], scale.width, generator)
    index: dict[str, str] = {}
    parameters = 0
    for number, tensors in enumerate([outer, *enlarged_layers(state, config.num_hidden_layers, scale, generator)]):
        file = f"model-{number:05}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        parameters += sum(tensor.numel() for tensor in tensors.values())
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    larger.save_pretrained(target)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    return parameters


def cached(source: Path, preset: str) -> Path:
    """Folder of the model enlarged so, made now unless it was made before."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for file in [*sorted(source.glob("*.safetensors")), source / "config.json"]:
        digest.update(file.read_bytes())
    folder = cache_folder() / f"{source.name}-{preset}-{digest.hexdigest()[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: another run may look, and this one may be ended.
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            upscale(source, Path(scratch) / folder.name, PRESETS[preset])
            (Path(scratch) / folder.name).rename(folder)
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a larger checkpoint that computes the same function.")
    parser.add_argument("source", type=Path, help="folder of the small model")
    parser.add_argument("target", type=Path, help="folder of the enlarged model")
    parser.add_argument("--preset", choices=PRESETS, help="size of the enlarged model, if the small one is quire-mini")
    parser.add_argument("--width", type=int, default=2, help="copies of residual stream and heads")
    parser.add_argument("--feed-forward", type=int, default=4, help="copies of the feed-forward neurons")
    parser.add_argument("--layers", type=int, default=24, help="layers of the enlarged model")
    args = parser.parse_args()
    scale = PRESETS[args.preset] if args.preset else Scale(args.width, args.feed_forward, args.layers)
    print(f"{upscale(args.source, args.target, scale):,} parameters in {args.target}")


if __name__ == "__main__":
    main()
