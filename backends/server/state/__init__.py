"""State of the Responses API: what is kept, and what runs in the background. `routes.py` serves both."""

from backends.server.state.background import BackgroundLimits, BackgroundRuns, Run
from backends.server.state.following import follow
from backends.server.state.history import StoredHistory
from backends.server.state.keys import RUNS, STORE
from backends.server.state.limits import StateLimits
from backends.server.state.memory import MemoryStore
from backends.server.state.sqlite import SqliteStore
from backends.server.state.stored import ResponseStore, StoredResponse, try_keep

__all__ = [
    "RUNS",
    "STORE",
    "BackgroundLimits",
    "BackgroundRuns",
    "MemoryStore",
    "ResponseStore",
    "Run",
    "SqliteStore",
    "StateLimits",
    "StoredHistory",
    "StoredResponse",
    "follow",
    "try_keep",
]
