"""All routes of the server, as `/openapi.json` describes them. A route that is missing here fails a test."""

from __future__ import annotations

from typing import Any

from backends.server.idempotency import KEY_HEADER
from backends.server.operation import Operation
from backends.server.surfaces.messages_body import MessagesRequest, PromptRequest
from backends.server.tokenizing import DetokenizeRequest, TokenizeAnswer, TokenizeRequest
from gym_sdk.schema import Response, ResponseRequest

__all__ = ["OPERATIONS"]

_JSON = dict[str, Any]
_AFTER = {"after": "how many calls are known already"}
_READ = {"stream": "whether to follow its events", "starting_after": "the last event that is known"}
_PAGE = {"after": "the last item that is known", "limit": "how many", "order": "`asc` or `desc`"}
_VERSION = {"weight_version": "labels the weights"}
_KEYED = {KEY_HEADER: "names the call: sent again under the same key, it is answered again, but sampled once"}

OPERATIONS = (
    Operation(
        "POST",
        "/v1/responses",
        "Generate",
        ResponseRequest,
        Response,
        streams=True,
        captured=True,
        headers=_KEYED,
    ),
    Operation(
        "POST", "/v1/responses/input_tokens", "Count a prompt's tokens", ResponseRequest, captured=True
    ),
    Operation(
        "GET", "/v1/responses/{response_id}", "Read a response", answer=Response, query=_READ, captured=True
    ),
    Operation("DELETE", "/v1/responses/{response_id}", "Forget a response", captured=True),
    Operation("GET", "/v1/responses/{response_id}/input_items", "List its input", query=_PAGE, captured=True),
    Operation("POST", "/v1/responses/{response_id}/cancel", "Cancel it in the background", captured=True),
    Operation("POST", "/v1/chat/completions", "Generate", _JSON, streams=True, captured=True, headers=_KEYED),
    Operation("POST", "/v1/completions", "Continue a text or token ids", _JSON, streams=True, headers=_KEYED),
    Operation(
        "POST", "/v1/messages", "Generate", MessagesRequest, streams=True, captured=True, headers=_KEYED
    ),
    Operation("POST", "/v1/messages/count_tokens", "Count a prompt's tokens", PromptRequest, captured=True),
    Operation("POST", "/tokenize", "Tokenize a prompt or a chat", TokenizeRequest, TokenizeAnswer),
    Operation("POST", "/detokenize", "Turn tokens into text", DetokenizeRequest),
    Operation("POST", "/v1/tokenize", "Tokenize a prompt or a chat", TokenizeRequest, TokenizeAnswer),
    Operation("POST", "/v1/detokenize", "Turn tokens into text", DetokenizeRequest),
    Operation("GET", "/v1/models", "List the model", captured=True),
    Operation("GET", "/v1/models/{model}", "Describe the model", captured=True),
    Operation("POST", "/rollouts/{rollout_id}", "Begin a capture", status=201),
    Operation("GET", "/rollouts/{rollout_id}", "Read a capture", query=_AFTER),
    Operation("DELETE", "/rollouts/{rollout_id}", "End a capture and read the rest of it", query=_AFTER),
    Operation("GET", "/health", "Tell how the server is"),
    Operation("GET", "/metrics", "Tell figures in Prometheus's format", answer=bytes),
    Operation("GET", "/openapi.json", "Describe all routes"),
    Operation("POST", "/pause_generation", "Pause the engine", _JSON),
    Operation("POST", "/continue_generation", "Let it go on"),
    Operation("POST", "/abort_request", "Abort all generations", _JSON),
    Operation("POST", "/update_weights_from_disk", "Load weights from a folder", _JSON),
    Operation("POST", "/update_weights_from_tensor", "Load weights from the body", bytes, query=_VERSION),
    Operation("POST", "/update_weights_from_distributed", "Load weights from a group's broadcast", _JSON),
    Operation("POST", "/load_lora_adapter", "Load a LoRA adapter from a folder", _JSON),
    Operation("GET", "/get_world_size", "Tell how many ranks the engine takes in a group"),
    Operation("POST", "/init_weights_update_group", "Have the engine join a group", _JSON),
    Operation("POST", "/destroy_weights_update_group", "Have the engine leave a group", _JSON),
)
