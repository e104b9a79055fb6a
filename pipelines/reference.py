"""What a schema holds, told to a person: `--help`, and the YAML file with every key, its default and its help.

The file is made by `python -m pipelines.reference > conf/align_corpus.yaml`.
"""

import functools
import importlib
import json
import re
import sys
import textwrap
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf

from actors.contract import Doc

WEIGHTS = dict[str, float]
SCALARS = {int: "an integer", float: "a number", bool: "true or false", str: "text", Any: "any value"}


# --- what it holds --------------------------------------------------------------------------------------------------


def is_section(kind: Any) -> bool:
    """Whether a type is a section: a dataclass."""
    return isinstance(kind, type) and is_dataclass(kind)


@functools.cache
def hints(section: Any) -> dict[str, Any]:
    """The types of a section's fields, by name."""
    found = get_type_hints(section)
    return {field.name: found[field.name] for field in fields(section)}


def unwrap(hint: Any) -> tuple[Any, bool]:
    """Split `X | None` into X and whether null is allowed."""
    if get_origin(hint) in (Union, types.UnionType):
        (kind,) = (arg for arg in get_args(hint) if arg is not types.NoneType)
        return kind, True
    return hint, False


def describe(hint: Any) -> str:
    """A type, as a person calls it."""
    kind, optional = unwrap(hint)
    if get_origin(kind) is Literal:
        text = f"one of {', '.join(map(str, get_args(kind)))}"
    elif get_origin(kind) is list:
        text = f"a list, each element {describe(get_args(kind)[0])}"
    elif is_section(kind) or get_origin(kind) is dict:
        text = "a mapping"
    else:
        text = SCALARS[kind]
    return f"{text} or null" if optional else text


def merge(hint: Any, base: Any, over: Any) -> Any:
    """`base` with the values of `over` in place of its own, mapping by mapping; both are of type `hint`.

    A mapping of weights is one value: those of `over` stand alone, as a sum of these with others is not what they say.
    """
    kind, _ = unwrap(hint)
    if not (isinstance(base, dict) and isinstance(over, dict)) or kind == WEIGHTS:
        return over
    inner = hints(kind) if is_section(kind) else {}
    return base | {key: merge(inner.get(key, Any), base.get(key), value) for key, value in over.items()}


@functools.cache
def _defaults(section: Any) -> Any:
    """Plain defaults of a section; a required section in it is {}, so that its own fields say what is required."""
    plain: Any = OmegaConf.to_container(OmegaConf.structured(section))
    return {name: {} if item == MISSING and is_section(hints(section)[name]) else item for name, item in plain.items()}


def fill(hint: Any, value: Any) -> Any:
    """Add the defaults of what is not set, in every section that is there."""
    kind, _ = unwrap(hint)
    if get_origin(kind) is list and isinstance(value, list):
        return [fill(get_args(kind)[0], item) for item in value]
    if not is_section(kind) or not isinstance(value, dict):
        return value
    merged = merge(kind, _defaults(kind), value)
    return {name: fill(child, merged[name]) for name, child in hints(kind).items()}


class Entry(NamedTuple):
    """One dotted key of a schema."""

    key: str
    hint: Any
    default: Any
    doc: Doc


def walk(kind: Any, value: Any = None, prefix: str = "", shown: tuple[Any, ...] = ()) -> Iterator[Entry]:
    """Every dotted key in schema order, a section before its keys; those of a list's elements stand under `.0`."""
    value = fill(kind, {}) if value is None else value
    for field in fields(kind):
        entry = Entry(prefix + field.name, hints(kind)[field.name], value[field.name], field.metadata["doc"])
        yield entry
        inner, _ = unwrap(entry.hint)
        if is_section(inner):
            shown = (*shown, inner)
            yield from walk(inner, entry.default, f"{entry.key}.", shown)
        elif get_origin(inner) is list and is_section(get_args(inner)[0]) and get_args(inner)[0] not in shown:
            yield from walk(get_args(inner)[0], None, f"{entry.key}.0.", shown)


