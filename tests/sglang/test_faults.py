"""Servers that answer wrongly, late or not at all, and folders that cannot be served: no SGLang is needed."""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from backends.engine import FinishReason, FolderWeights, GenerationRequest, TensorSpec
from backends.sglang import SGLangConfig, SGLangEngine, SGLangOptions, open_sglang
from backends.sglang.facts import supported_version
from backends.sglang.weights.signature import check_folder, signature_of
from gym_sdk.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineError,
    GymError,
    PolicyError,
    TokenContractError,
    TransportError,
)

pytestmark = pytest.mark.timeout(60)

Change = Callable[[dict[str, Any]], Any]


class Scripted:
    """Answers as SGLang does, with one thing changed."""

    def __init__(self, model: Path) -> None:
        self.server: dict[str, Any] = {
            "version": "0.5.23",
            "max_req_input_len": 100,
            "max_total_num_tokens": 100,
            "model_path": str(model),
            "weight_version": "0",
        }
        self.model: dict[str, Any] = {
            "model_path": str(model),
            "weight_version": "0",
            "is_generation": True,
        }
        self.change: Change | None = None
        self.status = 200
        self.original_log_probs = False
        self.calls: list[str] = []

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        sampling = body["sampling_params"]
        score = -1.0 if self.original_log_probs else -1.0 / (sampling["temperature"] or 1.0)
        answer: dict[str, Any] = {
            "output_ids": [7, 8],
            "meta_info": {
                "finish_reason": {"type": "length", "length": 2},
                "output_token_logprobs": [[score, 7, None], [score, 8, None]],
                "output_top_logprobs": [[[score, 7, None], [2 * score, 8, None]]],
                "weight_version": "0",
                "weight_versions": [{"version": "0", "start": 0, "end": 2}],
            },
        }
        if "rid" in body and self.change is not None:
            answer = self.change(answer) or answer
        return web.json_response(answer, status=self.status if "rid" in body else 200)

    async def control(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        if request.path == "/server_info":
            return web.json_response(self.server)
        if request.path == "/model_info":
            return web.json_response(self.model)
        if request.path == "/update_weights_from_disk":
            return web.json_response({"success": False, "message": "no"}, status=400)
        return web.json_response({})

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_post("/generate", self.generate)
        app.router.add_route("*", "/{path:.*}", self.control)
        async with TestServer(app) as server:
            yield str(server.make_url("/"))


@pytest.fixture
def scripted(untrained_policy: Path) -> Scripted:
    return Scripted(untrained_policy)


def ask() -> GenerationRequest:
    return GenerationRequest("ask", [5])


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("where", "name", "value", "message"),
    [
        ("server", "version", "0.4.9", "not supported"),
        ("server", "version", "0.6.0", "not supported"),
        ("server", "version", "dev", "not supported"),
        ("server", "speculative_algorithm", "EAGLE", "speculative_algorithm"),
        ("server", "max_req_input_len", None, "no SGLang"),
        ("model", "preferred_sampling_params", {"top_p": 0.5}, "preferred_sampling_params"),
        ("model", "is_generation", False, "is_generation"),
    ],
)
async def test_a_server_that_cannot_keep_the_contract_is_refused(
    scripted: Scripted, where: str, name: str, value: object, message: str
) -> None:
    getattr(scripted, where)[name] = value
    async with scripted.running() as url:
        with pytest.raises(ConfigurationError, match=message):
            await SGLangEngine.connect(url)


@pytest.mark.asyncio
async def test_a_model_that_cannot_be_seen_from_here_must_be_named(scripted: Scripted) -> None:
    known = Path(scripted.model["model_path"])
    scripted.model["model_path"] = scripted.server["model_path"] = "/nowhere"
    async with scripted.running() as url:
        with pytest.raises(ConfigurationError, match="name the folder"):
            await SGLangEngine.connect(url)
        async with await SGLangEngine.connect(url, model=known) as engine:
            assert engine.info.vocab_size > 0


@pytest.mark.asyncio
async def test_another_model_is_noticed(scripted: Scripted, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    async with scripted.running() as url:
        with pytest.raises(ConfigurationError, match="another model"):
            async with open_sglang(tmp_path, SGLangOptions(urls=(url,))):
                pass
    with pytest.raises(ConfigurationError, match="arguments"):
        SGLangOptions(urls=(url,), arguments=("--tp", "2"))


@pytest.mark.asyncio
async def test_log_probs_of_another_temperature_are_noticed(scripted: Scripted) -> None:
    scripted.original_log_probs = True
    async with scripted.running() as url:
        with pytest.raises(ConfigurationError, match="SGLANG_RETURN_ORIGINAL_LOGPROB"):
            await SGLangEngine.connect(url)


@pytest.mark.asyncio
async def test_another_kind_of_server_is_no_sglang() -> None:
    async with TestServer(web.Application()) as server:
        with pytest.raises(ConfigurationError, match="no SGLang"):
            await SGLangEngine.connect(str(server.make_url("/")))
    with pytest.raises(ConfigurationError, match="address"):
        await SGLangEngine.connect("localhost:30000")


def with_meta(**fields: Any) -> Change:
    return lambda answer: answer["meta_info"].update(fields)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda _: ["nothing"], TransportError),
        (lambda _: {"text": "hello"}, TransportError),
        (with_meta(finish_reason={"type": "bored"}), TransportError),
        (with_meta(output_token_logprobs=[[-1.0, 7, None]]), TokenContractError),
        (with_meta(output_token_logprobs=[[-1.0, 7, None], [-1.0, 9, None]]), TokenContractError),
        (with_meta(output_token_logprobs=[[-1.0, 7, None], [-math.inf, 8, None]]), TokenContractError),
        (with_meta(output_token_logprobs=[[-1.0, 7, None], [0.5, 8, None]]), TokenContractError),
        (with_meta(weight_versions=[{"version": "0", "start": 0, "end": 1}]), TokenContractError),
        (with_meta(weight_versions=None), TokenContractError),
        (with_meta(finish_reason={"type": "stop", "matched": 9}), TokenContractError),
        (with_meta(finish_reason={"type": "stop", "matched": "NaN happened"}), GymError),
        (
            with_meta(finish_reason={"type": "abort", "message": "late", "status_code": 503}),
            TransportError,
        ),
        (with_meta(finish_reason={"type": "abort", "message": "bad", "status_code": 400}), PolicyError),
    ],
)
async def test_an_answer_that_is_wrong_never_becomes_a_generation(
    scripted: Scripted, change: Change, kind: type[Exception]
) -> None:
    scripted.change = change
    async with scripted.running() as url, await SGLangEngine.connect(url) as engine:
        with pytest.raises(kind) as caught:
            await engine.generate(ask())
        assert caught.type is kind
        assert engine.info.running == 0


