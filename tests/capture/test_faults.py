"""What goes wrong around a captured agent: an outcome with a reason, never a reward of zero."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import anyio
import pytest
from aiohttp.test_utils import TestServer
from openai import APITimeoutError, BadRequestError
from support.agents import call_text, responses_agent, say_text
from support.capturing import Serve
from support.held import HeldEngine, until
from support.replay import ReplayEngine
from support.scripted import ScriptedTransport, in_turn

from backends.policy import Policy
from backends.rendering import TemplateRenderer
from backends.server import make_app
from backends.server.capture import CaptureLimits
from gym_sdk import Deadlines, GymClient, Outcome, Retry, Rollout, Task
from gym_sdk.environments import Environment
from gym_sdk.errors import ConfigurationError, DeadlineError, PolicyError, TransportError
from gym_sdk.schema import Truncation

pytestmark = pytest.mark.asyncio

TASK = Task("What is 1 + 2?", answer=3)
QUICK = Retry(attempts=2, base_s=0.001, max_s=0.01)


def one(rollout: Rollout) -> float:
    return 1.0


async def captures(url: str) -> int:
    """How many captures the server holds."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{url.removesuffix('/v1')}/health") as answer:
            return int((await answer.json())["captures"])


def client_of(url: str) -> GymClient:
    return GymClient(url, model="policy", retry=QUICK)


async def test_an_agent_that_raises_gives_a_failed_rollout_with_what_it_did(serve: Serve) -> None:
    url = await serve([call_text("1 + x")])
    async with client_of(url) as client:
        with pytest.raises(ValueError, match="invalid literal"):
            async with client.capture(TASK) as session:
                await responses_agent(session.openai(), "1 + x?", stream=False)
        rollout = session.rollout
        assert rollout is not None
        assert (rollout.outcome, rollout.reward) == (Outcome.FAILED, None)
        assert rollout.failure is not None
        assert (rollout.failure.error, rollout.failure.where) == ("ValueError", "agent")
        assert [item.type for item in rollout.items] == ["message", "function_call"]
        assert len(rollout.sequences()) == 1
    assert await captures(url) == 0


async def test_fail_makes_the_rollout_inside_the_block(serve: Serve) -> None:
    url = await serve([say_text("3")])
    async with client_of(url) as client, client.capture(TASK) as session:
        await responses_agent(session.openai(), "q", stream=False)
        rollout = await session.fail(RuntimeError("no disk"), metrics={"tool_errors": 1})
        assert (rollout.outcome, rollout.reward) == (Outcome.FAILED, None)
        assert rollout.failure is not None
        assert (rollout.failure.message, rollout.failure.where) == ("no disk", "agent")
        assert rollout.metrics == {"turns": 1, "tool_calls": 0, "tool_errors": 1}
        with pytest.raises(ConfigurationError, match="finished already"):
            await session.finish(verifier=one)


async def test_leaving_without_finish_aborts_and_drops(serve: Serve) -> None:
    engine = HeldEngine([])
    url = await serve(engine=engine)
    async with client_of(url) as client:
        async with client.capture(TASK) as session:
            openai = session.openai(max_retries=0)
            call = asyncio.create_task(openai.responses.create(model="policy", input="q"))
            await until(lambda: engine.running == 1)
        assert engine.cancelled == 1
        assert session.rollout is not None
        assert (session.rollout.outcome, session.rollout.reward) == (Outcome.CANCELLED, None)
        with pytest.raises(Exception, match=r"capture ended|Connection"):
            await call
    assert await captures(url) == 0


async def test_cancelling_the_block_ends_the_capture(serve: Serve) -> None:
    engine = HeldEngine([])
    url = await serve(engine=engine)
    async with client_of(url) as client:
        with anyio.move_on_after(0.2) as scope:
            async with client.capture(TASK) as session:
                await responses_agent(session.openai(), "q", stream=True)
        assert scope.cancelled_caught
        assert session.rollout is not None
        assert session.rollout.outcome is Outcome.CANCELLED
        assert engine.running == 0
    assert await captures(url) == 0


