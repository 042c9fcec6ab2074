"""A policy from a configuration: which engine, and what is passed on to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from backends import loading
from backends.loading import PolicyConfig, _sglang_options, load_policy, open_policy
from backends.sglang import CPU_ARGUMENTS, SGLangOptions
from gym_sdk.errors import ConfigurationError, TransportError


def test_sglang_is_told_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_sees_gpu", lambda: True)
    config = PolicyConfig("m", "sglang", dtype="bfloat16", context_length=64)
    assert _sglang_options(config).arguments == ("--dtype", "bfloat16", "--context-length", "64")
    options = SGLangOptions(arguments=("--dtype", "half"))
    config = PolicyConfig("m", "sglang", device="cpu", dtype="float32", sglang=options)
    said = ("--device", "cpu", "--dtype", "float32")
    assert _sglang_options(config).arguments == (
        *CPU_ARGUMENTS,
        *said,
        "--dtype",
        "half",
    )  # the last one counts
    monkeypatch.setattr(loading, "_sees_gpu", lambda: False)
    assert _sglang_options(PolicyConfig("m", "sglang")).arguments == CPU_ARGUMENTS
    assert not _sglang_options(
        PolicyConfig("m", "sglang", sglang=SGLangOptions(urls=("http://127.0.0.1:9",)))
    ).arguments


def test_what_cannot_be_passed_on_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="OMP_NUM_THREADS"):
        _sglang_options(PolicyConfig("m", "sglang", threads=2))
    running = SGLangOptions(urls=("http://127.0.0.1:9",))
    with pytest.raises(ConfigurationError, match="not for one at a URL"):
        _sglang_options(PolicyConfig("m", "sglang", device="cuda", sglang=running))
    with pytest.raises(ConfigurationError, match="open_policy"):
        load_policy(PolicyConfig("m", "sglang"))
    with pytest.raises(ConfigurationError, match="`transformers` or `sglang`"):
        load_policy(PolicyConfig("m", "vllm"))  # type: ignore[arg-type]


@pytest.mark.asyncio
async def test_an_sglang_that_is_not_there_says_so(untrained_policy: Path) -> None:
    running = SGLangOptions(urls=("http://127.0.0.1:9",))
    with pytest.raises(TransportError, match=r"127\.0\.0\.1:9"):
        async with open_policy(PolicyConfig(str(untrained_policy), "sglang", sglang=running)):
            pass


@pytest.mark.asyncio
async def test_the_embedded_policy_is_closed_with_its_context(untrained_policy: Path) -> None:
    async with open_policy(PolicyConfig(str(untrained_policy))) as policy:
        assert policy.engine.info.context_length
    with pytest.raises(Exception, match="closed"):
        await policy.engine.pause()
