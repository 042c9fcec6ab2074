"""One real SGLang for the session, on the tiny policy; and what plain forward passes say about its tokens."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from backends.engine import FolderWeights, Generation
from backends.sglang import CPU_ARGUMENTS, SGLangEngine, SGLangProcess, keeper, launch_sglang
from gym_sdk.errors import GymError

CONTEXT = 1024
ARGUMENTS = (
    *CPU_ARGUMENTS,
    *("--max-total-tokens", "16384", "--max-running-requests", "64", "--context-length", str(CONTEXT)),
)
START_S = 90.0
"""A start takes 15 to 40 s. Two that hang, and the ends of both, must fit into the timeout of the session's
first test: pytest-timeout would leave the processes running, and lose their log."""
HOW = "`make sglang-cpu` makes .venv-sglang; GYM_SDK_SGLANG_PYTHON names another interpreter with SGLang"


def sglang_python() -> Path | None:
    """The interpreter that the environment names, or the one of `.venv-sglang` beside this environment."""
    named = os.environ.get("GYM_SDK_SGLANG_PYTHON")
    python = Path(named) if named else Path(sys.prefix).parent / ".venv-sglang" / "bin" / "python"
    return python if python.exists() else None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sglang: drives a real SGLang process, in an environment of its own")
    config.addinivalue_line("markers", "last: ends the session's SGLang")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("last") is not None)  # stable
    if sglang_python() is None and not os.environ.get("GYM_SDK_REQUIRE_SGLANG"):
        left_out = [item for item in items if item.get_closest_marker("sglang") is not None]
        if left_out:
            items[:] = [item for item in items if item not in left_out]
            config.hook.pytest_deselected(items=left_out)


def pytest_report_collectionfinish() -> str | None:
    if sglang_python() is None and not os.environ.get("GYM_SDK_REQUIRE_SGLANG"):
        return f"the tests marked sglang are left out, as there is no SGLang here: {HOW}"
    return None


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """SGLang needs the other core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def python() -> Path:
    found = sglang_python()
    if found is None:
        pytest.fail(f"there is no SGLang here: {HOW}")
    return found


@pytest.fixture(scope="session")
def arguments() -> Sequence[str]:
    return ARGUMENTS


class Hung(Exception):
    """A start did not come to its end; its log shows the stacks of all its processes."""


hung: list[str] = []
"""The logs of such starts."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for one in hung:
        terminalreporter.section("SGLang hung while it started")
        terminalreporter.write_line(one)


@asynccontextmanager
async def started(model: Path, python: Path, log: Path) -> AsyncIterator[SGLangProcess]:
    """SGLang; if it hangs while it starts, Python's fault handler says where, in the log."""
    told = False

    def tell() -> None:
        nonlocal told
        told = True
        for keep in psutil.Process().children():
            with suppress(psutil.Error):
                if keeper.__file__ in keep.cmdline():
                    family = keep.children(recursive=True)
                    for process in family:
                        process.suspend()  # lest it ends because of another's end
                    for process in reversed(family):
                        process.send_signal(signal.SIGABRT)
                        process.resume()
                        time.sleep(0.5)  # one after the other in the log

    async with AsyncExitStack() as stack:
        timer = asyncio.get_running_loop().call_later(START_S, tell)
        try:
            process = await stack.enter_async_context(
                launch_sglang(
                    model,
                    python=python,
                    arguments=ARGUMENTS,
                    environment={"PYTHONFAULTHANDLER": "1"},
                    log=log,
                    start_s=START_S + 5,
                )
            )
        except GymError as error:
            if told:
                hung.append(log.read_text(errors="replace"))
                raise Hung(str(error)) from None
            raise
        finally:
            timer.cancel()
        yield process


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def sglang(
    tiny_policy: Path, python: Path, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[SGLangProcess]:
    """The session's SGLang. One start in many has hung: it is then tried again, and the report says so."""
    folder = tmp_path_factory.mktemp("sglang")
    async with AsyncExitStack() as stack:
        try:
            process = await stack.enter_async_context(started(tiny_policy, python, folder / "first.log"))
        except Hung:
            process = await stack.enter_async_context(started(tiny_policy, python, folder / "second.log"))
        yield process


@pytest_asyncio.fixture
async def engine(sglang: SGLangProcess, tiny_policy: Path) -> AsyncIterator[SGLangEngine]:
    """An engine of the test's own, on the tiny policy's weights, whatever the test before has left."""
    async with await SGLangEngine.connect(sglang.url, model=tiny_policy) as engine:
        # tensors leave the path of the last folder as it was
        if (engine.facts.model_path, engine.facts.weight_version) != (str(tiny_policy), "0"):
            await engine.update_weights(FolderWeights(tiny_policy), version="0")
        yield engine


@pytest.fixture(scope="session")
def trained(tiny_policy: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(tiny_policy)).eval()


@pytest.fixture(scope="session")
def untrained(untrained_policy: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(str(untrained_policy)).eval()


@pytest.fixture(scope="session")
def forward() -> Callable[..., list[float]]:
    """The log-probs of a generation's tokens by one forward pass over prompt and generation."""

    def scores(
        model: PreTrainedModel, prompt: Sequence[int], generation: Generation, temperature: float
    ) -> list[float]:
        ids = torch.tensor([[*prompt, *generation.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].float()
        log_probs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        return log_probs.gather(1, torch.tensor(generation.token_ids)[:, None])[:, 0].tolist()

    return scores
