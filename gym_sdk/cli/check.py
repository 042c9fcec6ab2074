"""`gym-sdk check`: what a model's chat template can do, before it is served or trained."""

from __future__ import annotations

import argparse
from typing import Any

from gym_sdk.cli._extras import needs_extra
from gym_sdk.cli._quiet import quiet_transformers
from gym_sdk.cli.serve import add_rendering_arguments
from gym_sdk.errors import ConfigurationError

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    """Add the command to the parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "check", help="try a model's chat template and parser", description=__doc__
    )
    parser.add_argument("model", metavar="MODEL", help="model folder, or a name on the Hugging Face hub")
    add_rendering_arguments(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each kind of conversation; the status is 1 if something that matters fails."""
    with needs_extra("local"):
        from backends.hub import model_folder
        from backends.rehearsal import check
        from backends.rendering import TemplateRenderer

        quiet_transformers()

    if arguments.renderer not in ("auto", "template"):
        raise ConfigurationError("gym-sdk check tries chat templates; use --renderer template")
    renderer = TemplateRenderer.from_folder(
        model_folder(arguments.model),
        parser=arguments.parser,
        template_kwargs=arguments.template_kwargs,
        keep_thinking=arguments.thinking == "keep",
    )
    found = check(renderer, thinking=arguments.thinking)
    print(f"parser {found.parser}, turns end with {' '.join(renderer.stop_tokens)}")
    for play in found.plays:
        why = play.refused or "; ".join(dict.fromkeys(play.reasons))
        print(f"  {play.scenario:<10} {play.summary:<8} {why}".rstrip())
    for problem in found.problems:
        print(f"problem: {problem}")
    return 1 if found.problems else 0
