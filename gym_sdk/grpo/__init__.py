"""GRPO: advantages, loss, log-probs, batches, trainer, weight sync, checkpoints. Needs the extra `[train]`.

For a trainer of your own, the pure functions are enough: `group_advantages`, `to_tensors`, `token_log_probs`,
`policy_loss`.
"""

from gym_sdk.grpo.batch import TokenBatch, to_tensors
from gym_sdk.grpo.broadcast import BroadcastSync, BroadcastTarget
from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.grpo.evaluate import EvalResult, evaluate
from gym_sdk.grpo.learner import Learner
from gym_sdk.grpo.logprobs import TokenScores, token_log_probs
from gym_sdk.grpo.loss import LossStats, PolicyLoss, policy_loss
from gym_sdk.grpo.selection import Selection, select_rows
from gym_sdk.grpo.sources import RolloutSource
from gym_sdk.grpo.sync import FolderSync, LoRASync, TensorSync, WeightSync, WeightTarget
from gym_sdk.grpo.trainer import GRPOTrainer, TrainStep
from gym_sdk.tokens import group_advantages, pack_by_budget

__all__ = [
    "BroadcastSync",
    "BroadcastTarget",
    "EvalResult",
    "FolderSync",
    "GRPOConfig",
    "GRPOTrainer",
    "Learner",
    "LoRASync",
    "LossStats",
    "PolicyLoss",
    "RolloutSource",
    "Selection",
    "TensorSync",
    "TokenBatch",
    "TokenScores",
    "TrainStep",
    "WeightSync",
    "WeightTarget",
    "evaluate",
    "group_advantages",
    "pack_by_budget",
    "policy_loss",
    "select_rows",
    "to_tensors",
    "token_log_probs",
]
