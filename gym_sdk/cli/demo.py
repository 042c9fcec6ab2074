"""`gym-sdk demo`: a tiny policy learns to use a calculator, on this machine, in minutes.

The whole chain: a policy made here, served over HTTP by a process of its own, rollouts with a tool and a
verifier, GRPO on the exact tokens, weight sync, a learning curve.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import resource
import shutil
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_sdk.cli._extras import needs_extra
from gym_sdk.cli._quiet import quiet_transformers
from gym_sdk.cli.serve import add_backend_arguments
from gym_sdk.cli.tiny import show_progress

if TYPE_CHECKING:
    from gym_sdk.grpo import EvalResult, GRPOTrainer, TrainStep
    from gym_sdk.schema import Rollout

__all__ = ["DemoConfig", "add_parser", "run_demo"]

_BAR = 30
_MISMATCH = 1e-4  # engine against trainer, before the update
_SPLIT_SEED = 1_000_003  # keeps the seeds of training and held-out tasks apart


@dataclass(frozen=True, slots=True)
class DemoConfig:
    """What the demo trains, and for how long."""

    family: str = "chain_sum"
    """Tasks: `chain_sum`, or the harder `basic_arithmetic`."""
    seed: int = 0
    """Seeds tasks, sampling and the trainer."""
    steps: int = 50
    """Steps of GRPO."""
    tasks_per_step: int = 32
    """Groups of each step."""
    group_size: int = 8
    """Rollouts of each group."""
    held_out: int = 256
    """Tasks of each evaluation; none of them is ever trained on."""
    out: Path = Path("runs/demo")
    """Folder for rollouts, metrics, checkpoint and curve."""
    backend: str = "transformers"
    """What generates: the embedded engine, or `sglang`, which honours no seeds."""
    sglang_python: str | None = None
    """Interpreter of an environment with SGLang; see `SGLangOptions.python`."""
    device: str | None = None
    """Where it generates; a GPU if this environment's torch sees one, by default."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    default = DemoConfig()
    parser: argparse.ArgumentParser = commands.add_parser(
        "demo", help="watch a tiny policy learn to use a tool", description=__doc__
    )
    parser.add_argument("--family", default=default.family, choices=["chain_sum", "basic_arithmetic"])
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--steps", type=int, default=default.steps)
    parser.add_argument("--tasks-per-step", type=int, default=default.tasks_per_step)
    parser.add_argument("--group-size", type=int, default=default.group_size)
    parser.add_argument("--held-out", type=int, default=default.held_out, help="tasks of each evaluation")
    parser.add_argument("--out", type=Path, default=default.out)
    add_backend_arguments(parser)
    parser.add_argument("--device", help="cpu, cuda, ...; a GPU if there is one, by default")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo; the exit status says whether it learned on-policy."""
    names = DemoConfig.__dataclass_fields__
    config = DemoConfig(**{name: getattr(arguments, name) for name in names})
    summary = asyncio.run(run_demo(config))
    return 0 if summary["on_policy"] else 1


async def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Run the demo, printing as it goes; return its summary."""
    with needs_extra("demo"):
        import matplotlib  # noqa: F401 - better now than after the training
        import reasoning_gym  # noqa: F401

        from gym_sdk.grpo import evaluate

        quiet_transformers()
    started = time.perf_counter()
    out = _fresh_folder(config.out)
    print(f"gym-sdk demo: {config.family} with a calculator, seed {config.seed}, results in {out}/")
    model = await _tiny_policy()
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(_Session(config, out, model))
        print("[3/5] evaluating on held-out tasks ...", flush=True)
        before = await evaluate(session.held_out_rollouts, session.held_out)
        print(f"      held-out reward before: {_reward(before)}")
        trainer = await stack.enter_async_context(session.trainer())
        steps = await _train(trainer, config)
        await trainer.save(out / "checkpoint")
        print("[5/5] evaluating on the same held-out tasks ...", flush=True)
        after = await evaluate(session.held_out_rollouts, session.held_out)
        print(f"      held-out reward after: {_reward(after)}  (before: {_reward(before)})")
    shutil.rmtree(out / "weights", ignore_errors=True)  # the checkpoint has the last ones
    _show_example(before, after)
    summary = _summary(config, before, after, steps, time.perf_counter() - started)
    _leave_results(out, summary, steps)
    return summary


