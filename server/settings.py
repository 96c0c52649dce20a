"""What the HTTP layer is built from: the operator's settings and the objects every route works with."""

from dataclasses import dataclass
from pathlib import Path

from ..core.errors import ConfigError, ModelNotFoundError
from ..core.pruning import PruneParams
from ..core.request import SeedSource
from ..scheduler.client import EngineClient
from .keys import ApiKey
from .metrics import Metrics
from .text import Tokenizer
from .traffic_log import TrafficLog


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The operator's settings of the HTTP layer."""

    served_model_names: tuple[str, ...]
    """Names under which requests may ask for the model; the first one labels metrics."""
    api_keys: tuple[ApiKey, ...] = ()
    """Any of them opens all routes, but admin routes only an admin key where there is one. /health and /ready are open,
    and where no key is an ordinary one, all routes are that are not admin routes."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins may call the API from a browser; `*`: those of all."""
    isolate_keys: bool = False
    """Requests reuse only those prefixes that came with a key of the same tenant."""
    max_body_bytes: int = 8 * 2**20
    """Largest request body."""
    seed: int | None = None
    """Makes the seeds repeatable that requests without one are given; None: different in every run."""
    metrics_prefix: str = "vllm:"
    """Of the metrics that vLLM has too, so that its dashboards work."""
    prune: PruneParams | None = None
    """How the sequences of requests that do not say so themselves are pruned; None: not at all."""
    prune_min_keep: float = 0.0
    """Least share of its entries that a request must keep."""
    distill_log: Path | None = None
    """File that collects prompts and outputs to distil a draft from; None: nothing is kept."""
    distill_log_share: float = 1.0
    """Share of the requests of which it also gets what the model said at each token."""

    def __post_init__(self) -> None:
        if not all(self.served_model_names):
            raise ConfigError("a served model name is empty", param="served_model_name")
        if len(set(self.served_model_names)) < len(self.served_model_names):
            raise ConfigError("a served model name is given twice", param="served_model_name")
        if not 0 <= self.prune_min_keep <= 1:
            raise ConfigError(f"prune_min_keep must be from 0 to 1, got {self.prune_min_keep}", param="prune_min_keep")
        if self.prune is not None and self.prune.least_share < self.prune_min_keep:
            raise ConfigError(
                f"requests that do not say how they are pruned would keep {self.prune.least_share:g} of their entries, "
                f"but prune_min_keep is {self.prune_min_keep:g}",
                param="prune_keep",
            )
        if not 0 <= self.distill_log_share <= 1:
            raise ConfigError(
                f"distill_log_share must be from 0 to 1, got {self.distill_log_share}", param="distill_log_share"
            )


@dataclass(slots=True)
class Service:
    """What the routes share; one per application, kept as `app.state.service`."""

    client: EngineClient
    tokenizer: Tokenizer
    settings: ServerSettings
    metrics: Metrics
    created: int
    """When the server started; Unix time in seconds."""
    seeds: SeedSource
    """Gives the seeds of requests that bring none."""
    draining: bool = False
    """Set when the server is about to stop: /ready turns 503 and new work is refused while open requests end."""
    open_requests: int = 0
    """HTTP requests being worked on."""
    traffic_log: TrafficLog | None = None

    @property
    def max_model_len(self) -> int | None:
        """Tokens, prompt and output together; None until the engine was ready once."""
        return self.client.info.max_model_len if self.client.info else None

    @property
    def max_stream_len(self) -> int:
        """See `EngineInfo.max_stream_len`."""
        return self.client.info.max_stream_len if self.client.info else 0

    def served_name(self, asked: str | None) -> str:
        """The name to answer with. Raises `ModelNotFoundError` for a model that is not served here."""
        names = self.settings.served_model_names
        if asked is None:
            return names[0]
        if asked not in names:
            raise ModelNotFoundError(
                f"the model {asked[:100]!r} is not served here; served: {', '.join(names)}", param="model"
            )
        return asked
