"""Every Triton kernel compiles for Turing, Ampere and Hopper within their shared memory; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("compile_launches.py")


def compiled(capability: int, *head_dims: int, cache: Path) -> list[dict[str, Any]]:
    """What the compiler says of each launch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), str(capability), *map(str, head_dims)]
    environment["TRITON_CACHE_DIR"] = str(cache)
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    launches: list[dict[str, Any]] = json.loads(result.stdout)
    return launches


def check(capability: int, *head_dims: int, cache: Path) -> None:
    """All launches fit; from Ampere on attention multiplies on tensor cores, on Hopper by warp groups."""
    launches = compiled(capability, *head_dims, cache=cache)
    assert {launch["head_dim"] for launch in launches} == set(head_dims)
    for launch in launches:
        assert launch["shared"] <= launch["limit"], launch
        if launch["kernel"] in ("_attention_kernel", "_mass_kernel", "_columns_kernel") and capability >= 80:
            wide = capability >= 90 and launch["rows"] >= 64
            assert launch["matrix"] == ["wgmma.mma_async" if wide else "mma.sync"], launch


@pytest.mark.parametrize(("capability", "head_dim"), [(75, 64), (90, 128)])
def test_compiles_within_shared_memory(capability: int, head_dim: int, tmp_path: Path) -> None:
    check(capability, head_dim, cache=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [75, 80, 86, 90])
def test_all_head_dims_compile(capability: int, tmp_path: Path) -> None:
    check(capability, 64, 80, 96, 128, 192, 256, cache=tmp_path)
