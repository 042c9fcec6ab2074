"""The tokens of a rollout, coloured by log-prob."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gym_sdk.schema import Rollout
from gym_sdk.tokens import TokenSequence

__all__ = ["TokenView", "show_tokens"]

_LEAST_LIKELY = -4.0  # natural log; everything below is as red as this


@dataclass(frozen=True, slots=True)
class TokenView:
    """HTML that a notebook shows by itself."""

    html: str = field(repr=False)

    def _repr_html_(self) -> str:
        return self.html


def show_tokens(rollout: Rollout, decode: Callable[[Sequence[int]], str]) -> TokenView:
    """Show each training row of a rollout, token for token.

    Sampled tokens run from green (likely) to red (unlikely), with the log-prob as a tooltip; tokens that
    were prompted are grey. Tokens that are parts of one character show as they decode alone.

    Args:
        rollout: with tokens.
        decode: turns ids into text, e.g. `client.transport.decode` of a `GymClient.local()`.

    Raises:
        TokenContractError: a model call came without tokens.
    """
    rows = [_row(row, decode) for row in rollout.sequences()]
    reward = "none" if rollout.reward is None else f"{rollout.reward:g}"
    head = f"<b>{html.escape(rollout.task_id)} #{rollout.index}</b>, reward {reward}, {rollout.outcome}"
    return TokenView(f"<div>{head}{''.join(rows)}</div>")


def _row(row: TokenSequence, decode: Callable[[Sequence[int]], str]) -> str:
    cells = [
        _token(decode([token_id]), log_prob if trained else None)
        for token_id, trained, log_prob in zip(row.token_ids, row.loss_mask, row.log_probs, strict=True)
    ]
    style = "font-family:monospace;white-space:pre-wrap;line-height:1.6;margin:4px 0"
    return f'<div style="{style}">{"".join(cells)}</div>'


def _token(text: str, log_prob: float | None) -> str:
    shown = html.escape(text).replace("\n", "⏎\n")
    if log_prob is None:
        return f'<span style="color:#888">{shown}</span>'
    # hue 120 is green, 0 is red
    hue = 120.0 * (1.0 - min(1.0, max(log_prob, _LEAST_LIKELY) / _LEAST_LIKELY))
    title = f"log-prob {log_prob:.3f}, probability {math.exp(log_prob):.3f}"
    return f'<span title="{title}" style="background:hsl({hue:.0f},80%,85%);color:#111">{shown}</span>'
