"""What pruning gives and costs in memory and time, as ratios to the unpruned engine within one run.

    python -m benchmarks.pruning [--model DIR] [--policy knorm] [--keep 0.5] [--prompt 1024] [--output 100]

Five figures: requests that run at once in the same KV memory while others wait (answers must be long enough that memory
is what they wait for, not prompts being computed: `--prompt 2048 --output 400`); tokens per second of a batch that only
decodes long contexts; most pages held while one long prompt is computed chunk by chunk; the share of a prompt's time
that each policy spends choosing, where it prunes after each chunk and where it does once, at the prompt's end; and the
time to the first token of the second question about a document to that of the first, pruned or not. Times are medians
of rounds that alternate between the contenders; what a policy observes, and the moving of what stays, are in the
prompt's time, not in the share.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.stepping import Prompts, drain, load
from quire.core.config import embedded_model
from quire.core.messages import EngineInfo, EngineStats, Event
from quire.core.pruning import PruneParams
from quire.scheduler.loop import EngineLoop

MARGIN = 100  # tokens of context left free for outputs
QUESTION = 16  # tokens
Figures = dict[str, tuple[float, float]]  # name -> (unpruned, pruned)
Costs = dict[str, dict[str, tuple[float, float]]]  # policy -> when -> (share spent choosing, time / unpruned time)
WAYS = {"each chunk": True, "once": False}


def sequence_bytes(info: EngineInfo, tokens: int) -> int:
    """KV memory of an unpruned sequence."""
    page_bytes = info.kv_bytes // info.num_pages
    return info.model.num_layers * info.model.num_kv_heads * -(-tokens // info.page_size) * page_bytes


def concurrency(
    model: str, prompts: Prompts, prune: PruneParams, length: int, output: int, chunk: int
) -> tuple[float, float]:
    """Mean number of running sequences over the steps in which others wait for memory; the pool holds 8 unpruned."""
    means = []
    memory = 8 * sequence_bytes(load(model, max_num_seqs=1).engine.info, length + output)
    for how in (None, prune):
        loop = load(model, max_num_seqs=64, max_batch_tokens=chunk, kv_memory=memory)
        running: list[int] = []

        def watch(stats: EngineStats, events: Sequence[Event], running: list[int] = running) -> None:
            if stats.waiting:
                running.append(stats.running)

        drain(loop, [prompts.request(prompts.take(length), output, how) for _ in range(64)], watch)
        means.append(statistics.mean(running[len(running) // 4 :]))  # past the start, when nobody decodes yet
    return means[0], means[1]


def decoding(
    loop: EngineLoop, prompts: Prompts, prune: PruneParams, length: int, batch: int, rounds: int
) -> tuple[float, float]:
    """Generated tokens per second over the steps in which all sequences decode."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for pruned, found in rates.items():
            steps: list[float] = []

            def watch(stats: EngineStats, events: Sequence[Event], steps: list[float] = steps) -> None:
                if stats.running == stats.batch_tokens == batch:
                    steps.append(stats.step_seconds)

            how = prune if pruned else None
            drain(loop, [prompts.request(prompts.take(length), MARGIN // 2, how) for _ in range(batch)], watch)
            if not steps:
                raise SystemExit("some answers ended before all prompts were computed: lower --batch")
            found.append(batch / statistics.median(steps))
    return statistics.median(rates[False]), statistics.median(rates[True])


def peak_pages(loop: EngineLoop, prompts: Prompts, prune: PruneParams, length: int) -> tuple[float, float]:
    """Most pages held while one prompt is computed."""
    peaks = []
    for how in (None, prune):
        held: list[int] = []

        def watch(stats: EngineStats, events: Sequence[Event], held: list[int] = held) -> None:
            held.append(stats.pages_used)

        drain(loop, [prompts.request(prompts.take(length), 2, how)], watch)
        peaks.append(max(held))
    return peaks[0], peaks[1]


def choosing(loop: EngineLoop, prompts: Prompts, keep: float, length: int, rounds: int) -> Costs:
    """What each policy costs while a prompt is computed, pruned after each chunk and once."""
    found: Costs = {}
    for policy, facts in loop.engine.info.policies.items():
        if facts.obstacle or facts.selects:
            continue
        measured: dict[str, list[tuple[float, float]]] = {when: [] for when in WAYS}
        for _ in range(rounds):
            prompt = prompts.take(length)
            plain = prompt_seconds(loop, prompts, prompt, None)
            for when, chunked in WAYS.items():
                before = chosen_seconds(loop, policy)
                pruned = prompt_seconds(loop, prompts, prompt, PruneParams(policy=policy, keep=keep, chunked=chunked))
                measured[when].append(((chosen_seconds(loop, policy) - before) / pruned, pruned / plain))
        found[policy] = {
            when: (statistics.median(share for share, _ in pairs), statistics.median(ratio for _, ratio in pairs))
            for when, pairs in measured.items()
        }
    return found


def questions(
    loop: EngineLoop, prompts: Prompts, keep: float, length: int, rounds: int
) -> dict[str, tuple[float, float]]:
    """By policy: seconds to the first token of the first and the second question about a document of so many tokens."""
    times: dict[str, tuple[list[float], list[float]]] = {}
    for _ in range(rounds):
        for policy in ("unpruned", "keydiff", "kvzip"):
            # The policies share no blocks, for what one computes whole another would begin with.
            document = prompts.take(length)
            prune = None if policy == "unpruned" else PruneParams(policy=policy, keep=keep, context=length)
            for found in times.setdefault(policy, ([], [])):
                found.append(prompt_seconds(loop, prompts, document + prompts.take(QUESTION), prune, output=1))
    return {policy: (statistics.median(first), statistics.median(second)) for policy, (first, second) in times.items()}


def prompt_seconds(
    loop: EngineLoop, prompts: Prompts, prompt: list[int], prune: PruneParams | None, output: int = 2
) -> float:
    """Time to the end of a request of so many tokens."""
    started = time.perf_counter()
    drain(loop, [prompts.request(prompt, output, prune)], lambda stats, events: None)
    return time.perf_counter() - started


def chosen_seconds(loop: EngineLoop, policy: str) -> float:
    """Spent on choosing by the policy so far."""
    counts = loop.stats().prunes.get(policy)
    return counts.seconds if counts else 0.0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(embedded_model()), help="checkpoint folder")
    parser.add_argument("--policy", default="knorm")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompts that run together")
    parser.add_argument("--output", type=int, default=MARGIN, help="tokens of their answers")
    parser.add_argument("--chunk", type=int, default=256, help="most tokens of a step")
    parser.add_argument("--batch", type=int, default=16, help="sequences that decode together")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = arguments()
    prompts, prune = Prompts(args.model), PruneParams(policy=args.policy, keep=args.keep)
    info = load(args.model, max_num_seqs=1).engine.info
    long = info.max_model_len - MARGIN
    memory = (args.batch + 1) * sequence_bytes(info, info.max_model_len)
    loop = load(args.model, max_num_seqs=args.batch, max_batch_tokens=args.chunk, kv_memory=memory)
    # A prompt a step, so that all decode together before the first answer ends.
    wide = load(args.model, max_num_seqs=args.batch, max_batch_tokens=info.max_model_len, kv_memory=memory)
    figures = {
        f"requests at once, {args.prompt:,} tokens each": concurrency(
            args.model, prompts, prune, args.prompt, args.output, args.chunk
        ),
        f"tokens/s, {args.batch} decode at {long:,}": decoding(wide, prompts, prune, long, args.batch, args.rounds),
        f"peak pages, prompt of {long:,} in chunks of {args.chunk}": peak_pages(loop, prompts, prune, long),
    }
    policies = choosing(loop, prompts, args.keep, long, args.rounds)
    keeping = load(args.model, max_batch_tokens=args.chunk, kv_memory=memory, prefix_cache=True)
    second = questions(keeping, prompts, args.keep, long, args.rounds)
    show(figures, policies, second, f"{args.policy}, keep {args.keep:g}, {info.device}, {info.dtype}")
    if args.json:
        content = {"arguments": vars(args), "figures": figures, "policies": policies, "questions": second}
        args.json.write_text(json.dumps(content, default=str))


def show(figures: Figures, policies: Costs, second: Figures, title: str) -> None:
    """Three tables."""
    console = Console(width=120)
    table = Table("figure", "unpruned", "pruned", "ratio", title=title)
    for name, (plain, pruned) in figures.items():
        table.add_row(name, f"{plain:,.1f}", f"{pruned:,.1f}", f"{pruned / plain:.2f}x")
    console.print(table)
    columns = (f"{text}, {when}" for when in WAYS for text in ("share spent choosing", "time, pruned / unpruned"))
    costs = Table("policy", *columns, title="a long prompt")
    for policy, by_way in policies.items():
        cells = (text for share, ratio in by_way.values() for text in (f"{share:.1%}", f"{ratio:.2f}x"))
        costs.add_row(policy, *cells)
    console.print(costs)
    reuse = Table("document", "first question, s to first token", "second question", "ratio")
    for policy, (first, later) in second.items():
        reuse.add_row(policy, f"{first:.3f}", f"{later:.3f}", f"{later / first:.3f}x")
    console.print(reuse)


if __name__ == "__main__":
    main()
