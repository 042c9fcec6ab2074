"""Real chat templates: those that the TRL wheel carries."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

__all__ = ["trl_templates"]


def trl_templates() -> dict[str, str]:
    """Return the templates by name, such as `qwen3`."""
    folder = _folder()
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}


def _folder() -> Path:
    spec = importlib.util.find_spec("trl")
    places = [Path(place) for place in spec.submodule_search_locations or ()] if spec else []
    places.append(Path(sys.prefix) / "trl" / "trl")
    for place in places:
        if (place / "chat_templates").is_dir():
            return place / "chat_templates"
    raise FileNotFoundError(
        "these tests read the chat templates of the TRL wheel; install it beside the environment: "
        f"pip install --no-deps --target {Path(sys.prefix) / 'trl'} trl==1.16.0"
    )
