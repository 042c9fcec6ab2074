"""Stop strings, found token by token, against a search of every beginning of the text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parsers import setting

from backends.rendering.token_text import TokenText
from backends.stopping import Match, StopStrings, trim
from gym_sdk.errors import PolicyError

AT = setting("none", "special")
TOKENS = TokenText(AT.tokenizer)
ALPHABET = "ab é🙂"
TEXTS = st.lists(st.one_of(st.text(ALPHABET, max_size=6), st.sampled_from(["<think>", "the answer"]))).map(
    "".join
)
STOPS = st.lists(
    st.one_of(st.text(ALPHABET, min_size=1, max_size=5), st.sampled_from(["answer", "<think>a", "k>", "\n"])),
    max_size=4,
)


def naive(ids: list[int], stops: list[str]) -> Match | None:
    """Spell ever more of the generation, byte by byte, until it ends with a stop string."""
    whole = b"".join(map(TOKENS.bytes_of, ids))
    for size in range(1, len(whole) + 1):
        done = [stop for stop in stops if whole[:size].endswith(stop.encode())]
        if done:
            stop = max(done, key=lambda stop: len(stop.encode()))
            count = next(
                n for n in range(len(ids) + 1) if len(b"".join(map(TOKENS.bytes_of, ids[:n]))) >= size
            )
            return Match(stop, count, size - len(stop.encode()))
    return None


@settings(deadline=None)
@given(text=TEXTS, stops=STOPS, data=st.data())
def test_the_first_that_is_completed(text: str, stops: list[str], data: st.DataObject) -> None:
    ids = AT.encode(text)
    if data.draw(st.booleans()):
        ids = data.draw(st.lists(st.sampled_from(sorted({*ids, *AT.encode("aé🙂")})), max_size=20))
    expected, strings, fed = naive(ids, stops), StopStrings(stops, TOKENS), 0
    while fed < len(ids):
        size = data.draw(st.integers(1, len(ids) - fed))
        match = strings.feed(ids[fed : fed + size])
        fed += size
        if match is not None:
            assert match == expected
            return
        assert expected is None or expected.tokens > fed
    assert expected is None
    assert strings.feed([]) is None


@settings(deadline=None)
@given(text=st.text(ALPHABET), stops=STOPS, more=st.text(ALPHABET))
def test_held_text(text: str, stops: list[str], more: str) -> None:
    """What is not held is no part of a stop string, whatever follows; and not more is held than has to be."""
    held = StopStrings(stops, TOKENS).held(text)
    settled = text[: len(text) - held]
    assert any(text[len(settled) :] == stop[:held] for stop in stops) or not held
    for stop in stops:
        for start in range(len(settled)):
            assert stop in text[start:] or not (text + more)[start:].startswith(stop)


@settings(deadline=None)
@given(text=st.text(ALPHABET), stop=st.text(ALPHABET, min_size=1, max_size=3), more=st.text(ALPHABET))
def test_trimmed_text(text: str, stop: str, more: str) -> None:
    trimmed = trim(text + stop + more, stop)
    assert (text + stop).startswith(trimmed + stop)
    assert stop not in trimmed
    assert trim(trimmed, stop) == trimmed


def test_only_new_tokens_are_read() -> None:
    reads: list[int] = []

    class Counting(TokenText):
        def bytes_of(self, token_id: int) -> bytes:
            reads.append(token_id)
            return super().bytes_of(token_id)

    strings = StopStrings(["the end"], Counting(AT.tokenizer))
    ids = AT.encode("the answer " * 50)
    for token in ids:
        assert strings.feed([token]) is None
    assert reads == ids
    end = AT.encode("the end.")
    match = strings.feed(end)
    assert match is not None
    assert match.text_bytes == len("the answer " * 50)
    assert len(ids) < match.tokens <= len(ids) + len(end)


@pytest.mark.parametrize("stop", ["", "\ud800"])
def test_what_is_no_stop_string(stop: str) -> None:
    with pytest.raises(PolicyError) as caught:
        StopStrings(["a", stop], TOKENS)
    assert (caught.value.param, caught.value.status) == ("stop", 400)
