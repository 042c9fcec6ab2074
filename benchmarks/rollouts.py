"""How fast the rollout engine is, how many rollouts it carries, how soon it lets go, and what it costs.

A scripted server in a process of its own answers each rollout with a tool call, then with a message; the
measured programs (`_peers`) have processes of their own, too. Within each run they take turns, so that other
work on the machine hits all of them; ratios are those within a run.

    a  2 model calls + 1 tool, instant server: rollouts per second beside a bare aiohttp loop and the peers.
    b  very many at once, each model call taking 1 s: time, memory, and how late the event loop is.
    c  leaving a stream of 4,096 rollouts in flight: until each generation was aborted and no socket is open.
    d  the engine's own CPU: without HTTP, by function, and as the number of tasks grows.

    python benchmarks/rollouts.py
    python benchmarks/rollouts.py --quick --only a d
    python benchmarks/rollouts.py --runs 9 --output rollouts.json
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from _peers.measure import Cost, Order
from _report import Report
from _scripted import ScriptedServer, scripted_server
from _workers import AGENTS, BARE, ENGINE, PEERS, SDK, Worker, once, verifiers, version_in, worker

TURNS = 2
HELD_S = 60.0
"""The latency of answers that nobody waits for."""
SOCKETS = 16_000
"""Most model calls at once where there are more rollouts than a process may have sockets."""
RATE, CPU = "rollouts/s", "CPU, us/rollout"
STORED = f"{SDK.name}, with a store"
WRITTEN = f"{ENGINE.name}, with its JSON"

Values = dict[str, dict[str, float]]
"""What a turn found, by program and what was measured."""


@dataclass(frozen=True)
class Crowd:
    """Very many rollouts at once.

    Attributes:
        rollouts: all in flight together, as far as they can be started before the first ones end.
        latency_s: of a model call.
        model_calls: how many may run at once; None for as many as there are rollouts.
    """

    rollouts: int
    latency_s: float = 1.0
    model_calls: int | None = None

    @property
    def ideal_s(self) -> float:
        """How long the model calls take if nothing else takes time."""
        return self.latency_s * TURNS * self.rollouts / (self.model_calls or self.rollouts)

    def __str__(self) -> str:
        limit = f", {self.model_calls:,} model calls at once" if self.model_calls else ""
        return f"{self.rollouts:,} rollouts, {self.latency_s:g} s a model call{limit}"


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        runs: of each cell.
        levels: rollouts at once in figure a.
        rollouts: of a fast program in figure a.
        peer_rollouts: of a slow one, at least one for each place.
        crowds: of figure b; with the longer latency all are in flight before the first one ends.
        cancelled: rollouts in flight in figure c.
        engine_rollouts: of the engine alone in figure d.
        growth: numbers of tasks in figure d.
        crowding: rollouts at once in figure d, of as many tasks as the last says.
    """

    runs: int = 5
    levels: tuple[int, ...] = (64, 512)
    rollouts: int = 8192
    peer_rollouts: int = 512
    crowds: tuple[Crowd, ...] = (Crowd(16_384), Crowd(16_384, 10.0), Crowd(65_536, 1.0, SOCKETS))
    cancelled: int = 4096
    engine_rollouts: int = 8192
    growth: tuple[int, ...] = (1024, 4096, 16_384, 65_536)
    crowding: tuple[int, ...] = (64, 512, 4096, 16_384)


QUICK = Sizes(1, (64,), 1024, 64, (Crowd(1024), Crowd(2048, 1.0, 512)), 512, 1024, (512, 2048), (64, 1024))


