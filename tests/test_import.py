"""`import gym_sdk` stays light."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "openai", "aiohttp", "reasoning_gym", "numpy")


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    return set(done.stdout.split())


def test_import_loads_nothing_heavy() -> None:
    loaded = loaded_after("import gym_sdk")
    assert "gym_sdk" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_a_first_program_loads_nothing_heavy_before_it_connects() -> None:
    loaded = loaded_after(
        "from gym_sdk import GymClient, Rollout, Task, tool\nimport gym_sdk.verifiers, gym_sdk.environments"
    )
    assert "gym_sdk.client" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_every_public_name_resolves() -> None:
    import gym_sdk

    for name in gym_sdk.__all__:
        assert getattr(gym_sdk, name) is not None
    assert set(gym_sdk.__all__) <= set(dir(gym_sdk))
