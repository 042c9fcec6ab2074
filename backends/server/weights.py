"""The routes for weights, with SGLang's names and fields; one request is one whole update.

`/update_weights_from_tensor` is our own: its body is a file in the safetensors format, and the version stands
in the query, because SGLang's form of it is a pickle, which nobody should read from a network.
"""

from __future__ import annotations

import asyncio
import errno
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from backends.engine import (
    AdapterWeights,
    BroadcastWeights,
    TensorSpec,
    TensorWeights,
    WeightsGroup,
    WeightSource,
)
from backends.server.answering import POLICY, read_body
from backends.server.errors import error_body, json_response, problem_of
from backends.server.operation import check_access
from gym_sdk.errors import GymError, PolicyError
from gym_sdk.schema.weights import BUCKET_BYTES

__all__ = ["WeightLimits", "add_weight_routes"]

_PIECE_BYTES = 4 * 2**20


@dataclass(frozen=True, slots=True)
class WeightLimits:
    """How much room tensors get that come over HTTP. One upload is taken at a time.

    Attributes:
        upload_bytes: the largest body.
        folder: where a body is kept while the engine reads it; by default the system's temporary folder,
            which may be memory or a small disk.
    """

    upload_bytes: int = 64 * 2**30
    folder: Path | None = None


LIMITS = web.AppKey("LIMITS", WeightLimits)
UPLOADING = web.AppKey("UPLOADING", asyncio.Lock)


def add_weight_routes(app: web.Application, limits: WeightLimits | None = None) -> None:
    """Add the routes to an application that has a policy."""
    app[LIMITS] = limits or WeightLimits()
    app[UPLOADING] = asyncio.Lock()
    app.router.add_post("/update_weights_from_disk", _from_disk)
    app.router.add_post("/update_weights_from_tensor", _from_tensor, expect_handler=_expected)
    app.router.add_post("/update_weights_from_distributed", _from_distributed)
    app.router.add_post("/load_lora_adapter", _load_adapter)
    app.router.add_get("/get_world_size", _world_size)
    app.router.add_post("/init_weights_update_group", _join)
    app.router.add_post("/destroy_weights_update_group", _leave)


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _JoinBody(_Body):
    master_address: str
    master_port: int
    rank_offset: int
    world_size: int
    group_name: str = "weight_update_group"
    backend: str = "nccl"


class _LeaveBody(_Body):
    group_name: str = "weight_update_group"


class _DistributedBody(_Body):
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    weight_version: str
    group_name: str = "weight_update_group"
    bucket_bytes: PositiveInt = BUCKET_BYTES


async def _from_disk(request: web.Request) -> web.Response:
    body = await read_body(request)
    path = _text(body, "model_path", "must name a folder on this machine")
    version = _text(body, "weight_version", "must be text that labels these weights")
    policy = request.app[POLICY]
    await policy.update_weights(Path(path), version=version)
    return _updated(request)


async def _load_adapter(request: web.Request) -> web.Response:
    body = await read_body(request)
    path = _text(body, "lora_path", "must name an adapter's folder on this machine")
    version = _text(body, "weight_version", "must be text that labels the adapted weights")
    return await _update(request, AdapterWeights(Path(path)), version)


async def _from_distributed(request: web.Request) -> web.Response:
    body = _DistributedBody.model_validate(await read_body(request))
    if not len(body.names) == len(body.dtypes) == len(body.shapes):
        raise PolicyError("names, dtypes and shapes must be of one length", param="names")
    specs = tuple(
        TensorSpec(name, dtype, tuple(shape))
        for name, dtype, shape in zip(body.names, body.dtypes, body.shapes, strict=True)
    )
    source = BroadcastWeights(body.group_name, specs, body.bucket_bytes)
    return await _update(request, source, body.weight_version)


async def _from_tensor(request: web.Request) -> web.Response:
    version = _check_upload(request)
    async with request.app[UPLOADING], _spooled(request) as file:
        tensors = await asyncio.to_thread(_read, file)
        return await _update(request, TensorWeights(tensors), version)


