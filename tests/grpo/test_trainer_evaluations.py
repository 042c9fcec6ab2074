"""Evaluations between the steps of a run: when, what comes of them, and which checkpoints stay."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from support.runs import lines
from transformers import PreTrainedModel

from gym_sdk.errors import TransportError
from gym_sdk.grpo import CheckpointFolder, Evaluation, GRPOConfig, GRPOTrainer, OptimizerConfig
from gym_sdk.grpo.checkpoints import read_state
from gym_sdk.schema import Group, Rollout, Task, Timing

Models = Callable[..., PreTrainedModel]
CONFIG = GRPOConfig(optimizer=OptimizerConfig(learning_rate=5e-3), tasks_per_step=2, max_steps=7)


def total(tokens: list[int]) -> float:
    return float(sum(tokens))


class Scores:
    """A source whose rollouts have these rewards, one after the other; `None` is one that never ends."""

    def __init__(self, *scores: float | None) -> None:
        self.scores = list(scores)
        self.served: list[str] = []
        self.waiting = asyncio.Event()
        self.sync: Sync | None = None

    @asynccontextmanager
    async def __call__(self, tasks: Sequence[Task], /) -> AsyncIterator[AsyncIterator[Group]]:
        yield self._groups(tasks)

    async def _groups(self, tasks: Sequence[Task]) -> AsyncIterator[Group]:
        score = self.scores.pop(0)
        if score is None:
            self.waiting.set()
            await anyio.sleep_forever()
        if self.sync is not None:
            self.served.append(self.sync.version)
        for task in tasks:
            rollout = Rollout(
                id=f"e/{task.id}", task=task, index=0, reward=score, timing=Timing(started_at=0.0)
            )
            yield Group(task=task, rollouts=[rollout])


class Sync:
    version = "as loaded"

    async def push(self, model: Any, *, version: str) -> None:
        self.version = version


class Lab:
    """Makes trainers with a scripted evaluation."""

    def __init__(self, make_model: Models, make_sampler: Any, tasks: list[Task], folder: Path) -> None:
        self.model = make_model()
        self.source, self.tasks, self.folder = make_sampler(self.model, total), tasks, folder

    def evaluation(self, scores: Scores, **settings: Any) -> Evaluation:
        return Evaluation(scores, self.tasks[6:], **({"every": 2} | settings))

    @asynccontextmanager
    async def trainer(
        self, evaluation: Evaluation, *, every: int | None = None, keep_last: int = 1, **settings: Any
    ) -> AsyncIterator[GRPOTrainer]:
        options = {"rollouts": self.source, "tasks": self.tasks[:6], "config": CONFIG} | settings
        with CheckpointFolder(
            self.folder / "checkpoints", every=every, keep_last=keep_last, keep_best=1
        ) as checkpoints:
            async with GRPOTrainer(
                self.model,
                evaluations=[evaluation],
                checkpoints=checkpoints,
                output_dir=self.folder,
                **options,
            ) as trainer:
                yield trainer

    async def cancel_in_evaluation(self, trainer: GRPOTrainer, scores: Scores) -> None:
        step = asyncio.ensure_future(anext(trainer))
        await scores.waiting.wait()
        step.cancel()
        await asyncio.wait([step])
        assert step.cancelled()

    def kept(self) -> dict[int, float | None]:
        """The steps whose checkpoints are there, and their scores."""
        states = [read_state(path) for path in sorted((self.folder / "checkpoints").glob("step-*"))]
        return {state.step: state.score for state in states}

    def evaluated(self) -> dict[float, float]:
        return {
            line["step"]: line["eval/reward_mean"]
            for line in lines(self.folder)
            if "eval/reward_mean" in line
        }


@pytest.fixture
def lab(make_model: Models, make_sampler: Any, tasks: list[Task], tmp_path: Path) -> Lab:
    return Lab(make_model, make_sampler, tasks, tmp_path)


@pytest.mark.asyncio
@pytest.mark.parametrize("at_start", [True, False])
async def test_evaluations_come_at_the_start_every_so_often_and_after_the_last_step(
    lab: Lab, at_start: bool
) -> None:
    scores, sync = Scores(*(0.1 * number for number in range(5))), Sync()
    scores.sync = sync
    async with lab.trainer(lab.evaluation(scores, at_start=at_start), sync=sync) as trainer:
        steps = [step async for step in trainer]
    due = [0, 2, 4, 6, 7] if at_start else [2, 4, 6, 7]
    assert lab.evaluated() == {step: pytest.approx(0.1 * number) for number, step in enumerate(due)}
    assert [step.index for step in steps if step.evaluations] == [step for step in due if step]
    expected = ["as loaded" if step == 0 else f"step-{step:06d}" for step in due]
    assert scores.served == expected  # each score is that of the weights of its step
    assert steps[1].evaluations["eval"].score == steps[1].metrics["eval/reward_mean"]


@pytest.mark.asyncio
async def test_patience_ends_the_run_and_the_best_weights_are_kept(lab: Lab) -> None:
    evaluation = lab.evaluation(Scores(0.1, 0.5, 0.4, 0.3), patience=2)
    async with lab.trainer(evaluation) as trainer:
        steps = [step.index async for step in trainer]
        assert trainer.best_step == 2
        assert trainer.stop_reason is not None
        assert "has not improved in 2 evaluations: 0.5 at step 2" in trainer.stop_reason
        with pytest.raises(StopAsyncIteration):
            await anext(trainer)
    assert steps == [1, 2, 3, 4, 5, 6]
    # No checkpoint is due by itself: one is written of each new best, and one in the end.
    assert lab.kept() == {2: 0.5, 6: 0.3}
    best = CheckpointFolder(lab.folder / "checkpoints").best()
    assert best is not None
    assert best.name == "step-000002"


@pytest.mark.asyncio
async def test_a_target_ends_the_run(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="gym_sdk.grpo"):
        async with lab.trainer(lab.evaluation(Scores(0.1, 0.5, 0.9), target=0.9)) as trainer:
            steps = [step.index async for step in trainer]
    assert steps == [1, 2, 3, 4]
    assert "training ends after step 4: eval reached its target: 0.9 >= 0.9" in caplog.text
    assert lab.kept() == {4: 0.9}


@pytest.mark.asyncio
async def test_a_target_that_is_reached_at_the_start_trains_nothing(lab: Lab) -> None:
    async with lab.trainer(lab.evaluation(Scores(1.0), target=0.9)) as trainer:
        assert [step async for step in trainer] == []
        assert trainer.best_step == 0
    assert lab.source.asked == []
    assert lab.kept() == {}


@pytest.mark.asyncio
@pytest.mark.parametrize("every", [2, None])
async def test_a_cancelled_evaluation_is_made_up_for_before_the_next_step(
    lab: Lab, every: int | None
) -> None:
    scores = Scores(0.1, None, 0.5, 0.4)
    async with lab.trainer(lab.evaluation(scores), every=every, keep_last=9) as trainer:
        await anext(trainer)
        await lab.cancel_in_evaluation(trainer, scores)
        assert trainer.step == 2
        assert lab.kept() == {}
        await anext(trainer)
        assert lab.kept() == {2: 0.5}  # with the score, which it would not have had
        assert trainer.best_step == 2
    assert lab.evaluated() == {0: 0.1, 2: 0.5}


@pytest.mark.asyncio
async def test_an_evaluation_that_a_stopped_run_did_not_finish_is_made_up_for_when_it_is_resumed(
    lab: Lab,
) -> None:
    scores = Scores(0.9, None)
    async with lab.trainer(lab.evaluation(scores)) as trainer:
        await anext(trainer)
        await lab.cancel_in_evaluation(trainer, scores)
    assert lab.kept() == {2: None}
    async with lab.trainer(lab.evaluation(Scores(0.5, 0.4))) as trainer:
        assert await trainer.resume() == 2
        await anext(trainer)
        assert lab.kept() == {2: 0.5}  # saved again, with its score
        await anext(trainer)
        assert trainer.best_step == 0
    assert lab.evaluated() == {0: 0.9, 2: 0.5, 4: 0.4}
    assert lab.kept() == {2: 0.5, 4: 0.4}


@pytest.mark.asyncio
async def test_a_resumed_run_that_had_ended_does_not_go_on(lab: Lab) -> None:
    async with lab.trainer(lab.evaluation(Scores(0.1, 0.9), target=0.9)) as trainer:
        assert [step.index async for step in trainer] == [1, 2]
    async with lab.trainer(lab.evaluation(Scores(), target=0.9)) as trainer:
        assert await trainer.resume() == 2
        assert [step async for step in trainer] == []


@pytest.mark.asyncio
async def test_a_checkpoint_that_was_due_when_the_push_failed_is_written_before_the_next_step(
    lab: Lab,
) -> None:
    class Gone(Sync):
        gone = True

        async def push(self, model: Any, *, version: str) -> None:
            if self.gone:
                raise TransportError("gone", retryable=True)

    sync = Gone()
    evaluation = lab.evaluation(Scores(0.1), every=100)
    async with lab.trainer(evaluation, every=1, keep_last=9, sync=sync) as trainer:
        with pytest.raises(TransportError):
            await anext(trainer)
        assert lab.kept() == {}
        sync.gone = False
        await anext(trainer)
    assert list(lab.kept()) == [1, 2]


@pytest.mark.asyncio
async def test_an_evaluation_without_a_score_decides_nothing(
    lab: Lab, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Scores):
        async def _groups(self, tasks: Sequence[Task]) -> AsyncIterator[Group]:
            await asyncio.sleep(0)
            if len(self.scores) == 2:
                self.scores.pop()
                raise TransportError("gone", retryable=True)
            async for group in super()._groups(tasks):
                yield group

    evaluation = lab.evaluation(Broken(0.1, 0.2, 9.9), patience=1)
    async with lab.trainer(evaluation) as trainer:
        for _ in range(4):
            await anext(trainer)
    assert "step 2: eval has no score and counts for nothing: the policy was not reached" in caplog.text
    assert (trainer.best_step, trainer.stop_reason) == (4, None)
    assert lab.kept() == {4: 0.2}
