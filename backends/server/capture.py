"""What is recorded of the model calls of third-party agents: one capture for each rollout."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from pydantic_core import to_json

from backends.server.errors import Problem, problem_of
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.schema import Response, ResponseRequest, as_items
from gym_sdk.tokens import CallTokens

__all__ = ["CallRecord", "Capture", "CaptureLimits", "ended_error", "recording"]

_SAMPLING = ("temperature", "top_p", "top_k", "max_output_tokens", "seed")


@dataclass(frozen=True, slots=True)
class CaptureLimits:
    """How much the server keeps.

    Raises:
        ConfigurationError: a limit is not positive.
    """

    ttl_s: float = 3600.0
    """A capture that nobody uses for so long is dropped."""
    max_captures: int = 4096
    """Captures at once; more are refused with 503."""
    max_calls: int = 10_000
    """Model calls of one capture; more are refused with 400."""
    page_bytes: int = 8 * 2**20
    """About how much one page of a capture holds; it has at least one call."""
    abort_s: float = 10.0
    """How long the end of a capture waits for its calls in flight to stop."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"CaptureLimits.{name} must be positive, not {getattr(self, name)}")


class Capture:
    """The model calls of one rollout.

    Finished calls are kept as JSON, in the order in which they finished. Agents send their whole history
    with each call, so a call's record holds only what it adds: `input_base` names an earlier call and how
    many of its input items this input begins with, `prompt_base` an earlier call whose tokens the prompt
    begins with.
    """

    def __init__(self, rollout_id: str, limits: CaptureLimits) -> None:
        self.id = rollout_id
        self.used_at = time.monotonic()
        self.in_flight: dict[int, CallRecord] = {}
        self.ended = False
        self._limits = limits
        self._begun = 0
        self._log: list[bytes] = []
        self._idle = asyncio.Event()
        self._idle.set()
        self._inputs: dict[bytes, tuple[int, int]] = {}
        self._tokens: dict[int, tuple[int, CallTokens]] = {}  # by id(), which holding the tokens keeps unique

    def touch(self) -> None:
        """Note that the capture is in use."""
        self.used_at = time.monotonic()

    def begin_call(self, route: str) -> CallRecord:
        """Begin to record a call.

        Raises:
            PolicyError: the capture has as many calls as it may (400).
        """
        if self._begun >= self._limits.max_calls:
            raise PolicyError(
                f"the capture {self.id!r} has {self._begun} model calls, the most that this server records",
                code="capture_full",
            )
        record = self.in_flight[self._begun] = CallRecord(route, self, self._begun)
        self._begun += 1
        self._idle.clear()
        return record

    def keep(self, record: CallRecord) -> None:
        """Store a finished call; without effect if it is stored already."""
        if self.in_flight.pop(record.number, None) is None:
            return
        self._log.append(to_json(record.fields))
        self.touch()
        if not self.in_flight:
            self._idle.set()

    def page(self, after: int) -> bytes:
        """Return the finished calls from the `after`-th on, as much as a page holds, as JSON."""
        calls: list[bytes] = []
        size = 0
        for call in self._log[after:]:
            if calls and size + len(call) > self._limits.page_bytes:
                break
            calls.append(call)
            size += len(call)
        return self._to_json(after, calls)

    def rest(self, after: int) -> bytes:
        """Return all finished calls from the `after`-th on, as JSON: what is not fetched now is lost."""
        return self._to_json(after, self._log[after:])

    def _to_json(self, after: int, calls: list[bytes]) -> bytes:
        head = {
            "id": self.id,
            "object": "capture",
            "next": after + len(calls),
            "more": after + len(calls) < len(self._log),
            "in_flight": len(self.in_flight),
        }
        return to_json(head)[:-1] + b',"calls":[' + b",".join(calls) + b"]}"

    async def end(self) -> None:
        """Refuse further calls, and abort those in flight; they are recorded as cancelled."""
        self.ended = True
        for record in list(self.in_flight.values()):
            if record.call is not None:
                record.call.cancel()
        try:
            async with asyncio.timeout(self._limits.abort_s):
                await self._idle.wait()
        except TimeoutError:
            for record in list(self.in_flight.values()):
                record.cancelled()

    def shorten_input(self, items: list[dict[str, Any]], number: int) -> tuple[tuple[int, int] | None, int]:
        """Find the earlier input that these items begin with; return (call, items) and how many that are."""
        key = b""
        base: tuple[int, int] | None = None
        for count, item in enumerate(items, 1):
            key = blake2b(key + to_json(item), digest_size=16).digest()
            known = self._inputs.setdefault(key, (number, count))
            if known[0] != number:
                base = known
        return base, base[1] if base else 0

    def shorten_prompt(self, number: int, tokens: CallTokens) -> tuple[int | None, list[int]]:
        """Find the earlier call whose tokens the prompt begins with; return it and the rest of the prompt."""
        parent, rest = tokens.prompt_after(self._tokens)
        self._tokens[id(tokens)] = (number, tokens)
        return (None if parent is None else self._tokens[id(parent)][0]), rest


