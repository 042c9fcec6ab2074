"""Rollouts as two tables: one row for each rollout, and one for each training row.

| `rollouts` | is |
| --- | --- |
| `id`, `task_id`, `epoch`, `index` | what names the rollout and its task |
| `task_input`, `task_answer`, `task_settings`, `task_metadata` | JSON text |
| `task_instructions` | text |
| `outcome`, `truncation`, `cancellation` | as in `Rollout` |
| `failure_error`, `failure_message`, `failure_where`, `failure_kind` | null unless it failed |
| `reward` | null if it has none, never 0 for that |
| `reward_components`, `metrics` | names and values |
| `started_at` | a time in UTC |
| `duration_s`, `model_s`, `tool_s`, `verifier_s` | seconds |
| `turns`, `generated_tokens` | model calls, and their tokens (null if the server told none) |
| `items`, `input_items` | all items as JSON text; how many came with the task |
| `output_text` | the final answer |

| `sequences` | is |
| --- | --- |
| `rollout_id`, `task_id`, `epoch`, `index`, `sequence` | whose row it is, and its number there |
| `token_ids`, `loss_mask`, `log_probs`, `weight_versions` | as in `TokenSequence`; log-probs as float32 |
| `reward` | of the rollout |
| `advantage` | over the rollout's group (`group_advantages` with its defaults) |
| `outcome`, `forked`, `abandoned` | for filters |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from pydantic_core import to_json

from gym_sdk.schema import Rollout, RolloutKey
from gym_sdk.store.needs import needs_store_extra
from gym_sdk.tokens import group_advantages

with needs_store_extra():
    import pyarrow as pa

__all__ = ["SCHEMAS", "TableBuilder", "TableName", "advantages_of"]

TableName: TypeAlias = Literal["rollouts", "sequences"]

_ROW_GROUP_BYTES = 32 * 2**20
_ROW_GROUP_ROWS = 8192
_TOKEN_BYTES = 9  # an id, a mask and a log-prob

_NUMBERS = pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))
_SPANS = pa.list_(pa.struct([("version", pa.string()), ("start", pa.int32()), ("end", pa.int32())]))
_TEXTS = ("truncation", "cancellation", "failure_error", "failure_message", "failure_where", "failure_kind")

SCHEMAS: Mapping[TableName, pa.Schema] = {
    "rollouts": pa.schema(
        [
            pa.field("id", pa.string(), nullable=False),
            pa.field("task_id", pa.string(), nullable=False),
            pa.field("epoch", pa.int32(), nullable=False),
            pa.field("index", pa.int32(), nullable=False),
            pa.field("task_input", pa.string(), nullable=False),
            pa.field("task_answer", pa.string(), nullable=False),
            pa.field("task_instructions", pa.string()),
            pa.field("task_settings", pa.string(), nullable=False),
            pa.field("task_metadata", pa.string(), nullable=False),
            pa.field("outcome", pa.string(), nullable=False),
            *(pa.field(name, pa.string()) for name in _TEXTS),
            pa.field("reward", pa.float64()),
            pa.field("reward_components", _NUMBERS, nullable=False),
            pa.field("metrics", _NUMBERS, nullable=False),
            pa.field("started_at", pa.timestamp("us", tz="UTC"), nullable=False),
            *(
                pa.field(name, pa.float64(), nullable=False)
                for name in ("duration_s", "model_s", "tool_s", "verifier_s")
            ),
            pa.field("turns", pa.int32(), nullable=False),
            pa.field("generated_tokens", pa.int64()),
            pa.field("items", pa.string(), nullable=False),
            pa.field("input_items", pa.int32(), nullable=False),
            pa.field("output_text", pa.string(), nullable=False),
        ]
    ),
    "sequences": pa.schema(
        [
            pa.field("rollout_id", pa.string(), nullable=False),
            pa.field("task_id", pa.string(), nullable=False),
            pa.field("epoch", pa.int32(), nullable=False),
            pa.field("index", pa.int32(), nullable=False),
            pa.field("sequence", pa.int32(), nullable=False),
            pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
            pa.field("loss_mask", pa.list_(pa.int8()), nullable=False),
            pa.field("log_probs", pa.list_(pa.float32()), nullable=False),
            pa.field("weight_versions", _SPANS, nullable=False),
            pa.field("reward", pa.float64(), nullable=False),
            pa.field("advantage", pa.float64(), nullable=False),
            pa.field("outcome", pa.string(), nullable=False),
            pa.field("forked", pa.bool_(), nullable=False),
            pa.field("abandoned", pa.bool_(), nullable=False),
        ]
    ),
}
"""The columns of each table."""


def advantages_of(rewards: Iterable[tuple[RolloutKey, float | None]]) -> dict[RolloutKey, float]:
    """Return the advantage of each rollout with a reward over its group, which is its task in its epoch."""
    groups: dict[tuple[str, int], dict[int, float | None]] = {}
    for key, reward in rewards:
        groups.setdefault((key.task_id, key.epoch), {})[key.index] = reward
    return {
        RolloutKey(task_id, epoch, index): advantage
        for (task_id, epoch), group in groups.items()
        for index, advantage in zip(group, group_advantages(list(group.values())), strict=True)
        if advantage is not None
    }


@dataclass(slots=True)
class TableBuilder:
    """Collects the rows of one table and gives them out in batches of bounded size.

    A rollout without reward, or one whose model calls carry no tokens, has no rows in `sequences`.
    """

    name: TableName
    advantages: Mapping[RolloutKey, float]
    """Of `advantages_of`; used by `sequences`."""
    rows: int = 0
    """So far."""
    without_tokens: int = 0
    """Rollouts with a reward that have no rows in `sequences`, because a call carries no tokens."""

    _pending: list[dict[str, Any]] = field(default_factory=list)
    _pending_bytes: int = 0

    def add(self, rollout: Rollout) -> Iterator[pa.RecordBatch]:
        """Take one rollout's rows; yield the batches that they fill. Memory holds no more than one."""
        for row, row_bytes in self._rows(rollout):
            self._pending.append(row)
            self._pending_bytes += row_bytes
            if self._pending_bytes >= _ROW_GROUP_BYTES or len(self._pending) >= _ROW_GROUP_ROWS:
                yield self._batch()

    def rest(self) -> Iterator[pa.RecordBatch]:
        """Yield the last batch; if there was no row at all, an empty one."""
        if self._pending or not self.rows:
            yield self._batch()

    def _batch(self) -> pa.RecordBatch:
        rows, self._pending, self._pending_bytes = self._pending, [], 0
        self.rows += len(rows)
        return pa.RecordBatch.from_pylist(rows, schema=SCHEMAS[self.name])

    def _rows(self, rollout: Rollout) -> Iterator[tuple[dict[str, Any], int]]:
        if self.name == "rollouts":
            row = _rollout_row(rollout)
            yield row, len(row["items"]) + len(row["task_input"]) + len(row["task_metadata"]) + 500
        elif rollout.reward is not None:
            if all(call.tokens is not None for call in rollout.model_calls):
                yield from _sequence_rows(rollout, rollout.reward, self.advantages[rollout.key])
            else:
                self.without_tokens += 1


