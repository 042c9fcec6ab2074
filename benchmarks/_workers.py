"""The measured programs of `_peers`, each in a process of its own, and environment if it needs one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from _peers.measure import Cost, Order

HERE = Path(__file__).resolve().parent
PEERS = HERE.parent / ".venv-peers"
"""The environment of programs that don't go with the SDK's own; `make bench-rollouts` makes it."""


@dataclass(frozen=True)
class Program:
    """A measured program.

    Attributes:
        name: for the table.
        script: of `_peers`.
        python: the interpreter of its environment.
    """

    name: str
    script: str
    python: str = sys.executable


BARE = Program("bare aiohttp + asyncio", "bare.py")
SDK = Program("gym-sdk", "sdk.py")
ENGINE = Program("gym-sdk without HTTP", "sdk_in_process.py")
AGENTS = Program("openai-agents", "agents_runner.py")


def version_in(environment: Path, package: str) -> str:
    """Look up the version of a package in another environment."""
    command = "import importlib.metadata, sys; print(importlib.metadata.version(sys.argv[1]))"
    asked = [str(environment / "bin" / "python"), "-c", command, package]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def verifiers(environment: Path = PEERS) -> Program:
    """Return the program that needs the peers' environment."""
    return Program("verifiers", "verifiers_generate.py", str(environment / "bin" / "python"))


@dataclass(frozen=True)
class Worker:
    """A running program."""

    program: Program
    process: subprocess.Popen[str]
    log: IO[bytes]

    def ask(self, order: Order) -> Cost:
        """Have an order carried out.

        Raises:
            RuntimeError: the program failed; what it wrote last comes with it.
        """
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(asdict(order)) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            self.log.seek(0)
            written = self.log.read()[-2000:].decode(errors="replace")
            raise RuntimeError(f"{self.program.name} failed at {order}:\n{written}")
        return Cost(**json.loads(line))


@contextmanager
def worker(program: Program) -> Iterator[Worker]:
    """Start a program; end it in the end."""
    paths = [str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [program.python, str(HERE / "_peers" / program.script)]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=log, text=True, env=environment) as process,
    ):
        try:
            yield Worker(program, process, log)
        finally:
            process.kill()


def once(program: Program, order: Order) -> Cost:
    """Carry out one order in a process that does nothing else: its memory is the order's."""
    with worker(program) as started:
        return started.ask(order)
