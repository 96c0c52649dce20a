"""Runs one engine in its own interpreter: `python -P worker.py ADAPTER.py`, jobs and answers as lines of JSON.

The first line holds the settings to load with, each further one prompts and the tokens wanted. Nothing but the standard
library is imported here: an engine's environment need not have what ours has. What the engine prints goes to the error
stream, the answers to what was the output stream.

An adapter has a class `Engine`: made from the settings, with `facts` (its version and its types) and
`generate(prompts, output)`; and a function `convert(model, folder)` if it wants the model in another format.
"""

import importlib.util
import json
import os
import sys
import time
import traceback
from types import ModuleType
from typing import Any, TextIO


def load(path: str) -> ModuleType:
    """The adapter, which may have the name of what it imports."""
    spec = importlib.util.spec_from_file_location("adapter", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answers() -> TextIO:
    """The output stream, which from here on nobody else writes to."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", buffering=1)


def start(adapter: ModuleType, settings: dict[str, Any]) -> Any:
    """The engine, its model converted first where it wants another format."""
    model, converted = settings["model"], settings["converted"]
    if hasattr(adapter, "convert"):
        if not os.path.isdir(converted):
            adapter.convert(model, converted)
        settings["model"] = converted
    return adapter.Engine(settings)


def timed(engine: Any, prompts: list[list[int]], output: int) -> dict[str, Any]:
    """Seconds from handing over the prompts to having all tokens, and the tokens."""
    started = time.perf_counter()
    ids = engine.generate(prompts, output)
    seconds = time.perf_counter() - started
    lengths = {len(row) for row in ids}
    if len(ids) != len(prompts) or lengths != {output}:
        raise RuntimeError(f"{len(prompts)} times {output} tokens were asked for, {len(ids)} times {lengths} came")
    return {"seconds": seconds, "ids": [[int(token) for token in row] for row in ids]}


def main() -> None:
    """Serve until the input ends; an error ends it, told in the last answer."""
    out = answers()
    try:
        engine = start(load(sys.argv[1]), json.loads(sys.stdin.readline()))
        print(json.dumps(engine.facts), file=out)
        for line in sys.stdin:
            print(json.dumps(timed(engine, **json.loads(line))), file=out)
    except Exception as error:
        traceback.print_exc()
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=out)
        sys.exit(1)


if __name__ == "__main__":
    main()
