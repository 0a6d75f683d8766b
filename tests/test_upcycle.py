"""One mixture-of-experts model of several specialists (`sva.ensembles.upcycle`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sva
from sva.cli import main
from sva.ensembles.upcycle import mixture_config, upcycle
from sva.generation.testing import toy_config, toy_lm
from sva.utils.errors import UserError

IDS = jnp.asarray(np.random.default_rng(0).integers(5, 32, (2, 9)))
MASK = jnp.ones_like(IDS)


def _moved(lm, seed, part, by=0.05):
    """A model whose weights of these names are a little elsewhere."""
    rng = np.random.default_rng(seed)
    named = {
        name: weight + by * jnp.asarray(rng.standard_normal(weight.shape), weight.dtype) if part in name else weight
        for name, weight in lm.named_params().items()
    }
    return dataclasses.replace(lm, params=lm.model.nest(named), known_fingerprint=None, name=f"moved-{seed}")


def _with(lm, **settings):
    """The model with another configuration."""
    return dataclasses.replace(lm, model=lm.model.clone(cfg=dataclasses.replace(lm.model.cfg, **settings)))


@pytest.fixture(scope="module")
def specialists(toy):
    return [_moved(toy, 1, ".mlp."), _moved(toy, 2, ".mlp.")]


def test_modules_that_are_all_the_base_compute_what_it_does(toy, tmp_path):
    upcycle(toy, [toy, toy, toy], tmp_path / "moe")
    made = sva.load(str(tmp_path / "moe"), progress=False)
    assert made.model.cfg.moe.modules == 3
    assert made.model.cfg.moe.top_k == 2
    np.testing.assert_allclose(made.logits(IDS, MASK), toy.logits(IDS, MASK), atol=3e-4)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_router_that_picks_one_module_computes_what_that_specialist_does(toy, specialists, order, tmp_path):
    upcycle(toy, [specialists[place] for place in order], tmp_path / "moe", top_k=1)
    made = sva.load(str(tmp_path / "moe"), progress=False)
    named = made.named_params()
    equal = {name: 0 * weight for name, weight in named.items() if name.endswith("mlp.gate.weight")}
    first = dataclasses.replace(made, params=made.model.nest(named | equal))  # of equal modules the first is taken
    np.testing.assert_allclose(first.logits(IDS, MASK), specialists[order[0]].logits(IDS, MASK), atol=3e-4)
    assert not np.allclose(first.logits(IDS, MASK), toy.logits(IDS, MASK), atol=1e-2)


def test_what_is_shared_is_the_bases_or_the_specialists_mean(toy, tmp_path):
    specialists = [_moved(toy, 3, "self_attn"), _moved(toy, 4, "self_attn")]
    for shared in ("base", "average"):
        upcycle(toy, specialists, tmp_path / shared, shared=shared)
    name = "model.layers.1.self_attn.v_proj.weight"
    found = {shared: sva.load(str(tmp_path / shared), progress=False).named_params() for shared in ("base", "average")}
    np.testing.assert_array_equal(found["base"][name], toy.named_params()[name])
    mean = np.mean([np.asarray(each.named_params()[name]) for each in specialists], axis=0)
    np.testing.assert_allclose(found["average"][name], mean, atol=1e-6)


def test_specialists_may_have_token_ids_and_a_context_of_their_own(toy, specialists, tmp_path):
    ids = {"pad_token_id": 3, "bos_token_id": 4, "eos_token_ids": (9,), "max_position_embeddings": 64}
    cfg = upcycle(toy, [specialists[0], _with(specialists[1], **ids)], tmp_path / "moe")
    ours = toy.model.cfg
    assert cfg.eos_token_ids == (*ours.eos_token_ids, 9)
    assert all(getattr(cfg, name) == getattr(ours, name) for name in ids if name != "eos_token_ids")


def test_mistakes_that_need_no_model_are_told_before_any_is_loaded(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    call = ["upcycle", "nowhere", "--specialist", "nowhere", "--specialist", "nowhere", "-o", str(tmp_path / "full")]
    assert main.main(call) == 2
    assert "full already holds something" in capsys.readouterr().err
    assert main.main([*call[:-1], str(tmp_path / "new"), "--top-k", "3"]) == 2
    assert "--top-k) 3 must be between 1 and the 2 specialists" in capsys.readouterr().err


def test_the_router_can_be_trained(toy, specialists, tmp_path):
    upcycle(toy, specialists, tmp_path / "moe")
    made = sva.load(str(tmp_path / "moe"), progress=False)

    def loss(named):
        return sva.logits(made.model, made.model.nest(named), IDS, MASK)[..., 5].sum()

    gradient = jax.grad(loss)(made.named_params())
    assert all(np.abs(gradient[name]).max() > 0 for name in gradient if name.endswith("mlp.gate.weight"))


def test_the_command_writes_a_checkpoint_and_says_what_to_do_next(toy, specialists, tmp_path, capsys):
    for number, lm in enumerate((toy, *specialists)):
        lm.save(tmp_path / str(number))
    call = ["upcycle", str(tmp_path / "0"), "--specialist", str(tmp_path / "1"), "--specialist", str(tmp_path / "2")]
    assert main.main([*call, "-o", str(tmp_path / "moe")]) == 0
    assert "mixtral, 2 modules in each of 2 layers, 2 for each token" in capsys.readouterr().out
    assert main.main([*call[:4], "-o", str(tmp_path / "other")]) == 2
    assert "two models or more with --specialist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"specialists": 1}, "two specialists or more"),
        ({"top_k": 3}, r"top_k \(--top-k\) 3 must be between 1 and the 2 specialists"),
        ({"rms_norm_eps": 0.1}, "moved-2 is not fine-tuned from toy-0: its rms_norm_eps is another"),
        ({"other": "seed"}, r"toy-1 is not fine-tuned from toy-0: model.embed_tokens.weight is 1\.\d+ of its size"),
    ],
)
def test_what_makes_no_mixture_is_one_clear_line(toy, specialists, tmp_path, change, message):
    given = specialists[: change.get("specialists", 2)]
    given = [specialists[0], toy_lm(seed=1)] if "other" in change else given
    if eps := change.get("rms_norm_eps"):
        given[1] = _with(given[1], rms_norm_eps=eps)
    with pytest.raises(UserError, match=message):
        upcycle(toy, given, tmp_path / "moe", top_k=change.get("top_k"))
    assert not (tmp_path / "moe").exists()


def test_an_architecture_without_a_mixture_of_its_kind_is_refused():
    with pytest.raises(UserError, match="no mixture-of-experts architecture is a llama model with these settings"):
        mixture_config(dataclasses.replace(toy_config(), mlp_bias=True), 2, 2)
