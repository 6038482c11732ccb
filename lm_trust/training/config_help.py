"""The list of all configuration keys, printed from the models that check them."""

from __future__ import annotations

import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from lm_trust.training.config_errors import literals, variants
from lm_trust.training.config_yaml import write_yaml

_WIDTH, _KEY, _DEFAULT = 79, 21, 13


def key_listing(root: type[BaseModel]) -> str:
    """Every key of a world's config with its default and what it means, at most 79 columns wide."""
    lines = ["key, default, meaning", ""]
    sections = []
    for name, field in root.model_fields.items():
        if variants(field.annotation):
            sections.append((name, field))
        else:
            lines += _entry(name, field)
    for name, field in sections:
        lines += _section(name, field)
    return "\n".join(lines)


def _section(name: str, field: FieldInfo) -> Iterator[str]:
    choices = variants(field.annotation)
    is_list = typing.get_origin(field.annotation) is list
    default = field.get_default(call_default_factory=True, validated_data={})
    for kind, section in choices.items():
        yield ""
        if kind is None:
            yield f"{name} (a list of these, {name}.0 the first)" if is_list else name
            yield from _wrapped(f"{section.__doc__ or ''} {field.description or ''}", "  ")
        else:
            words = " (the default)" if kind == getattr(default, "kind", None) else ""
            yield f"{name}{f' (a list of these, {name}.0 the first)' if is_list else ''}, kind: {kind}{words}"
            yield from _wrapped(section.__doc__ or "", "  ")
        inner = []
        for key, entry in section.model_fields.items():
            if variants(entry.annotation):
                inner.append((f"{name}.{key}", entry))
            elif key != "kind":
                yield from _entry(f"  {key}", entry)
        for inner_name, entry in inner:
            yield from _section(inner_name, entry)


def _entry(name: str, field: FieldInfo) -> list[str]:
    words = field.description or ""
    names = list(literals(field.annotation))
    if names:
        words += f" ({', '.join(names)})"
    default = "required" if field.is_required() else _yaml(field.get_default(call_default_factory=True))
    start = f"{name:<{_KEY - 1}} {default:<{_DEFAULT - 1}} "
    if len(start) > _KEY + _DEFAULT:  # a long name or default: the words start on a line of their own
        return [start.rstrip(), *_wrapped(words, " " * (_KEY + _DEFAULT))]
    return textwrap.wrap(
        words, _WIDTH, initial_indent=start, subsequent_indent=" " * (_KEY + _DEFAULT), break_on_hyphens=False
    )


def _yaml(value: Any) -> str:
    return write_yaml(value).strip() if isinstance(value, list | dict) else write_yaml([value]).strip()[1:-1]


def _wrapped(words: str, indent: str) -> list[str]:
    words = " ".join(words.split())
    return textwrap.wrap(words, _WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
