"""Models by folder, and by name in a cache in the hub's layout."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from backends.hub import model_folder
from gym_sdk.errors import ConfigurationError

PROGRAM = """
import sys
from backends.loading import PolicyConfig, load_policy
print(load_policy(PolicyConfig(model=sys.argv[1])).engine.info.vocab_size)
"""


def run(cache: Path, name: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PROGRAM, name]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100, check=False)


def test_a_name_is_found_in_the_hubs_cache(untrained_policy: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc123")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc123").symlink_to(untrained_policy, target_is_directory=True)
    found = run(tmp_path, "someone/tiny")
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 256
    missing = run(tmp_path, "someone/else")
    assert missing.returncode != 0
    assert "ConfigurationError: there is no model folder someone/else, and the hub" in missing.stderr


def test_a_path_is_never_looked_up_on_the_hub(tmp_path: Path) -> None:
    assert model_folder(tmp_path) == tmp_path
    for path in (tmp_path / "missing", "./a/b", "missing", "../missing"):
        with pytest.raises(ConfigurationError, match="there is no model folder"):
            model_folder(path)