class Figures:
    """The measurements, and the report that they go to."""

    def __init__(
        self, server: ScriptedServer, sizes: Sizes, report: Report, options: argparse.Namespace
    ) -> None:
        self._server = server
        self._sizes = sizes
        self._report = report
        self._peers: Path = options.peers
        self._gc_threshold: int | None = options.gc_threshold

    def _order(self, rollouts: int, concurrency: int, **more: Any) -> Order:
        return Order(self._server.url, rollouts, concurrency, gc_threshold=self._gc_threshold, **more)

    def throughput(self) -> None:
        """Measure figure a."""
        self._server.script(0.0)
        programs = [BARE, SDK, AGENTS]
        if (self._peers / "bin" / "python").exists():
            programs.append(verifiers(self._peers))
        else:
            print(f"verifiers is left out: there is no environment {self._peers} (`make bench-rollouts`)")
        with ExitStack() as stack:
            workers = {program.name: stack.enter_context(worker(program)) for program in programs}
            workers[STORED] = workers[SDK.name]
            for level in self._sizes.levels:
                figure = f"a: 2 model calls + 1 tool, instant server, {level} at once"
                self._repeat(figure, partial(self._level, level, workers))

    def _level(self, level: int, workers: dict[str, Worker], chance: random.Random, share: float) -> Values:
        found = {}
        for name in chance.sample([*workers], len(workers)):
            fast = workers[name].program in (BARE, SDK)
            count = self._sizes.rollouts if fast else self._sizes.peer_rollouts
            count = max(level, int(share * count))
            with tempfile.TemporaryDirectory() as folder:
                store = f"{folder}/rollouts.jsonl" if name == STORED else None
                cost = workers[name].ask(self._order(count, level, keep=True, store=store))
            found[name] = costs(cost, count)
        ours, bare = found[SDK.name], found[BARE.name]
        for name, values in found.items():
            values["rate, gym-sdk / this"] = ours[RATE] / values[RATE]
            values["CPU, this / gym-sdk"] = values[CPU] / ours[CPU]
            if name in (SDK.name, STORED):
                values["rate, this / bare"] = values[RATE] / bare[RATE]
                values["CPU more than bare, us/rollout"] = values[CPU] - bare[CPU]
        return found

    def crowds(self) -> None:
        """Measure figure b."""
        for crowd in self._sizes.crowds:
            turn = partial(self._crowd, crowd)
            figure = f"b: {crowd}; the model calls alone: {crowd.ideal_s:.2f} s"
            self._repeat(figure, turn, warm_up=False)

    def _crowd(self, crowd: Crowd, chance: random.Random, _share: float) -> Values:
        found = {}
        order = self._order(crowd.rollouts, crowd.rollouts, model_calls=crowd.model_calls)
        for program in chance.sample([BARE, SDK], 2):
            self._server.script(crowd.latency_s)
            cost = once(program, order)
            found[program.name] = {
                "seconds": cost.seconds,
                "seconds / the model calls'": cost.seconds / crowd.ideal_s,
                CPU: 1e6 * cost.cpu_s / crowd.rollouts,
                "peak RSS, MiB": cost.peak_rss_mib,
                "loop lag p50, ms": cost.lag_p50_ms,
                "loop lag p99, ms": cost.lag_p99_ms,
                "loop lag max, ms": cost.lag_max_ms,
                "most rollouts at once": cost.more["most_at_once"],
                "most model calls at once": self._server.stats().most_in_flight,
            }
        ours = found[SDK.name]
        ours["seconds / bare"] = ours["seconds"] / found[BARE.name]["seconds"]
        return found

    def cancellation(self) -> None:
        """Measure figure c."""
        figure = f"c: leaving a stream with {self._sizes.cancelled:,} rollouts in flight"
        self._repeat(figure, self._cancel, warm_up=False)

    def _cancel(self, _chance: random.Random, _share: float) -> Values:
        count = self._sizes.cancelled
        self._server.script(HELD_S)
        cost = once(SDK, self._order(count, count, cancel=True))
        times = {
            "every generation aborted after, s": cost.more["aborted_s"],
            "no socket open after, s": cost.more["closed_s"],
            "left the stream after, s": cost.seconds,
        }
        return {SDK.name: times}

    def engine(self) -> None:
        """Measure figure d."""
        level = self._sizes.levels[-1]
        with worker(ENGINE) as alone:
            self._repeat(f"d: the engine alone, {level} at once", partial(self._alone, alone))
            self._profile("engine alone", alone)
        self._server.script(0.0)
        with worker(SDK) as whole:
            self._profile("engine over HTTP", whole)
        tasks = {f"{count:,} tasks": self._order(count, level) for count in self._sizes.growth}
        self._repeat(
            f"d: growth with the tasks, {level} at once", partial(self._growth, tasks), warm_up=False
        )
        count = self._sizes.crowding[-1]
        crowding = {f"{crowd:,} at once": self._order(count, crowd) for crowd in self._sizes.crowding}
        figure = f"d: growth with the rollouts at once, {count:,} tasks"
        self._repeat(figure, partial(self._growth, crowding), warm_up=False)

    def _alone(self, alone: Worker, chance: random.Random, share: float) -> Values:
        order = self._order(int(share * self._sizes.engine_rollouts), self._sizes.levels[-1])
        orders = {ENGINE.name: order, WRITTEN: replace(order, json=True)}
        names = chance.sample([*orders], len(orders))
        return {name: costs(alone.ask(orders[name]), order.rollouts) for name in names}

    def _growth(self, orders: dict[str, Order], chance: random.Random, _share: float) -> Values:
        names = chance.sample([*orders], len(orders))
        found = {name: costs(once(ENGINE, orders[name]), orders[name].rollouts) for name in names}
        return {name: found[name] for name in orders}

    def _profile(self, kind: str, program: Worker) -> None:
        """Report where the time goes; profiling makes many small calls look dearer than they are."""
        order = self._order(self._sizes.engine_rollouts, self._sizes.levels[-1])
        program.ask(order)
        shares = program.ask(replace(order, profile=True)).more
        for part in ("modules", "functions"):
            for name, share in shares[part].items():
                labels = {"program": name, "what": "own time, %"}
                self._report.add([100 * share], figure=f"d: profile of the {kind}, by {part}", **labels)

    def _repeat(
        self,
        figure: str,
        turn: Callable[[random.Random, float], Values],
        *,
        warm_up: bool = True,
    ) -> None:
        """Take turns, and report each value's runs.

        Args:
            figure: for the table.
            turn: measures everything once, in an order that chance decides, with a share of the rollouts.
            warm_up: whether a short turn goes first, for programs that live through all of them.
        """
        print(figure, flush=True)
        if warm_up:
            turn(random.Random(figure), 0.125)
        found: dict[tuple[str, str], list[float]] = defaultdict(list)
        for run in range(self._sizes.runs):
            for program, values in turn(random.Random(f"{figure} {run}"), 1.0).items():
                for what, value in values.items():
                    found[program, what].append(value)
        order = list(dict.fromkeys(program for program, _ in found))
        if BARE.name in order:
            order.sort(key=(BARE.name, SDK.name, STORED, AGENTS.name, "verifiers").index)
        for program in order:
            for (name, what), values in found.items():
                if name == program:
                    self._report.add(values, figure=figure, program=program, what=what)


