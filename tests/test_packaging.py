"""Guards of the layout: what is installed, what may import what, and that nobody else's `kernels` is shadowed."""

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFIG = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
PACKAGES = {name.removeprefix("quire."): ROOT / CONFIG["package-dir"][name] for name in CONFIG["packages"]}

MAY_IMPORT: dict[str, set[str]] = {
    "core": set(),
    "kernels": set(),
    "models": {"kernels", "core"},
    "pruning": {"kernels", "core"},
    "speculation": {"models", "kernels", "core"},
    "engine": {"pruning", "speculation", "models", "kernels", "core"},
    "scheduler": {"engine", "core"},
    "server": {"distill", "evaluation", "scheduler", "core"},
    "distill": {"engine", "speculation", "pruning", "models", "kernels", "core"},
    "evaluation": {"distill", "core"},
}
"""Package -> packages below it: imports only point down."""

TORCH_FREE = ["core", "scheduler", "server", "evaluation"]
"""Packages without a torch import of their own: decisions are over ids and counts, server and evaluation over text."""


def _sources() -> Iterator[tuple[str, Path, ast.Module]]:
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            yield package, path, ast.parse(path.read_text())


def _quire_imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(package, module) of each import of a sibling package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 2 and node.module:
            package, _, module = node.module.partition(".")
            yield package, module
        elif isinstance(node, ast.ImportFrom) and node.level == 2:
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("quire"):
            yield "absolute", node.module or ""
        elif isinstance(node, ast.Import):
            yield from (("absolute", alias.name) for alias in node.names if alias.name.startswith("quire"))


def test_imports_point_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}.{module}"
        for package, path, tree in _sources()
        for target, module in _quire_imports(tree)
        if target != package and target not in MAY_IMPORT[package]
    ]
    assert wrong == []


def test_server_reaches_the_scheduler_through_its_client_only() -> None:
    modules = {
        (path.name, module)
        for package, path, tree in _sources()
        if package == "server"
        for target, module in _quire_imports(tree)
        if target == "scheduler"
    }
    assert {module for _, module in modules} == {"client"}


def test_only_the_loading_of_the_engine_process_imports_the_engine() -> None:
    files = {
        path.name
        for package, path, tree in _sources()
        if package == "scheduler"
        for target, _ in _quire_imports(tree)
        if target == "engine"
    }
    assert files == {"process.py"}


def test_decision_and_text_packages_import_no_torch() -> None:
    wrong = []
    for package, path, tree in _sources():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            if package in TORCH_FREE and any(name.split(".")[0] == "torch" for name in names):
                wrong.append(str(path.relative_to(ROOT)))
    assert wrong == []


def test_no_init_files() -> None:
    folders = [*PACKAGES.values(), ROOT / "tests" / "kernels"]
    assert [str(path) for folder in folders for path in folder.rglob("__init__.py")] == []


def test_every_folder_with_code_is_packaged() -> None:
    """A folder that is not listed works in editable mode and is missing from the wheel."""
    listed = set(PACKAGES.values())
    tops = {folder for folder in (ROOT / name for name in MAY_IMPORT) if folder.is_dir()}
    subfolders = {path.parent for folder in listed for path in folder.rglob("*.py")}
    assert tops == listed
    assert subfolders == listed
    assert {path.name for path in (ROOT / "typings" / "quire").iterdir()} == set(PACKAGES)


@pytest.mark.parametrize("where", [ROOT, ROOT.parent])
def test_bare_kernels_is_not_ours(where: Path) -> None:
    """A bare `kernels` package belongs to Hugging Face: a regular package must win over our folder of that name."""
    code = "import kernels; print(kernels.__file__)"
    env = os.environ | {"PYTHONPATH": str(ROOT / "tests" / "data")}
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=where, env=env, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str(ROOT / "tests" / "data" / "kernels" / "__init__.py")


def test_server_process_stays_without_torch() -> None:
    """With a tokenizer.json the server needs no torch: it would cost 150 MB and two seconds."""
    code = (
        "import sys; from quire.core.config import embedded_model; import quire.server.serving;"
        "from quire.server.text import Tokenizer; t = Tokenizer.load(str(embedded_model()));"
        "assert t.encode('def f():'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
