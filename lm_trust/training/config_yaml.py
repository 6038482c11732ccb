"""YAML as a config needs it: safe, no duplicate keys, and scalars that mean what they look like.

PyYAML follows YAML 1.1, where `1e-3` is text, `010` is eight and `1:30` is ninety. Numbers here are decimal
as in YAML 1.2, dates stay text, and text that looks like such a number is quoted when written. Aliases and
tags are refused: a config has `extends` for sharing, and a recursive or exponentially growing document has
no use here.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from lm_trust.errors import in_line


class YamlTextError(Exception):
    """What is wrong with a YAML text, in one line."""


_NUMBERS = {
    "tag:yaml.org,2002:int": re.compile(r"[-+]?[0-9][0-9_]*$"),
    "tag:yaml.org,2002:float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
}
_REPLACED = {*_NUMBERS, *(f"tag:yaml.org,2002:{name}" for name in ("timestamp", "merge", "value"))}


def _resolvers() -> dict[str, list[tuple[str, re.Pattern]]]:
    kept = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in _REPLACED]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+.0123456789":
        kept[first] = [*_NUMBERS.items(), *kept.get(first, [])]
    return kept


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem(f"aliases (*{event.anchor}) are not supported; repeat the value", event)
        if event.tag is not None:
            raise _problem(f"tags ({event.tag}) are not supported", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                raise _problem("a key must be a name", key)
            if key.value in seen:
                raise _problem(f"duplicate key {key.value}", key)
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = node.value.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
        try:
            return int(text) if node.tag.endswith(":int") else float(text)
        except ValueError:  # beyond Python's limit on the digits of an int
            raise _problem("a number with too many digits", node) from None


def _problem(words: str, at: yaml.Node | yaml.NodeEvent) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=words, problem_mark=at.start_mark)


for _tag in _NUMBERS:
    _Loader.add_constructor(_tag, _Loader.construct_number)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.Node:
        # PyYAML writes U+0085 and its like as they are in single quotes, and reads them back as spaces.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)

    def represent_list(self, data: list[Any]) -> yaml.Node:
        flow = not any(isinstance(item, dict | list) for item in data)
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _Dumper.represent_list)
_Dumper.add_representer(str, _Dumper.represent_text)


def read_yaml(text: str) -> Any:
    """The value of a YAML text: dicts with str keys, lists, str, int, float, bool and None only.

    Raises:
        YamlTextError: one line, with the line number where there is one.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise YamlTextError(in_line(f"{where}{error.problem or error.context}")) from None
    except yaml.YAMLError:
        raise YamlTextError("it holds a character that YAML does not allow") from None
    except RecursionError:
        raise YamlTextError("it is nested too deeply") from None
    finally:
        if loader is not None:
            loader.dispose()


def write_yaml(value: Any) -> str:
    """YAML that `read_yaml` reads back equal; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False)
