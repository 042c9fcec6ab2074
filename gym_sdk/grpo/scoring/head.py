"""The vocabulary projection of a causal LM, and what the model does to its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.scoring.chunks import MAX_LOGITS, choose_chunks
from gym_sdk.grpo.scoring.linear import LinearScores, linear_log_probs

__all__ = ["Head", "split_model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """From hidden states to log-probs: `logits = softcap(scale * projection(hidden))`."""

    projection: nn.Module
    """A plain `nn.Linear` takes the chunked path of `linear_log_probs`. Any other module (adapted by peft,
    quantised, parametrised) is called as it is, with all the vocabulary for a few tokens at a time."""
    vocab_size: int
    scale: float = 1.0
    softcap: float | None = None

    def transform(self, logits: Tensor) -> Tensor:
        """Turn the projection's output into the model's logits."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def score(
        self,
        hidden: Float[Tensor, "tokens size"],
        targets: Int[Tensor, " tokens"],
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        entropy_gradient: bool = False,
        max_logits: int = MAX_LOGITS,
        in_place: bool = False,
    ) -> LinearScores:
        """Compute log-probs of targets, and entropies, as `linear_log_probs` does (arguments: see there)."""
        if type(self.projection) is nn.Linear:
            return linear_log_probs(
                hidden,
                self.projection.weight,
                targets,
                bias=self.projection.bias,
                temperature=temperature,
                softcap=self.softcap,
                logit_scale=self.scale,
                with_entropy=with_entropy,
                entropy_gradient=entropy_gradient,
                chunks=choose_chunks(hidden.shape[0], self.vocab_size, hidden.device, max_logits),
                in_place=in_place,
            )
        chunk = max(1, max_logits // (4 * self.vocab_size))  # with the copies that autograd needs
        recompute = torch.is_grad_enabled() and hidden.shape[0] > chunk
        parts = []
        for states, tokens in zip(hidden.split(chunk), targets.split(chunk), strict=True):
            args = (states, tokens, temperature, with_entropy, entropy_gradient)
            part = checkpoint(self._score, *args, use_reentrant=False) if recompute else self._score(*args)
            parts.append(part)
        log_probs = torch.cat([part[0] for part in parts])
        return LinearScores(log_probs, torch.cat([part[1] for part in parts]) if with_entropy else None)

    def _score(
        self, hidden: Tensor, targets: Tensor, temperature: float, with_entropy: bool, entropy_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        logits = self.projection(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        table = (self.transform(logits) / temperature).log_softmax(-1)
        log_probs = table.gather(1, targets[:, None])[:, 0]
        if not with_entropy:
            return log_probs, log_probs.new_empty(0)
        table = table if entropy_gradient else table.detach()
        return log_probs, -(table.exp() * table).sum(-1)


def split_model(model: nn.Module) -> tuple[nn.Module, Head]:
    """Split a causal LM into its decoder and its head.

    The head's scale and soft cap are read from the config, under the names that transformers' architectures
    give them: `logit_scale` (Cohere), `lm_head_multiplier` (Falcon-H1), `logits_scaling` (Granite; a
    divisor), `final_logit_softcapping` (Gemma), `logits_soft_cap` (RecurrentGemma). `check_model` proves that
    this is all.

    Args:
        model: a causal LM of transformers, or a peft model of one; its adapters stay part of both.

    Raises:
        ConfigurationError: the model has no decoder or no vocabulary projection.
    """
    base: Any = getattr(model, "get_base_model", lambda: model)()
    backbone = base.get_decoder() if hasattr(base, "get_decoder") else None
    projection = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if backbone is None or backbone is base or not isinstance(projection, nn.Module):
        raise ConfigurationError(
            f"{type(base).__name__} is not a causal LM with a vocabulary projection; "
            "load one with AutoModelForCausalLM"
        )
    config = base.config.get_text_config()
    divisor = getattr(config, "logits_scaling", None) or 1.0
    factors = [getattr(config, name, None) or 1.0 for name in ("logit_scale", "lm_head_multiplier")]
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    head = Head(
        projection=projection,
        vocab_size=config.vocab_size,
        scale=factors[0] * factors[1] / divisor,
        softcap=softcap,
    )
    return backbone, head
