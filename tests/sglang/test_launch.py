"""The real SGLang process: its death is noticed, and nothing of it outlives who asked for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from backends.engine import GenerationRequest
from backends.sglang import SGLangEngine, SGLangProcess
from gym_sdk.errors import TransportError

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(300), pytest.mark.last]


@pytest.mark.asyncio
async def test_requests_to_a_killed_sglang_can_be_sent_again(
    sglang: SGLangProcess, tiny_policy: Path
) -> None:
    engine = await SGLangEngine.connect(sglang.url, model=tiny_policy, diagnose=sglang.diagnosis)
    tasks = [
        asyncio.create_task(engine.generate(GenerationRequest(f"killed-{index}", [5]))) for index in range(8)
    ]
    await asyncio.sleep(0.2)
    family = psutil.Process(sglang._keeper.pid).children(recursive=True)
    assert len(family) >= 3  # the server, its scheduler, its detokenizer
    family[0].kill()
    for failure in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(failure, TransportError)
        assert failure.retryable
    assert await sglang.wait() == 128 + signal.SIGKILL
    with pytest.raises(TransportError, match="ended with status 137") as caught:
        await engine.generate(GenerationRequest("after", [5]))
    assert caught.value.retryable
    await engine.aclose()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_nothing_outlives_a_killed_parent(
    tiny_policy: Path, python: Path, arguments: Sequence[str], tmp_path: Path
) -> None:
    program = textwrap.dedent(
        f"""
        import asyncio
        from backends.engine import GenerationRequest, SamplingParams
        from backends.sglang import SGLangOptions, open_sglang

        async def main():
            options = SGLangOptions(
                python={str(python)!r},
                arguments={tuple(arguments)!r},
                log={str(tmp_path / "log")!r},
                start_s=120,  # well before the test's timeout
            )
            async with open_sglang({str(tiny_policy)!r}, options) as engine:
                request = GenerationRequest("one", [5], SamplingParams(max_new_tokens=2))
                print((await engine.generate(request)).weight_versions[0].version, flush=True)
                await asyncio.sleep(600)

        asyncio.run(main())
        """
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root, start_new_session=True
    )
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline().strip() == "0", (tmp_path / "log").read_text()[-4000:]
        family = psutil.Process(parent.pid).children(recursive=True)
        assert len(family) >= 4
    finally:
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive
