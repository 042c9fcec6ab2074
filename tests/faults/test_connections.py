"""Servers that are not there, hang up, stall, or send what is no answer."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest
from support.collecting import IMPATIENT, PATIENT, QUICK, collected, failed, leaving_nothing
from support.faulty_policy import Asked, Fault, FaultyPolicy, always, every, first, serving
from support.faulty_server import HOLD, RESET, Step, answer, free_port
from support.held import until

from gym_sdk import Deadlines, GymClient, Limits, Retry
from gym_sdk.schema import FailureKind, Stage
from gym_sdk.transport.http import HttpTransport

pytestmark = pytest.mark.asyncio

TRANSPORT, MODEL_CALL = FailureKind.TRANSPORT, Stage.MODEL_CALL


async def test_nobody_listens_for_a_while(tmp_path: Path) -> None:
    policy = FaultyPolicy()
    await policy.start()
    await policy.stop()
    async with leaving_nothing(policy):
        async with GymClient(policy.url, retry=QUICK, breaker=PATIENT) as client:
            run = asyncio.create_task(collected(client, tmp_path / "r.jsonl"))
            await until(lambda: client.health()[0].opened == 1, 30)
            await policy.start()
            collection = await run
    await policy.stop()
    assert not collection.failures


async def test_nobody_ever_listens(tmp_path: Path) -> None:
    with free_port() as port:
        url = f"http://127.0.0.1:{port}/v1"
        async with leaving_nothing():
            async with GymClient(url, retry=QUICK, breaker=IMPATIENT) as client:
                collection = await collected(client, tmp_path / "r.jsonl")
    assert len(failed(collection, TRANSPORT, MODEL_CALL, url, "is the server running?")) == 12
    assert collection.mean_reward is None


async def test_what_failed_is_attempted_again_with_the_same_store(tmp_path: Path) -> None:
    policy = FaultyPolicy()
    await policy.start()
    await policy.stop()
    async with GymClient(policy.url, retry=QUICK, breaker=IMPATIENT) as client:
        assert len((await collected(client, tmp_path / "r.jsonl")).failures) == 12
    await policy.start()
    async with leaving_nothing(policy), GymClient(policy.url) as client:
        assert not (await collected(client, tmp_path / "r.jsonl")).failures
        assert policy.samples == 24
        assert not (await collected(client, tmp_path / "r.jsonl")).failures
    await policy.stop()
    assert policy.samples == 24


async def test_a_name_that_leads_nowhere(tmp_path: Path) -> None:
    async with leaving_nothing():
        async with GymClient("http://policy.invalid:1/v1", retry=QUICK, breaker=IMPATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl")
    assert len(failed(collection, TRANSPORT, MODEL_CALL, "policy.invalid", "is the server running?")) == 12


async def test_a_name_that_leads_nowhere_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The resolver itself is the machine's; what fails is its answer to one name."""
    resolve, asked = socket.getaddrinfo, 0

    def flaky(host: Any, *args: Any, **options: Any) -> Any:
        nonlocal asked
        if host not in ("policy.test", b"policy.test"):
            return resolve(host, *args, **options)
        asked += 1
        if asked <= 5:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve("127.0.0.1", *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", flaky)
    async with serving() as policy, leaving_nothing(policy):
        url = f"http://policy.test:{policy.port}/v1"
        async with GymClient(url, retry=QUICK, breaker=PATIENT) as client:
            assert not (await collected(client, tmp_path / "r.jsonl")).failures
    assert asked > 5


def half(asked: Asked) -> bytes:
    return asked.right[: len(asked.right) - 40]


def chunked(asked: Asked) -> bytes:
    body = asked.right.partition(b"\r\n\r\n")[2]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"%x\r\n%s\r\n" % (len(body) + 7, body)


CUT: dict[str, Any] = {
    "closed before the answer": lambda asked: [],
    "reset before the answer": lambda asked: [RESET],
    "reset within the head": lambda asked: [asked.right[:20], 0.01, RESET],
    "reset within the body": lambda asked: [half(asked), 0.01, RESET],
    "closed within the body": lambda asked: [half(asked)],
    "a length beyond the body": lambda asked: [answer(asked.right.partition(b"\r\n\r\n")[2], length=10_000)],
    "a chunk that is cut": lambda asked: [chunked(asked)],
    "chunks without an end": lambda asked: [chunked(asked) + b"}\r\n"],
    "no size of a chunk": lambda asked: [chunked(asked).replace(b"chunked\r\n\r\n", b"chunked\r\n\r\nx\r\n")],
    "JSON that is cut": lambda asked: answer(half(asked).partition(b"\r\n\r\n")[2]),
    "no JSON": lambda asked: answer(b"<html>starting up</html>"),
    "nothing": lambda asked: answer(b""),
    "no HTTP": lambda asked: [b"\x16\x03\x01\x00\x02 this is no HTTP\r\n\r\n"],
}


@pytest.mark.parametrize("cut", CUT.values(), ids=CUT)
async def test_answers_that_are_cut_off(cut: Any, tmp_path: Path) -> None:
    """One in three calls is hit: it is sampled again, and what was lost is in no rollout."""
    async with serving(every(3, cut)) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=Retry(10, 0.01, 0.05), breaker=PATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl")
    assert not collection.failures
    assert policy.samples > 24
    assert sum(call.retries for r in collection.rollouts for call in r.model_calls) <= policy.samples - 24


FOR_EVER = {
    "closed before the answer": "closed the connection without an answer",
    "reset within the body": "closed the connection in the middle of its answer",
    "a length beyond the body": "closed the connection in the middle of its answer",
    "a chunk that is cut": "closed the connection in the middle of its answer",
    "JSON that is cut": "answered with no Response",
    "no JSON": "answered with no Response",
    "no HTTP": "answered with something that is no HTTP",
}


@pytest.mark.parametrize("name", FOR_EVER)
async def test_answers_that_are_always_cut_off(name: str, tmp_path: Path) -> None:
    async with serving(always(CUT[name])) as policy, leaving_nothing(policy):
        # its probe succeeds, so the calls themselves have to find out that it is of no use
        async with GymClient(policy.url, retry=QUICK, breaker=IMPATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl", count=3)
    assert len(failed(collection, TRANSPORT, MODEL_CALL, policy.url, FOR_EVER[name])) == 6


def stalled(asked: Asked) -> list[Step]:
    return [half(asked), HOLD]


async def test_a_body_that_stalls(tmp_path: Path) -> None:
    async with serving(first(2, stalled)) as policy, leaving_nothing(policy):
        transport = HttpTransport(policy.url, body_stall_s=0.1)
        async with GymClient.over(transport, retry=QUICK, breaker=PATIENT) as client:
            assert not (await collected(client, tmp_path / "r.jsonl")).failures
        policy.fault = always(stalled)
        transport = HttpTransport(policy.url, body_stall_s=0.05)
        async with GymClient.over(transport, retry=QUICK, breaker=IMPATIENT) as client:
            collection = await collected(client, tmp_path / "s.jsonl", count=2)
    assert len(failed(collection, TRANSPORT, MODEL_CALL, policy.url, "stopped in the middle", "0.05 s")) == 4


async def test_no_answer_at_all(tmp_path: Path) -> None:
    """A silent server may be one that generates: only the deadline of the model call ends the wait."""
    hold: list[Step] = [HOLD]
    async with serving(first(3, hold)) as policy, leaving_nothing(policy):
        deadlines = Deadlines(model_call_s=0.3)
        async with GymClient(policy.url, retry=QUICK, breaker=PATIENT) as client:
            assert not (await collected(client, tmp_path / "r.jsonl", deadlines=deadlines)).failures
        assert policy.aborted == 3
        policy.fault = always(hold)
        deadlines = Deadlines(model_call_s=0.05)
        async with GymClient(policy.url, retry=Retry(2, 0.01, 0.02), breaker=IMPATIENT) as client:
            collection = await collected(client, tmp_path / "s.jsonl", count=2, deadlines=deadlines)
    for rollout in failed(collection, FailureKind.DEADLINE, MODEL_CALL, policy.url, "0.05 s"):
        assert rollout.failure is not None
        assert rollout.failure.error == "DeadlineError"


async def test_one_bad_rollout_among_many_costs_only_itself(tmp_path: Path) -> None:
    def refuse(asked: Asked) -> Fault:
        error = {"error": {"message": "the number 3 is not served", "code": "bad", "param": "input"}}
        return answer(error, status="400 Bad Request") if asked.question == 3 else None

    async with serving(refuse) as policy, leaving_nothing(policy):
        async with GymClient(policy.url) as client:
            collection = await collected(
                client, tmp_path / "r.jsonl", count=50, limits=Limits(concurrency=20)
            )
    found = failed(
        collection, FailureKind.REFUSED, MODEL_CALL, policy.url, "400", "the number 3 is not served"
    )
    assert [rollout.task.answer for rollout in found] == [21, 21]
