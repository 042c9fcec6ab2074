"""Full models and models with adapters (peft), treated alike."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeGuard, TypeVar, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "add_lora",
    "base_of",
    "device_of",
    "frozen_twin",
    "is_adapter_model",
    "merged",
    "require_unmerged",
    "served_model",
    "spare_embedding_gradient",
    "trained_parameters",
    "vocab_size",
]

Model = TypeVar("Model", bound=nn.Module)


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    targets: Literal["all-linear"] | Sequence[str] = "all-linear",
) -> PeftModel:
    """Freeze a model and give it a LoRA adapter to train (arXiv 2106.09685).

    Each target's weight W becomes W + (alpha / rank) B A, with B = 0 at first: the policy is unchanged. The
    adapter is in float32, whatever the model is in. There is no dropout: the trainer computes what the engine
    computes. For other adapters or settings, call `peft.get_peft_model` yourself.

    Args:
        model: changed in place: its targets are wrapped, its parameters frozen.
        rank: inner size of B A.
        alpha: scale of the adapter.
        targets: names of linear layers, or all of them but the vocabulary projection.

    Returns:
        The model with its adapter, named `default`.

    Raises:
        ConfigurationError: peft is not installed, a value is out of range, the model has adapters already,
            or a target is not there.
    """
    try:
        from peft import LoraConfig, TaskType, get_peft_model
    except ImportError as error:
        raise ConfigurationError(
            f'adapters need more packages: pip install "gym-sdk[lora]" ({error})'
        ) from error
    if rank < 1 or not 0.0 < alpha < float("inf"):
        raise ConfigurationError(f"rank must be at least 1 and alpha positive, not {rank} and {alpha}")
    if is_adapter_model(model):
        raise ConfigurationError("the model has adapters already; train those, or start from its base")
    names = targets if isinstance(targets, str) else list(targets)
    missing = [
        target
        for target in ([] if isinstance(names, str) else names)
        if not any(name == target or name.endswith(f".{target}") for name, _ in model.named_modules())
    ]
    if missing or not names:
        raise ConfigurationError(f"targets name no layers of the model: {missing or names!r}")
    config = LoraConfig(
        r=rank,
        lora_alpha=cast(int, alpha),
        target_modules=names,
        lora_dropout=0.0,
        task_type=TaskType.CAUSAL_LM,
    )
    with warnings.catch_warnings():  # peft's own use of a name that newer transformers give up
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return cast("PeftModel", get_peft_model(model, config))


def is_adapter_model(model: nn.Module) -> TypeGuard[PeftModel]:
    """Return whether this is a peft model."""
    peft: Any = sys.modules.get("peft")  # not imported: then nobody has made one
    return peft is not None and isinstance(model, peft.PeftModel)


def base_of(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return the transformers model: itself, or the one that carries the adapters.

    Raises:
        ConfigurationError: the adapters were added by transformers' own `add_adapter`.
    """
    base = cast(PreTrainedModel, model.get_base_model() if is_adapter_model(model) else model)
    if getattr(base, "_hf_peft_config_loaded", False):
        raise ConfigurationError(
            "the model has adapters inside, added by transformers; add them with add_lora or "
            "peft.get_peft_model instead"
        )
    return base


def vocab_size(model: PreTrainedModel | PeftModel) -> int:
    """Return how many tokens the model knows."""
    return int(base_of(model).config.get_text_config().vocab_size)


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's first parameter is."""
    return next(model.parameters()).device


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that have `requires_grad`, by name; tied ones once.

    Raises:
        ConfigurationError: there is none.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ConfigurationError(
            "the model has nothing to train: none of its parameters has requires_grad. A saved adapter is "
            "loaded with PeftModel.from_pretrained(..., is_trainable=True)"
        )
    return trained


def frozen_twin(model: Model, *, copy_trained: bool) -> Model:
    """Return a second model for scoring, which shares the memory of the weights.

    Modules are copied, so that what is switched or replaced in the twin leaves the model alone. The twin is
    in evaluation mode and has no `requires_grad`. Sharing ends when the model is moved to another device or
    type.

    Args:
        model: the model; not changed.
        copy_trained: whether the twin gets copies of the parameters that have `requires_grad`, as they are
            now; otherwise it shares them too, and follows the training.
    """
    shared: dict[int, Any] = {}
    for parameter in model.parameters():
        values = parameter.detach()
        if copy_trained and parameter.requires_grad:
            values = values.clone()
        shared[id(parameter)] = nn.Parameter(values, requires_grad=False)
    return copy.deepcopy(model, shared).eval()


def require_unmerged(model: PeftModel) -> None:
    """Check that the adapters are beside the weights that they change, not added into them.

    Raises:
        ConfigurationError: some are merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise ConfigurationError("adapters are merged into the model's weights; call unmerge_adapter() first")


def merged(model: PeftModel) -> PreTrainedModel:
    """Return the model with its active adapter merged in, as engines that know no adapters take it.

    A model of the base's class with the base's parameter names, to be saved or to take `state_dict()` from.
    Adapted weights (W + scale B A) are new tensors; the rest, modules that are trained whole included, shares
    the trained model's memory, and follows its training. The trained model is not changed. Sums are rounded
    once, to the base's precision: in bfloat16, an engine with them differs from the trainer by that.

    Raises:
        ConfigurationError: the model has no adapters, they are merged already, or the embedding is tied to
            the vocabulary projection and one of them is adapted (merged, they would no longer be tied).
    """
    if not is_adapter_model(model):
        raise ConfigurationError(f"{type(model).__name__} has no adapters to merge; use it as it is")
    require_unmerged(model)
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    base = base_of(model)
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if base.config.get_text_config().tie_word_embeddings and any(
        isinstance(end, BaseTunerLayer | AuxiliaryTrainingWrapper) for end in ends
    ):
        raise ConfigurationError(
            "the embedding is tied to the vocabulary projection, and an adapter changes one of them: the "
            "merged model would be another one. Adapt neither, or send the adapter itself (LoRASync)"
        )
    twin: Any = frozen_twin(model, copy_trained=False)
    for module in twin.modules():
        if isinstance(module, BaseTunerLayer):
            for parameter in module.get_base_layer().parameters():
                parameter.data = parameter.data.clone()  # what peft adds to in place
    return cast(PreTrainedModel, twin.merge_and_unload())


def spare_embedding_gradient(model: PreTrainedModel | PeftModel) -> None:
    """Keep an embedding that is tied to the vocabulary projection from making a dense gradient of its own.

    The two add up to one dense gradient anyway, and the embedding's part has rows for the tokens of the batch
    alone: as a sparse tensor it is small, as a dense one as large as the weight. Untied embeddings are left
    alone: their gradient would stay sparse, which most optimizers refuse.
    """
    base = base_of(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if (
        isinstance(embedding, nn.Embedding)
        and isinstance(head, nn.Linear)
        and embedding.weight is head.weight
        and embedding.weight.requires_grad
    ):
        embedding.sparse = True


def served_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """Return what an engine that knows no adapters serves: the model itself, or with its adapter merged in.

    Raises:
        ConfigurationError: as for `merged`.
    """
    return merged(model) if is_adapter_model(model) else cast(PreTrainedModel, model)
