"""A tokenizer's chat template, with what it can and cannot take found out by trying."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from pydantic_core import to_json

from gym_sdk.errors import ConfigurationError, PolicyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["KEEP_THINKING", "Abilities", "ChatTemplate"]

KEEP_THINKING: Mapping[str, Any] = {
    "preserve_thinking": True,
    "keep_past_thinking": True,
    "clear_thinking": False,
    "drop_thinking": False,
    "truncate_history_thinking": False,
    "auto_drop_analysis": False,
}
"""The switches by which templates offer to keep the thinking of earlier turns."""

_FAILURES = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What templates fail with, beside Jinja's own errors, on messages that they don't expect."""

_TAKEN = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Parameters of `apply_chat_template` that are no settings of the template."""

_PROBE = "qzv"
_CALL: dict[str, Any] = {"name": "qzv_f", "arguments": {"a": "b"}}
_TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "qzv_g", "description": "", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a chat template takes, found out by rendering short conversations.

    Attributes:
        parts: message contents go in as a list of parts instead of text.
        system: system messages are rendered.
        calls: the calls of an assistant message are rendered.
        call_content: the content of an assistant message that only calls.
        call_arguments: whether a call's arguments go in as a mapping or as JSON text.
        short_ids: call ids must have nine characters, as Mistral's templates ask.
        outputs: tool messages are rendered.
        tools: the functions on offer are rendered.
        thinking_key: the message field that holds thinking; None if it is never rendered.
        keep_thinking: template settings that keep the thinking of earlier turns.
    """

    parts: bool = False
    system: bool = True
    calls: bool = True
    call_content: str | None = ""
    call_arguments: Literal["mapping", "json"] = "mapping"
    short_ids: bool = False
    outputs: bool = True
    tools: bool = True
    thinking_key: str | None = None
    keep_thinking: Mapping[str, Any] | None = None


