"""Composes a job's config from defaults, group files, a --config file and dotted overrides.

A schema is a frozen dataclass whose fields were made by `actors.contract.option`; its sections are dataclasses of the
same kind, alone, optional (`X | None`) or in a list. OmegaConf reads YAML and resolves `${...}`; types are checked
here, so that every mistake is one line that names the key, where it stands and what would be right there.
"""

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar, get_args, get_origin

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from actors.contract import ConfigError
from pipelines.reference import SCALARS, Entry, describe, fill, help_text, hints, is_section, merge, unwrap, walk

CONF = Path(__file__).resolve().parents[1] / "conf"
FLAGS = {
    "--config FILE": "read keys from a YAML file, local or by URL; it needs only those it changes",
    "--dry-run": "check the config, say what would be done and what it may take, then stop",
    "--limit N": "make at most N of the rows that are not done, rounded up to whole units",
    "--help": "print this text",
}
EXAMPLES = {int: "1", float: "0.5", bool: "true", str: "TEXT"}

T = TypeVar("T")


@dataclass(frozen=True)
class Flags:
    """What the command line says about this call only; never part of a run's fingerprint. `limit` is in rows."""

    dry_run: bool = False
    limit: int | None = None


class _Layer(NamedTuple):
    """Where values stand and what is valid there: `groups` maps a section's class to its folder in conf/."""

    source: str
    schema: type
    groups: dict[type, str]
    resolved: bool = False

    def fail(self, message: str) -> NoReturn:
        whole = f"{self.source}: {message}"  # a user's keys are in it, and a mistake is told in one line
        raise ConfigError("".join(char if char.isprintable() else repr(char)[1:-1] for char in whole))

    def unknown(self, key: str, parent: str, kind: Any) -> NoReturn:
        """Fail for `key`, which is not one of `kind`'s, the type of `parent`."""
        siblings = [f"{parent}.{name}".lstrip(".") for name in hints(kind)] if is_section(kind) else [parent]
        keys = list(dict.fromkeys([*siblings, *(entry.key for entry in walk(self.schema))]))
        if key in keys:
            self.fail(f"{key!r} is written as one key; nest it in its section")
        near = [known for known in keys if known.endswith(f".{key}")] or difflib.get_close_matches(key, keys, 2, 0.7)
        self.fail(f"unknown key {key!r}; " + (f"did you mean {' or '.join(near)}?" if near else "see --help"))


# --- composing ------------------------------------------------------------------------------------------------------


def compose(
    schema: type[T],
    argv: list[str],
    *,
    prog: str,
    description: str,
    groups: tuple[str, ...] = (),
    flags: Mapping[str, str] = FLAGS,
) -> tuple[T, Flags]:
    """Make the config that a command line asks for.

    Later beats earlier: defaults of the schema, group files, the --config file's own keys, overrides. Of two choices of
    a group file the command line's beats the --config file's. Paths are relative to the working directory.

    Args:
        argv: `key=value` overrides and flags, without the program's name. A text or choice is taken as it is written
            unless it is quoted or null; other values are YAML. `${key}` and `${oc.env:NAME}` are resolved, `\\${` not.
        groups: keys of the schema whose section may be chosen by name from `conf/<group>/<name>.yaml`. Elements of a
            list of the same section may be chosen so too.
        flags: what `--help` tells of each flag, where a job means something else by one.

    Raises:
        ConfigError: one line; nothing else is raised for what a user wrote.
        SystemExit: 0, after `--help` was printed.
    """
    root: Any = schema
    folders = {unwrap(hints(root)[group])[0]: group for group in groups}
    if "--help" in argv or "-h" in argv:
        print(help_text(schema, prog, description, flags, {group: presets(group) for group in groups}), end="")
        raise SystemExit(0)
    file, overrides, given = _arguments(argv)
    chosen: dict[str, tuple[_Layer, Any]] = {}
    own: dict[str, Any] = {}
    if file is not None:
        layer = _Layer(file, schema, folders)
        raw = _read(file)
        for group in [group for group in groups if group in raw]:
            value = raw[group]
            if value is None or (isinstance(value, str) and value != MISSING):
                chosen[group] = layer, raw.pop(group)
            elif isinstance(value, dict) and "preset" in value:
                chosen[group] = layer, value.pop("preset")
        own = _check(schema, raw, "", layer)
    assignments = []
    for argument in overrides:
        layer = _Layer(f"argument {_show(argument)}", schema, folders)
        key, _, text = argument.partition("=")
        value = _yaml(text, layer.source) if key in groups else None
        if isinstance(value, str) and value != MISSING:
            chosen[key] = layer, value
        else:
            assignments.append((layer, key, text))
    tree = fill(schema, {})
    for key, (layer, name) in chosen.items():
        tree[key] = merge(tree[key], _check(hints(root)[key], name, key, layer))
    tree = merge(tree, own)
    for layer, key, text in assignments:
        tree = _assign(schema, tree, key.split("."), text, "", layer)
    tree = fill(schema, tree)
    try:
        tree = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except (OmegaConfBaseException, RecursionError) as error:
        where = getattr(error, "full_key", None) or "config"
        raise ConfigError(f"{where}: {_first_line(error)} (a literal '${{' is written '\\${{')") from None
    tree = fill(schema, _check(schema, tree, "", _Layer("after resolving ${...}", schema, folders, resolved=True)))
    missing: list[Entry] = []
    config: T = _build(schema, tree, "", missing)
    if missing:
        told = "; ".join(f"{entry.key} ({entry.doc.help})" for entry in missing)
        example = " ".join(f"{entry.key}={EXAMPLES.get(unwrap(entry.hint)[0], '...')}" for entry in missing)
        raise ConfigError(f"required but not set: {told}. Example: {example}")
    return config, given


