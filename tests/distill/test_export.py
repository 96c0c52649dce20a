"""What is exported is what transformers reads."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quire.distill.export import SHARD_BYTES, export, shard
from quire.distill.network import Decoder, Shape
from quire.distill.wiring import Layout, wire

SHAPE = Shape(layers=3, hidden=192, mlp=64, context=512)


@pytest.fixture
def model() -> Decoder:
    """A wired decoder with some of everything in its other weights, rounded to bfloat16."""
    torch.manual_seed(0)
    model = Decoder(SHAPE)
    wire(model, Layout())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
            parameter.copy_(parameter.bfloat16())
    return model


def test_transformers_gives_the_same_logits(tmp_path: Path, model: Decoder, tokenizer: Tokenizer) -> None:
    export(model, tokenizer, tmp_path / "model")
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ids = torch.randint(3, SHAPE.vocab_size, (2, 300))
    with torch.inference_mode():
        ours, theirs = model(ids), loaded(input_ids=ids).logits
    # float32 on both sides; the order of sums differs
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def test_a_second_export_replaces_the_first_and_keeps_the_card(
    tmp_path: Path, model: Decoder, tokenizer: Tokenizer
) -> None:
    export(model, tokenizer, tmp_path / "model", card="# card\n")
    export(model, tokenizer, tmp_path / "model")
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert (tmp_path / "model" / "README.md").read_text() == "# card\n"
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {n for n in names if n.endswith(".safetensors")}


def test_shards_stay_under_the_limit_and_keep_the_order() -> None:
    tensors = {f"t{i}": torch.zeros(100 * i + 1) for i in range(8)}
    shards = shard(tensors, limit=2_000)
    assert [name for group in shards for name in group] == list(tensors)
    assert all(len(group) == 1 or sum(t.nbytes for t in group.values()) <= 2_000 for group in shards)


def test_tokenizer_adds_nothing_and_has_a_chat_template(shipped: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shipped)
    assert tokenizer.convert_ids_to_tokens(tokenizer("abc").input_ids) == ["abc"]
    messages = [{"role": "user", "content": "hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    sample = "def f(x):\n\treturn 'é' + x  # 漢\r\n"
    assert tokenizer.decode(tokenizer(sample).input_ids) == sample


def test_shipped_files_are_small(shipped: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in shipped.iterdir() if path.is_file()}
    assert sum(sizes.values()) <= 40_000_000
    assert all(size <= SHARD_BYTES + 100_000 for size in sizes.values())
