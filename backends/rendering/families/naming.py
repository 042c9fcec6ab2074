"""Which family a model belongs to. Only names decide: templates differ between revisions of one family."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.rendering.families.package import family_of_hub_name, known_families

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["family_names", "family_of"]

_CACHED = re.compile(r"models--(.+?)--(.+)")


def family_names() -> list[str]:
    """Return the names of the families that the package `renderers` knows.

    Raises:
        ConfigurationError: the package is not installed.
    """
    return known_families()


def family_of(
    model: str | Path | PreTrainedTokenizerBase, config: Mapping[str, Any] | None = None
) -> str | None:
    """Return the family that a model belongs to, or None if that is not sure.

    What counts is the model's name on the hub, exactly: as it is given, as the hub's cache has it in its
    folders, or as `_name_or_path` in the model's `config.json`. A fine-tuned model that keeps its base's
    `_name_or_path` may bring another chat template; `FamilyRenderer.deviation` tells.

    Args:
        model: a name on the hub, a folder, or a tokenizer.
        config: the model's `config.json`; None: it is read if `model` is a folder.

    Raises:
        ConfigurationError: the package `renderers` is not installed.
    """
    given = model if isinstance(model, str | Path) else getattr(model, "name_or_path", "")
    for name in _names(str(given), config):
        family = family_of_hub_name(name)
        if family is not None:
            return family
    return None


def _names(given: str, config: Mapping[str, Any] | None) -> Iterator[str]:
    yield given
    path = Path(given)
    for part in reversed(path.parts):
        match = _CACHED.fullmatch(part)
        if match:
            yield f"{match[1]}/{match[2]}"
    if config is None:
        config = _config(path)
    name = config.get("_name_or_path")
    if isinstance(name, str):
        yield name


def _config(folder: Path) -> Mapping[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
