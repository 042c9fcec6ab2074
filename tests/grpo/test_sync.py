"""Weights on their way to the engine: real folders, loaded again by transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from gym_sdk.errors import ConfigurationError, TransportError
from gym_sdk.grpo import FolderSync, LoRASync, TensorSync
from gym_sdk.grpo.checkpoints.folders import new_folder, previous_of
from gym_sdk.schema.weights import AdapterWeights
from gym_sdk.transport import AnyWeights

Models = Callable[..., PreTrainedModel]


class Target:
    """Loads what it is sent at once, as an engine does."""

    def __init__(self) -> None:
        self.versions: list[str] = []
        self.sources: list[AnyWeights] = []
        self.logits: list[Tensor] = []
        self.fail = False

    async def update_weights(self, source: AnyWeights, *, version: str) -> None:
        if self.fail:
            raise TransportError("the server is gone", retryable=True)
        self.versions.append(version)
        self.sources.append(source)
        if isinstance(source, str | Path):
            model = AutoModelForCausalLM.from_pretrained(source)
            with torch.no_grad():
                self.logits.append(model(input_ids=torch.tensor([[1, 2, 3]])).logits)


@pytest.mark.asyncio
@pytest.mark.parametrize("architecture", ["qwen3", "llama"])
async def test_a_pushed_folder_is_the_model(
    make_model: Models, tmp_path: Path, architecture: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model, target = make_model(architecture), Target()
    sync = FolderSync(target, tmp_path / "weights", keep=2)
    expected = []
    for number in range(4):
        with torch.no_grad():
            model.get_decoder().norm.weight.mul_(1.5)
            expected.append(model(input_ids=torch.tensor([[1, 2, 3]])).logits)
        capfd.readouterr()
        await sync.push(model, version=f"v{number}")
    assert target.versions == ["v0", "v1", "v2", "v3"]
    for pushed, logits in zip(target.logits, expected, strict=True):
        assert torch.equal(pushed, logits)
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["v2", "v3"]
    assert {path.suffix for path in (tmp_path / "weights" / "v3").iterdir()} == {".json", ".safetensors"}
    assert all(isinstance(source, Path) and source.is_absolute() for source in target.sources)
    assert "Writing model shards" not in "".join(capfd.readouterr())


@pytest.mark.asyncio
async def test_a_version_can_be_pushed_again(make_model: Models, tmp_path: Path) -> None:
    model, target = make_model(), Target()
    sync = FolderSync(target, tmp_path, keep=1)
    target.fail = True
    with pytest.raises(TransportError):
        await sync.push(model, version="v1")
    target.fail = False
    await sync.push(model, version="v1")
    await sync.push(model, version="v2")
    assert target.versions == ["v1", "v2"]
    assert [path.name for path in tmp_path.iterdir()] == ["v2"]


@pytest.mark.asyncio
@pytest.mark.parametrize("version", ["", "..", "a/b", "/tmp"])
async def test_a_version_that_cannot_name_a_folder_is_refused(
    make_model: Models, tmp_path: Path, version: str
) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a folder"):
        await FolderSync(Target(), tmp_path).push(make_model(), version=version)


def test_keep_must_leave_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="keep must be at least 1"):
        FolderSync(Target(), tmp_path, keep=0)


@pytest.mark.asyncio
async def test_tensors_are_passed_by_name(make_model: Models) -> None:
    model, target = make_model(), Target()
    await TensorSync(target).push(model, version="v1")
    (source,) = target.sources
    assert isinstance(source, Mapping)
    assert source.keys() == model.state_dict().keys()
    assert not any(tensor.requires_grad for tensor in source.values())


def test_an_error_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with new_folder(path) as folder:
        (folder / "file").write_text("old")

    def fail() -> None:
        with new_folder(path) as folder:
            (folder / "file").write_text("new")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert (path / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_replacing_a_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    previous_of(path).mkdir()
    for text in ("first", "second"):
        with new_folder(path, durable=True) as folder:
            (folder / text).write_text(text)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
    assert [entry.name for entry in path.iterdir()] == ["second"]


def adapted(model: PreTrainedModel, seed: int = 0) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return adapted.eval()


# peft 0.21 asks transformers 5 by the older name
peft_warns = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.asyncio
@peft_warns
async def test_a_pushed_adapter_is_the_models_alone(make_model: Models, tmp_path: Path) -> None:
    base = make_model()
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model, target = adapted(base), Target()
    sync = LoRASync(target, tmp_path, keep=2)
    for number in range(3):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.mul_(1.5)
        await sync.push(model, version=f"v{number}")
    assert target.versions == ["v0", "v1", "v2"]
    assert [type(source) for source in target.sources] == [AdapterWeights] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v1", "v2"]
    source = target.sources[-1]
    assert isinstance(source, AdapterWeights)
    assert sorted(path.name for path in source.path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    size = (source.path / "adapter_model.safetensors").stat().st_size
    assert size < sum(tensor.nbytes for tensor in state.values()) / 2
    fresh = make_model()
    fresh.load_state_dict(state)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        plain = fresh(input_ids=ids).logits.clone()
        found = PeftModel.from_pretrained(fresh, source.path).eval()(input_ids=ids).logits
    assert torch.equal(found, expected)
    assert not torch.allclose(plain, expected)


@pytest.mark.asyncio
@peft_warns
async def test_a_model_without_that_adapter_is_refused(make_model: Models, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no adapter 'default'"):
        await LoRASync(Target(), tmp_path).push(make_model(), version="1")
    with pytest.raises(ConfigurationError, match="no adapter 'other'"):
        await LoRASync(Target(), tmp_path, adapter="other").push(adapted(make_model()), version="1")
    with pytest.raises(ConfigurationError, match="cannot name a folder"):
        await LoRASync(Target(), tmp_path).push(adapted(make_model()), version="..")
    with pytest.raises(ConfigurationError, match="keep must be at least 1"):
        LoRASync(Target(), tmp_path, keep=0)
    assert list(tmp_path.iterdir()) == []
