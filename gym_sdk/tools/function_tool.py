"""`@tool`: a typed function that a policy may call."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, overload

from gym_sdk.calling import call_async, call_in_thread, is_async
from gym_sdk.deadline import Deadline
from gym_sdk.errors import ConfigurationError, GymError, ToolError
from gym_sdk.schema import FunctionTool
from gym_sdk.tools.arguments import Arguments
from gym_sdk.tools.context import ToolContext
from gym_sdk.tools.output import Output, output_of
from gym_sdk.tools.signature import read_signature

__all__ = ["Tool", "ToolLike", "resolve_tools", "tool"]

P = ParamSpec("P")
R = TypeVar("R")

_MAX_MESSAGE = 2_000


class Tool(Generic[P, R]):
    """A function that a policy may call. Calling it calls the function, unchanged.

    Attributes:
        name: what the policy calls it.
        description: what the policy reads about it.
        timeout_s: deadline of one call, in seconds; None leaves it to the rollout.
        max_output_chars: longer outputs are cut; None leaves it to the rollout.
        schema: the tool as it is sent with a request.
        strict: whether the schema is in OpenAI's strict form.
    """

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_s: float | None = None,
        max_output_chars: int | None = None,
        strict: bool | None = None,
        namespace: Mapping[str, Any] | None = None,
    ) -> None:
        """Make a tool of a function; `tool` is the short way.

        Args:
            function: a typed function or coroutine function, a bound method, a partial or a callable object.
            name: replaces the function's name.
            description: replaces the docstring.
            timeout_s: deadline of one call, in seconds.
            max_output_chars: of a longer output the model reads only the head.
            strict: True insists on OpenAI's strict schema, False never uses it, None uses it if possible.
            namespace: local names that the annotations use.

        Raises:
            ConfigurationError: an argument has no type, or one without a JSON schema, and the like.
        """
        if isinstance(function, Tool):
            function = function._function
        signature = read_signature(function, name=name, description=description, namespace=namespace)
        if timeout_s is not None and not timeout_s > 0:
            raise ConfigurationError(f"tool {signature.name}: timeout_s must be positive, not {timeout_s}")
        if max_output_chars is not None and max_output_chars < 1:
            raise ConfigurationError(
                f"tool {signature.name}: max_output_chars must be at least 1, not {max_output_chars}"
            )
        self._function: Callable[P, R] = function
        self._call = call_async if is_async(function) else call_in_thread
        self._arguments = Arguments(signature.name, signature.parameters, strict=strict)
        self.name = signature.name
        self.description = signature.description
        self.takes_context = signature.takes_context
        self.timeout_s = timeout_s
        self.max_output_chars = max_output_chars
        self.strict = self._arguments.strict
        self.schema = FunctionTool(
            name=self.name,
            description=self.description,
            parameters=self._arguments.schema,
            strict=self.strict,
        )
        functools.update_wrapper(self, function, updated=())
        self.__name__: str = getattr(function, "__name__", self.name)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself."""
        return self._function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"Tool({self.name!r})"

    async def run(self, arguments: str, context: ToolContext | None = None) -> str:
        """Check the arguments that a model sent, call the function, and write its result as text.

        A coroutine function runs on the event loop; any other runs in a worker thread. On cancellation the
        thread is left behind: Python cannot stop it, and its result is dropped.

        Args:
            arguments: JSON text as the model wrote it; empty text means no arguments.
            context: handed to a function whose first parameter is a `ToolContext`.

        Returns:
            The output's text.

        Raises:
            ToolError: the arguments are wrong, the function raised, ran out of time, or returned something
                that has no text form. The message is for the model.
            ConfigurationError: the function wants a context and there is none.
        """
        return (await self.answer(arguments, context)).text

    async def answer(
        self,
        arguments: str,
        context: ToolContext | None = None,
        timeout_s: float | None = None,
        max_output_chars: int | None = None,
    ) -> Output:
        """Do what `run` does, within limits where the tool has none of its own.

        Args:
            arguments: JSON text as the model wrote it; empty text means no arguments.
            context: handed to a function whose first parameter is a `ToolContext`.
            timeout_s: deadline of the call if the tool has none, in seconds.
            max_output_chars: where an output is cut if the tool does not say.

        Raises:
            ToolError: as `run`.
            ConfigurationError: as `run`.
        """
        positional, keywords = self._arguments.parse(arguments)
        if self.takes_context:
            if context is None:
                raise ConfigurationError(f"tool {self.name} takes a ToolContext; pass run(..., context=...)")
            positional.insert(0, context)
        limit_s = timeout_s if self.timeout_s is None else self.timeout_s
        with Deadline(limit_s) as deadline:
            try:
                result = await self._call(self._function, *positional, **keywords)
            except ToolError:
                raise
            except (Exception, SystemExit) as error:
                raise ToolError(f"{self.name} failed: {_message(error)}", tool=self.name) from error
        if deadline.expired:
            raise ToolError(f"{self.name} did not finish within {limit_s:g} s", tool=self.name)
        limit = max_output_chars if self.max_output_chars is None else self.max_output_chars
        try:
            return output_of(result, limit)
        except (ValueError, RecursionError) as error:
            raise ToolError(
                f"{self.name} returned a {type(result).__name__}, which cannot be written as JSON: {error}",
                tool=self.name,
            ) from error


