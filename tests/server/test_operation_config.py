"""Configs of a server's operation, and the arguments that make them."""

from __future__ import annotations

import pickle
from argparse import ArgumentParser
from pathlib import Path

import pytest

from backends.server import ServerConfig
from backends.server.operation import AccessConfig, OperationConfig, RequestLimits
from gym_sdk.cli._operation import add_operation_arguments, operation_config
from gym_sdk.errors import ConfigurationError

ACCESS = AccessConfig(api_keys=("model-1", "model-2"), admin_api_keys=("admin-1",))


@pytest.mark.parametrize("key", ["", " ", "a b", "zq\t", "schlüssel", "line\n"])
def test_keys_that_cannot_stand_in_a_header_are_refused_unseen(key: str) -> None:
    with pytest.raises(ConfigurationError, match="printable ASCII") as caught:
        AccessConfig(admin_api_keys=(key,))
    assert not key.strip() or key.strip() not in str(caught.value)


def test_keys_are_not_shown() -> None:
    assert "model-1" not in repr(ACCESS)
    assert "admin-1" not in repr(OperationConfig(ACCESS))
    assert pickle.loads(pickle.dumps(ACCESS)) == ACCESS


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.1.2.3", "gpu-7.cluster"])
def test_no_server_for_other_machines_without_a_key(host: str) -> None:
    with pytest.raises(ConfigurationError, match="--api-key"):
        ServerConfig(host=host)
    assert ServerConfig(host=host, allow_unauthenticated=True).host == host
    assert ServerConfig(host=host, operation=OperationConfig(ACCESS)).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert ServerConfig(host=host).host == host


@pytest.mark.parametrize("limit", ["max_body_bytes", "request_timeout_s", "idle_s"])
def test_limits_are_positive(limit: str) -> None:
    with pytest.raises(ConfigurationError, match=limit):
        RequestLimits(**{limit: 0})


def parsed(*arguments: str) -> OperationConfig:
    parser = ArgumentParser()
    add_operation_arguments(parser)
    return operation_config(parser.parse_args(arguments))


def test_keys_come_from_arguments_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("GYM_SDK_API_KEY", "GYM_SDK_ADMIN_API_KEY"):
        monkeypatch.delenv(variable, raising=False)
    assert parsed() == OperationConfig()
    file = tmp_path / "keys"
    file.write_text("three\n\n  four\n")
    monkeypatch.setenv("GYM_SDK_API_KEY", "two")
    monkeypatch.setenv("GYM_SDK_ADMIN_API_KEY", "chief")
    access = parsed("--api-key", "one", "--api-key-file", str(file), "--admin-api-key", "head").access
    assert set(access.api_keys) == {"one", "two", "three", "four"}
    assert set(access.admin_api_keys) == {"head", "chief"}


def test_a_file_without_keys_opens_nothing(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")
    for file in (empty, tmp_path / "missing"):
        with pytest.raises(ConfigurationError, match=file.name):
            parsed("--api-key-file", str(file))


def test_limits_and_origins_come_from_arguments() -> None:
    config = parsed(
        *("--max-body-mb", "0.5", "--max-concurrent", "7", "--max-connections", "9"),
        *("--request-timeout-s", "3", "--idle-timeout-s", "4", "--cors-origin", "https://a.example"),
    )
    assert config.limits == RequestLimits(
        max_body_bytes=2**19, max_concurrent=7, max_connections=9, request_timeout_s=3.0, idle_s=4.0
    )
    assert config.access.cors_origins == ("https://a.example",)
