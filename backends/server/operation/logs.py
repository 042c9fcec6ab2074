"""Log lines for people or for programs; each that belongs to a request says to which."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

__all__ = ["LogFormat", "current_request_id", "log_formatter"]

LogFormat: TypeAlias = Literal["text", "json"]

current_request_id: ContextVar[str | None] = ContextVar("current_request_id", default=None)
"""The id of the request that the current task answers."""


def log_formatter(form: LogFormat) -> logging.Formatter:
    """Return what writes log records: readable lines, or one JSON object a line."""
    return _JsonFormatter() if form == "json" else _TextFormatter()


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = current_request_id.get()
        return super().formatMessage(record) + (f" [{request_id}]" if request_id else "")


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := current_request_id.get():
            fields["request_id"] = request_id
        fields |= getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, default=str)
