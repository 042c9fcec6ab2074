"""Where a run's numbers go: trackio, Weights & Biases, TensorBoard, a file, behind one small protocol."""

from gym_sdk.trackers.background import BackgroundTracker, QueueLimits
from gym_sdk.trackers.choose import tracker_for
from gym_sdk.trackers.jsonl import JsonlTracker
from gym_sdk.trackers.protocol import Sink, Tracker
from gym_sdk.trackers.tee import Tee, tee
from gym_sdk.trackers.tensorboard import TensorBoardTracker
from gym_sdk.trackers.trackio import TrackioTracker
from gym_sdk.trackers.wandb import WandbTracker

__all__ = [
    "BackgroundTracker",
    "JsonlTracker",
    "QueueLimits",
    "Sink",
    "Tee",
    "TensorBoardTracker",
    "Tracker",
    "TrackioTracker",
    "WandbTracker",
    "tee",
    "tracker_for",
]
