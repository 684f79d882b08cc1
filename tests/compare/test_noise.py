"""Means, spreads and margins, against numpy's and scipy's; and the advice that rests on them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from deltaw.compare.advice import advise
from deltaw.compare.noise import Noise, measured, noise_of, pooled, student_t
from deltaw.compare.table import Row


def test_mean_and_spread_are_numpys() -> None:
    values = [0.3, 0.7, 0.45, 0.9]
    found = measured(values)
    assert found.mean == pytest.approx(np.mean(values))
    assert found.sd == pytest.approx(np.std(values, ddof=1))
    assert (found.n, str(found)) == (4, "0.5875 ± 0.27")
    assert measured([2.0]).sd is None


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 6, 10, 30, 200])
def test_students_t_is_scipys(freedom: int) -> None:
    assert student_t(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=0.01)


def test_a_margin_of_two_arms_is_the_t_tests() -> None:
    one, other = [0.70, 0.74, 0.69], [0.78, 0.80, 0.75]
    groups = [measured(one), measured(other)]
    noise = noise_of(groups)
    assert noise is not None
    # A difference as large as the margin is one of p = 0.05 in the t test of equal variances.
    shift = noise.margin(*groups) - (np.mean(other) - np.mean(one))
    assert stats.ttest_ind(one, [v + shift for v in other]).pvalue == pytest.approx(0.05, rel=0.03)


STEADY = [[0.86, 0.87, 0.85], [0.865, 0.872, 0.858], [0.80, 0.81, 0.79]]
COLLAPSED = [0.85, 0.84, 0.46]


def test_an_arm_that_collapsed_with_one_seed_does_not_hide_what_tells_the_others_apart() -> None:
    groups = [measured(values) for values in (*STEADY, COLLAPSED)]
    noise = noise_of(groups)
    assert noise is not None
    assert noise.sd == pooled(groups[:3])
    assert noise.freedom == 6
    assert noise.margin(groups[1], groups[2]) < 0.03
    advice = advise([row("full", 9, *STEADY[1]), row("bias", 1, *STEADY[2]), row("lora", 2, *STEADY[0]),
                     row("wild", 0, *COLLAPSED)], "accuracy")
    assert advice is not None
    assert (advice.best, advice.arm) == ("full", "lora")
    assert "wild" in advice.within_noise  # by its own spread it is not surely worse, and it is not recommended
    assert "depends on the seed: wild (71.67 ± 22)" in advice.text


def test_an_unsteady_arms_margin_is_welchs() -> None:
    noise = Noise(sd=float(np.std(STEADY[0], ddof=1)), freedom=2, widest=0.1)
    steady, wild = measured(STEADY[0]), measured(COLLAPSED)
    difference = noise.margin(steady, wild)
    shift = np.mean(COLLAPSED) + difference - np.mean(STEADY[0])
    found = stats.ttest_ind([v + shift for v in STEADY[0]], COLLAPSED, equal_var=False)
    # Student's t with the whole degrees of freedom below Welch's 2.0...: the margin is the wider one.
    assert found.pvalue == pytest.approx(0.05, rel=0.05)


def row(arm: str, parameters: int, *values: float, figure: str = "accuracy") -> Row:
    return Row(arm=arm, parameters=parameters, figures={figure: measured(values)}, seeds=tuple(range(len(values))))


def test_the_smallest_arm_within_noise_is_recommended() -> None:
    rows = [row("r=64", 6400, 0.80, 0.82, 0.81), row("r=4", 400, 0.79, 0.81, 0.80), row("r=1", 100, 0.60, 0.62, 0.61)]
    advice = advise(rows, "accuracy")
    assert advice is not None
    assert (advice.best, advice.arm, advice.within_noise) == ("r=64", "r=4", ("r=64", "r=4"))
    assert "r=4: accuracy 80 ± 1 is within noise of r=64's 81 ± 1 (difference 1; " in advice.text
    assert "16 times fewer" in advice.text


def test_a_lower_loss_is_better_and_clear_differences_are_kept() -> None:
    rows = [row("small", 1, 1.0, 1.01, figure="loss"), row("large", 9, 0.5, 0.51, figure="loss")]
    advice = advise(rows, "loss")
    assert advice is not None
    assert (advice.arm, advice.within_noise) == ("large", ("large",))


def test_one_seed_gives_no_noise_and_says_so() -> None:
    advice = advise([row("a", 1, 0.5), row("b", 2, 0.6)], "accuracy")
    assert advice is not None
    assert (advice.arm, advice.noise) == ("b", None)
    assert "With one seed" in advice.text


def test_a_figure_that_is_the_same_everywhere_recommends_nothing() -> None:
    advice = advise([row("a", 1, 0.0, 0.0), row("b", 2, 0.0, 0.0)], "accuracy")
    assert advice is not None
    assert "judge by a figure that tells them apart" in advice.text


def test_nothing_finished_is_no_advice() -> None:
    assert advise([Row(arm="a", failed={0: "out of memory"})], "loss") is None


def test_one_arm_is_no_advice_but_its_figure() -> None:
    advice = advise([row("lora", 5, 0.5, 0.7)], "accuracy")
    assert advice is not None
    assert advice.text == "lora has accuracy 60 ± 14; no other arm has one to compare it with."


def test_the_best_and_smallest_is_not_said_to_beat_smaller_ones() -> None:
    advice = advise([row("small", 1, 0.90, 0.91), row("large", 9, 0.10, 0.11)], "accuracy")
    assert advice is not None
    assert "no smaller arm is within the seeds' noise of it" in advice.text
