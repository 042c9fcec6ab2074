"""What rollouts say in numbers: estimates, percentiles, running totals, tables."""

from gym_sdk.metrics.estimates import best_at_k, pass_at_k, pass_hat_k
from gym_sdk.metrics.groups import Estimate, best_at, majority_at, mean_reward, pass_at, pass_hat
from gym_sdk.metrics.majority import AnswerOf, final_number, final_text, majority_at_k
from gym_sdk.metrics.run import MetricsConfig, RunMetrics
from gym_sdk.metrics.sketch import QuantileSketch
from gym_sdk.metrics.tables import GroupKey, Table, group_table, rollout_table, tags_of
from gym_sdk.metrics.throughput import Throughput

__all__ = [
    "AnswerOf",
    "Estimate",
    "GroupKey",
    "MetricsConfig",
    "QuantileSketch",
    "RunMetrics",
    "Table",
    "Throughput",
    "best_at",
    "best_at_k",
    "final_number",
    "final_text",
    "group_table",
    "majority_at",
    "majority_at_k",
    "mean_reward",
    "pass_at",
    "pass_at_k",
    "pass_hat",
    "pass_hat_k",
    "rollout_table",
    "tags_of",
]
