"""What `/openapi.json` says about the gateway's routes: request and response bodies of the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

VERSION = "0.1.0"

_PARAMETERS = {"type": "object", "additionalProperties": True}
_NAME = {"type": "string", "minLength": 1, "maxLength": 256}
_DATATYPE = {
    "type": "string",
    "enum": [
        *("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64"),
        *("FP16", "FP32", "FP64", "BYTES"),
    ],
}
_SHAPE = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 32}
_INPUT = {
    "type": "object",
    "required": ["name", "shape", "datatype", "data"],
    "properties": {"name": _NAME, "shape": _SHAPE, "datatype": _DATATYPE, "parameters": _PARAMETERS, "data": {}},
}
_INFER_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": _PARAMETERS,
        "inputs": {"type": "array", "minItems": 1, "maxItems": 256, "items": _INPUT},
        "outputs": {
            "type": "array",
            "maxItems": 256,
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {"name": _NAME, "parameters": _PARAMETERS},
            },
        },
    },
}
_INFER_RESPONSE = {
    "type": "object",
    "required": ["model_name", "outputs"],
    "properties": {
        "id": {"type": "string"},
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "shape", "datatype"],
                "properties": {"name": _NAME, "shape": _SHAPE, "datatype": _DATATYPE, "data": {"type": "array"}},
            },
        },
    },
}
_GENERATE_REQUEST = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "text_input": {"type": "string"}, "parameters": _PARAMETERS},
    "additionalProperties": True,
}
_OBJECT = {"type": "object"}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_REASONS = {
    400: "The request does not fit; the error says what",
    404: "Unknown model, version or path",
    405: "Another method is needed",
    408: "The body came too slowly",
    413: "The body is larger than the limit",
    415: "Content type or encoding is not taken",
    431: "The headers are larger than the limit",
    500: "The model failed",
    503: "No replica can take the request now; Retry-After says when to try again",
    504: "No answer before the deadline",
}


def describe(method: str, path: str) -> dict[str, Any]:
    """Keyword arguments of `FastAPI.add_api_route` for one route."""
    action = path.rsplit("/", 1)[-1]
    statuses = [400, 404, 405, 431, 503] if method == "GET" else list(_REASONS)
    responses: dict[int | str, Any] = {
        status: {"description": _REASONS[status], "content": {"application/json": {"schema": _ERROR}}}
        for status in statuses
    }
    content: dict[str, Any] = {"application/json": {"schema": _OBJECT}}
    extra: dict[str, Any] = {
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in ("model", "version")
            if f"{{{name}}}" in path
        ]
    }
    if method == "POST":
        schema = _INFER_REQUEST if action == "infer" else _GENERATE_REQUEST
        bodies: dict[str, Any] = {"application/json": {"schema": schema}}
        if action == "infer":
            content = {
                "application/json": {"schema": _INFER_RESPONSE},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            }
        elif action == "generate_stream":
            content = {"text/event-stream": {"schema": {"type": "string"}}}
        extra["requestBody"] = {"required": True, "content": bodies}
    responses[200] = {"description": "The answer", "content": content}
    # `response_model=None`: responses are made by hand, pydantic never sees a tensor
    return {"responses": responses, "openapi_extra": extra, "response_model": None}
