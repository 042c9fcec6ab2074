"""Who may call the server, and how much it takes on."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from gym_sdk.errors import ConfigurationError

__all__ = ["AccessConfig", "OperationConfig", "RequestLimits"]


@dataclass(frozen=True, slots=True)
class AccessConfig:
    """Who may call which routes. Without any key, everybody may call all of them.

    Raises:
        ConfigurationError: a key is empty, or cannot stand in a header.
    """

    api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys for the model's routes: model calls, models, captures, `/openapi.json`."""
    admin_api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys for all routes; nothing else opens those for weights, pauses and metrics once there is a key."""
    cors_origins: tuple[str, ...] = ()
    """Origins whose pages may call from a browser, such as `https://lab.example`; `*` is every one."""

    def __post_init__(self) -> None:
        for key in self.keys:
            # the message must not show the key
            if not key or not key.isascii() or not key.isprintable() or " " in key:
                raise ConfigurationError(
                    "an API key must be printable ASCII without blanks, and not empty; one of "
                    f"{len(self.keys)} is something else"
                )

    @property
    def keys(self) -> tuple[str, ...]:
        """All keys; empty if everybody may call everything."""
        return (*self.api_keys, *self.admin_api_keys)


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """How much the server takes on, and how long anything may take.

    Raises:
        ConfigurationError: a limit is not positive.
    """

    max_body_bytes: int = 64 * 2**20
    """The largest body, after decompression; more is refused with 413. Tensors have a limit of their own."""
    max_concurrent: int = 4096
    """Model calls at once; more are refused with 429."""
    request_timeout_s: float = 1800.0
    """How long a model call may take, from its head to the end of its answer; then it ends with 504."""
    abort_s: float = 5.0
    """How long a request that was cut may take to tell its client; then its connection is closed."""
    max_connections: int = 16384
    """Connections at once; more are refused with 503."""
    idle_s: float = 75.0
    """How long a connection may be idle or take to send a request's head; then it is closed."""
    body_window_s: float = 20.0
    """A body that is on its way has to bring `body_window_bytes` in each such time, or ends with 408."""
    body_window_bytes: int = 4096
    """See `body_window_s`."""
    retry_after_s: float = 1.0
    """After how long a client is told to come back when there is no room."""

    def __post_init__(self) -> None:
        for limit in fields(self):
            if not getattr(self, limit.name) > 0:
                raise ConfigurationError(
                    f"RequestLimits.{limit.name} must be positive, not {getattr(self, limit.name)}"
                )


@dataclass(frozen=True, slots=True)
class OperationConfig:
    """How an application is operated."""

    access: AccessConfig = field(default_factory=AccessConfig)
    """Who may call."""
    limits: RequestLimits = field(default_factory=RequestLimits)
    """How much is taken on."""
