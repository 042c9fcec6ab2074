"""What is written comes back, bit for bit, and nothing changes before everything was found to fit."""

from __future__ import annotations

import json
import math
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpointed import state_at, tiny_model, tiny_optimizer, update, waiting_group
from torch.optim import SGD
from transformers import AutoModelForCausalLM, PreTrainedModel

from gym_sdk.errors import CheckpointError, ConfigurationError
from gym_sdk.grpo.checkpoints import TrainerState, read_checkpoint, read_state, write_checkpoint
from gym_sdk.grpo.checkpoints.folders import previous_of
from gym_sdk.grpo.checkpoints.replay import read_replay, write_replay
from gym_sdk.grpo.optim import OptimizerConfig, make_optimizer
from gym_sdk.schema import Group, Task
from gym_sdk.store import read_rollouts
from gym_sdk.tokens import CallTokens, WeightSpan


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(()).item()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A checkpoint of a model after two updates, and the model."""
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    for _ in range(2):
        update(model, optimizer)
    path = tmp_path / "runs" / "a" / "checkpoint"  # folders that are not there yet
    write_checkpoint(path, model, state_at(2), optimizer=optimizer)
    return path, model


def test_the_next_update_is_the_same(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    for _ in range(2):
        update(model, optimizer)
    write_checkpoint(tmp_path / "checkpoint", model, state_at(2), optimizer=optimizer)
    drawn = draws()
    update(model, optimizer)

    other = tiny_model(seed=9)
    other_optimizer = tiny_optimizer(other)
    checkpoint = read_checkpoint(tmp_path / "checkpoint", other, other_optimizer)
    checkpoint.apply(other, other_optimizer)
    assert draws() == drawn
    update(other, other_optimizer)

    for (name, left), right in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    left_state, right_state = optimizer.state_dict(), other_optimizer.state_dict()
    assert left_state["param_groups"] == right_state["param_groups"]
    for index, moments in left_state["state"].items():
        assert all(torch.equal(value, right_state["state"][index][key]) for key, value in moments.items())


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_the_next_update_in_low_precision_is_the_same(tmp_path: Path, name: Any) -> None:
    """The optimizer updates float32 copies of the weights, which belong to its state."""
    config = OptimizerConfig(name=name, learning_rate=1e-5)
    model = tiny_model().bfloat16()
    optimizer = make_optimizer(model, config)
    update(model, optimizer)
    write_checkpoint(tmp_path / "c", model, state_at(1), optimizer=optimizer)
    update(model, optimizer)

    other = tiny_model(seed=9).bfloat16()
    other_optimizer = make_optimizer(other, config)
    read_checkpoint(tmp_path / "c", other, other_optimizer).apply(other, other_optimizer)
    update(other, other_optimizer)
    for (key, left), right in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), key
    masters = zip(
        optimizer.state_dict()["master_weights"], other_optimizer.state_dict()["master_weights"], strict=True
    )
    assert all(torch.equal(left, right) for left, right in masters)

    config = OptimizerConfig(name="adamw")
    with pytest.raises(
        CheckpointError, match=r"its optimizer (is another one: it has the settings|has groups)"
    ):
        read_checkpoint(tmp_path / "c", other, make_optimizer(other, config))


def test_reading_changes_nothing(saved: tuple[Path, PreTrainedModel]) -> None:
    other = tiny_model(seed=9)
    optimizer = tiny_optimizer(other)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    states = random.getstate(), torch.get_rng_state(), np.random.get_state(legacy=True)[1].tolist()
    read_checkpoint(saved[0], other, optimizer)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert np.random.get_state(legacy=True)[1].tolist() == states[2]
    assert all(torch.equal(before[name], tensor) for name, tensor in other.state_dict().items())
    assert not optimizer.state_dict()["state"]


def test_the_settings_of_the_optimizer_are_the_new_runs(saved: tuple[Path, PreTrainedModel]) -> None:
    other = tiny_model()
    optimizer = tiny_optimizer(other, lr=1e-5, betas=(0.5, 0.6), weight_decay=0.5)
    read_checkpoint(saved[0], other, optimizer).apply(other, optimizer)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["weight_decay"]) == (1e-5, (0.5, 0.6), 0.5)
    assert all(moments["step"] == 2 for moments in optimizer.state.values())


def test_states_come_back(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    state = state_at(7, score=0.25, best_score=1 / 3, more={"epochs": [1, 2], "name": "ü", "none": None})
    average = torch.randn(3, dtype=torch.bfloat16)
    extra: dict[str, Any] = {
        "reference": OrderedDict(weight=average, updates=3, decay=0.1),
        "masters": [torch.tensor([1e-38, math.inf]), (True, None, "x")],
    }
    write_checkpoint(tmp_path / "c", model, state, optimizer=optimizer, extra=extra)
    checkpoint = read_checkpoint(tmp_path / "c", model, optimizer)
    assert checkpoint.state == read_state(tmp_path / "c") == state
    assert torch.equal(checkpoint.extra["reference"].pop("weight"), average)
    assert checkpoint.extra["reference"] == {"updates": 3, "decay": 0.1}
    assert torch.equal(checkpoint.extra["masters"][0], extra["masters"][0])
    assert checkpoint.extra["masters"][1] == (True, None, "x")
    assert checkpoint.replay == {}


def test_what_cannot_be_read_back_is_not_written(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    for extra, message in (
        ({"a": {"b": [0, {1}]}}, r"extra\['a'\]\['b'\]\[1\] is a set"),
        ({"a": np.float64(1.0)}, r"extra\['a'\] is a float64"),
        ({"a": {(1, np.int64(2)): 0}}, r"a name in extra\['a'\]\[1\] is a int64"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            write_checkpoint(tmp_path / "c", model, state_at(1), optimizer=optimizer, extra=extra)
    with pytest.raises(ConfigurationError, match=r"state\.more must be JSON values: .*set"):
        write_checkpoint(tmp_path / "c", model, state_at(1, more={"a": {1}}), optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []
    for name in ("score", "best_score"):
        with pytest.raises(ConfigurationError, match=f"{name} must be finite or None, not nan"):
            state_at(1, **{name: math.nan})


def test_settings_that_are_no_json_are_recorded_as_text(tmp_path: Path) -> None:
    model = tiny_model()
    state = state_at(1, config={"folder": Path("a"), "pair": (1, 2)})
    write_checkpoint(tmp_path / "c", model, state, optimizer=tiny_optimizer(model))
    assert read_state(tmp_path / "c").config == {"folder": "a", "pair": [1, 2]}


def test_any_tool_loads_it(saved: tuple[Path, PreTrainedModel]) -> None:
    path, model = saved
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(path)
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_tokenizer_goes_along_and_may_be_edited(tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"):
        (tokenizer / name).write_text(f"{name} of the tokenizer's folder")
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    path = tmp_path / "c"
    write_checkpoint(path, model, state_at(1), optimizer=optimizer, tokenizer_dir=tokenizer)
    assert (path / "tokenizer.json").read_bytes() == (tokenizer / "tokenizer.json").read_bytes()
    (path / "chat_template.jinja").write_text("another template")
    read_checkpoint(path, model, optimizer)


def test_a_kill_between_the_renames_loses_nothing(saved: tuple[Path, PreTrainedModel]) -> None:
    path, model = saved
    path.replace(previous_of(path))
    assert read_checkpoint(path, model, tiny_optimizer(model)).state.step == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden": 16}, "of another model: head_dim is 4 in the checkpoint and 8 in the model"),
        ({"layers": 2}, "of another model: num_hidden_layers is 1 in the checkpoint and 2"),
        ({"vocab": 20}, "of another model: vocab_size is 16 in the checkpoint and 20"),
    ],
)
def test_another_model_is_refused(
    saved: tuple[Path, PreTrainedModel], sizes: dict[str, int], message: str
) -> None:
    other = tiny_model(**sizes)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(saved[0], other, tiny_optimizer(other))


def test_another_optimizer_is_refused(saved: tuple[Path, PreTrainedModel]) -> None:
    path, model = saved
    with pytest.raises(CheckpointError, match="its optimizer is AdamW and this run's is SGD"):
        read_checkpoint(path, model, SGD(model.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match=r"has groups of \[9, 3\] parameters, and this run's of \[12\]"):
        read_checkpoint(path, model, torch.optim.AdamW(model.parameters()))
    model.lm_head.weight.requires_grad_(False)
    message = r"lm_head\.weight is \[16, 8\] in the checkpoint and not trained in this run"
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path, model, tiny_optimizer(model))


def test_the_replay_buffer_comes_back(tmp_path: Path) -> None:
    model = tiny_model()
    optimizer = tiny_optimizer(model)
    replay = {5: [waiting_group(1, epoch=2), waiting_group(0, rollouts=3)], 4: [waiting_group(2)]}
    write_checkpoint(tmp_path / "c", model, state_at(3), optimizer=optimizer, replay=replay)
    restored = read_checkpoint(tmp_path / "c", model, optimizer).replay
    assert restored == replay
    assert list(restored) == [4, 5]
    for position, groups in replay.items():
        for before, after in zip(groups, restored[position], strict=True):
            assert before.sequences() == after.sequences()
    stored = list(read_rollouts(tmp_path / "c" / "trainer" / "replay.jsonl"))
    assert [rollout.task_id for rollout in stored] == ["t2", "t2", "t1", "t1", "t0", "t0", "t0"]


def test_what_json_has_not(tmp_path: Path) -> None:
    group = waiting_group()
    group.rollouts[0].metrics = {"a": math.inf, "b": 1.0}
    group.rollouts[1].reward_components = {"c": math.nan}
    (tmp_path / "trainer").mkdir()
    write_replay(tmp_path, {1: [group, Group(task=Task("x", id="x"), rollouts=[])]})
    restored = read_replay(tmp_path)[1]
    assert len(restored) == 1
    assert restored[0].rollouts[0].metrics == {"b": 1.0}
    assert restored[0].rollouts[1].reward_components == {}
    assert group.rollouts[0].metrics == {"a": math.inf, "b": 1.0}


tokens = st.lists(
    st.tuples(st.integers(0, 200_000), st.floats(max_value=0.0, allow_nan=False, allow_infinity=False)),
    min_size=1,
    max_size=20,
)


@settings(max_examples=30, deadline=None)
@given(tokens, st.lists(st.integers(0, 200_000), min_size=1, max_size=5), st.floats(-1e300, 1e300))
def test_numbers_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    sampled: list[tuple[int, float]],
    prompt: list[int],
    reward: float,
) -> None:
    folder = tmp_path_factory.mktemp("replay")
    (folder / "trainer").mkdir()
    ids, log_probs = [token for token, _ in sampled], [value for _, value in sampled]
    group = waiting_group(rollouts=1)
    cut = len(ids) // 2
    spans = tuple(
        WeightSpan(f"v{end}", start, end) for start, end in ((0, cut), (cut, len(ids))) if start < end
    )
    group.rollouts[0].model_calls[1].tokens = CallTokens(prompt, ids, log_probs, spans)
    group.rollouts[0].reward = reward
    write_replay(folder, {0: [group]})
    rollout = read_replay(folder)[0][0].rollouts[0]
    restored = rollout.model_calls[1].tokens
    assert restored is not None
    assert (restored.prompt_token_ids, restored.generation_token_ids) == (prompt, ids)
    assert [value.hex() for value in restored.generation_log_probs] == [value.hex() for value in log_probs]
    assert restored.weight_versions == spans
    assert rollout.reward is not None
    assert rollout.reward.hex() == reward.hex()


def test_state_says_what_it_lacks(saved: tuple[Path, PreTrainedModel]) -> None:
    file = saved[0] / "trainer" / "state.json"
    record = json.loads(file.read_text())
    del record["position"]
    file.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"state\.json lacks position"):
        read_state(saved[0])
    assert set(record) == {"format", *TrainerState.__dataclass_fields__} - {"position"}
