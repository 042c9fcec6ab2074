"""What `trainer.py` measures: rows, and trainers that take steps on them, each in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from _peers.measure import forget_peak, peak_rss_mib
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from gym_sdk.grpo import GRPOConfig, minibatches
from gym_sdk.grpo.learner import Learner
from gym_sdk.grpo.optim import OptimizerConfig
from gym_sdk.grpo.packing import pack_rows, plan_micro_batches
from gym_sdk.tokens import TokenSequence

LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Sizes:
    """Of a Qwen3 with tied embeddings and random weights."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    head_size: int


TINY = Sizes(vocab=360, hidden=128, intermediate=576, layers=3, heads=4, key_heads=2, head_size=32)
"""The sizes of `backends.tiny`."""
WIDE = Sizes(vocab=151_665, hidden=384, intermediate=1152, layers=6, heads=6, key_heads=2, head_size=64)
"""Few layers under the vocabulary of Qwen's models."""
DEEP = Sizes(vocab=4096, hidden=512, intermediate=1536, layers=8, heads=8, key_heads=4, head_size=64)


def build_model(sizes: Sizes) -> PreTrainedModel:
    """Build a model; the same one each time."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=sizes.vocab,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        head_dim=sizes.head_size,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config).float().eval()


@dataclass(frozen=True)
class Workload:
    """What one step trains on: groups of rows with a common prompt. Ranges include both ends.

    Attributes:
        sizes: of the model.
        groups: how many.
        rows: of a group.
        prompt: tokens of a group's prompt.
        completion: tokens of a row's completion.
    """

    sizes: Sizes
    groups: int
    rows: int
    prompt: tuple[int, int]
    completion: tuple[int, int]

    def packed_tokens(self, rows: int) -> int:
        """Return the most tokens that so many rows of whole groups have, their prompts counted once."""
        return -(-rows * self.prompt[1] // self.rows) + rows * self.completion[1]

    def draw(self) -> list[list[TokenSequence]]:
        """Draw token ids at random, advantages centred in each group, and the model's own log-probs."""
        chance = torch.Generator().manual_seed(0)
        model = build_model(self.sizes)
        return [self._group(number, model, chance) for number in range(self.groups)]

    def _group(self, number: int, model: PreTrainedModel, chance: torch.Generator) -> list[TokenSequence]:
        def ids(bounds: tuple[int, int]) -> list[int]:
            size = int(torch.randint(bounds[0], bounds[1] + 1, (), generator=chance))
            return torch.randint(2, self.sizes.vocab, (size,), generator=chance).tolist()

        prompt = ids(self.prompt)
        advantages = torch.randn(self.rows, generator=chance)
        advantages -= advantages.mean()
        rows = []
        for advantage in advantages.tolist():
            completion = ids(self.completion)
            row = TokenSequence(
                prompt + completion,
                [0] * len(prompt) + [1] * len(completion),
                [0.0] * len(prompt) + sampled_at(model, prompt, completion),
                advantage=advantage,
                task_id=str(number),
            )
            rows.append(row)
        return rows


