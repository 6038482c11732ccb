"""Say what is wrong with a config in the words of its keys: pydantic's findings, one plain line each."""

from __future__ import annotations

import difflib
import reprlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from lm_trust.errors import in_line
from lm_trust.training.config_learning import GROUPED
from lm_trust.training.config_synonyms import KINDS, STOPPING, SYNONYMS, TRUNCATED_SAMPLING

Key = tuple[str, ...]  # a dotted key in parts; items of a list by index

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section with keys of its own",
    "model_type": "a section with keys of its own",
    "model_attributes_type": "a section with keys of its own",
    "none_required": "null",
    "finite_number": "a finite number",
}
_LIMITS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def plain(text: str) -> str:
    """Text as it is where it prints on one line, quoted and escaped where it does not."""
    return text if text.isprintable() and text else repr(text)


def dotted(key: Sequence[str]) -> str:
    return ".".join(map(plain, key))


def shown(value: Any) -> str:
    """A value from YAML, short and on one line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a section"
    return _REPR.repr(value)


def variants(annotation: Any) -> dict[str | None, type[BaseModel]]:
    """The sections a field may hold, by their `kind`; {None: section} where there is one (or null), {} for a value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {None: annotation}
    if typing.get_origin(annotation) is list:
        return variants(typing.get_args(annotation)[0])
    models = [one for arm in typing.get_args(annotation) for one in variants(arm).values()]
    return {model.model_fields["kind"].default if "kind" in model.model_fields else None: model for model in models}


def keys_of(model: type[BaseModel], at: Key = ()) -> Iterator[Key]:
    """All dotted keys below a model, in order; those of all kinds where a section has several."""
    for name, field in model.model_fields.items():
        yield (*at, name)
        is_list = typing.get_origin(field.annotation) is list
        for section in variants(field.annotation).values():
            yield from keys_of(section, (*at, name, "0") if is_list else (*at, name))


def problems_of(
    error: ValidationError, tree: Mapping[str, Any], root: type[BaseModel], other: type[BaseModel]
) -> list[tuple[Key, str]]:
    """(key, what is wrong) for each finding in `tree`; `other` is the root of the world that this config is not of."""
    found: dict[tuple[Key, str], None] = {}  # a set that keeps the order
    for item in error.errors(include_url=False):
        cause = item.get("ctx", {}).get("error")
        if hasattr(cause, "problems"):
            for key, message in cause.problems:
                found[tuple(key.split(".")), message] = None
        elif item["type"] != "default_factory_not_called":  # a consequence of another finding, not one of its own
            key, section = _place(item["loc"], root)
            if item["type"].startswith("union_tag"):
                key = (*key, "kind")
            found[key, _message(item, key, section, tree, root, other)] = None
    return list(found)


