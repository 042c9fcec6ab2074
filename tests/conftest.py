"""Policies made on this machine, shared by the session."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.register_assert_rewrite("conformance.judge", "conformance.responses", "conformance.surfaces")


@pytest.fixture(scope="session")
def untrained_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with random weights: the real tokenizer, template and architecture, made in a second."""
    from backends.tiny import TinyRecipe, build_tiny_policy

    return build_tiny_policy(tmp_path_factory.mktemp("tiny") / "untrained", TinyRecipe.untrained())


@pytest.fixture(scope="session")
def tiny_policy() -> Path:
    """The tiny policy after its warm start: about a minute the first time, then cached."""
    from backends.tiny import cached_tiny_policy

    return cached_tiny_policy()
