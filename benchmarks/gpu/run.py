"""Everything about the GPU kernels in one command: tests, times against rooflines and contenders, serving end to end.

    python benchmarks/gpu/run.py [--output result.json] [--skip tests serving] [--interpret-check]

Runs from the source tree, nothing installed. The table comes last. See README.md beside this file.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent.parent
if TYPE_CHECKING:
    import torch

    from benchmarks.gpu.measure import Meter, Row

SECTIONS = ("tests", "check", "attention", "mass", "operations", "sampling", "serving", "speculation")
_TEST_SECONDS = 240


def prepare_imports(interpret: bool) -> None:
    """Make `quire` and `benchmarks` importable from the source tree; with `interpret`, Triton as an interpreter."""
    sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("quire") is None:
        sys.path.insert(0, str(ROOT / "typings"))  # holds a link to each package under the name quire
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # decides when a kernel is defined
        importlib.import_module("tests.kernels.triton_interpreter")


def run_tests() -> str:
    """The tests marked gpu, on several processes where pytest-xdist is there; their last line."""
    missing = [name for name in ("pytest", "pytest_timeout", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        return f"not run: {', '.join(missing)} missing"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu and not slow",
        "tests/kernels",
        "tests/engine",
        "tests/speculation",
        "-p",
        "no:cacheprovider",
    ]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    path = os.pathsep.join([str(ROOT / "typings"), os.environ.get("PYTHONPATH", "")])
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
            timeout=_TEST_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"stopped after {_TEST_SECONDS} s"
    if result.returncode:
        print(result.stdout[-8000:], result.stderr[-2000:])
    return f"exit {result.returncode}: {(result.stdout.strip().splitlines() or ['no output'])[-1]}"


def measure(meter: "Meter", skip: list[str], *, tiny: bool) -> Iterator["Row"]:
    """The rows of all sections that are not skipped."""
    import torch

    from benchmarks.gpu import attention_cases, check_cases, operation_cases, sampling_cases, speculation_cases

    dtype = torch.float32 if tiny else torch.bfloat16
    cases = attention_cases.TINY if tiny else attention_cases.CASES
    if "check" not in skip:
        yield from check_cases.rows(meter, dtype, tiny=tiny)
    if "attention" not in skip:
        yield from attention_cases.rows(meter, cases, dtype)
    if "mass" not in skip:
        yield from attention_cases.mass_rows(meter, cases, dtype)
    if "operations" not in skip:
        yield from operation_cases.rows(meter, dtype, tiny=tiny)
    if "sampling" not in skip:
        yield from sampling_cases.rows(meter, tiny=tiny)
    if "serving" not in skip:
        yield from serving_rows(meter, dtype, tiny=tiny)
    if "speculation" not in skip:
        compare = speculation_cases.tiny_rows if tiny else speculation_cases.rows
        yield from compare(meter, dtype, "triton")


def serving_rows(meter: "Meter", dtype: "torch.dtype", *, tiny: bool) -> Iterator["Row"]:
    """End to end, on every backend."""
    from benchmarks.gpu import serving
    from quire.kernels.attention_xformers import xformers_obstacle

    if tiny:
        yield from serving.rows(meter, (serving.TINY,), serving.TINY_LOADS, dtype, "triton")
        return
    yield from serving.rows(meter, (serving.QWEN_06B, serving.LLAMA_8B), serving.LOADS, dtype, "triton")
    yield from serving.rows(meter, (serving.QWEN_06B,), serving.LOADS[1:], dtype, "triton", graphs=False)
    yield from serving.rows(meter, (serving.LLAMA_8B,), serving.LOADS[-1:], dtype, "triton", graphs=False)
    yield from serving.rows(meter, (serving.QWEN_06B,), serving.LOADS[-1:], dtype, "reference")
    if xformers_obstacle(meter.device, dtype) is None:
        yield from serving.rows(meter, (serving.QWEN_06B,), serving.LOADS[-1:], dtype, "xformers")


def table(rows: list["Row"]) -> str:
    """Aligned text, one line per row."""
    cells = [("section", "case", "contender", "us", "of roofline", "note")]
    for row in rows:
        spent = "-" if row.microseconds is None else f"{row.microseconds:,.1f}"
        share = "-" if row.roofline is None else f"{row.roofline:.0%}"
        cells.append((row.section, row.case, row.contender, spent, share, row.note))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)
    return "\n".join(line.rstrip() for line in lines)


def main() -> int:
    """Run what was asked for; 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-benchmark.json"), help="where the JSON goes")
    parser.add_argument("--skip", nargs="*", default=[], choices=SECTIONS, help="sections to leave out")
    parser.add_argument("--repeats", type=int, default=25, help="timed runs of each kernel")
    parser.add_argument("--interpret-check", action="store_true", help="tiny shapes on a CPU: exercises this script")
    args = parser.parse_args()
    prepare_imports(args.interpret_check)
    import torch

    if not args.interpret_check and not torch.cuda.is_available():
        print("This benchmark needs a CUDA device, and torch finds none (--interpret-check runs without one).")
        return 2
    from benchmarks.gpu.measure import Meter

    started = time.perf_counter()
    device = torch.device("cpu" if args.interpret_check else "cuda")
    name = "interpreter" if args.interpret_check else torch.cuda.get_device_name(device)
    result: dict[str, object] = {"device": name, "torch": torch.__version__}
    if not args.interpret_check and "tests" not in args.skip:
        result["tests"] = run_tests()
        print(f"tests: {result['tests']}", flush=True)
    meter = Meter(device, args.repeats)
    result |= {"copy_bytes_per_second": meter.bandwidth, "matmul_flops": meter.flops}
    rows: list[Row] = []
    try:
        for row in measure(meter, args.skip, tiny=args.interpret_check):
            rows.append(row)
            print(f"{row.section}: {row.case}: {row.contender}: {row.microseconds} us {row.note}", flush=True)
    finally:
        # What was measured before something failed is not lost.
        result |= {"seconds": time.perf_counter() - started, "rows": [asdict(row) for row in rows]}
        args.output.write_text(json.dumps(result, indent=1))
    print(f"\n{name}: copy {meter.bandwidth / 1e12:.2f} TB/s, bf16 matmul {meter.flops / 1e12:.0f} TFLOP/s")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
