"""Request schemas for the OpenAPI page: the routes read their bodies themselves, with clearer errors."""

from typing import Any

from pydantic import BaseModel


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose body is `kind`."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})
    content = {"application/json": {"schema": _inline(schema, definitions)}}
    return {"requestBody": {"required": True, "content": content}}


def _inline(node: Any, definitions: dict[str, Any]) -> Any:
    """Replace references, which would point nowhere inside the page, by what they stand for."""
    if isinstance(node, list):
        return [_inline(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        return _inline(definitions[node["$ref"].rpartition("/")[2]], definitions)
    return {key: _inline(value, definitions) for key, value in node.items()}
