"""Reference policies: what they score while the policy moves on, and after a save and a load."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.models import add_lora, trained_parameters
from gym_sdk.grpo.optim import enable_gradient_checkpointing
from gym_sdk.grpo.reference import (
    AdapterReference,
    CopyReference,
    EMAReference,
    ReferencePolicy,
    make_reference,
)

Models = Callable[..., PreTrainedModel]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.tensor([[1, 2, 3, 4, 5]])


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def scored(reference: ReferencePolicy) -> Tensor:
    with reference.scoring() as model:
        result = model(input_ids=IDS).logits
    assert not result.requires_grad
    return result


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def build(make_model: Models, adapted: bool) -> Any:
    """Return a policy; an adapter has been trained already."""
    if not adapted:
        return make_model()
    model = add_lora(make_model(), rank=4)
    move(model, 100)
    return model


@pytest.mark.parametrize("adapted", [False, True])
def test_a_copy_stays_where_training_began(make_model: Models, adapted: bool) -> None:
    model = build(make_model, adapted)
    expected = logits(model)
    reference = make_reference(model, "initial")
    assert isinstance(reference, CopyReference)
    for update in range(3):
        move(model, update)
        reference.after_update(model)
    assert torch.equal(scored(reference), expected)
    assert not torch.equal(logits(model), expected)
    reference.refresh(model)
    assert torch.equal(scored(reference), logits(model))


@pytest.mark.parametrize("adapted", [False, True])
def test_a_copy_is_refreshed_in_time(make_model: Models, adapted: bool) -> None:
    model = build(make_model, adapted)
    reference = make_reference(model, "initial", refresh_every=2)
    seen = [logits(model)]
    for update in range(5):
        move(model, update)
        reference.after_update(model)
        seen.append(logits(model))
        assert torch.equal(scored(reference), seen[(update + 1) // 2 * 2])


def test_with_an_adapter_only_that_is_copied(make_model: Models) -> None:
    model = build(make_model, True)
    own = {parameter.data_ptr() for parameter in model.parameters() if not parameter.requires_grad}
    for reference in (CopyReference(model), EMAReference(model), AdapterReference(model)):
        with reference.scoring() as twin:
            names = {name for name, p in twin.named_parameters() if p.data_ptr() not in own}
        assert names == set(trained_parameters(model))


@pytest.mark.parametrize("modules_to_save", [None, ["norm"]])
def test_without_its_adapter_a_model_is_its_base(
    make_model: Models, modules_to_save: list[str] | None
) -> None:
    expected = logits(make_model())
    config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=modules_to_save)
    model = get_peft_model(make_model(), config)
    trained = set(trained_parameters(model))
    reference = make_reference(model, "base")
    for update in range(2):
        move(model, update)
        reference.after_update(model)
    current = logits(model)
    with reference.scoring() as twin:
        assert torch.equal(twin(input_ids=IDS).logits, expected)
        assert torch.equal(logits(model), current)  # the policy is as usable meanwhile
    assert set(trained_parameters(model)) == trained


@pytest.mark.parametrize("adapted", [False, True])
def test_an_average_follows_its_formula(make_model: Models, adapted: bool) -> None:
    model = build(make_model, adapted)
    reference = make_reference(model, "ema", decay=0.75, update_every=2)
    assert isinstance(reference, EMAReference)
    expected = {name: p.detach().double() for name, p in trained_parameters(model).items()}
    for update in range(1, 6):
        move(model, update)
        reference.after_update(model)
        if update % 2 == 0:
            for name, parameter in trained_parameters(model).items():
                expected[name] = 0.75 * expected[name] + 0.25 * parameter.detach().double()
    averaged = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in trained_parameters(averaged).items():
            parameter.copy_(expected[name])
    torch.testing.assert_close(scored(reference), logits(averaged), rtol=1e-4, atol=1e-5)


def test_an_average_of_bfloat16_weights_is_kept_in_float32(make_model: Models) -> None:
    model = make_model().to(torch.bfloat16)
    norm = model.model.norm.weight
    reference = EMAReference(model, decay=0.999)
    with torch.no_grad():
        norm.fill_(2.0)
    for _ in range(10):  # each moves the average by about 0.001, less than a bfloat16 next to 1 can show
        reference.after_update(model)
    average = reference.state_dict()["weights"]["model.norm.weight"]
    torch.testing.assert_close(average, torch.full_like(average, 2.0 - 0.999**10))
    with reference.scoring() as averaged:
        assert torch.equal(averaged.model.norm.weight, average.to(torch.bfloat16))
        assert averaged.model.norm.weight[0] > 1.0


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"kind": "initial", "refresh_every": 3}, {"kind": "ema", "decay": 0.5}])
def test_a_loaded_state_goes_on_as_if_nothing_had_happened(
    make_model: Models, options: dict[str, Any], dtype: torch.dtype, adapted: bool, tmp_path: Path
) -> None:
    model = build(make_model, adapted).to(dtype)
    reference = make_reference(model, **options)
    for update in range(2):
        move(model, update)
        reference.after_update(model)
    torch.save(reference.state_dict(), tmp_path / "state.pt")
    resumed = make_reference(model, **options)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for update in range(2, 5):
        assert torch.equal(scored(resumed), scored(reference))
        move(model, update)
        reference.after_update(model)
        resumed.after_update(model)
    assert torch.equal(scored(resumed), scored(reference))
    assert not torch.equal(scored(resumed), logits(model))


def test_a_reference_does_not_disturb_a_backward_pass(make_model: Models) -> None:
    for kind in ("initial", "base", "ema"):
        model = build(make_model, True)
        reference = make_reference(model, kind)
        enable_gradient_checkpointing(model)
        trained = trained_parameters(model)
        expected = torch.autograd.grad(model(input_ids=IDS).logits.sum(), list(trained.values()))
        loss = model(input_ids=IDS).logits.sum()
        with reference.scoring() as twin:
            twin(input_ids=IDS)
            found = torch.autograd.grad(loss, list(trained.values()))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_average_can_be_saved(make_model: Models, tmp_path: Path) -> None:
    full, adapted = EMAReference(make_model("llama")), EMAReference(build(make_model, True))
    full.model.save_pretrained(tmp_path / "full")
    adapted.model.save_pretrained(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.equal(logits(loaded), scored(full))
    assert torch.equal(
        logits(PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()), scored(adapted)
    )


def test_a_state_that_does_not_fit_is_refused(make_model: Models) -> None:
    model = build(make_model, True)
    copied, average = make_reference(model, "initial"), make_reference(model, "ema")
    with pytest.raises(ConfigurationError, match="kind 'ema', and this one is 'copy'"):
        copied.load_state_dict(average.state_dict())
    with pytest.raises(ConfigurationError, match="kind 'copy', and this one is 'adapter'"):
        make_reference(model, "base").load_state_dict(copied.state_dict())
    other = EMAReference(add_lora(make_model(), rank=2))
    with pytest.raises(ConfigurationError, match=r"of another model: .*lora_A"):
        average.load_state_dict(other.state_dict())


def test_bad_settings_are_refused(make_model: Models) -> None:
    model, adapted = make_model(), build(make_model, True)
    with pytest.raises(ConfigurationError, match="decay must be in"):
        EMAReference(model, decay=1.0)
    with pytest.raises(ConfigurationError, match="update_every must be at least 1"):
        EMAReference(model, update_every=0)
    with pytest.raises(ConfigurationError, match="refresh_every must be at least 1"):
        CopyReference(model, refresh_every=0)
    with pytest.raises(ConfigurationError, match="'initial', not 'ema'"):
        make_reference(model, "ema", refresh_every=2)
    with pytest.raises(ConfigurationError, match="not 'best'"):
        make_reference(model, "best")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="use CopyReference"):
        AdapterReference(model)
    adapted.merge_adapter()
    with pytest.raises(ConfigurationError, match="unmerge_adapter"):
        AdapterReference(adapted)
    adapted.unmerge_adapter()
    adapted.get_base_model().model.norm.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"norm\.weight is trained and belongs to no adapter"):
        AdapterReference(adapted)
