"""Deadlines of the engine over SGLang."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gym_sdk.errors import ConfigurationError

__all__ = ["SGLangConfig"]


@dataclass(frozen=True, slots=True)
class SGLangConfig:
    """How long one `SGLangEngine` waits.

    Attributes:
        connect_s: for a new connection.
        generate_s: for a generation, the time that it waits in SGLang's queue or for the end of a pause
            included.
        control_s: for what answers at once: information, pause, continue, abort.
        update_s: for SGLang to load a folder of weights.
        refused_retries: how often a request is sent again whose connection was refused; nothing was sampled
            then. Every other failure is the caller's to retry.

    Raises:
        ConfigurationError: a value is out of range.
    """

    connect_s: float = 10.0
    generate_s: float = 3600.0
    control_s: float = 60.0
    update_s: float = 900.0
    refused_retries: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "refused_retries" and not value > 0:
                raise ConfigurationError(f"{field.name} must be positive, not {value}")
        if self.refused_retries < 0:
            raise ConfigurationError(f"refused_retries must not be negative, not {self.refused_retries}")