async def _tiny_policy() -> Path:
    import anyio.to_thread

    from backends.tiny import cached_tiny_policy

    print("[1/5] a tiny policy, made on this machine (about a minute, then cached) ...", flush=True)
    started = time.perf_counter()
    path = await anyio.to_thread.run_sync(lambda: cached_tiny_policy(progress=show_progress))
    print(f"\r      {path}, {time.perf_counter() - started:.0f} s{'':40}")
    return path


class _Session:
    """The server's process, the client, and what rollouts need."""

    def __init__(self, config: DemoConfig, out: Path, model: Path) -> None:
        from gym_sdk.environments import arithmetic, arithmetic_tasks

        self._config = config
        self._out = out
        self._model = model
        self._stack = AsyncExitStack()
        self._environment = arithmetic(config.family)  # type: ignore[arg-type]
        make = partial(arithmetic_tasks, config.family)  # type: ignore[arg-type]
        # As many tasks as are drawn: no epoch repeats one.
        self.train = make(size=config.steps * config.tasks_per_step, seed=config.seed)
        self.held_out = make(size=config.held_out, seed=_SPLIT_SEED, split="held_out")

    async def __aenter__(self) -> _Session:
        from gym_sdk.client import GymClient
        from gym_sdk.launch import launch_server

        behind = ", SGLang behind it" if self._config.backend == "sglang" else ""
        print(f"[2/5] serving it over HTTP, in a process of its own{behind} ...", flush=True)
        started = time.perf_counter()
        async with AsyncExitStack() as stack:
            url = await stack.enter_async_context(
                launch_server(
                    self._model, arguments=self._serving(), log=self._out / "server.log", start_s=300.0
                )
            )
            self.client = await stack.enter_async_context(GymClient(url, model="policy"))
            self._stack = stack.pop_all()
        print(f"      {url}, {time.perf_counter() - started:.0f} s")
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._stack.aclose()

    def _serving(self) -> list[str]:
        """Return the arguments of `gym-sdk serve`."""
        config = self._config
        said = {"--device": config.device}
        if config.backend == "sglang":
            said |= {
                "--backend": "sglang",
                "--dtype": "float32",
                "--sglang-log": str(self._out / "sglang.log"),
                "--sglang-python": config.sglang_python,
            }
        return [part for name, value in said.items() if value is not None for part in (name, value)]

    def held_out_rollouts(self, tasks: Any) -> Any:
        """Start one rollout of each task."""
        return self._rollouts(tasks, group_size=1)

    def trainer(self) -> GRPOTrainer:
        """Return the trainer over training tasks and this session's rollouts."""
        from transformers import AutoModelForCausalLM

        from gym_sdk.grpo import FolderSync, GRPOConfig, GRPOTrainer, OptimizerConfig

        config = self._config
        return GRPOTrainer(
            AutoModelForCausalLM.from_pretrained(str(self._model)),
            rollouts=partial(
                self._rollouts, group_size=config.group_size, store=self._out / "rollouts.jsonl"
            ),
            tasks=self.train,
            sync=FolderSync(self.client, self._out / "weights"),
            config=GRPOConfig(
                optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=5),
                tasks_per_step=config.tasks_per_step,
                seed=config.seed,
                max_steps=config.steps,
            ),
            output_dir=self._out,
            tokenizer_dir=self._model,
        )

    def _rollouts(self, tasks: Any, **options: Any) -> Any:
        from gym_sdk.rollout import Limits, Sampling

        return self.client.rollouts(
            tasks,
            environment=self._environment,
            sampling=Sampling(
                temperature=1.0,
                max_output_tokens=96,
                seed=self._config.seed if self._config.backend == "transformers" else None,
            ),
            limits=Limits(concurrency=256, max_turns=4),
            **options,
        )


