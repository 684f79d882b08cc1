"""Options from the fields of a config: declared once, there, with their types, defaults and documentation.

    r: int = 8                     --r N    Rank of the change. [default: 8]
    "Rank of the change."

What a field's type takes on the command line: a list is "a,b"; a mapping "key=value,key=value"; `none` is no value;
names or a regular expression are "a,b" or "re:...". A list or mapping may also be JSON, for values with commas.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from deltaw.cli.parser import Misread
from deltaw.core.config import ALL_LINEAR
from deltaw.errors import near

Read = Callable[[str], Any]
REGEX = "re:"
"""What a regular expression starts with where names could stand too."""
_METAVARS = {int: "N", float: "X", str: "TEXT", bool: "true|false"}


@dataclass(frozen=True, slots=True)
class Form:
    """How values of a type are written on the command line: what stands for one in the help, and how it is read."""

    metavar: str
    read: Read


def add_options(parser: argparse.ArgumentParser, config: type, title: str, *, skip: tuple[str, ...] = (),
                metavars: Mapping[str, str] | None = None) -> None:
    """An option for each field of a config, in a group of the help; `skip` names fields that have none."""
    group = parser.add_argument_group(title)
    hints, docs = get_type_hints(config), field_docs(config)
    for field in fields(config):
        if field.name in skip:
            continue
        text = (docs[field.name] + _default(field)).replace("%", "%%")
        flag = option_name(field.name)
        if hints[field.name] is bool:
            group.add_argument(flag, dest=field.name, action=argparse.BooleanOptionalAction, help=text)
        else:
            form = form_of(hints[field.name])
            group.add_argument(flag, dest=field.name, type=_reader(flag, form), help=text,
                               metavar=(metavars or {}).get(field.name, form.metavar))


def _reader(flag: str, form: Form) -> Read:
    """`form.read`, which gives a `Misread` for a text that it does not take: all of them are then told at once."""
    def read(text: str) -> Any:
        try:
            return form.read(text)
        except argparse.ArgumentTypeError as error:
            return Misread(f"{flag}: {error}")

    return read


def option_name(field: str) -> str:
    """The option of a field: "--lora-alpha" of "lora_alpha"."""
    return "--" + field.replace("_", "-")


def given(namespace: argparse.Namespace, config: type) -> dict[str, Any]:
    """The fields of a config that were given on the command line, with their values."""
    return {field.name: vars(namespace)[field.name] for field in fields(config) if field.name in vars(namespace)}


def field_docs(config: type) -> dict[str, str]:
    """The docstring under each field of a dataclass and of those that it extends, on one line."""
    docs: dict[str, str] = {}
    for cls in reversed(config.__mro__[:-1]):
        tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
        body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
        for field, doc in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(doc, ast.Expr):
                docs[field.target.id] = " ".join(str(ast.literal_eval(doc.value)).split())
    return docs


def form_of(hint: Any) -> Form:
    """How values of this type are written."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return _any_of(arguments)
    if origin is Literal:
        return Form("|".join(map(str, arguments)), _choice(arguments))
    if origin is tuple:
        item = form_of(arguments[0])
        return Form(f"{item.metavar},...", _listed(item.read, None if arguments[-1] is ... else len(arguments)))
    if origin is not None and issubclass(origin, Mapping):
        value = form_of(arguments[1])
        return Form("KEY=VALUE,...", _mapped(value.read, text=arguments[1] is str))
    readers: dict[Any, Read] = {int: _whole, float: _number, bool: _truth, str: str}
    return Form(_METAVARS[hint], readers[hint])


def _any_of(kinds: tuple[Any, ...]) -> Form:
    """The form of a union: the first of its types that takes the text, plain text last."""
    if str in kinds and any(get_origin(kind) is tuple and get_args(kind)[0] is str for kind in kinds):
        return Form(f"NAME,...|{REGEX}REGEX", _names)
    ordered = sorted((k for k in kinds if k is not types.NoneType and _has_form(k)), key=lambda k: k is str)
    forms = [form_of(kind) for kind in ordered]
    metavar = "|".join(form.metavar for form in forms)

    def read(text: str) -> Any:
        if types.NoneType in kinds and text.lower() == "none":
            return None
        faults = []
        for form in forms:
            try:
                return form.read(text)
            except argparse.ArgumentTypeError as error:
                faults.append(str(error).rpartition("; expected ")[2])
        raise _fault(text, " or ".join([*faults, *["none"] * (types.NoneType in kinds)]))

    return Form(metavar, read)


def _has_form(kind: Any) -> bool:
    """Whether values of a type can be written on a command line; a function cannot."""
    return get_origin(kind) is not Callable


def _fault(text: str, expected: str, remedy: str = "") -> argparse.ArgumentTypeError:
    return argparse.ArgumentTypeError(f"got '{text}'; expected {expected}" + (f". {remedy}" if remedy else ""))


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _fault(text, "a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _fault(text, "a number") from None


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise _fault(text, "true or false")
    return text.lower() == "true"


def _choice(values: tuple[Any, ...]) -> Read:
    def read(text: str) -> Any:
        for value in values:
            if text == str(value):
                return value
        raise _fault(text, " or ".join(map(str, values)), near(text, map(str, values)))

    return read


def _names(text: str) -> tuple[str, ...] | str:
    if text == ALL_LINEAR:
        return text
    if text.startswith(REGEX):
        return text.removeprefix(REGEX)
    names: tuple[str, ...] = _listed(str, None)(text)
    return names


def _listed(read: Read, length: int | None) -> Read:
    def read_list(text: str) -> tuple[Any, ...]:
        items = [part.strip() for part in text.split(",") if part.strip()]
        values = tuple(_json(text, list)) if text.startswith("[") else tuple(read(item) for item in items)
        if length is not None and len(values) != length:
            raise _fault(text, f"{length} values with a comma between them")
        return values

    return read_list


def _mapped(read: Read, *, text: bool) -> Read:
    def read_mapping(written: str) -> dict[str, Any]:
        if written.startswith("{"):
            return dict(_json(written, dict))
        found = {}
        for part in filter(None, (p.strip() for p in written.split(","))):
            # Of "regex=number" the left may hold "=", of "role=column" the right may.
            key, equals, value = part.partition("=") if text else part.rpartition("=")
            if not equals or not key or not value:
                raise _fault(part, "key=value")
            found[key.strip()] = read(value.strip())
        return found

    return read_mapping


def _json(text: str, kind: type) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise _fault(text, f"JSON ({error})") from None
    if not isinstance(value, kind):
        raise _fault(text, f"a JSON {kind.__name__}")
    return value


def _default(field: Field[Any]) -> str:
    """" [default: ...]" of a field, where there is one to tell."""
    value = field.default_factory() if field.default_factory is not MISSING else field.default
    if value is MISSING or value is None or value is False or value in ((), {}, ""):
        return ""
    if isinstance(value, tuple):
        return f" [default: {','.join(map(str, value))}]"
    return f" [default: {'true' if value is True else value}]"
