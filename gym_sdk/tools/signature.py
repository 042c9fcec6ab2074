"""A Python callable as a tool sees it: name, description and typed parameters."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Annotated, Any

from pydantic.fields import FieldInfo

from gym_sdk.errors import ConfigurationError
from gym_sdk.tools.context import ToolContext
from gym_sdk.tools.docstring import parse_docstring

__all__ = ["REQUIRED", "Parameter", "Signature", "read_signature"]

REQUIRED: Any = inspect.Parameter.empty
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument that the model may send.

    Attributes:
        annotation: the type, with its `Annotated` metadata.
        default: the Python default, or `REQUIRED`.
        description: from `Annotated[...]`, else from the docstring.
        positional_only: whether Python wants it by position.
    """

    name: str
    annotation: Any
    default: Any = REQUIRED
    description: str | None = None
    positional_only: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """What a tool needs to know about its function."""

    name: str
    description: str | None
    parameters: tuple[Parameter, ...]
    takes_context: bool


def read_signature(
    function: Callable[..., Any],
    *,
    name: str | None = None,
    description: str | None = None,
    namespace: Mapping[str, Any] | None = None,
) -> Signature:
    """Read the name, the description and the parameters of a callable.

    Args:
        function: a function, bound method, `functools.partial` or callable object.
        name: replaces the function's name.
        description: replaces the docstring's text.
        namespace: where annotations written as text look up local names.

    Raises:
        ConfigurationError: the callable cannot be a tool; says which argument is at fault.
    """
    target, bound = _unwrap_partial(function)
    tool_name = _tool_name(target, name)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"tool {tool_name}: its signature cannot be read: {error}") from error
    hints = _type_hints(target, tool_name, namespace or {})
    text, argument_texts = parse_docstring(_docstring(target))
    parameters: list[Parameter] = []
    takes_context = False
    for position, parameter in enumerate(signature.parameters.values()):
        if parameter.name in bound:
            continue
        annotation = hints.get(parameter.name, parameter.annotation)
        if _is_context(annotation):
            if position:
                raise ConfigurationError(
                    f"tool {tool_name}: argument `{parameter.name}` is a ToolContext, which must come first"
                )
            takes_context = True
            continue
        parameters.append(
            _read_parameter(tool_name, parameter, annotation, argument_texts.get(parameter.name))
        )
    return Signature(
        tool_name,
        description if description is not None else text,
        tuple(parameters),
        takes_context,
    )


def _unwrap_partial(function: Callable[..., Any]) -> tuple[Any, frozenset[str]]:
    """Return the callable under partials, and the names that they bind by keyword."""
    bound: set[str] = set()
    target: Any = function
    while isinstance(target, functools.partial):
        bound.update(target.keywords)
        target = target.func
    return target, frozenset(bound)


def _tool_name(target: Any, name: str | None) -> str:
    if inspect.isclass(target):
        raise ConfigurationError(
            f"tool {target.__name__}: a class cannot be a tool; pass a function or a bound method"
        )
    if not callable(target):
        raise ConfigurationError(f"a tool is a function; got {type(target).__name__}: {target!r:.100}")
    found = name if name is not None else getattr(target, "__name__", None)
    if found == "<lambda>":
        raise ConfigurationError(
            "a lambda cannot be a tool: it has no name, and its arguments have no types; write a `def`"
        )
    if found is None:
        raise ConfigurationError(
            f"a {type(target).__name__} object has no name to call it by; use tool(name=...)(object)"
        )
    if not _NAME.fullmatch(found):
        raise ConfigurationError(
            f"tool {found!r}: a name has 1 to 64 letters, digits, underscores or hyphens (OpenAI's rule)"
        )
    if inspect.isasyncgenfunction(target) or inspect.isgeneratorfunction(target):
        raise ConfigurationError(f"tool {found}: a generator cannot be a tool; return one result")
    return str(found)


def _source(target: Any) -> Any:
    """The function that carries annotations and docstring: of an instance, its `__call__`."""
    if inspect.isroutine(target):
        return inspect.unwrap(target)
    return inspect.unwrap(type(target).__call__)


def _docstring(target: Any) -> str | None:
    source = _source(target)
    text = getattr(source, "__doc__", None)
    if text is None and source is not target:
        text = type(target).__doc__
    return text if isinstance(text, str) else None


def _type_hints(target: Any, tool_name: str, namespace: Mapping[str, Any]) -> dict[str, Any]:
    source = _source(target)
    source = getattr(source, "__func__", source)
    written = {
        name: hint for name, hint in getattr(source, "__annotations__", {}).items() if name != "return"
    }
    annotated = SimpleNamespace(__annotations__=written)
    scope = getattr(source, "__globals__", {})
    try:
        try:
            return typing.get_type_hints(annotated, scope, _closure(source), include_extras=True)
        except NameError:
            # a class that is local to the caller, under `from __future__ import annotations`
            return typing.get_type_hints(annotated, scope, dict(namespace), include_extras=True)
    except NameError as error:
        raise ConfigurationError(
            f"tool {tool_name}: an annotation names {error.name!r}, which is not defined where the function "
            "is; import it outside `if TYPE_CHECKING`"
        ) from error
    except (TypeError, SyntaxError) as error:
        raise ConfigurationError(f"tool {tool_name}: an annotation is not a type: {error}") from error


def _closure(function: Any) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals) if inspect.isfunction(function) else {}


def _is_context(annotation: Any) -> bool:
    if typing.get_origin(annotation) is Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation is ToolContext or ToolContext in typing.get_args(annotation)


def _read_parameter(
    tool_name: str, parameter: inspect.Parameter, annotation: Any, text: str | None
) -> Parameter:
    label = f"tool {tool_name}: argument `{parameter.name}`"
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        stars = "*" if parameter.kind is parameter.VAR_POSITIONAL else "**"
        raise ConfigurationError(
            f"tool {tool_name}: `{stars}{parameter.name}` has no schema; name each argument, or take a "
            "list or a dict"
        )
    if annotation is inspect.Parameter.empty:
        if parameter.name in ("self", "cls"):
            raise ConfigurationError(
                f"{label}: decorate the bound method instead, as in tool(object.{tool_name})"
            )
        raise ConfigurationError(f"{label} has no type annotation")
    if isinstance(parameter.default, FieldInfo):
        raise ConfigurationError(
            f"{label}: write Annotated[type, Field(...)] = default instead of a Field as the default"
        )
    return Parameter(
        parameter.name,
        annotation,
        parameter.default,
        _annotated_description(annotation) or text,
        parameter.kind is parameter.POSITIONAL_ONLY,
    )


def _annotated_description(annotation: Any) -> str | None:
    """The description in `Annotated[type, Field(description=...)]` or `Annotated[type, "text"]`."""
    if typing.get_origin(annotation) is not Annotated:
        return None
    for extra in typing.get_args(annotation)[1:]:
        if isinstance(extra, str):
            return extra
        if isinstance(extra, FieldInfo) and extra.description:
            return extra.description
    return None