def costs(cost: Cost, rollouts: int) -> dict[str, float]:
    """Return what is reported of an order."""
    return {
        RATE: rollouts / cost.seconds,
        CPU: 1e6 * cost.cpu_s / rollouts,
        "peak RSS, MiB": cost.peak_rss_mib,
    }


def run(options: argparse.Namespace, sizes: Sizes) -> Report:
    """Measure everything that is asked for."""
    settings = {
        "sizes": str(sizes),
        "garbage collector's threshold": options.gc_threshold or "Python's default",
        "open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "note": "All processes share the cores above. A timer that a busy loop missed counts as late.",
    }
    if (options.peers / "bin" / "python").exists():
        settings["verifiers"] = version_in(options.peers, "verifiers")
    report = Report("The rollout engine", settings, ("gym-sdk", "aiohttp", "pydantic", "openai-agents"))
    with scripted_server() as server:
        figures = Figures(server, sizes, report, options)
        parts = {
            "a": figures.throughput,
            "b": figures.crowds,
            "c": figures.cancellation,
            "d": figures.engine,
        }
        for name in options.only:
            parts[name]()
    return report


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices="abcd", default=[*"abcd"], help="figures to measure")
    parser.add_argument("--quick", action="store_true", help="small sizes, one run: does everything work?")
    parser.add_argument("--runs", type=int, help="of each cell; the median counts")
    parser.add_argument("--crowds", type=int, nargs="+", help="rollouts in flight in figure b")
    parser.add_argument("--gc-threshold", type=int, help="of the measured programs, e.g. 50000")
    parser.add_argument("--peers", type=Path, default=PEERS, help="environment with requirements/peers.txt")
    parser.add_argument("--output", type=Path, help="also write everything as JSON")
    return parser.parse_args(arguments)


def main() -> None:
    """Run and report."""
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no process is left behind
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sizes = QUICK if options.quick else Sizes()
    if options.runs:
        sizes = replace(sizes, runs=options.runs)
    if options.crowds:
        chosen = tuple(crowd for crowd in sizes.crowds if crowd.rollouts in options.crowds)
        sizes = replace(sizes, crowds=chosen)
    report = run(options, sizes)
    report.show("program", "what", "figure")
    if options.output:
        report.write(options.output)


if __name__ == "__main__":
    main()
