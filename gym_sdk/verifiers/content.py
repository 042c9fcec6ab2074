"""What a rollout says, as a key: the same for all rollouts that say the same."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from typing import Any

from pydantic_core import PydanticSerializationError, to_jsonable_python

from gym_sdk.errors import VerifierError
from gym_sdk.schema import Rollout
from gym_sdk.schema.items import Item

__all__ = ["content_key"]

_FORMAT = 1
"""Of the key. A change of what goes into it makes every stored entry unknown."""

_NOT_CONTENT = frozenset({"id", "status", "encrypted_content", "logprobs"})


def content_key(rollout: Rollout, identity: Iterable[str], verifier: str) -> bytes:
    """Return the key of a rollout's content, 32 bytes.

    Args:
        rollout: what is verified.
        identity: what tells verifiers apart.
        verifier: the verifier's name, for messages.

    Raises:
        VerifierError: the task's answer or metadata has no JSON form.
    """
    task = rollout.task
    content = [
        _FORMAT,
        list(identity),
        [task.instructions, task.answer, dict(task.metadata)],
        rollout.input_items,
        _items(rollout.items),
        # which of the items are the final text
        [[call.first_item, call.end_item] for call in rollout.model_calls],
        [rollout.outcome, rollout.truncation],
    ]
    try:
        text = json.dumps(content, sort_keys=True, default=to_jsonable_python)
    except (TypeError, ValueError, RecursionError, PydanticSerializationError) as error:
        raise VerifierError(
            f"verifier {verifier}: the answer or metadata of task {rollout.task_id!r} has no JSON form, so "
            f"its rollouts cannot be told apart: {error}",
            verifier=verifier,
        ) from error
    return blake2b(text.encode(), digest_size=32).digest()


def _items(items: Iterable[Item]) -> list[Any]:
    """Return the items without what differs from run to run; calls are numbered instead of named."""
    numbers: dict[str, int] = {}
    content = []
    for item in items:
        wire = _pruned(item.without_tokens().to_wire())
        call_id = wire.get("call_id")
        if isinstance(call_id, str):
            wire["call_id"] = numbers.setdefault(call_id, len(numbers))
        content.append(wire)
    return content


def _pruned(wire: Mapping[str, Any]) -> dict[str, Any]:
    pruned = {key: value for key, value in wire.items() if key not in _NOT_CONTENT}
    parts = pruned.get("content")
    if isinstance(parts, list):
        pruned["content"] = [
            {key: value for key, value in part.items() if key not in _NOT_CONTENT} for part in parts
        ]
    return pruned