async def test_finish_while_a_call_runs_aborts_it(serve: Serve, renderer: TemplateRenderer) -> None:
    class Engine(HeldEngine):
        async def generate(self, request):  # type: ignore[no-untyped-def]
            if not self.prompts:
                return await ReplayEngine.generate(self, request)
            return await super().generate(request)

    engine = Engine([renderer.encode(say_text("3"))])
    async with client_of(await serve(engine=engine)) as client, client.capture(TASK) as session:
        openai = session.openai(max_retries=0)
        await openai.responses.create(model="policy", input="q")
        call = asyncio.create_task(openai.responses.create(model="policy", input="another"))
        await until(lambda: engine.running == 1)
        rollout = await session.finish(verifier=one)
        with pytest.raises(Exception, match="capture ended"):
            await call
    assert (rollout.outcome, rollout.reward) == (Outcome.COMPLETED, 1.0)
    assert [entry.status for entry in session.calls] == ["completed", "cancelled"]
    assert rollout.metrics["cancelled_calls"] == 1
    assert len(rollout.model_calls) == 1


async def test_an_agent_whose_only_call_it_gave_up_has_no_reward(serve: Serve) -> None:
    engine = HeldEngine([])
    async with client_of(await serve(engine=engine)) as client, client.capture(TASK) as session:
        with pytest.raises(APITimeoutError):
            await session.openai(timeout=0.1, max_retries=0).responses.create(model="policy", input="q")
        rollout = await session.finish(verifier=one)
    assert (rollout.outcome, rollout.reward) == (Outcome.FAILED, None)
    assert rollout.failure is not None
    assert "cancelled" in rollout.failure.message


async def test_an_agent_that_never_calls_has_failed(serve: Serve) -> None:
    async with client_of(await serve()) as client, client.capture(TASK) as session:
        rollout = await session.finish(verifier=one)
    assert (rollout.outcome, rollout.reward) == (Outcome.FAILED, None)
    assert rollout.failure is not None
    assert "no model call" in rollout.failure.message
    assert [item.text for item in rollout.items] == ["What is 1 + 2?"]  # type: ignore[union-attr]


async def test_a_verifier_that_raises_or_hangs_fails_the_rollout(serve: Serve) -> None:
    url = await serve([say_text("3")] * 2)

    async def broken(rollout: Rollout) -> float:
        raise KeyError("answer")

    async def hangs(rollout: Rollout) -> float:
        await anyio.sleep_forever()
        return 1.0

    async with client_of(url) as client:
        for verifier, error in ((broken, "VerifierError"), (hangs, "DeadlineError")):
            async with client.capture(TASK, deadlines=Deadlines(verifier_s=0.1)) as session:
                await responses_agent(session.openai(), "q", stream=False)
                rollout = await session.finish(environment=Environment(verifier=verifier))
            assert (rollout.outcome, rollout.reward) == (Outcome.FAILED, None)
            assert rollout.failure is not None
            assert (rollout.failure.error, rollout.failure.where) == (error, "verifier")
            assert len(rollout.model_calls) == 1


async def test_the_deadline_ends_the_agent(serve: Serve) -> None:
    engine = HeldEngine([])
    url = await serve(engine=engine)
    async with client_of(url) as client:
        with pytest.raises(DeadlineError, match="captured agent"):
            async with client.capture(TASK, deadline_s=0.2) as session:
                await responses_agent(session.openai(), "q", stream=False)
        assert session.rollout is not None
        assert session.rollout.outcome is Outcome.FAILED
        assert session.rollout.failure is not None
        assert session.rollout.failure.error == "DeadlineError"
        assert engine.running == 0


async def test_a_server_that_is_gone_at_finish_fails_the_rollout(renderer: TemplateRenderer) -> None:
    policy = Policy(ReplayEngine([renderer.encode(say_text("3"))]), renderer)
    server = TestServer(make_app(policy), handler_cancellation=True)
    await server.start_server()
    async with client_of(str(server.make_url("/v1"))) as client, client.capture(TASK) as session:
        await responses_agent(session.openai(), "q", stream=False)
        await server.close()
        rollout = await session.finish(verifier=one)
    assert (rollout.outcome, rollout.reward) == (Outcome.FAILED, None)
    assert rollout.failure is not None
    assert (rollout.failure.error, rollout.failure.where) == ("TransportError", "capture")


