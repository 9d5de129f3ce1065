"""What `/openapi.json` says: the Open Inference Protocol's routes and bodies, with the served model's tensors.

Rows are any number; the schema spells out requests of one and of two rows, because JSON Schema cannot say that the
length of `data` is the product of `shape`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from serve_app.gateway.classification import MAX_CLASSES
from serve_app.gateway.model_server import ModelInfo
from serve_app.gateway.tensors import DTYPES, TensorSpec

SERVER_NAME = "shadecast"
VERSION = "0.1.0"

Schema = dict[str, Any]

_MAX_SPELLED_OUT = 4096
_NAME: Schema = {"type": "string", "minLength": 1, "maxLength": 256}
_NOT_OFFERED: Schema = {f"shared_memory_{what}": {"type": "null"} for what in ("region", "offset", "byte_size")}
_PARAMETERS: Schema = {"type": ["object", "null"], "properties": _NOT_OFFERED}
_SEQUENCE: Schema = {
    "anyOf": [
        {"type": "null"},
        {"type": "integer", "minimum": 0, "maximum": 2**64 - 1},
        {"type": "string", "maxLength": 512},
    ]
}
_CALL: Schema = {"timeout": {"type": ["integer", "null"], "minimum": 0}, "sequence_id": _SEQUENCE}
"""Parameters that the gateway itself reads; the model may read others."""
_GENERATE_PARAMETERS: Schema = {"type": ["object", "null"], "properties": _CALL}
_INFER_PARAMETERS: Schema = {
    "type": ["object", "null"],
    "properties": _CALL | _NOT_OFFERED | {"binary_data_output": {"type": ["boolean", "null"]}},
}
_DATATYPE: Schema = {"type": "string", "enum": list(DTYPES)}
_SHAPE: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 32}
_INFER_RESPONSE: Schema = {
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
_GENERATE_REQUEST: Schema = {
    "type": "object",
    "properties": {"id": {"type": ["string", "null"]}, "text_input": {}, "parameters": _GENERATE_PARAMETERS},
}
_OBJECT: Schema = {"type": "object"}
_ERROR: Schema = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
_COUNT: Schema = {"type": "integer", "minimum": 0}
_DURATION: Schema = {"type": "object", "required": ["count", "ns"], "properties": {"count": _COUNT, "ns": _COUNT}}
_STATISTICS: Schema = {
    "type": "object",
    "required": ["name", "last_inference", "inference_count", "execution_count", "inference_stats", "batch_stats"],
    "properties": {
        "name": _NAME,
        "version": {"type": "string"},
        "last_inference": _COUNT,
        "inference_count": _COUNT,
        "execution_count": _COUNT,
        "inference_stats": {"type": "object", "additionalProperties": _DURATION},
        "batch_stats": {"type": "array", "maxItems": 0},
    },
}
_INDEX_ENTRY: Schema = {
    "type": "object",
    "required": ["name", "state", "reason"],
    "properties": {
        "name": _NAME,
        "version": {"type": "string"},
        "state": {"enum": ["READY", "UNAVAILABLE"]},
        "reason": {"type": "string"},
    },
}
_ANSWERS: dict[str, Schema] = {
    "stats": {
        "type": "object",
        "required": ["model_stats"],
        "properties": {"model_stats": {"type": "array", "items": _STATISTICS}},
    },
    "config": {
        "type": "object",
        "required": ["name", "platform", "max_batch_size", "input", "output"],
        "properties": {"name": _NAME, "max_batch_size": {"const": 0}, "input": {"type": "array"}},
    },
    "index": {"type": "array", "items": _INDEX_ENTRY},
}
_OPTIONAL_BODIES: dict[str, Schema] = {
    "index": {"type": "object", "properties": {"ready": {"type": ["boolean", "null"]}}},
    "load": {"type": "object"},
    "unload": {"type": "object"},
}
_REASONS = {
    400: "The request does not fit; the error says what",
    403: "Always: models come and go with their Serve application",
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


def describe(method: str, path: str, info: ModelInfo) -> dict[str, Any]:
    """Keyword arguments of `FastAPI.add_api_route` for one route. Routes that the model lacks are not described."""
    action = path.rsplit("/", 1)[-1]
    forbidden = action in ("load", "unload")
    statuses = [400, 404, 405, 431, 503] if method == "GET" else [each for each in _REASONS if each != 403 or forbidden]
    responses: dict[int | str, Any] = {
        status: {"description": _REASONS[status], "content": {"application/json": {"schema": _ERROR}}}
        for status in statuses
    }
    served = {"model": info.name, "version": info.version}
    extra: Schema = {
        "parameters": [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "enum": [value]}}
            for name, value in served.items()
            if f"{{{name}}}" in path
        ]
    }
    content: Schema = {"application/json": {"schema": _ANSWERS.get(action, _OBJECT)}}
    if method == "POST" and action in _OPTIONAL_BODIES:
        extra["requestBody"] = {"content": {"application/json": {"schema": _OPTIONAL_BODIES[action]}}}
    elif method == "POST":
        schema = _infer_request(info) if action == "infer" else _GENERATE_REQUEST
        extra["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    if action == "infer":
        content = {
            "application/json": {"schema": _INFER_RESPONSE},
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        }
    elif action == "generate_stream":
        content = {"text/event-stream": {"schema": {"type": "object", "properties": {"data": {"type": "string"}}}}}
    if not forbidden:
        responses[200] = {"description": "The answer", "content": content}
    offered = info.infers if action == "infer" else info.generates if action.startswith("generate") else True
    # `response_model=None`: responses are made by hand, pydantic never sees a tensor
    return {"responses": responses, "openapi_extra": extra, "response_model": None, "include_in_schema": offered}


def _infer_request(info: ModelInfo) -> Schema:
    numbers = [spec.name for spec in info.outputs if spec.datatype not in ("BYTES", "BOOL", "BF16")]
    others = [spec.name for spec in info.outputs if spec.name not in numbers]
    kinds = [({"enum": names}, most) for names, most in ((numbers, MAX_CLASSES), (others, 0)) if names] or [(_NAME, 0)]
    outputs: Schema = {
        "type": ["array", "null"],
        "maxItems": 256,
        "items": {"anyOf": [_output(name, most) for name, most in kinds]},
    }
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": ["string", "null"]},
            "parameters": _INFER_PARAMETERS,
            "inputs": _inputs(info.inputs),
            "outputs": outputs,
        },
    }


def _output(name: Schema, most_classes: int) -> Schema:
    classes = {"type": ["integer", "null"], "minimum": 0, "maximum": most_classes}
    read = {"binary_data": {"type": ["boolean", "null"]}, "classification": classes}
    parameters = {"type": ["object", "null"], "properties": read | _NOT_OFFERED}
    return {"type": "object", "required": ["name"], "properties": {"name": name, "parameters": parameters}}


def _inputs(specs: tuple[TensorSpec, ...]) -> Schema:
    if not specs or any(math.prod(_shape(spec, 2)) > _MAX_SPELLED_OUT for spec in specs):
        tensor = {"name": _NAME, "shape": _SHAPE, "datatype": _DATATYPE, "parameters": _PARAMETERS, "data": {}}
        required = ["name", "shape", "datatype"]
        entry = {"type": "object", "required": required, "properties": tensor}
        return {"type": "array", "minItems": 1, "maxItems": 256, "items": entry}
    spelled_out = [
        {
            "type": "array",
            "prefixItems": [_input(spec, rows) for spec in specs],
            "minItems": len(specs),
            "maxItems": len(specs),
        }
        for rows in (1, 2)
    ]
    return {"anyOf": spelled_out}


def _input(spec: TensorSpec, rows: int) -> Schema:
    shape = _shape(spec, rows)
    count = math.prod(shape)
    return {
        "type": "object",
        "required": ["name", "shape", "datatype", "data"],
        "properties": {
            "parameters": _PARAMETERS | {"properties": _NOT_OFFERED | {"binary_data_size": {"type": "null"}}},
            "name": {"const": spec.name},
            "datatype": {"const": spec.datatype},
            "shape": {"const": list(shape)},
            "data": {"type": "array", "items": _element(spec.datatype), "minItems": count, "maxItems": count},
        },
    }


def _shape(spec: TensorSpec, rows: int) -> tuple[int, ...]:
    return tuple(rows if size == -1 else size for size in spec.shape)


def _element(datatype: str) -> Schema:
    dtype = DTYPES[datatype]
    if dtype.kind == "b":
        return {"type": "boolean"}
    if dtype.kind == "O":
        return {"type": "string"}
    if dtype.kind in "fV":
        largest = float(np.finfo(dtype).max) if dtype.kind == "f" else 3.3e38
        return {"type": "number", "minimum": -largest, "maximum": largest}
    limits = np.iinfo(dtype)
    return {"type": "integer", "minimum": int(limits.min), "maximum": int(limits.max)}