@pytest.mark.asyncio
@pytest.mark.parametrize(("status", "retryable"), [(429, True), (503, True), (500, True), (401, False)])
async def test_a_server_that_cannot_take_a_request_says_whether_to_try_again(
    scripted: Scripted, status: int, retryable: bool
) -> None:
    scripted.change = lambda _: {"error": {"message": "The request queue is full."}}
    scripted.status = status
    async with scripted.running() as url, await SGLangEngine.connect(url) as engine:
        with pytest.raises(TransportError) as caught:
            await engine.generate(ask())
    assert caught.value.retryable is retryable
    assert caught.value.status == status


@pytest.mark.asyncio
async def test_a_server_that_is_away_is_waited_for_a_moment(scripted: Scripted) -> None:
    port = unused_port()
    config = SGLangConfig(refused_retries=1)
    with pytest.raises(TransportError, match="no answer") as caught:
        await SGLangEngine.connect(f"http://127.0.0.1:{port}", config=config)
    assert caught.value.retryable
    task = asyncio.create_task(SGLangEngine.connect(f"http://127.0.0.1:{port}"))
    await asyncio.sleep(0.05)
    app = web.Application()
    app.router.add_post("/generate", scripted.generate)
    app.router.add_route("*", "/{path:.*}", scripted.control)
    async with TestServer(app, port=port), await task as engine:
        assert (await engine.generate(ask())).finish_reason is FinishReason.LENGTH


@pytest.mark.asyncio
async def test_a_server_that_hangs_has_a_deadline(scripted: Scripted) -> None:
    async def hang(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", hang)
    async with TestServer(app) as server:
        with pytest.raises(DeadlineError):
            await SGLangEngine.connect(str(server.make_url("/")), config=SGLangConfig(control_s=0.1))
    with pytest.raises(ConfigurationError, match="control_s"):
        SGLangConfig(control_s=0)


@pytest.mark.asyncio
async def test_a_failed_update_never_leaves_the_server_paused(
    scripted: Scripted, untrained_policy: Path
) -> None:
    async with scripted.running() as url, await SGLangEngine.connect(url) as engine:
        scripted.calls.clear()
        with pytest.raises(GymError, match="mixture"):
            await engine.update_weights(FolderWeights(untrained_policy), version="1")
        assert engine.info.weight_version == "0"
    assert scripted.calls[-1] == "/continue_generation"
    assert scripted.calls.count("/update_weights_from_disk") == 2


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.5.23", True), ("0.5.24.post1", True), ("0.5.22", False), ("0.6", False), ("unknown", False)],
)
def test_versions(version: str, supported: bool) -> None:
    assert supported_version(version) is supported


def write(folder: Path, shapes: dict[str, list[int]], *, tied: bool = False) -> Path:
    """A folder of safetensors with empty bytes, as the format defines them."""
    folder.mkdir(parents=True)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))
    (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    return folder


def test_a_folder_must_hold_all_of_the_models_weights(tmp_path: Path) -> None:
    served = signature_of(write(tmp_path / "served", {"a": [2, 3], "b": [4]}))
    assert served == {
        "a": TensorSpec("a", "float32", (2, 3)),
        "b": TensorSpec("b", "float32", (4,)),
    }
    check_folder(write(tmp_path / "same", {"b": [4], "a": [2, 3]}), served)
    for name, shapes, message in [
        ("lacks", {"a": [2, 3]}, "b is missing"),
        ("more", {"a": [2, 3], "b": [4], "c": [1]}, "unknown name c"),
        ("other", {"a": [3, 2], "b": [4]}, r"a has shape \[3, 2\], the model's has \[2, 3\]"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            check_folder(write(tmp_path / name, shapes), served)


def test_an_output_layer_that_is_the_embedding_may_be_there_or_not(tmp_path: Path) -> None:
    bare = write(tmp_path / "bare", {"embed": [4, 2]}, tied=True)
    both = write(tmp_path / "both", {"embed": [4, 2], "lm_head.weight": [4, 2]}, tied=True)
    for served in (bare, both):
        for folder in (bare, both):
            check_folder(folder, signature_of(served))


@pytest.mark.parametrize("content", [b"", b"\x05", struct.pack("<Q", 4) + b"nope", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        signature_of(tmp_path)
