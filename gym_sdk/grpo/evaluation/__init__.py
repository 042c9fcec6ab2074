"""Evaluation inside training: rewards on tasks that are not trained on, the best step, stopping early."""

from gym_sdk.grpo.evaluation.early_stop import EarlyStop
from gym_sdk.grpo.evaluation.evaluation import Evaluation, evaluate
from gym_sdk.grpo.evaluation.plan import EvaluationPlan
from gym_sdk.grpo.evaluation.result import EvalResult, most_common_failure

__all__ = ["EarlyStop", "EvalResult", "Evaluation", "EvaluationPlan", "evaluate", "most_common_failure"]
