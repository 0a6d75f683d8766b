import json

import ml_dtypes
import numpy as np
import pytest
import tiny
import torch
from safetensors import safe_open

import sva
from sva.interop import peft as export_peft
from sva.utils.errors import UserError

peft = pytest.importorskip("peft", reason="the comparison needs peft: requirements-torch.txt")

# PEFT 0.21 asks transformers 5.23 under a name that will go; whatever else it warns of, missing weights too, fails
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 20))
MASK = np.ones_like(IDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(its directory, tiny Llama as an LM, spectra of every linear layer, a z that moves them)."""
    folder = tmp_path_factory.mktemp("base") / "llama"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        tiny.make("llama", folder)
        lm = sva.load(str(folder), progress=False)
        spectra = sva.decompose(lm, "all", progress=False)
        rng = np.random.default_rng(0)
        yield folder, lm, spectra, {name: rng.uniform(0.5, 1.5, x.s.shape).astype("f4") for name, x in spectra.items()}


def loaded(folder, adapter):
    """The adapter in PEFT, on the model in transformers."""
    model = tiny.transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    return peft.PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("targets", ["all", "mlp", r"layers\.1\.(mlp\.up|self_attn\.v)"])
def test_at_full_rank_peft_gives_the_experts_logits(targets, base, tmp_path):
    folder, lm, spectra, z = base
    chosen = {name: z[name] for name in sva.decompose(lm, targets, progress=False)}
    parts = export_peft.save_peft(tmp_path / "a", lm, spectra, chosen, title="mine")
    assert all(part.error == 0 and part.rank == part.full_rank for part in parts.values())
    ours, theirs = np.asarray(lm.logits(IDS, MASK, chosen)), tiny.logits(loaded(folder, tmp_path / "a"), IDS, MASK)
    plain = np.asarray(lm.logits(IDS, MASK))
    assert np.abs(ours - plain).max() > 0.1
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()


@pytest.mark.parametrize("limit", [{"rank": 7}, {"tolerance": 0.1}])
def test_a_truncated_adapter_is_within_its_stated_error_in_every_matrix(limit, base, tmp_path):
    folder, lm, spectra, z = base
    parts = export_peft.save_peft(tmp_path / "a", lm, spectra, z, title="mine", **limit)
    merged = loaded(folder, tmp_path / "a").merge_and_unload()
    wanted = sva.merge(lm, spectra, z).named_params()
    for name, part in parts.items():
        left = merged.get_parameter(name).detach().numpy().astype("f8") - np.asarray(wanted[name], "f8")
        error = np.linalg.norm(left, 2) / float(spectra[name].s[0])
        assert error == pytest.approx(part.error, rel=1e-3), name
        assert part.error > 0.01
    kept = {}
    for name, x in spectra.items():
        d = np.abs(np.asarray(x.s, "f8") * (z[name] - 1.0))
        count = parts[name].rank
        kept[name] = np.where(np.isin(np.arange(len(d)), np.argsort(-d)[:count]), z[name], np.float32(1))
    ours, theirs = np.asarray(lm.logits(IDS, MASK, kept)), tiny.logits(merged, IDS, MASK)
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(ours).max()
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "numpy") as file:
        about = json.loads(file.metadata()["sva"])
    assert about["relative_error"] == {name: part.error for name, part in parts.items()}
    assert about["fingerprint"] == lm.fingerprint
    readme = (tmp_path / "a" / "README.md").read_text()
    worst = max(part.error for name, part in parts.items() if "gate" in name)
    assert f"{worst:.2e}" in next(line for line in readme.splitlines() if "mlp.gate_proj" in line)
    assert f"{max(part.error for part in parts.values()):.2e}" in export_peft.summary(parts)


def test_the_config_says_what_a_server_must_know(base, tmp_path):
    folder, lm, spectra, z = base
    parts = export_peft.save_peft(tmp_path / "a", lm, spectra, z, title="mine", tolerance=0.1)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    ranks = {name.removesuffix(".weight"): part.rank for name, part in parts.items()}
    assert len(set(ranks.values())) > 3
    assert config["r"] == config["lora_alpha"] == max(ranks.values())
    assert {module: config["rank_pattern"].get(module, config["r"]) for module in ranks} == ranks
    assert config["alpha_pattern"] == config["rank_pattern"]
    assert config["target_modules"] == sorted({module.rpartition(".")[2] for module in ranks})
    assert config["base_model_name_or_path"] == str(folder)
    assert "--max-lora-rank 64 " in (tmp_path / "a" / "README.md").read_text()
    # a kind that one layer lacks is named module by module, or PEFT would put an untrained adapter there
    some = {name: x for name, x in z.items() if "layers.2.mlp.up_proj" not in name}
    export_peft.save_peft(tmp_path / "b", lm, spectra, some, title="mine", rank=4)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["target_modules"] == [name.removesuffix(".weight") for name in some]
    assert "--max-lora-rank 8 " in (tmp_path / "b" / "README.md").read_text()


def test_bfloat16_adapters_are_stored_in_half_the_bytes(base, tmp_path):
    folder, lm, spectra, z = base
    export_peft.save_peft(tmp_path / "a", lm, spectra, z, title="mine", dtype=ml_dtypes.bfloat16)
    ours, theirs = np.asarray(lm.logits(IDS, MASK, z)), tiny.logits(loaded(folder, tmp_path / "a"), IDS, MASK)
    assert 1e-4 < np.abs(ours - theirs).max() / np.abs(ours).max() < 0.02
    with safe_open(tmp_path / "a" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_what_cannot_be_exported_is_one_line(base, tmp_path):
    _, lm, spectra, z = base
    with pytest.raises(UserError, match=r"at tolerance 0.9 nothing of this expert is left"):
        export_peft.save_peft(tmp_path / "a", lm, spectra, z, title="mine", tolerance=0.9)
    with pytest.raises(UserError, match="nothing of this expert is left"):
        export_peft.save_peft(tmp_path / "a", lm, spectra, {k: np.ones_like(x) for k, x in z.items()}, title="mine")
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.txt").touch()
    with pytest.raises(UserError, match="already holds something"):
        export_peft.save_peft(tmp_path / "a", lm, spectra, z, title="mine")
