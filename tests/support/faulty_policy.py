"""A policy behind real sockets that does to each request what a test says, and counts what it sees.

It answers `question 7` in two turns: it calls `look(7)`, and once it is told the output, it says `answer
OUTPUT`. Each generation is one token that no other generation has, so that a rollout's row of tokens tells
which answers it is made of: `[1, 7, first, 2, second]`.

`policy_process` runs it in a process of its own, which can be killed.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import from_json

from support.faulty_server import HOLD, RESET, Step, answer

PROMPT, TAIL = 1, 2
"""The first token of a prompt; the one that stands for a tool's output."""

Fault = Sequence[Step] | bytes | None
"""Steps, after which the connection is closed; or bytes instead of the answer; or nothing."""


@dataclass
class Asked:
    """A model call that was asked for."""

    number: int
    """How many came before, since the policy was made."""
    headers: dict[str, str]
    body: dict[str, Any]
    question: int
    turn: int
    right: bytes
    """The answer that it deserves, as HTTP."""

    @property
    def rollout_id(self) -> str:
        """Which rollout asks: the client's keys are `ID-TURN`, or `ID-TURN-whole`."""
        return self.headers["idempotency-key"].split("-", 1)[0]

    @property
    def is_whole(self) -> bool:
        return "previous_response_id" not in self.body


Script = Callable[[Asked], "Fault | Awaitable[Fault]"]


def behaves(asked: Asked) -> Fault:
    """Do what is right."""
    return None


@dataclass
class FaultyPolicy:
    """Answers model calls, each as `fault` says. Everything may be changed at any time."""

    fault: Script = behaves
    latency_s: float = 0.0
    """Of an answer, on the average."""
    begun: int = 0
    version: str = "0"
    is_well: bool = True
    """What the probe is told."""
    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    samples: int = 0
    open: int = 0
    """Connections."""
    in_flight: int = 0
    """Model calls that are being answered."""
    most_in_flight: int = 0
    aborted: int = 0
    """Model calls whose connection was closed before their answer."""
    probes: int = 0
    errors: list[Exception] = field(default_factory=list)
    """What the script raised."""
    memory: dict[str, tuple[int, int, list[int]]] = field(default_factory=dict)
    """Question, turn and tokens by response id."""
    listener: asyncio.Server | None = None
    connections: set[Connection] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def start(self) -> None:
        """Listen: at the port it had before, if there was one."""
        loop = asyncio.get_running_loop()
        self.listener = await loop.create_server(
            lambda: Connection(self), "127.0.0.1", self.port, backlog=4096, reuse_address=True
        )
        self.port = self.listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening, and reset every connection."""
        if self.listener is not None:
            self.listener.close()
            self.listener = None
        for connection in list(self.connections):
            connection.reset()
        while self.connections:
            await asyncio.sleep(0.001)

    def answer_to(self, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, int, bytes]:
        """Return question, turn and the answer, as HTTP."""
        previous = body.get("previous_response_id")
        if previous is not None and previous not in self.memory:
            error = {
                "message": f"Previous response with id '{previous}' not found.",
                "code": "previous_response_not_found",
            }
            return -1, -1, answer({"error": error}, status="400 Bad Request")
        items = (
            [item for item in body["input"] if isinstance(item, dict)]
            if not isinstance(body["input"], str)
            else []
        )
        outputs = [item["output"] for item in items if item.get("type") == "function_call_output"]
        if previous is not None:
            question, turn, known = self.memory[previous]
            turn, prompt, new = turn + 1, [*known, TAIL], [TAIL]
        else:
            question, turn = _question(body["input"], items), len(outputs)
            sampled = [item for item in items if item.get("generation_token_ids")]
            if sampled:
                prompt = sampled[-1]["prompt_token_ids"] + sampled[-1]["generation_token_ids"] + [TAIL]
            else:
                prompt = [PROMPT, question]
            new = prompt
        self.samples += 1
        sample = 1000 + self.samples
        response_id = f"resp_{self.port}_{sample}"
        self.memory[response_id] = (question, turn, [*prompt, sample])
        said = _call(question, sample) if turn == 0 else _message(outputs[-1] if outputs else "")
        versions = [{"version": self.version, "start": 0, "end": 1}]
        generated = {
            "generation_token_ids": [sample],
            "generation_log_probs": [-0.5],
            "weight_versions": versions,
        }
        response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": 1.0,
            "model": "policy",
            "status": "completed",
            "previous_response_id": previous,
            "output": [said],
        }
        if headers.get("gym-token-form") == "compact":
            response["token_delta"] = {"extends": previous, "new_prompt_token_ids": new, **generated}
        else:
            said |= {"prompt_token_ids": prompt, **generated}
        echo = {"X-Request-Id": headers["x-request-id"]} if "x-request-id" in headers else {}
        return question, turn, answer(response, headers=echo)


def _question(given: Any, items: list[dict[str, Any]]) -> int:
    text = given if isinstance(given, str) else next(i for i in items if i.get("role") == "user")["content"]
    if not isinstance(text, str):
        text = text[0]["text"]
    return int(text.rpartition(" ")[2])


def _call(question: int, sample: int) -> dict[str, Any]:
    arguments = f'{{"number": {question}}}'
    return {"type": "function_call", "call_id": f"call_{sample}", "name": "look", "arguments": arguments}


def _message(output: str) -> dict[str, Any]:
    content = [{"type": "output_text", "text": f"answer {output[:40]}", "annotations": []}]
    return {"type": "message", "role": "assistant", "status": "completed", "content": content}


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive; one request at a time."""

    def __init__(self, policy: FaultyPolicy) -> None:
        self.policy = policy
        self.buffer = b""
        self.task: asyncio.Task[None] | None = None
        self.transport: asyncio.Transport
        self.lost = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.policy.open += 1
        self.policy.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.policy.open -= 1
        self.policy.connections.discard(self)
        self.lost.set()
        if self.task is not None:
            self.task.cancel()

    def reset(self) -> None:
        opened: Any = self.transport.get_extra_info("socket")
        with suppress(OSError):
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, mark, rest = self.buffer.partition(b"\r\n\r\n")
        if not mark:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        self.handle(first.split(" ")[1], headers, rest[:length])

    def handle(self, path: str, headers: dict[str, str], body: bytes) -> None:
        policy = self.policy
        if path == "/health":
            policy.probes += 1
            status = "200 OK" if policy.is_well else "503 Service Unavailable"
            self.transport.write(answer({}, status=status))
        elif path == "/v1/responses":
            self.task = asyncio.get_running_loop().create_task(self.respond(headers, from_json(body)))
        else:  # new weights
            policy.version = from_json(body)["weight_version"]
            self.transport.write(answer({"success": True}))

    async def respond(self, headers: dict[str, str], body: dict[str, Any]) -> None:
        policy = self.policy
        policy.in_flight += 1
        policy.most_in_flight = max(policy.most_in_flight, policy.in_flight)
        try:
            if policy.latency_s:  # not the same for all, or they would go on in step
                policy.begun += 1
                await asyncio.sleep(policy.latency_s * (policy.begun * 7 % 5 + 1) / 3)
            asked = Asked(len(policy.asked), headers, body, *policy.answer_to(headers, body))
            policy.asked.append(asked)
            fault = policy.fault(asked)
            if inspect.isawaitable(fault):
                fault = await fault
            if fault is None or isinstance(fault, bytes):
                self.transport.write(asked.right if fault is None else fault)
                return
            for step in fault:
                await self.do(step)
            self.transport.close()
        except asyncio.CancelledError:
            policy.aborted += 1
        except Exception as error:
            policy.errors.append(error)
            self.transport.abort()
        finally:
            policy.in_flight -= 1
            self.task = None

    async def do(self, step: Step) -> None:
        if step is RESET:
            self.reset()
        elif step is HOLD:
            await self.lost.wait()
        elif isinstance(step, asyncio.Event):
            await step.wait()
        elif isinstance(step, float | int):
            await asyncio.sleep(step)
        else:
            assert isinstance(step, bytes)
            self.transport.write(step)


