"""A verifier for output that must be JSON of a given form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gym_sdk.errors import ConfigurationError
from gym_sdk.schema import Rollout
from gym_sdk.verifiers.protocol import Verifier, named

__all__ = ["json_schema"]


def json_schema(schema: Mapping[str, Any] | bool) -> Verifier:
    """Make a verifier: 1 if the whole final text is JSON that validates against a schema.

    Needs the `jsonschema` package. The draft is the schema's `$schema`, else 2020-12. References to other
    documents are not fetched; one that matters fails the rollout.

    Args:
        schema: a JSON schema.

    Raises:
        ConfigurationError: the schema is not valid, or jsonschema is not installed.
    """
    try:
        import jsonschema
        import referencing
    except ImportError as error:
        raise ConfigurationError('json_schema needs jsonschema: pip install "gym-sdk[tasks]"') from error

    document: Any = dict(schema) if isinstance(schema, Mapping) else schema
    kind = jsonschema.validators.validator_for(document, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(document)
    except jsonschema.SchemaError as error:
        raise ConfigurationError(
            f"json_schema: the schema is not valid at {error.json_path}: {error.message}"
        ) from error
    validator = kind(document, registry=referencing.Registry())

    async def verify(rollout: Rollout) -> float:
        try:
            value = json.loads(rollout.output_text, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return float(validator.is_valid(value))

    return named("json_schema", verify)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
