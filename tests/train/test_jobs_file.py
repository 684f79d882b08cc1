"""Jobs files: what they hold, and that every fault names the entry, the key and a remedy, all at once."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltaw.errors import ConfigError
from deltaw.train import TrainMany
from deltaw.train.control import Control
from deltaw.train.jobs_file import read_jobs
from tests.train.many_sets import config_maker, together

GOOD = """
base: {model: base/, dtype: fp32}
together: {out: set, budget_tokens: 2048}
defaults: {max_steps: 7, learning_rate: 5e-4}
datasets:
  - {name: chats, data: chats.jsonl, max_length: 64, columns: {prompt: q}}
adapters:
  - {name: r8, r: 8, lora_alpha: 16}
  - {name: wide, r: 64, target_modules: [q_proj, v_proj]}
tasks:
  - {adapter: r8, dataset: chats, out: out/r8}
  - {adapter: wide, dataset: chats, out: out/wide, name: second, learning_rate: 1e-4, priority: 2, compile: off}
"""


def write(folder: Path, text: str, name: str = "jobs.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def faults(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_jobs(write(folder, text))
    return str(caught.value)


def test_what_a_file_holds(tmp_path: Path) -> None:
    found = read_jobs(write(tmp_path, GOOD))
    first, second = found.jobs
    assert (first.name, first.priority, first.config.learning_rate, first.config.max_steps) == ("r8", 1.0, 5e-4, 7)
    assert (second.name, second.priority, second.config.learning_rate) == ("second", 2, 1e-4)
    assert second.config.compile == "off"
    assert second.config.lora.target_modules == ("q_proj", "v_proj")
    assert second.config.columns == {"prompt": "q"}
    assert {job.config.model for job in found.jobs} == {"base/"}
    assert found.together is not None
    assert (found.together.out, found.together.budget_tokens, found.together.resume) == ("set", 2048, False)
    again = read_jobs(write(tmp_path, GOOD), resume=True)
    assert again.together is not None
    assert again.together.resume


def test_how_the_base_is_quantized_belongs_to_the_base_and_to_jobs_that_join(tmp_path: Path) -> None:
    text = GOOD.replace("dtype: fp32", "dtype: fp32, quantize: nf4, double_quant: false, quantize_tables: int8")
    found = read_jobs(write(tmp_path, text))
    assert {(job.config.quantize, job.config.double_quant, job.config.quantize_tables) for job in found.jobs} == {
        ("nf4", False, "int8")}
    more = {"datasets": [{"name": "d", "data": "x"}], "adapters": [{"name": "c"}],
            "tasks": [{"adapter": "c", "dataset": "d", "out": "c"}]}
    joining = read_jobs(write(tmp_path, json.dumps(more), "more.yaml"), base=found.jobs[0].config).jobs[0].config
    assert (joining.quantize, joining.double_quant, joining.quantize_tables) == ("nf4", False, "int8")


def test_json_is_read_too(tmp_path: Path) -> None:
    import yaml

    content = yaml.safe_load(GOOD.replace("5e-4", "0.0005").replace("1e-4", "0.0001").replace("off", '"off"'))
    found = read_jobs(write(tmp_path, json.dumps(content), "jobs.json"))
    assert [job.config for job in found.jobs] == [job.config for job in read_jobs(write(tmp_path, GOOD)).jobs]


def test_all_faults_at_once_each_with_entry_key_and_remedy(tmp_path: Path) -> None:
    text = faults(tmp_path, """
base: {model: base/, dtyp: fp32}
together: {budget_tokens: 0}
datasets: [{name: chats, data: chats.jsonl}, {name: chats, data: more.jsonl}, {data: x.jsonl}]
adapters: [{name: r8, r: 0}, {name: wide, rank: 64}]
task: []
tasks:
  - {adapter: r8, dataset: chat, out: out/r8}
  - {adapter: r8, dataset: chats, out: out/r8, learning_rate: fast}
  - {adapter: wide, dataset: chats, learning_rat: 1}
