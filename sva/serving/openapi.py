"""The OpenAPI page of a server: every path of the API, what it takes and what it answers."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from sva.serving.bodies import LARGEST_WEIGHT, AdaptBody, ChatBody, CompletionBody, MixBody

_BODIES: tuple[type[BaseModel], ...] = (ChatBody, CompletionBody, MixBody, AdaptBody)
_TEXT, _NUMBER, _WHOLE = {"type": "string"}, {"type": "number"}, {"type": "integer"}
_NAME = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "maxLength": 64}}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": _TEXT,
                "type": _TEXT,
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_USAGE = {
    "type": "object",
    "required": ["prompt_tokens", "completion_tokens", "total_tokens"],
    "properties": {"prompt_tokens": _WHOLE, "completion_tokens": _WHOLE, "total_tokens": _WHOLE},
}
_COST = {
    "type": "object",
    "required": ["seconds", "read", "drawn", "flops"],
    "properties": {"seconds": _NUMBER, "read": _WHOLE, "drawn": _WHOLE, "flops": _NUMBER},
}
_SVA = {
    "type": "object",
    "description": "which experts answered, how sure the first pass was, what both passes cost",
    "required": ["experts", "second_pass"],
    "properties": {
        "experts": {"type": "object", "additionalProperties": _NUMBER},
        "label": _TEXT,
        "prob": _NUMBER,
        "probs": {"type": "object", "additionalProperties": _NUMBER},
        "first_pass": _COST,
        "second_pass": _COST,
    },
}
_EXPERT = {
    "type": "object",
    "required": ["name", "object", "label", "description", "digest", "in_use", "about"],
    "properties": {
        "name": _TEXT,
        "object": {"const": "expert"},
        "label": _TEXT,
        "description": _TEXT,
        "digest": _TEXT,
        "in_use": _WHOLE,
        "about": {"type": "object"},
    },
}
_WEIGHT = {
    "type": "object",
    "required": ["weight", "object", "rank"],
    "properties": {"weight": _TEXT, "object": {"const": "weight"}, "rank": _WHOLE},
}
_ALPHAS = {"type": "object", "additionalProperties": {"type": "number", "minimum": 0, "maximum": LARGEST_WEIGHT}}
_SPECTRUM = {
    "type": "object",
    "required": ["weight", "object", "experts", "s", "z"],
    "properties": {
        "weight": _TEXT,
        "object": {"const": "spectrum"},
        "experts": _ALPHAS,
        "s": {"type": "array", "items": _NUMBER, "description": "singular values, the largest first"},
        "z": {"type": "array", "items": _NUMBER, "description": "what the mixture multiplies each of them by"},
    },
}
_MODEL = {
    "type": "object",
    "required": ["id", "object", "created", "owned_by"],
    "properties": {"id": _TEXT, "object": {"const": "model"}, "created": _WHOLE, "owned_by": _TEXT},
}
_REASONS = {
    400: "the request makes no sense",
    401: "the token is missing or wrong",
    403: "a foreign host or origin",
    404: "no such model, expert, weight or path",
    408: "the body did not come in time",
    409: "no slot is free, or nothing is loaded",
    413: "the body is too large",
    429: "the queue is full; Retry-After says when to come again",
    500: "the server failed",
    503: "the server is shutting down",
    504: "the request took too long",
}


def page(title: str, *, needs_token: bool) -> dict[str, Any]:
    """The whole page, an OpenAPI 3.1 document."""
    _, schemas = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
    )
    document = {
        "openapi": "3.1.0",
        "info": {"title": f"sva serve: {title}", "version": "1"},
        "paths": _paths(),
        "components": {"schemas": schemas["$defs"] | {"Error": _ERROR}},
    }
    if needs_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document


def _paths() -> dict[str, Any]:
    choice = {"index": _WHOLE, "finish_reason": {"enum": ["stop", "length"]}, "logprobs": {}, "sva": _SVA}
    message = {"type": "object", "required": ["role", "content"], "properties": {"role": _TEXT, "content": _TEXT}}
    file = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    deleted = {"type": "object", "required": ["name", "deleted"], "properties": {"deleted": {"const": True}}}
    status = {"type": "object", "required": ["status"], "properties": {"status": _TEXT}}
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "maxLength": 256}}
    weight = {"name": "weight", "in": "path", "required": True, "schema": _TEXT}
    mixture = {"name": "mixture", "in": "query", "style": "form", "explode": True, "schema": _ALPHAS}
    mixture["description"] = "the weight of each expert, by its name: ?capitals=0.7&list_last=0.2"
    return {
        "/v1/chat/completions": {
            "post": _operation("Answer a chat", _completion(choice | {"message": message}), ChatBody, stream=True)
        },
        "/v1/completions": {
            "post": _operation("Continue prompts", _completion(choice | {"text": _TEXT}), CompletionBody, stream=True)
        },
        "/v1/models": {"get": _operation("The models", _list(_MODEL))},
        "/v1/models/{model}": {"get": _operation("One model", _MODEL) | {"parameters": [model]}},
        "/v1/experts": {
            "get": _operation("The loaded experts", _list(_EXPERT)),
            "post": _operation("Mix loaded experts into a new one", _EXPERT, MixBody),
        },
        "/v1/experts/{name}": {
            "put": _operation("Load an expert file", _EXPERT)
            | {"parameters": [_NAME], "requestBody": {"required": True, "content": file}},
            "delete": _operation("Drop an expert", deleted) | {"parameters": [_NAME]},
        },
        "/v1/adapt": {"post": _operation("Find the mixture that suits solved examples", _EXPERT, AdaptBody)},
        "/v1/spectra": {"get": _operation("The weights whose singular values experts scale", _list(_WEIGHT))},
        "/v1/spectra/{weight}": {
            "get": _operation("One weight's singular values, and the z of a mixture", _SPECTRUM)
            | {"parameters": [weight, mixture]}
        },
        "/healthz": {"get": _operation("Whether the server works", status)},
        "/readyz": {"get": _operation("Whether the server takes requests", status)},
        "/metrics": {"get": _operation("Prometheus metrics", None)},
    }


def _operation(
    summary: str, answer: dict[str, Any] | None, body: type[BaseModel] | None = None, *, stream: bool = False
) -> dict[str, Any]:
    """One method of a path."""
    content: dict[str, Any] = {"text/plain": {"schema": _TEXT}} if answer is None else {}
    if answer is not None:
        content["application/json"] = {"schema": answer}
    if stream:
        content["text/event-stream"] = {}  # events, each an object in JSON but the last
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    answers = {"200": {"description": "done", "content": content}}
    answers |= {str(status): {"description": why, "content": error} for status, why in _REASONS.items()}
    operation: dict[str, Any] = {"summary": summary, "responses": answers}
    if body is not None:
        schema = {"$ref": f"#/components/schemas/{body.__name__}"}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
    return operation


def _list(item: dict[str, Any]) -> dict[str, Any]:
    properties = {"object": {"const": "list"}, "data": {"type": "array", "items": item}}
    return {"type": "object", "required": ["object", "data"], "properties": properties}


def _completion(choice: dict[str, Any]) -> dict[str, Any]:
    """The answer of a completions endpoint, of choices with these properties."""
    choices = {"type": "array", "items": {"type": "object", "required": list(choice), "properties": choice}}
    properties = {"id": _TEXT, "object": _TEXT, "created": _WHOLE, "model": _TEXT, "choices": choices, "usage": _USAGE}
    return {"type": "object", "required": list(properties), "properties": properties}
