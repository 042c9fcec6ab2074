"""`gym-sdk store`: look after the files that runs write their rollouts to."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any

from gym_sdk.cli._loading import load_object

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command and its own to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "store", help="check, repair, merge, export or score again stored rollouts", description=__doc__
    )
    tools = parser.add_subparsers(dest="tool", required=True, metavar="TOOL")

    tool = tools.add_parser("summary", help="count what is in stores")
    tool.add_argument("files", metavar="FILE", type=Path, nargs="+")
    tool.set_defaults(run=_summary)

    tool = tools.add_parser("check", help="read every rollout; the status is 1 if one cannot be read")
    tool.add_argument("files", metavar="FILE", type=Path, nargs="+")
    tool.set_defaults(run=_check)

    tool = tools.add_parser("repair", help="move lines that cannot be read into FILE.damaged")
    tool.add_argument("files", metavar="FILE", type=Path, nargs="+")
    tool.set_defaults(run=_repair)

    tool = tools.add_parser("merge", help="merge stores into a new one")
    tool.add_argument("files", metavar="FILE", type=Path, nargs="+")
    tool.add_argument("--out", type=Path, required=True, help="the new store; zstd if it ends in .zst")
    tool.add_argument(
        "--prefer", choices=["first", "last"], help="which store wins where two finished rollouts differ"
    )
    tool.set_defaults(run=_merge)

    tool = tools.add_parser("export", help="write Parquet tables, or a Hugging Face dataset")
    tool.add_argument("file", metavar="FILE", type=Path)
    tool.add_argument("--out", type=Path, required=True, help="folder for the result")
    tool.add_argument(
        "--dataset",
        choices=["sequences", "rollouts"],
        help="write this table for datasets.load_from_disk, instead of Parquet files of both",
    )
    tool.set_defaults(run=_export)

    tool = tools.add_parser("reverify", help="score stored rollouts with another verifier")
    tool.add_argument("file", metavar="FILE", type=Path)
    tool.add_argument("--verifier", required=True, help="module:name of a verifier")
    tool.add_argument("--out", type=Path, required=True, help="the new store")
    tool.add_argument("--concurrency", type=int, default=64, help="verifications at a time")
    tool.add_argument("--deadline-s", type=float, default=120.0, help="for each verification, in seconds")
    tool.set_defaults(run=_reverify)


def _summary(arguments: argparse.Namespace) -> int:
    from gym_sdk.store import summarize

    for file in arguments.files:
        print(f"{file}: {summarize(file)}")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from gym_sdk.store import check

    damaged = [_show(check(file)) for file in arguments.files]
    return 1 if any(damaged) else 0


def _repair(arguments: argparse.Namespace) -> int:
    from gym_sdk.store import repair

    for file in arguments.files:
        if _show(repair(file)):
            print(f"  these lines are now in {file}.damaged")
    return 0


def _show(report: Any) -> bool:
    """Print a report; whether something in it cannot be read."""
    print(f"{report.path}: {report.rollouts} rollouts in {report.lines} lines, {len(report.damaged)} damaged")
    for damage in report.damaged:
        print(f"  line {damage.line} ({damage.length} bytes): {damage.problem}")
    if report.torn_bytes:
        print(f"  the last line is not whole ({report.torn_bytes} bytes): it is being written, or was torn")
    return bool(report.damaged)


def _merge(arguments: argparse.Namespace) -> int:
    from gym_sdk.store import merge

    report = merge(arguments.files, arguments.out, prefer=arguments.prefer)
    print(
        f"{arguments.out}: {report.rollouts} rollouts, {report.repeated} repeated, {report.replaced} replaced"
    )
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from gym_sdk.store import to_dataset, to_parquet

    if arguments.dataset is not None:
        dataset = to_dataset(arguments.file, arguments.dataset, out=arguments.out)
        print(f"{arguments.out}: {len(dataset)} {arguments.dataset}")
        return 0
    report = to_parquet(arguments.file, arguments.out)
    print(f"{report.rollouts}: {report.rollout_rows} rows")
    print(f"{report.sequences}: {report.sequence_rows} rows")
    return 0


def _reverify(arguments: argparse.Namespace) -> int:
    from gym_sdk.store import reverify

    report = asyncio.run(
        reverify(
            arguments.file,
            load_object(arguments.verifier),
            out=arguments.out,
            concurrency=arguments.concurrency,
            deadline_s=arguments.deadline_s,
        )
    )
    print(f"{arguments.out}: {report}")
    return 1 if report.failed else 0
