"""GRPO: advantages, losses, log-probs, batches, trainer, weight sync, checkpoints. Needs the extra `[train]`.

For a trainer of your own, the plain functions are enough: `group_advantages`, `to_tensors` or `pack_rows`,
`token_log_probs`, `policy_loss`. Their pieces are in `losses`, `packing`, `scoring` and `optim`.
"""

from gym_sdk.grpo.alarms import Alarm, AlarmConfig
from gym_sdk.grpo.broadcast import BroadcastSync, BroadcastTarget
from gym_sdk.grpo.checkpoints import CheckpointFolder
from gym_sdk.grpo.config import GRPOConfig
from gym_sdk.grpo.evaluation import EvalResult, Evaluation, evaluate
from gym_sdk.grpo.learner import Learner
from gym_sdk.grpo.losses import LossConfig, LossStats, PolicyLoss, loss_normaliser, policy_loss
from gym_sdk.grpo.models import add_lora
from gym_sdk.grpo.optim import OptimizerConfig
from gym_sdk.grpo.packing import PackedBatch, TokenBatch, pack_rows, plan_micro_batches, to_tensors
from gym_sdk.grpo.scoring import TokenScores, linear_log_probs, token_log_probs
from gym_sdk.grpo.selection import Selection, select_rows
from gym_sdk.grpo.sources import RolloutSource
from gym_sdk.grpo.step import TrainStep
from gym_sdk.grpo.sync import FolderSync, LoRASync, TensorSync, WeightSync, WeightTarget
from gym_sdk.grpo.trainer import GRPOTrainer
from gym_sdk.tokens import group_advantages, pack_by_budget

__all__ = [
    "Alarm",
    "AlarmConfig",
    "BroadcastSync",
    "BroadcastTarget",
    "CheckpointFolder",
    "EvalResult",
    "Evaluation",
    "FolderSync",
    "GRPOConfig",
    "GRPOTrainer",
    "Learner",
    "LoRASync",
    "LossConfig",
    "LossStats",
    "OptimizerConfig",
    "PackedBatch",
    "PolicyLoss",
    "RolloutSource",
    "Selection",
    "TensorSync",
    "TokenBatch",
    "TokenScores",
    "TrainStep",
    "WeightSync",
    "WeightTarget",
    "add_lora",
    "evaluate",
    "group_advantages",
    "linear_log_probs",
    "loss_normaliser",
    "pack_by_budget",
    "pack_rows",
    "plan_micro_batches",
    "policy_loss",
    "select_rows",
    "to_tensors",
    "token_log_probs",
]
