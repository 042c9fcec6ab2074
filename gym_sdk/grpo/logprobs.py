"""Log-probs of sampled tokens under a model, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.batch import TokenBatch

__all__ = ["TokenScores", "check_model", "evaluating", "token_log_probs"]


class TokenScores(NamedTuple):
    """What a model says about the sampled tokens of a batch; 0 where `loss_mask` is not set."""

    log_probs: Float[Tensor, "rows seq"]
    """`log p(token t | tokens before t)` at the temperature; carries the gradient."""
    entropy: Float[Tensor, "rows seq"] | None
    """Entropy of the distribution that token t was drawn from, in nats; without gradient."""


def token_log_probs(
    model: PreTrainedModel,
    batch: TokenBatch,
    *,
    temperature: float = 1.0,
    with_entropy: bool = False,
    max_logits: int = 2**25,
) -> TokenScores:
    """Compute the log-prob of every token that carries loss.

    `log softmax(z / temperature)[token]`, in float32 at least, where z are the logits at the position before
    the token. The backbone runs once; only positions whose successor carries loss reach the vocabulary
    projection, and those in chunks. If there is more than one chunk, each is computed again in the
    backward pass, so that no more than one chunk of logits exists at any time.

    Args:
        model: a causal LM of transformers.
        batch: right-padded rows.
        temperature: what the tokens were sampled at.
        with_entropy: also compute the entropies, from the same logits.
        max_logits: the most logits (tokens times vocabulary) of one chunk: 2**25 are 128 MiB in float32.

    Returns:
        Log-probs, and entropies if asked for, aligned with `batch.input_ids`.
    """
    backbone, head = _split(model)
    # Right-padded rows need no mask under causal attention: no token sees the padding behind it. Without a
    # mask, attention takes its fast causal path.
    hidden = backbone(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
    ).last_hidden_state
    row_index, token_index = batch.loss_mask.nonzero(as_tuple=True)
    hidden = hidden[row_index, token_index - 1]
    targets = batch.input_ids[row_index, token_index]
    chunk = max(1, max_logits // head.weight.shape[0])
    recompute = torch.is_grad_enabled() and targets.shape[0] > chunk
    parts: list[tuple[Tensor, Tensor]] = []
    for hidden_chunk, target_chunk in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        args = (head, hidden_chunk, target_chunk, temperature, with_entropy)
        parts.append(checkpoint(_score, *args, use_reentrant=False) if recompute else _score(*args))
    index = (row_index, token_index)
    log_probs = _spread(torch.cat([part[0] for part in parts]), index, batch)
    entropy = _spread(torch.cat([part[1] for part in parts]), index, batch) if with_entropy else None
    return TokenScores(log_probs, entropy)


def _score(
    head: nn.Module,
    hidden: Float[Tensor, "tokens size"],
    targets: Int[Tensor, " tokens"],
    temperature: float,
    with_entropy: bool,
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        logits = logits / temperature
    log_normaliser = logits.logsumexp(-1)
    log_probs = logits.gather(-1, targets[:, None])[:, 0] - log_normaliser
    if not with_entropy:
        return log_probs, log_probs.new_empty(0)
    with torch.no_grad():
        # H = log Z - sum_v p_v z_v; a logit of minus infinity has p = 0 and adds nothing.
        weighted = (logits - log_normaliser[:, None]).exp_().mul_(logits).nan_to_num_(nan=0.0)
        return log_probs, log_normaliser.detach() - weighted.sum(-1)


def _spread(
    values: Float[Tensor, " tokens"], index: tuple[Tensor, Tensor], batch: TokenBatch
) -> Float[Tensor, "rows seq"]:
    return values.new_zeros(batch.input_ids.shape).index_put(index, values)


def _split(model: PreTrainedModel) -> tuple[nn.Module, nn.Linear]:
    head = model.get_output_embeddings()
    backbone = model.get_decoder()
    if not isinstance(head, nn.Linear) or not isinstance(backbone, nn.Module) or backbone is model:
        raise ConfigurationError(
            f"{type(model).__name__} is not a causal LM with a linear vocabulary projection; "
            "load one with AutoModelForCausalLM"
        )
    return backbone, head


def check_model(model: PreTrainedModel) -> None:
    """Check that backbone and vocabulary projection alone give the model's logits.

    Some architectures do more between the two (soft caps, multipliers); log-probs without that would be
    silently wrong.

    Raises:
        ConfigurationError: they do not, or the model is no causal LM.
    """
    backbone, head = _split(model)
    ids = torch.zeros((1, 2), dtype=torch.long, device=next(model.parameters()).device)
    with torch.no_grad(), evaluating(model):
        expected = model(input_ids=ids, use_cache=False).logits
        actual = head(backbone(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(expected.float(), actual.float(), rtol=1e-3, atol=1e-3, equal_nan=True):
        raise ConfigurationError(
            f"{type(model).__name__} transforms its logits after the vocabulary projection (a soft cap or a "
            "multiplier); this trainer does not support that architecture"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside: the engine samples without it, so log-probs must be taken without it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
