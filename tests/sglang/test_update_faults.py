"""Updates that fail in the middle, against a server that plays SGLang: what serves then, and who is told."""

from __future__ import annotations

import asyncio
import base64
import errno
import fcntl
import json
import os
import pickle
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestServer
from safetensors.torch import load_file, save_file

from backends.engine import (
    AdapterWeights,
    BroadcastWeights,
    FolderWeights,
    GenerationRequest,
    RemoteEngine,
    TensorSpec,
    TensorWeights,
    WeightsGroup,
)
from backends.sglang import SGLangConfig, SGLangEngine
from backends.sglang.weights import pickled, shared
from backends.sglang.weights.adapter import LoRALimits, check_adapter
from backends.sglang.weights.signature import signature_of
from gym_sdk.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlineError,
    GymError,
    PolicyError,
    TransportError,
)

pytestmark = pytest.mark.timeout(60)

GROUP = WeightsGroup("g", "127.0.0.1", 1234, "gloo", 1, 2)
Answer = Callable[[dict[str, Any]], Any]


class Playing:
    """Plays SGLang; `answers` says what a route does other than succeed, one entry for each call."""

    def __init__(self, model: Path) -> None:
        self.server: dict[str, Any] = {
            "version": "0.5.23",
            "max_req_input_len": 100,
            "max_total_num_tokens": 100,
            "model_path": str(model),
            "weight_version": "0",
        }
        self.model = {"model_path": str(model), "weight_version": "0", "is_generation": True}
        self.answers: dict[str, list[Answer | None]] = {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.asked: list[dict[str, Any]] = []
        self.generating = asyncio.Event()
        self.finish = asyncio.Event()
        self.finish.set()
        self.base = "0"

    async def generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        if "rid" in body:
            self.asked.append(body)
            self.generating.set()
            await self.finish.wait()
        score = -1.0 / (body["sampling_params"]["temperature"] or 1.0)
        meta = {
            "finish_reason": {"type": "length", "length": 2},
            "output_token_logprobs": [[score, 7, None], [score, 8, None]],
            "output_top_logprobs": [[[score, 7, None], [2 * score, 8, None]]],
            "weight_version": self.base,
            "weight_versions": [{"version": self.base, "start": 0, "end": 2}],
        }
        return web.json_response({"output_ids": [7, 8], "meta_info": meta})

    async def control(self, request: web.Request) -> web.Response:
        body = await request.json() if request.can_read_body else {}
        if request.path == "/server_info":
            return web.json_response(self.server)
        if request.path == "/model_info":
            return web.json_response(self.model)
        self.calls.append((request.path, body))
        queue = self.answers.get(request.path)
        answer = queue.pop(0) if queue else None
        if answer is not None:
            result = answer(body)
            return await result if asyncio.iscoroutine(result) else result
        if body.get("weight_version"):
            self.base = body["weight_version"]
        return web.json_response({"success": True})

    def paths(self) -> list[str]:
        return [path for path, _ in self.calls]

    @asynccontextmanager
    async def engine(self, model: Path | None = None, **config: Any) -> AsyncIterator[SGLangEngine]:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/generate", self.generate)
        app.router.add_route("*", "/{path:.*}", self.control)
        async with TestServer(app) as server:
            config = {"bucket_bytes": 200_000, "shared_memory": None, **config}
            async with await SGLangEngine.connect(
                str(server.make_url("/")), model=model, config=SGLangConfig(**config)
            ) as engine:
                self.calls.clear()
                yield engine
                self.finish.set()


def refuse(message: str = "no", status: int = 400) -> Answer:
    return lambda _: web.json_response({"success": False, "message": message}, status=status)


async def hang(_: object = None) -> web.Response:
    await asyncio.sleep(30)
    return web.Response()


@pytest.fixture
def playing(untrained_policy: Path) -> Playing:
    return Playing(untrained_policy)


@pytest.fixture
def tensors(untrained_policy: Path) -> dict[str, torch.Tensor]:
    return load_file(untrained_policy / "model.safetensors")


def ask(name: str = "ask") -> GenerationRequest:
    return GenerationRequest(name, [5])


TENSOR = "/update_weights_from_tensor"
BROADCAST = "/update_weights_from_distributed"
DISK = "/update_weights_from_disk"


@pytest.mark.asyncio
async def test_tensors_arrive_whole_in_buckets_of_which_the_last_has_the_label(
    playing: Playing, tensors: dict[str, torch.Tensor]
) -> None:
    source = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    playing.server["tp_size"] = 2
    async with playing.engine() as engine:
        assert isinstance(engine, RemoteEngine)
        await engine.update_weights(TensorWeights(source), version="1")
    bodies = [body for path, body in playing.calls if path == TENSOR]
    found: dict[str, torch.Tensor] = {}
    for body in bodies:
        one, other = body["serialized_named_tensors"]
        assert one == other
        part = pickle.loads(base64.b64decode(one))
        assert len(part) == 1 or sum(tensor.nbytes for _, tensor in part) <= 200_000
        found |= dict(part)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert len(bodies) > 3
    assert [body.get("weight_version") for body in bodies] == [None] * (len(bodies) - 1) + ["1"]
    assert [body["flush_cache"] for body in bodies] == [False] * (len(bodies) - 1) + [True]
    assert {body["abort_all_requests"] for body in bodies} == {False}
    assert playing.paths()[:2] == ["/pause_generation", "/begin_weight_update"]
    assert playing.calls[0][1] == {"mode": "retract"}
    assert playing.paths()[-2:] == ["/end_weight_update", "/continue_generation"]


@pytest.mark.asyncio
async def test_a_view_is_sent_without_the_rest_of_its_storage(
    playing: Playing, tensors: dict[str, torch.Tensor]
) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    views, start = {}, 0
    for name, tensor in tensors.items():
        views[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    async with playing.engine() as engine:
        await engine.update_weights(TensorWeights(views), version="1")
    sent = sum(len(body["serialized_named_tensors"][0]) for path, body in playing.calls if path == TENSOR)
    assert sent < 1.5 * flat.nbytes


@pytest.mark.asyncio
@pytest.mark.parametrize("where", [0, 1])
@pytest.mark.parametrize("how", ["refused", "lost", "late", "flush"])
async def test_after_a_failure_in_the_middle_the_old_folder_is_loaded_again(
    playing: Playing, tensors: dict[str, torch.Tensor], untrained_policy: Path, where: int, how: str
) -> None:
    answer, kind = {
        "refused": (refuse("bad tensor"), CheckpointError),
        "flush": (refuse("Weights were updated, but the cache was not flushed"), CheckpointError),
        "lost": (refuse("broken", 500), TransportError),
        "late": (hang, DeadlineError),
    }[how]
    playing.answers[TENSOR] = [*[None] * where, answer]
    playing.finish.clear()
    async with playing.engine(update_s=0.5 if how == "late" else 10.0) as engine:
        task = asyncio.create_task(engine.generate(ask("flying")))
        await playing.generating.wait()
        with pytest.raises(kind, match="the old weights are serving"):
            await engine.update_weights(TensorWeights(tensors), version="1")
        assert engine.unfit is None
        assert engine.info.weight_version == "0"
        playing.finish.set()
        assert (await task).weight_versions[0].version == "0"
    disk = [body for path, body in playing.calls if path == DISK]
    assert [(body["model_path"], body["weight_version"]) for body in disk] == [(str(untrained_policy), "0")]
    assert disk[0]["flush_cache"] is True
    last = playing.paths()
    assert last.index("/end_weight_update") < last.index(DISK) < last.index("/continue_generation")


@pytest.mark.asyncio
async def test_a_cancelled_update_is_undone_too(playing: Playing, tensors: dict[str, torch.Tensor]) -> None:
    playing.answers[TENSOR] = [None, hang]
    async with playing.engine() as engine:
        task = asyncio.create_task(engine.update_weights(TensorWeights(tensors), version="1"))
        while playing.paths().count(TENSOR) < 2:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert playing.paths()[-3:] == ["/end_weight_update", DISK, "/continue_generation"]
        assert engine.unfit is None
        assert (await engine.generate(ask())).weight_versions[0].version == "0"


@pytest.mark.asyncio
@pytest.mark.parametrize("before", ["tensors", "another engine", "a folder that is gone"])
async def test_without_a_way_back_nothing_is_sampled_until_an_update_succeeds(
    playing: Playing, tensors: dict[str, torch.Tensor], before: str
) -> None:
    if before == "another engine":
        playing.model["weight_version"] = playing.base = "5"
    async with playing.engine() as engine:
        if before == "tensors":
            await engine.update_weights(TensorWeights(tensors), version="5")
        playing.answers[TENSOR] = [None, refuse("bad tensor")]
        if before == "a folder that is gone":
            playing.answers[DISK] = [refuse("no such folder")]
        playing.finish.clear()
        playing.generating.clear()
        task = asyncio.create_task(engine.generate(ask("flying")))
        await playing.generating.wait()
        with pytest.raises(GymError, match="mixture") as caught:
            await engine.update_weights(TensorWeights(tensors), version="6")
        assert caught.type is GymError
        with pytest.raises(TransportError, match="mixture") as told:
            await task
        assert told.value.retryable
        asked = len(playing.asked)
        with pytest.raises(TransportError, match="bad tensor") as told:
            await engine.generate(ask())
        assert told.value.retryable
        with pytest.raises(TransportError):
            async for _ in engine.stream(ask()):
                pass
        assert len(playing.asked) == asked
        assert playing.paths()[-1] != DISK
        assert "/continue_generation" in playing.paths()
        playing.finish.set()
        await engine.update_weights(TensorWeights(tensors), version="7")
        assert engine.unfit is None
        assert (await engine.generate(ask())).weight_versions[0].version == "7"


@pytest.mark.asyncio
async def test_an_update_that_cannot_begin_changes_nothing(
    playing: Playing, tensors: dict[str, torch.Tensor]
) -> None:
    playing.answers["/begin_weight_update"] = [refuse("not now")]
    async with playing.engine() as engine:
        with pytest.raises(PolicyError, match="not now"):
            await engine.update_weights(TensorWeights(tensors), version="1")
        assert playing.paths() == ["/pause_generation", "/begin_weight_update", "/continue_generation"]
        assert engine.unfit is None


@pytest.mark.asyncio
async def test_a_session_that_somebody_left_open_is_closed(
    playing: Playing, tensors: dict[str, torch.Tensor]
) -> None:
    playing.answers["/begin_weight_update"] = [refuse("a weight-update session is already open; call")]
    async with playing.engine() as engine:
        await engine.update_weights(TensorWeights(tensors), version="1")
    assert playing.paths()[1:4] == ["/begin_weight_update", "/end_weight_update", "/begin_weight_update"]


@pytest.mark.asyncio
async def test_updates_take_turns(playing: Playing, tensors: dict[str, torch.Tensor]) -> None:
    async with playing.engine() as engine:
        await asyncio.gather(
            engine.update_weights(TensorWeights(tensors), version="1"),
            engine.update_weights(TensorWeights(tensors), version="2"),
        )
        assert engine.info.weight_version == "2"
    labels = [body["weight_version"] for path, body in playing.calls if body.get("weight_version")]
    assert labels == ["1", "2"]
    one = playing.paths()[: len(playing.calls) // 2]
    assert playing.paths() == one * 2
    assert one[-1] == "/continue_generation"


@pytest.mark.asyncio
async def test_requests_that_arrive_during_an_update_are_sent_after_it(
    playing: Playing, tensors: dict[str, torch.Tensor]
) -> None:
    go = asyncio.Event()

    async def wait(_: object) -> web.Response:
        await go.wait()
        return web.json_response({})

    playing.answers[TENSOR] = [lambda body: wait(body)]
    async with playing.engine() as engine:
        update = asyncio.create_task(engine.update_weights(TensorWeights(tensors), version="1"))
        while TENSOR not in playing.paths():
            await asyncio.sleep(0.01)
        late, lost = (asyncio.create_task(engine.generate(ask(name))) for name in ("late", "lost"))
        await asyncio.sleep(0.1)
        assert playing.asked == []
        assert engine.info.waiting == 2
        assert await engine.abort("lost") == 1
        assert (await lost).token_ids == []
        go.set()
        await update
        assert (await late).weight_versions[0].version == "1"
    assert len(playing.asked) == 1
    assert "/abort_request" not in playing.paths()


def layout(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same values, lying in memory in other ways than one after the other."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    views, start = {}, 0
    for name, tensor in tensors.items():
        view = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
        views[name] = view.T.contiguous().T if view.dim() == 2 else view
    return views


@pytest.mark.asyncio
async def test_tensors_reach_a_neighbour_by_a_file_in_shared_memory(
    playing: Playing, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    seen: list[tuple[int, list[str], dict[str, torch.Tensor]]] = []

    def load(body: dict[str, Any]) -> web.Response:
        folder = Path(body["model_path"])
        names = [file.name for file in folder.iterdir()]
        values = {name: tensor.clone() for name, tensor in load_file(folder / names[0]).items()}
        seen.append((folder.stat().st_mode & 0o777, names, values))
        playing.base = body["weight_version"]
        return web.json_response({"success": True})

    playing.answers[DISK] = [load]
    name = "model.embed_tokens.weight"
    source = {**layout(tensors), name: tensors[name].to(torch.bfloat16)}
    async with playing.engine(shared_memory=str(tmp_path)) as engine:
        await engine.update_weights(TensorWeights({**source, "lm_head.weight": source[name]}), version="1")
        assert engine.info.weight_version == "1"
        assert (await engine.generate(ask())).weight_versions[0].version == "1"
    ((mode, names, values),) = seen
    assert (mode, names) == (0o700, ["model.safetensors"])
    assert values.keys() == source.keys()
    assert all(torch.equal(values[name], source[name]) for name in source)
    assert values[name].dtype is torch.bfloat16
    assert playing.paths() == ["/pause_generation", DISK, "/continue_generation"]
    body = playing.calls[1][1]
    assert (body["weight_version"], body["flush_cache"], body["abort_all_requests"]) == ("1", True, False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["refused", "flush", "lost", "late", "cancelled"])
async def test_a_failure_by_shared_memory_is_undone_and_leaves_no_file(
    playing: Playing,
    tensors: dict[str, torch.Tensor],
    untrained_policy: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    answer, kind = {
        "refused": (
            refuse("Failed to update weights: bad.\nRolling back to original weights."),
            CheckpointError,
        ),
        "flush": (refuse("Weights were updated, but the cache was not flushed"), CheckpointError),
        "lost": (refuse("broken", 500), TransportError),
        "late": (hang, DeadlineError),
        "cancelled": (hang, asyncio.CancelledError),
    }[how]
    playing.answers[DISK] = [answer]
    there: list[bool] = []
    control = playing.control

    async def noting(request: web.Request) -> web.Response:
        if request.path == "/server_info":
            there.append(any(tmp_path.iterdir()))
        return await control(request)

    monkeypatch.setattr(playing, "control", noting)
    async with playing.engine(update_s=0.5 if how == "late" else 10.0, shared_memory=str(tmp_path)) as engine:
        task = asyncio.create_task(engine.update_weights(TensorWeights(tensors), version="1"))
        while DISK not in playing.paths():
            await asyncio.sleep(0.01)
        if how == "cancelled":
            task.cancel()
        with pytest.raises(kind):
            await task
        assert engine.unfit is None
        assert (await engine.generate(ask())).weight_versions[0].version == "0"
    assert list(tmp_path.iterdir()) == []
    assert playing.paths() == ["/pause_generation", DISK, DISK, "/continue_generation"]
    assert playing.calls[2][1]["model_path"] == str(untrained_policy)
    # where SGLang may be loading still, the file waits for the end of that
    assert there[-1] is (how in ("lost", "late", "cancelled"))


@pytest.mark.asyncio
@pytest.mark.parametrize("why", ["full", "missing", "filled meanwhile", "several machines"])
async def test_without_shared_memory_tensors_go_inside_the_requests(
    playing: Playing,
    tensors: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    why: str,
) -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "no space left")

    place = tmp_path / "none" if why == "missing" else tmp_path
    if why == "full":
        free = sum(tensor.nbytes for tensor in tensors.values()) + shared._RESERVE_BYTES - 1
        monkeypatch.setattr(shared.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    elif why == "filled meanwhile":
        monkeypatch.setattr(shared, "file_head", full)
    elif why == "several machines":
        playing.server["nnodes"] = 2
    async with playing.engine(shared_memory=str(place)) as engine:
        await engine.update_weights(TensorWeights(tensors), version="1")
        assert engine.info.weight_version == "1"
    assert DISK not in playing.paths()
    assert TENSOR in playing.paths()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "message",
    [
        "Failed to get weights iterator: Cannot find any model weights with `x`.",
        "Failed to get model loader: <DummyModelLoader>.",
    ],
)
async def test_an_sglang_that_does_not_see_the_file_gets_the_tensors_in_the_same_update(
    playing: Playing, tensors: dict[str, torch.Tensor], tmp_path: Path, message: str
) -> None:
    playing.answers[DISK] = [refuse(message)]
    async with playing.engine(shared_memory=str(tmp_path)) as engine:
        await engine.update_weights(TensorWeights(tensors), version="1")
        await engine.update_weights(TensorWeights(tensors), version="2")  # it is not asked again
        assert engine.info.weight_version == "2"
    assert playing.paths()[:3] == ["/pause_generation", DISK, "/begin_weight_update"]
    assert playing.paths().count(DISK) == 1
    assert playing.paths().count("/pause_generation") == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_an_update_cancelled_while_its_file_is_written_touches_nothing_and_leaves_none(
    playing: Playing, tensors: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing, go = threading.Event(), threading.Event()
    head = shared.file_head

    def slow(specs: Any) -> bytes:
        writing.set()
        go.wait(10)
        return head(specs)

    monkeypatch.setattr(shared, "file_head", slow)
    async with playing.engine(shared_memory=str(tmp_path)) as engine:
        task = asyncio.create_task(engine.update_weights(TensorWeights(tensors), version="1"))
        await asyncio.to_thread(writing.wait, 10)
        task.cancel()
        await asyncio.sleep(0.05)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert playing.paths() == ["/pause_generation", "/continue_generation"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.asyncio
async def test_the_next_update_removes_the_files_of_a_process_that_was_killed(
    playing: Playing, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    killed, running, other = (tmp_path / name for name in ("gym-sdk-weights-a", "gym-sdk-weights-b", "c"))
    for folder in (killed, running, other):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
    lock = os.open(running, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    async with playing.engine(shared_memory=str(tmp_path)) as engine:
        await engine.update_weights(TensorWeights(tensors), version="1")
    os.close(lock)
    assert set(tmp_path.iterdir()) == {running, other}


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:30000", True),
        ("http://127.9.8.7:1", True),
        ("http://localhost:30000", True),
        ("http://LOCALHOST", True),
        ("http://[::1]:30000", True),
        ("http://10.0.0.1:30000", False),
        ("http://localhost.example.com", False),
        ("http://[::2]:30000", False),
        ("http://gpu1:30000", False),
    ],
)
def test_only_this_machine_shares_memory(url: str, expected: bool) -> None:
    assert shared._is_loopback(url) is expected


@pytest.mark.parametrize("value", ["", "dev/shm"])
def test_shared_memory_must_be_a_full_path(value: str) -> None:
    with pytest.raises(ConfigurationError, match="shared_memory"):
        SGLangConfig(shared_memory=value)


@pytest.mark.asyncio
@pytest.mark.parametrize("named", [False, True])
async def test_a_served_path_that_is_gone_tells_nothing_of_the_model(
    playing: Playing, tensors: dict[str, torch.Tensor], untrained_policy: Path, tmp_path: Path, named: bool
) -> None:
    playing.model |= {"model_path": str(tmp_path / "gone"), "weight_version": "5"}
    playing.base = "5"
    if named:
        playing.server["model_path"] = str(tmp_path / "gone too")
    async with playing.engine(model=untrained_policy if named else None) as engine:
        assert engine.facts.signature == signature_of(untrained_policy)
        assert not engine.facts.unchanged
        with pytest.raises(CheckpointError, match="missing"):
            await engine.update_weights(TensorWeights(dict(list(tensors.items())[1:])), version="6")
        playing.answers[TENSOR] = [refuse("bad tensor")]
        with pytest.raises(GymError, match="mixture"):
            await engine.update_weights(TensorWeights(tensors), version="6")
    assert DISK not in playing.paths()


def test_pieces_of_a_body_make_up_what_they_were_cut_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "_PIECE_BYTES", 3 * 1000)
    named = [(str(size), torch.arange(size, dtype=torch.uint8)) for size in (1, 255, 100_003, 2, 0)]
    pieces = pickled.tensors_body(named, 2, {"flush_cache": True})
    body = json.loads(b"".join(pieces))
    assert body.pop("flush_cache") is True
    one, other = body.pop("serialized_named_tensors")
    assert body == {}
    assert one == other
    found = pickle.loads(base64.b64decode(one, validate=True))
    assert [name for name, _ in found] == [name for name, _ in named]
    assert all(torch.equal(got, sent) for (_, got), (_, sent) in zip(found, named, strict=True))


def broadcast(tensors: dict[str, torch.Tensor], group: str = "g") -> BroadcastWeights:
    specs = tuple(TensorSpec(name, "float32", tuple(tensor.shape)) for name, tensor in tensors.items())
    return BroadcastWeights(group, specs, 200_000)


@pytest.mark.asyncio
async def test_a_broadcast_is_announced_bucket_by_bucket(
    playing: Playing, tensors: dict[str, torch.Tensor]
) -> None:
    async with playing.engine() as engine:
        await engine.join_group(GROUP)
        assert playing.calls[-1][1] == {
            "master_address": "127.0.0.1",
            "master_port": 1234,
            "rank_offset": 1,
            "world_size": 2,
            "group_name": "g",
            "backend": "gloo",
        }
        await engine.update_weights(broadcast(tensors), version="1")
        assert engine.info.weight_version == "1"
    bodies = [body for path, body in playing.calls if path == BROADCAST]
    assert [name for body in bodies for name in body["names"]] == list(tensors)
    assert [shape for body in bodies for shape in body["shapes"]] == [
        list(tensor.shape) for tensor in tensors.values()
    ]
    assert [body.get("weight_version") for body in bodies] == [None] * (len(bodies) - 1) + ["1"]


@pytest.mark.asyncio
async def test_a_group_that_sglang_forgot_is_told_apart_from_a_failure(
    playing: Playing, tensors: dict[str, torch.Tensor]
) -> None:
    gone = "Failed to receive weights: Group g not in []. Please call `init_weights_update_group` first."
    async with playing.engine() as engine:
        with pytest.raises(PolicyError) as caught:
            await engine.update_weights(broadcast(tensors), version="1")
        assert caught.value.code == "weights_group_unknown"
        assert playing.calls == []
        await engine.join_group(GROUP)
        playing.answers[BROADCAST] = [refuse(gone)]
        with pytest.raises(PolicyError) as caught:
            await engine.update_weights(broadcast(tensors), version="1")
        assert caught.value.code == "weights_group_unknown"
        assert DISK not in playing.paths()
        playing.calls.clear()
        with pytest.raises(PolicyError, match="not known"):
            await engine.update_weights(broadcast(tensors), version="1")
        assert playing.calls == []
        # in the middle it is a failure as any other
        await engine.join_group(GROUP)
        playing.answers[BROADCAST] = [None, refuse(gone)]
        with pytest.raises(CheckpointError, match="old weights are serving"):
            await engine.update_weights(broadcast(tensors), version="1")
        assert DISK in playing.paths()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("field", "message"), [("dp_size", "--dp-size"), ("pp_size", "--pp-size"), ("tp_size", "2 ranks")]
)
async def test_what_a_divided_sglang_cannot_take_is_refused(
    playing: Playing, tensors: dict[str, torch.Tensor], field: str, message: str
) -> None:
    playing.server[field] = 2
    async with playing.engine() as engine:
        with pytest.raises(ConfigurationError, match=message):
            await engine.join_group(GROUP)
        if field != "tp_size":
            with pytest.raises(ConfigurationError, match=message):
                await engine.update_weights(TensorWeights(tensors), version="1")
        assert playing.calls == []


def adapter(folder: Path, *, drop: str | None = None, rank: int = 4, **config: Any) -> Path:
    """An adapter of the tiny policy's first layer, as peft would write it."""
    folder.mkdir(parents=True)
    shapes = {"self_attn.q_proj": (128, 128), "self_attn.v_proj": (64, 128), "self_attn.o_proj": (128, 128)}
    tensors = {}
    for module, (out, into) in shapes.items():
        name = f"base_model.model.model.layers.0.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.zeros(rank, into)
        tensors[f"{name}.lora_B.weight"] = torch.zeros(out, rank)
    tensors = {name: tensor for name, tensor in tensors.items() if drop is None or drop not in name}
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "init_lora_weights": True, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **config}))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, None),
        ({"drop": "o_proj"}, None),
        ({"use_rslora": True}, "use_rslora"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"peft_type": "IA3"}, "not the configuration"),
        ({"r": 9}, "rank 9"),
        ({"r": 0}, "rank 0"),
        ({"rank": 2}, "not of rank 4"),
        ({"drop": "q_proj"}, "both q_proj and v_proj"),
        ({"drop": "v_proj"}, "both q_proj and v_proj"),
        ({"drop": "o_proj.lora_A"}, "lacks lora_A"),
        ({"drop": "model"}, "no tensor"),
    ],
)
def test_an_adapter_that_sglang_would_read_otherwise_is_refused(
    untrained_policy: Path, tmp_path: Path, change: dict[str, Any], message: str | None
) -> None:
    folder = adapter(tmp_path / "adapter", **change)
    limits = LoRALimits(8, frozenset({"qkv_proj", "o_proj"}))
    if message is None:
        check_adapter(folder, limits, signature_of(untrained_policy))
        return
    with pytest.raises(CheckpointError, match=message):
        check_adapter(folder, limits, signature_of(untrained_policy))


