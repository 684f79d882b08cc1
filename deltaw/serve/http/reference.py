"""The interface to be read in a browser, made of its own OpenAPI document: one page that needs nothing from outside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from html import escape
from typing import Any

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}: the interface</title><link rel="stylesheet" href="/playground/playground.css"></head>
<body><header><h1>{title} <span>{version}</span></h1><p>{about} <a href="/openapi.json">openapi.json</a></p></header>
<main class="columns"><div>{contents}</div><div>{routes}</div></main></body></html>
"""


def page(document: Mapping[str, Any]) -> str:
    """The HTML page of an OpenAPI document: each route, what it does, the fields of its request, its answers."""
    routes = [(method.upper(), path, asked) for path, methods in document["paths"].items()
              for method, asked in methods.items()]
    listed = "".join(f'<li><a href="#{i}">{method} {escape(path)}</a></li>'
                     for i, (method, path, _) in enumerate(routes))
    told = "".join(_route(document, i, *route) for i, route in enumerate(routes))
    info = document["info"]
    return PAGE.format(title=escape(info["title"]), version=escape(info["version"]),
                       about=escape(info.get("description", "")), contents=f"<nav><ul>{listed}</ul></nav>", routes=told)


def _route(document: Mapping[str, Any], number: int, method: str, path: str, asked: Mapping[str, Any]) -> str:
    responses = asked.get("responses", {})
    answers = ", ".join(f"{status} {answer.get('description', '')}".strip() for status, answer in responses.items())
    about = escape(asked.get("description", ""))
    return (f'<section id="{number}"><h2><code>{method} {escape(path)}</code></h2><p>{about}</p>'
            f'{_table("asked", _asked(document, asked))}{_table("answered", _held(document, responses.get("200", {})))}'
            f'<p class="note">Answers: {escape(answers)}</p></section>')


def _table(title: str, rows: Iterable[tuple[str, str, str]]) -> str:
    told = "".join(f"<tr><td><code>{escape(name)}</code></td><td>{escape(kind)}</td><td>{escape(need)}</td></tr>"
                   for name, kind, need in rows)
    return told and f"<table><tr><th>{title}</th><th>holds</th><th></th></tr>{told}</table>"


def _asked(document: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name, kind and need of each parameter and each field of the body."""
    for parameter in asked.get("parameters", ()):
        yield parameter["name"], _kind(parameter.get("schema", {})), f"in the {parameter['in']}"
    for name, kind, is_required in _fields(document, asked.get("requestBody", {})):
        yield name, kind, "required" if is_required else ""


def _held(document: Mapping[str, Any], answer: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Name and kind of each field of an answer."""
    for name, kind, is_required in _fields(document, answer):
        yield name, kind, "" if is_required else "not always"


def _fields(document: Mapping[str, Any], body: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Name, kind and need of each field of a body."""
    for content in body.get("content", {}).values():
        schema = content.get("schema", {})
        schema = schema.get("items", schema)
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
        for name, field in schema.get("properties", {}).items():
            yield name, _kind(field), name in schema.get("required", ())


def _kind(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"].rsplit("/", 1)[1])
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_kind(one) for one in schema["anyOf"]))
    if schema.get("type") == "array":
        return f"list of {_kind(schema.get('items', {}))}"
    limits = [f"{sign} {schema[key]}" for key, sign in (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="),
                                                        ("exclusiveMaximum", "<")) if key in schema]
    values = ", ".join(map(str, schema.get("enum", [schema["const"]] if "const" in schema else ())))
    return " ".join([values or str(schema.get("type", "anything")), *limits])
