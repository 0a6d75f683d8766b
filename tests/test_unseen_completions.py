"""The strict graders over completions that were written down before they were mended: tests/completions/unseen."""

import pytest
import unseen

SHARE = 0.98


def test_there_are_75_unseen_completions_of_each_kind_and_more_right_than_wrong_ones():
    tables = [unseen.rows(file) for file in unseen.FILES]
    assert [len(table) for table in tables] == [75] * 4
    assert all(0.5 < sum(row["strict"] for row in table) / len(table) < 0.6 for table in tables)


@pytest.mark.parametrize("file", unseen.FILES)
def test_strict_verdicts_are_right_on_98_percent_of_the_unseen_completions(file):
    wrong = unseen.wrong(file)
    assert len(wrong) <= (1 - SHARE) * len(unseen.rows(file)), wrong
