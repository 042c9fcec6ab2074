"""Walks through grammars, as policies that sample without sense would take them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from backends.rendering import TemplateRenderer

__all__ = ["accepts", "matcher", "walk"]

_ENDINGS = (
    "</parameter>",
    "</atem:parameter>",
    "</think>",
    "<tool_call>",
    "'",
    '"',
    "}",
    "]",
    ")",
    "1",
    "\n",
)
"""What brings free text, strings and objects to their ends."""
_SENSELESS = 40
"""After so many tokens the walk looks for the end."""
_LONGEST = 4000


@cache
def _tokenizer(renderer: TemplateRenderer) -> LLTokenizer:
    tokenizer: Any = renderer.tokenizer
    return from_tokenizer(tokenizer)


def matcher(renderer: TemplateRenderer, grammar: str) -> LLMatcher:
    """Return a matcher at the start of a grammar."""
    made = LLMatcher(_tokenizer(renderer), grammar, log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def accepts(renderer: TemplateRenderer, grammar: str, token_ids: Sequence[int]) -> bool:
    """Whether these ids, and nothing less, are a generation of the grammar."""
    state = matcher(renderer, grammar)
    for token_id in token_ids:
        if state.is_accepting() or not state.consume_token(token_id):
            return False
    return bool(state.is_accepting())


def walk(renderer: TemplateRenderer, grammar: str, seed: int) -> list[int]:
    """Return a generation of allowed tokens, drawn alike, that after a while takes every way to the end."""
    rng = random.Random(seed)
    state = matcher(renderer, grammar)
    special = renderer.special.ids
    endings = [renderer.encode(text) for text in _ENDINGS if text not in special]
    marks = set(special.values())
    ids: list[int] = []
    while not state.is_accepting():
        allowed = _allowed(state)
        assert allowed, f"nowhere to go after {renderer.decode(ids)!r}"
        chosen = [rng.choice(allowed)]
        marked = sorted(marks.intersection(allowed))
        stops = sorted(renderer.stop_token_ids.intersection(allowed))
        late = len(ids) > _SENSELESS
        if stops and (late or rng.random() < 0.1):
            chosen = [rng.choice(stops)]
        elif marked and (late or rng.random() < 0.1):
            chosen = [rng.choice(marked)]
        elif late and rng.random() < 0.8:
            rng.shuffle(endings)
            ways = (way for way in endings if state.validate_tokens(way) == len(way))
            chosen = next(ways, chosen)
        assert state.consume_tokens(chosen)
        ids += chosen
        assert len(ids) < _LONGEST, f"endless: {renderer.decode(ids[-200:])!r}"
    return ids


def _allowed(state: LLMatcher) -> list[int]:
    bits = np.frombuffer(state.compute_bitmask(), dtype=np.uint8)
    return [int(token_id) for token_id in np.flatnonzero(np.unpackbits(bits, bitorder="little"))]
