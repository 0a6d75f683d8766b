"""Adapters on some of a model's layers, which are scanned or not."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sva
from sva.generation.lm import LM
from sva.generation.testing import THINGS, tokenizer, toy_config
from sva.models.stacks import cut, place, stacks
from sva.models.transformer import Transformer
from sva.models.weights import expected
from sva.spectral.expert import Expert
from sva.training import config, metrics
from sva.training import run as runs
from sva.utils.errors import UserError
from sva.utils.trees import layer_numbers, select

DEEP = dataclasses.replace(toy_config(), num_layers=4, windows=(0,) * 4)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """The toy model with four layers and a task of 32 lines, on disk."""
    place = tmp_path_factory.mktemp("deep")
    rng = np.random.default_rng(0)
    named = {
        name: jnp.asarray(
            np.ones(leaf.shape) if "norm" in name else rng.standard_normal(leaf.shape) / np.sqrt(leaf.shape[-1])
        ).astype(jnp.float32)
        for name, leaf in expected(DEEP).items()
    }
    model = Transformer(DEEP)
    LM(model, model.nest(named), tokenizer(), "deep").save(place / "model")
    lines = [{"prompt": f"what colour the {a} of the {b} ?", "answer": "red red"} for a in THINGS for b in THINGS[:4]]
    (place / "red.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def load(directory, **settings):
    return sva.load(str(directory / "model"), progress=False, **settings)


def test_a_range_has_both_its_ends():
    assert layer_numbers("0-3") == {0, 1, 2, 3}
    assert layer_numbers("0-1, 5,7-8", 9) == {0, 1, 5, 7, 8}
    names = expected(DEEP)
    assert select(names, "mlp", "1-2") == [x for x in select(names, "mlp") if ".1." in x or ".2." in x]


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("0-39", r"layers=0-39: the model has 4 layers, 0 to 3"),
        ("4", r"layers=4: the model has 4 layers, 0 to 3"),
        ("::2", r"layers='::2' names no layers; write e\.g\. 0-39"),
        ("3-0", r"3-0 ends before it begins; write 0-3"),
    ],
)
def test_layers_that_are_not_there_are_one_line(directory, layers, message):
    with pytest.raises(UserError, match=message):
        select(expected(DEEP), "mlp", layers)
    for scan in (True, False):
        with pytest.raises(UserError, match=message):
            load(directory, layers=layers, scan_layers=scan)


def test_layers_and_targets_must_meet():
    with pytest.raises(UserError, match="have no weight in common"):
        select(expected(DEEP), r"layers\.3\.mlp", "0-1")


def test_a_scan_is_cut_where_the_chosen_layers_begin_and_end():
    assert cut(None, 4) is True
    assert cut("0-3", 4) is True
    assert cut("0-1", 4) == (2,)
    assert cut("1-2", 4) == cut("0,3", 4) == (1, 3)
    assert [tuple(x) for x in stacks(4, (1, 3))] == [
        ("layers_from_0", 0, 1),
        ("layers_from_1", 1, 2),
        ("layers_from_3", 3, 1),
    ]
    assert [place(layer, (1, 3)) for layer in (0, 2, 3)] == [
        ("layers_from_0", 0),
        ("layers_from_1", 1),
        ("layers_from_3", 0),
    ]
    assert stacks(4, False) == ()


def test_a_cut_scan_reads_and_generates_as_the_unrolled_model_does(directory):
    plain, cut_twice = load(directory, scan_layers=False), load(directory, scan_layers=True, layers="1-2")
    assert set(cut_twice.params) >= {"layers_from_0", "layers_from_1", "layers_from_3"}
    assert cut_twice.fingerprint == plain.fingerprint
    jax.tree.map(np.testing.assert_array_equal, cut_twice.named_params(), plain.named_params())
    ids = np.arange(20).reshape(2, 10) % DEEP.vocab_size
    mask = np.ones_like(ids)
    np.testing.assert_allclose(cut_twice.logits(ids, mask), plain.logits(ids, mask), atol=1e-4)
    got, want = (lm.generate(ids, mask, max_new_tokens=6) for lm in (cut_twice, plain))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_only_the_chosen_layers_have_spectra_in_memory(directory):
    lm = load(directory, scan_layers=True, layers="1-2", without="mlp")
    spectra = sva.decompose(lm, "mlp", layers="1-2", progress=False)
    assert len(spectra) == len(lm.spectra) * 2 == 6  # a stack of two layers for gate, up and down
    assert {path[0] for path in lm.spectra} == {"layers_from_1"}
    assert "mlp" not in lm.params["layers_from_1"]
    assert "weight" in lm.params["layers_from_3"]["mlp"]["up_proj"]


@pytest.mark.parametrize(
    "settings",
    [
        ["rollout.form=factored", "reinforce.kl_coef=0.1"],
        pytest.param(["parametrisation=lora:r=2,alpha=4", "targets=attention"], marks=pytest.mark.slow),
    ],
    ids=["svf", "lora"],
)
def test_a_scanned_run_on_some_layers_is_the_unrolled_one(directory, tmp_path, settings):
    base = [f"model={directory / 'model'}", f"task={directory / 'red.jsonl'}", "layers=1-2", "train.steps=2"]
    base += [
        "evaluate.size=2",
        "rollout.prompts=4",
        "rollout.samples=2",
        "rollout.max_new_tokens=4",
        "reinforce.baseline=none",
    ]
    found = {}
    for scan in ("false", "true"):
        run_dir = tmp_path / scan
        given = config.load(overrides=[*base, *settings, f"scan_layers={scan}", f"run_dir={run_dir}"])
        runs.train(given, progress=False)
        expert = Expert.load(run_dir / "expert.safetensors")
        assert {name.split(".")[2] for name in expert.names} == {"1", "2"}
        assert expert.metadata["layers"] == "1-2"
        found[scan] = expert, metrics.read(run_dir / "metrics.jsonl")
    (plain, rows), (scanned, others) = found["false"], found["true"]
    for row, other in zip(rows, others, strict=True):
        for name in ("reward", "loss", "grad_norm"):
            assert other[name] == pytest.approx(row[name], rel=1e-4, abs=1e-6)
    assert scanned.arrays.keys() == plain.arrays.keys()
    for name, x in plain.arrays.items():
        np.testing.assert_allclose(scanned.arrays[name], x, atol=1e-4)


def test_experts_on_some_layers_answer_in_two_passes_where_the_scan_is_cut(directory):
    spectra = sva.decompose(load(directory, scan_layers=False), "mlp", layers="1-2", progress=False)
    raw = {name: np.linspace(0.5, 1.5, len(x.s), dtype=np.float32) for name, x in spectra.items()}
    expert = Expert(raw=raw, parametrisation="linear", metadata={"label": "colour", "description": "a colour"})
    prompts = ["what colour the sky of the sea ?", "what colour the sea of the sky ?"]
    answers = []
    for settings in ({"scan_layers": False}, {"scan_layers": True, "layers": "1-2"}):
        model = sva.adaptive(load(directory, **settings), [expert])
        answers.append([(x.text, x.label) for x in model.answer(prompts, max_new_tokens=4)])
    assert answers[0] == answers[1]
