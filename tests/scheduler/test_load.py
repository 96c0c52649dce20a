"""What keeps the engine from loading is told in the project's own errors, whoever raised it."""

from typing import Any

import pytest

from quire.core.config import EngineConfig
from quire.core.errors import ConfigError, ModelLoadError, QuireError
from quire.engine.engine import Engine
from quire.scheduler.process import load_loop


@pytest.mark.parametrize(
    ("raised", "kind", "said"),
    [
        (
            PermissionError(13, "Permission denied", "/model/weights"),
            ModelLoadError,
            "/model/weights cannot be read: Pe",
        ),
        (OSError("stale"), ModelLoadError, "/model cannot be read: stale"),
        (MemoryError("an array of 48 GiB"), ConfigError, "more memory than there is: an array of 48 GiB"),
    ],
)
def test_what_the_machine_refuses(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, kind: type[QuireError], said: str
) -> None:
    def load(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(Engine, "load", load)
    with pytest.raises(kind, match=said):
        load_loop(EngineConfig(model="/model"), lambda *_: None)
