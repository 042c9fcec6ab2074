"""Rollouts and training for human eyes: text, HTML, plots."""

from gym_sdk.view.curve import save_learning_curve
from gym_sdk.view.text import describe_rollout
from gym_sdk.view.tokens import TokenView, show_tokens

__all__ = ["TokenView", "describe_rollout", "save_learning_curve", "show_tokens"]
