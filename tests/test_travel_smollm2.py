"""A shipped expert on its real weights, taken out in every format and read back by the programs they are for."""

import warnings
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

import sva
from sva.evaluation import evaluate
from sva.generation import chat
from sva.interop import peft as export_peft
from sva.interop.gguf_export import save_gguf, tokenizer_metadata
from sva.tasks import task

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def real():
    """(model, merged model, spectra, z, ids, mask, the expert's logits at attended places)."""
    lm = sva.load(str(tiny.smollm2()), progress=False)
    path = Path(str(resources.files("sva"))) / "assets" / "list_last.safetensors"
    expert = sva.Expert.load(path, fingerprint=lm.fingerprint)
    spectra = sva.decompose(lm, progress=False)
    z = expert.z(spectra)
    rows = evaluate.items(task("list_last"), "test", 4)
    ids, mask = chat.encode(lm, [chat.render(lm, row.question) for row in rows])
    return lm, sva.merge(lm, spectra, z), spectra, z, ids, mask, attended(np.asarray(lm.logits(ids, mask, z)), mask)


def attended(logits, mask):
    return logits[np.asarray(mask).astype(bool)]


def test_transformers_gives_the_experts_logits(real, tmp_path):
    lm, merged, _, _, ids, mask, wanted = real
    merged.save(tmp_path / "hf")
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    assert np.abs(attended(tiny.logits(model, ids, mask), mask) - wanted).max() < 3e-4
    assert np.abs(attended(np.asarray(lm.logits(ids, mask)), mask) - wanted).max() > 1


def test_a_gguf_file_gives_the_experts_logits_and_the_tokenizer(real, tmp_path):
    lm, merged, _, _, ids, mask, wanted = real
    named = merged.named_params()
    tokenizer = tokenizer_metadata(tiny.smollm2())
    save_gguf(tmp_path / "x.gguf", lm.model.cfg, lambda n: np.asarray(named[n]), name="x", tokenizer=tokenizer)
    again = sva.load(str(tmp_path / "x.gguf"), progress=False)
    assert np.abs(attended(np.asarray(again.logits(ids, mask)), mask) - wanted).max() < 3e-4
    assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()


def test_peft_at_full_rank_gives_the_experts_logits(real, tmp_path):
    peft = pytest.importorskip("peft", reason="the comparison needs peft: requirements-torch.txt")
    lm, _, spectra, z, ids, mask, wanted = real
    lm.save(tmp_path / "base")
    parts = export_peft.save_peft(tmp_path / "adapter", lm, spectra, z, title="list_last")
    assert max(part.error for part in parts.values()) == 0
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 under a name that will go
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        adapted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    found = attended(tiny.logits(adapted, ids, mask), mask)
    assert np.abs(found - wanted).max() < 1e-4 * np.abs(wanted).max()
