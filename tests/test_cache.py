from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sva.generation.engine import EngineConfig
from sva.models import cache as kv_cache
from sva.models.attention import attend
from sva.models.cache import BLOCK, KV, KVSegment
from sva.models.stacks import Scan
from sva.utils.errors import UserError

ROWS, HEADS, WIDTH = 4, 2, 8


def _plain(slots: int, *, scan: Scan, seed: int = 0, dtype: Any = jnp.float32) -> KVSegment:
    """Random keys and values of two layers in no blocks, as a call leaves them."""
    rng = np.random.default_rng(seed)

    def kv(*lead: int) -> KV:
        k = rng.standard_normal((*lead, ROWS, HEADS, WIDTH, slots), np.float32)
        v = rng.standard_normal((*lead, ROWS, HEADS, slots, WIDTH), np.float32)
        return kv_cache.kept(jnp.asarray(k), jnp.asarray(v), dtype)

    places = jnp.asarray(rng.integers(0, 99, (ROWS, slots)), jnp.int32)
    layers = {False: (kv(), kv()), True: (kv(2),), (1,): (kv(1), kv(1))}[scan]
    return KVSegment(layers, places, places % 3 > 0)


def _slots_first(part: KVSegment) -> list[np.ndarray]:
    """Every leaf's slots in order, [..., S, H] or [P, S], however they lie in blocks."""
    found = [np.asarray(part.positions), np.asarray(part.valid)]
    for kv in part.kv:
        for k, v in zip(jax.tree.leaves(kv.k), jax.tree.leaves(kv.v), strict=True):
            k = np.asarray(k).swapaxes(-1, -2)
            found += [k.reshape(*k.shape[:-3], -1, k.shape[-1]) if kv.in_blocks else k, np.asarray(v)]
    return found


def _equal(left: KVSegment, right: KVSegment, slots: int) -> None:
    for x, y in zip(_slots_first(left), _slots_first(right), strict=True):
        axis = 1 if x.ndim == 2 else x.ndim - 2
        np.testing.assert_array_equal(np.take(x, range(slots), axis), np.take(y, range(slots), axis))


@pytest.mark.parametrize("scan", [False, True, (1,)], ids=["unrolled", "scanned", "cut"])
@pytest.mark.parametrize("slots", [97, 128, 300])
def test_a_part_keeps_its_slots_in_more_blocks_and_in_fewer(slots, scan):
    plain = _plain(40, scan=scan)
    more = kv_cache.resize(plain, slots)
    blocks, size = kv_cache.blocks_of(slots, scan=scan)
    assert more.valid.shape[1] == blocks * size >= slots
    assert not np.asarray(more.valid)[:, 40:].any()
    _equal(more, plain, 40)
    _equal(kv_cache.resize(kv_cache.resize(more, slots + 200), slots), plain, 40)
    _equal(kv_cache.resize(more, 40), plain, 40)


@pytest.mark.parametrize("scan", [False, True, (1,)], ids=["unrolled", "scanned", "cut"])
def test_each_row_appends_at_its_own_place(scan):
    part, new = kv_cache.resize(_plain(160, scan=scan), 160), _plain(8, scan=scan, seed=1)
    used = np.array([0, 8, 88, 152], np.int32)
    found = _slots_first(kv_cache.append(part, jnp.asarray(used), new))
    for x, old, added in zip(found, _slots_first(part), _slots_first(new), strict=True):
        rows_first = [np.moveaxis(a, int(bool(scan) and a.ndim == 5), 0) for a in (x, old, added)]
        for row, at in enumerate(used):
            expected = rows_first[1][row].copy()
            axis = 0 if x.ndim == 2 else expected.ndim - 2
            place = [slice(None)] * expected.ndim
            place[axis] = slice(at, at + 8)
            expected[tuple(place)] = rows_first[2][row]
            np.testing.assert_array_equal(rows_first[0][row], expected)


@pytest.mark.parametrize("scan", [False, True, (1,)], ids=["unrolled", "scanned", "cut"])
def test_rows_are_taken_and_put_back_whole(scan):
    part = kv_cache.resize(_plain(128, scan=scan), 128)
    one = kv_cache.rows(part, jnp.asarray([2]))
    _equal(kv_cache.rows(kv_cache.replace_rows(part, jnp.asarray([0]), one), jnp.asarray([0])), one, 128)


def test_int8_keeps_each_slot_within_half_a_step_and_goes_through_blocks_unchanged():
    whole, small = _plain(40, scan=False), _plain(40, scan=False, dtype=jnp.int8)
    for kv, rounded in zip(whole.kv, small.kv, strict=True):
        for x, found, axis in ((kv.k, rounded.k, -2), (kv.v, rounded.v, -1)):
            assert found.q.dtype == jnp.int8
            assert (np.abs(x - found.q * found.scale) <= 0.501 * found.scale).all()
            assert (np.abs(found.q).max(axis) == 127).all()
    more = kv_cache.resize(small, 160)
    assert more.kv[0].k.q.shape[2] == more.kv[0].k.scale.shape[2] == 160 // BLOCK
    _equal(more, small, 40)
    _equal(kv_cache.resize(more, 40), small, 40)


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("length", [1, 3])  # a step of decoding; several tokens over two parts, part by part
def test_attention_over_int8_is_that_over_the_floats_it_stands_for(rows, length):
    q = jnp.asarray(np.random.default_rng(2).standard_normal((rows, length, 2 * HEADS, WIDTH), np.float32))
    parts = [kv_cache.rows(_plain(slots, scan=False, dtype=jnp.int8), jnp.arange(rows)) for slots in (128, 40)]
    parts[0] = kv_cache.resize(parts[0], 128)
    sees = jnp.broadcast_to(jnp.concatenate([part.valid for part in parts], 1)[:, None], (rows, length, 168))
    small = [part.kv[0] for part in parts]
    wide = [KV(kv.k.q * kv.k.scale, kv.v.q * kv.v.scale) for kv in small]
    np.testing.assert_allclose(attend(q, small, sees), attend(q, wide, sees), atol=1e-6)


@pytest.mark.parametrize("rows", [1, ROWS])
def test_attention_does_not_depend_on_the_blocks(rows):
    part = kv_cache.rows(_plain(128, scan=False), jnp.arange(rows))
    blocked = kv_cache.resize(part, 128)
    assert blocked.kv[0].k.shape[2] == 128 // BLOCK
    q = jnp.asarray(np.random.default_rng(2).standard_normal((rows, 1, 2 * HEADS, WIDTH), np.float32))
    one, many = (attend(q, [each.kv[0]], part.valid[:, None]) for each in (part, blocked))
    np.testing.assert_allclose(one, many, atol=1e-6)


def test_a_segment_that_would_leave_its_block_is_refused():
    with pytest.raises(UserError, match="steps=12 must divide 32"):
        EngineConfig(steps=12)
