"""One server process for a module's attacks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fuzzing import Target, target


@pytest.fixture(scope="module")
def server(untrained_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with target(untrained_policy, tmp_path_factory.mktemp("fuzz") / "server.log") as started:
        yield started
        started.check_health()
