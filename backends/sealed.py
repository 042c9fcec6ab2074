"""Thinking as an opaque text, for clients that keep nothing else of it (`reasoning.encrypted_content`).

It is sealed so that damage is noticed, not encrypted: whoever holds it was sent the thinking anyway.
"""

from __future__ import annotations

import base64
import binascii
import zlib
from hashlib import blake2b

__all__ = ["is_sealed", "seal", "unseal"]

_MARK = "gymr1."
_MAX_CHARS = 10 * 2**20


def seal(text: str) -> str:
    """Return an opaque text from which `unseal` restores this one."""
    data = text.encode("utf-8", "surrogatepass")
    packed = zlib.compress(_digest(data) + data)
    return _MARK + base64.urlsafe_b64encode(packed).decode()


def is_sealed(sealed: str) -> bool:
    """Whether a text looks like one of `seal`'s."""
    return sealed.startswith(_MARK)


def unseal(sealed: str) -> str:
    """Return what was sealed.

    Raises:
        ValueError: it was not made by `seal`, or was changed since.
    """
    if not is_sealed(sealed):
        raise ValueError("it was made elsewhere")
    try:
        packed = base64.b64decode(sealed[len(_MARK) :], altchars=b"-_", validate=True)
        # bounded: a small text may unpack to a huge one
        data = zlib.decompressobj().decompress(packed, _MAX_CHARS)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"it is damaged ({error})") from error
    digest, content = data[:8], data[8:]
    if digest != _digest(content):
        raise ValueError("it is damaged")
    return content.decode("utf-8", "surrogatepass")


def _digest(data: bytes) -> bytes:
    return blake2b(data, digest_size=8, person=b"gym-seal").digest()
