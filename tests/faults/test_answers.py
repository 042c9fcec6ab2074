"""Something between client and server that mixes up answers: swapped, repeated, late, or of another turn."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from support.collecting import IMPATIENT, PATIENT, QUICK, collected, failed, leaving_nothing
from support.faulty_policy import Asked, Fault, Script, always, every, serving
from support.faulty_server import Step, answer

from gym_sdk import GymClient, Limits, Retry
from gym_sdk.schema import FailureKind, Stage

pytestmark = pytest.mark.asyncio

MANY = Retry(20, 0.005, 0.02)


def body_of(http: bytes) -> bytes:
    return http.partition(b"\r\n\r\n")[2]


def changed(asked: Asked, **fields: object) -> bytes:
    return answer({**json.loads(body_of(asked.right)), **fields})


class Swapper:
    """Holds an answer back until another one is due, and gives each the other's."""

    def __init__(self, most: int, *, echo: bool) -> None:
        self.swaps = 0
        self._most = most
        self._echo = echo
        self._held: tuple[Asked, asyncio.Future[Asked]] | None = None

    async def __call__(self, asked: Asked) -> Fault:
        if self.swaps >= self._most:
            return None
        if self._held is None:
            future: asyncio.Future[Asked] = asyncio.get_running_loop().create_future()
            self._held = asked, future
            try:
                async with asyncio.timeout(0.2):  # the last one has nobody to swap with
                    other = await future
            except TimeoutError:
                self._held = None
                return None
        else:
            other, future = self._held
            self._held = None
            self.swaps += 1
            if not future.done():
                future.set_result(asked)
        return other.right if self._echo else answer(body_of(other.right))


async def test_answers_that_are_swapped_between_rollouts(tmp_path: Path) -> None:
    """The id of the request is echoed with the answer, so the mix-up is seen whatever the answers are."""
    swapper = Swapper(10, echo=True)
    async with serving(swapper) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=MANY, breaker=PATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl", count=10)
    assert swapper.swaps == 10
    assert not collection.failures


async def test_answers_that_are_always_swapped(tmp_path: Path) -> None:
    async with serving(Swapper(10**9, echo=True)) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=QUICK, breaker=IMPATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl", count=4)
    said = (policy.url, "mixes up answers")
    assert len(collection.failures) >= 6  # the last ones may be alone, with nobody to swap with
    failed(collection, FailureKind.TRANSPORT, Stage.MODEL_CALL, *said)


async def test_answers_of_continued_turns_are_known_by_what_they_continue(tmp_path: Path) -> None:
    """Without echoed ids: a second turn names the response that it continues, which is the rollout's own."""

    swapper = Swapper(8, echo=False)

    async def second_turns(asked: Asked) -> Fault:
        return answer(body_of(asked.right)) if asked.turn == 0 else await swapper(asked)

    async with serving(second_turns) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=MANY, breaker=PATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl", count=10)
    assert swapper.swaps == 8
    assert not collection.failures


def previous_turn_again(*, echo: bool) -> Script:
    """Return a script that answers each second turn with the answer to the first, once."""
    first_answers: dict[str, bytes] = {}
    repeated: set[str] = set()

    def script(asked: Asked) -> Fault:
        if asked.turn == 0:
            first_answers[asked.rollout_id] = asked.right
        elif asked.rollout_id not in repeated:
            repeated.add(asked.rollout_id)
            http = first_answers[asked.rollout_id]
            return http if echo else answer(body_of(http))
        return None

    return script


@pytest.mark.parametrize("echo", [True, False])
async def test_the_answer_to_the_previous_turn_again(echo: bool, tmp_path: Path) -> None:
    async with serving(previous_turn_again(echo=echo)) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=MANY, breaker=PATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl")
    assert not collection.failures
    assert all(len(rollout.model_calls) == 2 for rollout in collection.rollouts)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.01])
