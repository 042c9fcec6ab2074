"""Grammars that hold a generation to what a request demands."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

from backends.constraints.alphabet import Alphabet
from backends.constraints.checking import Checker
from backends.constraints.demand import Demand
from backends.constraints.dialect import Dialect
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.messages import MessagesParser
from backends.rendering.renderer import Conversation
from backends.rendering.template import TemplateRenderer
from backends.requests import refuse
from gym_sdk.errors import PolicyError

__all__ = ["Constraints"]

_KEPT = 256
"""How many grammars, and how many templates' settings, are remembered."""

_K = TypeVar("_K")
_V = TypeVar("_V")


class Constraints:
    """Builds grammars for one model. A building takes milliseconds; it may run in any thread.

    The model's own chat template says how calls and answers are written: short turns are rendered, and what
    stands around their arguments is what a generation has to spell. Each set of template settings is proven
    before it is used: the turns that the template writes have to pass the grammar, and to be read back as the
    calls that they are.

    Args:
        renderer: the template, the tokenizer and the parser.
    """

    def __init__(self, renderer: TemplateRenderer) -> None:
        self._renderer = renderer
        self._alphabet = Alphabet(renderer)
        self._checker = Checker(renderer, self._alphabet)
        self._dialects: OrderedDict[str, Dialect] = OrderedDict()
        self._grammars: OrderedDict[tuple[str, ...], str] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def marks_calls(self) -> bool:
        """Whether calls have marks of their own; otherwise nothing keeps a text from reading as a call."""
        parser = self._renderer.parser
        marked = isinstance(parser, MarkupParser) and bool(parser.blocks)
        return marked or isinstance(parser, MessagesParser)

    def grammar(self, conversation: Conversation, prompt_token_ids: Sequence[int], demand: Demand) -> str:
        """Return a Lark grammar, in llguidance's dialect, of all generations that meet a demand.

        Args:
            conversation: what the prompt was rendered from: its tools and settings count.
            prompt_token_ids: the prompt; its end shows whether thinking is open.
            demand: what the generation has to be.

        Raises:
            PolicyError: a schema is not valid, or this model's format cannot be held to the demand.
        """
        try:
            settings = json.dumps(self._renderer.settings(conversation), sort_keys=True)
            tools = json.dumps([[tool.name, tool.parameters] for tool in conversation.tools])
            schema = json.dumps(demand.schema)
        except (TypeError, ValueError, RecursionError) as error:
            raise PolicyError(f"a schema is no JSON: {error}", param=demand.schema_param) from error
        with self._lock:
            self._check_tokenizer(demand)
            dialect = self._dialects.get(settings)
            if dialect is None:
                dialect = Dialect(self._renderer, self._alphabet, self._checker, json.loads(settings))
                _keep(self._dialects, settings, dialect)
            else:
                self._dialects.move_to_end(settings)
            state = dialect.thinking.state(prompt_token_ids)
            names = "*" if demand.names is None else json.dumps(sorted(demand.names))
            key = (settings, tools, schema, state, demand.calls, names, str(demand.max_calls))
            known = self._grammars.get(key)
            if known is None:
                known = _keep(self._grammars, key, dialect.grammar(conversation.tools, demand, state))
            else:
                self._grammars.move_to_end(key)
            return known

    def _check_tokenizer(self, demand: Demand) -> None:
        try:
            _ = self._checker.tokenizer
        except ValueError as error:
            param = demand.schema_param if demand.calls == "none" else demand.calls_param
            raise refuse(param, f"this model's tokenizer cannot be constrained: {error}") from error


def _keep(memory: OrderedDict[_K, _V], key: _K, value: _V) -> _V:
    """Remember a value; the least recently used goes."""
    memory[key] = value
    if len(memory) > _KEPT:
        memory.popitem(last=False)
    return value
