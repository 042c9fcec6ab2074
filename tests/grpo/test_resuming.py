"""A run that was interrupted and resumed is the run that was not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import lines, same_tensors, tensors
from support.served_model import ServedModel
from transformers import PreTrainedModel

from gym_sdk.errors import CheckpointError, ConfigurationError
from gym_sdk.grpo import (
    Alarm,
    AlarmConfig,
    CheckpointFolder,
    Evaluation,
    GRPOConfig,
    GRPOTrainer,
    LossConfig,
    OptimizerConfig,
)
from gym_sdk.grpo.checkpoints import read_state
from gym_sdk.grpo.checkpoints.replay import read_replay
from gym_sdk.grpo.models import add_lora
from gym_sdk.schema import Task

Models = Callable[..., PreTrainedModel]


def total(tokens: list[int]) -> float:
    return float(sum(tokens))


CONFIG = GRPOConfig(
    optimizer=OptimizerConfig(learning_rate=5e-3, warmup_steps=4),
    alarms=AlarmConfig(max_approx_kl=1e-9, repeat_every=2),
    tasks_per_step=2,
    max_steps=6,
)
KL = LossConfig(kl_coefficient=0.1)


@dataclass
class Run:
    """What one run has come to."""

    folder: Path
    alarms: list[Alarm] = field(default_factory=list)
    model: Any = None
    optimizer: dict[str, Any] = field(default_factory=dict)
    reference: dict[str, Any] = field(default_factory=dict)
    decided: tuple[int | None, str | None] = (None, None)


class Lab:
    """Starts runs from the same weights, each in objects of its own."""

    def __init__(
        self, make_model: Models, make_sampler: Any, tasks: list[Task], config: GRPOConfig, lora: bool
    ):
        self.make_model, self.make_sampler, self.tasks = make_model, make_sampler, tasks
        self.config, self.lora = config, lora

    def model(self) -> Any:
        torch.manual_seed(3)
        return add_lora(self.make_model(), rank=2) if self.lora else self.make_model()

    @asynccontextmanager
    async def trainer(self, folder: Path, **settings: Any) -> Any:
        model = self.model()
        torch.manual_seed(11)
        if self.config.max_staleness:
            source = ServedModel(model, total)
            settings = {"sync": source} | settings
        else:
            source = self.make_sampler(model, total)
        evaluation = Evaluation(source, self.tasks[6:], every=2, patience=4)
        with CheckpointFolder(folder / "checkpoints") as checkpoints:
            options = {
                "rollouts": source,
                "tasks": self.tasks[:6],
                "config": self.config,
                "evaluations": [evaluation],
                "checkpoints": checkpoints,
                "output_dir": folder,
            }
            async with GRPOTrainer(model, **(options | settings)) as trainer:
                yield trainer

    async def run(self, run: Run, *, until: int = 6) -> None:
        async with self.trainer(run.folder) as trainer:
            await trainer.resume()
            async for step in trainer:
                run.alarms += step.alarms
                if step.index == until:
                    break
        learner = trainer._learner
        run.model, run.optimizer = trainer.model, learner.optimizer.state_dict()
        run.reference = {} if learner.reference is None else learner.reference.state_dict()
        run.decided = trainer.best_step, trainer.stop_reason


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("changes", "lora"),
    [
        ({}, False),
        ({"loss": KL, "reference_refresh_updates": 4}, False),
        ({"loss": KL, "reference": "ema", "reference_decay": 0.8}, False),
        ({"loss": KL}, True),
        ({"loss": KL, "reference": "base"}, True),
        ({"loss": LossConfig.decoupled(), "max_staleness": 1}, False),
        (
            {
                "loss": replace(LossConfig.decoupled(), kl_coefficient=0.1),
                "max_staleness": 2,
                "reference": "ema",
            },
            True,
        ),
    ],
    ids=["in turns", "refreshed", "average", "adapter", "base", "ahead", "far ahead"],
)
async def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    make_model: Models,
    make_sampler: Any,
    tasks: list[Task],
    tmp_path: Path,
    changes: dict[str, Any],
    lora: bool,
) -> None:
    lab = Lab(make_model, make_sampler, tasks, replace(CONFIG, **changes), lora)
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    await lab.run(whole)
    await lab.run(parts, until=3)
    assert not same_tensors(whole.model.state_dict(), parts.model.state_dict())
    await lab.run(parts)
    assert same_tensors(whole.model.state_dict(), parts.model.state_dict())
    assert same_tensors(whole.optimizer, parts.optimizer)
    assert whole.reference.keys() == parts.reference.keys()
    assert not tensors(whole.reference) or same_tensors(whole.reference, parts.reference)
    assert lines(whole.folder) == lines(parts.folder)
    assert [line["step"] for line in lines(whole.folder)] == [0, 1, 2, 3, 4, 5, 6]
    assert whole.alarms == parts.alarms
    assert len(whole.alarms) >= 2
    assert whole.decided == parts.decided
    states = [read_state(run.folder / "checkpoints" / "step-000006") for run in (whole, parts)]
    assert states[0] == states[1]


@pytest.fixture
def lab(make_model: Models, make_sampler: Any, tasks: list[Task]) -> Lab:
    return Lab(make_model, make_sampler, tasks, CONFIG, False)


@pytest.mark.asyncio
async def test_rollouts_that_were_finished_ahead_are_trained_and_not_made_again(
    lab: Lab, tmp_path: Path
) -> None:
    lab.config = replace(CONFIG, loss=LossConfig.decoupled(), max_staleness=2)
    await lab.run(Run(tmp_path), until=3)
    assert sorted(read_replay(tmp_path / "checkpoints" / "step-000003")) == [
        3,
        4,
    ]  # what was trained is not kept
    async with lab.trainer(tmp_path) as trainer:
        assert await trainer.resume() == 3
        served = trainer._rollouts
        step = await anext(trainer)
    # Batches at 3 and 4 were waiting; that at 5 may begin now, with the weights of the step resumed from.
    epochs = {(group.task.id, group.epoch) for group in step.groups}
    begun = [(task, epoch) for task, epoch, _ in served.begun if epoch]
    assert not epochs & set(begun)
    assert {version for _, epoch, version in served.begun if epoch} == {"step-000003"}
    assert step.metrics["staleness_max"] == 2


# what is refused, and what is not


@pytest.mark.asyncio
async def test_a_new_run_does_not_write_over_an_old_one(lab: Lab, tmp_path: Path) -> None:
    await lab.run(Run(tmp_path), until=3)
    async with lab.trainer(tmp_path) as trainer:
        with pytest.raises(CheckpointError, match=r"has a checkpoint of step 3.*Go on from it, give the new"):
            await anext(trainer)
        assert trainer.step == 0
    checkpoints = CheckpointFolder(tmp_path / "checkpoints")
    async with lab.trainer(tmp_path, checkpoints=checkpoints) as trainer:
        with pytest.raises(CheckpointError, match="this folder is not entered"):
            await anext(trainer)


@pytest.mark.asyncio
async def test_lines_of_later_steps_are_removed(lab: Lab, tmp_path: Path) -> None:
    await lab.run(Run(tmp_path), until=2)
    await lab.run(Run(tmp_path), until=4)
    whole = lines(tmp_path)
    async with lab.trainer(tmp_path, evaluations=()) as trainer:
        trainer._checkpoints.rewind(2)
        assert await trainer.resume() == 2
        assert lines(tmp_path) == whole[:3]
        await anext(trainer)
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]


@pytest.mark.asyncio
async def test_a_run_that_ended_before_its_first_checkpoint_begins_anew(lab: Lab, tmp_path: Path) -> None:
    async with lab.trainer(tmp_path, checkpoints=None) as trainer:
        await anext(trainer)
        with pytest.raises(ConfigurationError, match="needs checkpoints="):
            await trainer.resume()
    first = lines(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')  # a kill cut it off
    await lab.run(Run(tmp_path), until=1)
    assert lines(tmp_path) == first


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tasks": 5}, "made with other tasks, or another seed or tasks_per_step"),
        ({"config": {"seed": 1}}, "made with other tasks, or another seed or tasks_per_step"),
        ({"config": {"tasks_per_step": 3}}, "made with other tasks, or another seed or tasks_per_step"),
        ({"config": {"loss": KL}}, "it has no reference policy, which loss.kl_coefficient needs"),
        ({"model": {"vocab": 17}}, "vocab_size"),
        ({"model": {"hidden": 64}}, "hidden_size"),
        ({"lora": True}, "it holds a whole model, and the model to be trained is an adapter"),
    ],
)
async def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(
    lab: Lab, make_model: Models, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    await lab.run(Run(tmp_path), until=1)
    checkpoint = tmp_path / "checkpoints" / "step-000001"
    lab.config = replace(CONFIG, **changes.get("config", {}))
    lab.make_model = lambda: make_model(seed=9, **changes.get("model", {}))
    lab.lora = changes.get("lora", False)
    async with lab.trainer(tmp_path / "other", tasks=lab.tasks[: changes.get("tasks", 6)]) as trainer:
        before = tensors(trainer.model.state_dict())
        with pytest.raises(CheckpointError, match=says):
            await trainer.load(checkpoint)
        assert same_tensors(before, tensors(trainer.model.state_dict()))
        assert trainer.step == 0
        assert (await anext(trainer)).index == 1


@pytest.mark.asyncio
async def test_a_reference_of_another_kind_is_refused(lab: Lab, tmp_path: Path) -> None:
    lab.config = replace(CONFIG, loss=KL)
    await lab.run(Run(tmp_path), until=1)
    lab.config = replace(lab.config, reference="ema")
    async with lab.trainer(tmp_path) as trainer:
        before = tensors(trainer.model.state_dict())
        with pytest.raises(CheckpointError, match="of kind 'copy', and this one is 'ema'"):
            await trainer.resume()
        assert same_tensors(before, tensors(trainer.model.state_dict()))


@pytest.mark.asyncio
async def test_the_learning_rate_may_change(lab: Lab, tmp_path: Path) -> None:
    await lab.run(Run(tmp_path), until=2)
    lab.config = replace(CONFIG, optimizer=OptimizerConfig(learning_rate=1e-4))
    async with lab.trainer(tmp_path) as trainer:
        await trainer.resume()
        step = await anext(trainer)
    assert (step.index, step.metrics["learning_rate"]) == (3, 1e-4)


@pytest.mark.asyncio
async def test_loading_that_is_cancelled_is_done_whole(lab: Lab, tmp_path: Path) -> None:
    """Weights of the checkpoint with the step of before would make a wrong checkpoint at the end."""
    run = Run(tmp_path)
    await lab.run(run, until=3)
    async with lab.trainer(tmp_path) as trainer:
        loading = asyncio.create_task(trainer.resume())
        await asyncio.sleep(0.001)
        loading.cancel()
        await asyncio.wait([loading])
        assert loading.cancelled()
        assert trainer.step == 3
        assert same_tensors(run.model.state_dict(), trainer.model.state_dict())
