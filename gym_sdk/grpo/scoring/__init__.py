"""Log-probs and entropies of tokens under a model, in bounded memory.

- `scores`: of the sampled tokens of a batch
- `linear`: from hidden states and a projection, as a plain function for a trainer of your own
- `head`: what lies between a model's hidden states and its logits
- `check`: whether a model's log-probs can be computed that way
- `chunks`: how large the blocks of logits are
- `kernels`: Liger's fused kernels for the rest of the model
"""

from gym_sdk.grpo.scoring.check import check_model, evaluating
from gym_sdk.grpo.scoring.chunks import MAX_LOGITS, ChunkSizes, choose_chunks
from gym_sdk.grpo.scoring.head import Head, split_model
from gym_sdk.grpo.scoring.kernels import apply_fused_kernels
from gym_sdk.grpo.scoring.linear import LinearScores, linear_log_probs
from gym_sdk.grpo.scoring.scores import TokenScores, token_log_probs

__all__ = [
    "MAX_LOGITS",
    "ChunkSizes",
    "Head",
    "LinearScores",
    "TokenScores",
    "apply_fused_kernels",
    "check_model",
    "choose_chunks",
    "evaluating",
    "linear_log_probs",
    "split_model",
    "token_log_probs",
]
