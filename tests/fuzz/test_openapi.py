"""The server against its own description: Schemathesis asks what that allows, and what it does not."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import schemathesis
from hypothesis import given
from schemathesis import Case, GenerationMode
from schemathesis.checks import positive_data_acceptance
from schemathesis.schemas import BaseSchema
from support.fuzzing import Target, fuzz_settings, target

from backends.server.operation.kinds import RouteKind, kind_of
from backends.server.operations import OPERATIONS

pytestmark = pytest.mark.slow

_KEY = {"Authorization": "Bearer schemathesis"}

# Those of admins pause the engine, replace its weights and wait for other machines: none of them would
# leave a server that could be asked anything else. `tests/server/test_weights.py` has their wrong bodies.
_ROUTES = [
    (operation, path)
    for operation in OPERATIONS
    for path in operation.paths
    if kind_of(path) is not RouteKind.ADMIN
]
_RIGHT = [(operation.method, path) for operation, path in _ROUTES]
_WRONG = [
    (operation.method, path)
    for operation, path in _ROUTES
    if operation.body is not None or operation.query or "{" in path  # else nothing could be wrong
]


@pytest.fixture(scope="module")
def guarded(untrained_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """A server with a key, so that it can be seen whether each route asks for it."""
    log = tmp_path_factory.mktemp("openapi") / "server.log"
    with target(untrained_policy, log, "--api-key", "schemathesis") as started:
        yield started
        started.check_log()


@cache
def _described(root: str) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{root}/openapi.json", headers=_KEY)


def _attack(server: Target, method: str, path: str, mode: GenerationMode) -> None:
    operation = _described(server.root)[path][method]

    @fuzz_settings(15)
    @given(case=operation.as_strategy(generation_mode=mode))
    def attack(case: Case) -> None:
        # a schema says less than what is checked: which calls belong together, which model there is
        case.call_and_validate(headers=_KEY, excluded_checks=[positive_data_acceptance])

    attack()


@pytest.mark.parametrize(("method", "path"), _RIGHT)
def test_what_fits_the_description_is_answered_as_it_says(guarded: Target, method: str, path: str) -> None:
    _attack(guarded, method, path, GenerationMode.POSITIVE)


@pytest.mark.parametrize(("method", "path"), _WRONG)
def test_what_does_not_fit_the_description_is_refused(guarded: Target, method: str, path: str) -> None:
    _attack(guarded, method, path, GenerationMode.NEGATIVE)