def _arguments(argv: list[str]) -> tuple[str | None, list[str], Flags]:
    values: dict[str, str] = {}
    overrides = []
    names = [flag.split()[0] for flag in FLAGS]
    rest = iter(argv)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name in ("--config", "--limit"):
            if name in values:
                raise ConfigError(f"{name} is given twice")
            values[name] = value if equals else next(rest, "")
            if not values[name]:
                raise ConfigError(f"{name} needs a value: {next(flag for flag in FLAGS if flag.startswith(name))}")
        elif argument == "--dry-run":
            values[argument] = argument
        elif name.startswith("-"):
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"flags are {', '.join(names)}"
            hint = f"overrides have no dashes: {argument.lstrip('-')!r}" if equals and not near else hint
            raise ConfigError(f"unknown flag {_show(name)}; {hint}")
        elif not equals:
            near = difflib.get_close_matches(f"--{name}", names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"argument {_show(argument)} is neither a flag nor key=value{hint}")
        else:
            overrides.append(argument)
    limit = values.get("--limit")
    if limit is not None and not (limit.isdecimal() and len(limit) < 19 and int(limit) >= 1):
        raise ConfigError(f"--limit expects a number of rows, 1 or more, got {_show(limit)}")
    return values.get("--config"), overrides, Flags("--dry-run" in values, None if limit is None else int(limit))


def _preset(section: type, name: Any, key: str, layer: _Layer) -> dict[str, Any]:
    """Read one group file: `name` is a path ending in .yaml or .yml, or the name of a file in the group's folder."""
    group = layer.groups[section]
    path = str(name)
    if not path.endswith((".yaml", ".yml")):
        names = presets(group)
        if path not in names:
            near = difflib.get_close_matches(path, names, 1, 0.7)
            hint = f"did you mean {near[0]}? " if near else ""
            layer.fail(f"{key}: no preset {_show(name)}; {hint}there are: {', '.join(names) or 'none'}")
        path = str(CONF / group / f"{path}.yaml")
    # Errors name the file's keys as they stand in it: without the section's name in front.
    content: dict[str, Any] = _check(section, _read(path), "", _Layer(path, section, {}))
    return content