async def _train(trainer: GRPOTrainer, config: DemoConfig) -> list[TrainStep]:
    rollouts = config.tasks_per_step * config.group_size
    print(f"[4/5] GRPO: {config.steps} steps of {config.tasks_per_step} x {config.group_size} = {rollouts}")
    print(f"      {'step':>4}  {'reward':<{_BAR + 6}}  tools  mismatch  tokens/s  seconds")
    steps: list[TrainStep] = []
    async for step in trainer:
        # What is kept of a step are its numbers; its rollouts are in the store.
        step.groups.clear()
        steps.append(step)
        numbers = step.metrics
        reward = numbers["reward_mean"]
        filled = round(_BAR * reward)
        print(
            f"      {step.index:>4}  {reward:.2f} [{'#' * filled}{'.' * (_BAR - filled)}]"
            f"  {numbers['tool_calls_mean']:>5.2f}  {numbers.get('max_logprob_diff', 0.0):>8.1e}"
            f"  {numbers['rollout_tokens_per_s']:>8.0f}  {step.seconds:>7.1f}",
            flush=True,
        )
    return steps


def _show_example(before: EvalResult, after: EvalResult) -> None:
    from gym_sdk.view import describe_rollout

    old, new = _example(before, after)
    print(f"\nBefore:\n{describe_rollout(old)}\n\nAfter:\n{describe_rollout(new)}\n")


def _example(before: EvalResult, after: EvalResult) -> tuple[Rollout, Rollout]:
    """Return one held-out task's rollouts; one that was learned, if there is one."""
    pairs = [(old.rollouts[0], new.rollouts[0]) for old, new in zip(before.groups, after.groups, strict=True)]
    learned = [pair for pair in pairs if pair[0].reward == 0.0 and pair[1].reward == 1.0]
    return (learned or pairs)[0]


def _summary(
    config: DemoConfig, before: EvalResult, after: EvalResult, steps: list[TrainStep], seconds: float
) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    server_peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    mismatch = max((step.metrics.get("max_logprob_diff", 0.0) for step in steps), default=0.0)
    return {
        "family": config.family,
        "backend": config.backend,
        "seed": config.seed,
        "steps": len(steps),
        "held_out_before": before.mean_reward,
        "held_out_before_error": before.standard_error,
        "held_out_after": after.mean_reward,
        "held_out_after_error": after.standard_error,
        "held_out_tasks": config.held_out,
        "failed_rollouts": sum(step.metrics["failed"] for step in steps),
        "forks": sum(step.metrics["forks"] for step in steps),
        "max_logprob_diff": mismatch,
        "on_policy": mismatch <= _MISMATCH,
        "seconds": seconds,
        "training_seconds": sum(step.seconds for step in steps),
        "peak_memory_mib": {"trainer": peak / 1024, "server": server_peak / 1024},
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
    }


def _leave_results(out: Path, summary: dict[str, Any], steps: list[TrainStep]) -> None:
    from gym_sdk.view import save_learning_curve

    save_learning_curve(
        [step.metrics["reward_mean"] for step in steps],
        out / "reward.png",
        held_out={0: summary["held_out_before"], len(steps): summary["held_out_after"]},
        title=f"{summary['family']} with a calculator, seed {summary['seed']}",
    )
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    memory = sum(summary["peak_memory_mib"].values()) / 1024
    verdict = "equal" if summary["on_policy"] else "DIFFER"
    print(
        f"held-out reward {summary['held_out_before']:.2f} -> {summary['held_out_after']:.2f}"
        f" in {summary['seconds']:.0f} s, {memory:.1f} GiB\n"
        f"log-probs of engine and trainer {verdict}: at most {summary['max_logprob_diff']:.1e} apart"
        f" (limit {_MISMATCH:.0e}); failed rollouts: {summary['failed_rollouts']:.0f},"
        f" forks: {summary['forks']:.0f}\n"
        f"look at {out}/reward.png, {out}/rollouts.jsonl, {out}/metrics.jsonl, {out}/checkpoint/"
    )


def _reward(result: EvalResult) -> str:
    error = f" ± {result.standard_error:.3f}" if result.standard_error is not None else ""
    return "none" if result.mean_reward is None else f"{result.mean_reward:.3f}{error}"


def _fresh_folder(path: Path) -> Path:
    """Make the folder; an earlier run's results move aside."""
    if path.exists():
        stamp = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y%m%d-%H%M%S")
        path.rename(path.with_name(f"{path.name}-{stamp}"))
    path.mkdir(parents=True)
    return path
