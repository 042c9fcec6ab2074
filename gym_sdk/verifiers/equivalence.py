"""Mathematical equivalence, decided by math-verify in worker processes."""

from __future__ import annotations

import importlib.util

from gym_sdk.errors import ConfigurationError, DeadlineError, VerifierError
from gym_sdk.processes import PoolConfig, WorkerError, WorkerPool
from gym_sdk.schema import Rollout
from gym_sdk.verifiers.protocol import Verifier, answers_of, named

__all__ = ["math_equivalent"]

_MEMORY_LIMIT = 2 * 2**30  # bytes: an expression such as 9^{9^{9^9}} otherwise takes what the machine has


def math_equivalent(*, timeout_s: float = 15.0, workers: int | None = None) -> Verifier:
    r"""Make a verifier: 1 if the final text's answer equals the task's, as mathematics.

    Needs the `math-verify` package, which looks for the last LaTeX (`\boxed{...}` first) or plain expression
    of the text. The task's answer is LaTeX with or without `$`, or a number; a list stands for several.
    Comparisons that math-verify gives up on (5 s each) count as different.

    math-verify limits its time with SIGALRM, which only the main thread of a process may use, and some
    comparisons exhaust time or memory: so it runs in processes of its own. They start when first needed,
    are replaced when they die or hang, and end with the verifier or with this process.

    Args:
        timeout_s: a comparison that takes longer fails the rollout, in seconds.
        workers: processes at most; by default one for each core, up to 4.

    Raises:
        ConfigurationError: math-verify is not installed, or a limit is not positive.
    """
    if not timeout_s > 0 or (workers is not None and workers < 1):
        raise ConfigurationError("math_equivalent: timeout_s and workers must be positive")
    if importlib.util.find_spec("math_verify") is None:
        raise ConfigurationError('math_equivalent needs math-verify: pip install "gym-sdk[math]"')
    config = PoolConfig(workers=workers, timeout_s=timeout_s, memory_limit=_MEMORY_LIMIT)
    pool = WorkerPool("gym_sdk.verifiers.math_worker:equal", config)

    async def verify(rollout: Rollout) -> float:
        answers = answers_of(rollout, "math_equivalent")
        where = f"verifier math_equivalent: task {rollout.task_id!r}"
        try:
            return float(await pool.call(rollout.output_text, answers))
        except DeadlineError as error:
            raise VerifierError(
                f"{where}: the comparison did not finish within {timeout_s:g} s", verifier="math_equivalent"
            ) from error
        except Exception as error:
            known = isinstance(error, WorkerError | ValueError)
            text = str(error) if known else f"{type(error).__name__}: {error}"
            raise VerifierError(f"{where}: {text}", verifier="math_equivalent") from error

    return named("math_equivalent", verify)
