"""SGLangs that are scripted, to be killed, filled and started again at will."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.test_utils import unused_port


class FakeSGLang:
    """Answers as SGLang does. What it generates names it: its tokens are its number.

    Attributes:
        number: the token that it samples.
        version: the label of its weights.
        path: the folder of its weights.
        hold: what generations wait for.
        full: whether its queue is full.
        silent: whether it leaves questions after its state unanswered.
        slow: whether it takes tensors for ever.
        refuses: whether it refuses other weights than it has.
        length: the context that it takes.
        prompts: the prompts it was asked to continue.
        calls: the other routes that were asked, in order.
        ranks: the ranks with which it joined groups.
    """

    def __init__(self, model: Path, number: int) -> None:
        self.number = number
        self.model = model
        self.version, self.path = "0", str(model)
        self.hold: asyncio.Event | None = None
        self.full = self.silent = self.refuses = self.slow = False
        self.length = 100
        self.prompts: list[list[int]] = []
        self.calls: list[str] = []
        self.ranks: list[int] = []
        self.port = unused_port()
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, with the weights of the model's folder."""
        self.version, self.path = "0", str(self.model)
        app = web.Application()
        app.router.add_post("/generate", self._generate)
        app.router.add_route("*", "/{path:.*}", self._control)
        self._runner = web.AppRunner(app, shutdown_timeout=0.05)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def die(self) -> None:
        """Close all connections."""
        if self._runner is not None:
            runner, self._runner = self._runner, None
            await runner.cleanup()

    async def _generate(self, request: web.Request) -> web.Response:
        body = await request.json()
        temperature = body["sampling_params"]["temperature"] or 1.0
        if "rid" in body:
            if self.full:
                return web.json_response({"error": {"message": "The request queue is full."}}, status=503)
            self.prompts.append(body["input_ids"])
            if self.hold is not None:
                await self.hold.wait()
        score, version = -1.0 / temperature, self.version
        return web.json_response(
            {
                "output_ids": [self.number],
                "meta_info": {
                    "finish_reason": {"type": "length", "length": 1},
                    "output_token_logprobs": [[score, self.number, None]],
                    "output_top_logprobs": [[[score, self.number, None], [2 * score, 8, None]]],
                    "weight_version": version,
                    "weight_versions": [{"version": version, "start": 0, "end": 1}],
                },
            }
        )

    async def _control(self, request: web.Request) -> web.Response:
        self.calls.append(request.path)
        if request.path == "/init_weights_update_group":
            self.ranks.append((await request.json())["rank_offset"])
        if request.path == "/server_info":
            if self.silent:
                await asyncio.sleep(3600)
            return web.json_response(
                {
                    "version": "0.5.23",
                    "max_req_input_len": self.length,
                    "max_total_num_tokens": 100,
                    "model_path": str(self.model),
                    "weight_version": "0",
                }
            )
        if request.path == "/model_info":
            return web.json_response(
                {"model_path": self.path, "weight_version": self.version, "is_generation": True}
            )
        if request.path == "/update_weights_from_tensor" and self.slow:
            await asyncio.sleep(3600)
        if request.path == "/update_weights_from_disk":
            body: dict[str, Any] = await request.json()
            if self.refuses and body["model_path"] != self.path:
                return web.json_response({"success": False, "message": "no"}, status=400)
            self.version, self.path = body["weight_version"], body["model_path"]
        if request.path == "/workers":
            return web.json_response({}, status=404)
        return web.json_response({})


class FakeRouter:
    """Lists workers as an sglang-router does, and passes nothing on."""

    def __init__(self, workers: list[str]) -> None:
        self.workers = workers
        self.kind = "regular"
        self.port = unused_port()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/workers", self._workers)
        runner = web.AppRunner(app, shutdown_timeout=0.05)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", self.port).start()
        return runner

    async def _workers(self, _: web.Request) -> web.Response:
        listed = [{"url": url, "worker_type": self.kind, "connection_mode": "HTTP"} for url in self.workers]
        return web.json_response({"workers": listed, "total": len(listed)})


async def ended(task: asyncio.Task[Any]) -> BaseException | None:
    """Wait for a task; return its exception."""
    with suppress(Exception):
        async with asyncio.timeout(20):
            await asyncio.wait([task])
    return task.exception()
