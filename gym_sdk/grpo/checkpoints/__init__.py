"""Checkpoints that resume exactly, in folders that any tool loads as a model."""

from gym_sdk.grpo.checkpoints.checkpoint import Checkpoint, Model, read_checkpoint, write_checkpoint
from gym_sdk.grpo.checkpoints.checkpoint_folder import CheckpointFolder
from gym_sdk.grpo.checkpoints.random_states import random_states
from gym_sdk.grpo.checkpoints.state import TrainerState, read_state

__all__ = [
    "Checkpoint",
    "CheckpointFolder",
    "Model",
    "TrainerState",
    "random_states",
    "read_checkpoint",
    "read_state",
    "write_checkpoint",
]
