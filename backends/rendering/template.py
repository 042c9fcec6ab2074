"""A renderer for any tokenizer that has a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends.rendering.chat import chat_messages, chat_tools, is_policy_item
from backends.rendering.parsing import HermesParser, ParsedOutput
from backends.rendering.renderer import Bridge, Conversation
from gym_sdk.errors import ConfigurationError, PolicyError
from gym_sdk.schema import FunctionCallOutput, Item

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TemplateRenderer"]


class TemplateRenderer:
    """Renders through the tokenizer's own chat template.

    Bridging renders the new items after a neutral conversation and keeps what follows the neutral turn's
    closing token. That token is a special token, so the tail's ids do not depend on what stands before it;
    two different neutral turns have to give the same tail, else the bridge is refused.

    Args:
        tokenizer: with a chat template.
        stop_token_ids: tokens that end a turn; the tokenizer's EOS if empty.

    Raises:
        ConfigurationError: the tokenizer has no chat template or no end-of-turn token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_token_ids: frozenset[int] = frozenset()
    ) -> None:
        if not tokenizer.chat_template:
            raise ConfigurationError(
                f"the tokenizer of {tokenizer.name_or_path or 'this model'} has no chat template; "
                "use an instruction-tuned model, or set tokenizer.chat_template"
            )
        eos = tokenizer.eos_token_id
        if eos is not None:
            stop_token_ids |= {eos}
        if not stop_token_ids:
            raise ConfigurationError("the tokenizer names no end-of-turn token (eos_token)")
        decoder: Any = tokenizer
        self._tokenizer = decoder
        self._stop_token_ids = stop_token_ids
        self._closers: list[str] = [decoder.convert_ids_to_tokens(token) for token in stop_token_ids]
        self._parser = HermesParser(decoder, stop_token_ids)

    @classmethod
    def from_folder(cls, path: str | Path) -> TemplateRenderer:
        """Load the tokenizer, its template and the stop tokens of a model folder.

        Raises:
            ConfigurationError: the folder holds no tokenizer.
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
        return cls(tokenizer, stop)

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end a turn."""
        return self._stop_token_ids

    def render(self, conversation: Conversation) -> list[int]:
        """Render everything, up to and including the generation prompt."""
        messages = chat_messages(conversation.items, conversation.instructions)
        return self.encode(self._apply(messages, conversation, generation_prompt=True))

    def bridge(self, known: Sequence[int], conversation: Conversation, start: int) -> Bridge:
        """Extend `known` by what `conversation.items[start:]` renders to; see the class."""
        tail = self._tail(conversation, start)
        if tail.token_ids is None:
            return tail
        closer, *rest = tail.token_ids
        closed = bool(known) and known[-1] in self._stop_token_ids
        return Bridge([*known, *rest] if closed else [*known, closer, *rest])

    def parse(self, generation_token_ids: Sequence[int]) -> ParsedOutput:
        """Parse what was sampled; see `HermesParser`."""
        return self._parser.parse(generation_token_ids)

    def encode(self, text: str) -> list[int]:
        """Tokenize plain text; the template has placed the special tokens."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Turn ids into text, special tokens included."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=False)
        return text

    def _apply(
        self, messages: list[dict[str, Any]], conversation: Conversation, *, generation_prompt: bool
    ) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self._tokenizer.apply_chat_template(
                messages,
                tools=chat_tools(conversation.tools),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **conversation.template_kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise PolicyError(
                f"the model's chat template cannot render this conversation: {error}",
                code="unsupported_value",
                param="input",
            ) from error
        return text

    def _tail(self, conversation: Conversation, start: int) -> Bridge:
        """Return the closing token followed by the new items' ids, or the reason why there is none."""
        new = list(conversation.items[start:])
        if new and is_policy_item(new[0]):
            # Rendered next to the neutral turn, it would merge into that turn.
            return Bridge(None, "an assistant item that was not sampled follows a sampled turn")
        tails: set[str] = set()
        for neutral in _neutral_turns(conversation.items, start):
            try:
                tail = self._tail_after(neutral, new, conversation)
            except PolicyError as error:
                return Bridge(None, str(error))
            if tail is None:
                return Bridge(None, "the template does not close a turn with an end-of-turn token")
            tails.add(tail)
        if len(tails) != 1:
            return Bridge(None, "the template renders new items depending on what stands before them")
        ids = self.encode(tails.pop())
        if not ids or ids[0] not in self._stop_token_ids:
            return Bridge(None, "the end-of-turn token does not stand alone in this tokenizer")
        return Bridge(ids)

    def _tail_after(self, neutral: dict[str, Any], new: list[Item], conversation: Conversation) -> str | None:
        """Render the new items after a neutral turn; return the text from its closing token on."""
        before = chat_messages([], conversation.instructions)
        before += [{"role": "user", "content": "."}, neutral]
        base = self._apply(before, conversation, generation_prompt=False)
        cuts = [(base.rfind(text), text) for text in self._closers if text in base]
        if not cuts:
            return None
        cut, closer = max(cuts)
        if base[cut + len(closer) :].strip():
            return None
        full = self._apply([*before, *chat_messages(new)], conversation, generation_prompt=True)
        if not full.startswith(base):
            return None
        return full[cut:]


def _neutral_turns(items: Sequence[Item], start: int) -> list[dict[str, Any]]:
    """Return two assistant messages that may stand before the new items, with different content."""
    outputs = [item for item in items[start:] if isinstance(item, FunctionCallOutput)]
    turns: list[dict[str, Any]] = []
    for content in ("a", "bb"):
        turn: dict[str, Any] = {"role": "assistant", "content": content}
        if outputs:
            turn["tool_calls"] = [
                {
                    "id": output.call_id,
                    "type": "function",
                    "function": {"name": content, "arguments": {content: content}},
                }
                for output in outputs
            ]
        turns.append(turn)
    return turns