ToolLike: TypeAlias = Tool[..., Any] | Callable[..., Any]
"""A tool, or a typed function that becomes one."""


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...


@overload
def tool(
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = None,
    max_output_chars: int | None = None,
    strict: bool | None = None,
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...


def tool(
    function: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float | None = None,
    max_output_chars: int | None = None,
    strict: bool | None = None,
) -> Tool[P, R] | Callable[[Callable[P, R]], Tool[P, R]]:
    """Make a tool of a typed function, as `@tool` or `@tool(name=...)`.

    The schema comes from the annotations, the texts from the docstring (Google style) or from
    `Annotated[type, Field(description=...)]`. An argument with a default is nullable in the strict schema,
    and null then means the default.

    Args:
        function: a function, coroutine function, bound method, partial, callable object or tool.
        name: replaces the function's name.
        description: replaces the docstring's text.
        timeout_s: deadline of one call, in seconds.
        max_output_chars: of a longer output the model reads only the head, and how much is missing.
        strict: True insists on OpenAI's strict schema, False never uses it, None uses it if possible (a
            free-form dict, for example, has none).

    Raises:
        ConfigurationError: the function cannot be a tool; names the argument at fault.
    """
    # annotations written as text may name classes that are local to the caller
    namespace = sys._getframe(1).f_locals

    def decorate(function: Callable[P, R]) -> Tool[P, R]:
        return Tool(
            function,
            name=name,
            description=description,
            timeout_s=timeout_s,
            max_output_chars=max_output_chars,
            strict=strict,
            namespace=namespace,
        )

    return decorate if function is None else decorate(function)


def resolve_tools(tools: Iterable[ToolLike] | None) -> dict[str, Tool[..., Any]]:
    """Return the tools by name; plain functions become tools.

    Raises:
        ConfigurationError: two tools have the same name, or an entry cannot be a tool.
    """
    if tools is None:
        return {}
    if isinstance(tools, Tool) or not isinstance(tools, Iterable):
        raise ConfigurationError(f"tools must be a list of tools, not {tools!r:.100}")
    resolved: dict[str, Tool[..., Any]] = {}
    for entry in tools:
        found = entry if isinstance(entry, Tool) else Tool(entry)
        if found.name in resolved:
            raise ConfigurationError(f"two tools are called {found.name!r}; give one tool(name=...)")
        resolved[found.name] = found
    return resolved


def _message(error: BaseException) -> str:
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if isinstance(error, GymError):  # its message is a sentence of its own
        text = str(error)
    else:
        text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return text if len(text) <= _MAX_MESSAGE else text[:_MAX_MESSAGE] + "..."
