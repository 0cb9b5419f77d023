"""Statistics, the table, and a file that a second run continues."""

import json

import numpy as np
import pytest

from minimti.evaluate.results import HEADER, Results, bootstrap, summary
from minimti.io.files import InputError

FINGERPRINT = {"layer.weight": [0.5, 1.0]}


def test_statistics_are_over_clips_motions_and_seeds():
    found = summary([{"a": [1.0, 3.0], "b": [4.0, 8.0]}, {"c": [2.0, 2.0], "d": [6.0, 6.0]}])
    assert found["mean"] == 4 and found["clips"] == 8
    assert found["motions"] == {"a": 2, "b": 6, "c": 2, "d": 6} and found["over_motions"] == 2
    assert found["over_seeds"] == 0
    assert summary([{"a": [1.0]}, {"a": [3.0]}])["over_seeds"] == 1


def test_rates_count_answers_only():
    found = summary([{"a": [True, None], "b": [None, None]}, {"a": [False, True]}])
    assert found["mean"] == pytest.approx(2 / 3) and found["clips"] == 3
    assert found["motions"] == {"a": pytest.approx(2 / 3)} and found["over_seeds"] == 0.25
    nothing = summary([{"a": [None]}])
    assert nothing["mean"] is nothing["over_motions"] is nothing["over_seeds"] is None and nothing["clips"] == 0


def test_the_interval_is_that_of_a_mean_over_motions():
    """As wide as the normal distribution says, where clips of a motion tell no more than one of them."""
    motions = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap([[motion] * 7 for motion in motions])
    half = 1.96 * motions.std() / 20
    assert low == pytest.approx(motions.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(motions.mean() + half, abs=0.1 * half)
    low, high = bootstrap([[0.0], [1.0, 1.0, 1.0]])  # a draw has the mean 0, 3/4 or 1, over its clips
    assert (low, high) == (0, 1) and bootstrap([[1.0]]) is None


def test_a_motion_of_two_seeds_is_two_motions_for_the_interval():
    assert summary([{"a": [1.0]}, {"a": [3.0]}])["interval"] == [1, 3]


def test_the_table_has_a_row_for_each_quantity_over_the_seeds_that_are_named():
    results = Results(None, {}, FINGERPRINT)
    for seed, errors in ((0, [0.5, 1.5]), (1, [2.0, 4.0]), (2, [100.0])):
        results.add(seed, "flip", {"row": {"error": {str(seed): errors}, "rate": {"a": [True, None]}}}, 1.0)
    assert results.table("flip", [0, 1]) == [
        "| flip: row | error | 2 | 1 to 3 | 1 | 1 | 4 |",
        "| flip: row | rate | 1 | 1 to 1 | 0 | 0 | 2 |",
    ]
    assert results.table("flip", [0])[0] == "| flip: row | error | 1 | - | 0 | - | 2 |"
    assert HEADER.splitlines()[0].count("|") == 8


def test_a_file_is_continued_by_a_run_of_the_same_settings(tmp_path):
    path = tmp_path / "found.json"
    first = Results(path, {"motions": 2}, FINGERPRINT)
    first.add(0, "caption", {"row": {"error": {"a": [0.5, None]}}}, 1.0)
    second = Results(path, {"motions": 2}, FINGERPRINT)
    assert second.has(0, "caption") and not second.has(1, "caption") and not second.has(0, "transfer")
    assert second.table("caption", [0]) == first.table("caption", [0])
    second.add(1, "caption", {"row": {"error": {"a": [1.5]}}}, 1.0)
    seeds = json.loads(path.read_text())["seeds"]
    assert list(seeds) == ["0", "1"] and seeds["0"]["caption"]["rows"]["row"]["error"]["values"] == {"a": [0.5, None]}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "was not written by minimti.evaluate"),
        ("[]", "was not written by minimti.evaluate"),
        ('{"settings": [], "fingerprint": {}, "seeds": {}}', "was not written by minimti.evaluate"),
        ('{"settings": {}, "fingerprint": {}, "seeds": {"0": []}}', "was not written by minimti.evaluate"),
        ('{"settings": {}, "fingerprint": {}, "seeds": {"0": {"caption": {}}}}', "was not written by minimti.evaluate"),
        ('{"settings": {"motions": 3}, "fingerprint": {}, "seeds": {}}', "motions 3, not 2"),
        ('{"settings": {"motions": 2}, "fingerprint": {"layer.weight": [0.5, 2.0]}, "seeds": {}}', "of other weights"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "found.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        Results(path, {"motions": 2}, FINGERPRINT)
