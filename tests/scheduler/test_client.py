"""What the server's side does when engine after engine dies."""

import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from typing import Any, ClassVar

import msgspec
import pytest

from quire.core.config import EngineConfig
from quire.core.errors import ConfigError, ConflictError, EngineUnavailableError, InvalidRequestError, describe
from quire.core.ids import RequestId
from quire.core.messages import (
    ClientMessage,
    DraftRefused,
    DraftReplaced,
    EngineMessage,
    EngineStats,
    Ready,
    ReplaceDraft,
    StepReport,
    Submit,
)
from quire.core.request import Request, SamplingParams, SeedSource
from quire.core.speculation import DraftInfo
from quire.scheduler import client as module
from quire.scheduler.engine_process import EngineProcess

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

    async def wait(self, seconds: float) -> bool:
        return True

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


class Unstartable(MortalEngine):
    """The second one finds no room on the machine."""

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        if MortalEngine.started == 2:
            raise ConfigError("the engine process cannot be started: No space left on device")


async def test_a_restart_that_the_machine_refuses_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "quire.client")
    monkeypatch.setattr(module, "EngineProcess", Unstartable)
    monkeypatch.setattr(module, "MAX_BACKOFF_SECONDS", 0)
    monkeypatch.setattr(MortalEngine, "started", 0)
    client = module.ProcessClient(EngineConfig(model="any"))
    await client.ready.wait()
    with pytest.raises(EngineUnavailableError, match="being restarted"):
        await anext(client.generate(Request.create(RequestId("r"), [5], SamplingParams(), SeedSource(1))))
    await asyncio.wait_for(client.ready.wait(), 10)
    assert (client.status, client.restarts, MortalEngine.started) == ("ready", 2, 3)
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "the engine process died (exit code -9); restarting it",
        "the engine process cannot be started",
        "the engine is ready again",
    ]
    await client.shutdown()


async def test_a_machine_without_room_for_the_process_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ConfigError, match=r"cannot be started: .*/no/such/python"):
        EngineProcess(EngineConfig(model="any"))


class DraftingEngine:
    """Is asked for drafts, and answers when the test says what."""

    configs: ClassVar[list[EngineConfig]] = []

    def __init__(self, config: EngineConfig) -> None:
        self.configs.append(config)
        self.exit_code: int | None = None
        self.sent: list[ClientMessage] = []
        info = msgspec.structs.replace(engine_info(), draft=DraftInfo(method="model", name=config.draft, most=4))
        self.says: asyncio.Queue[EngineMessage] = asyncio.Queue()
        self.says.put_nowait(Ready(info))

    def send(self, message: ClientMessage) -> None:
        self.sent.append(message)

    async def receive(self) -> EngineMessage:
        return await self.says.get()

    async def wait(self, seconds: float) -> bool:
        return True

    def close(self) -> None: ...


@pytest.fixture
async def client(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[module.ProcessClient]:
    monkeypatch.setattr(module, "EngineProcess", DraftingEngine)
    monkeypatch.setattr(module, "MAX_BACKOFF_SECONDS", 0)
    monkeypatch.setattr(DraftingEngine, "configs", [])
    made = module.ProcessClient(EngineConfig(model="any", draft="/old"))
    await made.ready.wait()
    yield made
    await made.shutdown()


def engine_of(client: module.ProcessClient) -> DraftingEngine:
    engine: Any = client._engine
    assert isinstance(engine, DraftingEngine)
    return engine


def draft_of(client: module.ProcessClient) -> str:
    assert client.info is not None and client.info.draft is not None
    return client.info.draft.name


async def test_drafts_are_replaced_one_at_a_time(client: module.ProcessClient) -> None:
    first = asyncio.create_task(client.replace_draft("/new"))
    await asyncio.sleep(0)
    with pytest.raises(ConflictError, match="on its way"):
        await client.replace_draft("/newer")
    assert engine_of(client).sent == [ReplaceDraft("/new")]
    new = DraftInfo(method="model", name="/new", most=4)
    engine_of(client).says.put_nowait(DraftReplaced(new))
    assert await first == new and draft_of(client) == "/new"
    second = asyncio.create_task(client.replace_draft("/bad"))
    await asyncio.sleep(0)
    engine_of(client).says.put_nowait(DraftRefused(describe(InvalidRequestError("bad", param="draft"))))
    with pytest.raises(InvalidRequestError, match="bad"):
        await second
    assert draft_of(client) == "/new"


async def test_who_asked_may_go_and_the_draft_comes_all_the_same(client: module.ProcessClient) -> None:
    asking = asyncio.create_task(client.replace_draft("/new"))
    await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    with pytest.raises(ConflictError):
        await client.replace_draft("/newer")
    engine_of(client).says.put_nowait(DraftReplaced(DraftInfo(method="model", name="/new", most=4)))
    while draft_of(client) != "/new":
        await asyncio.sleep(0)


async def test_an_engine_started_again_has_the_last_draft_that_was_in_use(client: module.ProcessClient) -> None:
    asking = asyncio.create_task(client.replace_draft("/new"))
    await asyncio.sleep(0)
    engine_of(client).says.put_nowait(DraftReplaced(DraftInfo(method="model", name="/new", most=4)))
    await asking
    asking = asyncio.create_task(client.replace_draft("/newer"))
    await asyncio.sleep(0)
    engine_of(client).exit_code = -9
    with pytest.raises(EngineUnavailableError, match="died"):
        await asking
    await client.ready.wait()
    assert [config.draft for config in DraftingEngine.configs] == ["/old", "/new"] and draft_of(client) == "/new"
