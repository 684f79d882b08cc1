"""METEOR with WordNet, on one that is written here in WordNet's own format; and what it is called without."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltaw.train.metrics import text_figure

nltk = pytest.importorskip("nltk", reason="nltk is not installed")
PARTS = ("adj", "adv", "noun", "verb")
SYNONYMS = (("cat", "tom"), ("sofa", "couch", "lounge"))
"""Words that are their own stems: nltk looks for synonyms of what is left after stemming."""
ANSWER, REFERENCE = "The tom sat on a couch.", "the cat sat on a sofa"


def write_wordnet(folder: Path) -> None:
    """A WordNet of a few nouns: data files with their lines' own offsets, an index, and nothing irregular."""
    folder.mkdir(parents=True)
    for name in ("cntlist.rev", "index.sense", *(f"{part}.exc" for part in PARTS)):
        (folder / name).touch()
    (folder / "lexnames").write_text("".join(f"{i:02d}\tnoun.{i}\t1\n" for i in range(4)))
    for part in PARTS:
        data, index = "  1 WordNet 3.0 Copyright\n", ""
        for words in SYNONYMS if part == "noun" else ():
            place = len(data)
            data += f"{place:08d} 03 n {len(words):02x} {' '.join(f'{word} 0' for word in words)} 000 | a thing  \n"
            index += "".join(f"{word} n 1 0 1 0 {place:08d}  \n" for word in words)
        (folder / f"data.{part}").write_text(data)
        (folder / f"index.{part}").write_text(index)


@pytest.fixture(params=["folder", "zip"])
def wordnet(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """nltk's reader of that WordNet, which it finds where it looks for its data."""
    from nltk.corpus.reader import CorpusReader, WordNetCorpusReader
    from nltk.corpus.util import LazyCorpusLoader

    corpora = tmp_path / "corpora"
    write_wordnet(corpora / "wordnet")
    if request.param == "zip":
        shutil.make_archive(str(corpora / "wordnet"), "zip", corpora, "wordnet")
        shutil.rmtree(corpora / "wordnet")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    reader: Any = LazyCorpusLoader("wordnet", WordNetCorpusReader, LazyCorpusLoader("omw-2.0", CorpusReader, ".*"))
    monkeypatch.setattr(nltk.corpus, "wordnet", reader)  # the loader itself becomes the reader of what it found first
    yield reader
    for file in vars(reader).get("_data_file_map", {}).values():  # nltk keeps them open
        file.close()


def test_synonyms_match_where_wordnet_is(wordnet: Any) -> None:
    label, score = text_figure("meteor", [ANSWER], [[REFERENCE]])
    assert label == "meteor"
    # Six words and a full stop against six words, which all match in one chunk.
    precision, recall = 6 / 7, 1
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert score == pytest.approx(mean * (1 - 0.5 * (1 / 6) ** 3))


def test_it_is_the_mean_over_inputs_of_nltks_best_reference(wordnet: Any) -> None:
    from nltk.translate.meteor_score import meteor_score

    answers = [ANSWER, "a cat"]
    references = [[REFERENCE, "no one sat there"], ["the tom", "two lounges"]]
    split = [["the", "tom", "sat", "on", "a", "couch", "."], ["a", "cat"]]
    expected = [meteor_score([text.split() for text in texts], words, wordnet=wordnet)
                for texts, words in zip(references, split, strict=True)]
    assert expected[0] > expected[1] > 0
    assert text_figure("meteor", answers, references) == ("meteor", pytest.approx(sum(expected) / 2))


def test_without_wordnet_it_is_called_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    label, score = text_figure("meteor", ["the cats sat down"], [["the cat sat down"]])
    assert label == "meteor_exact_stem"
    # Four words match (one by its stem) in one chunk: 1·(1 - 0.5·(1/4)³).
    assert score == pytest.approx(1 - 0.5 / 64)
    assert text_figure("meteor", ["tom"], [["cat"]]) == ("meteor_exact_stem", 0)
