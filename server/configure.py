"""From the options of `quire serve` to the settings of engine and HTTP layer."""

import os
from pathlib import Path
from typing import Any, Literal

from ..core.config import EngineConfig, embedded_model, parse_size
from ..core.errors import ConfigError
from ..core.pruning import PruneParams
from .drafting import draft_settings
from .keys import parse_keys
from .serving import ServeOptions, served_name
from .settings import ServerSettings

_NOT_THE_ENGINES = (
    "host",
    "port",
    "seed",
    "served_model_name",
    "api_key",
    "admin_key",
    "isolate_keys",
    "cors_origin",
    "distill_log",
    "distill_log_share",
    "prune_policy",
    "prune_keep",
    "prune_min_keep",
)
"""All other options are fields of `EngineConfig` of the same name, so that one of the engine needs no line here."""


def serve_options(options: dict[str, Any]) -> ServeOptions:
    """Settings from the command's options by name. Raises `ConfigError` for what cannot be."""
    engine = {name: value for name, value in options.items() if name not in _NOT_THE_ENGINES}
    model = engine["model"] or str(embedded_model())
    _check_cache_file(engine["cache_file"])
    http = _http_settings(options, served_name(model))
    settled = {
        "model": model,
        "kv_memory": parse_size(engine["kv_memory"]) if engine["kv_memory"] else None,
        "swap_memory": parse_size(engine["swap_memory"]),
        "prune": http.prune,
    } | draft_settings(engine["draft"], engine["draft_tokens"])
    config = EngineConfig(**engine | settled)
    return ServeOptions(engine=config, http=http, host=options["host"], port=options["port"])


def _http_settings(options: dict[str, Any], model_name: str) -> ServerSettings:
    if options["isolate_keys"] and not options["api_key"]:
        raise ConfigError("--isolate-keys needs at least one --api-key", param="isolate_keys")
    return ServerSettings(
        served_model_names=tuple(options["served_model_name"] or [model_name]),
        api_keys=parse_keys(options["api_key"] or (), options["admin_key"] or ()),
        isolate_keys=options["isolate_keys"],
        cors_origins=tuple(options["cors_origin"] or ()),
        seed=options["seed"],
        prune=_default_pruning(options),
        prune_min_keep=options["prune_min_keep"],
        distill_log=options["distill_log"],
        distill_log_share=options["distill_log_share"],
    )


def _default_pruning(options: dict[str, Any]) -> PruneParams | None:
    """How requests that say nothing are pruned; what `--prune-keep` cannot be is refused without a policy too."""
    when: Literal["always", "pressure"] = "pressure" if options["pressure"] == "prune" else "always"
    prune = PruneParams(policy=options["prune_policy"] or "", keep=options["prune_keep"], when=when)
    return prune if prune.policy else None


def _check_cache_file(name: str | None) -> None:
    """It is written when the server ends: that it cannot be is said before anything is computed."""
    if name is None:
        return
    folder = Path(name).absolute().parent
    if Path(name).is_dir():
        raise ConfigError(f"cannot write to {name}: it is a folder", param="cache_file")
    if not os.access(folder, os.W_OK | os.X_OK):
        reason = "is not writable" if folder.is_dir() else "is no folder"
        raise ConfigError(f"cannot write to {name}: {folder} {reason}", param="cache_file")
