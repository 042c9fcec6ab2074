"""Log-probs of sampled tokens under a model, in bounded memory."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from gym_sdk.grpo.packing import PackedBatch, TokenBatch, hidden_before
from gym_sdk.grpo.scoring.chunks import MAX_LOGITS
from gym_sdk.grpo.scoring.head import split_model

__all__ = ["TokenScores", "token_log_probs"]


class TokenScores(NamedTuple):
    """What a model says about the sampled tokens of a batch; 0 where `loss_mask` is not set."""

    log_probs: Float[Tensor, "rows seq"]
    """`log p(token t | tokens before t)` at the temperature; carries the gradient."""
    entropy: Float[Tensor, "rows seq"] | None
    """Entropy of the distribution that token t was drawn from, in nats, if it was asked for."""


def token_log_probs(
    model: nn.Module,
    batch: TokenBatch | PackedBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    max_logits: int = MAX_LOGITS,
    in_place: bool = False,
) -> TokenScores:
    """Compute the log-prob of every token that carries loss.

    `log softmax(z / temperature)[token]`, in float32 at least, where z are the logits at the position before
    the token. The backbone runs once; only positions whose successor carries loss reach the vocabulary
    projection, each distinct one of a packed batch once, and logits exist in blocks (`linear_log_probs`).

    Dropout acts if the model is in training mode: see `evaluating`.

    Args:
        model: a causal LM of transformers, or a peft model of one, that `check_model` accepts.
        batch: padded or packed rows.
        temperature: what the tokens were sampled at.
        with_entropy: also compute the entropies, in the same pass.
        entropy_gradient: let gradients flow through the entropies.
        max_logits: the most logits (tokens times vocabulary) that are alive at any time, copies
            included: 2**25 are 128 MiB in float32. It changes the result by no more than rounding.
        in_place: save a copy of the vocabulary projection's gradient: see `linear_log_probs`.

    Returns:
        Log-probs, and entropies if asked for, aligned with `batch.loss_mask`.

    Raises:
        ConfigurationError: the model cannot be split, or a number is out of range.
        TokenContractError: a token id is outside the vocabulary.
    """
    backbone, head = split_model(model)
    scores = head.score(
        hidden_before(backbone, batch),
        batch.targets,
        temperature=temperature,
        with_entropy=with_entropy,
        entropy_gradient=entropy_gradient,
        max_logits=max_logits,
        in_place=in_place,
    )
    entropy = None if scores.entropy is None else _spread(scores.entropy, batch)
    return TokenScores(_spread(scores.log_probs, batch), entropy)


def _spread(values: Float[Tensor, " pairs"], batch: TokenBatch | PackedBatch) -> Float[Tensor, "rows seq"]:
    # Only tokens with loss are looked up: elsewhere `pair_index` is 0, which a batch without pairs has not,
    # and whose gradient would gather contributions from all padding.
    empty = values.new_zeros(batch.loss_mask.shape)
    return empty.masked_scatter(batch.loss_mask, values[batch.pair_index[batch.loss_mask]])
