"""How fast a tiny policy learns: several tasks and seeds, asynchronous beside synchronous training.

Each run has a process of its own, and its engine another one, as in `gym-sdk demo`. It evaluates on held-out
tasks, trains, and evaluates on the same tasks again. Modes take turns within a seed, so that other work on
the machine hits both.

    chain_sum     sums with a calculator: the demo's task
    lockers       follow a trail of lockers, a tool call each, and say what was in all of them
    lockers_slow  the same, with a tool that takes 200 ms
    spelling      reasoning-gym's `spell_backward`, with a reward for each letter in its place

    python benchmarks/learning.py
    python benchmarks/learning.py --tasks lockers lockers_slow --modes sync async --seeds 0 1 2
    python benchmarks/learning.py --tasks spelling --seeds 0 --steps 5 --output /tmp/spelling.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from _curves import save_curves
from _learning import TASKS, LearningRun, train_once
from _report import machine, versions

PACKAGES = ("gym-sdk", "torch", "transformers")


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    results: list[dict[str, Any]] = []
    for run in plan(options):
        print(f"{run.task}, {run.mode}, seed {run.seed} ...", end=" ", flush=True)
        result = in_own_process(run)
        results.append(result)
        before, after = result["before"]["reward"], result["after"]["reward"]
        print(f"{before:.2f} -> {after:.2f} in {result['seconds']:.0f} s", flush=True)
        write(options.output, options, results)  # after each run: a long matrix may be stopped
    show(results)
    if options.figure is not None:
        save_curves(results, options.figure)
        print(f"written to {options.figure}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tasks", nargs="+", choices=list(TASKS), default=["chain_sum", "lockers", "spelling"]
    )
    parser.add_argument("--modes", nargs="+", choices=["sync", "async"], default=["sync"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of training; what suits each task by default")
    parser.add_argument("--held-out", type=int, default=256, help="tasks of each evaluation")
    parser.add_argument("--threads", type=int, help="torch's, in each of the two processes")
    parser.add_argument("--output", type=Path, default=Path("runs/learning.json"))
    parser.add_argument("--figure", type=Path, help="where the curves go, e.g. docs/figures/learning.svg")
    return parser.parse_args(argv)


def plan(options: argparse.Namespace) -> Iterator[LearningRun]:
    for task, seed, mode in product(options.tasks, options.seeds, options.modes):
        yield LearningRun(task, mode, seed, options.steps, options.held_out, options.threads)


def in_own_process(run: LearningRun) -> dict[str, Any]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(train_once, run).result()


def write(path: Path, options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    content = {
        "title": "GRPO of tiny policies",
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(*PACKAGES),
        "settings": {"held_out": options.held_out, "threads": options.threads},
        "results": results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print a row for each task and mode: medians over seeds, with the smallest and the largest."""
    print(f"\n{machine()}\n{versions(*PACKAGES)}\nEach cell: median [min - max] over seeds.\n")
    print("| task | mode | seeds | held-out before | after | training, s | of it rollouts | training | MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for task, mode in dict.fromkeys((result["task"], result["mode"]) for result in results):
        chosen = [result for result in results if (result["task"], result["mode"]) == (task, mode)]
        cells = [
            _cell([result["before"]["reward"] for result in chosen], 2),
            _cell([result["after"]["reward"] for result in chosen], 2),
            _cell([result["seconds"] for result in chosen], 0),
            _cell([result["seconds_rollout"] for result in chosen], 0),
            _cell([result["seconds_train"] for result in chosen], 0),
            _cell([sum(result["peak_mib"].values()) for result in chosen], 0),
        ]
        print(f"| {task} | {mode} | {len(chosen)} | " + " | ".join(cells) + " |")
    for task in dict.fromkeys(result["task"] for result in results):
        if ratios := list(_ratios(results, task)):
            print(f"\n{task}: async takes {_cell(ratios, 2)} of the time of sync")


def _ratios(results: Sequence[dict[str, Any]], task: str) -> Iterator[float]:
    seconds = {(run["mode"], run["seed"]): run["seconds"] for run in results if run["task"] == task}
    for mode, seed in seconds:
        if mode == "async" and ("sync", seed) in seconds:
            yield seconds["async", seed] / seconds["sync", seed]


def _cell(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{of(values):.{digits}f}" for of in (min, statistics.median, max))
    return f"{middle} [{low} - {high}]"


if __name__ == "__main__":
    main()