# --- telling --------------------------------------------------------------------------------------------------------


def help_text(
    schema: type, prog: str, description: str, flags: Mapping[str, str], presets: Mapping[str, list[str]]
) -> str:
    """What `--help` prints: the flags, every key, and the presets of each group."""
    headings = {"": "keys, written key=value:"}
    rows: dict[str, list[tuple[str, str]]] = {"": []}
    for entry in walk(schema):
        if is_section(unwrap(entry.hint)[0]):
            headings[entry.key] = f"{entry.key}: {entry.doc.help}{' (default null)' if entry.default is None else ''}"
        else:
            default = "required" if entry.default == MISSING else f"default {scalar(entry.default)}"
            text = f"{entry.doc.help} ({describe(entry.hint)}; {default})"
            rows.setdefault(entry.key.rpartition(".")[0], []).append((entry.key, text))
    lines = [f"usage: {prog} [flags] [key=value ...]", "", *textwrap.wrap(description, 110), "", "flags:"]
    lines += _table(flags.items())
    for section, entries in rows.items():
        heading = headings.get(section, f"{section}: one element of the list")
        lines += ["", *textwrap.wrap(heading, 110), *_table(entries)]
    lines += ["", "presets, chosen as group=NAME or group=PATH.yaml:"] if presets else []
    lines += _table((group, ", ".join(names) or "none") for group, names in presets.items())
    return "\n".join(lines) + "\n"


def _table(rows: Iterable[tuple[str, str]]) -> list[str]:
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, 76, break_long_words=False, break_on_hyphens=False)
        start = [f"  {name}"] if len(name) > 30 else [f"  {name:30}  {wrapped.pop(0)}"]
        lines += start + [" " * 34 + line for line in wrapped]
    return lines


def reference_yaml(schema: type) -> str:
    """Every key of a schema with its default and its help; loading the text gives exactly the schema's defaults."""
    lines = [
        f"# Every key of {schema.__name__} with its default. Generated; do not edit:",
        f"#   python -m pipelines.reference {schema.__module__}:{schema.__qualname__}",
        "# A --config file needs only the keys it changes; ??? marks a key that must be set.",
    ]
    absent: tuple[str, ...] = ()
    for entry in walk(schema):
        section = is_section(unwrap(entry.hint)[0])
        name = entry.key.replace(".0.", ".")
        indent = "  " * name.count(".") + ("# " if entry.key.startswith(absent) else "")
        tell = entry.default in (None, MISSING) or get_origin(unwrap(entry.hint)[0]) is Literal
        text = f"{entry.doc.help} ({describe(entry.hint)})" if tell and not section else entry.doc.help
        value = "" if isinstance(entry.default, dict) and section else f" {scalar(entry.default)}"
        lines += [""] if section and not absent else []
        line = f"{indent}{name.rpartition('.')[2]}:{value}"
        if len(f"{line}  # {text}") > 120:
            lines += textwrap.wrap(text, 118, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
            lines.append(line)
        else:
            lines.append(f"{line}  # {text}")
        if not isinstance(entry.default, dict):
            absent = (*absent, f"{entry.key}.")
    return "\n".join(lines) + "\n"


def scalar(value: Any) -> str:
    """One line of YAML that OmegaConf reads back as the value."""
    plain = isinstance(value, str) and re.fullmatch(r"[A-Za-z_/][\w/.+-]*|\?\?\?", value)
    if plain and OmegaConf.to_container(OmegaConf.create(f"value: {value}")) == {"value": value}:
        return str(value)
    return json.dumps(value, ensure_ascii=False)


def main(argv: list[str]) -> None:
    """Print the reference of the schema named by `module:Class`."""
    module, _, name = (argv or ["pipelines.settings:AlignCorpusConfig"])[0].partition(":")
    print(reference_yaml(getattr(importlib.import_module(module), name)), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
