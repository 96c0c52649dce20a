"""The Dockerfile and the compose file, read as text: what they name exists, and they hold to the rules set for them."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from quire.server.cli import app

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SERVED = ("cpu", "cuda")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _stages() -> dict[str, tuple[str, list[tuple[str, str]]]]:
    """Stage name -> (what it is built from, its instructions as (keyword, rest of the line))."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, tuple[str, list[tuple[str, str]]]] = {}
    body: list[tuple[str, str]] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            body = []
            stages[match[2]] = (match[1], body)
        elif line.strip():
            keyword, _, rest = line.partition(" ")
            body.append((keyword, " ".join(rest.split())))
    return stages


def _image(target: str) -> list[tuple[str, str]]:
    """All instructions that make the image of `target`, those of the stages it stands on first."""
    stages = _stages()
    base, body = stages[target]
    return (_image(base) if base in stages else []) + body


def _last(target: str, keyword: str) -> str:
    return [rest for key, rest in _image(target) if key == keyword][-1]


def _image_environment(target: str) -> dict[str, str]:
    pairs = [pair for key, rest in _image(target) if key == "ENV" for pair in rest.split()]
    return dict(pair.split("=", 1) for pair in pairs)


def _server_variables() -> set[str]:
    command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    return {parameter.envvar for parameter in command.params if parameter.envvar}


@pytest.mark.parametrize("target", SERVED)
def test_image_serves_as_an_ordinary_user_on_the_port_it_exposes(target: str) -> None:
    user = _last(target, "USER")
    assert user != "root"
    assert any(key == "RUN" and re.search(rf"useradd --uid \d+ .*\b{user}\b", rest) for key, rest in _image(target))
    environment = _image_environment(target)
    assert environment["QUIRE_HOST"] == "0.0.0.0"
    assert environment["QUIRE_PORT"] == _last(target, "EXPOSE")
    assert json.loads(_last(target, "ENTRYPOINT"))[-1] in PROJECT["project"]["scripts"]
    assert json.loads(_last(target, "CMD")) == ["serve"]


@pytest.mark.parametrize("target", SERVED)
def test_caches_lie_on_the_volume(target: str) -> None:
    volume = _last(target, "VOLUME")
    environment = _image_environment(target)
    for name in ("HF_HOME", "XDG_CACHE_HOME", "TRITON_CACHE_DIR"):
        assert environment[name] == volume or environment[name].startswith(volume + "/"), name


@pytest.mark.parametrize("target", SERVED)
def test_healthcheck_runs_a_script_that_is_copied_in(target: str) -> None:
    match = re.fullmatch(r"(--\S+ )*--start-period=\S+ (--\S+ )*CMD (\[.*\])", _last(target, "HEALTHCHECK"))
    assert match
    script = json.loads(match[3])[-1]
    sources = [rest.split()[0] for key, rest in _image(target) if key == "COPY" and rest.split()[-1] == script]
    assert len(sources) == 1
    assert (ROOT / sources[0]).is_file()
    assert f"!{sources[0]}" in (ROOT / ".dockerignore").read_text().splitlines()


@pytest.mark.parametrize("target", SERVED)
def test_torch_is_the_tested_one(target: str) -> None:
    _, body = _stages()[f"environment-{target}"]
    pinned = dict(rest.split("=", 1) for key, rest in body if key == "ARG")["TORCH_VERSION"]
    torch = next(r for r in map(Requirement, PROJECT["project"]["dependencies"]) if r.name == "torch")
    assert Version(pinned) in torch.specifier
    assert f"torch=={pinned}" in (ROOT / "Makefile").read_text()


def test_build_context_holds_the_wheels_sources_and_little_else() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    folders = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    files = {"pyproject.toml", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]}
    assert allowed == {folder.split("/")[0] for folder in folders} | files | {"deploy/healthcheck.py"}
    assert all((ROOT / path).exists() for path in allowed)


def test_environment_names_are_the_servers() -> None:
    known = _server_variables()
    named = {name for target in SERVED for name in _image_environment(target)}
    for service in _compose()["services"].values():
        named |= set(service.get("environment", ()))
    used = {name for name in named if name.startswith("QUIRE_")}
    assert used <= known
    handed_through = set(_compose()["services"]["quire-cpu"]["environment"])
    assert known - handed_through == {"QUIRE_HOST", "QUIRE_PORT", "QUIRE_DEVICE"}, "the image settles these"


def _compose() -> dict[str, Any]:
    """The compose file with each variable at its default."""
    text = _VARIABLE.sub(lambda match: match[2] or "", (DEPLOY / "compose.yaml").read_text())
    return yaml.safe_load(text)


def test_compose_runs_the_same_service_on_either_device() -> None:
    services = _compose()["services"]
    for target in SERVED:
        service = services[f"quire-{target}"]
        assert service["profiles"] == [target]
        assert service["build"]["target"] == target
        assert target in _stages()
        assert (DEPLOY / service["build"]["context"]).resolve() == ROOT
        assert service["ports"] == [f"127.0.0.1:8000:{_last(target, 'EXPOSE')}"]
    device = services["quire-cuda"]["deploy"]["resources"]["reservations"]["devices"][0]
    assert device["capabilities"] == ["gpu"]


def test_compose_publishes_on_this_machine_only_and_comes_back_after_a_crash() -> None:
    for name, service in _compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert service["restart"] == "unless-stopped", name


def test_compose_mounts_exist() -> None:
    compose = _compose()
    mounted = 0
    for service in compose["services"].values():
        for volume in service["volumes"]:
            source, target, *options = volume.split(":")
            assert target.startswith("/")
            if source.startswith("."):
                mounted += 1
                assert (DEPLOY / source).exists(), source
                assert options == ["ro"], source
            else:
                assert source in compose["volumes"], source
    assert mounted >= 5


def test_cache_volume_is_the_images() -> None:
    for target in SERVED:
        targets = [volume.split(":")[1] for volume in _compose()["services"][f"quire-{target}"]["volumes"]]
        assert _last(target, "VOLUME") in targets


def test_settings_file_sets_what_compose_reads() -> None:
    read = set(_VARIABLE.findall((DEPLOY / "compose.yaml").read_text()))
    names = {name for name, _ in read} | set(_compose()["services"]["quire-cpu"]["environment"]) | {"COMPOSE_PROFILES"}
    settings = re.findall(r"^#?([A-Z_]+)=(.*)$", (DEPLOY / ".env").read_text(), re.MULTILINE)
    assert ("COMPOSE_PROFILES", "cpu") in settings
    assert {name for name, _ in settings} <= names
