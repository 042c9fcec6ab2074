"""What a parser says of a generation that goes on is what it says in the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.characters import EOS, CharacterTokens
from support.generations import CASES, short
from support.markup import MARKS, THINK
from support.parsed import shown
from support.parsers import TOOLS, Kind, Setting, setting
from support.trained import byte_level_tokenizer

from backends.reading import RendererReader
from backends.rendering import TemplateRenderer
from backends.rendering.families import make_family_renderer
from backends.rendering.parsing import PARSERS, ParsedOutput, make_parser
from backends.rendering.parsing.markup import MarkupParser
from backends.rendering.renderer import Conversation
from backends.sglang.parsing.reader import SGLangReader
from backends.sglang.parsing.routes import SGLangParsers
from backends.tiny.tokenizer import build_tokenizer
from gym_sdk.schema import Message

HEADERS = {
    "gpt_oss": "<|start|>assistant<|channel|>final<|message|>",
    "atem": "<|start|>assistant<|message|>",
}
"""What a prompt ends with so that an answer follows."""
SHORT = (
    *("é", "京都", "🙂🙂", "\ufffd", " ", "\n", "\n\n", "a", "thought"),
    *("<", "<|", "</", "<thi", "[", "[f(", "[TOOL_"),
    *("{", '{"a": 1}', '{"name', "; ", '{"name": "f", "parameters": {}}', '{"name": "f", "parameters": 1.'),
)
"""Characters of several bytes, and what may become something else."""


def assert_begins(part: ParsedOutput, whole: ParsedOutput) -> None:
    """Assert that `part` is a settled beginning of `whole`."""
    rows, final = shown(part.items), shown(whole.items[: len(part.items)])
    assert len(rows) == len(final)
    statuses = [(item.status, after.status) for item, after in zip(part.items, whole.items, strict=False)]
    if part.open:
        (kind, text), (kind_after, text_after) = rows.pop(), final.pop()
        assert (kind, text_after[: len(text)]) == (kind_after, text)
        assert statuses.pop()[0] == "in_progress"
    assert rows == final
    assert all(status == ("completed", "completed") for status in statuses)


@cache
def drawn(name: str, kind: Kind) -> st.SearchStrategy[list[int]]:
    """Ids as the format writes them and as nobody does, with stop tokens, cut anywhere."""
    at = setting(name, kind)
    texts = [at.encode(short(text)) for case, text, _ in CASES if case == name] or [at.encode("a")]
    cuts = st.tuples(st.sampled_from(texts), st.integers(0, 80), st.integers(0, 80))
    stretches = cuts.map(lambda cut: cut[0][min(cut[1:]) : max(cut[1:])])
    thinking = st.sampled_from([at.encode(text) for text in ("<think>hm\n</think>\n\n", "a\n</think>")])
    stops = st.just([at.eos])
    parts = st.lists(
        st.one_of(
            st.sampled_from(SHORT).map(at.encode),
            stretches,
            st.sampled_from(texts),
            thinking,
            at.ids,
            st.sampled_from(at.marks),
            stops,
        ),
        max_size=6,
    )
    return parts.map(lambda drawn: list(chain.from_iterable(drawn)))


@cache
def prompts(name: str, kind: Kind) -> st.SearchStrategy[list[int]]:
    at = setting(name, kind)
    texts = ["", "hi<|im_start|>", "<|im_start|><think>", "[THINK]", "<|channel>", "<|start|>assistant"]
    return st.sampled_from([at.encode(text) for text in [*texts, HEADERS.get(name, "")]])


@pytest.mark.parametrize("kind", ["special", "spelled", "bytes"])
@pytest.mark.parametrize("name", PARSERS)
@settings(deadline=None)
@given(data=st.data())
def test_settled_whatever_follows(name: str, kind: Kind, data: st.DataObject) -> None:
    at = setting(name, kind)
    prompt, ids = data.draw(prompts(name, kind)), data.draw(drawn(name, kind))
    other = data.draw(drawn(name, kind))

    def parse(ids: Sequence[int], *, partial: bool = False) -> ParsedOutput:
        return at.parser.parse(ids, prompt=prompt, tools=TOOLS, partial=partial)

    places: Sequence[int] = range(len(ids) + 1)
    if len(ids) > 60:
        places = sorted(data.draw(st.sets(st.integers(0, len(ids)), min_size=1, max_size=12)))
    parts = [parse(ids[:place], partial=True) for place in places]
    # What begins the next partial parse and the whole one at each place begins all whole parses after it.
    for before, after in pairwise(parts):
        assert_begins(before, after)
    for place, part in zip(places, parts, strict=True):
        assert_begins(part, parse(ids[:place]))
    cut = data.draw(st.sampled_from(range(len(places))))
    assert_begins(parts[cut], parse([*ids[: places[cut]], *other]))


def _thinking(at: Setting) -> tuple[str, str]:
    assert isinstance(at.parser, MarkupParser)
    return next(iter(at.parser.thinking.items()))


def _plain(at: Setting, data: st.DataObject) -> list[int]:
    return at.encode("A" + data.draw(st.text("ab Z.09,\néß京🙂", max_size=60)))


@pytest.mark.parametrize("kind", ["special", "spelled"])
@pytest.mark.parametrize("name", PARSERS)
@settings(deadline=None)
@given(data=st.data())
def test_plain_text_streams(name: str, kind: Kind, data: st.DataObject) -> None:
    """Only a character of which bytes are missing is held back."""
    at = setting(name, kind)
    prompt, ids = at.encode(HEADERS.get(name, "<|im_start|>")), _plain(at, data)
    for place in range(1, len(ids) + 1):
        part = at.parser.parse(ids[:place], prompt=prompt, partial=True)
        assert part.open
        assert shown(part.items) == [("text", at.decode(ids[:place]).rstrip("\ufffd"))]


@pytest.mark.parametrize("name", [name for name in PARSERS if name not in HEADERS])
@settings(deadline=None)
@given(data=st.data())
def test_thinking_streams(name: str, data: st.DataObject) -> None:
    at = setting(name, "special")
    opener, closer = _thinking(at)
    ids = _plain(at, data)
    for head, prompt in ((opener, ""), ("", f"<|im_start|>{opener}")):
        generation, context = [*at.encode(head), *ids], at.encode(prompt)
        part = at.parser.parse(generation, prompt=context or [at.eos], partial=True)
        assert part.open
        assert shown(part.items) == [("think", at.decode(ids).removesuffix("\n" if name == "gemma4" else ""))]
        part = at.parser.parse([*generation, *at.encode(closer)], prompt=context or [at.eos], partial=True)
        assert [item.status for item in part.items] == ["completed"]


def test_bytes_wait_for_the_end_of_their_row() -> None:
    """SentencePiece decodes bytes next to each other as a whole: one that is wrong spoils those before it."""
    at = setting("none", "bytes")
    prompt, row = at.encode("<|im_start|>"), at.encode("丂七")
    assert len(row) == 6

    def text(ids: list[int]) -> str:
        ((_, said),) = shown(at.parser.parse([*at.encode("a"), *ids], prompt=prompt, partial=True).items)
        return said

    assert text(row) == "a"
    assert text([*row, *at.encode("b")]) == "a丂七b"
    assert text([*row, row[0], *at.encode("b")]) == "a" + "\ufffd" * 7 + "b"


CALL = '{"name": "f", "parameters": {}}'


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", "a <tool_call>{}", [("text", "a ")]),
        ("hermes", "a <tool_call>{}</tool_call> b", [("text", "a <tool_call>{}</tool_call> b")]),
        ("hermes", "a </thi", [("text", "a </thi")]),
        ("hermes", " \n", []),
        ("hermes", "<think>hm</think>\n\n", [("think", "hm")]),
        ("gemma4", "<|channel>tho", [("think", "")]),
        ("gemma4", "<|channel>thought\nhm\n", [("think", "hm")]),
        ("llama3_json", f"{CALL}; {CALL} ; ", [("call", "f", "{}")] * 2),
        ("llama3_json", f"{CALL}; {CALL}, so", [("call", "f", "{}")] * 2 + [("text", ", so")]),
        ("llama3_json", f"{CALL}; {CALL[:-1]}", [("call", "f", "{}")]),
        ("llama3_json", '{"a": 1', []),
        ("llama3_json", '{"a": 1} is', [("text", '{"a": 1} is')]),
        ("llama3_json", '{"a": b} is what I mean by it', [("text", '{"a": b} is what I mean by it')]),
        ("llama3_json", f" see {CALL[:9]}", [("text", f" see {CALL[:9]}")]),
        ("pythonic", "[f.g", []),
        ("pythonic", "[1, 2", [("text", "[1, 2")]),
        ("llama3_json", f"<|python_tag|>{CALL}; {CALL[:-1]}", [("call", "f", "{}")]),
        ("llama3_json", "<|python_tag|>f.call() is", []),
        ("mistral", "[TOOL_CALLS]f{}", []),
        (
            "mistral",
            "[TOOL_CALLS]f{}[TOOL_CALLS]g[ARGS]{} so",
            [("call", "f", "{}"), ("call", "g", "{}"), ("text", " so")],
        ),
        ("mistral", '[TOOL_CALLS][{"name": "f"}, {"name": "g"', [("call", "f", "{}")]),
        ("mistral", '[TOOL_CALLS][{"name": "f"}] so', [("call", "f", "{}"), ("text", " so")]),
        (
            "kimi_k2",
            short("a«K«kfunctions.f:0|arg|{}k»«kfunctions.g:1|arg|{}"),
            [("text", "a"), ("call", "f", "{}")],
        ),
        ("kimi_k2", short("a«K «kfunctions.f:0|arg|{k»"), [("text", "a")]),
        ("deepseek_v3", short("«D«df|sep|{}d»\n"), [("call", "f", "{}")]),
        ("gpt_oss", "<|channel|>analysis", []),
        ("gpt_oss", "<|channel|>analysis<|message|>hm", [("think", "hm")]),
        ("gpt_oss", "<|channel|>commentary to=f<|message|>{}", []),
        ("gpt_oss", "<|channel|>commentary to=f<|message|>{}<|end|><|start|>", [("call", "f", "{}")]),
        ("gpt_oss", "<|channel|>final<|message|>a<|end|><|start|>assistant", [("text", "a")]),
        ("atem", " to=self<|message|>hm<|eom|><|start|>assistant to=f<|message|>x", [("think", "hm")]),
    ],
)
def test_what_is_held_back(name: str, text: str, expected: list[tuple[str, ...]]) -> None:
    marks = (*MARKS[name], *THINK)
    if name == "pythonic":
        marks = ()
    tokens = CharacterTokens(marks)
    parser = make_parser(name, tokens, frozenset({EOS}))
    prompt = [EOS] if name not in HEADERS else ()
    output = parser.parse(tokens.encode(text), prompt=prompt, partial=True)
    assert shown(output.items) == expected
    # A stop token that is the last is no text, and any other is: till then it says nothing.
    stopped = parser.parse([*tokens.encode(text), EOS], prompt=prompt, partial=True)
    assert (shown(stopped.items), stopped.open) == (expected, output.open)


@pytest.mark.parametrize("name", [name for name in PARSERS if name not in HEADERS])
def test_without_a_prompt_a_later_mark_may_close_thinking(name: str) -> None:
    at = setting(name, "special")
    opener, closer = _thinking(at)

    def rows(text: str) -> list[tuple[str, ...]]:
        return shown(at.parser.parse(at.encode(text), partial=True).items)

    assert rows("so") == []
    assert rows(f"so{opener}") == [("text", "so"), ("think", "")]
    assert rows(f"so{closer}") == [("think", "so")]


@pytest.mark.asyncio
async def test_the_renderer_reads_partially() -> None:
    renderer = TemplateRenderer(build_tokenizer(1024))
    prompt = renderer.render(Conversation([Message(role="user", content="hi")])).token_ids
    output = await RendererReader(renderer).read(renderer.encode("It is 4 <thi"), prompt=prompt, partial=True)
    assert output.open
    assert shown(output.items)[0][1].startswith("It is 4")


class Silent:
    """A way to an SGLang that nobody may ask."""

    async def post(
        self, path: str, body: Mapping[str, Any], *, within_s: float | None = None
    ) -> dict[str, Any]:
        raise AssertionError(f"{path} was asked")


@pytest.mark.asyncio
async def test_readers_that_know_only_whole_generations() -> None:
    family = make_family_renderer(
        "minimax-m2", byte_level_tokenizer(["]~!b[", "]~b]", "[e~[", *MARKS["minimax_m2"], *THINK])
    )
    ids = family.encode("<think>hm</think>yes")
    assert family.parse(ids, partial=True) == ParsedOutput()
    reader = SGLangReader(Silent(), SGLangParsers("hermes", "qwen3"), family)
    assert await reader.read(ids, partial=True) == ParsedOutput()
    prover = await reader.prover(family, Conversation([]))
    assert prover.parse(ids, partial=True) == ParsedOutput()
