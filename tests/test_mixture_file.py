import json

import numpy as np
import pytest
from test_few_shot import experts

import sva
from sva.adaptation import few_shot
from sva.adaptation.mixture_file import Alphas, identities, load_mixture
from sva.utils.errors import UserError


@pytest.fixture(scope="module")
def made(toy):
    return experts(sva.decompose(toy, "mlp", progress=False))


def _file(path, toy, made, values):
    Alphas(values, identities(made), {"name": toy.name, "fingerprint": toy.fingerprint}, record={"seed": 3}).save(path)
    return path


@pytest.mark.parametrize("per_matrix", [False, True])
def test_a_file_brings_back_its_mixture_whatever_the_order_of_the_experts(toy, made, tmp_path, per_matrix):
    pool = few_shot.pool(toy, made, progress=False)
    values = np.random.default_rng(0).uniform(0, 1, (len(pool.names), 3) if per_matrix else 3).astype(np.float32)
    rows = dict(zip(pool.names, values, strict=True)) if per_matrix else values
    path = _file(tmp_path / "alphas.json", toy, made, rows)
    np.testing.assert_array_equal(Alphas.load(path).array(pool.names), values)
    assert json.loads(path.read_text())["seed"] == 3
    ours, theirs = load_mixture(toy, path, made[::-1], progress=False), few_shot.mixed(toy, pool, values)
    for name, weight in theirs.named_params().items():
        np.testing.assert_array_equal(ours.named_params()[name], weight)


def test_other_experts_bases_and_sizes_are_refused_in_one_line(toy, made, tmp_path):
    path = _file(tmp_path / "alphas.json", toy, made[:2], [0.5, 0.25])
    foreign = sva.generation.testing.toy_lm(1)
    short, broken, other, bare, nameless = (
        tmp_path / f"{name}.json" for name in ("short", "broken", "other", "bare", "nameless")
    )
    bare.write_text('{"format": "sva-alphas-1", "alphas": [1], "experts": [{"label": "a", "digest": "b"}]}')
    nameless.write_text(path.read_text().replace('"digest"', '"sum"'))
    short.write_text(path.read_text().replace("0.25", "0.25, 1"))
    broken.write_text("{")
    other.write_text("[]")
    for call, words in (
        (lambda: load_mixture(toy, path, made), "know nothing of expert"),
        (lambda: load_mixture(toy, path, made[1:]), "not among those given"),
        (lambda: load_mixture(foreign, path, made[:2]), "was made for toy-0"),
        (lambda: Alphas.load(short), "alphas has 3 numbers for 2 experts"),
        (lambda: Alphas.load(broken), "damaged or not an alphas file"),
        (lambda: Alphas.load(other), "not an alphas file of sva"),
        (lambda: Alphas.load(bare), "lacks 'base'"),
        (lambda: Alphas.load(nameless), "an expert lacks its label or digest"),
        (lambda: Alphas.load(tmp_path / "none.json"), "no alphas file at"),
        (lambda: identities([made[0], made[1], made[0]]), "expert 3 is the same as expert 1"),
        (lambda: Alphas({"a": [1.0]}, identities(made[:1]), {}).array(["b"]), "alphas are of 1 matrices"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_byte_order_mark_in_front_of_alphas_is_skipped(toy, made, tmp_path):
    path = _file(tmp_path / "alphas.json", toy, made[:2], [0.5, 0.25])
    plain = Alphas.load(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert Alphas.load(path) == plain
