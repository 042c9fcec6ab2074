"""The README's first program does what the README says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_python_block_is_python(number: int) -> None:
    compile(BLOCKS[number], f"README block {number}", "exec", flags=0x2000)  # top-level await is allowed


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_program_runs(tiny_policy: Path, tmp_path: Path) -> None:
    (program,) = [block for block in BLOCKS if "asyncio.run(main())" in block]
    (tmp_path / "first.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "first.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "mean_reward=" in done.stdout
    assert "rollouts=128" in done.stdout
