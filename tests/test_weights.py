import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import transformers

from sva.generation.testing import toy_config
from sva.models.config import from_hf
from sva.models.transformer import Transformer, logits
from sva.models.weights import by_module, expected, nest, of_all_modules, unnest
from sva.utils.errors import UserError
from sva.utils.trees import select

LLAMA_3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_names_and_shapes_are_those_of_transformers(kind):
    config = tiny.config(kind)
    model = transformers.AutoModelForCausalLM.from_config(config)
    theirs = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    ours = {name: spec.shape for name, spec in expected(from_hf(config.to_dict())).items()}
    assert ours == theirs


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_models_own_variables_are_the_weights_declared(kind, scan):
    cfg = from_hf(tiny.config(kind).to_dict())
    model = Transformer(cfg, scan_layers=scan)
    ids = jnp.zeros((1, 2), jnp.int32)
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), ids, ids, ids == 0, method=_both))["params"]
    specs = expected(cfg)
    declared = jax.eval_shape(
        lambda: nest({n: jnp.zeros(s.shape) for n, s in specs.items()}, num_layers=cfg.num_layers, scan=scan)
    )
    assert jax.tree.map(lambda x: x.shape, tree) == jax.tree.map(lambda x: x.shape, declared)
    assert all(len(spec.axes) == len(spec.shape) for spec in specs.values())


def _both(model, *args):
    return model.unembed(model(*args)[0])


@pytest.mark.parametrize("scan", [False, True, (4, 9)])
def test_unnest_inverts_nest_and_layers_go_by_number(scan):
    names = list(expected(dataclasses.replace(toy_config(), num_layers=12, windows=(0,) * 12)))
    named = {name: jnp.full(2, i) for i, name in enumerate(sorted(names))}  # sorted: 10 and 11 before 2
    tree = nest(named, num_layers=12, scan=scan)
    stack = [named[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(12)]
    if scan is True:
        np.testing.assert_array_equal(tree["layers"]["mlp"]["up_proj"]["weight"], jnp.stack(stack))
    elif scan:
        parts = {f"layers_from_{a}": jnp.stack(stack[a:b]) for a, b in ((0, 4), (4, 9), (9, 12))}
        assert {key for key in tree if key.startswith("layers")} == set(parts)
        for key, part in parts.items():
            np.testing.assert_array_equal(tree[key]["mlp"]["up_proj"]["weight"], part)
    else:
        np.testing.assert_array_equal(tree["layers_10"]["mlp"]["up_proj"]["weight"], stack[10])
    back = unnest(tree, named, scan=scan)
    assert back.keys() == named.keys()
    assert all((back[name] == named[name]).all() for name in named)


def test_a_kind_given_for_some_layers_of_a_stack_is_refused_with_what_to_do():
    named = {f"model.layers.{i}.mlp.up_proj.weight": jnp.ones(2) for i in (0, 2)}
    with pytest.raises(UserError, match=r"mlp\.up_proj\.weight.*2 of 3.*layer 1.*layers=0-3.*scan_layers=False"):
        nest(named, num_layers=3, scan=True)
    assert nest(named, num_layers=3, scan=False).keys() == {"layers_0", "layers_2"}


@pytest.mark.parametrize(("targets", "count"), [("mlp", 393_216), ("attention", 163_840)])
def test_an_expert_of_llama_3_8b_has_the_papers_number_of_parameters(targets, count):
    specs = expected(from_hf(LLAMA_3_8B))
    assert sum(np.prod(spec.shape) for spec in specs.values()) == 8_030_261_248
    assert sum(min(specs[name].shape) for name in select(specs, targets)) == count


def test_llama_3_8b_runs_in_the_abstract():
    cfg = from_hf(LLAMA_3_8B)
    for scan in (False, True):
        model = Transformer(cfg, jnp.bfloat16, scan_layers=scan)
        params = jax.eval_shape(
            lambda model=model: model.nest({n: jnp.zeros(s.shape, jnp.bfloat16) for n, s in expected(cfg).items()})
        )
        ids = jax.ShapeDtypeStruct((2, 16), jnp.int32)
        out = jax.eval_shape(lambda params, ids, model=model: logits(model, params, ids, ids), params, ids)
        assert (out.shape, out.dtype) == ((2, 16, 128256), jnp.float32)


@pytest.mark.parametrize("scan", [False, True, (2,)])
def test_the_modules_of_a_layer_are_one_entry_that_lies_where_they_did(scan):
    names = [f"model.layers.{layer}.mlp.experts.{module}.up_proj.weight" for layer in range(3) for module in range(4)]
    named = {name: np.full(2, place) for place, name in enumerate(names)}
    named["model.norm.weight"] = np.zeros(5)
    tree = nest(named, num_layers=3, scan=scan, modules=4)
    entries = unnest(tree, dict.fromkeys(map(of_all_modules, named)), scan=scan)
    assert list(entries) == [f"model.layers.{n}.mlp.experts.*.up_proj.weight" for n in range(3)] + ["model.norm.weight"]
    assert entries["model.layers.1.mlp.experts.*.up_proj.weight"][:, 0].tolist() == [4, 5, 6, 7]
    jax.tree.map(np.testing.assert_array_equal, nest(entries, num_layers=3, scan=scan, modules=4), tree)
    jax.tree.map(np.testing.assert_array_equal, by_module(entries, named), named)
    assert by_module(named, named) == named
