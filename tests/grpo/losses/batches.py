"""Random minibatches in float64, with NaN wherever no loss is."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from grpo.losses.naive import Naive, naive_loss
from torch import Tensor

from gym_sdk.grpo.losses import LossConfig, PolicyLoss, loss_normaliser, policy_loss


@dataclass
class Minibatch:
    log_probs: Tensor
    behaviour: Tensor
    proximal: Tensor
    reference: Tensor
    entropy: Tensor
    advantages: Tensor
    mask: Tensor

    def part(self, rows: Tensor | list[int] | slice) -> Minibatch:
        return Minibatch(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_minibatch(
    seed: int = 0,
    *,
    rows: int = 6,
    columns: int = 9,
    drift: float = 0.4,
    mismatch: float = 0.3,
    mask: Tensor | None = None,
    outside: float = math.nan,
) -> Minibatch:
    """Draw a minibatch; unless a mask is given, the last row carries no loss and the first a single token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn((rows, columns), generator=generator, dtype=torch.float64)

    behaviour = -draw(1.0).abs()
    if mask is None:
        mask = torch.rand((rows, columns), generator=generator) < 0.6
        mask[0] = torch.arange(columns) == columns // 2
        mask[-1] = False
    proximal = behaviour + draw(mismatch)
    batch = Minibatch(
        log_probs=proximal + draw(drift),
        behaviour=behaviour,
        proximal=proximal,
        reference=proximal + draw(1.0),
        entropy=draw(1.0).abs(),
        advantages=draw(1.0),
        mask=mask,
    )
    for field in fields(batch):
        if field.name != "mask":
            getattr(batch, field.name)[~mask] = outside
    batch.log_probs.requires_grad_()
    batch.entropy.requires_grad_()
    return batch


def compute(batch: Minibatch, config: LossConfig, normaliser: float | None = None) -> PolicyLoss:
    if normaliser is None:
        normaliser = loss_normaliser(batch.mask.sum(-1).tolist(), config)
    return policy_loss(
        batch.log_probs,
        batch.behaviour,
        batch.advantages,
        batch.mask,
        normaliser=normaliser,
        config=config,
        proximal_log_probs=batch.proximal,
        reference_log_probs=batch.reference,
        entropy=batch.entropy,
    )


def compute_naive(batch: Minibatch, settings: dict[str, Any]) -> Naive:
    return naive_loss(
        batch.log_probs.tolist(),
        batch.behaviour.tolist(),
        batch.advantages.tolist(),
        batch.mask.tolist(),
        proximal=batch.proximal.tolist(),
        reference=batch.reference.tolist(),
        entropy=batch.entropy.tolist(),
        settings=settings,
    )


def gradients(batch: Minibatch, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Differentiate by log-probs and entropy; zeros where the loss does not depend on one."""
    return torch.autograd.grad(
        loss, (batch.log_probs, batch.entropy), allow_unused=True, materialize_grads=True, retain_graph=True
    )


def table(values: dict[tuple[int, int], float], like: Tensor) -> Tensor:
    result = torch.zeros_like(like)
    for place, value in values.items():
        result[place] = value
    return result