@asynccontextmanager
async def serving(fault: Script = behaves, **fields: Any) -> AsyncIterator[FaultyPolicy]:
    """Serve a policy for as long as the context lasts."""
    policy = FaultyPolicy(fault, **fields)
    await policy.start()
    try:
        yield policy
    finally:
        await policy.stop()
    if policy.errors:
        raise policy.errors[0]


def first(count: int, fault: Fault | Callable[[Asked], Fault]) -> Script:
    """Return a script with this fault for the first calls, and none after them."""

    def script(asked: Asked) -> Fault:
        if asked.number >= count:
            return None
        return fault(asked) if callable(fault) else fault

    return script


def every(period: int, fault: Fault | Callable[[Asked], Fault]) -> Script:
    """Return a script with this fault for one call in so many."""

    def script(asked: Asked) -> Fault:
        if asked.number % period:
            return None
        return fault(asked) if callable(fault) else fault

    return script


def always(fault: Fault | Callable[[Asked], Fault]) -> Script:
    """Return a script with this fault for each call."""
    return every(1, fault)


@contextmanager
def policy_process(port: int = 0, *, life: int = 0, latency_s: float = 0.005) -> Iterator[PolicyProcess]:
    """Serve a policy in a process of its own, and kill it in the end.

    Args:
        port: any free one by default.
        life: how many processes there were before: what they sampled has other tokens.
        latency_s: of each answer.
    """
    command = [sys.executable, "-m", "support.faulty_policy", str(port), str(life), str(latency_s)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        try:
            yield PolicyProcess(process, int(process.stdout.readline()))
        finally:
            process.kill()


@dataclass
class PolicyProcess:
    """A policy in a process of its own."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


async def _main(port: int, life: int, latency_s: float) -> None:
    policy = FaultyPolicy(port=port, latency_s=latency_s, samples=1_000_000 * life)
    await policy.start()
    os.write(1, b"%d\n" % policy.port)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
