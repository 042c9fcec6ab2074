"""Families of tasks that a tiny policy can be warm-started on, one file each."""

from backends.tiny.families.arithmetic import ArithmeticMix
from backends.tiny.families.lockers import LockersMix
from backends.tiny.families.protocol import Messages, TraceMix
from backends.tiny.families.spelling import SpellingMix

__all__ = ["ArithmeticMix", "LockersMix", "Messages", "SpellingMix", "TraceMix"]
