"""Whether a tracker's package is installed, without importing it."""

from __future__ import annotations

from importlib.util import find_spec

from gym_sdk.errors import ConfigurationError

__all__ = ["require"]


def require(package: str, *, extra: str) -> None:
    """Check that a package is installed; importing it (seconds, for some) is left to the tracker's thread.

    Args:
        package: its import name.
        extra: the extra of gym-sdk that brings it.

    Raises:
        ConfigurationError: it is not.
    """
    spec = find_spec(package)
    # no origin: a mere folder of that name, such as the `wandb/` and `trackio/` that earlier runs left here
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            f'tracking to {package} needs the package {package}: pip install "gym-sdk[{extra}]"'
        )
