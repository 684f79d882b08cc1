"""Plain words beside a study's figures, each against figures whose reading is known."""

from __future__ import annotations

from deltaw.compare import StudyResult
from deltaw.compare.noise import measured
from deltaw.compare.table import Row
from deltaw.report.study_findings import at_equal_size, by_rank, by_size, curves, latency


def study(arms: dict[str, tuple[float, ...]], ranks: dict[str, tuple[str, int]] | None = None, *,
          sizes: dict[str, int | None] | None = None, figure: str = "accuracy", **config: object) -> StudyResult:
    rows = tuple(Row(arm=name.split("@")[0], size=(sizes or {}).get(name), figures={figure: measured(values)})
                 for name, values in arms.items())
    return StudyResult(kind="sweep", folder="s", config=dict(config), judged_by=figure, rows=rows, curves={},
                       ranks=ranks or {})


RANKS = {"q r=1": ("q", 1), "q r=4": ("q", 4), "q r=64": ("q", 64)}


def test_the_smallest_rank_within_noise_of_the_best_is_named() -> None:
    found = by_rank(study({"q r=1": (0.5, 0.52), "q r=4": (0.79, 0.81), "q r=64": (0.80, 0.82)}, RANKS))
    assert found == ["q: r=64 has the best accuracy, 81 ± 1.4; r=4, 80 ± 1.4, is within the seeds' noise of it."]
    found = by_rank(study({"q r=1": (0.9, 0.92), "q r=4": (0.5, 0.52)}, RANKS))
    assert found == ["q: r=1 has the best accuracy, 91 ± 1.4, and no smaller rank is within the seeds' noise of it."]
    found = by_rank(study({"q r=1": (0.9,), "q r=4": (0.5,)}, RANKS, figure="loss"))
    assert found == ["q: r=4 has the best loss, 0.5; with one seed it is not known how much of that is chance."]
    assert by_rank(study({"q r=1": (0.9,)}, RANKS)) == []


def test_the_best_with_each_number_of_examples_and_whether_the_order_holds() -> None:
    sizes = {"a@few": 100, "b@few": 100, "a": None, "b": None}
    found = by_size(study({"a@few": (0.6,), "b@few": (0.5,), "a": (0.8,), "b": (0.9,)}, sizes=sizes))
    assert found == ["With 100 examples a has the best accuracy, 60.", "With all examples b has the best accuracy, 90.",
                     "The order of the arms by their means depends on the number of examples."]
    # An arm that was not trained with each number of them has no part in that.
    found = by_size(study({"a@few": (0.6,), "b@few": (0.5,), "a": (0.95,), "c": (0.93,), "b": (0.9,)}, sizes=sizes))
    assert found[-1] == "The order of the arms by their means is the same with every number of examples."


def test_latency_is_a_share_of_the_bases_time() -> None:
    rows = [Row(arm="lora", latency={"base_1": 0.010, "tuned_1": 0.012, "merged_1": 0.0101}),
            Row(arm="adapter-h", latency={"base_1": 0.010, "tuned_1": 0.013}), Row(arm="n/a")]
    assert latency(rows) == ["One row: adapter-h takes 130 % of the base's time, the most; lora 120 % of it, the "
                             "least. Merged, lora takes 101 % of it."]
    assert latency(rows[2:]) == []


def test_curves_that_rise_again_are_named() -> None:
    found = curves({"lora": [(0, 2.0), (10, 1.5), (20, 1.2)], "full": [(0, 2.0), (10, 1.1), (20, 1.4)],
                    "nan": [(0, 2.0), (10, float("nan"))]})
    assert found == ["lora ends lowest, at 1.2.", "full was lowest after step 10, at 1.1, and rose to 1.4."]
    assert curves({"lora": [(0, 2.0), (10, 1.5)]}) == ["No arm's loss rose again: each was lowest at its end."]
    assert curves({}) == []


def test_sets_of_equal_size_are_told_apart_by_noise() -> None:
    arms = {"q r=8": (0.70, 0.72), "v r=8": (0.80, 0.82), "q+v r=4": (0.79, 0.83)}
    assert at_equal_size(study(arms, budget=1000)) == [
        "With at most 1,000 values v r=8 has the best accuracy, 81 ± 1.4, 10 higher than the last; within the seeds' "
        "noise of it: q+v r=4."]
