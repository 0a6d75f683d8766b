"""Which rows a step sees."""

import subprocess
import sys

import pytest

from sva.tasks.batches import batch_indices

RECORDED = [58, 72, 20, 38, 61, 42]


def test_every_row_comes_once_before_any_comes_twice():
    rows = [i for step in range(30) for i in batch_indices(10, 4, step, seed=1)]
    passes = [tuple(rows[i : i + 10]) for i in range(0, 120, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len(set(passes)) == len(passes)


def test_a_step_needs_no_earlier_step_and_seeds_differ():
    late = batch_indices(2000, 8, 12345, seed=7)
    assert late == batch_indices(2000, 8, 12345, seed=7)
    assert late != batch_indices(2000, 8, 12345, seed=8)
    assert late != batch_indices(2000, 8, 12346, seed=7)


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batch_indices(3, 6, 0, seed=0)) == [0, 0, 1, 1, 2, 2]


def test_rows_are_the_same_in_another_process_and_on_another_day():
    assert batch_indices(100, 6, 3, seed=5) == RECORDED
    script = "from sva.tasks.batches import batch_indices; print(batch_indices(100, 6, 3, seed=5))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(RECORDED)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        batch_indices(0, 4, 0, seed=0)