def presets(group: str) -> list[str]:
    """Names that a group's key can take, sorted: the YAML files in its folder of conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def _read(path: str) -> dict[Any, Any]:
    try:
        text = _read_url(path) if "://" in path else Path(path).read_text("utf-8")
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"cannot read {_show(path)}: {getattr(error, 'strerror', None) or error}") from None
    content = _yaml(text, path)
    if not isinstance(content, dict | None):
        raise ConfigError(f"{path}: expects keys with values, got {_show(content)}")
    return content or {}


def _read_url(url: str) -> str:
    """The text of an object. Where its store is and who may read it comes from the environment alone."""
    import fsspec  # its file systems are slow to import, and seldom needed here

    try:
        with fsspec.open(url, "rb") as file:
            return bytes(file.read()).decode("utf-8")
    except (OSError, ValueError, ImportError):
        raise
    except Exception as error:  # what clients of stores raise has no common type
        raise OSError(_first_line(error)) from error


def _yaml(text: str, source: str) -> Any:
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark and "\n" in text else ""
        raise ConfigError(f"{source}{line}: not YAML: {error.problem}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not YAML: {_first_line(error)}") from None


def _assign(hint: Any, node: Any, path: list[str], text: str, key: str, layer: _Layer) -> Any:
    """Return a copy of `node`, a plain value of type `hint`, with what stands at `path` set to what `text` says."""
    kind, _ = unwrap(hint)
    if not path:
        value = _typed(hint, text, layer)
        if value == MISSING:
            return node
        checked = _check(hint, value, key, layer)
        return checked if isinstance(value, str) else merge(node, checked)
    name, *rest = path
    child = f"{key}.{name}" if key else name
    if is_section(kind) and name in hints(kind):
        node = node if isinstance(node, dict) else {}
        return node | {name: _assign(hints(kind)[name], node.get(name), rest, text, child, layer)}
    if get_origin(kind) is list and name.isdecimal():
        length = len(node) if isinstance(node, list) else 0
        if len(name) > 6 or int(name) >= length:
            layer.fail(f"there is no {child}: {key} has {length} element{'s' * (length != 1)}")
        element = _assign(get_args(kind)[0], node[int(name)], rest, text, child, layer)
        return [*node[: int(name)], element, *node[int(name) + 1 :]]
    if kind is Any or get_origin(kind) is dict:
        node = node if isinstance(node, dict) else {}
        item = get_args(kind)[1] if get_args(kind) else Any
        return node | {name: _assign(item, node.get(name), rest, text, child, layer)}
    layer.unknown(".".join([child, *rest]), key, kind)


def _typed(hint: Any, text: str, layer: _Layer) -> Any:
    """Read a value of the command line. Text is not YAML: `#`, `:`, line breaks and 0123 stay what they are."""
    kind, optional = unwrap(hint)
    if kind is str or get_origin(kind) is Literal:
        if text in ("null", "~", "") and (optional or text):
            return None
        if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
            return str(text)
    return _yaml(text, layer.source)


# --- types ----------------------------------------------------------------------------------------------------------


def _check(hint: Any, value: Any, key: str, layer: _Layer) -> Any:
    """Return the plain form of a value of type `hint`; group files are read where a section may be chosen by name."""
    kind, optional = unwrap(hint)
    if (value is None and optional) or kind is Any:
        return value
    if is_section(kind) and kind in layer.groups and isinstance(value, str):
        return _preset(kind, value, key, layer)
    if isinstance(value, str) and "${" in value and not layer.resolved:
        return value  # checked again once it is resolved
    if is_section(kind) and isinstance(value, dict):
        base: Any = {}
        if kind in layer.groups and "preset" in value:
            base = _check(kind, value["preset"], key, layer)
            value = {name: item for name, item in value.items() if name != "preset"}
        own = {}
        for name, item in value.items():
            child = f"{key}.{name}" if key else str(name)
            if name not in hints(kind):
                layer.unknown(child, key, kind)
            if item != MISSING:  # "???" means not set, as in OmegaConf: it hides no value of a layer below
                own[name] = _check(hints(kind)[name], item, child, layer)
        return merge(base, own)
    if get_origin(kind) is list and isinstance(value, list):
        return [_check(get_args(kind)[0], item, f"{key}.{index}", layer) for index, item in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {name: _check(get_args(kind)[1], item, f"{key}.{name}", layer) for name, item in value.items()}
    if get_origin(kind) is Literal and any(value == arg and type(value) is type(arg) for arg in get_args(kind)):
        return value
    read: Any = _yaml(value, layer.source) if isinstance(value, str) and kind in (int, float, bool) else value
    if type(read) is kind and kind in SCALARS and (kind is not float or math.isfinite(read)):
        return read
    if kind is float and type(read) is int and abs(read) < 2**1000:
        return float(read)
    also = " or the name of a preset" if kind in layer.groups else ""
    also = " in quotes" if kind is str and isinstance(value, int | float) else also
    layer.fail(f"{key} expects {describe(hint)}{also}, got {_show(value)}")


def _build(kind: Any, value: Any, key: str, missing: list[Entry]) -> Any:
    """Make the dataclasses of a filled value; required fields that are not set are added to `missing`."""
    kind, _ = unwrap(kind)
    if get_origin(kind) is list and isinstance(value, list):
        return [_build(get_args(kind)[0], item, f"{key}{index}.", missing) for index, item in enumerate(value)]
    if not is_section(kind) or value is None:
        return value
    values = {}
    for field in fields(kind):
        child = Entry(f"{key}{field.name}", hints(kind)[field.name], value[field.name], field.metadata["doc"])
        missing += [child] if child.default == MISSING else []
        values[field.name] = _build(child.hint, child.default, f"{child.key}.", missing)
    try:
        return None if missing else kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{key}{error}") from None


# --- what was made --------------------------------------------------------------------------------------------------


def changes_rows(config: Any) -> dict[str, object]:
    """Values that can change a row of the corpus, by dotted key in sorted order: a run's fingerprint covers these."""
    return dict(sorted(_changes(config, "")))


def _changes(section: Any, prefix: str) -> Iterator[tuple[str, object]]:
    for field in fields(section):
        value = getattr(section, field.name)
        key = f"{prefix}{field.name}"
        if is_section(type(value)):
            yield from _changes(value, f"{key}.")
        elif isinstance(value, list) and value and is_section(type(value[0])):
            for index, item in enumerate(value):
                yield from _changes(item, f"{key}.{index}.")
        elif field.metadata["doc"].changes_rows:
            yield key, value


def resolved(config: Any) -> dict[str, Any]:
    """The whole config as nested dicts, lists and plain values: what a run's record keeps."""
    return asdict(config)


def _show(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
