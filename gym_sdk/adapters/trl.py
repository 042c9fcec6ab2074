"""Rollouts of this library inside TRL's `GRPOTrainer`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from anyio.from_thread import BlockingPortal, start_blocking_portal

from gym_sdk.adapters.trl_fields import trl_fields
from gym_sdk.client import GymClient
from gym_sdk.environments import Environment
from gym_sdk.errors import ConfigurationError
from gym_sdk.rollout import Deadlines, Limits, Sampling
from gym_sdk.rollout.source import as_task
from gym_sdk.schema import Group, Message, Rollout, Task
from gym_sdk.tools import ToolLike
from gym_sdk.verifiers import Verifier

if TYPE_CHECKING:
    from gym_sdk.grpo import WeightSync

__all__ = ["TRLRollouts"]


class TRLRollouts:
    """A `rollout_func` for TRL's `GRPOTrainer`: rollouts of tasks, with the weights that TRL trains.

    ```python
    with TRLRollouts(GymClient.local(folder), tasks, tools=[add], verifier=correct) as rollouts:
        trainer = GRPOTrainer(
            model=folder,
            args=GRPOConfig(...),
            train_dataset=Dataset.from_list(rollouts.rows()),
            rollout_func=rollouts,
            reward_funcs=reward_from_rollout,
        )
        trainer.train()
    ```

    TRL is synchronous: the client is opened and used on an event loop in a thread of its own, from entering
    the context until leaving it, so it also works where a loop runs already, as in notebooks. An interrupt
    cancels the rollouts in flight.

    Before the first rollouts, and whenever TRL has made a step since, the trained weights are pushed to the
    policy; their version is TRL's `global_step`.

    Args:
        client: not open; the context opens and closes it.
        tasks: tasks with unique ids, or texts; a task without id gets its position as id. `rows` makes the
            dataset of them.
        tools: functions that the policy may call.
        verifier: scores each rollout; its reward goes through TRL by `reward_from_rollout`.
        environment: tools, verifiers and per-rollout state in one, instead of `tools` and `verifier`.
        sampling: the temperature is TRL's; `max_output_tokens` is TRL's `max_completion_length` by default,
            for each model call. With a seed, each batch of rollouts gets its own seeds.
        deadlines: how long each thing may take.
        limits: how much runs at once, and how many model calls a rollout may make.
        sync: how weights reach the policy; `TensorSync(client)` by default. A peft model needs a `LoRASync`.

    Attributes:
        latest: the rollouts of the last batch, in the order of its prompts.

    Raises:
        ConfigurationError: there are no tasks, or two have the same id.
    """

    def __init__(
        self,
        client: GymClient,
        tasks: Iterable[Task | str],
        *,
        tools: Iterable[ToolLike] = (),
        verifier: Verifier | None = None,
        environment: Environment | None = None,
        sampling: Sampling | None = None,
        deadlines: Deadlines | None = None,
        limits: Limits | None = None,
        sync: WeightSync | None = None,
    ) -> None:
        self._client = client
        self._tasks = _by_id(tasks)
        self._options: dict[str, Any] = {
            "tools": tuple(tools),
            "verifier": verifier,
            "environment": environment,
            "deadlines": deadlines,
            "limits": limits,
        }
        self._sampling = sampling or Sampling()
        self._sync = sync
        self._portal: BlockingPortal | None = None
        self._stack = ExitStack()
        self._pushed: int | None = None
        self._batches = 0
        self.latest: list[Rollout] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            portal = stack.enter_context(start_blocking_portal())
            stack.enter_context(portal.wrap_async_context_manager(self._client))
            self._portal, self._stack = portal, stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._portal = self._pushed = None
        self._stack.__exit__(kind, error, traceback)

    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of a dataset for TRL, one for each task.

        `prompt` is one user message: the task's text, for TRL's logs, and its id, by which the task is found
        again. What the policy sees is the task itself. `task_id` is a column too.
        """
        return [
            {"prompt": [{"role": "user", "content": _text(task), "task_id": name}], "task_id": name}
            for name, task in self._tasks.items()
        ]

    def __call__(self, prompts: Sequence[Any], trainer: Any) -> dict[str, list[Any]]:
        """Roll out the tasks of some prompts: TRL calls this.

        Args:
            prompts: of the dataset of `rows`. TRL repeats each prompt for each of its generations, and gets
                one rollout for each entry.
            trainer: TRL's `GRPOTrainer`.

        Returns:
            The fields that TRL wants, as `trl_fields` describes them.

        Raises:
            ConfigurationError: outside of the context, a prompt is of another dataset, the temperatures
                differ, or the trainer has several processes or a peft model without a `sync` for it.
            GymError: all rollouts failed.
        """
        names = [self._task_id(prompt) for prompt in prompts]
        sampling = self._sampling_of(trainer, names)
        if trainer.state.global_step != self._pushed:
            self._push(trainer)
        self._batches += 1
        groups = self._run(self._collect, Counter(names), sampling)
        waiting = {group.task.id: iter(group.rollouts) for group in groups}
        self.latest = [next(waiting[name]) for name in names]
        processor = trainer.processing_class
        tokenizer = getattr(processor, "tokenizer", processor)
        return trl_fields(self.latest, filler=tokenizer.eos_token_id)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        if self._portal is None:
            raise ConfigurationError("use it as `with TRLRollouts(...) as rollouts`, and train inside")
        future = self._portal.start_task_soon(function, *arguments)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupt reaches this thread only
            raise

    def _push(self, trainer: Any) -> None:
        if trainer.accelerator.num_processes > 1:
            raise ConfigurationError(
                "TRLRollouts pushes weights from one process; with several, write a rollout_func of "
                "`trl_fields` and a push that fits how the weights are spread"
            )
        model = trainer.accelerator.unwrap_model(trainer.model)
        if self._sync is None:
            if hasattr(model, "peft_config"):
                raise ConfigurationError(
                    "a peft model needs sync=LoRASync(client, folder), and a server that takes adapters"
                )
            from gym_sdk.grpo import TensorSync

            self._sync = TensorSync(self._client)
        sync, step = self._sync, trainer.state.global_step

        async def push() -> None:
            await sync.push(model, version=str(step))

        self._run(push)
        self._pushed = step

    async def _collect(self, counts: Counter[str], sampling: Sampling) -> list[Group]:
        """Roll out each task as often as it was asked for; TRL asks for all equally often, as a rule."""
        by_size: dict[int, list[Task]] = {}
        for name, count in counts.items():
            by_size.setdefault(count, []).append(self._tasks[name])
        groups: list[Group] = []
        for size, tasks in by_size.items():
            collected = await self._client.collect(tasks, group_size=size, sampling=sampling, **self._options)
            groups += collected.groups
        return groups

    def _task_id(self, prompt: Any) -> str:
        name = prompt[-1].get("task_id") if isinstance(prompt, list) and prompt else None
        if name not in self._tasks:
            raise ConfigurationError(
                f"the prompt {str(prompt)[:200]!r} names none of the {len(self._tasks)} tasks; make the "
                "dataset of TRLRollouts.rows()"
            )
        return str(name)

    def _sampling_of(self, trainer: Any, names: Iterable[str]) -> Sampling:
        temperature, sampling = trainer.temperature, self._sampling
        for name in names:
            wanted = self._tasks[name].settings.get("temperature", sampling.temperature)
            if wanted not in (None, temperature):
                raise ConfigurationError(
                    f"task {name} is to be sampled at temperature {wanted}, but TRL takes log-probs at "
                    f"{temperature}; set GRPOConfig.temperature alone"
                )
        limit = sampling.max_output_tokens
        return replace(
            sampling,
            temperature=temperature,
            max_output_tokens=trainer.max_completion_length if limit is None else limit,
            seed=None if sampling.seed is None else sampling.seed + self._batches,
        )


def _by_id(tasks: Iterable[Task | str]) -> dict[str, Task]:
    found: dict[str, Task] = {}
    for index, given in enumerate(tasks):
        task = as_task(given)
        name = str(index) if task.id is None else task.id
        if name in found:
            raise ConfigurationError(f"two tasks have the id {name!r}; an id names one task")
        found[name] = task if task.id is not None else replace(task, id=name)
    if not found:
        raise ConfigurationError("TRLRollouts needs at least one task")
    return found


def _text(task: Task) -> str:
    return "\n".join(item.text for item in task.items() if isinstance(item, Message))
