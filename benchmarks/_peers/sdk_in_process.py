"""This project's engine alone: a transport that answers in the same process, without HTTP."""

from __future__ import annotations

import asyncio
import cProfile
from typing import Any

from _answers import ANSWERS
from measure import QUESTION, Cost, Order, check, serve
from profiling import shares
from sdk import add, correct, limits

from gym_sdk import GymClient, Task
from gym_sdk.schema import Response, ResponseRequest


class InProcess:
    """Answers as the scripted server does, at once.

    Args:
        call: the answer to a request that begins.
        text: the answer to one that continues.
        json: whether to write the request and read the response, as HTTP needs it.
    """

    def __init__(self, call: bytes, text: bytes, *, json: bool) -> None:
        self._bodies = {False: call, True: text}
        self._responses = {key: Response.model_validate_json(body) for key, body in self._bodies.items()}
        self._json = json

    async def open(self) -> None:
        """There is nothing to open."""

    async def aclose(self) -> None:
        """There is nothing to close."""

    async def respond(self, request: ResponseRequest, **_: Any) -> Response:
        """Answer, after others had their turn: a model call always suspends."""
        continues = request.previous_response_id is not None
        if not self._json:
            await asyncio.sleep(0)
            return self._responses[continues]
        request.to_wire_json()
        await asyncio.sleep(0)
        return Response.model_validate_json(self._bodies[continues])


def scripted(*, json: bool) -> InProcess:
    """Return the transport with the scripted server's words."""
    compact = ANSWERS[b"/v1/responses", True]
    call = compact.data(1, b"")
    text = compact.data(2, b'"function_call_output" "previous_response_id":"resp_%016x"' % 1)
    bodies = (data.split(b"\r\n\r\n", 1)[1] for data in (call, text))
    return InProcess(*bodies, json=json)


async def attempt_all(order: Order, cost: Cost) -> None:
    tasks = (Task(QUESTION, answer="5") for _ in range(order.rollouts))
    scores: list[Any] = []
    profile = cProfile.Profile() if order.profile else None
    async with GymClient.over(scripted(json=order.json), model="policy") as client:  # type: ignore[arg-type]
        if profile is not None:
            profile.enable()
        with cost:
            async with client.rollouts(tasks, tools=[add], verifier=correct, limits=limits(order)) as stream:
                async for group in stream:
                    scores += group.rewards
        if profile is not None:
            profile.disable()
            cost.more.update(shares(profile))
    check(scores, order.rollouts)


if __name__ == "__main__":
    serve(attempt_all)
