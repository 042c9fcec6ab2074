"""One model's format under one set of template settings, as grammars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from backends.constraints.alphabet import Alphabet
from backends.constraints.answers import answer_schema
from backends.constraints.arguments import arguments, object_schema
from backends.constraints.checking import Checker
from backends.constraints.demand import Demand
from backends.constraints.lark import Grammar, either, json_rule, token
from backends.constraints.layout import Answers, Calls, answer_layout, call_layout
from backends.constraints.probes import CALL_ID, KEYS, NAMES, VALUES, WORD, Probes, probe_tools
from backends.constraints.thinking import Thinking
from backends.constraints.values import Unsupported
from backends.rendering.parsing.base import Parser
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.parsing.messages import MessagesParser
from backends.rendering.template import TemplateRenderer
from backends.requests import refuse
from gym_sdk.errors import PolicyError
from gym_sdk.schema import FunctionTool

__all__ = ["Dialect"]

_NEW_ID = "/[a-zA-Z0-9]{9}/"
"""Ids that policies write into their calls, as Mistral's do."""
_UNKNOWN_ANSWERS = "this model's answers are written in a form that cannot be constrained here"


class Dialect:
    """Writes grammars in a format that is read from what the template says.

    Args:
        renderer: the template, the tokenizer and the parser.
        alphabet: writes turns and marks.
        checker: proves what is built.
        settings: the template's settings.
    """

    def __init__(
        self, renderer: TemplateRenderer, alphabet: Alphabet, checker: Checker, settings: Mapping[str, Any]
    ) -> None:
        self._renderer = renderer
        self._alphabet = alphabet
        self._checker = checker
        self._probes = Probes(renderer, alphabet, settings)
        self.thinking = Thinking(renderer, alphabet)
        parser = renderer.parser
        self._spelled = [mark for mark in _marks(parser) if not checker.is_special(mark)]
        blocks = parser.blocks if isinstance(parser, MarkupParser) else ()
        self._openers = [alphabet.mark(mark) for mark in blocks]
        self._in_messages = isinstance(parser, MessagesParser)

    def grammar(self, tools: Sequence[FunctionTool], demand: Demand, state: str) -> str:
        """Return the grammar of all generations that meet a demand.

        Args:
            tools: the functions on offer.
            demand: what the generation has to be.
            state: how far the prompt has gone with thinking; see `Thinking.state`.

        Raises:
            PolicyError: a schema is not valid, or the format cannot be held to the demand.
        """
        grammar = Grammar(self._spelled)
        thinking = self.thinking.before(state, self._answers, lambda mark: self._until(grammar, mark))
        if demand.schema is None and demand.calls != "required":
            ways = self._free(grammar, tools, demand)
        else:
            ways = [] if demand.calls == "none" else [self._calls(grammar, tools, demand)]
            if demand.schema is not None:
                ways.append(self._answer(grammar, demand.schema, demand.schema_param))
            if not self._in_messages:
                thinking += " BLANK?"
        text = grammar.text(f"{thinking} {either(ways)}")
        error = self._checker.error(text)
        if error:
            raise PolicyError(
                f"the grammar of this request cannot be built: {error}",
                code="unsupported_parameter",
                param=demand.calls_param if demand.schema is None else demand.schema_param,
            )
        return text

    @cached_property
    def _answers(self) -> Answers | None:
        """How answers are written; None if that can't be told, or if they are not read as they are."""
        layout = answer_layout(self._probes)
        if layout is None or not self._checker.reads_answer(layout):
            return None
        return layout

    @cached_property
    def _layout(self) -> Calls | None:
        """How calls are written, proven on the probes; None if that can't be told or fails."""
        layout = call_layout(self._probes)
        if layout is None:
            return None
        tools = probe_tools()
        number, word = {KEYS[0]: VALUES[0]}, {KEYS[1]: WORD}
        turns: list[list[dict[str, Any]]] = [[number], [word], [{**number, **word}], [{}]]
        if layout.between is not None:
            turns += [[number, word], [word, {}]]
        grammar = Grammar(self._spelled)
        calls = [self._call(grammar, tool, layout, "tools") for tool in tools]
        text = grammar.text(self._sequence(grammar, layout, calls, None))
        for turn in turns:
            said = self._probes.calls(*turn)
            expected = list(zip(NAMES, turn, strict=False))
            if said is None or not self._checker.holds(text, "".join(said), tools, expected):
                return None
        return layout

    def _free(self, grammar: Grammar, tools: Sequence[FunctionTool], demand: Demand) -> list[str]:
        """Return expressions for free text, and, if it may call, for what goes over from that into calls."""
        stop = token(*self._renderer.stop_token_ids)
        if self._in_messages:
            if self._answers is None:
                raise refuse(demand.calls_param, _UNKNOWN_ANSWERS)
            before, after = self._around(self._answers)
            text = f"{before} TEXT {after}"
            return [text] if demand.calls == "none" else [text, self._calls(grammar, tools, demand)]
        if demand.calls == "none":
            return [f"TEXT {stop}"]
        opener = self._opener(self._calls_layout(demand))
        if opener is None:
            raise refuse(
                demand.calls_param,
                "this model's calls have no mark of their own, and cannot be told from text: "
                "strict functions need `required` or a named function here",
            )
        calls = self._calls(grammar, tools, demand, begun=opener)
        return [f"TEXT {stop}", f"{self._until(grammar, opener)} {calls}"]

    def _calls(
        self, grammar: Grammar, tools: Sequence[FunctionTool], demand: Demand, *, begun: str = ""
    ) -> str:
        """Return an expression for a turn of calls, up to the token that ends it.

        Args:
            grammar: takes the rules.
            tools: the functions on offer.
            demand: which and how many of them.
            begun: what already stands there of the first call.
        """
        layout = self._calls_layout(demand)
        if demand.schema is not None and not self._in_messages and self._opener(layout) is None:
            raise refuse(
                demand.calls_param,
                "this model's calls have no mark of their own, and cannot be told from an answer in JSON: "
                "ask for one or the other",
            )
        calls: list[tuple[str, str]] = []
        for index, tool in enumerate(tools):
            if demand.names is None or tool.name in demand.names:
                param = f"tools[{index}]"
                calls.append(self._call(grammar, tool, layout, param, begun))
                if not self._checker.reads(layout, tool):
                    message = f"the call of {tool.name!r} cannot be read back from what this model writes"
                    raise refuse(param, message)
        if not calls:
            raise PolicyError(
                "none of the functions that may be called is on offer", param=demand.calls_param
            )
        return self._sequence(grammar, layout, calls, demand.max_calls)

    def _call(
        self, grammar: Grammar, tool: FunctionTool, layout: Calls, param: str, begun: str = ""
    ) -> tuple[str, str]:
        """Return an expression for a function's call as the first of a turn, and as a later one."""
        try:
            schema = object_schema(tool.parameters)
            self._checker.check_schema(schema, f"{param}.parameters")
            written = arguments(
                schema, layout.parameters, grammar, self._alphabet, lambda mark: self._until(grammar, mark)
            )
        except Unsupported as error:
            raise refuse(f"{param}.parameters", f"{tool.name}: {error}") from error
        first, later = (
            f"{self._with_ids(grammar, text.replace(NAMES[0], tool.name))} {written}"
            for text in (layout.opening.removeprefix(begun), layout.between or "")
        )
        return first, later

    def _sequence(
        self, grammar: Grammar, layout: Calls, calls: Sequence[tuple[str, str]], most: int | None
    ) -> str:
        first = grammar.rule(either(one for one, _ in calls))
        end = f"{self._with_ids(grammar, layout.closing)} {self._alphabet.expression(layout.stop)}"
        if layout.between is None or most == 1:
            return f"{first} {end}"
        later = grammar.rule(either(one for _, one in calls))
        return f"{first} {later}{'*' if most is None else f'{{0,{most - 1}}}'} {end}"

    def _with_ids(self, grammar: Grammar, text: str) -> str:
        """Return an expression for a text, with any id where the probes had theirs."""
        pieces = CALL_ID.split(text)
        call_id = f" {grammar.terminal(_NEW_ID)} " if len(pieces) > 1 else ""
        return call_id.join(map(self._alphabet.expression, pieces))

    def _answer(self, grammar: Grammar, schema: Mapping[str, Any], param: str) -> str:
        """Return an expression for an answer that matches the schema, up to the token that ends it."""
        if self._answers is None:
            raise refuse(param, _UNKNOWN_ANSWERS)
        self._checker.check_schema(schema, param)
        try:
            schema = answer_schema(schema, self._renderer.parser)
        except Unsupported as error:
            raise refuse(param, str(error)) from error
        before, after = self._around(self._answers)
        return f"{before} {grammar.rule(json_rule(schema))} {after}"

    def _around(self, answers: Answers) -> tuple[str, str]:
        """Return expressions for what stands before an answer, and for what ends its turn."""
        return self._alphabet.expression(answers.opening), self._alphabet.expression(
            answers.closing + answers.stop
        )

    def _until(self, grammar: Grammar, mark: str) -> str:
        """Return an expression for free text up to and including a mark."""
        if self._alphabet.is_token(mark):
            return f"TEXT {self._alphabet.expression(mark)}"
        return grammar.until(mark)

    def _calls_layout(self, demand: Demand) -> Calls:
        if self._layout is None:
            raise refuse(
                demand.calls_param, "this model's calls are written in a form that cannot be constrained here"
            )
        return self._layout

    def _opener(self, layout: Calls) -> str | None:
        """Return the mark with which a turn's calls begin, if they begin with one."""
        return next((mark for mark in self._openers if layout.opening.startswith(mark)), None)


def _marks(parser: Parser) -> list[str]:
    """Return the marks that a parser looks for."""
    if isinstance(parser, MarkupParser):
        closers = [closer for closer in parser.blocks.values() if closer is not None]
        return [*parser.thinking, *parser.thinking.values(), *parser.blocks, *closers, *parser.inner]
    return [*parser.ends, *parser.inner] if isinstance(parser, MessagesParser) else []