class CallRecord:
    """What is recorded of one model call. Outside of captures it goes nowhere."""

    def __init__(self, route: str, capture: Capture | None = None, number: int = 0) -> None:
        self.capture = capture
        self.number = number
        self.call: asyncio.Future[Response] | None = None
        self.fields: dict[str, Any] = {"number": number, "route": route, "started_at": time.time()}
        self._started = time.perf_counter()

    def asked(self, request: ResponseRequest) -> None:
        """Note what was asked."""
        if self.capture is None:
            return
        items = [item.without_tokens().to_wire() for item in as_items(request.input)]
        base, shared = self.capture.shorten_input(items, self.number)
        self.fields |= {
            "instructions": request.instructions,
            "previous_response_id": request.previous_response_id,
            "input_base": base,
            "input": items[shared:],
            "sampling": {
                name: value for name in _SAMPLING if (value := getattr(request, name, None)) is not None
            },
        }

    def answered(self, response: Response) -> None:
        """Note the answer, and that the call is over."""
        if self.capture is None:
            return
        self.fields |= {
            "response_id": response.id,
            "output": [item.without_tokens().to_wire() for item in response.output],
            "usage": response.usage.to_wire() if response.usage is not None else None,
            "fork": response.fork,
            "unparsed_calls": response.unparsed_calls,
        }
        tokens = response.tokens
        if tokens is not None:
            base, rest = self.capture.shorten_prompt(self.number, tokens)
            self.fields |= {
                "prompt_base": base,
                "prompt_token_ids": rest,
                "generation_token_ids": tokens.generation_token_ids,
                "generation_log_probs": tokens.generation_log_probs,
                "weight_versions": list(tokens.weight_versions),
            }
        self._over(response.status)

    def went_wrong(self, problem: Problem) -> None:
        """Note that the call was refused (4xx) or failed."""
        error = {**problem.to_wire(), "error": problem.error, "status": problem.status}
        self._over("failed" if problem.status >= 500 else "refused", error)

    def cancelled(self) -> None:
        """Note that the agent went away, or that the capture ended."""
        self._over("cancelled")

    def _over(self, status: str, error: dict[str, Any] | None = None) -> None:
        if self.capture is not None:
            duration_s = time.perf_counter() - self._started
            self.fields |= {"status": status, "duration_s": duration_s, "error": error}
            self.capture.keep(self)


def ended_error() -> PolicyError:
    """Return what a call is told whose capture ended meanwhile."""
    return PolicyError("the capture ended while this call was in flight", status=404, code="capture_ended")


@contextmanager
def recording(capture: Capture | None, route: str) -> Iterator[CallRecord]:
    """Record a call, however it ends; `capture` None records nothing."""
    record = CallRecord(route) if capture is None else capture.begin_call(route)
    try:
        yield record
    except asyncio.CancelledError:
        record.cancelled()
        raise
    except Exception as error:
        if capture is not None and capture.ended:
            record.cancelled()
        else:
            record.went_wrong(problem_of(error))
        raise