async def test_each_answer_is_sent_twice(share: float, tmp_path: Path) -> None:
    """The second copy, or what there is of it, is nobody's: the connection is of no more use."""

    def twice(asked: Asked) -> Fault:
        return asked.right + asked.right[: int(share * len(asked.right))]

    async with serving(twice) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=MANY, breaker=PATIENT) as client:
            # one after the other, so that connections could be used again
            collection = await collected(client, tmp_path / "r.jsonl", limits=Limits(concurrency=1))
    assert not collection.failures
    assert policy.samples == 24


async def test_an_unasked_answer_between_two_requests(tmp_path: Path) -> None:
    """A request whose key was answered already gets that answer a little later, out of order."""

    def late(asked: Asked) -> Fault:
        steps: list[Step] = [asked.right, 0.01, asked.right]
        return steps

    async with serving(every(3, late)) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=MANY, breaker=PATIENT) as client:
            collection = await collected(client, tmp_path / "r.jsonl", limits=Limits(concurrency=2))
    assert not collection.failures


async def test_answers_in_another_order_than_their_requests(tmp_path: Path) -> None:
    async def shuffled(asked: Asked) -> Fault:
        await asyncio.sleep((asked.number * 7 % 5) * 0.01)
        return None

    async with serving(shuffled) as policy, leaving_nothing(policy):
        async with GymClient(policy.url) as client:
            collection = await collected(client, tmp_path / "r.jsonl", count=20)
    assert not collection.failures


WRONG = {
    "failed": {"status": "failed", "error": {"code": "server_error", "message": "out of memory"}},
    "in progress": {"status": "in_progress", "output": []},
    "cancelled": {"status": "cancelled", "output": []},
}


@pytest.mark.parametrize("name", WRONG)
async def test_responses_that_are_not_done(name: str, tmp_path: Path) -> None:
    def script(asked: Asked) -> Fault:
        return changed(asked, **WRONG[name]) if asked.number % 3 == 0 else None

    async with serving(script) as policy, leaving_nothing(policy):
        async with GymClient(policy.url, retry=MANY, breaker=PATIENT) as client:
            assert not (await collected(client, tmp_path / "r.jsonl")).failures
        policy.fault = always(lambda asked: changed(asked, **WRONG[name]))
        async with GymClient(policy.url, retry=QUICK, breaker=IMPATIENT) as client:
            collection = await collected(client, tmp_path / "s.jsonl", count=2)
    assert len(failed(collection, FailureKind.TRANSPORT, Stage.MODEL_CALL, "ended as")) == 4


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"output": "text"}, FailureKind.TRANSPORT),
        ({"output": [{"type": "message"}]}, FailureKind.TRANSPORT),
        ({"token_delta": {"extends": None, "new_prompt_token_ids": [1]}}, FailureKind.TRANSPORT),
        (
            {
                "token_delta": {
                    "extends": None,
                    "new_prompt_token_ids": [1],
                    "generation_token_ids": [1, 2],
                    "generation_log_probs": [0.0],
                }
            },
            FailureKind.TOKENS,
        ),
        (
            {
                "token_delta": {
                    "extends": "resp_of_another",
                    "new_prompt_token_ids": [1],
                    "generation_token_ids": [1],
                    "generation_log_probs": [0.0],
                }
            },
            FailureKind.TOKENS,
        ),
    ],
    ids=["no items", "half an item", "half a delta", "too few log-probs", "a delta to nothing"],
)
async def test_responses_that_contradict_themselves(
    fields: dict[str, object], kind: FailureKind, tmp_path: Path
) -> None:
    """Asking again would not help: the rollout fails at once, and the rest goes on."""

    def script(asked: Asked) -> Fault:
        return changed(asked, **fields) if asked.question == 1 else None

    async with serving(script) as policy, leaving_nothing(policy):
        async with GymClient(policy.url) as client:
            collection = await collected(client, tmp_path / "r.jsonl")
    assert [rollout.task.answer for rollout in failed(collection, kind, Stage.MODEL_CALL)] == [7, 7]
    assert policy.samples == 10 * 2 + 2
