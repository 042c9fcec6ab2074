"""How weights are updated: optimisers and their schedules, master weights, precision, recomputation."""

from gym_sdk.grpo.optim.build import OptimizerFactory, make_optimizer
from gym_sdk.grpo.optim.composite import CompositeOptimizer
from gym_sdk.grpo.optim.config import OptimizerConfig
from gym_sdk.grpo.optim.master import MasterWeights
from gym_sdk.grpo.optim.precision import Precision, autocast, enable_gradient_checkpointing

__all__ = [
    "CompositeOptimizer",
    "MasterWeights",
    "OptimizerConfig",
    "OptimizerFactory",
    "Precision",
    "autocast",
    "enable_gradient_checkpointing",
    "make_optimizer",
]
