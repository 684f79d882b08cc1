"""Logical-form accuracy of SQL answers: the same query, however it is written.

SELECT [AGG] column FROM table WHERE conditions is compared part by part: the case of words, spaces, the kind of quotes,
1 or 1.0 and the order of the conditions do not count (WikiSQL's form).
"""

from __future__ import annotations

import re

_QUERY = re.compile(r"\s*select\s+(?P<what>.+?)\s+from\s+(?P<table>\S+?)(?:\s+where\s+(?P<where>.+?))?\s*;?\s*",
                    re.IGNORECASE | re.DOTALL)
_AGGREGATE = re.compile(r"(max|min|count|sum|avg)\s*\(\s*(.+?)\s*\)", re.IGNORECASE | re.DOTALL)
_CONDITION = re.compile(r"""\s*(?P<column>\S+?)\s*(?P<operator><=|>=|!=|<>|=|<|>|\blike\b)\s*
                        (?P<value>"[^"]*"|'[^']*'|\S+)\s*(?:\band\b|$)""", re.IGNORECASE | re.VERBOSE)

Form = tuple[str, str, str, frozenset[tuple[str, str, str]]]


def score(name: str, predictions: list[str], references: list[list[str]]) -> tuple[str, float]:
    """Logical-form accuracy, 0 to 1: an answer is right that has the form of one of its references."""
    right = sum(any(same_form(prediction, text) for text in texts)
                for prediction, texts in zip(predictions, references, strict=True))
    return name, right / len(predictions)


def same_form(one: str, other: str) -> bool:
    """Whether two queries say the same; where one has another form, whether the texts do, spaces and case apart."""
    forms = logical_form(one), logical_form(other)
    if None in forms:
        return " ".join(one.lower().split()) == " ".join(other.lower().split())
    return forms[0] == forms[1]


def logical_form(query: str) -> Form | None:
    """(aggregate, column, table, conditions) of a query; None where it has another form."""
    found = _QUERY.fullmatch(query)
    if found is None:
        return None
    aggregate = _AGGREGATE.fullmatch(found["what"])
    what = (aggregate[1].lower(), aggregate[2].lower()) if aggregate else ("", found["what"].lower())
    conditions, position, where = set(), 0, found["where"] or ""
    while position < len(where):
        condition = _CONDITION.match(where, position)
        if condition is None:
            return None
        operator = "!=" if condition["operator"] == "<>" else condition["operator"].lower()
        conditions.add((condition["column"].lower(), operator, _value(condition["value"])))
        position = condition.end()
    return *what, found["table"].lower(), frozenset(conditions)


def _value(text: str) -> str:
    """A value without its quotes, in lower case; a number in its shortest form."""
    plain = " ".join(text.strip("\"'").lower().split())
    try:
        return f"{float(plain.replace(',', '')):g}" if plain else plain
    except ValueError:
        return plain
