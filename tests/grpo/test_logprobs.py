"""Log-probs in chunks against the full log-softmax of the model's own logits."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel, Qwen3Config, Qwen3Model

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo import policy_loss, to_tensors, token_log_probs
from gym_sdk.grpo.logprobs import check_model, evaluating
from gym_sdk.tokens import TokenSequence

Models = Callable[..., PreTrainedModel]
Rows = Callable[..., list[TokenSequence]]


def plain(
    model: PreTrainedModel, rows: list[TokenSequence], temperature: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Each row alone, without padding, from the full logits."""
    log_probs, entropies = [], []
    for row in rows:
        ids = torch.tensor(row.token_ids)
        table = (model(input_ids=ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        mask = torch.tensor(row.loss_mask, dtype=torch.bool)[1:]
        log_probs.append(table.gather(1, ids[1:, None])[:, 0] * mask)
        entropies.append(-(table.exp() * table).sum(-1) * mask)
    return log_probs, entropies


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("max_logits", [2**25, 100, 1])
def test_equal_to_the_full_log_softmax(
    make_model: Models, make_rows: Rows, architecture: str, temperature: float, max_logits: int
) -> None:
    model = make_model(architecture)
    rows = make_rows(model, 7)
    scores = token_log_probs(
        model, to_tensors(rows), temperature=temperature, with_entropy=True, max_logits=max_logits
    )
    expected, entropies = plain(model, rows, temperature)
    assert scores.entropy is not None
    assert not scores.entropy.requires_grad
    for index, row in enumerate(rows):
        size = len(row)
        torch.testing.assert_close(scores.log_probs[index, 1:size], expected[index], rtol=0, atol=2e-6)
        torch.testing.assert_close(scores.entropy[index, 1:size], entropies[index], rtol=0, atol=5e-6)
        assert not scores.log_probs[index, size:].any()
        assert not scores.log_probs[index, 0].any()


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
@pytest.mark.parametrize("max_logits", [2**25, 100, 1])
def test_gradients_equal_those_of_the_full_log_softmax(
    make_model: Models, make_rows: Rows, architecture: str, max_logits: int
) -> None:
    model = make_model(architecture)
    rows = make_rows(model, 7)

    def gradients(log_probs: list[Tensor]) -> list[Tensor]:
        loss = torch.cat([(values / (index + 1)).cos() for index, values in enumerate(log_probs)]).sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    actual = token_log_probs(model, to_tensors(rows), temperature=0.9, max_logits=max_logits).log_probs
    trimmed = [values[1 : len(row)] for values, row in zip(actual, rows, strict=True)]
    for ours, naive in zip(gradients(trimmed), gradients(plain(model, rows, 0.9)[0]), strict=True):
        assert (ours - naive).norm() <= 1e-5 * naive.norm()


def test_gradcheck_of_log_probs_and_loss_through_chunks_in_float64(
    make_model: Models, make_rows: Rows
) -> None:
    model = make_model("llama").double()
    batch = to_tensors(make_rows(model, 2, noise=0.05))
    weight = model.get_output_embeddings().weight

    def loss(_weight: Tensor) -> Tensor:  # gradcheck moves the weight in place, where the model sees it
        log_probs = token_log_probs(model, batch, max_logits=3 * model.config.vocab_size).log_probs
        return policy_loss(
            log_probs,
            batch.behaviour_log_probs.double(),
            batch.advantages.double(),
            batch.loss_mask,
            normaliser=5,
        ).loss

    assert torch.autograd.gradcheck(loss, (weight,), atol=1e-7)


def test_no_more_logits_than_a_chunk_exist(make_model: Models, make_rows: Rows) -> None:
    model = make_model(vocab=2048)
    rows = make_rows(model, 12)
    limit, seen, saved = 5 * 2048, [], []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.numel())
    )

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() != model.get_output_embeddings().weight.data_ptr():
            saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        scores = token_log_probs(model, to_tensors(rows), with_entropy=True, max_logits=limit)
    kept = max(saved)
    scores.log_probs.sum().backward()
    hook.remove()
    tokens = sum(row.trained_tokens for row in rows)
    assert tokens > 40
    assert max(seen) <= limit
    assert sum(seen) == 2 * tokens * 2048  # once forward, once again in the backward pass
    assert kept < limit


def test_prompt_positions_never_reach_the_vocabulary(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    rows, seen = make_rows(model, 5), []
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _module, _inputs, output: seen.append(output.shape[0])
    )
    with torch.no_grad():
        token_log_probs(model, to_tensors(rows))
    hook.remove()
    assert seen == [sum(row.trained_tokens for row in rows)]


def test_half_precision_logits_are_normalised_in_float32(make_model: Models, make_rows: Rows) -> None:
    model = make_model().bfloat16()
    scores = token_log_probs(model, to_tensors(make_rows(model, 3)))
    assert scores.log_probs.dtype == torch.float32


def test_a_model_with_transformed_logits_is_refused() -> None:
    config = Gemma2Config(
        vocab_size=16,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=16,
        final_logit_softcapping=0.5,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(0.0, 2.0)
    with pytest.raises(ConfigurationError, match="soft cap"):
        check_model(model)


def test_a_model_without_a_vocabulary_projection_is_refused() -> None:
    config = Qwen3Config(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=8,
    )
    with pytest.raises(ConfigurationError, match="not a causal LM"):
        check_model(Qwen3Model(config))


def test_evaluating_puts_the_mode_back(make_model: Models) -> None:
    model = make_model().train()
    with evaluating(model):
        assert not model.training
    assert model.training
