"""Alarms: what goes wrong in training without an error, with the likely cause and the way out."""

from gym_sdk.grpo.alarms.alarm import Alarm, AlarmName
from gym_sdk.grpo.alarms.config import AlarmConfig
from gym_sdk.grpo.alarms.watch import AlarmWatch

__all__ = ["Alarm", "AlarmConfig", "AlarmName", "AlarmWatch"]
