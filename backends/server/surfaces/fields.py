"""Reading the fields of a JSON object, with errors that name them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from backends.requests import invalid, refuse

__all__ = ["FieldReader"]


class FieldReader:
    """Reads an object's fields. A field that is null counts as one that is not there.

    Args:
        value: the object.
        param: its path in the request's body; the body itself has none.

    Raises:
        PolicyError: it is no object. So do the methods, where a field is not as it should be.
    """

    def __init__(self, value: Any, param: str = "") -> None:
        if not isinstance(value, Mapping):
            raise invalid(param, "must be an object")
        self.param = param
        self._fields: Mapping[str, Any] = value

    def path(self, name: str) -> str:
        """Return the path of a field."""
        return f"{self.param}.{name}" if self.param else name

    def items(self) -> list[tuple[str, Any]]:
        """Return the names and values of all fields."""
        return list(self._fields.items())

    def get(self, name: str) -> Any:
        """Return a field of any type."""
        return self._fields.get(name)

    def text(self, name: str) -> str:
        """Return a text that must be there."""
        text = self.optional_text(name)
        if text is None:
            raise invalid(self.path(name), "is missing")
        return text

    def optional_text(self, name: str) -> str | None:
        """Return a text."""
        value = self.get(name)
        if value is None or isinstance(value, str):
            return value
        raise invalid(self.path(name), f"must be text, not {_kind(value)}")

    def flag(self, name: str) -> bool | None:
        """Return true or false."""
        value = self.get(name)
        if value is None or isinstance(value, bool):
            return value
        raise invalid(self.path(name), f"must be true or false, not {_kind(value)}")

    def whole(self, name: str, least: int, most: int) -> int | None:
        """Return a whole number within bounds."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise invalid(self.path(name), f"must be a whole number from {least} to {most}")
        return value

    def entries(self, name: str) -> list[Any]:
        """Return a list; none is empty."""
        value = self.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise invalid(self.path(name), f"must be a list, not {_kind(value)}")
        return value

    def inner(self, name: str) -> FieldReader:
        """Return the reader of an object that must be there."""
        if self.get(name) is None:
            raise invalid(self.path(name), "is missing")
        return FieldReader(self.get(name), self.path(name))

    def only(self, known: Collection[str]) -> None:
        """Refuse fields that are not known, unless they are null."""
        for name, value in self._fields.items():
            if name not in known and value is not None:
                path = self.path(name)
                raise refuse(path, f"the field {path!r} is not supported by this server")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number")