class ChatTemplate:
    """Renders chat messages to text through the tokenizer's template.

    Messages come in one form: text contents, `reasoning_content`, calls with mappings as arguments (or text
    where the policy wrote no JSON object); the template gets them in the form that it takes.

    Args:
        tokenizer: with a chat template.

    Raises:
        ConfigurationError: there is no template, or it cannot render a single user message.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        name = tokenizer.name_or_path or "this model"
        if not tokenizer.chat_template:
            raise ConfigurationError(
                f"the tokenizer of {name} has no chat template; "
                "use an instruction-tuned model, or set tokenizer.chat_template"
            )
        source = tokenizer.chat_template
        self.source = source if isinstance(source, str) else "\n".join(dict(source).values())
        self._tokenizer = tokenizer
        self.abilities = Abilities()
        self.abilities = self._find_abilities(name)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        settings: Mapping[str, Any] | None = None,
        generation_prompt: bool = False,
    ) -> str:
        """Render messages to text.

        Args:
            messages: see the class.
            tools: functions on offer, in the nested form of Chat Completions.
            settings: variables of the template.
            generation_prompt: whether the policy's next turn is opened.

        Raises:
            PolicyError: the template refuses these messages.
        """
        return self._apply(
            [self._prepared(message) for message in messages], tools, settings or {}, generation_prompt
        )

    def _apply(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        settings: Mapping[str, Any],
        generation_prompt: bool,
    ) -> str:
        from jinja2 import TemplateError

        tokenizer: Any = self._tokenizer
        taken = sorted(_TAKEN & settings.keys())
        if taken:
            raise PolicyError(
                f"{taken[0]!r} is no setting of a chat template",
                code="unsupported_value",
                param=f"chat_template_kwargs.{taken[0]}",
            )
        try:
            text: str = tokenizer.apply_chat_template(
                messages,
                tools=list(tools) if tools else None,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **settings,
            )
        except (TemplateError, *_FAILURES) as error:
            raise PolicyError(
                f"the model's chat template cannot render this conversation: {error}",
                code="unsupported_value",
                param="input",
            ) from error
        return text

    def _prepared(self, message: Mapping[str, Any]) -> dict[str, Any]:
        abilities = self.abilities
        prepared = dict(message)
        thinking = prepared.pop("reasoning_content", None)
        if thinking is not None and abilities.thinking_key:
            prepared[abilities.thinking_key] = thinking
        calls = prepared.get("tool_calls")
        if calls:
            if not prepared["content"]:
                prepared["content"] = abilities.call_content
            prepared["tool_calls"] = [self._prepared_call(call) for call in calls]
        if abilities.short_ids and "tool_call_id" in prepared:
            prepared["tool_call_id"] = _short_id(prepared["tool_call_id"])
        if abilities.parts and isinstance(prepared.get("content"), str):
            prepared["content"] = [{"type": "text", "text": prepared["content"]}]
        return prepared

    def _prepared_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        prepared, function = dict(call), dict(call["function"])
        if self.abilities.call_arguments == "json" and not isinstance(function["arguments"], str):
            function["arguments"] = to_json(function["arguments"]).decode()
        if self.abilities.short_ids:
            prepared["id"] = _short_id(prepared["id"])
        prepared["function"] = function
        return prepared

    def _find_abilities(self, name: str) -> Abilities:
        user = {"role": "user", "content": _PROBE}
        texts: dict[bool, str | None] = {}
        for parts in (False, True):
            self.abilities = Abilities(parts=parts)
            texts[parts] = self._try([user])
            if _PROBE in (texts[parts] or ""):
                break
        else:
            raise ConfigurationError(f"the chat template of {name} does not render a user message")
        system = {"role": "system", "content": "qzv_s"}
        found: dict[str, Any] = self._find_calls(parts)
        found["system"] = "qzv_s" in (self._try([system, user]) or "")
        self.abilities = Abilities(**found)
        found["tools"] = _TOOL["function"]["name"] in (self._try([user], tools=[_TOOL]) or "")
        found["thinking_key"] = self._find_thinking_key()
        self.abilities = Abilities(**found)
        if found["thinking_key"]:
            found["keep_thinking"] = self._find_keep_thinking()
        return Abilities(**found)

    def _find_calls(self, parts: bool) -> dict[str, Any]:
        """Return the first way in which a call and its output are rendered, or the nearest to it."""
        best: dict[str, Any] = {"parts": parts, "calls": False, "outputs": False}
        for short_ids in (False, True):
            for content in ("", None):
                for arguments in ("mapping", "json"):
                    found: dict[str, Any] = {
                        "parts": parts,
                        "calls": True,
                        "call_content": content,
                        "call_arguments": arguments,
                        "short_ids": short_ids,
                        "outputs": True,
                    }
                    self.abilities = Abilities(**found)
                    text = self._try(_call_probe("qzv_o")) or ""
                    if _CALL["name"] in text and "qzv_o" in text:
                        return found
                    if "qzv_o" in text and not best["outputs"]:
                        best = {**found, "calls": False}
        return best

    def _find_thinking_key(self) -> str | None:
        user = self._prepared({"role": "user", "content": "."})
        answer = self._prepared({"role": "assistant", "content": "a"})
        calling = self._prepared(_call_probe("")[1])
        for key in ("reasoning_content", "thinking", "reasoning"):
            for turn in (answer, calling):
                try:
                    text = self._apply([user, {**turn, key: "qzv_t"}], None, {}, False)
                except PolicyError:
                    continue
                if "qzv_t" in text:
                    return key
        return None

    def _find_keep_thinking(self) -> dict[str, Any] | None:
        """Return the settings that keep thinking in front of a new user message, if the template has them."""
        offered = {name: value for name, value in KEEP_THINKING.items() if name in self.source}
        if not offered:
            return None
        messages = [
            {"role": "user", "content": "."},
            {"role": "assistant", "content": "a", "reasoning_content": "qzv_t"},
            {"role": "user", "content": "."},
        ]
        return offered if "qzv_t" in (self._try(messages, settings=offered) or "") else None

    def _try(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str | None:
        try:
            return self.render(messages, **options)
        except PolicyError:
            return None


def _call_probe(output: str) -> list[dict[str, Any]]:
    call_id = "call_0123456789"
    return [
        {"role": "user", "content": "."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": call_id, "type": "function", "function": _CALL}],
        },
        {"role": "tool", "tool_call_id": call_id, "name": _CALL["name"], "content": output},
    ]


def _short_id(call_id: str) -> str:
    """Return nine letters and digits that stand for a call id; an id that has that form stays."""
    if len(call_id) == 9 and call_id.isalnum():
        return call_id
    return blake2b(call_id.encode(), digest_size=5).hexdigest()[:9]
