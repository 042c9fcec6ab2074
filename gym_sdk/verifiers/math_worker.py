"""The process in which math-verify runs: one JSON request per line in, one JSON reply per line out."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from typing import Any

__all__ = ["main"]

_MEMORY_LIMIT = 2 * 2**30  # bytes: an expression such as 9^{9^{9^9}} otherwise takes what the machine has


def main() -> None:
    """Answer requests until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it closes our input
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    logging.disable(logging.CRITICAL)
    # whatever prints must not get between the replies
    channel = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    sys.stdout = sys.stderr
    import math_verify  # noqa: F401  # the import is what makes starting slow; do it before saying "ready"

    _send(channel, {"ready": True})
    for line in sys.stdin.buffer:
        try:
            reply = _compare(json.loads(line))
        except (Exception, MemoryError) as error:
            reply = {"error": f"{type(error).__name__}: {error}"}
        _send(channel, reply)


def _send(channel: Any, reply: dict[str, Any]) -> None:
    channel.write(json.dumps(reply) + "\n")
    channel.flush()


def _compare(request: dict[str, Any]) -> dict[str, Any]:
    from math_verify import parse, verify

    found = parse(request["text"])
    equal = False
    for answer in request["answers"]:
        expected = _parse_answer(answer)
        if not expected:
            return {"error": f"the answer {answer!r:.80} is not a mathematical expression"}
        equal = equal or bool(found and verify(expected, found))
    return {"equal": equal}


def _parse_answer(answer: str) -> list[Any]:
    """Parse an answer whole: without `$` math-verify would take the 2 of `2x+1` for it."""
    from math_verify import parse

    if "$" in answer or "\\boxed" in answer:
        return list(parse(answer))
    return list(parse(f"${answer}$") or parse(answer))


if __name__ == "__main__":
    main()
