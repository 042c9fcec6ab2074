"""Deadlines of the engine over SGLang, and of the watch over its replicas."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

from gym_sdk.errors import ConfigurationError

__all__ = ["FleetConfig", "SGLangConfig"]


@dataclass(frozen=True, slots=True)
class SGLangConfig:
    """How long one `SGLangEngine` waits, and how it sends weights.

    Attributes:
        connect_s: for a new connection.
        generate_s: for a generation, the time that it waits in SGLang's queue or for the end of a pause
            included.
        control_s: for what answers at once: information, pause, continue, abort.
        update_s: for an update of the weights, from the first byte to the last.
        bucket_bytes: how much of the weights one request carries, for tensors; a larger tensor goes alone.
        shared_memory: a folder in memory (tmpfs) by which tensors reach an SGLang on this machine; none is
            used where it is missing or has too little room, and none if this is None.
        refused_retries: how often a request is sent again whose connection was refused; nothing was sampled
            then. Every other failure is the caller's to retry.

    Raises:
        ConfigurationError: a value is out of range.
    """

    connect_s: float = 10.0
    generate_s: float = 3600.0
    control_s: float = 60.0
    update_s: float = 900.0
    bucket_bytes: int = 128 * 2**20
    shared_memory: str | None = "/dev/shm"
    refused_retries: int = 3

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("shared_memory", "refused_retries") and not value > 0:
                raise ConfigurationError(f"{field.name} must be positive, not {value}")
        if self.shared_memory is not None and not Path(self.shared_memory).is_absolute():
            raise ConfigurationError(f"shared_memory must be a full path or None, not {self.shared_memory!r}")
        if self.refused_retries < 0:
            raise ConfigurationError(f"refused_retries must not be negative, not {self.refused_retries}")


@dataclass(frozen=True, slots=True)
class FleetConfig:
    """How replicas are watched.

    Attributes:
        check_s: from one look at a replica to the next.
        health_s: within which a replica must answer that; its scheduler, too. A second miss in a row takes it
            out; a refused connection does at once.
        away_s: how long a request waits while no replica serves.

    Raises:
        ConfigurationError: a value is out of range.
    """

    check_s: float = 2.0
    health_s: float = 20.0
    away_s: float = 300.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigurationError(f"{field.name} must be positive, not {value}")
