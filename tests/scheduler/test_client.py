"""What the server's side does when engine after engine dies."""

import asyncio

import pytest

from quire.core.config import EngineConfig
from quire.core.errors import EngineUnavailableError
from quire.core.ids import RequestId
from quire.core.messages import ClientMessage, EngineMessage, EngineStats, Ready, StepReport, Submit
from quire.core.request import Request, SamplingParams, SeedSource
from quire.scheduler import client as module

from ..server.fake_client import engine_info


class MortalEngine:
    """Is ready at once; the first request kills it."""

    started = 0

    def __init__(self, config: EngineConfig) -> None:
        MortalEngine.started += 1
        self.exit_code: int | None = None
        self._messages: list[EngineMessage] = [Ready(engine_info()), StepReport([], EngineStats(running=3))]

    def send(self, message: ClientMessage) -> None:
        self.exit_code = -9 if isinstance(message, Submit) else 0

    async def receive(self) -> EngineMessage:
        if not self._messages:
            await asyncio.Event().wait()
        return self._messages.pop(0)

    def close(self) -> None: ...


async def test_an_engine_that_dies_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EngineProcess", MortalEngine)
    monkeypatch.setattr(module, "MAX_BACKOFF_SECONDS", 0)
    monkeypatch.setattr(module, "MAX_DEATHS", 3)
    client = module.ProcessClient(EngineConfig(model="any"))
    running: list[int] = []
    client.add_stats_listener(lambda stats: running.append(stats.running))
    request = Request.create(RequestId("r"), [5], SamplingParams(max_tokens=1), SeedSource(1))
    for end in ("being restarted", "being restarted", "3 times in a row: not started again"):
        await client.ready.wait()
        with pytest.raises(EngineUnavailableError, match=end):
            await anext(client.generate(request))
    assert running == [3, 0, 3, 0, 3, 0]  # a dead engine runs nothing
    assert "3 times" in (await client.failed).message
    assert (client.status, client.restarts, MortalEngine.started) == ("stopped", 2, 3)
    with pytest.raises(EngineUnavailableError, match="the engine is stopped"):
        await anext(client.generate(request))
    await client.shutdown()
