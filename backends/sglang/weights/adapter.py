"""A LoRA adapter: what SGLang makes of a folder in peft's layout, and which folders it would read wrongly."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.sglang.answer import Answer
from backends.sglang.weights.signature import Signature, file_specs, read_json
from gym_sdk.errors import CheckpointError, TransportError
from gym_sdk.schema.weights import TensorSpec
from gym_sdk.tokens import WeightSpan

__all__ = ["Adapter", "LoRALimits", "check_adapter"]

_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"
_NAME = re.compile(r"base_model\.model\.(?P<module>.+\.(?P<projection>\w+))\.lora_(?P<side>[AB])\.weight")
_STACKED = {
    "q_proj": "qkv_proj",
    "k_proj": "qkv_proj",
    "v_proj": "qkv_proj",
    "o_proj": "o_proj",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
    "down_proj": "down_proj",
}
"""The layers whose adapters are exact, as log-probs show, and what SGLang calls them."""
_UNREAD = (
    *("use_dora", "use_rslora", "use_qalora", "lora_bias", "fan_in_fan_out", "rank_pattern", "alpha_pattern"),
    *("modules_to_save", "layer_replication", "trainable_token_indices", "target_parameters"),
    *("alora_invocation_tokens", "arrow_config", "use_bdlora", "megatron_config"),
)
"""What makes an adapter more than alpha/r B A. SGLang reads none of it, and most of it without a word."""
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Ways to start that leave the base weights as they are."""
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LoRALimits:
    """What one SGLang takes.

    Attributes:
        max_rank: the largest rank; None leaves it to SGLang to say.
        modules: layers by SGLang's or by their own names; None takes all.
    """

    max_rank: int | None
    modules: frozenset[str] | None


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that SGLang has loaded.

    Attributes:
        name: in SGLang; never used again.
        version: what our clients call the adapted weights.
        base: SGLang's label of the weights below it.
    """

    name: str
    version: str
    base: str

    def relabelled(self, answer: Answer) -> Answer:
        """Return an answer with the adapter's version; SGLang's own labels are the base's.

        Raises:
            TransportError: the base is no longer the one that the adapter was loaded on.
        """
        bases = {span.version for span in answer.spans or ()} | {answer.version}
        if bases != {self.base}:
            raise TransportError(
                f"the weights below the adapter {self.version!r} were {self.base!r} and have been replaced "
                "by another client; push the adapter, or full weights, again",
                retryable=True,
            )
        spans = answer.spans
        if spans:
            spans = (WeightSpan(self.version, 0, len(answer.token_ids)),)
        return dataclasses.replace(answer, version=self.version, spans=spans)


def check_adapter(folder: Path, limits: LoRALimits, signature: Signature | None) -> None:
    """See that SGLang would compute with a folder's adapter exactly what peft does.

    Args:
        folder: as peft's `save_pretrained` writes it.
        limits: what SGLang takes.
        signature: of the base weights; None where it is not known.

    Raises:
        CheckpointError: the folder is damaged, of another model, or of a kind that SGLang reads otherwise.
    """
    config = read_json(folder / _CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError("is no JSON object", path=folder / _CONFIG)
    rank = _check_config(config, limits, folder / _CONFIG)
    specs = file_specs(folder / _WEIGHTS)
    problems = _problems(specs, rank, limits, signature)
    if problems:
        more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
        raise CheckpointError(f"cannot be served: {'; '.join(problems[:_SHOWN])}{more}", path=folder)


def _check_config(config: Mapping[str, Any], limits: LoRALimits, file: Path) -> int:
    """Check the settings; return the rank."""
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or type(rank) is not int or type(alpha) not in (int, float):
        raise CheckpointError("is not the configuration of a LoRA adapter", path=file)
    if rank < 1 or (limits.max_rank is not None and rank > limits.max_rank):
        raise CheckpointError(
            f"has rank {rank}; this SGLang takes 1 to {limits.max_rank} (--max-lora-rank)", path=file
        )
    unread = [name for name in _UNREAD if config.get(name)]
    if config.get("bias", "none") != "none":
        unread.append("bias")
    if config.get("init_lora_weights") not in _PLAIN_STARTS:
        unread.append("init_lora_weights")  # the base that it is trained on is not the one that is served
    if unread:
        raise CheckpointError(
            f"uses {', '.join(unread)}, which SGLang does not honour; merge the adapter and push full "
            "weights",
            path=file,
        )
    return rank


def _problems(
    specs: Iterable[TensorSpec], rank: int, limits: LoRALimits, signature: Signature | None
) -> list[str]:
    problems = []
    sides: dict[str, dict[str, TensorSpec]] = {}
    layers: dict[str, set[str]] = {}
    for spec in specs:
        found = _NAME.fullmatch(spec.name)
        if found is None:
            problems.append(f"unknown name {spec.name}")
            continue
        module, projection = found["module"], found["projection"]
        stacked = _STACKED.get(projection)
        if stacked is None:
            problems.append(f"{spec.name}: adapters of {projection} have not been verified")
        elif limits.modules is not None and limits.modules.isdisjoint((stacked, projection)):
            problems.append(f"{spec.name}: SGLang was started without {stacked} in --lora-target-modules")
        sides.setdefault(module, {})[found["side"]] = spec
        layers.setdefault(module.rpartition(".")[0], set()).add(projection)
    if not sides:
        problems.append("there is no tensor in it")
    for module, pair in sides.items():
        problems += _pair_problems(module, pair, rank, signature)
    # SGLang stacks them, and leaves out, or stumbles over, what has not its counterpart
    for layer, names in layers.items():
        if names & {"q_proj", "k_proj", "v_proj"} and not names >= {"q_proj", "v_proj"}:
            problems.append(f"{layer} needs adapters of both q_proj and v_proj, or of none")
        if len(names & {"gate_proj", "up_proj"}) == 1:
            problems.append(f"{layer} needs adapters of both gate_proj and up_proj, or of none")
    return problems


def _pair_problems(
    module: str, pair: Mapping[str, TensorSpec], rank: int, signature: Signature | None
) -> list[str]:
    if pair.keys() != {"A", "B"}:
        return [f"{module} lacks lora_{'B' if 'A' in pair else 'A'}"]
    down, up = pair["A"].shape, pair["B"].shape
    if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
        return [f"{module} has shapes {list(down)} and {list(up)}, which are not of rank {rank}"]
    if signature is None:
        return []
    base = signature.get(f"{module}.weight")
    if base is None:
        return [f"the model has no {module}"]
    if base.shape != (up[0], down[1]):
        return [f"{module} is for a layer of shape {[up[0], down[1]]}, the model's has {list(base.shape)}"]
    return []
