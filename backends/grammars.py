"""Grammars compiled to matchers over one tokenizer. No torch."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import OrderedDict
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from backends.requests import refuse
from gym_sdk.errors import PolicyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Grammars"]

_NO_CHARACTER = "\ufdd0"
"""Unicode keeps it for use inside of programs: it is in no text."""
_KEPT = 64
"""How many compiled grammars are kept: what one has learned of its lexer may take megabytes."""


class Grammars:
    """The grammars of one engine: a matcher is compiled once for each text, and copied for each request.

    Every method may be called from any thread.

    Args:
        source: the model's tokenizer or its folder, which is read when the first grammar comes; None if the
            engine has no tokenizer.
        vocab_size: how many ids the model knows; the tokenizer may know fewer, or more.
    """

    def __init__(self, source: PreTrainedTokenizerBase | Path | None, vocab_size: int) -> None:
        self._source = source
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._compiled: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._tokenizer: LLTokenizer | None = None

    def kept(self, grammar: str) -> LLMatcher | None:
        """Return a matcher for a grammar that has been compiled, at once; None for any other."""
        with self._lock:
            future = self._compiled.get(grammar)
            if future is None or not future.done():
                return None
            self._compiled.move_to_end(grammar)
        return future.result().deep_copy()

    def compile(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of a grammar; this may take a second.

        Raises:
            PolicyError: there is no tokenizer that grammars can be compiled for, or the grammar is invalid.
        """
        with self._lock:
            future = self._compiled.get(grammar)
            mine = future is None
            if future is None:
                future = self._compiled[grammar] = Future()
                while len(self._compiled) > _KEPT:
                    self._compiled.popitem(last=False)
        if mine:
            try:
                future.set_result(self._compile(grammar))
            except BaseException as error:
                with self._lock:  # those who wait for it get the error, the next one another try
                    self._compiled.pop(grammar, None)
                future.set_exception(error)
        return future.result().deep_copy()

    async def matcher(self, grammar: str) -> LLMatcher:
        """Return a matcher at the beginning of a grammar; raises as `compile` does."""
        kept = self.kept(grammar)
        return await asyncio.to_thread(self.compile, grammar) if kept is None else kept

    @property
    def tokenizer(self) -> LLTokenizer:
        """What the matchers read tokens by; there is one once a grammar has been compiled."""
        assert self._tokenizer is not None, "no grammar has been compiled"
        return self._tokenizer

    def _compile(self, grammar: str) -> LLMatcher:
        with self._reading:  # a second for a large one, in which `kept` must not wait
            if self._tokenizer is None:
                self._tokenizer = _tokenizer(self._source, self._vocab_size)
        matcher = LLMatcher(
            self._tokenizer,
            LLMatcher.grammar_from_lark(grammar),
            log_level=0,
            limits=LLParserLimits(verbose_errors=False),
        )
        if matcher.is_error():
            raise PolicyError(
                f"the grammar is invalid: {matcher.get_error().strip()}",
                code="invalid_value",
                param="grammar",
            )
        return matcher


def _tokenizer(source: PreTrainedTokenizerBase | Path | None, vocab_size: int) -> LLTokenizer:
    """Prepare a tokenizer for grammars."""
    if isinstance(source, Path):
        from transformers import AutoTokenizer

        try:
            source = AutoTokenizer.from_pretrained(str(source))
        except (OSError, ValueError) as error:
            raise refuse("grammar", f"no tokenizer can be loaded to read the grammar by: {error}") from error
    backend = getattr(source, "backend_tokenizer", None)
    if backend is None:
        raise refuse("grammar", "grammars need a fast tokenizer, and this engine was made without one")
    try:
        copy = Tokenizer.from_str(_unspellable(backend.to_str()))
        # llguidance allows its end token wherever a grammar may end. This one the model doesn't know, so that
        # nothing can be sampled that the grammar does not spell
        copy.add_special_tokens([_name("end")])
        end = copy.token_to_id(_name("end"))
        assert end is not None, "it was just added"
        return LLTokenizer(copy.to_str(), n_vocab=max(vocab_size, end + 1), eos_token=end)
    except Exception as error:  # both libraries raise plain ones
        raise refuse("grammar", f"llguidance can't read grammars by this tokenizer: {error}") from error


def _unspellable(tokenizer: str) -> str:
    """Rename what llguidance takes for special tokens so that no text spells them; grammars name them by id.

    Where text is forced, llguidance tokenizes it by the tokenizer, which would find special tokens in it that
    the matcher then refuses.
    """
    data = json.loads(tokenizer)
    model, added = data["model"], data["added_tokens"]
    names = {token["content"]: _name(token["id"]) for token in added if _is_special(token)}
    for token in added:
        if token["content"] in names:
            token |= {"content": names[token["content"]], "special": True, "normalized": False}
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(piece, piece): number for piece, number in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    return json.dumps(data | {"post_processor": None, "padding": None, "truncation": None})


def _is_special(token: dict[str, Any]) -> bool:
    content: str = token["content"]
    return token["special"] or (content.startswith("<") and content.endswith(">"))


def _name(what: object) -> str:
    return f"<{_NO_CHARACTER}{what}>"
