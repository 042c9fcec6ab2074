"""What a verifier raises, as one kind of error."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from gym_sdk.errors import VerifierError

__all__ = ["verifier_faults"]

_MOST_CHARACTERS = 2000


@contextmanager
def verifier_faults(name: str) -> Iterator[None]:
    """Turn whatever a verifier raises into a `VerifierError`.

    Passed on as they are: `VerifierError` itself, `KeyboardInterrupt`, and the cancellation of this task. A
    `CancelledError` that nobody asked for (a verifier awaited something that was cancelled) is a failure:
    passed on, it would end the rollout as if its caller had left. Of an exception group, the first exception
    is named, and how many there were.

    Raises:
        VerifierError: the verifier raised.
    """
    try:
        yield
    except (VerifierError, KeyboardInterrupt, GeneratorExit):
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise VerifierError(
            f"verifier {name} awaited something that was cancelled, and nobody had cancelled the verifier",
            verifier=name,
        ) from error
    except BaseException as error:
        raise _as_verifier_error(error, name) from error


def _as_verifier_error(error: BaseException, name: str) -> VerifierError:
    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, KeyboardInterrupt):
            raise leaf
    first = next((leaf for leaf in leaves if isinstance(leaf, VerifierError)), leaves[0])
    others = f" (the first of {len(leaves)} errors)" if len(leaves) > 1 else ""
    if isinstance(first, VerifierError):
        return VerifierError(f"{first}{others}", verifier=first.verifier)
    return VerifierError(
        f"verifier {name} raised {type(first).__name__}: {_message(first)}{others}", verifier=name
    )


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        yield error
        return
    for inner in error.exceptions:
        yield from _leaves(inner)


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as broken:
        text = f"(its message cannot be read: {type(broken).__name__})"
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}…"
