"""Where the time of a step goes on a CPU, beside what the machine's memory and oneDNN's matrix products allow.

    python benchmarks/cpu_step.py [--batches 1 8 32] [--rounds 20] [--markdown FILE]

Two models in bfloat16: quire-mini, and one of the shape of Qwen2-0.5B with random weights. Sequences have prompts of
128 tokens. Each round takes steps, then reads memory and multiplies the same matrices, packed once by oneDNN, so that a
machine whose speed drifts does not favour one; times are medians over the rounds.

`of the bandwidth bound`: the time to read all weights and the cache once, over the step's. `of packed products`: the
time of oneDNN's products alone, over the step's. The network is one call, from token ids to logits; in a step of
decodes that call also prepares its inputs and chooses the tokens, and says how long that took. What the network
consists of is measured in further steps that call the same kernels one by one.
"""

import argparse
import platform
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quire.core.config import EngineConfig, embedded_model
from quire.core.ids import RequestId
from quire.core.model_spec import ModelSpec
from quire.core.request import Request, SamplingParams
from quire.engine import engine as engine_module
from quire.engine.engine import Engine
from quire.kernels.backend import resolve_backend
from quire.kernels.cpu_library import loaded_library
from quire.models.native import NativeRunner
from quire.models.native_layers import Decoder, LayerShape, TokenWeights
from quire.models.placement import Placement
from quire.models.rope import RopeSettings, RotaryEmbedding
from quire.scheduler.loop import scheduler_config
from quire.scheduler.scheduler import Scheduler

Times = defaultdict[str, float]
PROMPT, CHUNK = 128, 512
APART = ("linear", "attention", "rms_norm", "rotate")
PARTS = ("network", "inputs", "sampling", "scheduling")


def half_billion(config: EngineConfig) -> Engine:
    """An engine over random weights in the shape of Qwen2-0.5B."""
    layers, heads, kv_heads, width, hidden, vocab = 24, 14, 2, 64, 896, 151936
    cpu = torch.device("cpu")
    place = Placement(cpu, torch.bfloat16, resolve_backend(cpu, torch.bfloat16))
    shape = LayerShape(hidden, 4864, heads, kv_heads, width, 1e-6, True, False, False, False)
    decoder = Decoder(shape, F.silu, (None,) * layers, TokenWeights.fresh(vocab, hidden, True, place), place)
    generator = torch.Generator().manual_seed(0)
    for weight in decoder.parameters():
        weight.normal_(0.0, 0.02, generator=generator)
    spec = ModelSpec(
        name="random",
        architecture="Qwen2ForCausalLM",
        num_layers=layers,
        num_kv_heads=kv_heads,
        num_heads=heads,
        head_dim=width,
        vocab_size=vocab,
        max_context=32768,
        windows=(None,) * layers,
        eos_token_ids=(),
    )
    rotary = RotaryEmbedding(RopeSettings("default", 1e6, width, 32768, 32768, {}), cpu)
    engine = Engine(NativeRunner(spec, decoder, rotary), config, "native", place)
    engine.warm_up()
    return engine


def decoder_of(engine: Engine) -> Decoder:
    """The network inside."""
    runner = engine._runner
    assert isinstance(runner, NativeRunner)
    return runner.decoder


def packed_products(engine: Engine, rows: int) -> Callable[[], None]:
    """All matrix products of a step by oneDNN over weights packed for `rows` rows, one sampled row per sequence."""
    decoder, product = decoder_of(engine), torch.ops.mkldnn._linear_pointwise
    weights = []
    for layer in decoder.layers:
        attention, mlp = layer.attention, layer.mlp
        weights += [attention.qkv.weight, attention.output.weight, mlp.gate_up.weight, mlp.down.weight]
    if rows != CHUNK:
        weights.append(decoder.head)
    jobs: list[tuple[Tensor, Tensor]] = []
    for weight in weights:
        x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
        jobs.append((x, torch.ops.mkldnn._reorder_linear_weight(weight, rows)))

    def run() -> None:
        for x, weight in jobs:
            product(x, weight, None, "none", [], "")

    return run


@contextmanager
def timed(owner: Any, name: str, spent: Times, label: str) -> Iterator[None]:
    """Add the time inside `owner.name` to `spent[label]` while the context is open."""
    original = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        result = original(*arguments, **options)
        spent[label] += time.perf_counter() - started
        return result

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def new_scheduler(engine: Engine, size: int, length: int, max_tokens: int) -> Scheduler:
    """With `size` sequences waiting, each of a prompt of `length` tokens, all computed in one step."""
    scheduler = Scheduler(
        scheduler_config(
            engine.info, max_num_seqs=size, max_batch_tokens=size * length, max_waiting=size, prefix_cache=False
        )
    )
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=max_tokens)
    for number in range(size):
        ids = tuple((7 * i + number) % 8000 for i in range(length))
        scheduler.add(Request(id=RequestId(str(number)), prompt_ids=ids, params=params))
    return scheduler