@torch.no_grad()
def sampled_at(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> list[float]:
    """Return the log-probs of a completion's tokens."""
    logits = model(input_ids=torch.tensor([prompt + completion]), logits_to_keep=len(completion) + 1).logits
    table = logits[0, :-1].log_softmax(-1)
    return table.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


@dataclass(frozen=True)
class Step:
    """What one optimizer step took and gave.

    Attributes:
        seconds: from rows to updated weights.
        cpu_s: the process's CPU time meanwhile, all threads; other work on the machine disturbs it less.
        peak_mib: the most resident memory during the step, less what was there before the first one (code,
            weights, rows): gradients, AdamW's moments, activations, logits and whatever is left unused.
        loss: before the update.
        grad_norm: before clipping.
    """

    seconds: float
    cpu_s: float
    peak_mib: float
    loss: float
    grad_norm: float


class Turns:
    """A trainer's side of the measurement: it waits for its turn, then one step is measured."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._base_mib: float | None = None
        self._started = self._ended = (0.0, 0.0)
        self._peak_mib = 0.0

    def begin(self) -> None:
        """Wait for the turn. The first call says that everything is ready."""
        if self._base_mib is None:
            gc.collect()
            with suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # glibc: what loading left behind is no part of a step
            self._base_mib = rss_mib()
            self._pipe.send(None)
        self._pipe.recv()
        forget_peak()
        self._started = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Stop the clock: the weights are updated."""
        assert self._base_mib is not None
        self._ended = time.perf_counter(), time.process_time()
        self._peak_mib = peak_rss_mib() - self._base_mib

    def report(self, loss: float, grad_norm: float) -> None:
        """Send what was measured."""
        seconds, cpu_s = (end - start for start, end in zip(self._started, self._ended, strict=True))
        self._pipe.send(Step(seconds, cpu_s, self._peak_mib, loss, grad_norm))


def rss_mib() -> float:
    """Return this process's resident memory."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


Groups = Sequence[Sequence[TokenSequence]]
Trainer = Callable[[Sizes, Groups, Turns], None]


def ours(sizes: Sizes, groups: Groups, turns: Turns, **settings: Any) -> None:
    """Take steps with this project's learner: all groups in one update."""
    optimizer = OptimizerConfig(learning_rate=LEARNING_RATE)
    learner = Learner(build_model(sizes), GRPOConfig(minibatches=1, optimizer=optimizer, **settings))
    stop = threading.Event()
    while True:
        turns.begin()
        metrics = learner.learn(groups, step=1, stop=stop)
        turns.end()
        turns.report(metrics["loss"], metrics["grad_norm"])


def unshared(sizes: Sizes, groups: Groups, turns: Turns, **settings: Any) -> None:
    """Do as `ours`, with prefixes computed in each row; the learner itself has no such setting."""
    minibatches.pack_rows = partial(pack_rows, share_prefixes=False)
    minibatches.plan_micro_batches = partial(plan_micro_batches, share_prefixes=False)
    ours(sizes, groups, turns, **settings)


def trl(sizes: Sizes, groups: Groups, turns: Turns, *, rows: int, **settings: Any) -> None:
    """Take steps with TRL's trainer: its own training loop over the same rows, given by its `rollout_func`.

    The clock starts when TRL has the batch, padded and with advantages; what is left is to shuffle the rows,
    to cut them into micro-batches of `rows`, and the update. It stops after that.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    warnings.simplefilter("ignore", FutureWarning)  # TRL 1.16 uses names that transformers 5.23 deprecates
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Measured(GRPOTrainer):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            turns.begin()
            return batch

    class Reports(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.end()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            turns.report(float(logs["loss"]), float(logs["grad_norm"]))

    def rollouts(prompts: list[str], _: Any) -> dict[str, list[Any]]:
        waiting = {group[0].task_id: iter(group) for group in groups}
        chosen = [next(waiting[prompt]) for prompt in prompts]
        starts = [row.loss_mask.index(1) for row in chosen]
        return {
            "prompt_ids": [row.token_ids[:start] for row, start in zip(chosen, starts, strict=True)],
            "completion_ids": [row.token_ids[start:] for row, start in zip(chosen, starts, strict=True)],
            "logprobs": [row.log_probs[start:] for row, start in zip(chosen, starts, strict=True)],
            "advantage": [row.advantage for row in chosen],
        }

    def reward(*, advantage: list[float], **_: Any) -> list[float]:
        return advantage  # centred already, so with scale_rewards="none" TRL leaves it as it is

    count = sum(len(group) for group in groups)
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    with TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=count // rows,
            num_generations=len(groups[0]),
            max_completion_length=2048,
            max_steps=1_000_000,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            loss_type="dapo",
            epsilon_high=0.28,
            beta=0.0,
            scale_rewards="none",
            use_cpu=True,
            bf16=False,
            report_to=[],
            logging_steps=1,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **settings,
        )
        trainer = Measured(
            model=build_model(sizes),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": group[0].task_id} for group in groups]),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="<pad>", eos_token="<eos>"
            ),
            rollout_func=rollouts,
            reward_funcs=reward,
            callbacks=[Reports()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@dataclass(frozen=True)
class Program:
    """A trainer with its settings.

    Attributes:
        name: for the table.
        trainer: what runs.
        settings: what is not its default.
    """

    name: str
    trainer: Callable[..., None]
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Worker:
    """A trainer that takes a step whenever it is asked to."""

    pipe: Connection

    def step(self) -> Step:
        """Have one step taken."""
        self.pipe.send(True)
        step: Step = self.pipe.recv()
        return step


@contextmanager
def worker(program: Program, sizes: Sizes, groups: Groups, threads: int) -> Iterator[Worker]:
    """Start a trainer in a process of its own, and end it.

    Raises:
        EOFError: the trainer ended; it has written why.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    trainer = partial(program.trainer, **program.settings)
    process = context.Process(target=work, args=(there, trainer, sizes, groups, threads), daemon=True)
    process.start()
    there.close()
    try:
        here.recv()
        yield Worker(here)
    finally:
        process.kill()
        process.join()


def work(pipe: Connection, trainer: Trainer, sizes: Sizes, groups: Groups, threads: int) -> None:
    """Run a trainer until nobody asks for more steps."""
    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    trainer(sizes, groups, Turns(pipe))
