"""One optimizer step of this project's trainer beside TRL's `GRPOTrainer` on identical rows: time and memory.

Both start from the same random weights and take the same step: DAPO's loss without a reference policy, in
float32, with AdamW, all rows in one update. Losses and gradient norms of the first step must agree, or
nothing is reported. Rollouts, rewards and advantages are outside of what is measured; TRL gets its rows from
a `rollout_func`.

Each trainer has a process of its own, and they take turns, so that other work on the machine hits both;
ratios are those within a turn. A first step that does not count warms up and makes AdamW's moments. Memory is
the most resident memory during a step, less what was there before the first one (code, weights, rows): it
holds gradients, moments, activations and logits. Gradients and moments are the same for any trainer, so the
ratio without them is given, too.

    tiny    a policy like `backends.tiny`'s: 32 groups of 8 rows.
    wide    69 M parameters, 151,665 tokens of vocabulary: 2 groups of 4 rows.
    shared  a group of 16 rows with one long prompt, this project alone: the prompt computed once, or in each
            row of a packed stream, or in each padded row.

How many rows go through the model at once decides on memory, so both are compared at several micro-batch
sizes: TRL gets rows, our learner the tokens that as many rows may have, their common prompts counted once.
The first case of a workload is each trainer as it comes (TRL: 8 rows, layers computed again in the backward
pass; ours: 8,192 tokens).

    make bench-trainer
    python benchmarks/trainer.py --quick --only tiny
    python benchmarks/trainer.py --runs 9 --output trainer.json
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from _report import Report
from _training import DEEP, TINY, WIDE, Program, Step, Workload, build_model, ours, trl, unshared, worker

from gym_sdk.tokens import TokenSequence

TRL_FOLDER = Path(sys.prefix) / "trl"
"""Where `make test` installs TRL, beside the environment's packages."""
OURS, THEIRS = "gym-sdk", "TRL"
MOMENTS_AND_GRADIENT = 3
"""Floats of a parameter besides its value: its gradient, and what AdamW keeps."""
TOLERANCE = 1e-4
"""How far losses and gradient norms may differ, relatively."""
ROUNDING = 1e-6
"""How far they may differ in any case: the terms of a loss are about 1, and may cancel."""

Steps = dict[str, list[Step]]
"""The steps of each program, by its name."""


@dataclass(frozen=True)
class Case:
    """What takes turns: the first program is what the others are compared with."""

    name: str
    programs: tuple[Program, ...]


@dataclass(frozen=True)
class Section:
    """A workload with its cases."""

    name: str
    workload: Workload
    cases: tuple[Case, ...]


def against_trl(name: str, workload: Workload, at_once: Sequence[int]) -> Section:
    """Compare with TRL as both come, at several micro-batch sizes, and with their other options."""

    def case(name: str, rows: int, theirs: Mapping[str, Any], **settings: Any) -> Case:
        theirs = {"rows": rows, "gradient_checkpointing": False, **theirs}
        return Case(name, (Program(OURS, ours, settings), Program(THEIRS, trl, theirs)))

    def tokens(rows: int) -> dict[str, int]:
        return {"max_tokens_per_microbatch": workload.packed_tokens(rows)}

    again = {"gradient_checkpointing": True}
    cases = [case("as they come", 8, again)]
    cases += [case(f"{rows} rows at once", rows, {}, **tokens(rows)) for rows in at_once]
    few = at_once[0]
    cases += [
        case(f"{few} rows, layers computed again", few, again, **again, **tokens(few)),
        case(f"{few} rows, ours without check_on_policy", few, {}, check_on_policy=False, **tokens(few)),
        case(f"{few} rows, ours padded", few, {}, pack=False, **tokens(few)),
    ]
    return Section(name, workload, tuple(cases))


def prefixes(name: str, workload: Workload) -> Section:
    """Compare ways to compute a prompt that rows share."""
    programs = (
        Program("shared", ours),
        Program("not shared", unshared),
        Program("padded", ours, {"pack": False}),
    )
    return Section(name, workload, (Case("one group of 16", programs),))


LONG_PROMPT = Workload(TINY, groups=1, rows=16, prompt=(1024, 1024), completion=(128, 128))
SECTIONS = {
    "tiny": [
        against_trl("tiny", Workload(TINY, 32, 8, prompt=(36, 44), completion=(44, 76)), (8, 32, 128)),
    ],
    "wide": [
        against_trl("wide", Workload(WIDE, 2, 4, prompt=(128, 128), completion=(64, 192)), (1, 4, 8)),
    ],
    "shared": [
        prefixes("shared prefix, tiny model", LONG_PROMPT),
        prefixes("shared prefix, larger model", replace(LONG_PROMPT, sizes=DEEP)),
    ],
}


