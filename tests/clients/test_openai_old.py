"""The oldest openai package that is supported, unmodified, in a process of its own."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest
from support.clients import Scripted
from support.openai_core import CHECKS

SCRIPT = """
import asyncio, sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, sys.argv[2])
import openai
from support.openai_core import CHECKS

async def main(url):
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        for check in CHECKS:
            await check.play(client)
            print(check.name)

assert openai.__version__ == "2.8.0", openai.__version__
asyncio.run(main(sys.argv[1]))
"""


@pytest.mark.asyncio
async def test_core(scripted: Scripted) -> None:
    folder = Path(sys.prefix) / "openai-2.8.0"
    assert folder.is_dir(), "openai 2.8.0 is not beside the environment; `make test` puts it there"
    url = await scripted([said for check in CHECKS for said in check.says])
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", SCRIPT, url, str(Path(__file__).parents[1])],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(folder)},
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [check.name for check in CHECKS]
