"""What an engine tries at its start (`kernels.self_check`), for well-known shapes: whether kernels are right here.

Times are those of a first start, compiling included.
"""

import time
from collections.abc import Iterator

import torch

from benchmarks.gpu.measure import Meter, Row
from quire.kernels.kernel_trials import KernelShape
from quire.kernels.self_check import failed_kernel

SHAPES = {
    "Llama-3.1-8B": KernelShape(32, 8, 128, 16, 128256, rotated=128, hidden=4096, feed_forward=14336),
    "Qwen3-0.6B": KernelShape(16, 8, 128, 16, 151936, rotated=128, head_norm=True, hidden=1024, feed_forward=3072),
    "Gemma-2-9B": KernelShape(16, 8, 256, 16, 256000, (4096, None), softcap=50.0),
    "gpt-oss-20b": KernelShape(64, 8, 64, 16, 201088, (128, None), sinks=True),
    "Phi-2": KernelShape(32, 32, 80, 16, 51200),
}
TINY = {"tiny": KernelShape(4, 2, 16, 8, 100, rotated=16, head_norm=True, hidden=32, feed_forward=64)}


def rows(meter: Meter, dtype: torch.dtype, *, tiny: bool) -> Iterator[Row]:
    """Every shape in the benchmark's type, the first in float16 and float32 too."""
    shapes = TINY if tiny else SHAPES
    cases = [(name, dtype) for name in shapes]
    if not tiny:
        cases += [(next(iter(shapes)), other) for other in (torch.float16, torch.float32)]
    for name, kind in cases:
        started = time.perf_counter()
        failure = failed_kernel(shapes[name], meter.device, kind, "triton")
        spent = (time.perf_counter() - started) * 1e6
        case = f"kernels of {name} in {str(kind).removeprefix('torch.')}"
        if failure is None:
            yield Row("check", case, "quire", spent, note="as torch computes them")
        else:
            yield Row("check", case, "quire", None, note=f"WRONG: {failure.kernel} {failure.reason}")
