"""TRL's own trainer on our rollouts: the real package, the real embedded engine, on the CPU."""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import math
import signal
import statistics
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.scripted import Answer, ScriptedTransport
from transformers import AutoModelForCausalLM, PreTrainedModel

from gym_sdk import GymClient, Task
from gym_sdk.adapters import TRLRollouts, reward_from_rollout
from gym_sdk.environments import Environment
from gym_sdk.environments.arithmetic import arithmetic_tasks, calculator
from gym_sdk.errors import ConfigurationError, GymError, TransportError
from gym_sdk.rollout import Limits, Sampling
from gym_sdk.schema import Outcome, ResponseRequest, Rollout

BESIDE = Path(sys.prefix) / "trl"  # where TRL is installed if it is not among the packages

if importlib.util.find_spec("trl") is None and (BESIDE / "trl").is_dir():
    sys.path.append(str(BESIDE))
needs_trl = pytest.mark.skipif(
    importlib.util.find_spec("trl") is None,
    reason=f"TRL is not installed: pip install --no-deps --target {BESIDE} trl==1.16.0",
)

pytestmark = [
    pytest.mark.timeout(240),
    # TRL 1.16 uses names that transformers 5.23 deprecates
    pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning"),
]

GROUP = 4
STEPS = 3
FAILING = "fails"


async def spread(rollout: Rollout) -> float:
    """Give each rollout of a group another reward; one task's second rollout fails instead."""
    if rollout.task.metadata.get(FAILING) and rollout.index == 1:
        raise RuntimeError("the verifier broke")
    return float(rollout.index)


def make_tasks() -> list[Task]:
    tasks = arithmetic_tasks(size=4, seed=3)
    return [
        Task(task.input, answer=task.answer, id=task.id, metadata={FAILING: number == 0})
        for number, task in enumerate(tasks)
    ]


@dataclass
class Run:
    """What TRL's loss got, and what the policy served, at each step."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    rollouts: list[tuple[int, list[Rollout], dict[str, list[Any]]]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    logs: list[dict[str, float]] = field(default_factory=list)
    changed: bool = False


@pytest.fixture(scope="module")
def run(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Three steps of TRL on two groups each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
        return train(tiny_policy, tmp_path_factory.mktemp("trl"))


def train(folder: Path, output: Path) -> Run:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    run = Run()

    class Watched(GRPOTrainer):  # type: ignore[misc]
        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Any:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                own, _, _ = self._get_per_token_logps_and_entropies(
                    model, ids, mask, inputs["completion_ids"].size(1)
                )
            loss = super()._compute_loss(model, inputs)
            run.batches.append({**inputs, "own": own})
            run.losses.append(loss.item())
            return loss

    config = GRPOConfig(
        output_dir=str(output),
        per_device_train_batch_size=2 * GROUP,
        num_generations=GROUP,
        max_steps=STEPS,
        learning_rate=1e-3,
        temperature=0.9,
        max_completion_length=64,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    with TRLRollouts(
        GymClient.local(folder, device="cpu"),
        make_tasks(),
        environment=Environment(tools=[calculator], verifier=spread),
        sampling=Sampling(seed=1),
        limits=Limits(max_turns=3),
    ) as rollouts:

        def watched(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
            fields = rollouts(prompts, trainer)
            run.rollouts.append((trainer.state.global_step, rollouts.latest, copy.deepcopy(fields)))
            return fields

        trainer = Watched(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(rollouts.rows()),
            rollout_func=watched,
            reward_funcs=reward_from_rollout,
        )
        trainer.train()
    run.changed = any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    run.logs = trainer.state.log_history
    return run


@needs_trl
def test_trl_recomputes_the_engines_log_probs_at_every_step(run: Run) -> None:
    assert len(run.batches) == STEPS
    for batch in run.batches:
        trained = (batch["completion_mask"] * batch["tool_mask"]).bool()
        difference = (batch["own"] - batch["sampling_per_token_logps"])[trained]
        assert difference.abs().max() < 1e-4  # after an update as well: the engine has the new weights


@needs_trl
def test_weights_are_pushed_before_each_steps_rollouts(run: Run) -> None:
    assert [step for step, _, _ in run.rollouts] == list(range(STEPS))
    for step, rollouts, _ in run.rollouts:
        spans = [span for rollout in rollouts for row in rollout.sequences() for span in row.weight_versions]
        assert {span.version for span in spans} == {str(step)}
    assert run.changed
    assert all(math.isfinite(loss) for loss in run.losses)


@needs_trl
def test_what_the_policy_sampled_is_trained_and_what_tools_said_is_not(run: Run) -> None:
    turns = set()
    for _, rollouts, fields in run.rollouts:
        for number, rollout in enumerate(rollouts):
            if rollout.outcome is Outcome.FAILED:
                continue
            calls = [call.tokens for call in rollout.model_calls if call.tokens is not None]
            turns.add(len(calls))
            whole = calls[-1].token_ids
            start = calls[0].prompt_length
            sampled = {at for call in calls for at in range(call.prompt_length, call.total_tokens)}
            assert fields["prompt_ids"][number] == whole[:start]
            assert fields["completion_ids"][number] == whole[start:]
            assert fields["env_mask"][number] == [int(at in sampled) for at in range(start, len(whole))]
    assert 2 in turns  # else no tool's output was there to be masked


@needs_trl
def test_the_loss_gets_each_rollout_with_its_advantage_over_its_group(run: Run) -> None:
    failed = 0
    for (_, rollouts, fields), batch in zip(run.rollouts, run.batches, strict=True):
        expected = []
        for first in range(0, len(rollouts), GROUP):
            rewards = [rollout.reward for rollout in rollouts[first : first + GROUP]]
            valid = [reward for reward in rewards if reward is not None]
            for number, reward in enumerate(rewards, start=first):
                advantage = 0.0
                if reward is None:
                    failed += 1
                    assert not any(fields["env_mask"][number])
                else:
                    advantage = (reward - statistics.mean(valid)) / (statistics.stdev(valid) + 1e-4)
                expected.append(
                    (fields["completion_ids"][number], fields["env_mask"][number], round(advantage, 4))
                )
        lengths = batch["completion_mask"].sum(1).tolist()
        got = [
            (ids[:length].tolist(), mask[:length].tolist(), round(advantage.item(), 4))
            for ids, mask, advantage, length in zip(
                batch["completion_ids"], batch["tool_mask"], batch["advantages"], lengths, strict=True
            )
        ]
        assert sorted(got) == sorted(expected)  # TRL shuffles
    assert failed == 1
    logged = [entry["rollouts/failed"] for entry in run.logs if "rollouts/failed" in entry]
    assert sorted(logged) == [0.0] * (STEPS - 1) + [1 / (2 * GROUP)]


def trainer_like(model: PreTrainedModel, *, step: int = 0, processes: int = 1) -> Any:
    """As much of TRL's trainer as a rollout function looks at."""
    return SimpleNamespace(
        state=SimpleNamespace(global_step=step),
        accelerator=SimpleNamespace(num_processes=processes, unwrap_model=lambda model: model),
        model=model,
        temperature=1.0,
        max_completion_length=6,
        processing_class=SimpleNamespace(eos_token_id=0),
    )


