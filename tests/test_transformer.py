import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers

from sva.generation.testing import toy_lm
from sva.models import cache as kv_cache
from sva.models.cache import DecodeCache
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.load import load_params
from sva.models.transformer import Transformer, apply, logits, positions_of

ROWS, LENGTH = 3, 20
SCANNED = ("mistral", "qwen2")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """kind, scan -> (transformers' model, model, params, fingerprint)."""

    return tiny.loader(tmp_path_factory)


def _prompts(side):
    ids = np.random.default_rng(0).integers(0, tiny.VOCAB, (ROWS, LENGTH))
    mask = np.ones_like(ids)
    mask[1, :7] = side != "left"
    mask[1, -7:] = side != "right"
    return ids, mask


# Scanned every time: the one with windows, and the one with biases and a window in its last layer only.
@pytest.mark.parametrize(
    ("kind", "scan"),
    [(kind, False) for kind in tiny.KINDS]
    + [pytest.param(kind, True, marks=() if kind in SCANNED else pytest.mark.long) for kind in tiny.KINDS],
)
def test_logits_equal_transformers_on_both_paddings(kind, scan, loaded):
    torch_model, model, params, _ = loaded(kind, scan)
    for side in ("left", "right"):
        ids, mask = _prompts(side)
        ours = np.asarray(logits(model, params, ids, mask))
        theirs = tiny.logits(torch_model, ids, mask)
        assert np.abs(ours - theirs)[mask > 0].max() < 3e-4
        assert np.ptp(theirs[mask > 0]) > 3  # a logit error of 3e-4 is small only beside logits that differ


@pytest.mark.parametrize(("kind", "scan"), [(kind, kind in SCANNED) for kind in tiny.KINDS])
def test_cached_decoding_equals_a_full_pass(kind, scan, loaded):
    _, model, params, _ = loaded(kind, scan)
    ids, mask = _prompts("left")
    full = np.asarray(logits(model, params, ids, mask))

    @jax.jit
    def step(params, *piece):
        hidden, written = model.apply({"params": params}, *piece)
        return model.apply({"params": params}, hidden, method="unembed"), written

    positions, valid = positions_of(jnp.asarray(mask))

    def piece(start, stop):
        return ids[:, start:stop], positions[:, start:stop], valid[:, start:stop]

    one, first = step(params, *piece(0, 5))
    two, second = step(params, *piece(5, 12), [first])
    outputs = [one, two]
    slots = kv_cache.empty(model.cfg, ROWS, LENGTH - 12 + 3, model.dtype, scan=scan)
    recent = DecodeCache(slots, jnp.zeros((), jnp.int32))
    for start in range(12, LENGTH):
        out, recent = step(params, *piece(start, start + 1), [first, second], recent)
        outputs.append(out)
    assert np.abs(np.concatenate(outputs, axis=1) - full)[mask > 0].max() < 3e-4


@pytest.mark.parametrize("kind", ["qwen2", "llama3"])
def test_a_token_depends_on_every_token_it_may_see_and_on_no_other(kind, loaded):
    _, model, params, _ = loaded(kind)
    ids, mask = _prompts("left")
    positions, valid = positions_of(jnp.asarray(mask))
    table = params["embed_tokens"]["weight"]
    model = model.clone(cfg=dataclasses.replace(model.cfg, vocab_size=ROWS * LENGTH))  # one "word" for each token
    own_ids = jnp.arange(ROWS * LENGTH).reshape(ROWS, LENGTH)

    def at(tokens, place):
        """Some output at `place`, as a function of the tokens' embeddings."""
        embedded = params | {"embed_tokens": {"weight": tokens}}
        hidden, _ = model.apply({"params": embedded}, own_ids, positions, valid)
        return jnp.sum(hidden[:, place] ** 3)

    tokens = table[jnp.asarray(ids).ravel()]
    gradient = jax.jit(jax.grad(at), static_argnums=1)(tokens, 13).reshape(ROWS, LENGTH, -1)
    influence = np.abs(np.asarray(gradient)).max(axis=-1)
    place = np.arange(LENGTH)
    # qwen2's last layer has a window of 7, but the two below it see everything.
    allowed = (mask > 0) & (place <= 13)[None, :]
    assert (influence[~allowed] == 0).all()
    assert (influence[allowed] > 0).all()


def test_a_window_hides_what_lies_before_it(loaded):
    _, model, params, _ = loaded("mistral")
    ids, mask = _prompts("none")
    reach = 3 * (6 - 1)  # each of three layers looks five tokens back
    changed = ids.copy()
    changed[:, 0] = (ids[:, 0] + 1) % tiny.VOCAB
    before, after = (np.asarray(logits(model, params, x, mask)) for x in (ids, changed))
    moved = np.abs(before - after).max(axis=(0, 2))
    assert (moved[: reach + 1] > 0).all()
    assert (moved[reach + 1 :] == 0).all()


