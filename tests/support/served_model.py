"""A policy with weights of its own, as an engine has: somewhere to push to, and a source of rollouts."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import AsyncIterable, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from hashlib import blake2b
from typing import Any

import torch

from gym_sdk.grpo.models import served_model
from gym_sdk.schema import Group, ModelCall, Rollout, Task, Timing
from gym_sdk.tokens import CallTokens, WeightSpan

__all__ = ["ServedModel"]


class ServedModel:
    """Samples from a copy of a model, one group at a time; each token says which weights sampled it.

    What it samples is a function of the weights and of a rollout's task, epoch and index alone.

    Args:
        model: copied; of a peft model, merged.
        reward: of a rollout's sampled tokens.
        group_size: rollouts of each task.
        new_tokens: of each rollout.
        spans: says of the n-th group that begins, from 0, whether it waits for new weights when half of its
            tokens are sampled. By default, a group is sampled in one go.

    Attributes:
        version: what the weights are called.
        pushed: the versions that came, in their order.
        begun: id, epoch and version of each group when its first token was sampled.
        opened: how many streams were opened, and `closed`, how many of them were left.
    """

    def __init__(
        self,
        model: Any,
        reward: Callable[[list[int]], float],
        *,
        group_size: int = 4,
        new_tokens: int = 5,
        spans: Callable[[int], bool] = lambda _: False,
    ) -> None:
        self.model = copy.deepcopy(served_model(model)).eval()
        self.version = "as loaded"
        self.pushed: list[str] = []
        self.begun: list[tuple[str | None, int, str]] = []
        self.opened = self.closed = 0
        self._reward = reward
        self._group_size = group_size
        self._new_tokens = new_tokens
        self._spans = spans
        self._came = asyncio.Event()

    async def push(self, model: Any, *, version: str) -> None:
        self.model.load_state_dict(served_model(model).state_dict())
        self.version = version
        self.pushed.append(version)
        self._came.set()

    @asynccontextmanager
    async def __call__(
        self, tasks: Sequence[Task] | AsyncIterable[Task], /
    ) -> AsyncIterator[AsyncIterator[Group]]:
        self.opened += 1
        try:
            yield self._groups(tasks)
        finally:
            self.closed += 1

    async def _groups(self, tasks: Sequence[Task] | AsyncIterable[Task]) -> AsyncIterator[Group]:
        if isinstance(tasks, AsyncIterable):
            async for task in tasks:
                yield await self.group(task)
        else:
            for task in tasks:
                yield await self.group(task)

    async def group(self, task: Task) -> Group:
        waits = self._spans(len(self.begun))
        self.begun.append((task.id, task.epoch, self.version))
        prompt = [1, 2 + int(task.metadata.get("prompt", 0))]
        ids = torch.tensor([prompt] * self._group_size)
        generators = [_generator(f"{task.id}@{task.epoch}/{index}") for index in range(self._group_size)]
        scores, versions = [], []
        for place in range(self._new_tokens):
            if waits and place == self._new_tokens // 2:
                self._came.clear()
                await self._came.wait()
            with torch.no_grad():
                table = self.model(input_ids=ids).logits[:, -1].log_softmax(-1)
            rows = zip(table.exp(), generators, strict=True)
            drawn = [torch.multinomial(row, 1, generator=generator) for row, generator in rows]
            chosen = torch.stack(drawn)
            scores.append(table.gather(1, chosen))
            versions.append(self.version)
            ids = torch.cat([ids, chosen], dim=1)
        weights = _weights_of(versions)
        pairs = zip(ids[:, len(prompt) :].tolist(), torch.cat(scores, dim=1).tolist(), strict=True)
        rollouts = [
            self._rollout(task, index, CallTokens(prompt, row, score, weights))
            for index, (row, score) in enumerate(pairs)
        ]
        return Group(task=task, rollouts=rollouts, epoch=task.epoch)

    def _rollout(self, task: Task, index: int, tokens: CallTokens) -> Rollout:
        return Rollout(
            id=f"{task.id}@{task.epoch}/{index}",
            task=task,
            index=index,
            epoch=task.epoch,
            model_calls=[ModelCall(response_id=f"r{index}", first_item=0, end_item=0, tokens=tokens)],
            reward=self._reward(list(tokens.generation_token_ids)),
            timing=Timing(started_at=0.0),
        )


def _generator(name: str) -> torch.Generator:
    digest = blake2b(name.encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest))


def _weights_of(versions: list[str]) -> tuple[WeightSpan, ...]:
    cuts = [0, *(place for place in range(1, len(versions)) if versions[place] != versions[place - 1])]
    ends = [*cuts[1:], len(versions)]
    return tuple(WeightSpan(versions[first], first, end) for first, end in zip(cuts, ends, strict=True))
