"""`gym-sdk rollout`: collect rollouts of the tasks in a file."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gym_sdk.cli._loading import load_object
from gym_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from gym_sdk.rollout import Collection
    from gym_sdk.schema import Task

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "rollout", help="collect rollouts of the tasks in a JSONL file", description=__doc__
    )
    parser.add_argument("tasks", metavar="TASKS.jsonl", type=Path)
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        help="API root of a server, repeatable for replicas; an embedded engine by default",
    )
    parser.add_argument("--model", help="the model's name on the server, or a folder for the embedded engine")
    parser.add_argument(
        "--out",
        "--store",
        type=Path,
        help="JSONL file for the rollouts (zstd if it ends in .zst); if it is there, the run goes on from it",
    )
    parser.add_argument("--verifier", help="module:name of a verifier", default=None)
    parser.add_argument("--tool", action="append", default=[], help="module:name of a tool; repeatable")
    parser.add_argument("--group-size", type=int, default=1, help="rollouts of each task")
    parser.add_argument("--spare", type=int, default=0, help="more of each, of which the last are cancelled")
    parser.add_argument("--epochs", type=int, default=1, help="how often all tasks are attempted")
    parser.add_argument("--concurrency", type=int, default=256, help="rollouts at once")
    parser.add_argument(
        "--model-calls", type=int, help="model calls at once; no limit of their own by default"
    )
    parser.add_argument("--max-turns", type=int, default=16, help="model calls of one rollout")
    parser.add_argument(
        "--keep-partial",
        action="store_true",
        help="store rollouts that a signal cuts off, to go on from them",
    )
    parser.add_argument(
        "--track",
        metavar="WHERE",
        help="where metrics go while it runs: wandb:PROJECT, trackio:PROJECT, tensorboard:DIR or jsonl:FILE",
    )
    parser.add_argument("--max-output-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Collect, print the table, and report whether every rollout ended with an outcome of its own.

    SIGINT and SIGTERM end it properly: nothing goes on in the server, and the file is whole.
    """
    if arguments.keep_partial and arguments.out is None:
        raise ConfigurationError("--keep-partial needs a file to keep them in: --out FILE")
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    from gym_sdk.environments import load_tasks
    from gym_sdk.rollout.signals import stop_on_signals

    tasks = load_tasks(arguments.tasks)
    collection = None
    async with stop_on_signals() as stop:
        collection = await _collect(arguments, tasks)
    if collection is not None:
        print(collection)
    if stop.signal is not None:
        print(f"gym-sdk rollout: {_how_to_go_on(stop.signal.name, arguments.out)}", file=sys.stderr)
        return stop.exit_status
    return 1 if collection is None or collection.failures else 0


async def _collect(arguments: argparse.Namespace, tasks: Sequence[Task]) -> Collection:
    from gym_sdk.client import GymClient
    from gym_sdk.rollout import DynamicSampling, Limits, Sampling, Schedule
    from gym_sdk.trackers import tracker_for

    if arguments.url:
        client = GymClient(arguments.url, model=arguments.model)
    else:
        client = GymClient.local(arguments.model)
    async with AsyncExitStack() as stack:
        tracker = tracker_for(arguments.track) if arguments.track else None
        if tracker is not None:
            stack.push_async_callback(tracker.aclose)
        await stack.enter_async_context(client)
        return await client.collect(
            tasks,
            tools=[load_object(name) for name in arguments.tool],
            verifier=load_object(arguments.verifier) if arguments.verifier else None,
            group_size=arguments.group_size,
            sampling=Sampling(
                temperature=arguments.temperature,
                max_output_tokens=arguments.max_output_tokens,
                seed=arguments.seed,
            ),
            limits=Limits(
                concurrency=arguments.concurrency,
                max_turns=arguments.max_turns,
                model_calls=arguments.model_calls,
            ),
            schedule=Schedule(epochs=arguments.epochs),
            dynamic=DynamicSampling(spare=arguments.spare),
            store=arguments.out,
            keep_partial=arguments.keep_partial,
            progress=sys.stderr.isatty(),
            tracker=tracker,
        )


def _how_to_go_on(signal_name: str, store: Path | None) -> str:
    if store is None:
        return f"stopped by {signal_name}; nothing was kept (--out FILE keeps what is finished)"
    return (
        f"stopped by {signal_name}; what was finished is in {store}, and the same command goes on from there"
    )
