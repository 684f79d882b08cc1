"""What is learnt, token by token, against references that build the tokens turn by turn."""

from __future__ import annotations

import numpy as np
import pytest

from deltaw.data import Example, LabelledExample, load_data
from deltaw.errors import BaseModelError, ConfigError, DataError
from tests.data.tiny import (
    ALTERNATING,
    LAST_TURN_DIFFERS,
    NO_END,
    OPENING_DIFFERS,
    chat,
    tokenizer,
)

START, END = 0, 1
CHATS = [chat("hello world", "the cat sat"), chat("what?", "yes", "and this", "no, maybe 1 2 3"),
         chat("é 猫 ☃", "\n\nstarts with breaks and ends with them\n\n", "ok", " spaces "),
         {"messages": [{"role": "system", "content": "Be odd."}, *chat("hi", "<|im_end|> is text here")["messages"]]},
         {"messages": [*chat("a", "b", "c", "d")["messages"], {"role": "user", "content": "left open"}]}]


def encode(row, tok=None, **options):
    data = load_data([row] if isinstance(row, dict) else row, tokenizer=tok or tokenizer(), **options)
    return [data[i] for i in range(len(data))]


def chatml_by_turns(tok, messages):
    """Ids and labels made by hand: each piece of the conversation tokenised on its own."""
    ids, labels = [], []

    def put(text, learnt):
        new = tok(text, add_special_tokens=False).input_ids
        ids.extend(new)
        labels.extend(new if learnt else [-100] * len(new))

    if messages[0]["role"] != "system":
        put("<|im_start|>system\nBe kind.<|im_end|>\n", False)
    for message in messages:
        put(f"<|im_start|>{message['role']}\n", False)
        answer = message["role"] == "assistant"
        put(message["content"], answer)
        put("<|im_end|>", answer)
        put("\n", False)
    return ids, labels


@pytest.mark.parametrize("row", [CHATS[0], CHATS[1], CHATS[3], CHATS[4]])
def test_the_mask_equals_tokenising_turn_by_turn(row):
    tok = tokenizer()
    (made,) = encode(row, tok)
    assert (made.input_ids, made.labels) == chatml_by_turns(tok, row["messages"])


@pytest.mark.parametrize("row", CHATS)
def test_the_ids_are_what_the_template_itself_gives(row):
    tok = tokenizer()
    (made,) = encode(row, tok)
    assert made.input_ids == tok.apply_chat_template(row["messages"], tokenize=True, return_dict=False)


@pytest.mark.parametrize("row", CHATS)
def test_the_learnt_text_is_the_answers_with_their_ends(row):
    tok = tokenizer()
    (made,) = encode(row, tok)
    learnt = tok.decode([i for i in made.labels if i != -100], clean_up_tokenization_spaces=False)
    turns = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    # A token may straddle the line break before an answer that starts with one.
    assert learnt.replace("\n", "") == "".join(f"{turn}<|im_end|>" for turn in turns).replace("\n", "")
    assert made.labels.count(END) >= len(turns)


def test_the_end_token_is_learnt_although_it_is_the_padding_token():
    tok = tokenizer()
    assert tok.pad_token_id == tok.eos_token_id == END
    (made,) = encode(CHATS[0], tok)
    assert made.labels[-2:] == [END, -100]  # the line break behind it is not


def test_prompt_and_completion_are_two_turns():
    tok = tokenizer()
    (made,) = encode({"prompt": "hello", "completion": "world"}, tok)
    (turns,) = encode(chat("hello", "world"), tok)
    assert (made.input_ids, made.labels) == (turns.input_ids, turns.labels)
    (asked,) = encode({"instruction": "hello", "input": "cat", "output": "world"}, tok)
    (turns,) = encode(chat("hello\n\ncat", "world"), tok)
    assert (asked.input_ids, asked.labels) == (turns.input_ids, turns.labels)