class Figures:
    """The measurements, and the report that they go to."""

    def __init__(self, report: Report, options: argparse.Namespace) -> None:
        self._report = report
        self._options = options

    def measure(self, section: Section) -> None:
        """Measure all cases of a section."""
        parameters = sum(parameter.numel() for parameter in build_model(section.workload.sizes).parameters())
        fixed_mib = 4 * MOMENTS_AND_GRADIENT * parameters / 2**20
        title = (
            f"{section.name}: {describe(section.workload)}; {parameters / 1e6:.2f} M parameters, "
            f"{fixed_mib:,.0f} MiB of gradients and moments"
        )
        groups = section.workload.draw()
        first: Step | None = None
        found = {}
        for case in section.cases:
            warm_up, steps = self._take_turns(case, section.workload, groups)
            for name, step in warm_up.items():
                first = first or step
                where = f"{section.name}, {case.name}, {name}"
                require_same(first, step, where)
                seconds, mib = (median(steps[name], what) for what in ("seconds", "peak_mib"))
                print(f"{where}: {seconds:.2f} s, {mib:,.0f} MiB", flush=True)
            self._add(title, case, steps, fixed_mib)
            found[case.name] = steps
        if THEIRS in found[section.cases[0].name]:
            self._add_best(title, found)

    def _take_turns(
        self, case: Case, workload: Workload, groups: Sequence[Sequence[TokenSequence]]
    ) -> tuple[dict[str, Step], Steps]:
        """Return each program's first step, and those that count."""
        names = [program.name for program in case.programs]
        with ExitStack() as stack:
            workers = {
                program.name: stack.enter_context(
                    worker(program, workload.sizes, groups, self._options.threads)
                )
                for program in case.programs
            }
            warm_up = {name: workers[name].step() for name in names}
            steps: Steps = {name: [] for name in names}
            chance = random.Random(case.name)
            for _ in range(self._options.runs):
                for name in chance.sample(names, len(names)):
                    steps[name].append(workers[name].step())
        return warm_up, steps

    def _add(self, title: str, case: Case, steps: Steps, fixed_mib: float) -> None:
        base, *others = steps
        for name, taken in steps.items():
            self._report.add(
                [step.seconds for step in taken], section=title, case=case.name, what=f"{name}, s"
            )
        for name in others:
            pairs = list(zip(steps[name], steps[base], strict=True))
            self._ratios(title, case.name, f"{name} / {base}", pairs, fixed_mib)
        for name, taken in steps.items():
            self._report.add(
                [step.peak_mib for step in taken], section=title, case=case.name, what=f"{name}, MiB"
            )

    def _ratios(
        self, title: str, case: str, name: str, pairs: Sequence[tuple[Step, Step]], fixed_mib: float
    ) -> None:
        values = {
            "time": [this.seconds / base.seconds for this, base in pairs],
            "CPU time": [this.cpu_s / base.cpu_s for this, base in pairs],
            "memory": [this.peak_mib / base.peak_mib for this, base in pairs],
            "memory without gradients and moments": [
                max(0.0, this.peak_mib - fixed_mib) / max(1.0, base.peak_mib - fixed_mib)
                for this, base in pairs
            ],
        }
        for what, ratios in values.items():
            self._report.add(ratios, section=title, case=case, what=f"{name}, {what}")

    def _add_best(self, title: str, found: Mapping[str, Steps]) -> None:
        """Compare the fastest setting of each, and the leanest: medians, of different cases."""
        for what, column in (("seconds", "time"), ("peak_mib", "memory")):
            best = {
                name: min(median(steps[name], what) for steps in found.values()) for name in (OURS, THEIRS)
            }
            case = {"time": "the fastest of each", "memory": "the leanest of each"}[column]
            ratio = best[THEIRS] / best[OURS]
            self._report.add([ratio], section=title, case=case, what=f"{THEIRS} / {OURS}, {column}")


def median(steps: Sequence[Step], what: str) -> float:
    """Return the median of a field of `Step`."""
    return statistics.median(getattr(step, what) for step in steps)


def describe(workload: Workload) -> str:
    """Say how many rows there are, and how long."""

    def span(bounds: tuple[int, int]) -> str:
        return "-".join(str(bound) for bound in sorted({*bounds}))

    return (
        f"{workload.groups} x {workload.rows} rows, prompts of {span(workload.prompt)} tokens, "
        f"completions of {span(workload.completion)}"
    )


def require_same(expected: Step, actual: Step, what: str) -> None:
    """Refuse to compare trainers that don't do the same."""
    for name in ("loss", "grad_norm"):
        first, second = getattr(expected, name), getattr(actual, name)
        if not math.isclose(first, second, rel_tol=TOLERANCE, abs_tol=ROUNDING):
            raise RuntimeError(f"{what}: {name} is {second}, not {first}; the comparison is void")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=[*SECTIONS], default=[*SECTIONS], help="workloads to measure"
    )
    parser.add_argument(
        "--quick", action="store_true", help="one run of two cases each: does everything work?"
    )
    parser.add_argument("--runs", type=int, help="steps that count, of each trainer in each case (5)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of each trainer")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/trainer.json"))
    options = parser.parse_args(arguments)
    options.runs = options.runs or (1 if options.quick else 5)
    return options


def main() -> None:
    """Run and report."""
    options = parse()
    sys.path.append(str(TRL_FOLDER))  # reaches the trainers' processes, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, so that no process is left behind
    sections = [section for name in options.only for section in SECTIONS[name]]
    if options.quick:
        sections = [replace(section, cases=section.cases[:2]) for section in sections]
    settings = {
        "threads": options.threads,
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "not set"),
        "runs": options.runs,
    }
    report = Report("One optimizer step", settings, ("gym-sdk", "trl", "torch", "transformers"))
    figures = Figures(report, options)
    for section in sections:
        figures.measure(section)
    report.show(rows="case", columns="what", section="section")
    report.write(options.output)


if __name__ == "__main__":
    main()