def test_an_adapter_of_another_model_is_refused(untrained_policy: Path, tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter")
    signature = dict(signature_of(untrained_policy))
    name = "model.layers.0.self_attn.o_proj.weight"
    with pytest.raises(CheckpointError, match="lora-target-modules"):
        check_adapter(folder, LoRALimits(8, frozenset({"qkv_proj"})), signature)
    wrong = {**signature, name: TensorSpec(name, "float32", (64, 128))}
    with pytest.raises(CheckpointError, match=r"the model's has \[64, 128\]"):
        check_adapter(folder, LoRALimits(None, None), wrong)
    del signature[name]
    with pytest.raises(CheckpointError, match="the model has no"):
        check_adapter(folder, LoRALimits(None, None), signature)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not whole"):
        check_adapter(folder, LoRALimits(8, None), None)


@pytest.mark.asyncio
async def test_an_sglang_without_lora_says_how_to_start_it(playing: Playing, tmp_path: Path) -> None:
    async with playing.engine() as engine:
        with pytest.raises(ConfigurationError, match="--enable-lora"):
            await engine.update_weights(AdapterWeights(adapter(tmp_path / "adapter")), version="1")
        assert playing.calls == []


@pytest.mark.asyncio
async def test_each_load_has_a_name_of_its_own_and_goes_when_nothing_uses_it(
    playing: Playing, tmp_path: Path
) -> None:
    playing.server |= {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}
    source = AdapterWeights(adapter(tmp_path / "adapter"))
    async with playing.engine() as engine:
        await engine.update_weights(source, version="a")
        playing.finish.clear()
        task = asyncio.create_task(engine.generate(ask("old")))
        await playing.generating.wait()
        await engine.update_weights(source, version="a")
        first, second = (body["lora_name"] for path, body in playing.calls if path == "/load_lora_adapter")
        assert first != second
        await asyncio.sleep(0.05)
        assert "/unload_lora_adapter" not in playing.paths()
        playing.finish.set()
        assert [span.version for span in (await task).weight_versions] == ["a"]
        assert (await engine.generate(ask("new"))).weight_versions[0].version == "a"
        assert [body["lora_path"] for body in playing.asked] == [first, second]
        assert [body for path, body in playing.calls if path == "/unload_lora_adapter"] == [
            {"lora_name": first}
        ]
        # a failed load is cleaned up, and the one before it goes on
        playing.answers["/load_lora_adapter"] = [refuse("no room")]
        with pytest.raises(CheckpointError, match="from before are serving"):
            await engine.update_weights(source, version="b")
        assert engine.info.weight_version == "a"
        await asyncio.sleep(0.05)
        failed = [body["lora_name"] for path, body in playing.calls if path == "/load_lora_adapter"][-1]
        assert playing.calls[-1] == ("/unload_lora_adapter", {"lora_name": failed})
        await engine.generate(ask("third"))
        assert playing.asked[-1]["lora_path"] == second
    assert playing.calls[-1] == ("/unload_lora_adapter", {"lora_name": second})


@pytest.mark.asyncio
async def test_an_adapter_does_not_mend_a_mixture(
    playing: Playing, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    playing.server |= {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["all"]}
    async with playing.engine() as engine:
        playing.answers |= {TENSOR: [refuse()], DISK: [refuse()]}
        with pytest.raises(GymError, match="mixture"):
            await engine.update_weights(TensorWeights(tensors), version="1")
        with pytest.raises(GymError, match="does not mend"):
            await engine.update_weights(AdapterWeights(adapter(tmp_path / "adapter")), version="a")
        assert "/load_lora_adapter" not in playing.paths()
        await engine.update_weights(FolderWeights(Path(playing.model["model_path"])), version="2")
        assert engine.unfit is None
