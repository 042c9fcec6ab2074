"""What becomes of conversations under real chat templates, and what that costs.

The table plays each scenario against each template that TRL carries, the tiny policy's, and one in the manner
of Mistral's, with tokenizers that hold the templates' special tokens. No model is needed: the policy's
turns are what the template itself writes, cut into tokens as policies sample them, not as tokenizers do.

    python benchmarks/templates.py --write
    python benchmarks/templates.py --cost --output runs/benchmarks/templates.json
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from _report import Report

from backends.memory import CallMemory
from backends.prefix import Step, next_prompt
from backends.rehearsal import Play, Scenario, rehearse
from backends.rendering import TemplateRenderer
from backends.rendering.chat import chat_messages
from backends.rendering.renderer import Conversation
from gym_sdk.schema import Item, Message
from gym_sdk.tokens import CallTokens, merge_calls

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from support.template_tokenizers import renderers  # noqa: E402 - the tests' tokenizers

PAGE = ROOT / "docs" / "templates.md"


@dataclass(frozen=True)
class Cell:
    """What became of one scenario under one template.

    Attributes:
        outcome: the least exact step that any rollout needed; `—` or `no parser` if it can't be played.
        rendered: rollouts that break with full re-rendering.
        ours: rollouts that fork with the prefix rule.
    """

    outcome: str
    rendered: int = 0
    ours: int = 0

    def __str__(self) -> str:
        playable = self.outcome not in ("—", "no parser")
        return f"{self.outcome} {self.rendered} → {self.ours}" if playable else self.outcome


@dataclass
class Totals:
    """Sums over the table."""

    rollouts: int = 0
    prompts: int = 0
    rendered: int = 0
    ours: int = 0
    drifts: int = 0
    disagreements: int = 0

    def count(self, plays: Sequence[Play]) -> None:
        """Add the rollouts of one cell."""
        self.rollouts += len(plays)
        self.prompts += sum(len(play.steps) for play in plays)
        self.rendered += sum(play.breaks > 0 for play in plays)
        self.ours += sum(Step.FORK in play.steps for play in plays)
        self.drifts += sum(play.drifts for play in plays)
        self.disagreements += sum(play.agrees is False for play in plays)


def trl_version() -> str:
    """Look up TRL, which the tests may have beside the environment."""
    found = metadata.distributions(name="trl", path=[*sys.path, str(Path(sys.prefix) / "trl")])
    return next(distribution.version for distribution in found)


def cell(plays: Sequence[Play]) -> Cell:
    played = [play for play in plays if play.refused is None]
    if not played:
        return Cell("no parser" if all(play.unread for play in plays) else "—")
    steps = {play.summary for play in played}
    worst = next(step for step in ("fork", "splice", "bridge", "start") if step in steps)
    partly = "" if len(played) == len(plays) else f" ({len(plays) - len(played)} refused)"
    broken = sum(play.breaks > 0 for play in played)
    return Cell(worst + partly, broken, sum(Step.FORK in play.steps for play in played))


def play_all(rollouts: int) -> tuple[dict[str, tuple[Cell, ...]], dict[Scenario, Totals]]:
    """Play every scenario against every template, with fixed seeds."""
    rows: dict[str, tuple[Cell, ...]] = {}
    totals = {scenario: Totals() for scenario in Scenario}
    for name, renderer in renderers().items():
        cells: list[Cell] = []
        for scenario in Scenario:
            plays = [rehearse(renderer, scenario, rng=random.Random(seed)) for seed in range(rollouts)]
            cells.append(cell(plays))
            totals[scenario].count([play for play in plays if play.refused is None])
        rows[name] = tuple(cells)
        print(name, *cells, sep=" | ", flush=True)
    return rows, totals


def page(rows: dict[str, tuple[Cell, ...]], totals: dict[Scenario, Totals], rollouts: int) -> Iterator[str]:
    """Write the page; templates with equal rows share one."""
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("transformers", "tokenizers", "jinja2"))
    yield INTRO.format(rollouts=rollouts, versions=f"{versions}, trl {trl_version()}", count=len(rows))
    yield "| template | " + " | ".join(scenario.value for scenario in Scenario) + " |"
    yield "| --- |" + " --- |" * len(Scenario)
    for cells in sorted(set(rows.values()), key=list(rows.values()).index):
        names = [f"`{name}`" for name, other in rows.items() if other == cells]
        yield f"| {', '.join(names)} | " + " | ".join(map(str, cells)) + " |"
    yield "\n## Totals\n"
    yield "| scenario | rollouts | prompts | broken by re-rendering | forked here | silent drift |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for scenario, total in totals.items():
        yield (
            f"| {scenario.value} | {total.rollouts:,} | {total.prompts:,} | {total.rendered:,} "
            f"| {total.ours:,} | {total.drifts} |"
        )
    differing = sum(total.disagreements for total in totals.values())
    yield (
        f"\nWhere a full rendering extends what was sampled, bridged prompts differ from it in {differing} "
        "rollouts."
    )


INTRO = """\
# Chat templates

