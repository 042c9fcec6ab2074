"""Checkpoints: exact, loadable by any tool, and refused with a reason when they do not fit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from gym_sdk.errors import CheckpointError
from gym_sdk.grpo import FolderSync, GRPOConfig, GRPOTrainer
from gym_sdk.grpo.folders import previous_of
from gym_sdk.schema import Task

Models = Callable[..., PreTrainedModel]
CONFIG = GRPOConfig(learning_rate=3e-3, warmup_steps=2, tasks_per_step=3, weight_decay=0.01)


def twos(tokens: list[int]) -> float:
    return sum(token == 2 for token in tokens) / len(tokens)


@pytest.fixture
def make_trainer(make_sampler: Any, tasks: list[Task]) -> Callable[..., GRPOTrainer]:
    def make(model: PreTrainedModel, config: GRPOConfig = CONFIG, **arguments: Any) -> GRPOTrainer:
        arguments = {"tasks": tasks, "rollouts": make_sampler(model, twos)} | arguments
        return GRPOTrainer(model, config=config, **arguments)

    return make


def without_times(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if "seconds" not in name and "per_s" not in name}


@pytest.mark.asyncio
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
async def test_resume_is_exact(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], tmp_path: Path, architecture: str
) -> None:
    torch.manual_seed(3)
    model = make_model(architecture)
    first = make_trainer(model, output_dir=tmp_path / "a")
    for _ in range(3):
        await anext(first)
    await first.save(tmp_path / "checkpoint")
    drawn = (random.random(), np.random.random(), torch.rand(()).item())
    await first.load(tmp_path / "checkpoint")
    expected = [await anext(first) for _ in range(3)]

    other = make_model(architecture, seed=9)
    torch.manual_seed(99)
    second = make_trainer(other, output_dir=tmp_path / "a")
    await second.load(tmp_path / "checkpoint")
    assert (random.random(), np.random.random(), torch.rand(()).item()) == drawn
    await second.load(tmp_path / "checkpoint")
    assert second.step == 3
    resumed = [await anext(second) for _ in range(3)]

    for before, after in zip(expected, resumed, strict=True):
        assert without_times(before.metrics) == without_times(after.metrics)
        assert [group.task.id for group in before.groups] == [group.task.id for group in after.groups]
        assert before.index == after.index
    for (name, left), right in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.asyncio
async def test_any_tool_loads_it(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], tmp_path: Path
) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        (tokenizer / name).write_text(f"{name} of the tokenizer's folder")
    model = make_model()
    trainer = make_trainer(model, tokenizer_dir=tokenizer)
    await anext(trainer)
    await trainer.save(tmp_path / "checkpoint")
    await trainer.save(tmp_path / "checkpoint")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "trainer"}


@pytest.mark.asyncio
async def test_a_run_that_starts_from_a_folder_resumes(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], tmp_path: Path
) -> None:
    make_model().save_pretrained(tmp_path / "base")
    first = make_trainer(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    await anext(first)
    await first.save(tmp_path / "checkpoint")
    for folder in ("base", "checkpoint"):
        second = make_trainer(AutoModelForCausalLM.from_pretrained(tmp_path / folder))
        await second.load(tmp_path / "checkpoint")
        assert second.step == 1


@pytest.mark.asyncio
async def test_a_resumed_trainer_pushes_first(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], tmp_path: Path
) -> None:
    pushed: list[str] = []

    class Target:
        async def update_weights(self, source: Any, *, version: str) -> None:
            pushed.append(version)

    first = make_trainer(make_model())
    for _ in range(2):
        await anext(first)
    await first.save(tmp_path / "checkpoint")
    second = make_trainer(make_model(), sync=FolderSync(Target(), tmp_path / "weights"))
    await second.load(tmp_path / "checkpoint")
    step = await anext(second)
    assert pushed == ["step-000002", "step-000003"]
    assert step.weight_version == "step-000003"


@pytest.mark.asyncio
async def test_settings_of_the_new_run_hold_after_a_resume(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], tmp_path: Path
) -> None:
    first = make_trainer(make_model())
    await anext(first)
    await first.save(tmp_path / "checkpoint")
    config = GRPOConfig(learning_rate=1e-5, tasks_per_step=3, weight_decay=0.5, adam_betas=(0.5, 0.6))
    second = make_trainer(make_model(), config)
    await second.load(tmp_path / "checkpoint")
    step = await anext(second)
    assert step.metrics["learning_rate"] == 1e-5
    matrices = second._learner.optimizer.param_groups[0]
    assert (matrices["weight_decay"], matrices["betas"]) == (0.5, (0.5, 0.6))


@pytest_asyncio.fixture
async def saved(make_model: Models, make_trainer: Callable[..., GRPOTrainer], tmp_path: Path) -> Path:
    trainer = make_trainer(make_model())
    await anext(trainer)
    await trainer.save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


async def refuse(trainer: GRPOTrainer, path: Path, message: str) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    state = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=message) as caught:
        await trainer.load(path)
    assert caught.value.path == str(path)
    assert trainer.step == 0
    assert not trainer._learner.optimizer.state
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    if "shape" not in message and "weights" not in message:
        assert torch.equal(state, torch.get_rng_state())


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden": 16}, "of another model: hidden_size is 32 in the checkpoint and 16 in the model"),
        ({"layers": 1}, "of another model: layer_types is"),
        ({"vocab": 20}, "of another model: vocab_size is 16 in the checkpoint and 20"),
        ({"architecture": "llama"}, "of another model: model_type is 'qwen3' in the checkpoint and 'llama'"),
    ],
)
async def test_a_checkpoint_of_another_model_is_refused(
    make_model: Models,
    make_trainer: Callable[..., GRPOTrainer],
    saved: Path,
    other: dict[str, Any],
    message: str,
) -> None:
    await refuse(make_trainer(make_model(**other)), saved, message)


@pytest.mark.asyncio
async def test_parameters_of_another_shape_are_named(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], saved: Path
) -> None:
    model = make_model()
    model.get_decoder().norm.weight = torch.nn.Parameter(torch.ones(33)[:32].clone())
    trainer = make_trainer(model)
    model.get_decoder().norm.weight = torch.nn.Parameter(torch.ones(1))
    await refuse(trainer, saved, r"parameter model\.norm\.weight is \[32\] in the checkpoint and \[1\]")


@pytest.mark.asyncio
async def test_another_order_of_tasks_is_refused(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], saved: Path, tasks: list[Task]
) -> None:
    await refuse(make_trainer(make_model(), tasks=tasks[:-1]), saved, "other tasks, or another seed")
    await refuse(make_trainer(make_model(), GRPOConfig(seed=1, tasks_per_step=3)), saved, "another seed")


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("trainer/state.json", r"state\.json cannot be read"),
        ("trainer/state.pt", r"state\.pt cannot be read"),
        ("config.json", r"config\.json cannot be read"),
        ("model.safetensors", "the weights cannot be read"),
    ],
)
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
async def test_a_damaged_file_is_named(
    make_model: Models,
    make_trainer: Callable[..., GRPOTrainer],
    saved: Path,
    file: str,
    message: str,
    damage: str,
) -> None:
    path = saved / file
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "garbage": b"\x93" * 64, "empty": b""}[damage])
    await refuse(make_trainer(make_model()), saved, message)


@pytest.mark.asyncio
async def test_missing_files_are_errors(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], saved: Path, tmp_path: Path
) -> None:
    await refuse(make_trainer(make_model()), tmp_path / "nowhere", "there is no checkpoint here")
    (saved / "model.safetensors").unlink()
    await refuse(make_trainer(make_model()), saved, "the weights cannot be read")


@pytest.mark.asyncio
async def test_another_format_is_refused(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], saved: Path
) -> None:
    file = saved / "trainer" / "state.json"
    record = json.loads(file.read_text())
    file.write_text(json.dumps(record | {"format": 7}))
    await refuse(make_trainer(make_model()), saved, "format 7 is not 1")
    del record["position"]
    file.write_text(json.dumps(record))
    await refuse(make_trainer(make_model()), saved, r"state\.json lacks position")


@pytest.mark.asyncio
async def test_a_kill_between_the_renames_loses_nothing(
    make_model: Models, make_trainer: Callable[..., GRPOTrainer], saved: Path
) -> None:
    saved.replace(previous_of(saved))
    trainer = make_trainer(make_model())
    await trainer.load(saved)
    assert trainer.step == 1
