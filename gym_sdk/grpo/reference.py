"""Reference policies: what the policy is kept close to by the KL term of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gym_sdk.errors import ConfigurationError
from gym_sdk.grpo.models import frozen_twin, is_adapter_model, require_unmerged, trained_parameters

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "AdapterReference",
    "CopyReference",
    "EMAReference",
    "ReferencePolicy",
    "make_reference",
]


class ReferencePolicy(Protocol):
    """What the trainer asks of a reference policy."""

    def scoring(self) -> AbstractContextManager[PreTrainedModel | PeftModel]:
        """Yield the model to take log-probs from, without gradient; it is a model of its own."""
        ...

    def after_update(self, model: PreTrainedModel | PeftModel) -> None:
        """Follow the policy, if this reference does; called after each update of the policy's weights."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold to resume exactly; tensors are not cloned."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a saved state back.

        Raises:
            ConfigurationError: it is of another kind of reference, or of another model.
        """
        ...


class CopyReference:
    """The policy as it was when this was made, or as it was at the last refresh.

    Parameters that are trained are copied: a whole model in full fine-tuning, the adapter alone with peft.
    Frozen ones share the policy's memory.

    Args:
        model: the policy, on its device; not changed.
        refresh_every: after how many updates the reference becomes the policy as it then is. None: never, or
            when `refresh` is called.

    Raises:
        ConfigurationError: `refresh_every` is less than 1, or the model has nothing to train.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, *, refresh_every: int | None = None) -> None:
        if refresh_every is not None and refresh_every < 1:
            raise ConfigurationError(f"refresh_every must be at least 1, or None, not {refresh_every}")
        self._refresh_every = refresh_every
        self._updates = 0
        names = trained_parameters(model)
        self.model = frozen_twin(model, copy_trained=True)
        """The reference as a model of its own, which can be saved; do not train it."""
        own = dict(self.model.named_parameters())
        self._weights: dict[str, Tensor] = {name: own[name].data for name in names}

    @contextmanager
    def scoring(self) -> Iterator[PreTrainedModel | PeftModel]:
        """Yield the reference's model, without gradient."""
        with torch.no_grad():
            yield self.model

    def after_update(self, model: PreTrainedModel | PeftModel) -> None:
        """Refresh, if it is time to."""
        self._updates += 1
        if self._refresh_every is not None and self._updates % self._refresh_every == 0:
            self.refresh(model)

    def refresh(self, model: PreTrainedModel | PeftModel) -> None:
        """Make the present policy the reference."""
        current = dict(model.named_parameters())
        for name, weight in self._weights.items():
            weight.copy_(current[name].detach())

    def state_dict(self) -> dict[str, Any]:
        """Return the copied weights and the count of updates."""
        return {"kind": "copy", "updates": self._updates, "weights": dict(self._weights)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a saved state back.

        Raises:
            ConfigurationError: it is of another kind of reference, or of another model.
        """
        saved = _checked(state, "copy", self._weights)
        for name, weight in self._weights.items():
            weight.copy_(saved[name])
        self._updates = int(state["updates"])


class AdapterReference:
    """The model under the adapters, without them: nothing is copied, and nothing is computed for adapters.

    It is where training began only if it began with new adapters (those of `add_lora` change nothing at
    first). The policy itself is not switched, so others may use it meanwhile.

    Args:
        model: a peft model, on its device, whose own parameters are frozen.

    Raises:
        ConfigurationError: it is not a peft model, its adapters are merged into its weights, or weights that
            are not the adapters' are trained.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        if not is_adapter_model(model):
            raise ConfigurationError("a reference without adapters needs a peft model; use CopyReference")
        require_unmerged(model)
        tuner: Any = model.base_model
        marks = (tuner.prefix, ".modules_to_save.", ".trainable_tokens_delta.")
        strange = [name for name in trained_parameters(model) if not any(mark in name for mark in marks)]
        if strange:
            raise ConfigurationError(
                f"{strange[0]} is trained and belongs to no adapter: the model without adapters changes too. "
                "Use CopyReference"
            )
        self._model = frozen_twin(model, copy_trained=False)
        tuner = self._model.base_model
        tuner.disable_adapter_layers()

    @contextmanager
    def scoring(self) -> Iterator[PeftModel]:
        """Yield the model without its adapters, without gradient."""
        with torch.no_grad():
            yield self._model

    def after_update(self, model: PreTrainedModel | PeftModel) -> None:
        """Do nothing: the weights under the adapters are frozen."""

    def state_dict(self) -> dict[str, Any]:
        """Return the kind alone: there is nothing else to save."""
        return {"kind": "adapter"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Check that it is of this kind.

        Raises:
            ConfigurationError: it is of another kind of reference.
        """
        _checked(state, "adapter", {})


class EMAReference:
    """An exponential moving average of the policy's weights.

    After update t (each `update_every`-th), e_t = decay * e_(t-1) + (1 - decay) * w_t, from e_0 = w_0, the
    weights when this was made. So there is no bias towards zero to correct; the first weights keep a share of
    decay^t. What is averaged, and copied, is what is trained: all weights, or with peft the adapter's. (The
    average of A and B is not the average of their products.)

    Averages are in float32 at least: for a bfloat16 model, 4 bytes for each trained parameter, besides the 2
    of the model that scores.

    Args:
        model: the policy, on its device; not changed.
        decay: share of the old average.
        update_every: after how many updates the average moves on.

    Raises:
        ConfigurationError: `decay` is not in (0, 1), `update_every` is less than 1, or the model has nothing
            to train.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, *, decay: float = 0.999, update_every: int = 1
    ) -> None:
        if not 0.0 < decay < 1.0:
            raise ConfigurationError(f"decay must be in (0, 1), not {decay}")
        if update_every < 1:
            raise ConfigurationError(f"update_every must be at least 1, not {update_every}")
        self._decay = decay
        self._update_every = update_every
        self._updates = 0
        names = trained_parameters(model)
        self.model = frozen_twin(model, copy_trained=True)
        """The average as a model of its own, which can be saved; do not train it."""
        own = dict(self.model.named_parameters())
        self._weights: dict[str, Tensor] = {name: own[name].data for name in names}
        # `to` copies only what is of lower precision
        self._averages = {
            name: weight.to(torch.promote_types(weight.dtype, torch.float32))
            for name, weight in self._weights.items()
        }

    @contextmanager
    def scoring(self) -> Iterator[PreTrainedModel | PeftModel]:
        """Yield the model with the averaged weights, without gradient."""
        with torch.no_grad():
            yield self.model

    def after_update(self, model: PreTrainedModel | PeftModel) -> None:
        """Move the average on, if it is time to."""
        self._updates += 1
        if self._updates % self._update_every:
            return
        current = dict(model.named_parameters())
        for name, average in self._averages.items():
            average.lerp_(current[name].detach().to(average.dtype), 1.0 - self._decay)
        self._round()

    def state_dict(self) -> dict[str, Any]:
        """Return the averages and the count of updates."""
        return {"kind": "ema", "updates": self._updates, "weights": dict(self._averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put a saved state back.

        Raises:
            ConfigurationError: it is of another kind of reference, or of another model.
        """
        saved = _checked(state, "ema", self._averages)
        for name, average in self._averages.items():
            average.copy_(saved[name])
        self._updates = int(state["updates"])
        self._round()

    def _round(self) -> None:
        """Bring the averages into the model, where they are not the model's own tensors."""
        for name, weight in self._weights.items():
            if weight is not self._averages[name]:
                weight.copy_(self._averages[name])


def make_reference(
    model: PreTrainedModel | PeftModel,
    kind: Literal["initial", "base", "ema"],
    *,
    refresh_every: int | None = None,
    decay: float = 0.999,
    update_every: int = 1,
) -> ReferencePolicy:
    """Make a reference policy from the policy as it is now.

    Args:
        model: the policy, on its device.
        kind: `initial`: the policy as it is now (`CopyReference`), right for any start; with peft, only the
            adapter is copied. `base`: the model under the adapters (`AdapterReference`), the same if these
            are new, and free. `ema`: a moving average (`EMAReference`).
        refresh_every: of `initial`.
        decay: of `ema`.
        update_every: of `ema`.

    Raises:
        ConfigurationError: the kind is none of these, or its class refuses.
    """
    if kind == "initial":
        return CopyReference(model, refresh_every=refresh_every)
    if refresh_every is not None:
        raise ConfigurationError(f"refresh_every is for a reference of kind 'initial', not {kind!r}")
    if kind == "base":
        return AdapterReference(model)
    if kind == "ema":
        return EMAReference(model, decay=decay, update_every=update_every)
    raise ConfigurationError(f"kind must be 'initial', 'base' or 'ema', not {kind!r}")


def _checked(state: dict[str, Any], kind: str, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a saved state's weights if they fit."""
    if state.get("kind") != kind:
        raise ConfigurationError(
            f"the state is of a reference policy of kind {state.get('kind')!r}, and this one is {kind!r}"
        )
    saved: dict[str, Tensor] = state.get("weights", {})
    for name in [*expected, *saved]:
        if name not in saved or name not in expected or saved[name].shape != expected[name].shape:
            raise ConfigurationError(f"the reference policy's state is of another model: {name} differs")
    return saved
