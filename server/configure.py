"""From the options of `quire serve` to the settings of engine and HTTP layer."""

from typing import Any, Literal

from ..core.config import EngineConfig, embedded_model, parse_size
from ..core.errors import ConfigError
from ..core.pruning import PruneParams
from .drafting import draft_settings
from .keys import parse_keys
from .serving import ServeOptions, served_name
from .settings import ServerSettings


def serve_options(options: dict[str, Any]) -> ServeOptions:
    """Settings from the command's options by name. Raises `ConfigError` for what cannot be.

    What the HTTP layer does not take is a field of `EngineConfig`, so an option of the engine needs no line here.
    """
    engine = dict(options)
    host, port, seed = (engine.pop(name) for name in ("host", "port", "seed"))
    distill_log, share = engine.pop("distill_log"), engine.pop("distill_log_share")
    names, keys, isolate = (engine.pop(name) for name in ("served_model_name", "api_key", "isolate_keys"))
    policy, keep, min_keep = (engine.pop(name) for name in ("prune_policy", "prune_keep", "prune_min_keep"))
    if isolate and not keys:
        raise ConfigError("--isolate-keys needs at least one --api-key", param="isolate_keys")
    when: Literal["always", "pressure"] = "pressure" if engine["pressure"] == "prune" else "always"
    prune = PruneParams(policy=policy, keep=keep, when=when) if policy else None
    model = engine["model"] or str(embedded_model())
    memory = parse_size(engine["kv_memory"]) if engine["kv_memory"] else None
    http = ServerSettings(
        served_model_names=tuple(names or [served_name(model)]),
        api_keys=parse_keys(keys or ()),
        isolate_keys=isolate,
        seed=seed,
        prune=prune,
        prune_min_keep=min_keep,
        distill_log=distill_log,
        distill_log_share=share,
    )
    settled = {
        "model": model,
        "kv_memory": memory,
        "swap_memory": parse_size(engine["swap_memory"]),
        "prune": prune,
    } | draft_settings(engine["draft"], engine["draft_tokens"])
    config = EngineConfig(**engine | settled)
    return ServeOptions(engine=config, http=http, host=host, port=port)