def _place(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[Key, type[BaseModel]]:
    """The dotted key and its section from pydantic's location, which also names the kinds it went through."""
    key: list[str] = []
    section, choices = root, {None: root}
    for part in loc:
        if part in choices and None not in choices:
            section = choices[part]
            choices = {None: section}
            continue
        key.append(str(part))
        if isinstance(part, int):
            continue
        section = choices.get(None, section)
        field = section.model_fields.get(part)
        choices = variants(field.annotation) if field else {}
    return tuple(key), section


def _message(
    item: Any,
    key: Key,
    section: type[BaseModel],
    tree: Mapping[str, Any],
    root: type[BaseModel],
    other: type[BaseModel],
) -> str:
    kind, got, context = item["type"], shown(item["input"]), item.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{_instead(key, section, tree, root, other)}"
    if kind == "missing":
        field = section.model_fields[key[-1]]
        return f"required but not given{f': {field.description}' if field.description else ''}"
    if kind.startswith("union_tag"):
        return _unknown_kind(key, item["input"], root, other)
    if kind == "literal_error":
        names = list(literals(section.model_fields[key[-2] if key[-1].isdecimal() else key[-1]].annotation))
        return f"must be one of {', '.join(names)}, got {got}{_nearest(item['input'], names)}"
    if kind in _EXPECTED:
        text = " (text)" if isinstance(item["input"], str) else ""
        return f"expected {_EXPECTED[kind]}, got {got}{text}"
    if kind in _LIMITS:
        words, name = _LIMITS[kind]
        limit = context[name]
        return f"must be {words} {f'{limit:g}' if isinstance(limit, float) else limit}, got {got}"
    if kind in ("too_short", "string_too_short"):
        return "must not be empty"
    if kind == "value_error":
        return in_line(context["error"])
    return in_line(item["msg"])


def _nearest(wrong: Any, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(wrong), names, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _instead(
    key: Key, section: type[BaseModel], tree: Mapping[str, Any], root: type[BaseModel], other: type[BaseModel]
) -> str:
    """What the writer of an unknown key may have meant: a neighbour, another kind's key, one elsewhere."""
    *above, wrong = key
    here = list(section.model_fields)
    everywhere = list(keys_of(root))
    if key in everywhere:
        return _of_another_kind(section, root)
    if wrong in TRUNCATED_SAMPLING and ("rollout", "temperature") in everywhere:
        return "; completions are drawn from the whole distribution, as the KL is measured; see rollout.temperature"
    if wrong in STOPPING and ("rollout", "max_new_tokens") in everywhere and key[0] == "rollout":
        return "; a completion ends with the policy's end of sequence or at rollout.max_new_tokens, and by nothing else"
    ours = [tuple(each.split(".")) for each in SYNONYMS.get(wrong, ())]
    beside = next((each[-1] for each in ours if each[-1] in here), None)
    if beside:
        return f"; did you mean {dotted((*above, beside))}?"
    meant = next((each for each in ours if each in everywhere), None)
    if meant:
        return f"; did you mean {dotted(meant)}?{_of_which_kinds(meant, tree, root)}"
    of_other = key in set(keys_of(other))
    near = difflib.get_close_matches(wrong, here, n=1, cutoff=0.8 if of_other else 0.6)
    if near:
        return f"; did you mean {dotted((*above, near[0]))}?"
    if of_other:  # before a weak likeness: `iterations` of language runs is no slip for `evaluation`
        return f" here; it belongs to {_world(other)}"
    elsewhere = {one[-1]: one for one in reversed(everywhere)}
    near = difflib.get_close_matches(wrong, list(elsewhere), n=1, cutoff=0.8)
    if near:
        meant = elsewhere[near[0]]
        return f"; did you mean {dotted(meant)}?{_of_which_kinds(meant, tree, root)}"
    return f"; the keys of {dotted(above)} are {', '.join(here)}" if above else f"; the keys are {', '.join(here)}"


def _of_which_kinds(key: Key, tree: Mapping[str, Any], root: type[BaseModel]) -> str:
    """Which kinds of its section have the key, where the one that was chosen does not."""
    name, *below = key
    kinds = variants(root.model_fields[name].annotation)
    given = tree.get(name)
    kind = given.get("kind") if isinstance(given, Mapping) else None
    chosen = kinds.get(kind) if isinstance(kind, str) else None
    if not below or chosen is None or below[0] in chosen.model_fields:
        return ""
    return f" It is of {name}.kind {', '.join(kind for kind, one in kinds.items() if below[0] in one.model_fields)}"


def _of_another_kind(section: type[BaseModel], root: type[BaseModel]) -> str:
    kind = section.model_fields["kind"].default
    keys = [name for name in section.model_fields if name != "kind"]
    if keys:
        return f" of kind {kind}; its keys are {', '.join(keys)}"
    # Who gave no kind may well have chosen it by the estimator.
    grouped = [name for name in GROUPED if name in variants(root.model_fields["advantage"].annotation)]
    why = f"; it is the only one with advantage.kind {' or '.join(grouped)}" if grouped else ""
    return f" of kind {kind}, which has no keys{why}"


def _unknown_kind(key: Key, given: Any, root: type[BaseModel], other: type[BaseModel]) -> str:
    kinds = list(variants(root.model_fields[key[0]].annotation))
    names = ", ".join(kinds)
    wrong = given.get("kind") if isinstance(given, dict) else None
    if wrong is None:
        return f"required but not given: one of {names}"
    elsewhere = other.model_fields.get(key[0])
    if isinstance(wrong, str) and elsewhere is not None and wrong in variants(elsewhere.annotation):
        return f"{wrong} is for {_world(other)}; here: {names}"
    meant = KINDS.get(str(wrong).lower()) if key[0] == "update" else None
    hint = f"; did you mean {meant}?" if meant else _nearest(wrong, kinds)
    return f"unknown kind {shown(wrong)}; one of {names}{hint}"


def _world(root: type[BaseModel]) -> str:
    return (root.__doc__ or root.__name__).split(":")[0].removeprefix("A ").lower() + "s"


def literals(annotation: Any) -> Iterator[str]:
    """The names that a field may have, also one that may be null, or an item of a list of them."""
    for part in typing.get_args(annotation):
        if isinstance(part, str):
            yield part
        else:
            yield from literals(part)
