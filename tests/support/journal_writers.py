"""Writers of a journal to be killed: a process that forks one for each line of its input.

Importing takes most of a writer's time, and a fork has everything imported already.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys

from gym_sdk.store import Journal
from support.stored_rollouts import attempt, key


def write_what_is_missing(path: str, count: int, seed: int) -> None:
    """Write the rollouts that the journal lacks, and say so for each once it is written."""
    sizes = random.Random(seed)
    with Journal(path) as journal:
        for number in range(count):
            if key(number) not in journal:
                journal.write(attempt(number, tokens=sizes.choice((3, 300, 4_000))))
                os.write(1, b"%d\n" % number)
    os.write(1, b"done\n")


def main() -> None:
    """Fork a writer for each order; say its process id first and how it ended last."""
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os.write(1, b"%d\n" % os.getpid())
            write_what_is_missing(**json.loads(line))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(1, b"killed\n" if status == -signal.SIGKILL else b"ended with %d\n" % status)


if __name__ == "__main__":
    main()
