"""Log-probs and entropies from hidden states and a vocabulary projection, without the logits in between."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.grpo.scoring.blocks import LogitBlocks, operand_dtype
from gym_sdk.grpo.scoring.chunks import ChunkSizes, choose_chunks
from gym_sdk.grpo.scoring.gradients import Gradients, Upstream
from gym_sdk.grpo.scoring.totals import Totals

__all__ = ["LinearScores", "linear_log_probs"]


class LinearScores(NamedTuple):
    """What a vocabulary projection says about one target per hidden state."""

    log_probs: Float[Tensor, " tokens"]
    """`log softmax(z / temperature)[target]`; float32, or float64 for inputs in float64."""
    entropy: Float[Tensor, " tokens"] | None
    """Entropy of `softmax(z / temperature)` in nats, if it was asked for."""


def linear_log_probs(
    hidden: Float[Tensor, "tokens size"],
    weight: Float[Tensor, "vocab size"],
    targets: Int[Tensor, " tokens"],
    *,
    bias: Float[Tensor, " vocab"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    chunks: ChunkSizes | None = None,
    in_place: bool = False,
) -> LinearScores:
    """Compute `log softmax(z / temperature)[target]` with `z = softcap(logit_scale * (h W^T + b))`.

    `softcap(x)` is `c tanh(x / c)` (Gemma 2, arXiv 2408.00118, section 2). The logits exist in blocks of
    tokens and vocabulary: the normaliser is accumulated from block to block with a running maximum (online
    softmax, arXiv 1805.02867, algorithm 3), and the backward pass computes each block again. If the weight is
    frozen (LoRA), the forward pass accumulates the gradient's direction `W[target] - E_p[W]` too, and the
    backward pass needs no matrix product at all. Logits that fit into one block are kept, and go through
    PyTorch's own operations, which are faster on them.

    Logits, sums and the gradient of `hidden` accumulate in float32 (float64 for float64 inputs), whatever the
    inputs' precision; see `operand_dtype` for the products. Gradients have the precision of their tensors; a
    block of the weight's gradient is summed over all tokens before it is rounded. Blocks are
    differentiable once. The half-precision path of CUDA has not been run.

    Liger's fused linear cross-entropy is not used: it has neither a temperature nor a differentiable entropy,
    and its releases before pull request 1298 (July 2026) scale the weight's gradient by one token's upstream
    gradient; `apply_fused_kernels` brings Liger's other kernels.

    Args:
        hidden: the states at the positions before the targets; only tokens that are scored.
        weight: the vocabulary projection.
        targets: token ids.
        bias: of the projection.
        temperature: what the tokens were sampled at.
        softcap: bound on the logits' magnitude; None for none.
        logit_scale: factor of the logits, before the soft cap.
        with_entropy: also compute the entropies, in the same pass.
        entropy_gradient: let gradients flow through the entropies.
        chunks: the blocks; None chooses them by `choose_chunks`.
        in_place: add the weight's gradient to `weight.grad` block by block, if the weight is a leaf without
            hooks, instead of handing a tensor of the weight's size to autograd. It then reaches `backward()`
            alone, not `torch.autograd.grad`.

    Raises:
        ConfigurationError: shapes do not fit, a number is out of range, or a gradient is asked for through an
            entropy that is not.
        TokenContractError: a target is outside the vocabulary.
    """
    _check(hidden, weight, targets, bias)
    for name, value in (("temperature", temperature), ("softcap", softcap), ("logit_scale", logit_scale)):
        if value is not None and not 0.0 < value < math.inf:
            raise ConfigurationError(f"{name} must be positive and finite, not {value!r}")
    if entropy_gradient and not with_entropy:
        raise ConfigurationError("entropy_gradient needs with_entropy=True")
    needs_grad = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)
    )
    job = _Job(
        inner=logit_scale / (temperature if softcap is None else softcap),
        outer=None if softcap is None else softcap / temperature,
        operand=operand_dtype(hidden, weight),
        with_entropy=with_entropy,
        entropy_gradient=entropy_gradient and needs_grad,
        needs_grad=needs_grad,
        chunks=chunks or choose_chunks(hidden.shape[0], weight.shape[0], hidden.device),
        in_place=in_place,
    )
    one_block = job.chunks.tokens >= hidden.shape[0] and job.chunks.vocab >= weight.shape[0]
    if one_block and weight.dtype == job.operand and not job.operand.itemsize < 4:
        return _plain_log_probs(hidden, weight, bias, targets, job)
    return LinearScores(*_LinearLogProbs.apply(hidden, weight, bias, targets, job))


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    shapes = (hidden.shape, weight.shape, targets.shape, None if bias is None else bias.shape)
    fits = (
        hidden.ndim == weight.ndim == 2
        and hidden.shape[1] == weight.shape[1]
        and targets.shape == hidden.shape[:1]
        and (bias is None or bias.shape == weight.shape[:1])
    )
    if not fits:
        raise ConfigurationError(
            "linear_log_probs needs hidden [tokens, size], weight [vocab, size], targets [tokens] and bias "
            f"[vocab] or None, not {', '.join(str(shape and tuple(shape)) for shape in shapes)}"
        )
    if targets.numel():
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= weight.shape[0]:
            raise TokenContractError(
                f"token id {low if low < 0 else high} is outside the model's vocabulary of "
                f"{weight.shape[0]}; the rows were tokenized for another model"
            )


@dataclass(frozen=True, slots=True)
class _Job:
    inner: float
    outer: float | None
    operand: torch.dtype
    with_entropy: bool
    entropy_gradient: bool
    needs_grad: bool
    chunks: ChunkSizes
    in_place: bool

    def blocks(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> LogitBlocks:
        dtype = torch.promote_types(self.operand, torch.float32)
        return LogitBlocks(hidden.to(self.operand), weight, bias, self.inner, self.outer, self.chunks, dtype)


def _plain_log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, job: _Job
) -> LinearScores:
    with torch.autocast(hidden.device.type, enabled=False):
        logits = nn.functional.linear(
            hidden.to(job.operand), weight, None if bias is None else bias.to(job.operand)
        )
        if job.inner != 1.0:
            logits = logits * job.inner
        if job.outer is not None:
            logits = job.outer * torch.tanh(logits)
        table = logits.log_softmax(-1)
        log_probs = table.gather(1, targets[:, None])[:, 0]
        if not job.with_entropy:
            return LinearScores(log_probs, None)
        table = table if job.entropy_gradient else table.detach()
        return LinearScores(log_probs, -(table.exp() * table).sum(-1))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, job: _Job
    ) -> tuple[Tensor, Tensor | None]:
        frozen_head = not any(ctx.needs_input_grad[1:3])
        direct = job.needs_grad and frozen_head and not job.entropy_gradient and job.outer is None
        totals = Totals(job.blocks(hidden, weight, bias), with_entropy=job.with_entropy, with_expected=direct)
        totals.compute(targets)
        log_mass = totals.mass.log()
        log_normaliser = totals.maximum + log_mass
        entropy = None if totals.weighted is None else log_normaliser - totals.weighted / totals.mass
        direction = None
        if totals.expected is not None:
            direction = weight[targets] - totals.expected.div_(totals.mass[:, None])
        ctx.job = job
        ctx.set_materialize_grads(False)
        if entropy is not None and not job.entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        if direct:
            ctx.save_for_backward(direction)
        else:
            ctx.save_for_backward(hidden, weight, bias, targets, log_normaliser, entropy)
        # In this order no digits are lost to a large maximum.
        return totals.target_logits - totals.maximum - log_mass, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: Tensor | None, entropy_grad: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        job = ctx.job
        if grad is None and entropy_grad is None:
            return None, None, None, None, None
        if len(ctx.saved_tensors) == 1:
            (direction,) = ctx.saved_tensors
            return direction * (job.inner * grad)[:, None], None, None, None, None
        hidden, weight, bias, targets, log_normaliser, entropy = ctx.saved_tensors
        grad = torch.zeros_like(log_normaliser) if grad is None else grad
        upstream = Upstream(targets, log_normaliser, grad, entropy, entropy_grad)
        blocks = job.blocks(hidden, weight, bias)
        total = _total(weight) if job.in_place and ctx.needs_input_grad[1] else None
        gradients = Gradients(blocks, upstream, ctx.needs_input_grad[:3]).compute(total)
        return *gradients, None, None


def _total(weight: Tensor) -> Tensor | None:
    """Return the weight's `grad`, made if there is none yet; None if autograd has to see what is added."""
    if not weight.is_leaf or weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight, dtype=getattr(weight, "grad_dtype", None))
    return weight.grad
