"""Where a model's files are: a folder, or a name on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from gym_sdk.errors import ConfigurationError

__all__ = ["model_folder"]

_NEEDED = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt")


def model_folder(model: str | Path) -> Path:
    """Return the folder of a model; a name such as `Qwen/Qwen3-0.6B` is fetched, or found in the hub's cache.

    Raises:
        ConfigurationError: there is no such folder, and no such model on the hub or in its cache.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    name = str(model)
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ConfigurationError(f"there is no model folder {name}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_NEEDED)))
    except (OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigurationError(
            f"there is no model folder {name}, and the hub gives no such model: {reason}"
        ) from error
