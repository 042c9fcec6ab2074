"""Log-probs from hidden states in blocks, against the full logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.grpo.scoring import ChunkSizes, choose_chunks, linear_log_probs

TOKENS, SIZE, VOCAB = 7, 5, 11
SPLITS = [(7, 11), (3, 4), (1, 1), (10, 20)]
VARIANTS = [
    {},
    {"temperature": 0.7},
    {"logit_scale": 1.7, "temperature": 1.3},
    {"softcap": 1.5, "logit_scale": 0.8, "temperature": 0.9},
]


def inputs(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> dict[str, Tensor | None]:
    return {
        "hidden": torch.randn(TOKENS, SIZE, dtype=dtype, requires_grad=True),
        "weight": torch.randn(VOCAB, SIZE, dtype=dtype, requires_grad=True),
        "bias": torch.randn(VOCAB, dtype=dtype, requires_grad=True) if bias else None,
        "targets": torch.randint(VOCAB, (TOKENS,)),
    }


def naive(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """A token at a time, from all of its logits, in float64."""
    log_probs, entropies = [], []
    weight, bias = weight.double(), None if bias is None else bias.double()
    for state, target in zip(hidden.double(), targets, strict=True):
        logits = weight @ state
        if bias is not None:
            logits = logits + bias
        logits = logits * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        table = torch.log_softmax(logits / temperature, -1)
        log_probs.append(table[target])
        entropies.append(-(table.exp() * table).sum())
    return torch.stack(log_probs), torch.stack(entropies)


def gradients(outputs: tuple[Tensor, Tensor | None], leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum in which every token has a weight of its own."""
    total = (outputs[0] * torch.linspace(-1.0, 2.0, TOKENS, dtype=outputs[0].dtype)).sum()
    if outputs[1] is not None:
        total = total + (outputs[1] * torch.linspace(1.5, -1.0, TOKENS, dtype=outputs[1].dtype)).sum()
    return list(torch.autograd.grad(total, leaves))


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize(("tokens", "vocab"), SPLITS)
@pytest.mark.parametrize("entropy_gradient", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_the_full_log_softmax(
    options: dict[str, float], tokens: int, vocab: int, entropy_gradient: bool, bias: bool
) -> None:
    given = inputs(bias=bias)
    scores = linear_log_probs(
        **given,
        **options,
        with_entropy=True,
        entropy_gradient=entropy_gradient,
        chunks=ChunkSizes(tokens=tokens, vocab=vocab),
    )
    expected = naive(**given, **options)
    torch.testing.assert_close(tuple(scores), expected)
    leaves = [tensor for tensor in given.values() if tensor is not None and tensor.requires_grad]
    assert scores.entropy is not None
    assert scores.entropy.requires_grad is entropy_gradient
    last = (scores.entropy, expected[1]) if entropy_gradient else (None, None)
    actual = gradients((scores.log_probs, last[0]), leaves)
    torch.testing.assert_close(actual, gradients((expected[0], last[1]), leaves))


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("entropy_gradient", [False, True])
def test_only_one_of_the_inputs_is_trained(
    trained: str, options: dict[str, float], entropy_gradient: bool
) -> None:
    given = inputs()
    for name in {"hidden", "weight", "bias"} - {trained}:
        given[name].requires_grad_(False)
    chunks = ChunkSizes(tokens=3, vocab=4)
    options = {**options, "with_entropy": entropy_gradient, "entropy_gradient": entropy_gradient}
    actual = gradients(linear_log_probs(**given, **options, chunks=chunks), [given[trained]])
    plain = {key: value for key, value in options.items() if "entropy" not in key}
    log_probs, entropy = naive(**given, **plain)
    expected = gradients((log_probs, entropy if entropy_gradient else None), [given[trained]])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("tokens", "vocab"), [(7, 11), (3, 4)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradcheck(tokens: int, vocab: int, softcap: float | None) -> None:
    given = inputs()

    def scores(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return linear_log_probs(
            hidden,
            weight,
            given["targets"],
            bias=bias,
            temperature=0.8,
            softcap=softcap,
            with_entropy=True,
            entropy_gradient=True,
            chunks=ChunkSizes(tokens=tokens, vocab=vocab),
        )

    assert torch.autograd.gradcheck(scores, (given["hidden"], given["weight"], given["bias"]))


def test_the_entropy_alone_can_be_differentiated() -> None:
    given = inputs()
    chunks = ChunkSizes(tokens=3, vocab=4)
    scores = linear_log_probs(**given, with_entropy=True, entropy_gradient=True, chunks=chunks)
    leaves = [given["hidden"], given["weight"], given["bias"]]
    actual = torch.autograd.grad(scores.entropy.sum(), leaves)
    torch.testing.assert_close(actual, torch.autograd.grad(naive(**given)[1].sum(), leaves))


def test_a_second_backward_pass_gives_the_same() -> None:
    given = inputs()
    total = linear_log_probs(**given, chunks=ChunkSizes(tokens=3, vocab=4)).log_probs.sum()
    leaves = [given["hidden"], given["weight"], given["bias"]]
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(total, leaves), first, rtol=0, atol=0)


def test_double_backward_is_refused() -> None:
    given = inputs()
    total = linear_log_probs(**given, chunks=ChunkSizes(tokens=3, vocab=4)).log_probs.square().sum()
    (gradient,) = torch.autograd.grad(total, given["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_extreme_logits_neither_overflow_nor_vanish() -> None:
    hidden = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    weight = torch.tensor([[-900.0], [900.0], [899.0]])
    targets = torch.tensor([2, 1])
    scores = linear_log_probs(
        hidden, weight, targets, with_entropy=True, chunks=ChunkSizes(tokens=1, vocab=1)
    )
    expected = naive(hidden, weight, None, targets)
    torch.testing.assert_close(scores.log_probs.double(), expected[0])
    torch.testing.assert_close(scores.entropy.double(), expected[1], atol=1e-3, rtol=0)
    scores.log_probs.sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("frozen", [False, True])
def test_half_precision_is_accumulated_in_float32(frozen: bool) -> None:
    hidden = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(500, 32, dtype=torch.bfloat16, requires_grad=not frozen)
    targets = torch.randint(500, (64,))
    leaves = [hidden] if frozen else [hidden, weight]
    scores = linear_log_probs(hidden, weight, targets, chunks=ChunkSizes(tokens=5, vocab=64))
    assert scores.log_probs.dtype == torch.float32
    expected = naive(hidden, weight, None, targets)[0]
    torch.testing.assert_close(scores.log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.randn(64)
    actual = torch.autograd.grad((scores.log_probs * weights).sum(), leaves)
    for mine, theirs in zip(actual, torch.autograd.grad((expected * weights).sum(), leaves), strict=True):
        assert mine.dtype == torch.bfloat16
        # Both are rounded to bfloat16 once, at the very end.
        torch.testing.assert_close(mine, theirs, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("chunks", [None, ChunkSizes(tokens=3, vocab=4)])
def test_autocast_does_not_narrow_the_products(chunks: ChunkSizes | None) -> None:
    given = inputs(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        log_probs = linear_log_probs(**given, chunks=chunks).log_probs
    log_probs.sum().backward()
    expected = naive(**given)[0]
    torch.testing.assert_close(log_probs.double(), expected, rtol=1e-5, atol=1e-5)
    (exact,) = torch.autograd.grad(expected.sum(), given["weight"])
    torch.testing.assert_close(given["weight"].grad, exact, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that an operation writes, but for gradients of the weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight, self.elements, self.products = weight, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.shape != self.weight.shape:
                self.elements = max(self.elements, tensor.numel())
        self.products += "mm" in func.overloadpacket.__name__
        return result


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_tensor_is_larger_than_a_block(with_entropy: bool) -> None:
    hidden = torch.randn(200, 4, requires_grad=True)
    weight = torch.randn(3000, 4, requires_grad=True)
    limit = 65_536  # of 600,000 logits
    chunks = choose_chunks(200, 3000, hidden.device, limit)
    with Largest(weight) as seen:
        scores = linear_log_probs(
            hidden, weight, torch.randint(3000, (200,)), with_entropy=with_entropy, chunks=chunks
        )
        scores.log_probs.sum().backward()
    assert limit // 8 < seen.elements <= limit // 4


def test_a_frozen_weight_makes_the_backward_pass_free_of_products() -> None:
    hidden = torch.randn(200, 4, requires_grad=True)
    weight = torch.randn(3000, 4)
    log_probs = linear_log_probs(
        hidden, weight, torch.randint(3000, (200,)), chunks=ChunkSizes(tokens=50, vocab=100)
    ).log_probs
    with Largest(weight) as seen:
        log_probs.sum().backward()
    assert hidden.grad is not None
    assert seen.products == 0
    assert seen.elements == hidden.numel()


def test_no_tokens_give_no_log_probs_and_zero_gradients() -> None:
    given = {**inputs(), "hidden": torch.empty(0, SIZE, requires_grad=True), "targets": torch.empty(0).long()}
    given["weight"], given["bias"] = given["weight"].detach().float().requires_grad_(), None
    scores = linear_log_probs(**given, with_entropy=True)
    assert scores.log_probs.shape == scores.entropy.shape == (0,)
    scores.log_probs.sum().backward()
    assert not given["weight"].grad.any()


@pytest.mark.parametrize(
    ("tokens", "vocab", "limit", "whole"),
    [(5000, 360, 2**25, True), (1024, 151_665, 2**25, False), (10, 100, 30, False), (0, 50, 10, True)],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_chosen_blocks_respect_the_bound(
    tokens: int, vocab: int, limit: int, whole: bool, device: str
) -> None:
    chunks = choose_chunks(tokens, vocab, torch.device(device), limit)
    assert (chunks.tokens >= tokens and chunks.vocab >= vocab) is whole
    assert chunks.tokens <= max(tokens, 1)
    assert chunks.vocab <= vocab
    assert min(tokens, chunks.tokens) * chunks.vocab <= limit // 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive and finite, not 0.0"),
        ({"softcap": -1.0}, "softcap"),
        ({"logit_scale": float("inf")}, "logit_scale"),
        ({"entropy_gradient": True}, "entropy_gradient needs with_entropy"),
        ({"targets": torch.zeros(3).long()}, r"hidden \[tokens, size\].*\(3,\)"),
        ({"bias": torch.zeros(2)}, r"bias \[vocab\]"),
    ],
)
def test_invalid_arguments_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        linear_log_probs(**{**inputs(), **change})


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_a_token_of_another_vocabulary_is_refused(token: int) -> None:
    given = inputs()
    given["targets"][2] = token
    with pytest.raises(TokenContractError, match=f"token id {token} is outside the model's vocabulary of 11"):
        linear_log_probs(**given)


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"ChunkSizes.vocab must be at least 1, not 0"):
        ChunkSizes(tokens=1, vocab=0)
    with pytest.raises(ConfigurationError, match="max_logits must be at least 1"):
        choose_chunks(1, 1, torch.device("cpu"), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_in_place_is_the_one_that_autograd_adds_up(dtype: torch.dtype) -> None:
    """Over two backward passes, beside another use of the weight, and with a hook, which has to see it."""
    generator = torch.Generator().manual_seed(0)
    hidden, start = (torch.randn(size, 8, generator=generator).to(dtype) for size in (7, 20))
    targets = torch.randint(20, (7,), generator=generator)
    chunks = ChunkSizes(tokens=3, vocab=6)
    seen: list[Tensor] = []

    def gradient(*, in_place: bool, hook: bool = False) -> Tensor:
        weight = torch.nn.Parameter(start.clone())
        if hook:
            weight.register_hook(seen.append)
        for scale in (1.0, 0.5):
            scores = linear_log_probs(hidden, weight, targets, chunks=chunks, in_place=in_place)
            embedded = torch.nn.functional.embedding(targets, weight, sparse=in_place)
            (scale * scores.log_probs.sum() + embedded.float().square().sum()).backward()
        assert weight.grad is not None
        assert weight.grad.layout == torch.strided
        return weight.grad

    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    expected = gradient(in_place=False)
    assert (gradient(in_place=True) - expected).norm() <= tolerance * expected.norm()
    hooked = gradient(in_place=True, hook=True)
    assert (hooked - expected).norm() <= tolerance * expected.norm()
    assert len(seen) == 2
