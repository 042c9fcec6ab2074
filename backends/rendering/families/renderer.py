"""A renderer of one model family, by hand-written code of the package `renderers`."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from pydantic_core import to_json

from backends.rendering.chat import chat_messages, chat_tools, is_policy_item
from backends.rendering.encoding import Encoder
from backends.rendering.families.history import USER, first_items, neutral_history, new_messages, unseen
from backends.rendering.families.openings import generation_start, openings_of
from backends.rendering.families.package import known_families, new_renderer
from backends.rendering.families.reading import FamilyParser
from backends.rendering.parsing import ParsedOutput, Parser, make_parser
from backends.rendering.renderer import Bridge, Conversation, Rendered
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.schema import FunctionTool, Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["FamilyRenderer", "make_family_renderer"]

_MOST_SETTINGS = 16


@dataclass(frozen=True, slots=True)
class _Variant:
    """One of the package's renderers for one choice of settings.

    Attributes:
        renderer: the package's.
        openings: the ids right before a generation starts, after a user's message and after a tool's.
    """

    renderer: Any
    openings: list[list[int]]


class FamilyRenderer:
    """Renders, bridges and parses with one of the package's renderers.

    Where `TemplateRenderer` and our parsers serve a family, they are the better choice: here, text that
    spells a special token becomes that token, wherever it comes from, and a call's arguments are written
    anew in full renderings. A bridge counts only if it begins with exactly the tokens that were handed in
    and shows the new items.

    Args:
        family: one of `family_names()`.
        tokenizer: the model's, with the family's special tokens.
        parser: one of `PARSERS` to read generations with; None: the package's.
        template_kwargs: settings of the family for every request; a request's own go before them.
        keep_thinking: bridge past a new user message with the thinking before it, where the family and the
            settings allow it; otherwise the family's template decides.

    Raises:
        ConfigurationError: the package is not installed, there is no such family or parser, the tokenizer is
            not the family's, or it does not take these settings.
    """

    def __init__(
        self,
        family: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        parser: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
        keep_thinking: bool = True,
    ) -> None:
        names = known_families()
        if family not in names:
            raise ConfigurationError(f"there is no family {family!r}; choose one of {', '.join(names)}")
        self.family = family
        self.template_kwargs = dict(template_kwargs or {})
        self._tokenizer = tokenizer
        self._keep_thinking = keep_thinking
        self._encoder = Encoder(tokenizer)
        self._variants: OrderedDict[bytes, _Variant] = OrderedDict()
        try:
            renderer = self._variant(Conversation(())).renderer
        except PolicyError as error:
            raise ConfigurationError(str(error)) from error
        stops = frozenset(token for token in renderer.get_stop_token_ids() if token is not None)
        self._stop_token_ids: frozenset[int] = stops
        own: Any = tokenizer
        self.parser: Parser = (
            FamilyParser(family, renderer, self.decode) if parser is None else make_parser(parser, own, stops)
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
        return sorted(self.decode([token]) for token in self._stop_token_ids)

    def render(self, conversation: Conversation) -> Rendered:
        """Render everything, up to and including the generation prompt."""
        messages = chat_messages(conversation.items, conversation.instructions)
        rendered = self._rendered(messages, conversation)
        ids: list[int] = list(rendered.token_ids)
        self._check_shown(conversation, self.decode(ids))
        indices: list[int] = list(rendered.message_indices)
        items = first_items(conversation)
        return Rendered(ids, lambda: [items[index] if index >= 0 else -1 for index in indices])

    def bridge(self, known: Sequence[int], conversation: Conversation, start: int) -> Bridge:
        """Extend `known` by the package's rendering of `conversation.items[start:]`; see the class."""
        new_items = conversation.items[start:]
        if not new_items:
            return Bridge(None, "there are no new items")
        if any(is_policy_item(item) for item in new_items):
            return Bridge(
                None,
                f"the renderer of {self.family} extends no tokens by assistant items that were not sampled",
            )
        try:
            messages = new_messages(conversation, start)
            variant = self._variant(conversation)
        except PolicyError as error:
            return Bridge(None, str(error))
        cut = generation_start(known, variant.openings)
        if cut is None:
            return Bridge(None, f"the known tokens hold no generation prompt of {self.family}")
        try:
            extended = variant.renderer.bridge_to_next_turn(
                list(known[:cut]), list(known[cut:]), messages, tools=chat_tools(conversation.tools)
            )
        except Exception as error:  # another's code; a full rendering is always left
            return Bridge(None, f"the renderer of {self.family} failed: {type(error).__name__}: {error}")
        return self._checked(known, extended, new_items, start)

    def splice(self, known: Sequence[int], conversation: Conversation, start: int) -> Bridge:
        """Refuse: the package has no text between messages and tokens at which to cut."""
        return Bridge(None, f"the renderer of {self.family} cannot splice")

    def drops_thinking(self, conversation: Conversation, start: int) -> bool:
        """Whether a full rendering leaves out a turn's thinking once the new items follow it."""
        try:
            new = new_messages(conversation, start)
            said = to_json(new).decode()
            word = next(word for n in count() if (word := f"qzv{n}") not in said)
            messages = [*neutral_history(conversation, start, word), *new]
            return word not in self.decode(self._rendered(messages, conversation).token_ids)
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
        """Tokenize plain text."""
        return self._encoder.encode(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens included."""
        return self._encoder.decode(token_ids)

    def deviation(self) -> str | None:
        """Return how this renderer differs from the tokenizer's chat template, None if it does not.

        Two short conversations are compared. A tokenizer without a template deviates in nothing.
        """
        from backends.rendering.chat_template import ChatTemplate

        if not self._tokenizer.chat_template:
            return None
        try:
            template = ChatTemplate(self._tokenizer)
        except ConfigurationError:
            return None  # a template that cannot be used is why this renderer is
        system = {"role": "system", "content": "Be brief."}
        turns = [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Why?"}]
        for messages in ([dict(USER)], [system, dict(USER), *turns]):
            try:
                text = template.render(messages, settings=self.template_kwargs, generation_prompt=True)
                own = self._rendered(messages, Conversation(())).token_ids
            except PolicyError as error:
                return str(error)
            if self.encode(text) != list(own):
                return f"the chat template writes {text!r}, the renderer {self.decode(own)!r}"
        return None

    def _variant(self, conversation: Conversation) -> _Variant:
        settings = {**self.template_kwargs, **conversation.template_kwargs}
        key = to_json(sorted(settings.items()), fallback=repr)
        variant = self._variants.get(key)
        if variant is None:
            try:
                renderer = new_renderer(
                    self.family, self._tokenizer, settings, keep_thinking=self._keep_thinking
                )
            except ValueError as error:
                raise PolicyError(
                    f"the renderer of {self.family} cannot be made with the template settings {settings} "
                    f"and this tokenizer: {error}",
                    code="unsupported_value",
                    param="chat_template_kwargs",
                ) from error
            variant = self._variants[key] = _Variant(renderer, openings_of(renderer))
            if len(self._variants) > _MOST_SETTINGS:
                self._variants.popitem(last=False)
        self._variants.move_to_end(key)
        return variant

    def _rendered(self, messages: list[dict[str, Any]], conversation: Conversation) -> Any:
        renderer = self._variant(conversation).renderer
        try:
            return renderer.render(messages, tools=chat_tools(conversation.tools), add_generation_prompt=True)
        except Exception as error:  # another's code, on what a client sent
            raise PolicyError(
                f"the renderer of {self.family} cannot render this conversation: "
                f"{type(error).__name__}: {error}",
                code="unsupported_value",
                param="input",
            ) from error

    def _checked(self, known: Sequence[int], extended: Any, new_items: Sequence[Item], start: int) -> Bridge:
        """Take the package's bridge if it keeps what was known and shows what is new."""
        if extended is None:
            return Bridge(
                None, f"the renderer of {self.family} does not extend these tokens by the new items"
            )
        ids: list[int] = list(extended.token_ids)
        if ids[: len(known)] != list(known) or len(ids) == len(known):
            return Bridge(None, f"the renderer of {self.family} changes the tokens that it extends")
        missing = unseen(new_items, self.decode(ids[len(known) :]), start)
        if missing is not None:
            return Bridge(None, f"the renderer of {self.family} leaves out {missing}")
        return Bridge(ids)

    def _check_shown(self, conversation: Conversation, text: str) -> None:
        param = unseen(conversation.items, text)
        for index, tool in enumerate(conversation.tools):
            if param is None and tool.name not in text:
                param = f"tools[{index}]"
        if param is not None:
            raise PolicyError(
                f"the renderer of {self.family} leaves out {param}", code="unsupported_value", param=param
            )


def make_family_renderer(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    parser: str | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    keep_thinking: bool = True,
) -> FamilyRenderer:
    """Make the renderer of a family that was chosen by name; arguments and errors are the class's."""
    return FamilyRenderer(
        name, tokenizer, parser=parser, template_kwargs=template_kwargs, keep_thinking=keep_thinking
    )
