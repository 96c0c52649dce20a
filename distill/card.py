"""The model card of an export: what the model is, what it saw, what was measured, how to make it again."""

from pathlib import Path

from .network import Shape

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"

CARD = """---
language: code
library_name: transformers
license: apache-2.0
tags: [demonstration, python]
---

# quire-mini

The demonstration model that ships with Quire: small enough to serve on a laptop, and made so that what Quire does
can be seen on it. It really looks back, so pruning its KV cache or speculating with it has effects that can be
measured. It writes text that looks like Python; it knows nothing, left to
itself it soon repeats itself, and it must not be relied on for anything.

* **Form**: `LlamaForCausalLM`, {parameters:.1f}M parameters: {layers} layers, hidden {hidden}, {heads} query and
  {kv_heads} key/value heads of {head_dim}, feed-forward {mlp}, tied embeddings, context {context}, bfloat16.
* **Tokenizer**: byte-level BPE of {vocab_size} entries trained on the same data; digits are single tokens; ChatML-like
  template. No token is added to a prompt.
* **Data**: the Python standard library's own sources as they stand in the interpreter that trains it (one file in 40,
  chosen by the hash of its path, is held out), mixed with synthetic text: `name = value` lines that are asked for
  again later, repeated blocks, and a few chats made from docstrings.
* **Seen in training**: {tokens:.2f}M tokens.
* **How it looks back**: the first two layers start with an n-gram induction circuit wired into their weights (find the
  longest suffix of the context that stood earlier, take the token that followed); masks keep it in place while
  everything else is trained. `distill/wiring.py` explains it. The circuit recalls before any training; training
  teaches the rest of the network to write code and to know when to listen to it.

## Measured

Recall is exact: a trial counts when every token of the value is the most likely one. "One of eight" binds eight names
and asks for one of them. Copying is the share of right tokens in a block that comes a second time. Filler is held-out
code. Repeat with `python -m quire.distill.recall models/quire-mini`.

{begin}
{measured}
{end}

## Make it again

    python -m quire.distill.pretrain --out DIR --tokens {tokens:.2f}e6

It uses a GPU if there is one, goes on where it stopped, and leaves the checkpoint in `DIR/model`. The weights come
out alike, not identical: the sources differ between Python releases and float sums between machines.
"""


def model_card(shape: Shape, parameters: int, tokens: int, measured: str) -> str:
    """README.md of an export; `measured` is the text between the markers."""
    facts = shape.as_dict()
    return CARD.format(
        parameters=parameters / 1e6, tokens=tokens / 1e6, measured=measured, begin=BEGIN, end=END, **facts
    )


def replace_measured(card: Path, measured: str) -> None:
    """Put new measurements between the markers of a card."""
    text = card.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    card.write_text(f"{before}{BEGIN}\n{measured}\n{END}{after}", encoding="utf-8")
