"""What must be known of a running SGLang before anything is sent to it."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backends.sglang.client import SGLangClient
from backends.sglang.weights.adapter import LoRALimits
from backends.sglang.weights.signature import Signature, signature_of
from gym_sdk.errors import CheckpointError, ConfigurationError, TransportError

__all__ = ["SUPPORTED", "Facts", "check_log_probs", "learn", "supported_version"]

SUPPORTED = ((0, 5, 23), (0, 6))
"""Versions of SGLang that serve, from the first to before the last; 0.5.23 is what the tests drive."""

_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Facts:
    """One server's settings.

    Attributes:
        version: SGLang's.
        vocab_size: how many ids the model knows.
        context_length: most tokens of prompt and generation that SGLang takes.
        weight_version: the label of the weights at that moment.
        model_path: the folder whose weights it loaded last, as SGLang names it; tensors that went by shared
            memory leave one that is gone.
        signature: names and shapes of its tensors; None where this process sees neither folder.
        seeded: whether it honours seeds.
        incremental: whether its streams send only what is new.
        unchanged: whether the weights are still those of the folder that it was started with.
        tp_size: how many processes share the tensors of a layer.
        pp_size: how many processes share the layers.
        dp_size: how many copies of the model there are behind the one address.
        nodes: how many machines share the model.
        lora: which adapters it takes; None if it takes none.
        tool_parser: its parser of tool calls; None if it was started without one.
        reasoning_parser: its parser of thinking; None if it was started without one.
        grammar_backend: what reads its grammars; None if nothing does.
        tokenizer: the folder of its tokenizer; None where this process sees none.
    """

    version: str
    vocab_size: int
    context_length: int
    weight_version: str
    model_path: str
    signature: Signature | None
    seeded: bool
    incremental: bool
    unchanged: bool = False
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1
    nodes: int = 1
    lora: LoRALimits | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    grammar_backend: str | None = None
    tokenizer: Path | None = None

    @property
    def ranks(self) -> int:
        """How many processes hold a part of the model."""
        return self.tp_size * self.pp_size

    def check_alone(self, what: str) -> None:
        """See that SGLang is divided in no way in which it does not take `what`.

        Raises:
            ConfigurationError: it is.
        """
        if self.dp_size > 1:  # SGLang's own assertion
            raise ConfigurationError(f"SGLang takes no {what} with --dp-size above 1; push a folder")
        if self.pp_size > 1:  # its stages would all claim the same rank
            raise ConfigurationError(f"SGLang takes no {what} with --pp-size above 1; push a folder")


def supported_version(version: str) -> bool:
    """Return whether this version of SGLang is in the supported range."""
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", version)
    numbers = tuple(int(part or 0) for part in found.groups()) if found else ()
    return SUPPORTED[0] <= numbers < SUPPORTED[1]


async def learn(client: SGLangClient, *, model: str | Path | None = None) -> Facts:
    """Ask a server what it is, and refuse one that cannot keep the token contract.

    Args:
        client: the way to it.
        model: a folder with the model's `config.json`; by default the one that SGLang names, or if that is
            gone, the one that it was started with.

    Raises:
        ConfigurationError: it is no SGLang, of an unsupported version, or started with options under which
            its tokens or log-probs are not the policy's.
        TransportError: it does not answer.
    """
    try:
        server, now = await client.get("/server_info"), await client.get("/model_info")
        version, path = str(server["version"]), str(now["model_path"])
        length = min(int(server["max_req_input_len"]), int(server["max_total_num_tokens"]))
        weight_version = str(now["weight_version"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigurationError(
            f"{client.url} is no SGLang server: {type(error).__name__}: {error}"
        ) from error
    except TransportError as error:
        if error.status == 404:
            raise ConfigurationError(f"{client.url} is no SGLang server: {error}") from error
        raise
    if not supported_version(version):
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise ConfigurationError(
            f"SGLang {version} at {client.url} is not supported; use a version from {low} to before {high}"
        )
    _check_options(server, now)
    served = await asyncio.to_thread(_served, path, str(server.get("model_path") or path))
    folder = served if model is None else Path(model)
    return Facts(
        version=version,
        vocab_size=await asyncio.to_thread(_vocab_size, folder, served),
        context_length=length,
        weight_version=weight_version,
        model_path=path,
        signature=await asyncio.to_thread(_signature, served, folder),
        seeded=bool(server.get("enable_deterministic_inference")),
        incremental=bool(server.get("incremental_streaming_output")),
        unchanged=(str(server.get("model_path")), str(server.get("weight_version")))
        == (path, weight_version),
        tp_size=int(server.get("tp_size") or 1),
        pp_size=int(server.get("pp_size") or 1),
        dp_size=int(server.get("dp_size") or 1),
        nodes=int(server.get("nnodes") or 1),
        lora=_lora(server),
        tool_parser=server.get("tool_call_parser") or None,
        reasoning_parser=server.get("reasoning_parser") or None,
        grammar_backend=server.get("grammar_backend") or None,
        tokenizer=await asyncio.to_thread(_tokenizer, folder, served),
    )


async def check_log_probs(client: SGLangClient, token_id: int) -> None:
    """See that log-probs are reported at the request's temperature.

    With SGLANG_RETURN_ORIGINAL_LOGPROB in its environment, SGLang reports those of temperature 1; no route
    tells. Doubling the temperature halves the distance between any two log-probs of a position.

    Raises:
        ConfigurationError: they are not.
    """
    cool, warm = [await _distance(client, token_id, temperature) for temperature in (1.0, 2.0)]
    if abs(cool - 2 * warm) > _TOLERANCE * max(1.0, cool):
        raise ConfigurationError(
            "this SGLang does not report log-probs at the request's temperature; start it without "
            "SGLANG_RETURN_ORIGINAL_LOGPROB in its environment"
        )


async def _distance(client: SGLangClient, token_id: int, temperature: float) -> float:
    body = {
        "input_ids": [token_id],
        "return_logprob": True,
        "top_logprobs_num": 2,
        "sampling_params": {"temperature": temperature, "max_new_tokens": 1, "ignore_eos": True},
    }
    answer = await client.post("/generate", body)
    try:
        first, second = (float(entry[0]) for entry in answer["meta_info"]["output_top_logprobs"][0])
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise ConfigurationError(
            f"SGLang at {client.url} reports no log-probs: {str(answer)[:300]}"
        ) from error
    return first - second


def _check_options(server: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    refused = {
        "is_generation": (True, "it serves no model that generates"),
        "preferred_sampling_params": (None, "--preferred-sampling-params changes what the policy samples"),
        "disaggregation_mode": ("null", "prefill and decode on different servers are not supported"),
        "speculative_algorithm": (None, "log-probs under speculative decoding have not been verified"),
        "enable_watermark": (False, "--enable-watermark changes what the policy samples"),
        "rl_on_policy_target": (None, "--rl-on-policy-target rounds log-probs to bfloat16"),
    }
    for name, (wanted, problem) in refused.items():
        value = now.get(name, server.get(name, wanted))
        if value != wanted and not (wanted is None and not value):
            raise ConfigurationError(f"this SGLang cannot be used ({name}={value!r}): {problem}")


def _served(path: str, start: str) -> Path:
    """Return the folder that tells of the model: the present one, unless it is gone or only weights."""
    return Path(path if (Path(path) / "config.json").is_file() else start)


def _vocab_size(folder: Path, served: Path) -> int:
    size = _configured_vocab_size(folder)
    if (served / "config.json").is_file() and _configured_vocab_size(served) != size:
        raise ConfigurationError(f"SGLang serves {served}, which is another model than {folder}")
    return size


def _configured_vocab_size(folder: Path) -> int:
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        size = config.get("vocab_size") or config["text_config"]["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{file} does not give the vocabulary's size ({type(error).__name__}: {error}); "
            "name the folder of the model that SGLang serves"
        ) from error
    return int(size)


def _lora(server: Mapping[str, Any]) -> LoRALimits | None:
    if not server.get("enable_lora"):
        return None
    rank, modules = server.get("max_lora_rank"), frozenset(map(str, server.get("lora_target_modules") or ()))
    return LoRALimits(
        max_rank=None if rank is None else int(rank),
        modules=None if not modules or "all" in modules else modules,
    )


def _tokenizer(*folders: Path) -> Path | None:
    return next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)


def _signature(*folders: Path) -> Signature | None:
    for folder in folders:
        with suppress(CheckpointError):
            return signature_of(folder)
    return None
