import numpy as np
import pytest

from sva.utils.padding import (
    batch_bucket,
    budget_bucket,
    common_prefix,
    left_pad,
    length_bucket,
    packed_token_indices,
    pad_rows,
    pad_tokens,
    prompt_bucket,
)


@pytest.mark.parametrize("bucket", [length_bucket, budget_bucket, batch_bucket])
def test_a_bucket_holds_its_sizes_and_buckets_are_few(bucket):
    sizes = np.arange(1, 4097)
    held = np.array([bucket(int(size)) for size in sizes])
    assert (held >= sizes).all()
    assert (np.diff(held) >= 0).all()
    assert all(bucket(int(size)) == size for size in np.unique(held))
    assert len(np.unique(held)) < 140
    assert (held[sizes >= 32] < 2 * sizes[sizes >= 32]).all()


def test_the_buckets_of_small_sizes():
    assert [length_bucket(n) for n in (0, 1, 32, 33, 128, 129, 257, 1025)] == [32, 32, 32, 48, 128, 160, 384, 1536]
    assert [budget_bucket(n) for n in (1, 8, 9, 64, 65, 513)] == [8, 8, 16, 64, 128, 768]
    assert [batch_bucket(n) for n in (1, 2, 3, 5, 32, 33)] == [1, 2, 4, 8, 32, 64]


def test_tokens_move_to_the_right_end_from_either_side():
    ids = np.array([[7, 8, 0], [0, 5, 6], [9, 9, 9], [1, 1, 1]])
    mask = np.array([[1, 1, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    out, keep = left_pad(ids, mask, 4)
    np.testing.assert_array_equal(out, [[0, 0, 7, 8], [0, 0, 5, 6], [0, 9, 9, 9], [0, 0, 0, 0]])
    np.testing.assert_array_equal(keep, [[0, 0, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0]])


def test_rows_are_filled_with_the_first():
    x = np.array([[1, 2], [3, 4]])
    np.testing.assert_array_equal(pad_rows(x, 4), [[1, 2], [3, 4], [1, 2], [1, 2]])
    assert pad_rows(x, 2) is x


def test_the_shared_prefix_is_what_all_rows_begin_with_and_leaves_each_a_token():
    rows = np.arange(40)[None].repeat(3, axis=0)
    rows[1, 30:] += 100
    assert common_prefix(rows) == 24
    assert common_prefix(rows[[0, 2]]) == 32  # equal rows: 39 at most
    assert common_prefix(rows[:1]) == 0
    assert common_prefix([*rows[:1, :9], rows[1, :12]]) == 8
    assert common_prefix(rows[:, :8]) == 0


def test_prompts_of_any_length_meet_few_buckets_that_hold_them():
    found = [prompt_bucket(n) for n in range(1, 2000)]
    assert all(n <= bucket < 2 * n + 32 for n, bucket in zip(range(1, 2000), found, strict=True))
    assert len(set(found)) == 16


def test_packed_places_are_every_token_once_and_a_few_of_the_first_again():
    rng = np.random.default_rng(0)
    sizes = set()
    for tokens in rng.integers(20, 120, 100):
        mask = (np.arange(128)[None, :] >= 128 - rng.integers(tokens // 2, tokens, 32)[:, None]).astype(np.int32)
        places, real = packed_token_indices(mask), np.flatnonzero(mask)
        np.testing.assert_array_equal(places[: len(real)], real)
        assert (places[len(real) :] == real[0]).all()
        sizes.add(len(places))
    assert sizes == {mask.size // 2, mask.size * 3 // 4}


def test_what_has_no_padding_few_places_or_no_token_is_not_packed():
    assert packed_token_indices(np.ones((32, 64), np.int32)) is None
    assert packed_token_indices(np.eye(31, dtype=np.int32)) is None
    assert packed_token_indices(np.zeros((64, 64), np.int32)) is None


def test_token_lists_are_padded_with_zeros_on_the_side_asked_for():
    rows = [[5, 6, 7], [], np.array([8])]
    ids, mask = pad_tokens(rows, 4)
    np.testing.assert_array_equal(ids, [[0, 5, 6, 7], [0, 0, 0, 0], [0, 0, 0, 8]])
    np.testing.assert_array_equal(mask, [[0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]])
    ids, mask = pad_tokens(rows, 4, side="right")
    np.testing.assert_array_equal(ids, [[5, 6, 7, 0], [0, 0, 0, 0], [8, 0, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert ids.dtype == mask.dtype == np.int32
