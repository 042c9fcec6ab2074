"""Checkpoints of peft models: the adapter alone, tied to its base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.checkpointed import state_at, tiny_model, tiny_optimizer, update
from transformers import PreTrainedModel

from gym_sdk.errors import CheckpointError, ConfigurationError
from gym_sdk.grpo.checkpoints import read_checkpoint, write_checkpoint

# peft asks transformers under a name that is to go
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def adapted(base: PreTrainedModel | None = None, *, seed: int = 0, **settings: Any) -> PeftModel:
    """A tiny model with an adapter that is not nothing; only the adapter depends on the seed."""
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | settings
    base = base or tiny_model()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    assert isinstance(model, PeftModel)
    return model.eval()


def save(path: Path, model: PeftModel) -> None:
    optimizer = tiny_optimizer(model)
    for _ in range(2):
        update(model, optimizer)
    write_checkpoint(path, model, state_at(2), optimizer=optimizer)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=torch.tensor([[1, 2, 3]])).logits
    return found


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_the_next_update_is_the_same(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    optimizer = tiny_optimizer(model)
    update(model, optimizer)
    write_checkpoint(tmp_path / "c", model, state_at(1), optimizer=optimizer)
    update(model, optimizer)

    other = adapted(seed=9, **settings)
    other_optimizer = tiny_optimizer(other)
    read_checkpoint(tmp_path / "c", other, other_optimizer).apply(other, other_optimizer)
    update(other, other_optimizer)
    for (name, left), right in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(left, right), name


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}])
def test_peft_loads_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    save(tmp_path / "c", model)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "c"))
    assert torch.equal(logits(loaded), logits(model))
    assert not torch.equal(logits(loaded), logits(tiny_model()))


def test_the_base_model_is_not_copied(tmp_path: Path) -> None:
    save(tmp_path / "c", adapted())
    assert {path.name for path in (tmp_path / "c").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "trainer",
    }
    names = load_file(tmp_path / "c" / "adapter_model.safetensors")
    assert len(names) == 4
    assert all("lora_" in name for name in names)


def test_the_same_base_in_a_wider_type_fits(tmp_path: Path) -> None:
    save(tmp_path / "c", adapted(tiny_model().bfloat16()))
    model = adapted(tiny_model().bfloat16().float(), seed=1)
    read_checkpoint(tmp_path / "c", model, tiny_optimizer(model))


def refuse(path: Path, model: Any, message: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path, model, tiny_optimizer(model))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_another_base_model_or_adapter_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save(path, adapted())
    other = tiny_model()
    with torch.no_grad():
        other.model.norm.weight.add_(1e-6)
    refuse(path, adapted(other), r"belongs to another base model: .*norm\.weight differs\. Load the one")
    refuse(path, adapted(tiny_model(vocab=20)), "vocab_size is 16 in the checkpoint and 20")
    refuse(path, adapted(r=4), "of another adapter: r is 2 in the checkpoint and 4 in the model")
    refuse(path, adapted(lora_alpha=3), "of another adapter: lora_alpha is 8 in the checkpoint and 3")
    modules = ["k_proj", "q_proj"]
    refuse(path, adapted(target_modules=modules), r"target_modules is \['q_proj', 'v_proj'\] in the check")


def test_adapter_and_full_model_are_not_mixed_up(tmp_path: Path) -> None:
    save(tmp_path / "adapter", adapted())
    refuse(tmp_path / "adapter", tiny_model(), "holds an adapter, and the model to be trained has none. Make")
    model = tiny_model()
    write_checkpoint(tmp_path / "full", model, state_at(0), optimizer=tiny_optimizer(model))
    refuse(tmp_path / "full", adapted(), "holds a whole model, and the model to be trained is an adapter")


def test_what_the_adapters_file_would_not_hold_is_refused(tmp_path: Path) -> None:
    model = adapted()
    model.get_base_model().lm_head.weight.requires_grad_(True)
    with pytest.raises(ConfigurationError, match=r"lm_head\.weight is trained and not part of the adapter"):
        save(tmp_path / "c", model)
    assert list(tmp_path.iterdir()) == []


def test_one_adapter_must_be_active(tmp_path: Path) -> None:
    model = adapted()
    model.add_adapter("second", LoraConfig(r=1, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigurationError, match="holds one adapter, and 2 are active"):
        save(tmp_path / "c", model)
    model.set_adapter("second")
    save(tmp_path / "c", model)
    assert len(load_file(tmp_path / "c" / "adapter_model.safetensors")) == 2


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "trainer/base.json"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    save(tmp_path / "c", adapted())
    content = bytearray((tmp_path / "c" / file).read_bytes())
    content[len(content) // 2] ^= 0x10
    (tmp_path / "c" / file).write_bytes(content)
    refuse(tmp_path / "c", adapted(), f"{file} is damaged: its SHA-256")
    (tmp_path / "c" / file).unlink()
    refuse(tmp_path / "c", adapted(), f"{file} is missing")