""")
    for expected in ("'task': is unknown", "base: 'dtyp': is unknown", "Did you mean dtype?",
                     "together: 'out': is missing",
                     "dataset 2 'chats': the name 'chats' is there twice", "dataset 3: 'name': is missing",
                     "adapter 2 'wide': 'rank': is unknown", "task 1 'r8': dataset: got 'chat'; expected one of chats",
                     "Did you mean chats", "task 2 'r8', adapter 'r8': r: got 0; expected a whole number >= 1",
                     "task 3 'wide': 'learning_rat': is unknown", "Did you mean learning_rate",
                     "task 3 'wide': 'out': is missing"):
        assert expected in text, expected


@pytest.mark.parametrize(("text", "said"), [
    ("", "holds nothing"), ("- a", "holds list"), ("a: [", "does not parse"), ("base: {model: a}\nbase: {model: b}",
                                                                             "line 1: the key 'base' is there twice"),
    ("base: {model: a}\ntasks: {}", "tasks: holds nothing"), ("base: 3", "base: is 3"),
    ("base: {model: !!python/object/apply:os.system [ls]}", "does not parse")])
def test_files_that_are_no_jobs(tmp_path: Path, text: str, said: str) -> None:
    assert said in faults(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_jobs(tmp_path / "none.yaml")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), lambda inner: st.lists(
    inner, max_size=3) | st.dictionaries(st.sampled_from(["base", "tasks", "adapters", "datasets", "name", "out", "r",
                                                          "together", "x"]), inner, max_size=4), max_leaves=10))
@settings(max_examples=40)
def test_whatever_it_holds_it_is_read_or_refused(content: object) -> None:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        path = write(Path(folder), json.dumps(content))
        with suppress(ConfigError):
            read_jobs(path)


def test_the_control_folder(base_folder: Path, color_rows: Path, tmp_path: Path) -> None:
    make = config_maker(base_folder, color_rows, tmp_path)
    with TrainMany([make("a", max_steps=4), make("b", max_steps=50)], together(tmp_path), quiet=True) as many:
        control = Control(many.record.folder)
        folder = control.folder
        many.save()  # as a set does when it begins: the folders of its jobs then hold runs that are not finished
        many.round()
        (folder / "a.pause").touch()
        (folder / "zz.cancel").touch()
        (folder / "b.stopp").touch()
        (folder / "more.yaml").write_text(json.dumps({
            "datasets": [{"name": "d", "data": str(color_rows), "eval_rows": 4}], "adapters": [{"name": "c", "r": 2}],
            "tasks": [{"adapter": "c", "dataset": "d", "out": str(tmp_path / "c"), "max_steps": 3, "samples": 0}]}))
        control.obey(many)
        assert many.jobs["a"].status == "paused"
        assert set(many.jobs) == {"a", "b", "c"}
        assert {p.name for p in (folder / "done").iterdir()} == {"a.pause", "more.yaml"}
        assert "is not in the set" in (folder / "refused" / "zz.cancel.txt").read_text()
        assert "has the ending '.stopp'" in (folder / "refused" / "b.stopp.txt").read_text()
        for _ in range(3):
            many.round()
        (folder / "b.cancel").touch()
        (folder / "a.resume").touch()
        control.obey(many)
        result = many.run()
    assert {n: (j.status, j.steps) for n, j in result.jobs.items()} == {
        "a": ("finished", 4), "b": ("cancelled", 4), "c": ("finished", 3)}
    assert (tmp_path / "c" / "adapter_model.safetensors").is_file()


def test_a_file_with_a_fault_in_one_task_lets_none_join(base_folder: Path, color_rows: Path, tmp_path: Path) -> None:
    make = config_maker(base_folder, color_rows, tmp_path)
    task = {"dataset": "d", "max_steps": 3, "samples": 0}
    with TrainMany([make("a", max_steps=4)], together(tmp_path), quiet=True) as many:
        control = Control(many.record.folder)

        def ask(name: str, data: object, out: str, **adapter: object) -> str:
            adapters = [{"name": "c", "r": 2}, {"name": "e", "r": 2, **adapter}]
            (control.folder / name).write_text(json.dumps({
                "datasets": [{"name": "d", "data": str(color_rows), "eval_rows": 4}, {"name": "x", "data": data}],
                "adapters": adapters, "tasks": [
                    {**task, "adapter": "c", "out": str(tmp_path / "c"), "dataset": "d"},
                    {**task, "adapter": "e", "out": str(tmp_path / out), "dataset": "x"}]}))
            control.obey(many)
            return (control.folder / "refused" / f"{name}.txt").read_text()

        assert "job 'e': " in ask("missing.yaml", str(tmp_path / "none.jsonl"), "e")
        assert "job 'e': out" in ask("taken.yaml", str(color_rows), "c")
        assert set(many.jobs) == {"a"}
        said = ask("late.yaml", str(color_rows), "e", target_modules=["nothing_here"])
        assert "job 'e': " in said
        assert "joined before it: c" in said
        assert set(many.jobs) == {"a", "c"}
        many.run()
        (control.folder / "after.yaml").write_text("{}")
        control.obey(many)
    assert (control.folder / "refused" / "after.yaml.txt").is_file()


def test_a_request_that_breaks_something_leaves_the_jobs_at_work(base_folder: Path, color_rows: Path, tmp_path: Path,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    make = config_maker(base_folder, color_rows, tmp_path)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    with TrainMany([make("a", max_steps=2)], together(tmp_path), quiet=True) as many:
        control = Control(many.record.folder)
        monkeypatch.setattr("deltaw.train.control.read_jobs", broken)
        (control.folder / "more.yaml").touch()
        control.obey(many)
        assert "RuntimeError: a bug" in (control.folder / "refused" / "more.yaml.txt").read_text()
        assert many.run().jobs["a"].status == "finished"
