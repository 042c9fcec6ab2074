"""Log-probs of batches, padded and packed, against the model's own full logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
)

from gym_sdk.errors import ConfigurationError, TokenContractError
from gym_sdk.grpo.packing import PackedBatch, TokenBatch, pack_rows, to_tensors
from gym_sdk.grpo.scoring import (
    apply_fused_kernels,
    check_model,
    evaluating,
    linear_log_probs,
    split_model,
    token_log_probs,
)
from gym_sdk.tokens import TokenSequence

Models = Callable[..., PreTrainedModel]
Rows = Callable[..., list[TokenSequence]]
ToBatch = Callable[[list[TokenSequence]], TokenBatch | PackedBatch]

# peft 0.21 reads an attribute that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "gemma2": Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=1.5, attn_implementation="eager"),
    "cohere": CohereConfig(**SIZES, logit_scale=0.25),
    "granite": GraniteConfig(**SIZES, logits_scaling=3.0),
    "phi": PhiConfig(**SIZES),
}


def from_config(config: PretrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)
    return model


def adapt(model: nn.Module, **options: object) -> nn.Module:
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], **options)
    adapted = get_peft_model(model, config)
    with torch.no_grad():  # LoRA starts at zero, where its other half has no gradient
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    return adapted.eval()


def plain(
    model: nn.Module, rows: list[TokenSequence], temperature: float
) -> tuple[list[Tensor], list[Tensor]]:
    """Each row alone, without padding, from the full logits."""
    log_probs, entropies = [], []
    for row in rows:
        ids = torch.tensor(row.token_ids)
        table = (model(input_ids=ids[None]).logits[0, :-1] / temperature).log_softmax(-1)
        mask = torch.tensor(row.loss_mask, dtype=torch.bool)[1:]
        log_probs.append(table.gather(1, ids[1:, None])[mask, 0])
        entropies.append(-(table.exp() * table).sum(-1)[mask])
    return log_probs, entropies


def check_against_plain(
    model: nn.Module, rows: list[TokenSequence], to_batch: ToBatch, max_logits: int, atol: float = 1e-10
) -> None:
    """Values of log-probs and entropies, and the gradient of every trained parameter through both."""
    model.double()
    batch = to_batch(rows)
    scores = token_log_probs(
        model, batch, temperature=0.8, with_entropy=True, entropy_gradient=True, max_logits=max_logits
    )
    assert scores.entropy is not None
    assert not scores.log_probs[~batch.loss_mask].any()
    assert not scores.entropy[~batch.loss_mask].any()
    actual = scores.log_probs[batch.loss_mask], scores.entropy[batch.loss_mask]
    expected = tuple(torch.cat(parts) for parts in plain(model, rows, 0.8))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1.0, 1.0, len(actual[0]), dtype=torch.float64)
    gradients = [
        torch.autograd.grad(((log_probs + 0.3 * entropy) * weights).sum(), parameters)
        for log_probs, entropy in (actual, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=atol)


@pytest.fixture(params=[to_tensors, pack_rows], ids=["padded", "packed"])
def to_batch(request: pytest.FixtureRequest) -> Iterator[ToBatch]:
    return request.param


@pytest.mark.parametrize("architecture", ["qwen3", "llama"])  # tied and untied
@pytest.mark.parametrize("max_logits", [2**25, 100, 1])
def test_equal_to_the_full_log_softmax(
    make_model: Models, make_rows: Rows, to_batch: ToBatch, architecture: str, max_logits: int
) -> None:
    model = make_model(architecture)
    check_model(model)
    check_against_plain(model, make_rows(model, 5), to_batch, max_logits)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_logits", [2**25, 50])
def test_heads_with_bias_scale_or_soft_cap(make_rows: Rows, name: str, max_logits: int) -> None:
    model = from_config(CONFIGS[name])
    check_model(model)
    # The norms of Gemma and Cohere compute in float32 whatever the model's precision.
    check_against_plain(model, make_rows(model, 3), to_tensors, max_logits, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"modules_to_save": ["lm_head"]}, {"lora_dropout": 0.5}],
    ids=["frozen head", "saved head", "dropout"],
)
@pytest.mark.parametrize("max_logits", [2**25, 50])
def test_adapters_on_the_layers(
    make_model: Models, make_rows: Rows, to_batch: ToBatch, options: dict[str, object], max_logits: int
) -> None:
    model = adapt(make_model("llama"), **options)
    check_model(model)
    check_against_plain(model, make_rows(model.get_base_model(), 4), to_batch, max_logits)


@pytest.mark.parametrize("max_logits", [2**25, 50])
def test_an_adapter_on_the_head(make_rows: Rows, max_logits: int) -> None:
    base = from_config(CONFIGS["granite"])
    rows = make_rows(base, 4)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["lm_head", "q_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    assert type(split_model(model)[1].projection) is not nn.Linear
    check_model(model)
    check_against_plain(model, rows, to_tensors, max_logits)


def test_disabled_adapters_give_the_base_model(make_model: Models, make_rows: Rows) -> None:
    base = make_model("llama")
    rows = make_rows(base, 3)
    with torch.no_grad():
        expected = token_log_probs(base, to_tensors(rows)).log_probs
        model = adapt(base)
        assert not torch.allclose(token_log_probs(model, to_tensors(rows)).log_probs, expected)
        with model.disable_adapter():
            torch.testing.assert_close(token_log_probs(model, to_tensors(rows)).log_probs, expected)


def test_only_positions_before_trained_tokens_reach_the_projection(
    make_model: Models, make_rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    rows, seen = make_rows(model, 5), []

    def record(hidden: Tensor, *args: object, **options: object) -> object:
        seen.append(hidden.shape[0])
        return linear_log_probs(hidden, *args, **options)

    monkeypatch.setattr("gym_sdk.grpo.scoring.head.linear_log_probs", record)
    with torch.no_grad():
        token_log_probs(model, to_tensors(rows))
    assert seen == [sum(row.trained_tokens for row in rows)]


def test_a_batch_without_trained_tokens_scores_nothing(make_model: Models, to_batch: ToBatch) -> None:
    rows = [TokenSequence([1, 2, 3], [0, 0, 0], [0.0] * 3, advantage=1.0, rollout_id="r")]
    model = make_model()
    scores = token_log_probs(model, to_batch(rows), with_entropy=True)
    assert not scores.log_probs.any()
    scores.log_probs.sum().backward()
    assert not model.get_output_embeddings().weight.grad.any()


def test_autocast_and_half_precision_give_float32(make_model: Models, make_rows: Rows) -> None:
    model = make_model()
    batch = to_tensors(make_rows(model, 3))
    exact = token_log_probs(model, batch).log_probs
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = token_log_probs(model, batch).log_probs
    half = token_log_probs(model.bfloat16(), batch).log_probs
    for scores in (mixed, half):
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores, exact, rtol=0, atol=0.1)


def test_a_token_of_another_vocabulary_is_refused(make_model: Models) -> None:
    hidden, (_, head) = torch.zeros(2, 32), split_model(make_model())
    with pytest.raises(TokenContractError, match="outside the model's vocabulary of 16"):
        head.score(hidden, torch.tensor([3, 16]))


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_a_transformation_that_the_config_hides_is_refused(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = from_config(CONFIGS[name])
    with torch.no_grad():  # flat logits: a soft cap would hardly show in them
        for parameter in model.parameters():
            parameter.mul_(0.01)
    monkeypatch.setattr("gym_sdk.grpo.scoring.check.split_model", lambda model: _without_transform(model))
    with pytest.raises(ConfigurationError, match="does not support that architecture"):
        check_model(model)


def _without_transform(model: nn.Module) -> object:
    backbone, head = split_model(model)
    return backbone, type(head)(projection=head.projection, vocab_size=head.vocab_size)


def test_a_model_that_changes_hidden_states_before_its_head_is_refused(make_model: Models) -> None:
    model = make_model()
    model.get_output_embeddings().register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 1.5,))
    with pytest.raises(ConfigurationError, match="does not support that architecture"):
        check_model(model)


def test_a_model_without_a_vocabulary_projection_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a causal LM"):
        check_model(Qwen3Model(Qwen3Config(**SIZES, head_dim=8)))


def test_check_model_accepts_half_precision(make_model: Models) -> None:
    check_model(make_model().bfloat16())


def test_evaluating_puts_the_mode_back(make_model: Models) -> None:
    model = make_model().train()
    with evaluating(model):
        assert not model.training
    assert model.training


def test_fused_kernels_need_liger(make_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_sdk.grpo.scoring.kernels.find_spec", lambda _name: None)
    with pytest.raises(ConfigurationError, match="install it"):
        apply_fused_kernels(make_model())


def test_fused_kernels_need_a_cuda_device(make_model: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gym_sdk.grpo.scoring.kernels.find_spec", lambda name: name)
    with pytest.raises(ConfigurationError, match="the model is on cpu"):
        apply_fused_kernels(make_model())
