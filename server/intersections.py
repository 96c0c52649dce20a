"""Which grammars ask for intersections of regular expressions that may take for ever.

A state of an intersection is one of each expression, so they may be as many as their product, and llguidance looks at
all that follow one state before it counts what they cost: no limit of its own ends that. Complements are intersections
in disguise. What is no intersection takes no more than its limits allow.
"""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import unquote

MAX_INTERSECTED = 2
"""Patterns and formats that bind one string of a JSON schema, its length apart."""
_MOST_MERGED = 20_000
"""Places at which several parts of a schema meet: what is looked through before it is refused."""
_LARK = re.compile(
    r"""(?://|\#)[^\n]*|"(?:\\.|[^"\\\x00-\x1f\x7f])*"|/(?:\\.|[^/\\])+/|<[^<>\s]+>"""
    r"""|%json(?P<json>\s*)|(?P<wrong>&|~(?![ \t]*[+-]?\d))"""
)
"""Comments, strings, expressions and special tokens; and what matters. `~` before a number only repeats."""
_Tree = dict[str, Any]
"""Expressions that bind a value, by the empty name, and trees of what it contains: by property, item and the like."""


def fault_of_lark(grammar: str) -> str:
    """Why a Lark grammar cannot be followed safely, if it cannot."""
    if grammar.lstrip().startswith("{"):
        return "it is neither Lark nor GBNF"  # but the library's own JSON
    place = 0
    while found := _LARK.search(grammar, place):
        place = found.end()
        if found["wrong"]:
            return (
                f"terminals with {found['wrong']} (intersections, complements) may take for ever, and are not supported"
            )
        if found["json"] is not None:
            schema, place = _json_at(grammar, place)
            if fault := fault_of_schema(schema):
                return fault
    return ""


def fault_of_schema(schema: Any) -> str:
    """Why a JSON schema cannot be followed safely, if it cannot."""
    try:
        most = _most(_Schema(schema).tree(schema))
    except (_TooManyError, RecursionError):
        return "too many parts of the schema bind the same values (allOf, $ref)"
    if most > MAX_INTERSECTED:
        return f"{most} patterns or formats bind the same string; at most {MAX_INTERSECTED} are supported"
    return ""


def _json_at(text: str, place: int) -> tuple[Any, int]:
    """A JSON value and where it ends; None if there is none, of which the library speaks."""
    try:
        return json.JSONDecoder().raw_decode(text, place)
    except ValueError:
        return None, place


class _TooManyError(Exception):
    """It would take too long to find out."""


class _Schema:
    """One document."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._open: set[str] = set()
        """References that are being followed: those that lead back to themselves add nothing."""
        self._known: dict[str, _Tree] = {}
        self._merged = 0

    def tree(self, schema: Any) -> _Tree:
        """Of a part of it."""
        if not isinstance(schema, dict):
            return {"": 0}
        own: _Tree = {"": ("pattern" in schema) + ("format" in schema)}
        for keyword in ("properties", "patternProperties"):
            own |= {f".{name}": self.tree(value) for name, value in _items(schema.get(keyword))}
        for keyword in ("items", "additionalProperties", "additionalItems"):
            own |= {keyword: self.tree(schema[keyword])} if isinstance(schema.get(keyword), dict) else {}
        own |= {str(place): self.tree(part) for place, part in enumerate(_parts(schema.get("prefixItems")))}
        together = [own, *map(self.tree, _parts(schema.get("allOf")))]
        for keyword in ("anyOf", "oneOf"):
            if parts := [self.tree(part) for part in _parts(schema.get(keyword))]:
                together.append(self._merge(parts, max))
        if isinstance(reference := schema.get("$ref"), str):
            together.append(self._referred(reference))
        return self._merge(together, sum)

    def _referred(self, reference: str) -> _Tree:
        if reference in self._known or reference in self._open:
            return self._known.get(reference, {"": 0})
        self._open.add(reference)
        self._known[reference] = tree = self.tree(self._find(reference))
        self._open.remove(reference)
        return tree

    def _find(self, reference: str) -> Any:
        """What a reference within the document means; of others and of broken ones the library knows what to say."""
        part = self._root
        for step in unquote(reference).split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(part, list) and step.isdecimal() and int(step) < len(part):
                part = part[int(step)]
            else:
                part = part.get(step) if isinstance(part, dict) else None
        return part

    def _merge(self, trees: list[_Tree], combine: Callable[[Iterable[int]], int]) -> _Tree:
        if len(trees) == 1:
            return trees[0]
        self._merged += sum(map(len, trees))
        if self._merged > _MOST_MERGED:
            raise _TooManyError
        merged: _Tree = {"": combine(tree[""] for tree in trees)}
        for name in dict.fromkeys(name for tree in trees for name in tree if name):
            merged[name] = self._merge([tree[name] for tree in trees if name in tree], combine)
        return merged


def _most(tree: _Tree) -> int:
    """The most expressions that bind one value; what several trees share is looked at once."""
    most, seen, rest = 0, set[int](), [tree]
    while rest:
        node = rest.pop()
        if id(node) not in seen:
            seen.add(id(node))
            most = max(most, node[""])
            rest += [child for name, child in node.items() if name]
    return most


def _items(value: Any) -> Iterable[tuple[str, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _parts(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