What becomes of a conversation under real chat templates: those that TRL carries, the tiny policy's, and one
in the manner of Mistral's ({count} in all), on byte-level tokenizers with each template's special tokens.
Made by `python benchmarks/templates.py --write` with {versions}.

Each cell is {rollouts} rollouts with fixed seeds. The policy says what the template itself writes for its
turns, in tokens that are cut at random places and with JSON in odd spacing; users and tools write Unicode,
white space and text that spells special tokens. The word is the least exact step that a rollout needed:

- **bridge**: what was sampled, and a rendering of only what is new;
- **splice**: what was sampled, and the end of a rendering of everything;
- **fork**: a rendering of everything, reported with its reason;
- **—**: the template has no place for it: it shows no tools, writes no calls (or only one in a turn), or no
  thinking;
- **no parser**: the template writes calls in a form that no parser here reads. SGLang's own parsers may,
  where it generates: `gym-sdk serve --backend sglang --parser sglang:TOOL+REASONING`, with the names of its
  `--tool-call-parser` and `--reasoning-parser` (or one alone: `sglang:TOOL`, `sglang:+REASONING`). Without
  `--parser` they are those that SGLang was started with. `/health` says which parser reads. Prompts extend
  what was sampled all the same, but SGLang sees only text: ordinary tokens that spell a mark count as the
  mark, arguments are mostly written anew, and sampled ids of calls are lost.

Refused rollouts are those in which the template writes a drawn text so that it can't be read back.

After the word stand the rollouts that break when everything is rendered again for each prompt, and those that
fork here. `foreign`: assistant messages that the policy did not write, after its own and between users'.
`edited`: the agent rewrites what the policy said, which has to fork. Templates that do the same in all
columns share a row.
"""


def conversation(turns: int) -> list[Item]:
    """Return what users say in a conversation."""
    return [
        Message(role="user", content=f"Question {turn}: what is {turn} + {turn}? " * 4)
        for turn in range(turns)
    ]


def bridged(renderer: TemplateRenderer, questions: Sequence[Item], answer: list[int]) -> None:
    """Run a conversation by the prefix rule, and merge its calls."""
    memory, items, calls = CallMemory(), list[Item](), list[CallTokens]()
    for question in questions:
        items.append(question)
        told = Conversation(list(items))
        prompt = next_prompt(told, renderer, memory)
        output = renderer.parse(answer, prompt=prompt.token_ids).items
        tokens = prompt.tokens_of(answer, [0.0] * len(answer))
        memory.remember(prompt.call(told, output, tokens))
        calls.append(tokens)
        items += output
    assert len(merge_calls(calls)) == 1


def rendered(renderer: TemplateRenderer, questions: Sequence[Item], answer: list[int]) -> None:
    """Apply the chat template to everything in each turn, and merge the calls."""
    items, calls = list[Item](), list[CallTokens]()
    for question in questions:
        items.append(question)
        text = renderer.template.render(chat_messages(items), generation_prompt=True)
        prompt = renderer.encode(text)
        items += renderer.parse(answer, prompt=prompt).items
        calls.append(CallTokens(prompt, answer, [0.0] * len(answer)))
    merge_calls(calls)


def cost(runs: int, output: Path) -> None:
    """Time whole conversations, both ways in turn."""
    report = Report(
        "Milliseconds of CPU for all prompts of a conversation and the merge of its calls",
        {"template": "qwen3_instruct_2507", "runs": runs, "tokens in a turn": "about 100 asked, 40 answered"},
        packages=("gym-sdk", "transformers", "tokenizers", "jinja2"),
    )
    renderer = renderers()["qwen3_instruct_2507"]
    answer = [*renderer.encode("That is a number, I think. " * 4), min(renderer.stop_token_ids)]
    ways: dict[str, Callable[[TemplateRenderer, Sequence[Item], list[int]], None]] = {
        "prefix rule": bridged,
        "re-rendering": rendered,
    }
    for turns in (8, 32, 128):
        spent: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(runs):
            for way, run in ways.items():
                started = time.process_time()
                run(renderer, conversation(turns), answer)
                spent[way].append(1000 * (time.process_time() - started))
        for way, values in spent.items():
            report.add(values, system=way, turns=turns)
    report.show(rows="system", columns="turns")
    report.write(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rollouts", type=int, default=64, help="of each cell")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    parser.add_argument("--cost", action="store_true", help="measure time instead")
    parser.add_argument("--runs", type=int, default=5, help="of each cost; the median counts")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/templates.json"))
    options = parser.parse_args()
    if options.cost:
        cost(options.runs, options.output)
        return
    rows, totals = play_all(options.rollouts)
    lines = list(page(rows, totals, options.rollouts))
    print("\n".join(lines[-12:]))
    print(Counter(str(cell.outcome) for cells in rows.values() for cell in cells))
    if options.write:
        PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"written to {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
