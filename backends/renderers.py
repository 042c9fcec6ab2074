"""Which renderer serves a model: its own chat template, or a hand-written one of its family."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.prefix import Thinking
from backends.rehearsal import TemplateCheck, check
from backends.rendering import Renderer, TemplateRenderer
from backends.rendering.parsing import SGLANG
from gym_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from backends.rendering.families import FamilyRenderer

__all__ = ["RenderingConfig", "load_renderer"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RenderingConfig:
    """How conversations become tokens, and generations items."""

    renderer: str = "auto"
    """`template`: the model's chat template. A family's name (see `backends.rendering.families`): a
    hand-written renderer of the package `renderers`. `auto`: the template; the family where calls can't be
    read from what the template writes, if the package is there."""
    parser: str | None = None
    """How generations are read (see `backends.rendering.parsing.PARSERS`); the template tells by default.
    `sglang:TOOL`, `sglang:TOOL+REASONING` or `sglang:+REASONING`: by SGLang's own, where SGLang generates;
    they are also taken if the template tells nothing and SGLang was started with some."""
    thinking: Thinking = "keep"
    """Whether the thinking of earlier turns is kept, or forks where the chat template drops it."""
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the chat template, e.g. `{"enable_thinking": False}`; a request's own go before them."""


def load_renderer(folder: Path, config: RenderingConfig, *, name: str | None = None) -> Renderer:
    """Load the renderer of a model folder, and check what it can do.

    What a template cannot do is logged; nothing is refused for it, because what cannot be proven forks.

    Args:
        folder: the model's, in the Hugging Face layout.
        config: which renderer, and its settings.
        name: the model's name on the hub, if it was loaded by that.

    Raises:
        ConfigurationError: there is no usable tokenizer, or no such renderer or parser.
    """
    if config.parser is not None and config.parser.startswith(SGLANG):
        # what it reads shows only when it runs, so there is nothing to try out, and no reason for a family
        named = "template" if config.renderer == "auto" else config.renderer
        return _unread(folder, replace(config, renderer=named, parser="none"))
    if config.renderer not in ("auto", "template"):
        return _family_renderer(folder, config.renderer, config)
    try:
        renderer = TemplateRenderer.from_folder(
            folder,
            parser=config.parser,
            template_kwargs=config.template_kwargs,
            keep_thinking=config.thinking == "keep",
        )
    except ConfigurationError as error:
        other = _family_of(folder, name, config, error)
        if other is None:
            raise
        return other
    found = check(renderer, thinking=config.thinking)
    if found.problems:
        other = _family_of(folder, name, config, "; ".join(found.problems))
        if other is not None:
            return other
    _report(folder, found)
    return renderer


def _unread(folder: Path, config: RenderingConfig) -> Renderer:
    if config.renderer != "template":
        return _family_renderer(folder, config.renderer, config)
    return TemplateRenderer.from_folder(
        folder,
        parser=config.parser,
        template_kwargs=config.template_kwargs,
        keep_thinking=config.thinking == "keep",
    )


def _report(folder: Path, found: TemplateCheck) -> None:
    _log.info("chat template of %s: %s", folder, found)
    for problem in found.problems:
        _log.warning("chat template of %s: %s", folder, problem)


def _family_of(folder: Path, name: str | None, config: RenderingConfig, problem: object) -> Renderer | None:
    """Return the family's renderer, if one may be chosen, the package is there and it knows the model."""
    if config.renderer != "auto":
        return None
    from backends.rendering.families import family_of

    try:
        family = family_of(name) if name is not None else None
        hint = family_of(folder) if family is None else None
    except ConfigurationError:
        return None  # the package is not installed
    family = family or hint
    if family is None:
        return None
    try:
        renderer = _family_renderer(folder, family, config)
    except ConfigurationError as error:
        _log.warning("%s cannot be rendered as %s: %s", folder, family, error)
        return None
    deviation = renderer.deviation()
    if hint is not None and deviation is not None:
        return None  # a model that was made from another keeps its name, and may bring another template
    _log.info("%s is rendered as %s by the package renderers, because: %s", folder, family, problem)
    if deviation is not None:
        _log.warning("the %s renderer differs from the template of %s: %s", family, folder, deviation)
    return renderer


def _family_renderer(folder: Path, family: str, config: RenderingConfig) -> FamilyRenderer:
    from transformers import AutoTokenizer

    from backends.rendering.families import make_family_renderer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"no tokenizer can be loaded from {folder}: {error}") from error
    return make_family_renderer(
        family,
        tokenizer,
        parser=config.parser,
        template_kwargs=config.template_kwargs,
        keep_thinking=config.thinking == "keep",
    )
