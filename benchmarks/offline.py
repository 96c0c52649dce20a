"""Tokens per second of the offline API beside `transformers.generate`, at several batch sizes, in one run.

    python benchmarks/offline.py [--model DIR] [--batches 1 8 32] [--prompt 128] [--output 64] [--rounds 3]

All of them get the same prompts (slices of the standard library's sources), the same type and the same number of
tokens to generate, greedily, past any end token. Rounds alternate between the contenders, so that a machine whose
speed drifts does not favour one; the table shows the median of the rounds and the ratio to the better of the two ways
to use transformers: one prompt after another, and all prompts as one static batch.
"""

import argparse
import os
import statistics
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from quire.core.config import embedded_model
from quire.core.request import SamplingParams
from quire.server.llm import LLM

Prompts = list[list[int]]
Contender = Callable[[Prompts, int], None]


def prompts_from_stdlib(tokenizer: PreTrainedTokenizerFast, count: int, length: int) -> Prompts:
    """`count` different prompts of `length` token ids."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / name).read_text() for name in ("argparse.py", "ast.py", "asyncio/base_events.py"))
    ids = tokenizer(text)["input_ids"]
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def quire_contender(model: str, dtype: str, max_num_seqs: int) -> Contender:
    """Quire's offline API: all prompts at once, continuous batching."""
    llm = LLM(model, dtype=dtype, max_num_seqs=max_num_seqs, draft="none")

    def run(prompts: Prompts, output: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        for completion in llm.generate(prompts, params, progress=False):
            assert len(completion.choices[0].token_ids) == output

    return run


def transformers_contenders(model: str, dtype: torch.dtype) -> dict[str, Contender]:
    """The library's own `generate`, prompt by prompt and as one static batch."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()

    def run(prompts: Prompts, output: int) -> None:
        ids = torch.tensor(prompts)
        done = network.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=output,
            max_new_tokens=output,
            pad_token_id=0,
        )
        assert done.shape[1] == ids.shape[1] + output

    def one_by_one(prompts: Prompts, output: int) -> None:
        for prompt in prompts:
            run([prompt], output)

    return {"transformers, one by one": one_by_one, "transformers, static batch": run}


def measure(contenders: dict[str, Contender], prompts: Prompts, output: int, rounds: int) -> dict[str, float]:
    """Median output tokens per second of each contender; rounds alternate, one uncounted round first."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run(prompts, output)
            if round_number:
                rates[name].append(len(prompts) * output / (time.perf_counter() - started))
    return {name: statistics.median(values) for name, values in rates.items()}


def main() -> None:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(embedded_model()))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--output", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.model)
    contenders = {"quire": quire_contender(args.model, args.dtype, max(args.batches))}
    contenders |= transformers_contenders(args.model, getattr(torch, args.dtype))
    table = Table("batch", *contenders, "quire / better transformers")
    for batch in args.batches:
        rates = measure(contenders, prompts_from_stdlib(tokenizer, batch, args.prompt), args.output, args.rounds)
        best = max(rate for name, rate in rates.items() if name != "quire")
        table.add_row(str(batch), *(f"{rate:,.0f}" for rate in rates.values()), f"{rates['quire'] / best:.2f}x")
    console = Console(width=120)
    console.print(f"output tokens/s, {args.dtype}, prompt {args.prompt}, output {args.output}, {os.cpu_count()} cores")
    console.print(table)


if __name__ == "__main__":
    main()
