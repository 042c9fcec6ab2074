"""A renderer for any tokenizer that has a chat template."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.rendering.attribution import Marks, Span
from backends.rendering.cache import RenderCache
from backends.rendering.chat import chat_messages, chat_tools, is_policy_item
from backends.rendering.chat_template import ChatTemplate
from backends.rendering.encoding import Encoder
from backends.rendering.neutral import left_out
from backends.rendering.new_items import Messages, NewItems
from backends.rendering.parsing import ParsedOutput, Parser, detect_parser, make_parser
from backends.rendering.renderer import Bridge, Conversation, Rendered
from backends.rendering.special import SpecialTokens
from backends.rendering.stops import closing_ids, header_of, opens_next
from backends.rendering.tail import TurnEnds
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.schema import FunctionTool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TemplateRenderer"]

_log = logging.getLogger(__name__)

_CHANCE = ("strftime_now", "random")
"""What makes a template render the same messages differently another time."""
_REWRITTEN = "the template rewrites its messages: special tokens in them stay special"


class TemplateRenderer:
    """Renders through the tokenizer's own chat template.

    To bridge, the new items are rendered after a neutral conversation, and what follows the neutral turn's
    closing token is kept. That token is a special token, so the ids after it do not depend on what stands
    before it. Two neutral conversations, with other words and of other length, have to give the same tail,
    else the bridge is refused. To splice, the same is done inside the real conversation, for templates whose
    tail depends on it.

    What users, tools and other agents wrote is text: where it spells a special token, it is tokenized as
    text, wherever the template's output shows which text is whose.

    Args:
        tokenizer: with a chat template.
        stop_token_ids: tokens that end a turn, beside the tokenizer's EOS and what the template closes
            turns with.
        parser: how generations are read (see `PARSERS`); None: found out from the template.
        template_kwargs: settings of the template for every request; a request's own go before them.
        keep_thinking: whether to switch on what the template offers to keep the thinking of earlier turns
            (see `KEEP_THINKING`). Settings that are given go before it.

    Raises:
        ConfigurationError: the tokenizer has no chat template or no end-of-turn token, or the parser is
            unknown.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: frozenset[int] = frozenset(),
        *,
        parser: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        keep_thinking: bool = True,
    ) -> None:
        self.template = ChatTemplate(tokenizer)
        kept = self.template.abilities.keep_thinking if keep_thinking else None
        self.template_kwargs = {**(kept or {}), **(template_kwargs or {})}
        encoder: Any = tokenizer
        self._tokenizer = tokenizer
        self._encoder = Encoder(tokenizer)
        changing = any(word in self.template.source for word in _CHANCE)
        self._cache = None if changing else RenderCache(self._render)
        special = self._encoder.special
        self._ends = TurnEnds(special, opens_next=opens_next(self.template, special))
        self._header = header_of(self.template, special)
        if tokenizer.eos_token_id is not None:
            stop_token_ids |= {tokenizer.eos_token_id}
        stop_token_ids |= closing_ids(self.template, self._ends, special)
        if not stop_token_ids:
            raise ConfigurationError("the tokenizer names no end-of-turn token (eos_token)")
        self._stops: dict[int, str] = {
            token_id: encoder.convert_ids_to_tokens(token_id) for token_id in stop_token_ids
        }
        self._stop_token_ids = stop_token_ids
        self.parser: Parser = make_parser(parser or detect_parser(encoder), encoder, stop_token_ids)

    @classmethod
    def from_folder(
        cls,
        path: str | Path,
        *,
        parser: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        keep_thinking: bool = True,
    ) -> TemplateRenderer:
        """Load the tokenizer, its template and the stop tokens of a model folder.

        Raises:
            ConfigurationError: the folder holds no tokenizer, or as the class.
        """
        from transformers import AutoTokenizer, GenerationConfig

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError) as error:
            raise ConfigurationError(f"no tokenizer can be loaded from {path}: {error}") from error
        stop: frozenset[int] = frozenset()
        if (Path(path) / "generation_config.json").is_file():
            eos = GenerationConfig.from_pretrained(str(path)).eos_token_id
            stop = frozenset([eos] if isinstance(eos, int) else eos or ())
        return cls(
            tokenizer, stop, parser=parser, template_kwargs=template_kwargs, keep_thinking=keep_thinking
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer."""
        return self._tokenizer

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end a turn."""
        return self._stop_token_ids

    @property
    def stop_tokens(self) -> list[str]:
        """The texts of the tokens that end a turn."""
        return sorted(self._stops.values())

    @property
    def special(self) -> SpecialTokens:
        """The tokenizer's special tokens."""
        return self._encoder.special

    def settings(self, conversation: Conversation) -> dict[str, Any]:
        """Return the template's settings for a conversation: its own go before the model's."""
        return {**self.template_kwargs, **conversation.template_kwargs}

    def render(self, conversation: Conversation) -> Rendered:
        """Render everything, up to and including the generation prompt."""
        if self._cache is None:
            return self._render(conversation)
        return self._cache.render(conversation, self.settings(conversation))

    def _render(self, conversation: Conversation) -> Rendered:
        text = self._apply(chat_messages(conversation.items, conversation.instructions), conversation, True)
        spans = self._spans(conversation, text)
        missing = left_out(conversation, 0, text, spans)
        if missing is not None:
            param = f"input[{missing}]"
            raise PolicyError(
                f"the model's chat template leaves out {param} "
                f"({conversation.items[missing].type}); it has no place for it",
                code="unsupported_value",
                param=param,
            )
        for index, tool in enumerate(conversation.tools):
            if tool.name not in text:
                raise PolicyError(
                    "the model's chat template does not show tools to the model; describe them in the "
                    f"instructions: {tool.name!r} occurs nowhere in the prompt",
                    code="unsupported_value",
                    param=f"tools[{index}]",
                )
        ids = self._encoder.encode_spans(text, spans or [])
        return Rendered(ids, lambda: self._encoder.owners(text, ids, spans, self._header))

    def bridge(self, known: Sequence[int], conversation: Conversation, start: int) -> Bridge:
        """Extend `known` by what `conversation.items[start:]` renders to; see the class."""
        system = chat_messages([], conversation.instructions)
        short = [*system, {"role": "user", "content": "."}]
        long = [*short, {"role": "assistant", "content": "ok"}, {"role": "user", "content": "and"}]
        return self._extend(known, conversation, start, (short, long))

    def splice(self, known: Sequence[int], conversation: Conversation, start: int) -> Bridge:
        """Extend `known` by what follows `items[start - 1]` in a rendering of everything; see the class."""
        first = start
        while first > 0 and is_policy_item(conversation.items[first - 1]):
            first -= 1
        before = chat_messages(conversation.items[:first], conversation.instructions)
        return self._extend(known, conversation, start, (before, before))

    def drops_thinking(self, conversation: Conversation, start: int) -> bool:
        """Whether the template leaves out a turn's thinking once the new items follow it."""
        key = self.template.abilities.thinking_key
        if key is None:
            return True
        try:
            new = self._new_items(conversation, start)
            word = new.words[0]
            turn = {**new.turn("a"), "reasoning_content": word}
            before = [*chat_messages([], conversation.instructions), {"role": "user", "content": "."}]
            return word not in self._apply([*before, turn, *new.messages], conversation, True)
        except PolicyError:
            return True

    def parse(
        self,
        generation: Sequence[int],
        *,
        prompt: Sequence[int] = (),
        tools: Sequence[FunctionTool] = (),
        partial: bool = False,
    ) -> ParsedOutput:
        """Parse what was sampled, with `self.parser`."""
        return self.parser.parse(generation, prompt=prompt, tools=tools, partial=partial)

    def encode(self, text: str) -> list[int]:
        """Tokenize plain text; the template has placed the special tokens."""
        return self._encoder.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens included."""
        return self._encoder.decode(token_ids)

    def _extend(
        self,
        known: Sequence[int],
        conversation: Conversation,
        start: int,
        histories: tuple[Messages, Messages],
    ) -> Bridge:
        """Append the new items to `known`, if they render the same after each history."""
        stop = self._stops.get(known[-1]) if known else None
        try:
            new = self._new_items(conversation, start)
            token, rest = new.tail(self._ends, histories[0], new.words[0]).after(stop)
            marked = new.marked_tail(self._ends, histories[1], new.words[1])
            if marked is not None and marked[0].after(stop) == (token, rest):
                spans = [span.moved(len(rest)) for span in marked[1]]
            else:
                other, spans = new.tail(self._ends, histories[1], new.words[1]).after(stop), None
                if other != (token, rest):
                    return Bridge(None, "the template renders new items depending on what stands before them")
                _log.debug(_REWRITTEN)
        except PolicyError as error:
            return Bridge(None, str(error))
        missing = left_out(conversation, start, rest, spans)
        if missing is not None:
            return Bridge(None, f"the template leaves out input[{missing}]")
        text = (token or "") + rest
        ids = self._encoder.encode_spans(text, [span.moved(len(text) - len(rest)) for span in spans or ()])
        if text and ids[0] != self.special.ids.get(self.special.split(text)[0]):
            return Bridge(None, "the token that ends the turn does not stand alone in this tokenizer")
        return Bridge([*known, *(ids if token is None else ids[1:])])

    def _new_items(self, conversation: Conversation, start: int) -> NewItems:
        def apply(messages: Messages, generation_prompt: bool) -> str:
            return self._apply(messages, conversation, generation_prompt)

        return NewItems(conversation, start, apply, calls=self.template.abilities.calls)

    def _spans(self, conversation: Conversation, text: str) -> list[Span] | None:
        """Return where the texts of the items stand in a rendering; None if the template rewrites them."""
        messages = chat_messages(conversation.items, conversation.instructions, wrap=Marks.wrap)
        try:
            plain, spans = Marks.read(self._apply(messages, conversation, True))
        except PolicyError:
            plain, spans = "", []
        if plain == text:
            return spans
        _log.debug(_REWRITTEN)
        return None

    def _apply(self, messages: Messages, conversation: Conversation, generation_prompt: bool) -> str:
        return self.template.render(
            messages,
            tools=chat_tools(conversation.tools),
            settings=self.settings(conversation),
            generation_prompt=generation_prompt,
        )
