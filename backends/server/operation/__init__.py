"""What operating a server takes: keys, limits, deadlines, draining, metrics, logs, its description.

`operated_application` makes an application that has it all as middlewares, so that routes know nothing of it
except, where they stream, their `deadline_of(request)`.
"""

from backends.server.operation.application import operated_application
from backends.server.operation.auth import check_access, sees_details
from backends.server.operation.config import AccessConfig, OperationConfig, RequestLimits
from backends.server.operation.connections import serving
from backends.server.operation.deadline import Deadline, deadline_of
from backends.server.operation.logs import LogFormat, log_formatter
from backends.server.operation.observing import note
from backends.server.operation.openapi import Operation
from backends.server.operation.traffic import TRAFFIC, Traffic

__all__ = [
    "TRAFFIC",
    "AccessConfig",
    "Deadline",
    "LogFormat",
    "Operation",
    "OperationConfig",
    "RequestLimits",
    "Traffic",
    "check_access",
    "deadline_of",
    "log_formatter",
    "note",
    "operated_application",
    "sees_details",
    "serving",
]
