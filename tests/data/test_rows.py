"""The shape of a data set is found from its columns, and each row is checked against it."""

from __future__ import annotations

import pytest

from deltaw.data import Chat, Labelled, Message, PromptCompletion, Text, open_source
from deltaw.data.rows import find_layout, parse
from deltaw.errors import ConfigError, DataError

TURNS = (Message("user", "hi"), Message("assistant", "ho"))


def parsed(row, columns=None, task="causal-lm"):
    source = open_source([row])
    return parse(find_layout(source, columns, task=task), source[0])


@pytest.mark.parametrize(("row", "expected"), [
    ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, Chat(TURNS)),
    ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, Chat(TURNS)),
    ({"prompt": "a", "completion": "b", "id": 3}, PromptCompletion("a", "b")),
    ({"instruction": "a", "output": "b"}, PromptCompletion("a", "b", "\n\n")),
    ({"instruction": "a", "input": "", "output": "b"}, PromptCompletion("a", "b", "\n\n")),
    ({"instruction": "a", "input": None, "output": "b"}, PromptCompletion("a", "b", "\n\n")),
    ({"instruction": "a", "input": "c", "output": "b"}, PromptCompletion("a\n\nc", "b", "\n\n")),
    ({"text": "a"}, Text("a")),
])
def test_shapes_for_language(row, expected):
    assert parsed(row) == expected


@pytest.mark.parametrize(("label", "expected"), [(1, "1"), ("yes", "yes"), (True, "1"), (2.0, "2"), (" b ", "b")])
def test_shapes_for_classes(label, expected):
    assert parsed({"text": "a", "label": label}, task="seq-cls") == Labelled("a", None, expected)
    assert parsed({"text": "a", "text_pair": "b", "label": label}, task="seq-cls") == Labelled("a", "b", expected)


def test_columns_are_mapped():
    row = {"question": "a", "answer": "b", "text": "c"}
    assert parsed(row, {"prompt": "question", "completion": "answer"}) == PromptCompletion("a", "b")
    assert parsed(row, {"text": "answer"}) == Text("b")
    assert parsed({"s1": "a", "s2": "b", "label": 0}, {"text": "s1", "text_pair": "s2"}, "seq-cls") == Labelled(
        "a", "b", "0")


def test_an_unknown_field_and_an_unknown_column():
    with pytest.raises(ConfigError, match=r"'promt'.*Did you mean prompt"):
        parsed({"q": "a", "a": "b"}, {"promt": "q"})
    with pytest.raises(DataError, match=r"no column 'answr'.*one of question, answer.*Did you mean answer"):
        parsed({"question": "a", "answer": "b"}, {"prompt": "question", "completion": "answr"})


def test_columns_that_fit_no_shape_name_what_would():
    with pytest.raises(DataError, match=r"has the columns mr, ref; expected .*prompt \+ completion"):
        parsed({"mr": "a", "ref": "b"})
    with pytest.raises(DataError, match="Did you mean prompt"):
        parsed({"promt": "a", "ref": "b"})
    with pytest.raises(DataError, match=r"text \+ label"):
        parsed({"text": "a"}, task="seq-cls")
    with pytest.raises(DataError, match=r"text \+ label") as caught:  # prompt is no misspelling of text, nor of itself
        parsed({"prompt": "a", "completion": "b"}, task="seq-cls")
    assert "Did you mean" not in str(caught.value)
    with pytest.raises(DataError, match="Did you mean label"):
        parsed({"sentence": "a", "labels": "b"}, task="seq-cls")
    with pytest.raises(DataError, match="belong to no single shape"):
        parsed({"prompt": "a", "completion": "b", "text": "c"}, {"prompt": "prompt", "text": "text"})


def test_labelled_rows_are_not_silently_plain_text():
    with pytest.raises(DataError, match="task 'seq-cls'; to learn the text itself map text=text"):
        parsed({"text": "a", "label": 1})
    assert parsed({"text": "a", "label": 1}, {"text": "text"}) == Text("a")


def talk(*turns):
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(("row", "says"), [
    ({"prompt": "a", "completion": ""}, "'completion' is empty"),
    ({"prompt": "a", "completion": " \n"}, "'completion' is empty"),
    ({"prompt": "a", "completion": None}, "no 'completion'"),
    ({"prompt": 3, "completion": "b"}, "'prompt' is int"),
    ({"text": "  "}, "'text' is empty"),
    ({"messages": []}, "no messages"),
    ({"messages": "hi"}, "messages are str"),
    ({"messages": ["hi"]}, "message 1 is str"),
    (talk(("user", "a")), "no assistant turn"),
    (talk(("assistant", "a"), ("user", "b")), "starts with an assistant turn"),
    (talk(("usr", "a"), ("assistant", "b")), "role 'usr'.*Did you mean user"),
    (talk(("human", "a"), ("assistant", "b")), "role 'human'"),
    (talk(("user", "a"), ("assistant", " ")), "message 2, an assistant turn, is empty"),
    (talk(("user", ["a"]), ("assistant", "b")), "content of list"),
    (talk(("user", "a"), ("assistant", None)), "content of NoneType"),
    ({"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]}, "from 'bot'"),
])
def test_bad_rows(row, says):
    with pytest.raises(DataError, match=f"rows: row 1: .*{says}"):
        parsed(row)


@pytest.mark.parametrize(("label", "says"), [(None, "has no"), ("", "has no"), (1.5, "is 1.5"), ([1], r"is \[1\]")])
def test_bad_labels(label, says):
    with pytest.raises(DataError, match=says):
        parsed({"text": "a", "label": label}, task="seq-cls")


def test_all_faults_of_a_row_at_once():
    with pytest.raises(DataError) as caught:
        parsed({"prompt": 3, "completion": ""})
    assert len(caught.value.faults) == 2


def test_a_row_of_another_shape_is_a_fault_of_that_row():
    source = open_source([{"prompt": "a", "completion": "b"}, {"text": "c"}])
    layout = find_layout(source)
    assert parse(layout, source[0]) == PromptCompletion("a", "b")
    with pytest.raises(DataError, match=r"row 2: has no 'prompt'.*shape 'prompt-completion'"):
        parse(layout, source[1])
