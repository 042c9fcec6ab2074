"""Thinking that is sealed comes back as it was, or not at all."""

from __future__ import annotations

import base64
import zlib
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends import sealed
from backends.sealed import is_sealed, seal, unseal

ANY_TEXT = st.text(st.characters(codec=None))


@given(ANY_TEXT)
def test_what_was_sealed_comes_back(text: str) -> None:
    opaque = seal(text)
    assert opaque.isascii()
    assert is_sealed(opaque)
    assert unseal(opaque) == text


@given(ANY_TEXT, st.data())
def test_damage_is_noticed(text: str, data: st.DataObject) -> None:
    opaque = seal(text)
    at = data.draw(st.integers(0, len(opaque) - 1))
    other = data.draw(st.characters(codec="ascii").filter(lambda letter: letter != opaque[at]))
    damaged = opaque[:at] + other + opaque[at + 1 :]
    with suppress(ValueError):
        assert unseal(damaged) == text  # bits that base64 leaves unused


@pytest.mark.parametrize("foreign", ["", "gAAAAABf", "gymr1.", "gymr1.!!!", "gymr1." + "A" * 100])
def test_what_was_made_elsewhere_is_refused(foreign: str) -> None:
    with pytest.raises(ValueError, match=r"elsewhere|damaged"):
        unseal(foreign)


def test_a_small_text_does_not_unpack_to_a_huge_one() -> None:
    bomb = base64.urlsafe_b64encode(zlib.compress(bytes(10 * sealed._MAX_CHARS))).decode()
    with pytest.raises(ValueError, match="damaged"):
        unseal("gymr1." + bomb)