@pytest.fixture(scope="module")
def model(untrained_policy: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(untrained_policy, dtype=torch.float32)


def prompts_of(rollouts: TRLRollouts, *numbers: int) -> list[Any]:
    rows = rollouts.rows()
    return [rows[number]["prompt"] for number in numbers]


def test_inside_a_running_loop_with_seeds_that_differ_and_repeat(
    untrained_policy: Path, model: PreTrainedModel
) -> None:
    def sample() -> list[list[list[int]]]:
        client = GymClient.local(untrained_policy, device="cpu")
        with TRLRollouts(client, ["a", "b"], sampling=Sampling(seed=5)) as rollouts:  # no verifier
            asked = prompts_of(rollouts, 1, 0, 0, 1, 0)
            return [rollouts(asked, trainer_like(model))["completion_ids"] for _ in range(2)]

    async def notebook() -> list[list[list[int]]]:
        return sample()

    first, second = asyncio.run(notebook())
    assert all(len(ids) <= 6 for ids in first)  # TRL's max_completion_length
    assert len({tuple(ids) for ids in (*first, *second)}) == 10
    assert [first, second] == sample()


def test_rollouts_stand_where_their_prompts_do(untrained_policy: Path, model: PreTrainedModel) -> None:
    tasks = [Task("one", id="x"), Task("two", id="y")]
    with TRLRollouts(GymClient.local(untrained_policy, device="cpu"), tasks) as rollouts:
        rollouts(prompts_of(rollouts, 1, 0, 1, 1), trainer_like(model))
        assert [rollout.task.id for rollout in rollouts.latest] == ["y", "x", "y", "y"]
        assert [rollout.index for rollout in rollouts.latest] == [0, 0, 1, 2]


def test_an_interrupt_cancels_what_is_in_flight(model: PreTrainedModel) -> None:
    cancelled = threading.Event()

    async def hang(request: ResponseRequest) -> Answer:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()
        raise AssertionError

    client = GymClient.over(ScriptedTransport(hang))
    with pytest.raises(KeyboardInterrupt), TRLRollouts(client, ["a"]) as rollouts:
        rollouts(prompts_of(rollouts, 0), trainer_like(model))
    assert cancelled.is_set()


def test_what_cannot_be_done_is_refused(model: PreTrainedModel) -> None:
    def client() -> GymClient:
        return GymClient.over(ScriptedTransport(lambda request: TransportError("down", retryable=False)))

    with pytest.raises(ConfigurationError, match="at least one task"):
        TRLRollouts(client(), [])
    with pytest.raises(ConfigurationError, match="two tasks have the id 'x'"):
        TRLRollouts(client(), [Task("a", id="x"), Task("b", id="x")])
    outside = TRLRollouts(client(), ["a"])
    with pytest.raises(ConfigurationError, match="with TRLRollouts"):
        outside(prompts_of(outside, 0), trainer_like(model))
    with TRLRollouts(client(), ["a"], sampling=Sampling(temperature=0.5)) as rollouts:
        with pytest.raises(ConfigurationError, match=r"temperature 0\.5, but TRL takes log-probs at 1\.0"):
            rollouts(prompts_of(rollouts, 0), trainer_like(model))
    with TRLRollouts(client(), ["a"]) as rollouts:
        with pytest.raises(ConfigurationError, match="names none of the 1 tasks"):
            rollouts([[{"role": "user", "content": "a"}]], trainer_like(model))
        with pytest.raises(ConfigurationError, match="one process"):
            rollouts(prompts_of(rollouts, 0), trainer_like(model, processes=2))
        with pytest.raises(ConfigurationError, match="LoRASync"):
            rollouts(prompts_of(rollouts, 0), trainer_like(SimpleNamespace(peft_config={})))
        with pytest.raises(
            GymError, match=r"none of 1 rollouts has a token to train on.*TransportError: down"
        ):
            rollouts(prompts_of(rollouts, 0), trainer_like(model))
