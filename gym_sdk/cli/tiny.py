"""`gym-sdk tiny`: make a tiny policy on this machine."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from gym_sdk.cli._extras import needs_extra
from gym_sdk.cli._quiet import quiet_transformers

__all__ = ["add_parser", "show_progress"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tiny", help="make a tiny policy", description=__doc__
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--seed", type=int, help="seed of the weights and the warm start")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Make the policy."""
    with needs_extra("local"):
        from backends.tiny import TinyRecipe, build_tiny_policy

        quiet_transformers()

    recipe = TinyRecipe()
    if arguments.seed is not None:
        recipe = replace(recipe, seed=arguments.seed)
    path = build_tiny_policy(arguments.out_dir, recipe, progress=show_progress)
    print(f"\n{path}")
    return 0


def show_progress(stage: str, share: float) -> None:
    """Redraw one line on standard error, if that is a terminal."""
    if sys.stderr.isatty():
        filled = round(30 * share)
        bar = "#" * filled + "." * (30 - filled)
        print(f"\r  {stage:<28.28} [{bar}] {share:4.0%}", end="", file=sys.stderr, flush=True)
