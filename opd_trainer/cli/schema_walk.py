"""Where a dotted key leads in the tree of schemas, and what may stand there."""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any

from omegaconf import DictConfig, OmegaConf


@dataclass(frozen=True, slots=True)
class Step:
    """The end of a walk.

    Attributes:
        hint: type of what stands at the key; None when the key is unknown.
        owner: schema that was asked for the last name.
        at: dotted key of that schema, "" for the root.
        name: the last name that was looked up.
        added: the key is a new one of an open dictionary of plain values.
        unset: nodes on the way that hold nothing yet: dotted key -> schema class.
    """

    hint: Any
    owner: type
    at: str
    name: str
    added: bool = False
    unset: dict[str, type] = field(default_factory=dict)


def strip_optional(hint: Any) -> Any:
    """X of `X | None`, other hints unchanged."""
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        rest = [part for part in typing.get_args(hint) if part is not NoneType]
        return rest[0] if len(rest) == 1 else hint
    return hint


def is_schema(hint: Any) -> bool:
    """Whether `hint` is a dataclass."""
    return isinstance(hint, type) and is_dataclass(hint)


def field_names(schema: Any) -> list[str]:
    """Names of the fields of a dataclass, in order."""
    return [entry.name for entry in dataclasses.fields(schema)]


def is_open(hint: Any) -> bool:
    """Whether any name may follow: a dict."""
    return typing.get_origin(hint) is dict or hint is dict


def is_empty(node: Any) -> bool:
    """Whether there is no node, or one that holds null or nothing yet."""
    return node is None or (isinstance(node, DictConfig) and (node._is_none() or node._is_missing()))


def child(node: Any, name: str) -> Any:
    """The value under `name`, None where there is none."""
    if not isinstance(node, DictConfig) or is_empty(node) or OmegaConf.is_missing(node, name):
        return None
    return node._get_node(name) if name in node else None


def actual_type(hint: Any, node: Any) -> Any:
    """The schema that `node` really has, a subclass of `hint`."""
    kind = OmegaConf.get_type(node) if isinstance(node, DictConfig) and not is_empty(node) else None
    return kind if is_schema(kind) else hint


def walk(root: type, config: DictConfig, key: str) -> Step:
    """Follows `key` through `config`, whose schema is `root`."""
    raw: Any = root
    node: Any = config
    owner, at, added, unset = root, "", False, {}
    for name in key.split("."):
        hint = strip_optional(raw)
        if is_schema(hint):
            owner = actual_type(hint, node)
            if name not in field_names(owner):
                return Step(None, owner, at, name)
            raw = typing.get_type_hints(owner)[name]
        elif is_open(hint):
            raw = typing.get_args(hint)[1] if typing.get_args(hint) else Any
        else:
            return Step(None, owner, at, name)
        at = f"{at}.{name}" if at else name
        node = child(node, name)
        inner = strip_optional(raw)
        added = added or (is_open(hint) and node is None and not is_schema(inner))
        if is_schema(inner) and is_empty(node):
            unset[at] = inner
    unset.pop(key, None)
    return Step(raw, owner, at.rpartition(".")[0], key.rpartition(".")[2], added, unset)


def known_keys(schema: Any, node: Any, prefix: str = "") -> Iterator[str]:
    """Every key that can be set under `node`; the names of open dictionaries that are there are included."""
    schema = actual_type(schema, node)
    hints = typing.get_type_hints(schema)
    for name in field_names(schema):
        hint = hints[name]
        key, inner, below = f"{prefix}{name}", strip_optional(hint), child(node, name)
        if is_schema(inner):
            yield from known_keys(inner, below, f"{key}.")
        elif is_open(inner) and isinstance(below, DictConfig):
            value = typing.get_args(inner)[1]
            for entry in below:
                if is_schema(value):
                    yield from known_keys(value, child(below, str(entry)), f"{key}.{entry}.")
                else:
                    yield f"{key}.{entry}"
        else:
            yield key


def describe(hint: Any) -> str:
    """What may be written for a value of this type, for people."""
    if isinstance(hint, UnionType) or typing.get_origin(hint) is typing.Union:
        inner = strip_optional(hint)
        return f"{describe(inner)} or null" if inner is not hint else " or ".join(map(describe, typing.get_args(hint)))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return "one of " + ", ".join(member.name for member in hint)
    if typing.get_origin(hint) is list:
        return f"a list [a,b] of {describe(typing.get_args(hint)[0])} each"
    if is_open(hint) or is_schema(hint):
        return "several keys of its own"
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))
