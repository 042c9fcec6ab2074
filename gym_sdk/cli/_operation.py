"""Arguments of `gym-sdk serve` about its operation: keys, limits, logs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gym_sdk.client import API_KEY_VARIABLE
from gym_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from backends.server.operation import OperationConfig

__all__ = ["add_operation_arguments", "operation_config"]

_ADMIN_API_KEY_VARIABLE = "GYM_SDK_ADMIN_API_KEY"


def add_operation_arguments(parser: argparse.ArgumentParser) -> None:
    """Add who may call the server, how much it takes on, and what it says."""
    keys = parser.add_argument_group("keys", "without any key, the server is for this machine alone")
    keys.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="opens the model's routes; may be repeated. The list of processes shows it to other users of "
        f"this machine: prefer the environment variable {API_KEY_VARIABLE}, or --api-key-file",
    )
    keys.add_argument("--api-key-file", type=Path, metavar="FILE", help="file with one such key a line")
    keys.add_argument(
        "--admin-api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="opens all routes, those for weights, pauses and metrics included; also the environment "
        f"variable {_ADMIN_API_KEY_VARIABLE}",
    )
    keys.add_argument(
        "--allow-unauthenticated", action="store_true", help="serve other machines without any key"
    )
    keys.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="lets pages of this origin call from a browser; may be repeated, * is every origin",
    )
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-body-mb", type=float, default=64.0, help="largest body of a request")
    limits.add_argument("--max-concurrent", type=int, default=4096, help="model calls at once")
    limits.add_argument("--max-connections", type=int, default=16384, help="connections at once")
    limits.add_argument(
        "--request-timeout-s", type=float, default=1800.0, help="longest time for a model call"
    )
    limits.add_argument(
        "--idle-timeout-s",
        type=float,
        default=75.0,
        help="how long a connection may be idle, or take to send a request's head",
    )
    limits.add_argument("--drain-s", type=float, default=10.0, help="time to finish after SIGTERM")
    logs = parser.add_argument_group("logs")
    logs.add_argument("--log-format", default="text", choices=["text", "json"])
    logs.add_argument(
        "--log-level",
        default=argparse.SUPPRESS,
        help="debug, info (a line for each request), warning or error",
    )


def operation_config(arguments: argparse.Namespace) -> OperationConfig:
    """Return the same as a config.

    Raises:
        ConfigurationError: a key or a limit cannot be one, or the file of keys cannot be read.
    """
    from backends.server.operation import AccessConfig, OperationConfig, RequestLimits

    keys = [*arguments.api_key, *_key_of(API_KEY_VARIABLE), *_keys_in(arguments.api_key_file)]
    access = AccessConfig(
        api_keys=tuple(keys),
        admin_api_keys=(*arguments.admin_api_key, *_key_of(_ADMIN_API_KEY_VARIABLE)),
        cors_origins=tuple(arguments.cors_origin),
    )
    limits = RequestLimits(
        max_body_bytes=int(arguments.max_body_mb * 2**20),
        max_concurrent=arguments.max_concurrent,
        max_connections=arguments.max_connections,
        request_timeout_s=arguments.request_timeout_s,
        idle_s=arguments.idle_timeout_s,
    )
    return OperationConfig(access, limits)


def _key_of(variable: str) -> list[str]:
    value = os.environ.get(variable)
    return [value] if value else []


def _keys_in(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"the keys in {file} cannot be read: {error}") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ConfigurationError(f"{file} holds no keys; without any, everybody may call")
    return keys