@pytest.mark.parametrize("tok", [tokenizer(None), tokenizer()])
def test_raw_prompts_are_joined_and_ended(tok):
    (made,) = encode({"prompt": "hello the", "completion": " cat"}, tok, template="none")
    prompt, completion = tok("hello the").input_ids, tok(" cat").input_ids
    assert made.input_ids == [*prompt, *completion, END]
    assert made.labels == [*[-100] * len(prompt), *completion, END]


def test_raw_instructions_have_a_gap():
    tok = tokenizer(None)
    (made,) = encode({"instruction": "what?", "output": "yes"}, tok)
    assert tok.decode(made.input_ids) == "what?\n\nyes<|im_end|>"
    assert tok.decode([i for i in made.labels if i != -100]).strip() == "yes<|im_end|>"


def test_a_start_token_is_added_to_raw_text_and_not_twice_to_a_chat():
    tok = tokenizer(bos=True)
    (raw,) = encode({"prompt": "hello", "completion": " cat"}, tok, template="none")
    assert raw.input_ids[0] == 2
    (made,) = encode(CHATS[0], tok)
    assert 2 not in made.input_ids


def test_all_tokens_can_be_learnt_but_the_first():
    (made,) = encode(CHATS[1], train_on="all")
    assert made.labels == [-100, *made.input_ids[1:]]


def test_plain_text_is_learnt_whole_and_in_pieces():
    tok = tokenizer()
    ids = [*tok("the cat sat on the mat and said hello").input_ids, END]
    (whole,) = encode({"text": "the cat sat on the mat and said hello"}, tok)
    assert (whole.input_ids, whole.labels) == (ids, [-100, *ids[1:]])
    pieces = encode({"text": "the cat sat on the mat and said hello"}, tok, max_length=4)
    assert [i for piece in pieces for i in piece.input_ids] == ids[:len(ids) - (len(ids) % 4 == 1)]
    assert all(2 <= len(piece.input_ids) <= 4 and piece.labels[0] == -100 for piece in pieces)


def test_a_template_without_an_end_gets_the_end_token():
    tok = tokenizer(NO_END)
    (made,) = encode(chat("hello", "cat", "what?", "yes"), tok)
    assert made.input_ids[-1] == made.labels[-1] == END
    learnt = tok.decode([i for i in made.labels if i != -100])
    assert "cat" in learnt
    assert "what" not in learnt
    assert made.input_ids.count(END) == 1


def test_a_template_that_rewrites_earlier_turns_gives_an_example_for_each():
    tok = tokenizer(LAST_TURN_DIFFERS)
    row = chat("hello", "cat", "what?", "yes")
    made = encode(row, tok)
    assert len(made) == 2
    for example, k in zip(made, (1, 3), strict=True):
        seen = tok.apply_chat_template(row["messages"][:k], tokenize=True, add_generation_prompt=True,
                                       return_dict=False)
        assert example.input_ids[:len(seen)] == seen
        assert set(example.labels[:len(seen)]) == {-100}
        answer = row["messages"][k]["content"]
        assert tok.decode([i for i in example.labels if i != -100]) == f"(thinking) {answer}<|im_end|>"


def test_a_template_whose_opening_differs_is_refused():
    with pytest.raises(DataError, match=r"row 1: chat template: writes the assistant's opening differently"):
        encode(CHATS[0], tokenizer(OPENING_DIFFERS))


def test_what_a_template_refuses_is_a_fault_of_the_row():
    odd = {"messages": [*chat("a")["messages"], *chat("b", "c")["messages"]]}
    with pytest.raises(DataError, match=r"rows: row 2: chat template: refuses the messages: roles must alternate"):
        encode([chat("a", "b"), odd], tokenizer(ALTERNATING))


def test_chats_need_a_template_and_prompts_do_not():
    with pytest.raises(BaseModelError, match="no chat template"):
        encode(CHATS[0], tokenizer(None))
    assert encode({"prompt": "a", "completion": "b"}, tokenizer(None))


# ------------------------------------------------------------------------------------------- length and statistics

