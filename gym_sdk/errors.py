"""Every error that gym-sdk raises: one class for each boundary that can fail.

All of them derive from `GymError`, also inherit the standard type that they are, survive pickling (they
cross process boundaries) and carry the data that a handler needs as attributes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

__all__ = [
    "CheckpointError",
    "ConfigurationError",
    "ContextOverflowError",
    "DatasetError",
    "DeadlineError",
    "GymError",
    "PolicyError",
    "StoreError",
    "TokenContractError",
    "ToolError",
    "TransportError",
    "VerifierError",
]


def _rebuild(cls: type[GymError], args: tuple[Any, ...], state: dict[str, Any]) -> GymError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class GymError(Exception):
    """Root of the library's errors."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, dict(self.__dict__))


class ConfigurationError(GymError, ValueError):
    """A call or a config object asks for something that cannot be done."""


class TransportError(GymError, ConnectionError):
    """A request did not reach the policy, or its answer did not come back.

    Attributes:
        retryable: whether the same request may be sent again (nothing was lost by the failure).
        status: the HTTP status, if there was an answer.
        retry_after_s: the server's `Retry-After`, in seconds.
    """

    def __init__(
        self,
        message: str,
        *,
        retryable: bool,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.retryable = retryable
        self.status = status
        self.retry_after_s = retry_after_s


class PolicyError(GymError, ValueError):
    """The policy's server refused the request: sending it again would not help.

    Attributes:
        status: the HTTP status that stands for this error.
        code: OpenAI's error code, e.g. `context_length_exceeded`.
        param: the request field at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param


class ContextOverflowError(PolicyError):
    """The prompt leaves no room for a single generated token.

    Attributes:
        prompt_tokens: length of the prompt, in tokens.
        context_length: what the engine holds, in tokens.
    """

    def __init__(
        self,
        message: str,
        *,
        prompt_tokens: int | None = None,
        context_length: int | None = None,
        param: str | None = "input",
    ) -> None:
        super().__init__(message, status=400, code="context_length_exceeded", param=param)
        self.prompt_tokens = prompt_tokens
        self.context_length = context_length


class ToolError(GymError, RuntimeError):
    """A tool call failed. The rollout turns it into the tool's output; it never ends the run.

    Attributes:
        tool: the tool's name as the model wrote it.
    """

    def __init__(self, message: str, *, tool: str) -> None:
        super().__init__(message)
        self.tool = tool


class VerifierError(GymError, RuntimeError):
    """A verifier raised, hung, or returned something that is not a reward.

    Attributes:
        verifier: the verifier's name.
    """

    def __init__(self, message: str, *, verifier: str) -> None:
        super().__init__(message)
        self.verifier = verifier


class DeadlineError(GymError, TimeoutError):
    """Something did not finish within its deadline.

    Attributes:
        what: what was waited for.
        seconds: the deadline.
    """

    def __init__(self, what: str, *, seconds: float) -> None:
        super().__init__(f"{what} did not finish within its deadline of {seconds:g} s")
        self.what = what
        self.seconds = seconds


class TokenContractError(GymError, ValueError):
    """Token fields are missing, partial, contradict each other, or cannot be what was sampled."""


class DatasetError(GymError, ValueError):
    """A dataset cannot be read.

    Attributes:
        path: the file.
        line: 1-based line number, if one line is at fault.
        field: the field of that line at fault.
    """

    def __init__(
        self,
        message: str,
        *,
        path: str | Path,
        line: int | None = None,
        field: str | None = None,
    ) -> None:
        where = f"{path}:{line}" if line is not None else str(path)
        super().__init__(f"{where}: {message}")
        self.path = str(path)
        self.line = line
        self.field = field


class CheckpointError(GymError, ValueError):
    """A checkpoint cannot be used: it is damaged, or belongs to another model.

    Attributes:
        path: the checkpoint.
    """

    def __init__(self, message: str, *, path: str | Path) -> None:
        super().__init__(f"{path}: {message}")
        self.path = str(path)


class StoreError(GymError, OSError):
    """A store of rollouts cannot be opened, read or written; no rollout that was written is lost by it.

    Attributes:
        path: the file.
        line: 1-based line number, if one line is at fault.
        errno: the operating system's error number, if it said one (`errno.ENOSPC`: the disk is full).
    """

    def __init__(
        self, message: str, *, path: str | Path, line: int | None = None, errno: int | None = None
    ) -> None:
        where = f"{path}:{line}" if line is not None else str(path)
        super().__init__(f"{where}: {message}")
        self.message = message
        self.path = str(path)
        self.line = line
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        # `errno` lives outside of __dict__, in OSError itself
        return partial(type(self), path=self.path, line=self.line, errno=self.errno), (self.message,)
