"""The border to the package `renderers`: nothing else here imports it, and nothing behind it is typed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, get_args

from gym_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["family_of_hub_name", "known_families", "new_renderer"]

_NOT_FAMILIES = frozenset({"auto", "default", "custom"})


def known_families() -> list[str]:
    """Return the names of the families.

    Raises:
        ConfigurationError: the package is not installed.
    """
    return sorted(set(_config_classes()) - _NOT_FAMILIES)


def family_of_hub_name(name: str) -> str | None:
    """Return the family of a model by its exact name on the hub, None if the package does not list it.

    Raises:
        ConfigurationError: the package is not installed.
    """
    family: str | None = _part("base").MODEL_RENDERER_MAP.get(name)
    return family


def new_renderer(
    family: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: Mapping[str, Any],
    *,
    keep_thinking: bool,
) -> Any:
    """Make one of the package's renderers.

    Args:
        family: one of `known_families`.
        tokenizer: the model's.
        settings: settings of the family's chat template.
        keep_thinking: extend prompts across new user messages with their thinking, unless `settings` ask
            for the opposite.

    Raises:
        ValueError: the family does not take these settings, or this is not its tokenizer.
        ConfigurationError: the package is not installed.
    """
    base, config_of = _part("base"), _config_classes()[family]
    fields = {"thinking_retention": "all"} if keep_thinking else {}
    try:
        try:
            config = base.merge_chat_template_kwargs(config_of(**fields), settings)
        except ValueError:
            # Settings that drop thinking contradict `thinking_retention`; they were asked for by name.
            config = base.merge_chat_template_kwargs(config_of(), settings)
        return base.create_renderer(tokenizer, config)
    except Exception as error:  # the package asserts, looks up and downloads: no single class covers it
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _config_classes() -> dict[str, Any]:
    """Return the package's classes of settings by family: the members of an annotated union."""
    union = get_args(_part("configs").RendererConfig)[0]
    return {member.model_fields["name"].default: member for member in get_args(union)}


def _part(name: str) -> Any:
    try:
        return import_module(f"renderers.{name}")
    except ImportError as error:
        raise ConfigurationError(
            "the renderers of model families need the package `renderers`: pip install 'gym-sdk[renderers]'"
        ) from error
