"""A script that compiles, for a GPU that need not be there, exactly what the launch wrappers would launch.

Arguments: compute capability times ten, then head dims. Launches are recorded instead of run, and each is compiled with
the types and specialisations that Triton would derive from its arguments. Prints a JSON list: kernel, head dim, shared
memory, the target's limit, and the matrix instructions in the code. Must run in a process of its own, not interpreted.
"""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from quire.kernels import (
    append_rotated_triton,
    attention_columns_triton,
    attention_mass_triton,
    attention_triton,
    cache_triton,
    compaction_triton,
    cuts_triton,
    layers_triton,
    logprobs_triton,
    page_bounds_triton,
    rejection_triton,
    rows_triton,
    sampling_triton,
)
from quire.kernels.append_rotated import Rotation
from quire.kernels.paged_rows import PagedRows
from quire.kernels.tiles_triton import DeviceLimits

LIMITS = {
    75: DeviceLimits(75, 40, 64 * 1024, 64 * 1024),
    80: DeviceLimits(80, 108, 163 * 1024, 164 * 1024),
    86: DeviceLimits(86, 82, 99 * 1024, 100 * 1024),
    90: DeviceLimits(90, 132, 227 * 1024, 228 * 1024),
}
"""From the CUDA programming guide, table of technical specifications per compute capability."""
_POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
Recorded = tuple[Any, dict[str, Any]]


@contextlib.contextmanager
def recorded(limits: DeviceLimits) -> Iterator[list[Recorded]]:
    """Launches within the block go to the list: (kernel, its arguments by name)."""
    launches: list[Recorded] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs))

    with (
        mock.patch.object(JITFunction, "run", record),
        mock.patch.object(attention_triton, "device_limits", lambda device: limits),
        mock.patch.object(attention_mass_triton, "device_limits", lambda device: limits),
    ):
        yield launches


def compile_launch(kernel: Any, arguments: dict[str, Any], capability: int) -> Any:
    """The compiled kernel."""
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = arguments[parameter.name]
        fixed = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and fixed):
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            if not parameter.do_not_specialize_on_alignment:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            if fixed and value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32"
    options = {name: arguments[name] for name in _OPTIONS if name in arguments}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def launch_attention(head_dim: int, dtype: torch.dtype) -> None:
    """Decode, verification and chunk launches, plain and with every option; mass."""
    sequences, kv_heads, pages, lengths = 3, 8, 512, (1, 4, 300)
    query = torch.zeros(sum(lengths), 32, head_dim, dtype=dtype)
    pool = torch.zeros(4, 2, 16, head_dim, dtype=dtype)
    held, table = torch.zeros(4, 16, dtype=torch.int32), torch.zeros(sequences, kv_heads, pages, dtype=torch.int32)
    kept, start = table[..., 0].contiguous(), torch.zeros(sequences + 1, dtype=torch.int32)
    positions = torch.zeros(sum(lengths), dtype=torch.int64)
    shared: dict[str, Any] = {"query": query, "pool": pool, "entry_positions": held, "page_table": table, "kept": kept}
    shared |= {"query_start": start, "query_lengths": lengths, "positions": positions}
    shared |= {"max_kept": 16 * pages, "scale": 0.1}
    attention_triton.paged_attention_triton(**shared, value_dim=head_dim)
    sinks = torch.zeros(32, dtype=dtype)
    options: dict[str, Any] = {"window": 100, "softcap": 30.0}
    log_sums = torch.zeros(sum(lengths), 32)
    attention_triton.paged_attention_triton(**shared, value_dim=head_dim, sinks=sinks, log_sums=log_sums, **options)
    slots = torch.zeros(sequences, dtype=torch.int64)
    attention_triton.paged_attention_triton(**shared, value_dim=head_dim, table_rows=slots)
    attention_triton.paged_attention_triton(**shared, value_dim=head_dim, visible=positions)
    unknown = shared | {"query_lengths": None}
    attention_triton.paged_attention_triton(**unknown, value_dim=head_dim, table_rows=slots)
    attention_mass_triton.attention_mass_triton(**shared, log_sums=log_sums)
    attention_mass_triton.attention_mass_triton(**shared, log_sums=log_sums, observe=4, **options)
    keys, places = PagedRows(pool[:, 0], table[0], 16 * pages), PagedRows(held, table[0], 16 * pages)
    columns = attention_columns_triton.attention_columns_triton
    columns(query[:1], keys, places, kept[0], positions[:1], reduce="sum", scale=0.1)
    columns(query[:300], keys, places, kept[0], positions[:300], reduce="max", scale=0.1, softcap=30.0)


