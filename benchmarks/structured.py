"""Structured outputs: tokens per second of sequences that are bound to a JSON schema, relative to free ones.

    python -m benchmarks.structured [--model DIR | --preset 0.5b] [--draft none] [--batches 1 16] [--rounds 5]

One engine runs the same prompts free, bound, and bound without forced tokens (every token is drawn), by turns, so that
the machine's own pace weighs on all alike; the first round is not counted. What counts are the steps between the first
tokens of all sequences and the first end. Without --model and --preset the target is quire-mini.

* x free, x drawn: tokens per second of bound sequences relative to free ones, and to the same without forced tokens:
  the median of the rounds' ratios.
* +ms: what a step of bound sequences takes longer than a free one.
* tokens: of a sequence in a step, more than one by forced tokens and drafts.

Two schemas: `record` has strings of up to 40 characters, which the model writes; `form` has numbers, enumerations and
booleans under long names, which are forced from where they can only be one. Whitespace is the model's choice.
"""

import argparse
import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.stepping import load
from benchmarks.upscale import PRESETS, cached
from quire.core.config import embedded_model
from quire.core.ids import RequestId
from quire.core.messages import Failed, Finished, Tokens, single_events
from quire.core.request import Grammar, Request, SamplingParams, SeedSource
from quire.engine import grammar as grammars
from quire.scheduler.loop import EngineLoop
from quire.server.grammars import structured_outputs
from quire.server.text import Tokenizer

PROMPT = "Write the records of some people as JSON.\n\n"
KINDS = ("free", "drawn", "bound")
_names = itertools.count()


def _objects(**properties: dict[str, Any]) -> dict[str, Any]:
    """Many objects that have all of the properties: an output does not end before it is as long as is asked for."""
    one = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "array", "items": one, "minItems": 100}


_TEXT = {"type": "string", "maxLength": 40}
SCHEMAS = {
    "record": _objects(name=_TEXT, street=_TEXT, city=_TEXT, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "form": _objects(
        registration_status={"enum": ["active", "inactive", "suspended"]},
        number_of_dependants={"type": "integer", "minimum": 0, "maximum": 9},
        preferred_language={"enum": ["English", "French", "German", "Spanish"]},
        accepts_marketing_email={"type": "boolean"},
    ),
}


@dataclass(frozen=True, slots=True)
class Pace:
    """Of the steps in which all sequences generate."""

    step_seconds: float
    tokens: float
    """Of all sequences, in a step."""

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.step_seconds


def run(loop: EngineLoop, prompt: list[int], batch: int, output: int, kind: str, grammar: Grammar) -> Pace:
    """One batch to its end; the prompts are of different lengths, as users' are."""
    most, seeds = grammars.MAX_FORCED_TOKENS, SeedSource()
    grammars.MAX_FORCED_TOKENS = most if kind == "bound" else 0
    params = SamplingParams(temperature=0.8, max_tokens=output, ignore_eos=True)
    for number in range(batch):
        ids, name = prompt + prompt[: number % len(prompt)], RequestId(f"benchmark-{next(_names)}")
        loop.submit(Request.create(name, ids, params, seeds, grammar=None if kind == "free" else grammar))
    begun, ended, steps, seconds, tokens = set[RequestId](), False, 0, 0.0, 0
    while loop.has_work:
        counts = len(begun) == batch and not ended
        started = time.perf_counter()
        events = [*single_events(loop.step().events)]
        took = time.perf_counter() - started
        for event in events:
            assert not isinstance(event, Failed), event.error.message
            ended |= isinstance(event, Finished)
            if isinstance(event, Tokens):
                begun.add(event.request_id)
                tokens += counts * len(event.token_ids)
        steps, seconds = steps + counts, seconds + counts * took
    grammars.MAX_FORCED_TOKENS = most
    return Pace(seconds / steps, tokens / steps)


def measure(loop: EngineLoop, prompt: list[int], batch: int, args: argparse.Namespace, schema: str) -> list[str]:
    """A row of the table."""
    grammar = structured_outputs({"json": SCHEMAS[schema]})
    rounds = []
    for _ in range(args.rounds + 1):
        rounds.append({kind: run(loop, prompt, batch, args.output, kind, grammar) for kind in KINDS})
    rounds = rounds[1:]

    def middle(values: list[float]) -> float:
        return statistics.median(values)

    return [
        schema,
        str(batch),
        f"{middle([one['bound'].rate / one['free'].rate for one in rounds]):.2f}x",
        f"{middle([one['bound'].rate / one['drawn'].rate for one in rounds]):.2f}x",
        f"{middle([one['bound'].rate for one in rounds]):,.0f}",
        *(f"{1e3 * middle([one[kind].step_seconds - one['free'].step_seconds for one in rounds]):+.2f}"
          for kind in ("drawn", "bound")),
        f"{middle([one['bound'].tokens for one in rounds]) / batch:.2f}",
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder")
    parser.add_argument("--preset", choices=PRESETS, help="quire-mini enlarged to this size")
    parser.add_argument("--draft", default="none", help="as --draft of quire serve")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--schemas", nargs="+", choices=SCHEMAS, default=list(SCHEMAS))
    parser.add_argument("--output", type=int, default=200, help="tokens to generate")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model = args.model or str(cached(embedded_model(), args.preset) if args.preset else embedded_model())
    prompt = Tokenizer.load(model).encode(PROMPT)
    most = 2 * len(prompt) + args.output
    loop = load(model, draft=args.draft, max_num_seqs=max(args.batches), max_model_len=most)
    table = Table("schema", "batch", "x free", "x drawn", "tokens/s", "+ms, drawn", "+ms", "tokens", title=model)
    for schema in args.schemas:
        for batch in args.batches:
            table.add_row(*measure(loop, prompt, batch, args, schema))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
