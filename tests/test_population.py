import jax
import numpy as np
import pytest

import sva
from sva.generation import chat
from sva.generation.testing import NameAColour, toy_lm
from sva.spectral.parametrisations import SIGMOID_NUCLEAR, matrix_infos
from sva.training import population

TASK = NameAColour()
MEMBERS, NEW = 3, 6


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_every_member_answers_as_its_merged_model_does(scan, toy):
    lm = toy_lm(scan_layers=scan)
    spectra = sva.decompose(lm, "mlp", progress=False)
    rng, places = np.random.default_rng(0), matrix_infos(spectra)
    raw = {name: rng.normal(0, 3, (MEMBERS, *x.s.shape)).astype(np.float32) for name, x in spectra.items()}
    source = TASK.source("validation")
    examples = [source[i] for i in range(5)]
    room = population.shape_of(lm, TASK, source)
    nested = lm.model.nest(spectra)
    all_z = jax.vmap(lambda raw: SIGMOID_NUCLEAR.z(raw, places))(raw)
    found = population.answer(lm, nested, all_z, TASK, examples, room, NEW)
    encoded = chat.encode(lm, [chat.render(lm, TASK.question(example)) for example in examples])
    texts = []
    for member in range(MEMBERS):
        z = SIGMOID_NUCLEAR.z({name: x[member] for name, x in raw.items()}, places)
        out = sva.merge(lm, spectra, z).generate(*encoded, NEW, chat.end_tokens(lm))
        texts += chat.decode(lm, out.tokens, out.lengths)
        np.testing.assert_allclose(found.mean_logprobs[member], out.logprobs.sum(axis=1) / out.lengths, atol=3e-4)
    assert found.texts == texts
    assert len(set(texts)) > MEMBERS
    fitting = population.answer(lm, nested, all_z, TASK, examples, None, NEW)
    assert fitting.texts == texts
