"""End to end in one process: scheduler, engine and native runner on random weights of well-known shapes."""

import gc
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from benchmarks.gpu.measure import Meter, Row
from quire.core.config import EngineConfig
from quire.core.messages import Failed, Tokens, single_events
from quire.core.model_spec import ModelSpec
from quire.core.request import Request, SamplingParams, SeedSource
from quire.engine.engine import Engine
from quire.kernels.backend import Backend
from quire.models import native_layers
from quire.models.native import NativeRunner
from quire.models.native_layers import LayerShape
from quire.models.placement import Placement
from quire.models.rope import RotaryEmbedding, rope_settings
from quire.scheduler.loop import EngineLoop, scheduler_config
from quire.scheduler.scheduler import Scheduler


@dataclass(frozen=True, slots=True)
class Network:
    """A decoder's shape."""

    name: str
    layers: int
    shape: LayerShape
    vocabulary: int
    tied: bool
    theta: float


def _shape(
    hidden: int, feed_forward: int, heads: int, kv_heads: int, width: int, norm: bool
) -> native_layers.LayerShape:
    return native_layers.LayerShape(hidden, feed_forward, heads, kv_heads, width, 1e-6, False, False, False, norm)


LLAMA_8B = Network("Llama-3.1-8B", 32, _shape(4096, 14336, 32, 8, 128, False), 128256, False, 500000.0)
QWEN_06B = Network("Qwen3-0.6B", 28, _shape(1024, 3072, 16, 8, 128, True), 151936, True, 1000000.0)
TINY = Network("tiny", 2, _shape(32, 64, 4, 2, 16, True), 100, True, 10000.0)


@dataclass(frozen=True, slots=True)
class Load:
    """Equal requests that all arrive at once."""

    requests: int
    prompt: int
    output: int


LOADS = (Load(1, 8192, 64), Load(1, 128, 128), Load(16, 512, 64), Load(128, 512, 64))
TINY_LOADS = (Load(2, 9, 3),)


def random_engine(
    network: Network, device: torch.device, dtype: torch.dtype, backend: Backend, load: Load, graphs: bool
) -> Engine:
    """An engine that could have been loaded from a checkpoint of this shape, with normal weights of deviation 0.02."""
    shape = network.shape
    length = 2 * max(16, load.prompt + load.output)
    spec = ModelSpec(
        name=network.name, architecture="LlamaForCausalLM", num_layers=network.layers, num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads, head_dim=shape.head_dim, vocab_size=network.vocabulary, max_context=length,
        windows=(None,) * network.layers, eos_token_ids=(),
    )  # fmt: skip
    place = Placement(device, dtype, backend)
    tokens = native_layers.TokenWeights.fresh(network.vocabulary, shape.hidden, network.tied, place)
    decoder = native_layers.Decoder(shape, F.silu, spec.windows, tokens, place)
    for weight in decoder.parameters():
        weight.normal_(0.0, 0.02) if weight.dim() > 1 else weight.fill_(1.0)
    settings = rope_settings({"rope_theta": network.theta, "max_position_embeddings": length}, shape.head_dim)
    runner = NativeRunner(spec, decoder, RotaryEmbedding(settings, device))
    config = EngineConfig(
        model=network.name, max_num_seqs=load.requests, max_batch_tokens=max(2048, load.requests),
        prefix_cache=False, max_model_len=length, cuda_graphs=graphs, draft="none",
    )  # fmt: skip
    return Engine(runner, config, "native", place)


