"""The log-probs of an answer's text, token by token, as OpenAI's `logprobs`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backends.rendering.token_text import TokenText
from gym_sdk.schema import FunctionCall, Item, Message, OutputText, Reasoning

__all__ = ["log_prob_entries", "with_log_probs"]


def log_prob_entries(
    token_text: TokenText,
    token_ids: Sequence[int],
    log_probs: Sequence[float],
    top: Sequence[Sequence[tuple[int, float]]],
) -> list[dict[str, Any]]:
    """Return `{token, bytes, logprob, top_logprobs}` for each token.

    Args:
        token_text: what the ids spell.
        token_ids: the sampled tokens.
        log_probs: of the same length.
        top: the likeliest tokens at each place, or empty.
    """
    return [
        {
            **_entry(token_text, token_id, log_prob),
            "top_logprobs": [_entry(token_text, *other) for other in (top[place] if top else ())],
        }
        for place, (token_id, log_prob) in enumerate(zip(token_ids, log_probs, strict=True))
    ]


def with_log_probs(
    items: Sequence[Item],
    token_text: TokenText,
    token_ids: Sequence[int],
    log_probs: Sequence[float],
    top: Sequence[Sequence[tuple[int, float]]],
    *,
    open: bool = False,
) -> list[Item]:
    """Return the items, with log-probs on each text that the policy wrote.

    A text gets none if it can't be found in what was sampled. A token that reaches over a text's edge belongs
    to it; one that reaches over the end of an open text is not there yet.

    Args:
        items: what the generation reads as.
        token_text: what the ids spell.
        token_ids: the generation.
        log_probs: of the same length.
        top: the likeliest tokens at each place, or empty.
        open: whether the last text may still grow.
    """
    texts = [text for item in items for text in _texts(item)]
    places = iter(token_text.locate(token_ids, texts))
    annotated: list[Item] = []
    for index, item in enumerate(items):
        if not isinstance(item, Message) or isinstance(item.content, str):
            for _ in _texts(item):
                next(places)
            annotated.append(item)
            continue
        parts: list[Any] = []
        for part in item.content:
            place = next(places) if isinstance(part, OutputText) else None
            if isinstance(part, OutputText):
                start, end = place or (0, 0)
                if open and index == len(items) - 1:
                    end = _whole_tokens(token_text, token_ids, start, end, part.text)
                cut = slice(start, end)
                entries = log_prob_entries(
                    token_text, token_ids[cut], log_probs[cut], top[cut] if top else ()
                )
                part = part.model_copy(update={"logprobs": entries})
            parts.append(part)
        annotated.append(item.model_copy(update={"content": parts}))
    return annotated


def _whole_tokens(token_text: TokenText, ids: Sequence[int], start: int, end: int, text: str) -> int:
    """Return where the tokens end that a text spells wholly."""
    size = sum([len(token_text.bytes_of(token_id)) for token_id in ids[start:end]])
    # a first token that begins before the text only delays the last one
    return end - 1 if end > start and size > len(text.encode("utf-8", "surrogatepass")) else end


def _texts(item: Item) -> list[str]:
    if isinstance(item, Reasoning):
        return [item.text]
    if isinstance(item, FunctionCall):
        return [item.arguments]
    if isinstance(item, Message) and not isinstance(item.content, str):
        return [part.text for part in item.content if isinstance(part, OutputText)]
    return []


def _entry(token_text: TokenText, token_id: int, log_prob: float) -> dict[str, Any]:
    data = token_text.bytes_of(token_id)
    return {"token": token_text.text_of(token_id), "bytes": list(data), "logprob": log_prob}