def launch_draws() -> None:
    """Plain and with all that rows may ask for; what is drawn from, judging, log-probabilities."""
    logits, counts = torch.zeros(4, 151936), torch.zeros(8, 151936, dtype=torch.int32)
    rows, keys = logits[:, 0].contiguous(), torch.zeros(4, dtype=torch.int64)
    tables = rows_triton.Penalties(keys, counts, counts > 0, torch.zeros(4, 3), torch.zeros(4, 5, dtype=torch.int64))
    cuts = cuts_triton.Truncation(keys, rows)
    sampling_triton.draw_triton(logits, rows, rows, keys, keys)
    sampling_triton.draw_triton(logits, rows, rows, keys, keys, replace(tables, prefix=None))
    sampling_triton.draw_triton(logits, rows, rows, keys, keys, tables, cuts)
    sampling_triton.processed_logits_triton(logits, rows, rows, cuts)
    rejection_triton.judge_drafts_triton(logits, keys, logits, keys, keys, keys)
    for top in (0, 20):
        logprobs_triton.token_logprobs_triton(logits, keys, top)


def launch_others(head_dim: int, dtype: torch.dtype) -> None:
    """Cache and layer kernels."""
    pool, held = torch.zeros(4, 2, 16, head_dim, dtype=dtype), torch.zeros(4, 16, dtype=torch.int32)
    fused, index = torch.zeros(8, 12, head_dim, dtype=dtype), torch.zeros(8, dtype=torch.int64)
    cache_triton.append_kv_triton(pool, held, fused[:, 4:8], fused[:, 8:], index[:, None].expand(8, 4) * 1, index)
    table, counts = torch.zeros(2, 64, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    for in_place in (True, False):
        compaction_triton.compact_kv_triton(pool, held, table, table, table, counts, in_place=in_place)
    page_bounds_triton.page_key_bounds_triton(pool[:, :, 0].contiguous(), pool, counts, counts)
    rows, angles = torch.zeros(8, 4096, dtype=dtype), torch.zeros(8, head_dim // 2, dtype=dtype)
    layers_triton.add_rms_norm_triton(rows, rows, rows[0], 1e-6)
    places = index[:, None].expand(8, 4) * 1
    for weight in (None, fused[0, :8]):
        rotation = Rotation(fused[:, :8], angles, angles, weight, 1e-6)
        append_rotated_triton.append_rotated_triton(rotation, fused[:, 8:], pool, held, places, index)
    layers_triton.gated_activation_triton(rows, "silu")
    layers_triton.gated_activation_triton(rows, "gelu")


def main() -> None:
    """Compile for one target and several head dims."""
    capability = int(sys.argv[1])
    limits = LIMITS[capability]
    dtype = torch.bfloat16 if capability >= 80 else torch.float16
    results = []
    for head_dim in map(int, sys.argv[2:]):
        with recorded(limits) as launches:
            launch_attention(head_dim, dtype)
            launch_others(head_dim, dtype)
            if head_dim == int(sys.argv[2]):
                launch_draws()
        for kernel, arguments in launches:
            compiled = compile_launch(kernel, arguments, capability)
            instructions = [name for name in ("wgmma.mma_async", "mma.sync") if name in compiled.asm["ptx"]]
            results.append(
                {
                    "kernel": kernel.__name__,
                    "head_dim": head_dim,
                    "rows": arguments.get("ROWS", 0),
                    "shared": compiled.metadata.shared,
                    "limit": limits.shared_memory,
                    "matrix": instructions,
                }
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