def test_truncation_keeps_the_start_and_drops_what_learns_nothing():
    rows = [{"prompt": "hello " * 30, "completion": "cat"}, {"prompt": "hello", "completion": "cat " * 30},
            {"prompt": "hello", "completion": "cat"}]
    whole = load_data(rows, tokenizer=tokenizer(None))
    data = load_data(rows, tokenizer=tokenizer(None), max_length=20)
    assert len(data) == 2
    assert data[0].input_ids == whole[1].input_ids[:20]
    assert data[0].labels == whole[1].labels[:20]
    stats = data.stats
    assert (stats.rows, stats.examples, stats.dropped_no_supervision, stats.truncated) == (3, 2, 1, 1)
    assert stats.supervised_tokens == sum(i != -100 for n in range(2) for i in data[n].labels)
    assert stats.tokens == sum(len(data[n].input_ids) for n in range(2))
    assert stats.longest == 20
    assert data.lengths.tolist() == [len(data[n].input_ids) for n in range(2)]
    assert data.where(0) == "rows: row 2"


def test_nothing_left_to_learn_is_an_error():
    with pytest.raises(DataError, match="removed every token to learn from all 1 examples"):
        encode({"prompt": "hello " * 30, "completion": "cat"}, max_length=8)


def test_the_models_limit():
    with pytest.raises(ConfigError, match="max_length: got 100; expected at most 64"):
        encode(CHATS[0], max_length=100, model_limit=64)
    data = load_data([{"text": "hello " * 100}], tokenizer=tokenizer(), model_limit=64)
    assert data.stats.longest == 64


@pytest.mark.parametrize(("options", "says"), [
    ({"train_on": "completions"}, "Did you mean completion"), ({"template": "non"}, "Did you mean none"),
    ({"max_length": 1}, "at least 2"), ({"task": "seqcls"}, "Did you mean seq-cls"),
])
def test_options_that_do_not_exist(options, says):
    with pytest.raises(ConfigError, match=says):
        encode(CHATS[0], **options)


def test_every_bad_row_is_listed_with_its_line(tmp_path):
    path = tmp_path / "train.jsonl"
    good, bad = '{"prompt": "a", "completion": "b"}\n', '{"prompt": "a", "completion": ""}\n'
    path.write_text(good + bad + good * 2000 + bad * 30)
    with pytest.raises(DataError, match="and 11 more") as caught:
        load_data(str(path), tokenizer=tokenizer())
    assert str(caught.value.faults[0]).startswith(f"{path}:2: 'completion' is empty")
    assert str(caught.value.faults[1]).startswith(f"{path}:2003:")


def test_chunks_and_spilling_to_disk_change_nothing(monkeypatch):
    from deltaw.data import examples

    rows = [chat(f"hello {i}", f"the cat {i} sat") for i in range(23)]
    whole = encode(rows)
    monkeypatch.setattr(examples, "_CHUNK", 4)
    monkeypatch.setattr(examples, "_IN_MEMORY", 100)
    calls = []
    data = load_data(rows, tokenizer=tokenizer(), on_progress=lambda done, total: calls.append((done, total)))
    assert isinstance(data._columns.ids, np.memmap)
    assert [data[i] for i in range(len(data))] == whole
    assert calls == [(4, 23), (8, 23), (12, 23), (16, 23), (20, 23), (23, 23)]


def test_a_full_disk_says_so(monkeypatch):
    from deltaw.data import examples, tokens

    def full(prefix):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(examples, "_IN_MEMORY", 10)
    monkeypatch.setattr(tokens.tempfile, "TemporaryFile", full)
    with pytest.raises(DataError, match=r"No space left on device.*TMPDIR"):
        encode(CHATS[0])


@pytest.mark.parametrize("train_on", ["completion", "all"])
def test_a_prompt_is_what_the_model_sees_before_it_answers(train_on):
    tok = tokenizer()
    rows = [chat("hello", "the cat"), chat("what?", "yes", "and", "no, maybe")]
    data = load_data(rows, tokenizer=tok, train_on=train_on)
    for i, row in enumerate(rows):
        prompt = data.prompt(i)
        assert prompt.input_ids == tok.apply_chat_template(row["messages"][:-1], add_generation_prompt=True,
                                                           tokenize=True, return_dict=False)
        assert prompt.answer == row["messages"][-1]["content"]
    with pytest.raises(ConfigError, match="no prompt"):
        load_data([{"text": "a cat"}], tokenizer=tok).prompt(0)