def timed_step(engine: Engine, scheduler: Scheduler) -> Times:
    """Seconds of one step, in parts."""
    spent = Times(float, dict.fromkeys(PARTS, 0.0))
    with ExitStack() as stack:
        stack.enter_context(timed(engine._decode_step, "_call", spent, "network"))
        stack.enter_context(timed(decoder_of(engine)._fused, "_call", spent, "network"))
        stack.enter_context(timed(engine_module, "build_inputs", spent, "inputs"))
        stack.enter_context(timed(engine.cache, "apply", spent, "inputs"))
        stack.enter_context(timed(engine._runner, "forward", spent, "forward"))
        began = time.perf_counter()
        plan = scheduler.plan()
        planned = time.perf_counter()
        assert plan is not None
        output = engine.step(plan)
        left = time.perf_counter()
        scheduler.commit(plan, output)
        spent["step"] = time.perf_counter() - began
    spent["scheduling"] = spent["step"] - (left - planned)
    spent["sampling"] = output.sample_seconds
    if not plan.sequences:
        spent["network"] -= output.sample_seconds
    else:
        spent["inputs"] += spent["forward"] - spent["network"]
    return spent


def timed_kernels(engine: Engine, scheduler: Scheduler) -> Times:
    """Seconds of the layers' kernels in one step that calls them one by one, final norm and output head included."""
    spent, decoder = Times(float), decoder_of(engine)
    plan = scheduler.plan()
    assert plan is not None
    with ExitStack() as stack:
        for owner, name, value in ((decoder, "_fusible", False), (engine, "_decode_step", None)):
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        for name in APART:
            stack.enter_context(timed(loaded_library(), name, spent, f"network: {name}"))
        output = engine.step(plan)
    scheduler.commit(plan, output)
    return spent


def seconds(run: Callable[[], object]) -> float:
    """Of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def decode_steps(engine: Engine, size: int, rounds: int) -> Callable[[], Times]:
    """Steps in which `size` sequences bring a token each; the second of two counts, as steps follow each other."""
    scheduler = new_scheduler(engine, size, PROMPT, 4 * rounds + 2)
    timed_step(engine, scheduler)

    def run() -> Times:
        timed_kernels(engine, scheduler)
        apart = timed_kernels(engine, scheduler)
        timed_step(engine, scheduler)
        return Times(float, timed_step(engine, scheduler) | apart)

    return run


def prompt_steps(engine: Engine) -> Callable[[], Times]:
    """Steps that compute `CHUNK` tokens of a prompt, from the start."""

    def run() -> Times:
        apart = timed_kernels(engine, new_scheduler(engine, 1, CHUNK, 1))
        return Times(float, timed_step(engine, new_scheduler(engine, 1, CHUNK, 1)) | apart)

    return run


def column(engine: Engine, step: Callable[[], Times], size: int, rounds: int, numbers: Tensor) -> dict[str, str]:
    """One column of the table; `size` sequences decode, or a prompt is computed if 0."""
    products = packed_products(engine, size or CHUNK)
    samples: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for part, value in step().items():
            samples[part].append(value)
        samples["products"].append(seconds(products))
        samples["reading"].append(seconds(numbers.sum))
    median = {part: statistics.median(values) for part, values in samples.items()}
    whole, bandwidth = median["step"], numbers.nbytes / median["reading"]
    median["rest"] = whole - sum(median[part] for part in PARTS)
    cells = {part: f"{median[part] * 1e3:.2f} ms ({median[part] / whole:.0%})" for part in (*PARTS, "rest")}
    for part in (f"network: {name}" for name in APART):
        cells[part] = f"{median[part] * 1e3:.2f} ms"
    cells["whole step"] = f"{whole * 1e3:.2f} ms"
    cells["of packed products"] = f"{median['products'] / whole:.0%}"
    cells["memory is read at"] = f"{bandwidth / 1e9:.1f} GB/s"
    if size:
        spec = engine.spec
        entries = size * (PROMPT + 2 * rounds) * spec.num_layers * spec.num_kv_heads  # in the middle of the rounds
        weights = sum(weight.nbytes for weight in decoder_of(engine).parameters())
        bound = (weights + entries * 2 * spec.head_dim * 2) / bandwidth
        cells["of the bandwidth bound"] = f"{bound / whole:.0%}"
    return cells


def table(title: str, columns: dict[str, dict[str, str]]) -> list[str]:
    """Markdown lines."""
    lines = [f"### {title}", "", f"| | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    names = list(dict.fromkeys(name for column in columns.values() for name in column))
    lines += [f"| {name} | {' | '.join(c.get(name, '') for c in columns.values())} |" for name in names]
    return [*lines, ""]


def machine() -> str:
    """What the numbers depend on, in one line."""
    features = torch.backends.cpu.get_cpu_capability()
    tiles = ", AMX" if torch.cpu._is_amx_tile_supported() else ""
    threads = torch.get_num_threads()
    return f"{date.today()}, {platform.machine()} ({features}{tiles}), {threads} threads, torch {torch.__version__}"


@torch.inference_mode()
def main() -> None:
    """Measure, print, and write the file if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    numbers = torch.ones(2**26)
    lines = ["# Where the time of a step goes on a CPU", "", f"`python benchmarks/cpu_step.py`: {machine()}.", ""]
    lines += [*(__doc__ or "").splitlines()[4:], ""]
    config = EngineConfig(
        model=str(embedded_model()),
        dtype="bfloat16",
        max_num_seqs=max(args.batches),
        max_model_len=1024,
        draft="none",
    )
    loads = {
        "quire-mini (15M)": lambda: Engine.load(config, lambda *_: None),
        "Qwen2-0.5B shape": lambda: half_billion(config),
    }
    for title, load in loads.items():
        engine = load()
        columns = {
            f"decode, batch {size}": column(engine, decode_steps(engine, size, args.rounds), size, args.rounds, numbers)
            for size in args.batches
        }
        columns[f"prompt, {CHUNK} tokens"] = column(engine, prompt_steps(engine), 0, args.rounds, numbers)
        lines += table(title, columns)
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
