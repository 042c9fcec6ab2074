"""Worker processes for functions that need a process of their own."""

from gym_sdk.processes.declare import in_process, pool_of
from gym_sdk.processes.pool import PoolConfig, WorkerPool
from gym_sdk.processes.worker import WorkerDiedError, WorkerError

__all__ = ["PoolConfig", "WorkerDiedError", "WorkerError", "WorkerPool", "in_process", "pool_of"]