async def test_a_capture_that_the_server_dropped_fails_the_rollout(serve: Serve) -> None:
    url = await serve([say_text("3")], captures=CaptureLimits(ttl_s=0.1))
    async with client_of(url) as client, client.capture(TASK) as session:
        await responses_agent(session.openai(), "q", stream=False)
        await asyncio.sleep(0.3)
        rollout = await session.finish(verifier=one)
    assert rollout.outcome is Outcome.FAILED
    assert rollout.failure is not None
    assert "nobody uses it for 0.1 s" in rollout.failure.message


async def test_a_cut_last_call_is_truncated_and_verified(serve: Serve) -> None:
    async with client_of(await serve(["and then"])) as client, client.capture(TASK) as session:
        await session.openai().responses.create(model="policy", input="q", max_output_tokens=2)
        rollout = await session.finish(verifier=one)
    assert (rollout.outcome, rollout.truncation) == (Outcome.TRUNCATED, Truncation.TOKENS)
    assert rollout.reward == 1.0
    assert rollout.model_calls[0].status == "incomplete"


async def test_a_full_context_truncates_after_the_first_call_and_fails_before(serve: Serve) -> None:
    long = "word " * 60_000
    async with client_of(await serve([say_text("3")])) as client:
        for calls, outcome in ((["q", long], Outcome.TRUNCATED), ([long], Outcome.FAILED)):
            async with client.capture(TASK) as session:
                openai = session.openai(max_retries=0)
                for text in calls[:-1]:
                    await openai.responses.create(model="policy", input=text)
                with pytest.raises(BadRequestError, match="context"):
                    await openai.responses.create(model="policy", input=calls[-1])
                rollout = await session.finish(verifier=one)
            assert rollout.outcome is outcome
            assert rollout.reward == (1.0 if outcome is Outcome.TRUNCATED else None)


@pytest.mark.parametrize(
    ("fields", "error", "found"),
    [({"include": ["x"]}, None, "PolicyError"), ({}, RuntimeError("broke"), "TransportError")],
    ids=["refused", "failed"],
)
async def test_a_last_call_without_answer_is_no_reward(
    serve: Serve, fields: dict[str, Any], error: Exception | None, found: str
) -> None:
    url = await serve(engine=HeldEngine([], error=error, after_s=0.01))
    async with client_of(url) as client, client.capture(TASK) as session:
        with pytest.raises(Exception, match=r"include|broke"):
            await session.openai(max_retries=0).responses.create(model="policy", input="q", **fields)  # type: ignore[arg-type]
        rollout = await session.finish(verifier=one)
    assert (rollout.outcome, rollout.reward) == (Outcome.FAILED, None)
    assert rollout.failure is not None
    assert (rollout.failure.error, rollout.failure.where) == (found, "model_call")


async def test_misuse_is_said_at_once(serve: Serve, untrained_policy: Path) -> None:
    url = await serve([say_text("3")])
    client = client_of(url)
    with pytest.raises(ConfigurationError, match="not open"):
        client.capture(TASK)
    async with client:
        session = client.capture("q")
        with pytest.raises(ConfigurationError, match="enter the session"):
            _ = session.base_url
        with pytest.raises(ConfigurationError, match="not both"):
            client.capture(TASK, deadline_s=1, deadlines=Deadlines())
        async with session:
            with pytest.raises(ConfigurationError, match="only once"):
                await session.__aenter__()
            with pytest.raises(ConfigurationError, match="not both"):
                await session.finish(verifier=one, environment=Environment())
        with pytest.raises(ConfigurationError, match="`respond` answers in one piece"):
            await client.respond("q", stream=True)
    async with GymClient.over(ScriptedTransport(in_turn())) as scripted:
        with pytest.raises(ConfigurationError, match="no address"):
            scripted.capture(TASK)


async def test_servers_that_cannot_capture_or_are_not_there() -> None:
    from aiohttp import web

    async with TestServer(web.Application()) as server:
        url = str(server.make_url("/v1"))
        async with client_of(url) as client:
            with pytest.raises(PolicyError, match="does not capture"):
                async with client.capture(TASK):
                    pass
    async with client_of(url) as client:
        with pytest.raises(TransportError, match="no answer"):
            async with client.capture(TASK):
                pass
