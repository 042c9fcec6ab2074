"""Whether a model's log-probs can be computed from its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.scoring.head import Head, split_model

__all__ = ["check_model", "evaluating"]


def check_model(model: nn.Module) -> None:
    """Check that decoder, vocabulary projection and the config's scale and soft cap give the model's logits.

    Some architectures do more between the hidden states and the logits than this package knows of; log-probs
    without that would be silently wrong. Two short forward passes without dropout: one as it is, and one in
    which a wide range of numbers replaces the projection's output: a soft cap shows whatever the weights.

    Args:
        model: a causal LM of transformers, or a peft model of one.

    Raises:
        ConfigurationError: they do not, or the model is no causal LM.
    """
    backbone, head = split_model(model)
    device = next(model.parameters()).device
    ids = torch.arange(4, device=device)[None] % head.vocab_size
    targets = torch.linspace(0, head.vocab_size - 1, 4, device=device).long()
    with torch.no_grad(), evaluating(model):
        hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state[0]
        actual = head.score(hidden, targets).log_probs
        logits = model(input_ids=ids, use_cache=False).logits[0].double()
        expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
        transformed = _probe(model, head, ids)
    # Models in half precision round their logits, which may be large.
    rtol = max(1e-3, 4.0 * torch.finfo(hidden.dtype).eps)
    pairs = ((actual.double(), expected, float(logits.abs().max())), (*transformed, 1.0))
    for mine, theirs, size in pairs:
        if not torch.allclose(mine, theirs, rtol=rtol, atol=rtol * (1.0 + size), equal_nan=True):
            raise ConfigurationError(
                f"{type(model).__name__} computes its logits in a way that its config does not show (a "
                "multiplier, a soft cap or a layer between decoder and logits); this trainer does not "
                "support that architecture"
            )


def _probe(model: nn.Module, head: Head, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Transform a wide range of numbers as the head does, and as the model does after its projection."""
    probe = torch.linspace(-60.0, 60.0, head.vocab_size, device=ids.device)

    def replace(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        return probe.to(output.dtype).expand(output.shape)

    hook = head.projection.register_forward_hook(replace)
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    probe = probe.to(logits.dtype).double()
    return head.transform(probe).expand(logits.shape), logits.double()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn dropout off inside: the engine samples without it, so log-probs must be taken without it."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
