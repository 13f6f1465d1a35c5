"""The OpenAPI description of the application, ``/openapi.json``."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from serving.engine.facts import ModelFacts
from serving.server.options import ServerOptions

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS = {
    400: "A field or the body is invalid.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "The body is not JSON, or not a form.",
    429: "The queue is full; see Retry-After.",
    500: "The server failed.",
    503: "The server is starting or shutting down; see Retry-After.",
    504: "The request was not finished in time.",
}
IMAGES = {
    "type": "object",
    "required": ["created", "data"],
    "properties": {
        "created": {"type": "integer"},
        "data": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "b64_json": {"type": "string"},
                    "url": {"type": "string"},
                    "seed": {"type": "integer"},
                    "index": {"type": "integer"},
                    "codes": {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
                },
            },
        },
        "output_format": {"type": "string"},
        "size": {"type": "string"},
        "quality": {"type": "string"},
        "background": {"type": "string"},
        "usage": {"type": "object"},
    },
}


def operation(
    body: type[BaseModel], facts: ModelFacts, options: ServerOptions, content_type: str = "application/json"
) -> dict[str, Any]:
    """Arguments of a route that reads its body itself: the description of the body and of all responses.

    Args:
        body: fields of the request.
        facts: the model, whose name and size are the only valid ones.
        options: limits.
        content_type: of the request.
    """
    schema = body.model_json_schema()
    values = {"model": [facts.name, None], "size": ["auto", None]}
    if facts.resolution is not None:
        values["size"].append(f"{facts.resolution}x{facts.resolution}")
    for name, allowed in values.items():
        if name in schema["properties"]:
            schema["properties"][name] = {**schema["properties"][name], "enum": allowed}
    if (count := schema["properties"].get("n")) is not None:
        count["anyOf"][0]["maximum"] = options.max_images
    if (rows := schema["properties"].get("keep_rows")) is not None and facts.grid is not None:
        rows["anyOf"][0]["maximum"] = facts.grid
    errors: dict[int | str, dict[str, Any]] = {
        status: {"description": text, "content": {"application/json": {"schema": ERROR}}}
        for status, text in ERRORS.items()
    }
    success = {
        "description": "The images; with stream true, server-sent events.",
        "content": {"application/json": {"schema": IMAGES}, "text/event-stream": {"schema": {"type": "string"}}},
    }
    return {
        "openapi_extra": {"requestBody": {"required": True, "content": {content_type: {"schema": schema}}}},
        "responses": {200: success, **errors},
    }


def describe(app: FastAPI) -> None:
    """Make the description of an application, with the security scheme of API keys."""
    found = get_openapi(
        title=app.title,
        version="1",
        description="Images from a LlamaGen model, in the shape of OpenAI's images API.",
        routes=app.routes,
    )
    for route in app.routes:
        # Footgun: the framework's model of the description turns bounds into floats, which cannot hold 64 bits.
        if isinstance(route, APIRoute) and route.openapi_extra:
            found["paths"][route.path]["post"].update(route.openapi_extra)
    found.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, item in found["paths"].items():
        if path.startswith("/v1/"):
            for each in item.values():
                each["security"] = [{"key": []}, {}]
    app.openapi = lambda: found  # type: ignore[method-assign]