def _rollout_row(rollout: Rollout) -> dict[str, Any]:
    task, timing, failure = rollout.task, rollout.timing, rollout.failure
    tokens = [call.tokens for call in rollout.model_calls]
    return {
        "id": rollout.id,
        "task_id": rollout.task_id,
        "epoch": rollout.epoch,
        "index": rollout.index,
        "task_input": _json(task.input if isinstance(task.input, str) else _wire(task.items())),
        "task_answer": _json(task.answer),
        "task_instructions": task.instructions,
        "task_settings": _json(dict(task.settings)),
        "task_metadata": _json(dict(task.metadata)),
        "outcome": str(rollout.outcome),
        "truncation": rollout.truncation,
        "cancellation": rollout.cancellation,
        "failure_error": failure.error if failure else None,
        "failure_message": failure.message if failure else None,
        "failure_where": failure.where if failure else None,
        "failure_kind": failure.kind if failure else None,
        "reward": rollout.reward,
        "reward_components": _numbers(rollout.reward_components),
        "metrics": _numbers(rollout.metrics),
        "started_at": round(timing.started_at * 1e6),
        "duration_s": timing.duration_s,
        "model_s": timing.model_s,
        "tool_s": timing.tool_s,
        "verifier_s": timing.verifier_s,
        "turns": len(rollout.model_calls),
        "generated_tokens": (
            None if None in tokens else sum(len(call.generation_token_ids) for call in tokens if call)
        ),
        "items": _json(_wire(rollout.items)),
        "input_items": rollout.input_items,
        "output_text": rollout.output_text,
    }


def _sequence_rows(rollout: Rollout, reward: float, advantage: float) -> Iterator[tuple[dict[str, Any], int]]:
    for number, sequence in enumerate(rollout.sequences()):
        row = {
            "rollout_id": rollout.id,
            "task_id": rollout.task_id,
            "epoch": rollout.epoch,
            "index": rollout.index,
            "sequence": number,
            "token_ids": sequence.token_ids,
            "loss_mask": sequence.loss_mask,
            "log_probs": sequence.log_probs,
            "weight_versions": [asdict(span) for span in sequence.weight_versions],
            "reward": reward,
            "advantage": advantage,
            "outcome": str(rollout.outcome),
            "forked": sequence.forked,
            "abandoned": sequence.abandoned,
        }
        yield row, len(sequence) * _TOKEN_BYTES


def _json(value: Any) -> str:
    return to_json(value, fallback=str).decode()


def _wire(items: Iterable[Any]) -> list[Any]:
    return [item.to_wire() for item in items]


def _numbers(values: Mapping[str, float]) -> list[dict[str, Any]]:
    return [{"name": name, "value": value} for name, value in values.items()]
