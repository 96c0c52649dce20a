"""Prompts to distil the embedded model's draft on: `python -m quire.distill.demo_prompts --out DIR`.

Writes `train.jsonl` and `held_out.jsonl`: the kinds of rows that the model itself was trained on (see `samples`), cut
into prompt and answer. Held out are the files of the standard library that the model did not see either.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..core.config import embedded_model
from .corpus import build_corpus, documented_functions, is_held_out, standard_library, tokenize
from .samples import Mixture, SampleMaker
from .vocabulary import load_tokenizer

MIXTURES = {
    "code": Mixture(recall=0.0, copy=0.0, random_copy=0.0, chat=0.0),
    "recall": Mixture(recall=1.0, copy=0.0, random_copy=0.0, chat=0.0),
    "copy": Mixture(recall=0.0, copy=0.8, random_copy=0.2, chat=0.0),
}
SHARES = {"code": 0.6, "recall": 0.15, "copy": 0.1, "chat": 0.15}
SHORTEST_PROMPT = 32
SHORTEST_ROW = 4 * SHORTEST_PROMPT


def code_prompts(maker: SampleMaker, kind: str, count: int, length: int) -> Iterator[dict[str, object]]:
    """Rows of a kind, each cut at a random place in its first half, so that either part is worth learning from."""
    for index in range(count):
        ids = maker.row(index, length - 1, MIXTURES[kind])[0].tolist()
        cut = int(np.random.default_rng((maker.seed, 3, index)).integers(SHORTEST_PROMPT, length // 2))
        yield {"prompt_ids": ids[:cut], "output_ids": ids[cut:], "domain": kind}


def chat_prompts(maker: SampleMaker, count: int) -> Iterator[dict[str, object]]:
    """Single questions in the template's form with their answers."""
    for index in range(count):
        question, answer = maker.chat(np.random.default_rng((maker.seed, 4, index)))
        prompt, output = maker.chat_ids(question, answer)
        yield {"prompt_ids": prompt, "output_ids": output, "domain": "chat"}


def write(path: Path, maker: SampleMaker, count: int, length: int) -> None:
    """About `count` prompts of all kinds."""
    with path.open("w", encoding="utf-8") as file:
        for kind, share in SHARES.items():
            number = max(1, round(share * count))
            rows = chat_prompts(maker, number) if kind == "chat" else code_prompts(maker, kind, number, length)
            file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--count", type=int, default=8000, help="prompts to train on")
    parser.add_argument("--held-out", type=int, default=160, help="prompts to measure on")
    parser.add_argument("--length", type=int, default=768, help="tokens of prompt and answer")
    args = parser.parse_args()
    if args.length < SHORTEST_ROW:
        parser.error(f"--length must be at least {SHORTEST_ROW}")
    tokenizer = load_tokenizer(embedded_model())
    files = standard_library()
    corpus = build_corpus(tokenizer, files)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "train.jsonl", SampleMaker(corpus, tokenizer), args.count, args.length)
    unseen = [file for file in files if is_held_out(file.path)]
    held = replace(corpus, train=tokenize(tokenizer, [f.text for f in unseen]), functions=documented_functions(unseen))
    write(args.out / "held_out.jsonl", SampleMaker(held, tokenizer, seed=1), args.held_out, args.length)


if __name__ == "__main__":
    main()
