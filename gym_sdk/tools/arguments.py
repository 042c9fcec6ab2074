"""From the JSON text that a model sent to the Python values that a function wants."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic.errors import PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind
from pydantic_core import from_json, to_json, to_jsonable_python

from gym_sdk.errors import ConfigurationError, ToolError
from gym_sdk.tools.signature import REQUIRED, Parameter
from gym_sdk.tools.strict import NotStrictError, accepts_null, resolve, strict_schema, without_titles

__all__ = ["Arguments"]

_MAX_PROBLEMS = 5
_MISSING = object()


class _QuietJsonSchema(GenerateJsonSchema):
    """A default that has no JSON form is left out, without a warning: the function still applies it."""

    def emit_warning(self, kind: JsonSchemaWarningKind, detail: str) -> None:
        """Say nothing."""


class Arguments:
    """The arguments of one tool: their schema, and the check of what a model sent.

    Attributes:
        schema: JSON schema as it is sent to the policy.
        strict: whether `schema` is in OpenAI's strict form.
    """

    def __init__(self, tool: str, parameters: Sequence[Parameter], *, strict: bool | None) -> None:
        """Build the schema.

        Args:
            tool: the tool's name, for messages.
            parameters: what the function takes.
            strict: True insists on OpenAI's strict form, False never uses it, None uses it if there is one.

        Raises:
            ConfigurationError: a parameter's type has no JSON schema, or `strict` cannot be met.
        """
        self._tool = tool
        self._parameters = tuple(parameters)
        self._fields = {parameter.name: f"arg_{i}" for i, parameter in enumerate(self._parameters)}
        self._model = self._build_model()
        self._plain = self._plain_schema()
        self._defs: dict[str, Any] = self._plain.get("$defs", {})
        self.schema, self.strict = self._plain, False
        if strict is not False:
            try:
                self.schema, self.strict = strict_schema(self._plain), True
            except NotStrictError as error:
                if strict:
                    raise ConfigurationError(f"tool {tool} cannot be strict: {error}") from error
        self._is_flat = all(
            _is_flat(schema, self._defs) for schema in self._plain.get("properties", {}).values()
        )
        self._validator = self._model.__pydantic_validator__
        self._positional = [parameter for parameter in self._parameters if parameter.positional_only]
        self._keywords = tuple(
            (parameter.name, self._fields[parameter.name])
            for parameter in self._parameters
            if not parameter.positional_only
        )

    def _build_model(self) -> type[BaseModel]:
        # The fields get neutral names: a user's argument may be called `schema`, `copy` or `_x`.
        fields: dict[str, Any] = {}
        for parameter in self._parameters:
            extra: dict[str, Any] = {"alias": parameter.name}
            if parameter.description:
                extra["description"] = parameter.description
            if parameter.default is not REQUIRED:
                extra["default"] = None
            fields[self._fields[parameter.name]] = (parameter.annotation, Field(**extra))
        try:
            model = create_model(self._tool, __config__=ConfigDict(extra="forbid"), **fields)
            model.model_json_schema(schema_generator=_QuietJsonSchema)
        except (PydanticUserError, TypeError, NameError) as error:
            raise self._unsupported(error) from error
        return model

    def _unsupported(self, error: Exception) -> ConfigurationError:
        """Find the argument that pydantic rejects."""
        for parameter in self._parameters:
            try:
                TypeAdapter(parameter.annotation).json_schema(schema_generator=_QuietJsonSchema)
            except (PydanticUserError, TypeError, NameError) as culprit:
                reason = str(culprit).partition("\n")[0]
                return ConfigurationError(
                    f"tool {self._tool}: the type of argument `{parameter.name}` has no JSON schema: {reason}"
                )
        return ConfigurationError(f"tool {self._tool}: {str(error).partition(chr(10))[0]}")

    def _plain_schema(self) -> dict[str, Any]:
        schema = without_titles(self._model.model_json_schema(schema_generator=_QuietJsonSchema))
        properties = schema.setdefault("properties", {})
        for parameter in self._parameters:
            if parameter.default is REQUIRED:
                continue
            properties[parameter.name].pop("default", None)
            default = _jsonable(parameter.default)
            if default is not _MISSING:
                properties[parameter.name]["default"] = default
        return schema

    def parse(self, text: str) -> tuple[list[Any], dict[str, Any]]:
        """Check the arguments of a call.

        JSON types are not converted into each other: `"5"` is not an integer. Null for an argument that
        has a default and does not accept null means the default.

        Args:
            text: what the model wrote; empty text means no arguments.

        Returns:
            Positional and keyword arguments. What the model left out is left to the function's defaults.

        Raises:
            ToolError: the text is not a JSON object, or an argument is missing, unknown or of a wrong type.
        """
        model = self._parse_flat(text) if self._is_flat else None
        if model is None:
            model = self._parse_any(text)
        given, values = model.model_fields_set, model.__dict__
        # an argument that comes by position cannot be left out, so its default is passed in its place
        positional = [
            values[field] if (field := self._fields[parameter.name]) in given else parameter.default
            for parameter in self._positional
        ]
        return positional, {name: values[field] for name, field in self._keywords if field in given}

    def _parse_flat(self, text: str) -> BaseModel | None:
        """The short way, a fifth of the cost; None if only `_parse_any` can say what the text means."""
        try:
            model = self._validator.validate_json(text, strict=True)
        except ValueError:
            return None
        finite = all(value - value == 0 for value in model.__dict__.values() if type(value) is float)
        return model if finite else None

    def _parse_any(self, text: str) -> BaseModel:
        values = self._read_object(text)
        problems: list[str] = []
        values = self._normalise(values, self._plain, "", problems)
        if problems:
            raise self._error(problems)
        try:
            return self._model.model_validate_json(to_json(values, inf_nan_mode="constants"), strict=True)
        except ValidationError as error:
            raise self._error([self._describe(entry) for entry in error.errors(include_url=False)]) from None

    def _read_object(self, text: str) -> dict[str, Any]:
        if not text.strip():
            return {}
        try:
            values = from_json(text, allow_inf_nan=False)
        except ValueError as error:
            raise ToolError(
                f"the arguments of {self._tool} are not valid JSON: {error}", tool=self._tool
            ) from None
        if not isinstance(values, dict):
            raise ToolError(
                f"the arguments of {self._tool} must be a JSON object such as {self._example()}, "
                f"not {_kind(values)}",
                tool=self._tool,
            )
        return values

    def _example(self) -> str:
        return "{" + ", ".join(f'"{parameter.name}": ...' for parameter in self._parameters) + "}"

    def _normalise(self, value: Any, schema: Mapping[str, Any], path: str, problems: list[str]) -> Any:
        """Drop the nulls that mean a default; under strict, report keys that no object has."""
        if isinstance(value, float) and not math.isfinite(value):
            problems.append(f"`{path}`: the number is too large")
            return value
        schema = resolve(schema, self._defs)
        if isinstance(value, list) and isinstance(schema.get("items"), dict):
            return [
                self._normalise(entry, schema["items"], f"{path}.{i}", problems)
                for i, entry in enumerate(value)
            ]
        branches = schema.get("anyOf") or schema.get("oneOf")
        if branches:
            branch = self._branch_for(value, branches)
            return value if branch is None else self._normalise(value, branch, path, problems)
        properties = schema.get("properties")
        if not isinstance(value, dict) or not isinstance(properties, dict):
            return value
        required = schema.get("required", ())
        result: dict[str, Any] = {}
        for key, entry in value.items():
            child = properties.get(key)
            where = f"{path}.{key}".lstrip(".")
            if child is None:
                if self.strict:
                    problems.append(f"`{where}` is unknown; known here: {_names(properties)}")
                result[key] = entry
            elif entry is not None or key in required or accepts_null(child, self._defs):
                result[key] = self._normalise(entry, child, where, problems)
        return result

    def _branch_for(self, value: Any, branches: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
        """The branch of a union that fits an object or a list best, judged by its keys and tags."""
        best: Mapping[str, Any] | None = None
        known = -1
        for schema in (resolve(branch, self._defs) for branch in branches):
            if isinstance(value, list) and schema.get("type") == "array":
                return schema
            properties = schema.get("properties")
            if not isinstance(value, dict) or not isinstance(properties, dict):
                continue
            shared = value.keys() & properties.keys()
            if (
                len(shared) > known
                and value.keys() >= set(schema.get("required", ()))
                and all(_tag_matches(value[key], properties[key]) for key in shared)
            ):
                best, known = schema, len(shared)
        return best

    def _describe(self, entry: Mapping[str, Any]) -> str:
        where = ".".join(str(part) for part in entry["loc"]) or "arguments"
        if entry["type"] == "missing":
            return f"`{where}` is missing"
        if entry["type"] == "extra_forbidden":
            return f"`{where}` is unknown; known here: {_names(self._plain.get('properties', {}))}"
        shown = to_json(entry["input"], fallback=repr, inf_nan_mode="constants").decode()
        return f"`{where}`: {entry['msg']}, got {shown if len(shown) <= 80 else shown[:77] + '...'}"

    def _error(self, problems: Sequence[str]) -> ToolError:
        text = "; ".join(problems[:_MAX_PROBLEMS])
        if len(problems) > _MAX_PROBLEMS:
            text += f"; and {len(problems) - _MAX_PROBLEMS} more"
        return ToolError(f"invalid arguments for {self._tool}: {text}", tool=self._tool)


def _is_flat(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> bool:
    """Whether a value holds no objects and no list of numbers: then nothing in it needs `_normalise`."""
    schema = resolve(schema, defs)
    branches = schema.get("anyOf")
    if branches:
        return all(_is_flat(branch, defs) for branch in branches)
    if schema.get("type") == "array":
        items = schema.get("items")
        return isinstance(items, dict) and items.get("type") in ("string", "integer", "boolean")
    return schema.get("type") in ("string", "integer", "number", "boolean", "null")


def _tag_matches(value: Any, schema: Mapping[str, Any]) -> bool:
    if "const" in schema:
        return bool(value == schema["const"])
    return "enum" not in schema or value in schema["enum"]


def _names(properties: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}`" for name in properties) or "no arguments"


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _jsonable(value: Any) -> Any:
    try:
        return to_jsonable_python(value)
    except ValueError:
        return _MISSING
