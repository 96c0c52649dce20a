"""Compiling at first use: once, under one name, by many processes at a time, and without a compiler not at all."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quire.kernels import compiler
from quire.kernels.backend import resolve_backend
from quire.kernels.compiler import CompileError, compile_library

SOURCE = '#include "own.h"\nextern "C" int quire_answer() { return ANSWER; }\n'


@pytest.fixture
def sources(tmp_path: Path) -> tuple[list[Path], list[Path]]:
    """A tiny library: compiling the real one takes seconds."""
    source, header = tmp_path / "own.cpp", tmp_path / "own.h"
    source.write_text(SOURCE)
    header.write_text("#define ANSWER 42\n")
    return [source], [header]


def test_compiles_once_and_again_when_a_header_changes(sources, tmp_path, caplog) -> None:
    caplog.set_level(logging.INFO, "quire")
    first = compile_library(sources[0], sources[1], tmp_path / "cache")
    assert compile_library(sources[0], sources[1], tmp_path / "cache") == first
    assert [r.message for r in caplog.records if r.message.startswith("compiling CPU kernels (once per machine)")] == [
        caplog.records[0].message
    ]
    sources[1][0].write_text("#define ANSWER 43\n")
    assert compile_library(sources[0], sources[1], tmp_path / "cache") != first
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".so", ".so"]


def test_what_the_compiler_says_is_passed_on(sources, tmp_path) -> None:
    sources[0][0].write_text("int broken( {\n")
    with pytest.raises(CompileError, match=r"failed: .*error: .*"):
        compile_library(sources[0], sources[1], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(sources, tmp_path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(CompileError, match="cache cannot be written"):
        compile_library(sources[0], sources[1], tmp_path / "cache")


def test_the_chosen_compiler_is_used(sources, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(CompileError, match=r"no C\+\+ compiler found \(tried no-such-compiler -x\)"):
        compile_library(sources[0], sources[1], tmp_path / "cache")


def test_each_architecture_has_its_library(sources, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("QUIRE_CPU_ARCH", "x86-64-v3")
    compile_library(sources[0], sources[1], tmp_path / "cache")
    monkeypatch.setenv("QUIRE_CPU_ARCH", "x86-64")
    compile_library(sources[0], sources[1], tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    monkeypatch.setenv("QUIRE_CPU_ARCH", "pentium-99")
    with pytest.raises(CompileError, match="pentium-99"):
        compile_library(sources[0], sources[1], tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="architectures of x86 CPUs")
@pytest.mark.parametrize("name", ["x86-64", "x86-64-v3", "x86-64-v4"])
def test_kernels_are_right_on_lesser_cpus(name: str) -> None:
    """The sweeps of the kernels again, as SSE2, AVX2 and AVX-512 without bfloat16 compute them."""
    tests = [str(Path(__file__).with_name(f"test_{part}.py")) for part in ("layers", "cpu_attention", "sampling")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", *tests]
    done = subprocess.run(command, env=os.environ | {"QUIRE_CPU_ARCH": name}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


def test_the_cache_follows_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compiler.cache_folder() == Path("/somewhere/quire")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.cache_folder() == Path.home() / ".cache" / "quire"


def test_processes_that_compile_at_once_all_get_a_whole_library(sources, tmp_path) -> None:
    code = (
        "import ctypes, pathlib, sys; from quire.kernels.compiler import compile_library as c;"
        "p = [pathlib.Path(a) for a in sys.argv[1:]];"
        "sys.exit(ctypes.CDLL(str(c([p[0]], [p[1]], p[2]))).quire_answer() != 42)"
    )
    command = [sys.executable, "-c", code, str(sources[0][0]), str(sources[1][0]), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_without_a_compiler_the_reference_computes_after_one_warning(tmp_path) -> None:
    code = (
        "import torch; from quire.kernels.backend import resolve_backend as r;"
        "print([r(torch.device('cpu'), torch.float32) for _ in range(2)])"
    )
    env = os.environ | {"PATH": "", "XDG_CACHE_HOME": str(tmp_path)}
    env.pop("CXX", None)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['reference', 'reference']"
    assert done.stderr.count("CPU kernels are not available") == 1
    assert "no C++ compiler found" in done.stderr


def test_backends_that_cannot_compute_are_refused() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert resolve_backend(cpu, torch.float16) == "reference"
    assert resolve_backend(cpu, torch.bfloat16) == "cpu"
    assert resolve_backend(cuda, torch.float16) == resolve_backend(cuda, torch.float16, "triton") == "triton"
    for device, dtype in ((cpu, torch.float16), (cuda, torch.float32)):
        with pytest.raises(ValueError, match="the backend cpu"):
            resolve_backend(device, dtype, "cpu")
    with pytest.raises(ValueError, match="triton needs a GPU"):
        resolve_backend(cpu, torch.float32, "triton")


def test_threads_are_torchs_own() -> None:
    """One pool: torch's operations start a second thread, our kernels no third."""
    code = (
        "import os, torch; from quire.kernels.linear import linear; torch.set_num_threads(2);"
        "count = lambda: len(os.listdir('/proc/self/task')); first = count();"
        "x = torch.ones(512, 512); torch.exp(x); second = count();"
        "linear(x, x, backend='cpu'); print(second - first, count() - second)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 0"
