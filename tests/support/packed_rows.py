"""Rows with common beginnings, and the one reference that all layouts are compared with: each row alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from hypothesis import strategies
from torch import Tensor, nn

from gym_sdk.grpo.packing import PackedBatch, TokenBatch, hidden_before
from gym_sdk.tokens import TokenSequence

Measured = tuple[Tensor, list[Tensor]]
"""Hidden states before all trained tokens, row after row, and the gradients of a fixed function of them."""


def make_row(ids: Sequence[int], mask: Sequence[int], number: int = 0) -> TokenSequence:
    log_probs = [-0.5 - 0.01 * place if trained else 0.0 for place, trained in enumerate(mask)]
    return TokenSequence(list(ids), list(mask), log_probs, advantage=1.0 + number, rollout_id=f"r{number}")


def make_family() -> list[TokenSequence]:
    """Forks within forks, an identical row, a row that is another's beginning, one token's difference."""
    generator = torch.Generator().manual_seed(1)
    parts = torch.randint(16, (8, 9), generator=generator).tolist()
    paths = [[0, 1, 2], [0, 1, 3], [0, 4], [0, 1, 2], [0, 1], [5], [6, 7, 1], [0, 1, 3]]
    rows = [[token for part in path for token in parts[part]] for path in paths]
    rows[-1][-2] = (rows[-1][-2] + 1) % 16
    masks = [[0] * 9 + [1] * (len(row) - 9) for row in rows]
    masks[5] = [0, 1, 1, 0, 0, 0, 1, 0, 0]  # its last tokens condition nothing
    masks[3][9:18] = [0] * 9  # trains less of the same tokens
    return [make_row(row, mask, number) for number, (row, mask) in enumerate(zip(rows, masks, strict=True))]


@strategies.composite
def row_families(draw: strategies.DrawFn) -> list[TokenSequence]:
    """Rows each of which begins with some part of an earlier one, if only with nothing."""
    token = strategies.integers(0, 2)
    rows: list[list[int]] = []
    for _ in range(draw(strategies.integers(1, 6))):
        start: list[int] = []
        if rows:
            parent = draw(strategies.sampled_from(rows))
            start = parent[: draw(strategies.integers(0, len(parent)))]
        rows.append(start + draw(strategies.lists(token, min_size=0 if start else 1, max_size=24)))
    masks = [
        [0, *draw(strategies.lists(strategies.integers(0, 1), min_size=len(row) - 1, max_size=len(row) - 1))]
        for row in rows
    ]
    return [make_row(row, mask, number) for number, (row, mask) in enumerate(zip(rows, masks, strict=True))]


def _gradients(model: nn.Module, hidden: Tensor) -> Measured:
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    (hidden * weights).sum().backward()
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad for parameter in wanted
    ]
    model.zero_grad()
    return hidden.detach(), gradients


def measure(model: nn.Module, batch: TokenBatch | PackedBatch) -> Measured:
    """Run a batch. Gradients come by `backward()`, which reentrant checkpointing needs."""
    hidden = hidden_before(model.get_decoder(), batch)
    return _gradients(model, hidden[batch.pair_index[batch.loss_mask]])


def measure_alone(model: nn.Module, rows: Sequence[TokenSequence]) -> Measured:
    """Run each row by itself, whole, with the model's own attention."""
    hidden = []
    for row in rows:
        states = model.get_decoder()(input_ids=torch.tensor([row.token_ids])).last_hidden_state[0]
        hidden.append(states[:-1][torch.tensor(row.loss_mask[1:], dtype=torch.bool)])
    return _gradients(model, torch.cat(hidden))


def make_exact(model: nn.Module) -> nn.Module:
    """Compute in float64 throughout: transformers' norms go through float32 whatever the model's dtype."""

    def normalise(norm: nn.Module, values: Tensor) -> Tensor:
        scale = (values.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
        return norm.weight * values * scale

    model = model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(normalise, module)
    return model


def assert_equal(actual: Measured, expected: Measured, tolerance: float) -> None:
    """Compare by the norm of the difference, relative to the norm of what is expected."""
    assert actual[0].shape == expected[0].shape
    assert len(actual[1]) == len(expected[1]) > 0
    largest = max(gradient.norm() for gradient in expected[1])
    assert (actual[0] - expected[0]).norm() <= tolerance * expected[0].norm()
    for ours, naive in zip(actual[1], expected[1], strict=True):
        assert (ours - naive).norm() <= tolerance * max(naive.norm(), largest)
