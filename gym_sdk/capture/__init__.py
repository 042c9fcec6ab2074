"""Rollouts of third-party agents: they get an address of their own, and every model call is recorded."""

from gym_sdk.capture.calls import CallError, CapturedCall
from gym_sdk.capture.session import CaptureSession

__all__ = ["CallError", "CaptureSession", "CapturedCall"]