def test_what_stands_in_padding_changes_nothing(loaded):
    _, model, params, _ = loaded("qwen3")
    for side in ("left", "right"):
        ids, mask = _prompts(side)
        other = np.where(mask > 0, ids, (ids + 5) % tiny.VOCAB)
        one, two = (np.asarray(logits(model, params, x, mask))[mask > 0] for x in (ids, other))
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(("kind", "scan"), [("qwen3", False), ("qwen2", True)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_tokens_packed_without_their_padding_give_what_they_give_in_place(side, kind, scan, loaded):
    _, model, params, _ = loaded(kind, scan)
    ids, mask = _prompts(side)
    positions, valid = positions_of(jnp.asarray(mask))
    places = np.flatnonzero(mask).astype(np.int32)
    places = np.concatenate([places, places[:3]])

    @jax.jit
    def run(ids, places):
        hidden, part = model.apply({"params": params}, ids, positions, valid, token_indices=places)
        return hidden, jax.tree.leaves(part.kv)

    hidden, kv = run(ids, None)
    packed, packed_kv = run(np.where(mask, ids, 5), places)
    np.testing.assert_allclose(np.asarray(packed)[mask > 0], np.asarray(hidden)[mask > 0], atol=1e-5)
    assert np.isfinite(packed).all()
    for leaf, expected in zip(packed_kv, kv, strict=True):
        keys = leaf.shape[-1] == LENGTH  # keys hold tokens in their last axis, values in the one before
        both = [np.moveaxis(np.asarray(x), (int(scan), -1 if keys else -2), (0, 1)) for x in (leaf, expected)]
        np.testing.assert_allclose(both[0][mask > 0], both[1][mask > 0], atol=1e-5)


def test_rope_scaling_matters(loaded):
    torch_model, model, params, _ = loaded("llama3")
    ids, mask = _prompts("left")
    theirs = tiny.logits(torch_model, ids, mask)
    plain = dataclasses.replace(model.cfg, rope=dataclasses.replace(model.cfg.rope, kind="default"))
    unscaled = np.asarray(logits(model.clone(cfg=plain), params, ids, mask))
    assert np.abs(unscaled - theirs)[mask > 0].max() > 0.1


def test_rematerialisation_and_bfloat16_run(loaded):
    _, model, params, _ = loaded("qwen3")
    ids, mask = _prompts("left")
    exact = np.asarray(logits(model, params, ids, mask))[mask > 0]
    again = np.asarray(logits(model.clone(remat=True), params, ids, mask))[mask > 0]
    np.testing.assert_allclose(again, exact, atol=3e-4)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    rough = np.asarray(logits(model.clone(dtype=jnp.bfloat16), half, ids, mask))[mask > 0]
    assert np.isfinite(rough).all()
    assert np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()  # 8 bits a product, three layers


def test_fingerprint_does_not_depend_on_scanning(loaded):
    assert loaded("llama", False)[-1] == loaded("llama", True)[-1]


@pytest.mark.parametrize(
    ("settings", "packed"), [({}, True), ({"remat": True}, False), ({"scan_layers": True}, True)], ids=str
)
def test_states_asked_for_from_a_column_on_are_those_of_all_columns(settings, packed):
    lm = toy_lm(**settings)
    ids = jax.random.randint(jax.random.key(0), (3, 9), 0, lm.model.cfg.vocab_size)
    mask = jnp.arange(9)[None, :] >= jnp.array([0, 4, 2])[:, None]
    places = np.flatnonzero(mask) if packed else None

    @partial(jax.jit, static_argnames=("since",))
    def run(params, since):
        def loss(params):
            found = apply(
                lm.model, {"params": params}, ids, *positions_of(mask), token_indices=places, output_start=since
            )
            return jnp.sum(found[0][:, 6 - since :] ** 2), found

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (whole, part)), gradient = run(lm.params, 0)
    (_, (some, same_part)), same_gradient = run(lm.params, 6)
    np.testing.assert_allclose(some, whole[:, 6:], atol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same_part, part)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), same_gradient, gradient)


@pytest.mark.parametrize("inside", [{}, {"original_max_position_embeddings": 64}])
def test_logits_equal_transformers_where_the_original_length_is_beside_the_rope_settings(inside, tmp_path):
    tiny.make("llama", tmp_path)
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    raw |= {"rope_scaling": rope | inside, "rope_theta": 500.0, "original_max_position_embeddings": 16}
    path.write_text(json.dumps({key: value for key, value in raw.items() if key != "rope_parameters"}))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    found = open_checkpoint(tmp_path)
    model = Transformer(found.config)
    params, _ = load_params(found, model, progress=False)
    ids, mask = _prompts("left")
    ours, truth = np.asarray(logits(model, params, ids, mask)), tiny.logits(theirs, ids, mask)
    assert np.abs(ours - truth)[mask > 0].max() < 3e-4
