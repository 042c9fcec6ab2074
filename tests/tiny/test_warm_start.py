import math
from random import Random

import pytest
import torch

from backends.tiny import ModelSizes, TinyRecipe
from backends.tiny.examples import ExampleEncoder, make_batches
from backends.tiny.model import build_model
from backends.tiny.muon import Muon
from backends.tiny.tokenizer import build_tokenizer
from backends.tiny.warm_start import warm_start

SMALL = TinyRecipe(
    sizes=ModelSizes(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
    ),
    copy_steps=4,
    trace_steps=24,
    batch_size=8,
)
TOKENIZER = build_tokenizer(256)


def train(recipe: TinyRecipe) -> tuple[dict[str, torch.Tensor], list[tuple[str, float]]]:
    model = build_model(recipe, TOKENIZER)
    calls: list[tuple[str, float]] = []
    warm_start(model, TOKENIZER, recipe, lambda stage, fraction: calls.append((stage, fraction)))
    assert not model.training
    return model.state_dict(), calls


def test_the_same_recipe_gives_the_same_weights() -> None:
    first, _ = train(SMALL)
    torch.manual_seed(99)  # whatever the global state
    second, _ = train(SMALL)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_global_random_state_and_gradient_mode_stay() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    with torch.no_grad():
        train(SMALL)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_names_the_stages_and_reaches_the_end() -> None:
    _, calls = train(SMALL)
    assert [stage for stage, _ in calls] == ["drill"] * 4 + ["traces"] * 24
    fractions = [fraction for _, fraction in calls]
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_it_learns() -> None:
    untrained = build_model(SMALL, TOKENIZER)
    trained = build_model(SMALL, TOKENIZER)
    warm_start(trained, TOKENIZER, SMALL, lambda stage, fraction: None)
    rng = Random(77)
    mix = SMALL.mix
    encoder = ExampleEncoder(TOKENIZER, mix.tool)
    (batch,) = make_batches(rng, lambda: encoder.drill(mix.drill(rng)), 32, 1, 0)

    def loss(model: torch.nn.Module) -> float:
        with torch.no_grad():
            logits = model(input_ids=batch.token_ids).logits[:, :-1]
        targets = batch.token_ids[:, 1:].masked_fill(~batch.loss_mask[:, 1:], -100)
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))

    assert loss(untrained) == pytest.approx(math.log(len(TOKENIZER)), abs=1.5)
    assert loss(trained) < loss(untrained) - 1.0


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (16, 16)])
def test_a_muon_update_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for _ in range(3)]
    for parameter in parameters:
        parameter.grad = torch.randn(shape, generator=generator)
    Muon(parameters).step(1.0)
    for parameter in parameters:
        assert parameter.grad is None
        singular = torch.linalg.svdvals(parameter.detach() / max(1.0, shape[0] / shape[1]) ** 0.5)
        assert float(singular.min()) > 0.3
        assert float(singular.max()) < 1.3


def test_muon_refuses_a_matrix_without_gradient() -> None:
    with pytest.raises(RuntimeError, match="no gradient"):
        Muon([torch.nn.Parameter(torch.zeros(2, 2))]).step(1.0)
