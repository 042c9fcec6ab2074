"""Where an application holds its state."""

from __future__ import annotations

from aiohttp import web

from backends.server.state.background import BackgroundRuns
from backends.server.state.stored import ResponseStore

__all__ = ["RUNS", "STORE"]

STORE: web.AppKey[ResponseStore] = web.AppKey("response_store")
RUNS = web.AppKey("background_runs", BackgroundRuns)
