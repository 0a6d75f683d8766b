"""Decomposition from the checkpoint on disk, and what may be done with a truncated spectrum."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

import sva
from sva.cli.main import main
from sva.generation import decompose as decompose_module
from sva.generation import load as load_module
from sva.generation.decompose import decompose_checkpoint
from sva.generation.merge import factored, nested_factors
from sva.generation.testing import toy_lm
from sva.spectral import forms, store
from sva.utils.errors import UserError
from sva.utils.trees import select

GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    tiny.make("llama", directory, shards=True)
    return directory


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SVA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _forbid(monkeypatch, module, name):
    def refuse(*_, **__):
        raise AssertionError(f"{name} was called")

    monkeypatch.setattr(module, name, refuse)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_does_not_load_the_model_and_the_model_finds_what_it_made(
    dtype, checkpoint, cache, monkeypatch, capsys
):
    with pytest.MonkeyPatch.context() as patch:
        _forbid(patch, load_module, "load_params")
        assert main(["decompose", str(checkpoint), "--targets", "all", "--dtype", dtype]) == 0
    model = sva.load(str(checkpoint), dtype, progress=False)
    names = select(model.named_params(), "all")
    assert f"{len(names)} weights" in capsys.readouterr().out
    _forbid(monkeypatch, store, "svd")
    spectra = sva.decompose(model, "all", progress=False)
    assert list(spectra) == names
    for name, (u, s, vt) in spectra.items():
        assert (u.dtype, str(s.dtype)) == (model.model.dtype, "float32")
        w = np.asarray(model.named_params()[name], np.float64)
        product = (np.asarray(u, np.float64) * np.asarray(s)) @ np.asarray(vt, np.float64)
        assert np.linalg.norm(product - w) < (1e-6 if dtype == "float32" else 5e-3) * np.linalg.norm(w)


def test_shares_are_disjoint_even_and_make_one_cache(checkpoint, cache, monkeypatch):
    shares = [decompose_checkpoint(str(checkpoint), "all", share=(i, 3), progress=False) for i in range(3)]
    assert len({directory for directory, _ in shares}) == 1
    names = [record.name for _, records in shares for record in records]
    assert len(names) == len(set(names))
    sizes = [sum(np.prod(record.shape) for record in records) for _, records in shares]
    assert max(sizes) - min(sizes) <= max(np.prod(record.shape) for _, records in shares for record in records)
    _forbid(monkeypatch, store, "svd")
    _, records = decompose_checkpoint(str(checkpoint), "all", progress=False)
    assert sorted(record.name for record in records) == sorted(names)
    manifest = json.loads((shares[0][0] / store.MANIFEST).read_text())
    assert sorted(record["name"] for record in manifest["spectra"]) == sorted(names)


def test_weights_are_read_one_by_one_for_the_fingerprint_and_once_more_if_they_are_targets(
    checkpoint, cache, monkeypatch
):
    opened = decompose_module.open_checkpoint(checkpoint)
    reads = []

    def read(name):
        reads.append(name)
        return opened.read(name)

    counting = dataclasses.replace(opened, read=read)
    monkeypatch.setattr(decompose_module, "open_checkpoint", lambda path: counting)
    decompose_checkpoint(str(checkpoint), "gate", progress=False)
    targets = select(opened.shapes, "gate")
    assert sorted(reads) == sorted([*opened.shapes, *targets])


def test_truncated_spectra_serve_the_delta_form_and_merging_and_are_refused_by_the_factored_form(checkpoint, cache):
    model = sva.load(str(checkpoint), progress=False)
    whole = sva.decompose(model, "gate", progress=False)
    cut = sva.decompose(model, "gate", rank=5, progress=False)
    z = {name: np.linspace(0.5, 1.5, 5).astype(np.float32) for name in cut}
    x = np.random.default_rng(0).standard_normal((1, 3, cut[GATE].vt.shape[1])).astype(np.float32)
    w = model.named_params()[GATE]
    padded = np.ones(len(whole[GATE].s), np.float32)
    padded[:5] = z[GATE]
    np.testing.assert_allclose(
        forms.delta(cut[GATE], z[GATE])(x, w), forms.delta(whole[GATE], padded)(x, w), rtol=1e-4, atol=1e-5
    )
    merged = [
        sva.merge(model, spectra, {GATE: v}).named_params()[GATE] for spectra, v in ((cut, z[GATE]), (whole, padded))
    ]
    np.testing.assert_allclose(*merged, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"gate_proj.weight: its spectrum keeps 5 of 64 .* delta form") as caught:
        factored(cut, z)
    assert "\n" not in str(caught.value)
    assert len(sva.decompose(model, "gate", progress=False)[GATE].s) == len(whole[GATE].s)
    with pytest.raises(UserError, match="z has 64 entries, its spectrum has 5"):
        sva.merge(model, cut, {GATE: padded})


def test_a_weight_with_nan_is_one_line_that_names_it(checkpoint, cache, tmp_path, capsys):
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    for path in broken.glob("*.safetensors"):
        tensors = load_file(path)
        if GATE in tensors:
            tensors[GATE][1, 2] = np.nan
            save_file(tensors, path, {"format": "pt"})
    assert main(["decompose", str(broken)]) == 2
    assert f"sva: {GATE}: the weight holds NaN" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--share", "2/2"], "share 2/2 does not exist; 2 processes take 0/2 to 1/2"),
        (["--share", "1"], "--share 1 must be I/N"),
        (["--share", "a/2"], "--share a/2 must be I/N"),
        (["--rank", "0"], "rank=0 must be at least 1"),
        (["--targets", "mpl"], "matches no weight"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, words, checkpoint, cache, capsys):
    assert main(["decompose", str(checkpoint), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sva: ")]
    assert len(lines) == 1
    assert words in lines[0]
    assert not list(cache.glob("spectra/*/*"))


def test_spectra_of_scanned_layers_are_one_stack_for_all_who_read_them(toy):
    lm = toy_lm(scan_layers=True)
    spectra = sva.decompose(lm, "mlp", progress=False)
    path = ("layers", "mlp", "up_proj", "weight")
    (stack, again), z = (lm.spectra[path], sva.decompose(lm, "mlp", progress=False)), {}
    assert lm.model.nest(spectra)["layers"]["mlp"]["up_proj"]["weight"].u is stack.u
    assert lm.model.nest(again)["layers"]["mlp"]["up_proj"]["weight"].u is stack.u
    for name, one in sva.decompose(toy, "mlp", progress=False).items():
        jax.tree.map(np.testing.assert_array_equal, spectra[name], one)
        z[name] = np.linspace(0.5, 1.5, len(one.s), dtype=np.float32)
    adapter = nested_factors(lm.model, spectra, z)
    assert adapter["layers"]["mlp"]["up_proj"]["weight"].spectrum.u is stack.u
    merged, whole = sva.merge(lm, spectra, z), sva.merge(toy, sva.decompose(toy, "mlp", progress=False), z)
    for name, weight in whole.named_params().items():
        np.testing.assert_allclose(merged.named_params()[name], weight, atol=1e-6)
    assert (
        merged.params["layers"]["self_attn"]["q_proj"]["weight"] is lm.params["layers"]["self_attn"]["q_proj"]["weight"]
    )
