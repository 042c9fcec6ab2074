"""Python objects that a command line names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from gym_sdk.errors import ConfigurationError

__all__ = ["load_object"]


def load_object(name: str) -> Any:
    """Import `module:name`; the current folder is searched first.

    Raises:
        ConfigurationError: the name has another form, or cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigurationError(f"{name!r} must have the form module:name")
    sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(f"{name} cannot be loaded: {error}") from error
    finally:
        sys.path.pop(0)
