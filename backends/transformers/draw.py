"""One step's samples: a token for each row that is ready, and what its request wants to know of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from backends.transformers.masks import Masks
from backends.transformers.request import RequestState
from backends.transformers.sampling import Mask, likeliest, sample, uniforms
from backends.transformers.slots import SlotTable
from gym_sdk.errors import GymError, PolicyError

__all__ = ["Draw", "draw", "failure"]


@dataclass(frozen=True, slots=True)
class Draw:
    """What was sampled.

    Attributes:
        tokens: int64 `[rows]`, on the CPU.
        log_probs: of each token; not finite where there was nothing to sample.
        top_log_probs: the likeliest tokens of the rows whose requests want to know them.
    """

    tokens: Tensor
    log_probs: list[float]
    top_log_probs: dict[int, list[tuple[int, float]]]


def draw(logits: Tensor, table: SlotTable, masks: Masks) -> Draw:
    """Sample one token for each of the first rows of a table.

    Args:
        logits: `[rows, vocab]`.
        table: says how to sample.
        masks: says what the grammars of the rows allow.
    """
    ready, device = slice(0, len(logits)), logits.device
    temperature = table.temperature[ready]
    tokens, log_probs = sample(
        logits,
        torch.from_numpy(uniforms(table.key[ready], table.sampled[ready])).to(device),
        temperature=temperature,
        top_k=table.top_k[ready],
        top_p=table.top_p[ready],
        mask=_mask(table, len(logits), masks, device),
    )
    top = _top_log_probs(logits, temperature, table.reported[ready])
    return Draw(tokens.cpu(), log_probs.tolist(), top)


def failure(state: RequestState, log_prob: float, version: str) -> GymError:
    """Say why a request ends whose sample has a log-prob that is not finite, or whose matcher refused it."""
    if math.isnan(log_prob):
        return GymError(
            f"request {state.request_id!r}: the weights of version {version!r} give NaN log-probs"
        )
    matcher, count = state.matcher, len(state.token_ids)
    assert matcher is not None, "only a grammar takes every token away"
    if matcher.is_error():
        why = f"its matcher failed ({matcher.get_error().strip()})"
    elif matcher.is_stopped():
        why = "it ends there, and its last token is no stop token of the request"
    else:
        why = "nothing that the model could sample continues it"
    return PolicyError(
        f"the grammar allows no token after {count} of the generation: {why}",
        code="invalid_value",
        param="grammar",
    )


def _mask(table: SlotTable, ready: int, masks: Masks, device: torch.device) -> Mask | None:
    rows = np.flatnonzero(table.constrained[:ready])
    if not len(rows):
        return None
    owners = [table.owners[row] for row in rows.tolist()]
    matchers = [state.matcher for state in owners if state is not None and state.matcher is not None]
    return Mask(rows, masks.allowed(matchers, device))


def _top_log_probs(
    logits: Tensor, temperature: np.ndarray, reported: np.ndarray
) -> dict[int, list[tuple[int, float]]]:
    rows = np.flatnonzero(reported)
    if not len(rows):
        return {}
    tokens, scores = likeliest(logits[rows], temperature[rows], int(reported.max()))
    found: dict[int, list[tuple[int, float]]] = {}
    for row, ids, values in zip(rows.tolist(), tokens.tolist(), scores.tolist(), strict=True):
        pairs = zip(ids[: reported[row]], values, strict=False)
        found[row] = [(token_id, score) for token_id, score in pairs if score > -math.inf]
    return found
