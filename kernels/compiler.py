"""Compiles the C++ kernels for this machine at first use and keeps the result in the user's cache.

The library's name is a hash of everything that decides its content: sources, flags, compiler and the CPU's features. So
an upgrade or another machine on the same home directory compiles anew, and nothing stale is ever loaded. It is built
under a temporary name and renamed, so processes that start together do not see half of it.
"""

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

log = logging.getLogger("quire")

FLAGS = ("-O3", "-std=c++17", "-fopenmp", "-fPIC", "-w")
_COMPILERS = ("g++", "c++", "clang++")
"""GCC first: its OpenMP library is the one torch ships, so that both share one pool of threads."""
_TIMEOUT = 120.0
"""Seconds for one compiler run."""


class CompileError(Exception):
    """There is no compiler, or it failed; the message says which and why in one line."""


def architecture() -> str:
    """What the compiler builds for: `$QUIRE_CPU_ARCH`, a value of its `-march`; by default this machine.

    `x86-64-v3` gives the kernels of a CPU with AVX2 alone, `x86-64` the portable ones: for tests, and for machines
    whose newest instructions are better left alone.
    """
    return os.environ.get("QUIRE_CPU_ARCH") or "native"


def cache_folder() -> Path:
    """Where compiled kernels are kept: `$XDG_CACHE_HOME/quire`, by default `~/.cache/quire`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "quire"


def compile_library(sources: Sequence[Path], headers: Sequence[Path], folder: Path) -> Path:
    """Path of the shared library made of `sources`, compiled now unless `folder` has it; raises `CompileError`."""
    compiler = [*_find_compiler(), *FLAGS, f"-march={architecture()}"]
    digest = hashlib.sha256()
    for part in (*compiler, _output([*compiler, "--version"]), _cpu_features()):
        digest.update(part.encode())
    for path in (*sources, *headers):
        digest.update(path.read_bytes())
    library = folder / f"kernels-{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    log.info("compiling CPU kernels (once per machine) with %s ...", compiler[0])
    started = time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as build:
            built = _build(compiler, sources, Path(build))
            built.replace(library)
    except OSError as error:
        raise CompileError(f"{folder} cannot be written: {error.strerror}") from error
    log.info("compiled CPU kernels in %.1f s, kept as %s", time.perf_counter() - started, library)
    return library


def _find_compiler() -> list[str]:
    """The command of a C++ compiler: `$CXX`, or the first that is installed."""
    chosen = os.environ.get("CXX", "").split()
    for command in [chosen] if chosen else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise CompileError(f"no C++ compiler found (tried {' '.join(chosen) or ', '.join(_COMPILERS)})")


def _build(compiler: list[str], sources: Sequence[Path], build: Path) -> Path:
    """Compile all sources at once, each in its own process, and link them; `compiler` with its flags."""
    objects = [build / f"{source.stem}.o" for source in sources]
    jobs = [
        subprocess.Popen(
            [*compiler, "-c", str(source), "-o", str(target)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for source, target in zip(sources, objects, strict=True)
    ]
    try:
        errors = [job.communicate(timeout=_TIMEOUT)[1] for job in jobs]
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{compiler[0]} took longer than {_TIMEOUT:.0f} s") from error
    finally:
        for job in jobs:
            job.kill()
    for job, text in zip(jobs, errors, strict=True):
        if job.returncode:
            raise CompileError(f"{compiler[0]} failed: {_first_error(text)}")
    library = build / "kernels.so"
    _output([*compiler, "-shared", *map(str, objects), "-o", str(library)])
    return library


def _output(command: list[str]) -> str:
    """What a command prints; raises `CompileError` if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise CompileError(f"{command[0]} failed: {_first_error(done.stderr)}")
    return done.stdout


def _first_error(text: str) -> str:
    lines = text.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[0] if lines else "no message")


def _cpu_features() -> str:
    """What `-march=native` looks at."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return f"{platform.machine()} {platform.processor()}"