def run_load(engine: Engine, load: Load, looks_ahead: bool | None = None) -> tuple[float, list[float]]:
    """Serve the load: (seconds until all prompts are computed, seconds of each step that only decodes).

    looks_ahead: as `EngineLoop` takes it.
    """
    config = scheduler_config(
        engine.info,
        max_num_seqs=load.requests,
        max_batch_tokens=max(2048, load.requests),
        max_waiting=1024,
        prefix_cache=False,
    )
    loop = EngineLoop(engine, Scheduler(config), looks_ahead)
    dice, seeds = random.Random(0), SeedSource()
    params = SamplingParams(temperature=0.0, max_tokens=load.output, ignore_eos=True)
    for number in range(load.requests):
        ids = [dice.randrange(engine.spec.vocab_size) for _ in range(load.prompt)]
        loop.submit(Request.create(f"r{number}", ids, params, seeds))
    started, filled, decodes, tokens = time.perf_counter(), 0.0, list[float](), 0
    while loop.has_work:
        before = time.perf_counter()
        report = loop.step()
        failed = [event for event in report.events if isinstance(event, Failed)]
        if failed:
            raise RuntimeError(failed[0].error.message)
        tokens += sum(len(event.token_ids) for event in single_events(report.events) if isinstance(event, Tokens))
        if report.stats.batch_tokens > load.requests or not filled:
            filled = time.perf_counter() - started
        else:
            decodes.append(time.perf_counter() - before)
    assert tokens == load.requests * load.output
    return filled, decodes


def rows(
    meter: Meter,
    networks: tuple[Network, ...],
    loads: tuple[Load, ...],
    dtype: torch.dtype,
    backend: Backend,
    *,
    graphs: bool = True,
) -> Iterator[Row]:
    """Prompt and decode speed of each network under each load; what cannot run says why.

    graphs: whether decode steps may be replayed as CUDA graphs (they are with the backend triton).
    """
    for network in networks:
        for load in loads:
            # The engine sizes its pool by what is free: give back what earlier work left with the allocator.
            gc.collect()
            torch.cuda.empty_cache()
            case = f"{network.name}, {load.requests} x {load.prompt} + {load.output}"
            try:
                yield from _load_rows(meter, network, load, dtype, backend, case, graphs)
            except Exception as error:  # one load that fails must not take the other results with it
                note = f"{type(error).__name__}: {str(error)[:200]}"
                yield Row("serving", case, backend, None, note=note)


def _load_rows(
    meter: Meter, network: Network, load: Load, dtype: torch.dtype, backend: Backend, case: str, graphs: bool
) -> Iterator[Row]:
    """The second of two equal rounds counts."""
    engine = random_engine(network, meter.device, dtype, backend, load, graphs)
    way = f"{backend}, {'with' if graphs else 'without'} graphs" if backend == "triton" else backend
    with torch.inference_mode():
        run_load(engine, load)
        filled, decodes = run_load(engine, load)
        _, serial = run_load(engine, load, looks_ahead=False)
    tokens, step = load.requests * load.prompt, sorted(decodes)[len(decodes) // 2]
    share = _prompt_floor(meter, network, load) / filled
    yield Row("serving", case, f"prompt, {way}", filled * 1e6, share, f"{tokens / filled:,.0f} tokens/s")
    floor = _decode_floor(meter, network, load, dtype)
    yield Row("serving", case, f"decode step, {way}", step * 1e6, floor / step, f"{load.requests / step:,.0f} tokens/s")
    plain = sorted(serial)[len(serial) // 2]
    note = f"the host's part that looking ahead hides: {1 - step / plain:.0%}"
    yield Row("serving", case, f"decode step without looking ahead, {way}", plain * 1e6, floor / plain, note)


def _matrix_weights(network: Network) -> int:
    """Elements of the matrices that every row is multiplied with."""
    shape = network.shape
    attention = shape.hidden * shape.head_dim * 2 * (shape.num_heads + shape.num_kv_heads)
    return network.layers * (attention + 3 * shape.hidden * shape.feed_forward)


def _prompt_floor(meter: Meter, network: Network, load: Load) -> float:
    """Seconds of the matrix products and of causal attention."""
    shape, tokens = network.shape, load.requests * load.prompt
    attention = network.layers * 2 * shape.num_heads * shape.head_dim * load.prompt * tokens
    return (2 * _matrix_weights(network) * tokens + attention) / meter.flops


def _decode_floor(meter: Meter, network: Network, load: Load, dtype: torch.dtype) -> float:
    """Seconds to read weights, output head and half of the outputs' worth of cache on top of the prompts'."""
    shape = network.shape
    entries = load.requests * (load.prompt + load.output / 2) * network.layers * shape.num_kv_heads * 2 * shape.head_dim
    weights = _matrix_weights(network) + network.vocabulary * shape.hidden
    return (entries + weights) * dtype.itemsize / meter.bandwidth
