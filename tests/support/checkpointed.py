"""Runs to be checkpointed: a tiny model, its optimizer, and groups that wait to be trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gym_sdk.grpo.checkpoints import TrainerState
from gym_sdk.schema import Group, Message, ModelCall, Rollout, Task, Timing
from gym_sdk.tokens import CallTokens, WeightSpan

__all__ = ["state_at", "tiny_model", "tiny_optimizer", "update", "waiting_group"]


def tiny_model(seed: int = 0, *, hidden: int = 8, vocab: int = 16, layers: int = 1) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def tiny_optimizer(model: torch.nn.Module, **settings: Any) -> Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [[p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]]
    return AdamW([{"params": group} for group in groups if group], **({"lr": 1e-2} | settings))


def update(model: Any, optimizer: Optimizer) -> None:
    """One update on random tokens."""
    ids = torch.randint(0, model.config.vocab_size, (2, 6))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def state_at(step: int, **fields: Any) -> TrainerState:
    values = {"position": step + 1, "weight_step": step, "tasks": "abc", "config": {"learning_rate": 1e-2}}
    return TrainerState(step=step, **(values | fields))


def waiting_group(number: int = 0, *, rollouts: int = 2, epoch: int = 0) -> Group:
    """A group of two-turn rollouts whose second call extends the first, sampled by two versions."""
    task = Task(
        [Message(role="user", content=f"question {number} ü\u2028")], answer={"n": [number]}, id=f"t{number}"
    )
    return Group(task=task, rollouts=[_rollout(task, index, epoch) for index in range(rollouts)], epoch=epoch)


def _rollout(task: Task, index: int, epoch: int) -> Rollout:
    first = CallTokens([1, 2], [3, 4], [-0.1, -1 / 3], (WeightSpan("step-000001", 0, 2),))
    spans = (WeightSpan("step-000001", 0, 1), WeightSpan("step-000002", 1, 3))
    second = CallTokens.extending(first, [5], [6, 7, 8], [-1e-300, -2 / 3, -17.25], spans)
    items = [*task.items(), Message(role="assistant", content="a"), Message(role="assistant", content="b")]
    calls = [
        ModelCall(response_id=f"r{number}", first_item=number, end_item=number + 1, tokens=tokens)
        for number, tokens in enumerate((first, second), start=1)
    ]
    return Rollout(
        id=f"{task.id}/{index}",
        task=task,
        index=index,
        epoch=epoch,
        items=items,
        input_items=1,
        model_calls=calls,
        reward=0.1 + 0.2 * index,
        reward_components={"right": 0.1},
        metrics={"tool_calls": 1.0},
        timing=Timing(started_at=1_000_000.125, duration_s=0.1),
    )