async def _world_size(request: web.Request) -> web.Response:
    return json_response({"world_size": await request.app[POLICY].weight_ranks()})


async def _join(request: web.Request) -> web.Response:
    body = _JoinBody.model_validate(await read_body(request))
    group = WeightsGroup(
        name=body.group_name,
        address=body.master_address,
        port=body.master_port,
        backend=body.backend,
        first_rank=body.rank_offset,
        world_size=body.world_size,
    )
    await request.app[POLICY].join_weights_group(group)
    return json_response({"success": True})


async def _leave(request: web.Request) -> web.Response:
    body = _LeaveBody.model_validate(await read_body(request))
    await request.app[POLICY].leave_weights_group(body.group_name)
    return json_response({"success": True})


async def _update(request: web.Request, source: WeightSource, version: str) -> web.Response:
    await request.app[POLICY].update_weights(source, version=version)
    return _updated(request)


def _updated(request: web.Request) -> web.Response:
    info = request.app[POLICY].engine.info
    return json_response({"success": True, "weight_version": info.weight_version})


def _text(body: dict[str, Any], name: str, what: str) -> str:
    value = body.get(name)
    if not isinstance(value, str):
        raise PolicyError(f"{name} {what}", param=name)
    return value


async def _expected(request: web.Request) -> web.StreamResponse | None:
    """Answer a client that asks before it sends its body: one that is refused stays where it is."""
    try:
        check_access(request)
        _check_upload(request)
    except (GymError, ValidationError) as error:
        problem = problem_of(error)
        answer = json_response(error_body(request, problem), status=problem.status)
        answer.force_close()
        return answer
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    # the head of the answer is no part of the body
    request.writer.output_size = 0
    return None


def _check_upload(request: web.Request) -> str:
    """Check what is known before the body is read; return the version."""
    version = request.query.get("weight_version")
    if not version:
        raise PolicyError(
            "weight_version must stand in the query and label these weights", param="weight_version"
        )
    if request.content_type != "application/octet-stream":
        raise PolicyError(
            "the body must be a file in the safetensors format, of type application/octet-stream, "
            f"not {request.content_type}; SGLang's pickled tensors are not read here",
            status=415,
        )
    _check_size(request, request.content_length or 0)
    return version


def _check_size(request: web.Request, size: int) -> None:
    most = request.app[LIMITS].upload_bytes
    if size > most:
        raise PolicyError(
            f"the body has {size} bytes or more; this server takes at most {most}: push a folder",
            status=413,
        )


@asynccontextmanager
async def _spooled(request: web.Request) -> AsyncIterator[Path]:
    """Write the body to a file, which goes when the context is left."""
    folder = request.app[LIMITS].folder
    with tempfile.TemporaryDirectory(prefix="gym-sdk-weights-", dir=folder) as parent:
        file = Path(parent, "body.safetensors")
        try:
            with await asyncio.to_thread(file.open, "wb") as stream:
                size, waiting = 0, bytearray()
                async for piece in request.content.iter_any():
                    waiting += piece
                    if len(waiting) >= _PIECE_BYTES:
                        size += len(waiting)
                        _check_size(request, size)
                        await asyncio.to_thread(stream.write, waiting)
                        waiting = bytearray()
                _check_size(request, size + len(waiting))
                stream.write(waiting)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise PolicyError(
                f"there is no room for the tensors in {file.parent.parent}; push a folder",
                status=507,
            ) from error
        yield file


def _read(file: Path) -> dict[str, Any]:
    """Map a file's tensors into memory; they may be read for as long as somebody holds them."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise PolicyError(
            f"the body is no whole file in the safetensors format: {type(error).__name__}: {error}",
            code="invalid_weights",
        ) from error
    if not tensors:
        raise PolicyError("the body holds no tensors", code="invalid_weights")
    return tensors
