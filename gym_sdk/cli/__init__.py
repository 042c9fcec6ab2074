"""The command line: `gym-sdk demo | serve | check | rollout | store | tiny`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from backends.threads import spin_briefly
from gym_sdk.cli import check, demo, rollout, serve, store, tiny
from gym_sdk.errors import GymError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit status. Errors of this library are printed in one line."""
    parser = argparse.ArgumentParser(
        prog="gym-sdk", description="Rollouts and reinforcement learning over the OpenAI Responses API."
    )
    parser.add_argument("--log-level", default="warning", help="debug, info, warning or error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (demo, serve, check, rollout, store, tiny):
        module.add_parser(commands)
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    spin_briefly()
    try:
        status: int = arguments.run(arguments)
    except GymError as error:
        print(f"gym-sdk {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status
