"""Which request fields this server honours; everything else is refused by name, never ignored."""

from __future__ import annotations

from typing import Any

from gym_sdk.errors import PolicyError
from gym_sdk.schema import ResponseRequest

__all__ = [
    "LOG_PROBS",
    "check_model",
    "check_supported",
    "invalid",
    "refuse",
    "stop_strings",
    "wants_log_probs",
    "wants_sealed_reasoning",
]

LOG_PROBS = "message.output_text.logprobs"
SEALED_REASONING = "reasoning.encrypted_content"

_INCLUDED = frozenset(
    {
        LOG_PROBS,
        SEALED_REASONING,
        # of items that never occur here
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
        "file_search_call.results",
        "message.input_image.image_url",
        "web_search_call.action.sources",
        "web_search_call.results",
    }
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "prompt_cache_retention": ("in_memory", "in-memory", "24h"),
    "prompt_cache_options": ({},),
    "stream_options": ({},),
}
"""Values of fields that are not modelled which say what happens anyway."""

_MAX_METADATA, _MAX_KEY, _MAX_VALUE = 16, 64, 512
_MAX_STOPS, _MAX_STOP = 16, 1024


def refuse(param: str, message: str) -> PolicyError:
    """Return the error for a field that this server cannot honour."""
    return PolicyError(message, code="unsupported_parameter", param=param)


def invalid(param: str, message: str) -> PolicyError:
    """Return the error for a field whose value is wrong."""
    return PolicyError(f"{param} {message}", code="invalid_value", param=param)


def check_model(asked: str | None, name: str) -> None:
    """Refuse another model than the one that is served; none named is that one.

    Raises:
        PolicyError: another one is asked for (404).
    """
    if asked is not None and asked != name:
        raise PolicyError(
            f"the model {asked!r} does not exist here; this server serves {name!r}",
            status=404,
            code="model_not_found",
            param="model",
        )


def check_supported(request: ResponseRequest) -> None:
    """Refuse what a policy would otherwise ignore, and values that no schema rules out.

    Raises:
        PolicyError: `param` names the field.
    """
    if request.stream:
        raise refuse("stream", "`Policy.stream` makes the stream; `respond` answers in one piece")
    for index, name in enumerate(request.include or ()):
        if name not in _INCLUDED:
            raise invalid(f"include[{index}]", f"must be one of {', '.join(sorted(_INCLUDED))}, not {name!r}")
    if request.reasoning is not None and request.reasoning.summary not in (None, "auto"):
        raise refuse("reasoning.summary", "nothing summarises the thinking here; it is in `content`, whole")
    if request.text is not None and request.text.verbosity not in (None, "medium"):
        raise refuse("text.verbosity", "this server has no means of making answers longer or shorter")
    for part, value in (("text", request.text), ("reasoning", request.reasoning)):
        _check_extra(value.model_extra if value is not None else None, f"{part}.")
    _check_extra(request.model_extra, "")
    _check_metadata(request.metadata)
    stop_strings(request)


def wants_log_probs(request: ResponseRequest) -> bool:
    """Whether the answer's text shall carry log-probs."""
    return bool(request.top_logprobs) or LOG_PROBS in (request.include or ())


def wants_sealed_reasoning(request: ResponseRequest) -> bool:
    """Whether thinking shall come with a sealed copy, for clients that send back nothing else of it."""
    return SEALED_REASONING in (request.include or ())


def stop_strings(request: ResponseRequest) -> tuple[str, ...]:
    """Return the strings at which the generation ends.

    Raises:
        PolicyError: there are too many, or one is empty or too long.
    """
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if len(stops) > _MAX_STOPS:
        raise invalid("stop", f"holds {len(stops)} strings; {_MAX_STOPS} are the most")
    for index, stop in enumerate(stops):
        if not 0 < len(stop) <= _MAX_STOP:
            raise invalid(f"stop[{index}]", f"must have 1 to {_MAX_STOP} characters, not {len(stop)}")
    return stops


def _check_extra(extra: dict[str, Any] | None, prefix: str) -> None:
    for name, value in (extra or {}).items():
        if value is not None and value not in _NEUTRAL.get(name, ()):
            raise refuse(prefix + name, f"the parameter {prefix + name!r} is not supported by this server")


def _check_metadata(metadata: dict[str, Any] | None) -> None:
    if metadata is None:
        return
    if len(metadata) > _MAX_METADATA:
        raise invalid("metadata", f"has {len(metadata)} entries; {_MAX_METADATA} are the most")
    for key, value in metadata.items():
        if len(key) > _MAX_KEY:
            raise invalid("metadata", f"has a key of {len(key)} characters; {_MAX_KEY} are the most")
        if not isinstance(value, str) or len(value) > _MAX_VALUE:
            raise invalid(f"metadata.{key}", f"must be text of at most {_MAX_VALUE} characters")
