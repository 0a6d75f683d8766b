import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sva.errors import UserError
from sva.models import cache as kv_cache
from sva.models.checkpoint import open_checkpoint
from sva.models.load import load_params
from sva.models.transformer import Transformer, logits, positions_of
from sva.models.weights import expected, nest, unnest


def _load(kind, directory, scan=False):
    torch_model = tiny.make(kind, directory)
    checkpoint = open_checkpoint(directory)
    model = Transformer(checkpoint.config, scan_layers=scan)
    params, fingerprint = load_params(checkpoint, model, progress=False)
    return torch_model, model, params, fingerprint


def _prompts(vocab, side):
    ids = np.random.default_rng(0).integers(0, vocab, (3, 20))
    mask = np.ones_like(ids)
    mask[1, :7] = side != "left"
    mask[1, -7:] = side != "right"
    return ids, mask


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_logits_equal_transformers_on_both_paddings_scanned_and_unrolled(kind, tmp_path):
    for scan in (False, True):
        torch_model, model, params, _ = _load(kind, tmp_path / str(scan), scan)
        for side in ("left", "right"):
            ids, mask = _prompts(model.cfg.vocab_size, side)
            ours = np.asarray(logits(model, params, ids, mask))
            theirs = tiny.logits(torch_model, ids, mask)
            assert np.abs(ours - theirs)[mask > 0].max() < 3e-4


@pytest.mark.parametrize("kind", ["mistral", "llama3"])
def test_cached_decoding_equals_a_full_pass(kind, tmp_path):
    _, model, params, _ = _load(kind, tmp_path)
    ids, mask = _prompts(model.cfg.vocab_size, "left")
    full = np.asarray(logits(model, params, ids, mask))
    cache = kv_cache.init(model.cfg, 3, 20, model.dtype, scan=False)
    positions, valid = positions_of(jnp.asarray(mask))
    outputs = []
    for start, stop in [(0, 12), *((i, i + 1) for i in range(12, 20))]:
        piece = (ids[:, start:stop], positions[:, start:stop], valid[:, start:stop], cache)
        hidden, cache = model.apply({"params": params}, *piece)
        outputs.append(model.apply({"params": params}, hidden, method="unembed"))
    assert np.abs(np.concatenate(outputs, axis=1) - full)[mask > 0].max() < 3e-4


def test_later_tokens_do_not_change_earlier_logits(tmp_path):
    _, model, params, _ = _load("qwen3", tmp_path)
    ids, mask = _prompts(model.cfg.vocab_size, "none")
    changed = ids.copy()
    changed[:, 12:] = (ids[:, 12:] + 1) % model.cfg.vocab_size
    before, after = (np.asarray(logits(model, params, x, mask)) for x in (ids, changed))
    np.testing.assert_array_equal(before[:, :12], after[:, :12])
    assert np.abs(before[:, 12:] - after[:, 12:]).max() > 0.1


def test_fingerprint_does_not_depend_on_shards_or_scanning(tmp_path):
    *_, one = _load("llama", tmp_path / "one")
    tiny.make("llama", tmp_path / "many", shards=True)
    checkpoint = open_checkpoint(tmp_path / "many")
    _, many = load_params(checkpoint, Transformer(checkpoint.config, scan_layers=True), progress=False)
    assert one == many


def test_nest_goes_by_layer_number_and_unnest_inverts_it(tmp_path):
    named = {f"model.layers.{i}.mlp.up_proj.weight": jnp.full((2, 2), i) for i in (10, 2, *range(2), *range(3, 10), 11)}
    tree = nest(named, num_layers=12, scan=True)
    np.testing.assert_array_equal(tree["layers"]["mlp"]["up_proj"]["weight"][:, 0, 0], np.arange(12))
    back = unnest(tree, named, scan=True)
    assert all((back[name] == named[name]).all() for name in named)
    with pytest.raises(UserError, match="scan_layers=False"):
        nest(named, num_layers=13, scan=True)


def test_expected_names_and_shapes_are_those_of_init(tmp_path):
    _, model, _, _ = _load("qwen2", tmp_path)
    ids = jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, ids, ids.astype(bool)))["params"]
    specs = expected(model.cfg)
    for name, leaf in unnest(shapes, [n for n in specs if n != "lm_head.weight"], scan=False).items():
        assert leaf.shape == specs[name].shape