# -------------------------------------------------------------------------------------------------------- classes

def labelled(*labels):
    return [{"text": f"the cat {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.parametrize(("labels", "names", "numbers"), [
    (["no", "yes", "maybe", "no"], ("maybe", "no", "yes"), [1, 2, 0, 1]),
    ([1, 0, 2, 1], ("0", "1", "2"), [1, 0, 2, 1]),
    ([10, 9, 1], ("1", "9", "10"), [2, 1, 0]),
    (["1", "0"], ("0", "1"), [1, 0]),
])
def test_classes_are_collected_and_sorted(labels, names, numbers):
    data = load_data(labelled(*labels), tokenizer=tokenizer(), task="seq-cls")
    assert data.label_names == names
    assert [data[i].label for i in range(len(data))] == numbers
    assert data[0].input_ids == tokenizer()("the cat 0").input_ids


def test_given_classes_take_names_and_numbers():
    data = load_data(labelled("yes", 0, "1"), tokenizer=tokenizer(), task="seq-cls", labels=["no", "yes"])
    assert [data[i].label for i in range(3)] == [1, 0, 1]
    assert data.label_names == ("no", "yes")


@pytest.mark.parametrize(("label", "says"), [
    (2, r"row 3: label '2' is not one of the 2 classes; expected no, yes, or 0 to 1"), (-1, "label '-1'"),
    ("yess", "Did you mean yes"),
])
def test_labels_out_of_range(label, says):
    with pytest.raises(DataError, match=says):
        load_data(labelled("yes", "no", label), tokenizer=tokenizer(), task="seq-cls", labels=["no", "yes"])


def test_one_class_teaches_nothing():
    with pytest.raises(DataError, match="the one label '1' in every row"):
        load_data(labelled(1, 1), tokenizer=tokenizer(), task="seq-cls")


def test_pairs_have_token_types_and_are_cut():
    tok = tokenizer(bos=True)
    rows = [{"text": "the cat", "text_pair": "hello world", "label": i} for i in range(2)]
    made = load_data(rows, tokenizer=tok, task="seq-cls")[1]
    reference = tok("the cat", "hello world", return_token_type_ids=True)
    assert isinstance(made, LabelledExample)
    assert (made.input_ids, made.token_type_ids) == (reference.input_ids, reference.token_type_ids)
    data = load_data(rows, tokenizer=tok, task="seq-cls", max_length=5)
    assert data.stats.truncated == 2
    assert len(data[0].input_ids) == 5


# ----------------------------------------------------------------------------------------- the real tokenizer, data

@pytest.mark.slow
def test_the_real_template_on_real_questions(smollm2, shared_data):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(smollm2)
    data = load_data(shared_data / "gsm8k" / "train.jsonl", tokenizer=tok, max_length=512,
                     columns={"prompt": "question", "completion": "answer"})
    assert data.stats.rows == len(data) + data.stats.dropped_no_supervision == 7473
    for i in range(0, len(data), 97):
        row = data.source[int(data._columns.rows[i])].values
        messages = [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]
        before = tok.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=True, return_dict=False)
        answer = tok(row["answer"] + "<|im_end|>", add_special_tokens=False).input_ids
        example = data[i]
        assert isinstance(example, Example)
        assert example.input_ids == [*before, *answer, *tok("\n").input_ids][:512]
        assert example.labels == [*[-100] * len(before), *answer, -100][:512]


@pytest.mark.slow
def test_real_classes(smollm2, shared_data):
    from transformers import AutoTokenizer

    data = load_data(shared_data / "banking77" / "train.csv", tokenizer=AutoTokenizer.from_pretrained(smollm2),
                     task="seq-cls", columns={"label": "category"})
    assert len(data.label_names) == 77
    assert len(data) == 10003
