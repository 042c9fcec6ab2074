"""`gym-sdk rollout`: collect rollouts of the tasks in a file."""

from __future__ import annotations

import argparse
import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any

from gym_sdk.errors import ConfigurationError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "rollout", help="collect rollouts of the tasks in a JSONL file", description=__doc__
    )
    parser.add_argument("tasks", metavar="TASKS.jsonl", type=Path)
    parser.add_argument("--url", help="API root of a server; an embedded engine by default")
    parser.add_argument("--model", help="the model's name on the server, or a folder for the embedded engine")
    parser.add_argument("--out", type=Path, help="JSONL file for the rollouts")
    parser.add_argument("--verifier", help="module:name of a verifier", default=None)
    parser.add_argument("--tool", action="append", default=[], help="module:name of a tool; repeatable")
    parser.add_argument("--group-size", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=256)
    parser.add_argument("--max-turns", type=int, default=16)
    parser.add_argument("--max-output-tokens", type=int)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Collect, print the table, and report whether every rollout ended with an outcome of its own."""
    return asyncio.run(_run(arguments))


async def _run(arguments: argparse.Namespace) -> int:
    from gym_sdk.client import GymClient
    from gym_sdk.environments import load_tasks
    from gym_sdk.rollout import Limits, Sampling

    tasks = load_tasks(arguments.tasks)
    if arguments.url:
        client = GymClient(arguments.url, model=arguments.model)
    else:
        client = GymClient.local(arguments.model)
    async with client:
        collection = await client.collect(
            tasks,
            tools=[_load(name) for name in arguments.tool],
            verifier=_load(arguments.verifier) if arguments.verifier else None,
            group_size=arguments.group_size,
            sampling=Sampling(
                temperature=arguments.temperature,
                max_output_tokens=arguments.max_output_tokens,
                seed=arguments.seed,
            ),
            limits=Limits(concurrency=arguments.concurrency, max_turns=arguments.max_turns),
            store=arguments.out,
            progress=sys.stderr.isatty(),
        )
    print(collection)
    return 1 if collection.failures else 0


def _load(name: str) -> Any:
    """Import `module:name`; the current folder is searched first."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigurationError(f"{name!r} must have the form module:name")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{name} cannot be loaded: {error}") from error
    finally:
        sys.path.pop(0)
