"""Small models and groups that the tests of this folder share, as factories."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from gym_sdk.schema import Failure, Group, ModelCall, Outcome, Rollout, Task, Timing
from gym_sdk.tokens import CallTokens, TokenSequence

VOCAB = 16


def build_model(
    architecture: str = "qwen3", *, seed: int = 0, hidden: int = 32, layers: int = 2, vocab: int = VOCAB
) -> PreTrainedModel:
    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": 64,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if architecture == "llama":
            model = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**sizes, tie_word_embeddings=True))
        with torch.no_grad():  # transformers' init is so flat that all tokens would be equally likely
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0.0, parameter.shape[1] ** -0.5)
    return model.eval()


def build_rollout(
    task: Task,
    index: int = 0,
    *,
    calls: Sequence[CallTokens | None] = (),
    reward: float | None = None,
    outcome: Outcome = Outcome.COMPLETED,
    failure: Failure | None = None,
) -> Rollout:
    return Rollout(
        id=f"{task.id}/{index}",
        task=task,
        index=index,
        model_calls=[
            ModelCall(response_id=f"r{number}", first_item=0, end_item=0, tokens=call)
            for number, call in enumerate(calls)
        ],
        reward=reward,
        outcome=outcome,
        failure=failure,
        timing=Timing(started_at=0.0),
    )


def build_rows(
    model: PreTrainedModel, count: int, *, seed: int = 0, noise: float = 0.0
) -> list[TokenSequence]:
    """Rows of different lengths whose log-probs are the model's own, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for number in range(count):
        prompt, size = 2 + number % 3, 3 + (5 * number) % 7
        ids = torch.randint(0, model.config.vocab_size, (prompt + size,), generator=generator)
        with torch.no_grad():
            table = model(input_ids=ids[None]).logits[0].log_softmax(-1)
        exact = table[torch.arange(prompt - 1, prompt + size - 1), ids[prompt:]]
        shift = noise * torch.randn(size, generator=generator)
        rows.append(
            TokenSequence(
                ids.tolist(),
                [0] * prompt + [1] * size,
                [0.0] * prompt + (exact + shift).tolist(),
                advantage=float(torch.randn((), generator=generator)),
                rollout_id=f"rollout-{number}",
            )
        )
    return rows


class Sampler:
    """A source of groups: samples from the model by plain forward passes, with torch's global generator."""

    def __init__(
        self,
        model: PreTrainedModel,
        reward: Callable[[list[int]], float],
        *,
        group_size: int = 4,
        new_tokens: int = 6,
    ) -> None:
        self.model = model
        self.reward = reward
        self.group_size = group_size
        self.new_tokens = new_tokens
        self.asked: list[list[str | None]] = []

    @asynccontextmanager
    async def __call__(self, tasks: Sequence[Task], /) -> AsyncIterator[AsyncIterator[Group]]:
        self.asked.append([task.id for task in tasks])
        yield self._groups(tasks)

    async def _groups(self, tasks: Sequence[Task]) -> AsyncIterator[Group]:
        for task in reversed(tasks):  # an order of its own, as a real stream has
            yield self.group(task)

    @torch.no_grad()
    def group(self, task: Task) -> Group:
        prompt = [1, 2 + int(task.metadata.get("prompt", 0))]
        ids = torch.tensor([prompt] * self.group_size)
        log_probs = []
        for _ in range(self.new_tokens):
            table = self.model(input_ids=ids).logits[:, -1].log_softmax(-1)
            chosen = torch.multinomial(table.exp(), 1)
            log_probs.append(table.gather(1, chosen))
            ids = torch.cat([ids, chosen], dim=1)
        scores = torch.cat(log_probs, dim=1).tolist()
        rollouts = []
        for index, (row, score) in enumerate(zip(ids[:, len(prompt) :].tolist(), scores, strict=True)):
            call = CallTokens(prompt, row, score)
            rollouts.append(build_rollout(task, index, calls=[call], reward=self.reward(row)))
        return Group(task=task, rollouts=rollouts)


class FixedSource:
    """A source that gives the same groups at every step."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = groups

    @asynccontextmanager
    async def __call__(self, tasks: Sequence[Task], /) -> AsyncIterator[AsyncIterator[Group]]:
        yield self._stream()

    async def _stream(self) -> AsyncIterator[Group]:
        for group in self.groups:
            yield group


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    return build_model


@pytest.fixture
def make_rollout() -> Callable[..., Rollout]:
    return build_rollout


@pytest.fixture
def make_rows() -> Callable[..., list[TokenSequence]]:
    return build_rows


@pytest.fixture
def make_sampler() -> type[Sampler]:
    return Sampler


@pytest.fixture
def make_source() -> type[FixedSource]:
    return FixedSource


@pytest.fixture
def tasks() -> list[Task]:
    return [Task(f"task {index}", id=f"t{index}", metadata={"prompt": index % 4}) for index in range(8)]


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors gain nothing from threads, and the machine has other work."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """What a test samples must not depend on the tests before it: a group without variance trains nothing."""
    torch.manual_seed(0)
