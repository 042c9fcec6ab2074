"""Both attentions over a forest against a dense mask, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from support.packed_rows import make_family, row_families
from torch import Tensor

from gym_sdk.grpo.packing.cpu import cpu_attention
from gym_sdk.grpo.packing.flex import BLOCK, flex_forest_attention, make_block_mask
from gym_sdk.grpo.packing.forest import build_forest
from gym_sdk.grpo.packing.layout import ForestLayout, make_layout
from gym_sdk.tokens import TokenSequence

Attention = Callable[[Tensor, Tensor, Tensor, ForestLayout, float], Tensor]


def layout_of(rows: list[TokenSequence]) -> ForestLayout:
    return make_layout(build_forest([row.token_ids for row in rows]))


def dense_attention(query: Tensor, key: Tensor, value: Tensor, layout: ForestLayout, scale: float) -> Tensor:
    repeats = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeats, 0), value.repeat_interleave(repeats, 0)
    scores = scale * query @ key.transpose(1, 2)
    return (scores.masked_fill(~layout.visible(), -torch.inf).softmax(-1) @ value).transpose(0, 1)


def run(
    attention: Attention, layout: ForestLayout, heads: tuple[int, int], dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Output, then the gradients of query, key and value; laid out in memory as projections leave them."""
    generator = torch.Generator().manual_seed(3)
    tokens = len(layout.last_reader)

    def draw(count: int) -> Tensor:
        return torch.randn(tokens, count, 16, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [draw(count).requires_grad_() for count in (heads[0], heads[1], heads[1])]
    query, key, value = (leaf.transpose(0, 1) for leaf in leaves)
    out = attention(query, key, value, layout, 0.4)
    return [out, *torch.autograd.grad(out, leaves, draw(heads[0]))]


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (3, 1)])
def test_cpu_attention_equals_the_dense_mask(heads: tuple[int, int]) -> None:
    layout = layout_of(make_family())
    for ours, naive in zip(
        run(cpu_attention, layout, heads), run(dense_attention, layout, heads), strict=True
    ):
        assert (ours - naive).norm() <= 1e-14 * naive.norm()


@settings(max_examples=30, deadline=None)
@given(row_families())
def test_cpu_attention_on_random_forests(rows: list[TokenSequence]) -> None:
    layout = layout_of(rows)
    for ours, naive in zip(
        run(cpu_attention, layout, (4, 2)), run(dense_attention, layout, (4, 2)), strict=True
    ):
        assert (ours - naive).norm() <= 1e-13 * max(naive.norm(), 1.0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_cpu_attention_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    layout = layout_of(make_family())
    actual = run(cpu_attention, layout, (4, 2), dtype)
    for ours, naive in zip(actual, run(dense_attention, layout, (4, 2)), strict=True):
        assert ours.dtype == dtype
        assert (ours - naive).norm() <= tolerance * naive.norm()


def test_keys_are_kept_for_backward_once_however_many_rows_share_them() -> None:
    layouts = [
        make_layout(build_forest([list(range(200)) + [300 + number] * 10 for number in range(count)]))
        for count in (1, 8)
    ]
    kept = []
    for layout in layouts:
        saved: dict[int, int] = {}

        def keep(tensor: Tensor, saved: dict[int, int] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            run(cpu_attention, layout, (4, 2))
        kept.append(sum(saved.values()) / len(layout.last_reader))
    assert kept[1] <= 1.01 * kept[0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("heads", [(2, 2), (4, 2)])
def test_flex_attention_equals_cpu_attention(heads: tuple[int, int]) -> None:
    layout = layout_of(make_family())
    generator = torch.Generator().manual_seed(4)
    query, key, value = (
        torch.randn(count, len(layout.last_reader), 16, generator=generator)
        for count in (heads[0], heads[1], heads[1])
    )
    ours = flex_forest_attention(query, key, value, layout, 0.4)  # PyTorch has no backward for it on CPUs
    expected = cpu_attention(query, key, value, layout, 0.4)
    assert (ours - expected).norm() <= 1e-6 * expected.norm()


def test_block_mask_lists_exactly_the_blocks_that_are_seen() -> None:
    sizes = [(300, [140, 5, 260]), (40, [90, 90]), (BLOCK, [BLOCK])]
    rows, token = [], 0
    for prompt, completions in sizes:
        token += 1
        start = [token] * prompt
        for size in completions:
            token += 1
            rows.append(start + [token] * size)
    layout = make_layout(build_forest(rows))
    mask, visible = make_block_mask(layout), layout.visible()
    blocks = -(-len(visible) // BLOCK)
    padded = visible.new_zeros(blocks * BLOCK, blocks * BLOCK)
    padded[: len(visible), : len(visible)] = visible
    seen = padded.view(blocks, BLOCK, blocks, BLOCK).sum((1, 3))
    partial, whole = torch.zeros_like(seen), torch.zeros_like(seen)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    for number in range(blocks):
        partial[number, mask.kv_indices[0, 0, number, : mask.kv_num_blocks[0, 0, number]].long()] = 1
        whole[number, mask.full_kv_indices[0, 0, number, : mask.full_kv_num_blocks[0, 0, number]].long()] = 1
    assert torch.equal(whole, (seen == BLOCK**2).long())
    assert ((seen > 0) & (seen < BLOCK**2) <= (partial > 0)).all()
    assert not (partial & whole).any()
    assert (partial & (seen == 0)).sum() <= 3  # a block whose own readers all end before its first query
    place = torch.arange(len(visible))
    assert torch.equal(mask.mask_mod(place, place, place[:, None], place), visible)
