import numpy as np
import pytest

from sva.adaptation import dispatch_report


def test_confusion_counts_right_labels_by_chosen_ones():
    found = dispatch_report.confusion(["a", "a", "b"], ["a", "b", "b"], ["a", "b", "c"])
    np.testing.assert_array_equal(found, [[1, 1, 0], [0, 1, 0], [0, 0, 0]])


def _row(right, chosen, first, second):
    amounts = [dict(zip(dispatch_report.AMOUNTS, values, strict=True)) for values in (first, second)]
    return {"right_label": right, "label": chosen, "prob": 0.5, "first": amounts[0], "second": amounts[1]}


def test_costs_are_sums_and_shares_of_the_first_pass():
    rows = [_row("a", "a", (1, 10, 0, 100), (3, 20, 5, 300)), _row("a", "other", (1, 10, 5, 100), (3, 20, 10, 500))]
    found = dispatch_report.scores(rows)
    assert found["cost"]["first"] == {"seconds": 2, "read": 20, "drawn": 5, "flops": 200}
    assert found["cost"]["second"] == {"seconds": 6, "read": 40, "drawn": 15, "flops": 800}
    assert found["cost"]["share_of_first"] == {"seconds": 0.25, "tokens": pytest.approx(25 / 80), "flops": 0.2}
    assert found["labels"] == ["a", "other"]
    assert found["confusion"] == [[1, 1], [0, 0]]
    assert found["right_label"]["mean"] == 0.5


def test_a_first_pass_that_does_nothing_has_no_share():
    nothing = (0, 0, 0, 0)
    assert dispatch_report.costs([_row("a", "a", nothing, nothing)])["share_of_first"]["seconds"] == 0
