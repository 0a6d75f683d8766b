"""What a run says at its end where it had nothing to learn from."""

from sva.evaluation.evaluate import Record
from sva.training.outcome import nothing_learned

BEFORE = [
    Record("sums", "1 + 1", "I think it is 4", "4", False, 5),
    Record("sums", "2 + 2", "four", None, False, 2),
    Record("sums", "3 + 3", "x" * 100, "6", True, 2),
    Record("sums", "4 + 4", "unseen", "8", True, 2),
]


def _row(accuracy, zero_advantages):
    return {"step": 0, "accuracy": accuracy, "zero_advantages": zero_advantages}


def test_a_run_without_a_right_answer_shows_how_the_grader_read_three():
    (line,) = nothing_learned([_row(0.0, 1.0), _row(0.0, 0.5)], BEFORE)
    assert line.startswith("no sampled answer was right in 2 steps")
    assert "'I think it is 4' as '4' (wrong), 'four' as nothing (wrong), 'xxx" in line
    assert line.endswith("xxx' as '6' (right)")
    assert "x" * 61 not in line
    assert "unseen" not in line


def test_a_run_whose_samples_always_earned_the_same_says_that_nothing_was_learned():
    (line,) = nothing_learned([_row(1.0, 1.0), _row(0.5, 1.0)], BEFORE)
    assert line.startswith("every advantage was zero in 2 steps")
    assert "rollout.samples" in line


def test_a_run_that_could_learn_says_nothing():
    assert nothing_learned([_row(0.0, 1.0), _row(0.25, 0.5)], BEFORE) == []
    assert nothing_learned([_row(1.0, 0.0)], BEFORE) == []  # without a baseline, right answers alone teach
    assert nothing_learned([{"step": 0, "loss": 1.0}], BEFORE) == []  # given answers
    assert nothing_learned([{"step": 0, "accuracy": 0.5}], BEFORE) == []  # evolution, or an older version's rows
    assert nothing_learned([], BEFORE) == []
