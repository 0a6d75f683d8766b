"""LoRA, rsLoRA, DoRA and IA3 against PEFT, and their files both ways."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
import torch

import sva
from sva.generation.frozen import frozen_of, merge_expert
from sva.interop.peft_adapters import read_adapter, save_adapter
from sva.spectral.expert import Expert
from sva.spectral.forms import adapters
from sva.spectral.parametrisations import family, matrix_infos
from sva.utils.errors import UserError

peft = pytest.importorskip("peft", reason="the comparison needs peft: requirements-torch.txt")

# PEFT 0.21 asks transformers 5.23 under a name that will go; whatever else it warns of, missing weights too, fails
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 12))
MASK = np.ones_like(IDS)
WEIGHTS = np.random.default_rng(1).standard_normal((*IDS.shape, tiny.VOCAB)).astype("f4")  # of the loss, over logits
LORA = dict(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
CONFIGS = {  # of PEFT, the spelling, the kind of base model
    "lora": (peft.LoraConfig(**LORA, lora_dropout=0.5), "lora:r=4,alpha=6,dropout=0.5", "llama"),
    "rslora": (peft.LoraConfig(**LORA, use_rslora=True), "rslora:r=4,alpha=6", "llama"),
    "dora": (peft.LoraConfig(**LORA, use_dora=True), "dora:r=4,alpha=6", "qwen2"),
    "ia3": (
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "ia3",
        "qwen2",  # whose keys and values have biases, which are scaled as well
    ),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{kind: (its directory, the LM)}"""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("llama", "qwen2"):
        tiny.make(kind, folder / kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield {kind: (folder / kind, sva.load(str(folder / kind), progress=False)) for kind in ("llama", "qwen2")}


def _base(folder):
    return tiny.transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")


def _trained(folder, config):
    """A PEFT model whose adapter is some way from its start."""
    torch.manual_seed(0)
    model = peft.get_peft_model(_base(folder), config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape) * (1 if "magnitude" not in name else weight.abs())
    return model


def _near(found, exact, name=""):
    found, exact = np.asarray(found), np.asarray(exact)
    assert np.linalg.norm(found - exact) <= 1e-4 * np.linalg.norm(exact), name


@pytest.mark.parametrize("kind", CONFIGS)
def test_pefts_adapter_gives_pefts_logits_gradients_and_merged_weights(kind, bases, tmp_path):
    config, spelling, base = CONFIGS[kind]
    folder, lm = bases[base]
    model = _trained(folder, config)
    model.save_pretrained(tmp_path / "theirs")
    expert = read_adapter(tmp_path / "theirs", lm)
    assert expert.parametrisation == spelling
    member, frozen = expert.member, sva.frozen(lm, expert)

    def loss(raw):
        adapter = adapters(frozen, member.z(raw, matrix_infos(frozen)))
        found = sva.logits(lm.model, lm.params, jnp.asarray(IDS), jnp.asarray(MASK), adapter)
        return jnp.sum(found * WEIGHTS), found

    slopes, found = jax.jit(jax.grad(loss, has_aux=True))(jax.tree.map(jnp.asarray, dict(expert.raw)))
    theirs = model(torch.tensor(IDS), use_cache=False).logits
    (theirs * torch.tensor(WEIGHTS)).sum().backward()
    _near(found, theirs.detach())
    plain = np.asarray(lm.logits(IDS, MASK))
    assert np.abs(found - plain).max() > 0.05 * np.abs(plain).max()
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            _near(np.ravel(_at(slopes, name)), weight.grad.ravel(), name)
    merged = {name: x.detach() for name, x in model.merge_and_unload().named_parameters()}
    ours = merge_expert(lm, expert).named_params()
    changed = [*expert.names, *(f"{name.removesuffix('weight')}bias" for name in expert.names)]
    for name in changed:
        if name in merged:
            _near(ours[name], merged[name], name)


def _at(slopes, name):
    """Our gradient of a parameter of PEFT's."""
    module, _, part = name.removeprefix("base_model.model.").partition(".lora_")
    if not part:
        return slopes[f"{module.partition('.ia3_l')[0]}.weight"]
    return slopes[f"{module}.weight"][{"A": "a", "B": "b", "m": "magnitude"}[part[0]]]


@pytest.mark.parametrize("kind", CONFIGS)
def test_our_expert_loads_in_peft_with_the_same_logits_and_comes_back(kind, bases, tmp_path):
    _, spelling, base = CONFIGS[kind]
    folder, lm = bases[base]
    # Of IA3 a module that is adapted everywhere beside others that are not.
    targets = r"layers\.0\.self_attn\.[kv]_|down_proj" if kind == "ia3" else r"layers\.[01]\.(mlp\.up|self_attn\.v)"
    names = sva.utils.trees.select(sva.models.weights.expected(lm.model.cfg), targets)
    member, rng = family(spelling), np.random.default_rng(2)
    start = member.start(matrix_infos(frozen_of(lm, member, names)))
    raw = jax.tree.map(lambda x: np.asarray(x + 0.1 * rng.standard_normal(x.shape), "f4"), start)
    expert = Expert(raw, spelling)
    save_adapter(tmp_path / "a", lm, expert, title="mine")
    theirs = tiny.logits(peft.PeftModel.from_pretrained(_base(folder), tmp_path / "a").eval(), IDS, MASK)
    _near(merge_expert(lm, expert).logits(IDS, MASK), theirs)
    again = read_adapter(tmp_path / "a", lm)
    assert again.digest == expert.digest


def test_ranks_and_scales_that_differ_are_filled_up(bases, tmp_path):
    folder, lm = bases["llama"]
    config = peft.LoraConfig(**LORA, rank_pattern={"up_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 3})
    model = _trained(folder, config)
    model.save_pretrained(tmp_path / "a")
    expert = read_adapter(tmp_path / "a", lm)
    assert expert.parametrisation == "lora:r=4,alpha=4"
    _near(merge_expert(lm, expert).logits(IDS, MASK), tiny.logits(model, IDS, MASK))


def test_what_cannot_be_read_is_one_line_that_names_it(bases, tmp_path):
    (folder, lm), (_, other) = bases["llama"], bases["qwen2"]
    place = tmp_path / "a"
    _trained(folder, CONFIGS["lora"][0]).save_pretrained(place)
    weights, settings = place / "adapter_model.safetensors", place / "adapter_config.json"
    tensors, config = safetensors.numpy.load_file(weights), json.loads(settings.read_text())
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"

    def refused(words, tensors=tensors, **changes):
        safetensors.numpy.save_file(tensors, weights)
        settings.write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=words) as caught:
            read_adapter(place, lm)
        assert "\n" not in str(caught.value)

    deep = {key.replace("layers.0", "layers.7"): tensors[key]}
    refused("holds model.layers.7.mlp.up_proj.lora_A.weight, which .* has no linear layer for", tensors | deep)
    refused("lm_head.lora_A.weight, which", tensors | {"base_model.model.lm_head.lora_A.weight": tensors[key]})
    embedding = {"base_model.model.model.embed_tokens.lora_embedding_A": tensors[key]}
    refused("embed_tokens.lora_embedding_A, which", tensors | embedding)
    refused(r"up_proj.weight/a: raw has shape \[4, 5\], .* needs \[4, 64\]", tensors | {key: np.zeros((4, 5), "f4")})
    refused(
        "up_proj.weight lacks, or has beyond what the settings say, a", {k: x for k, x in tensors.items() if k != key}
    )
    refused("peft_type is VERA", peft_type="VERA")
    refused("bias='all' trains what sva does not", bias="all")
    for start in ("pissa", "pissa_niter_4", "olora", "corda"):
        refused(f"init_lora_weights='{start}' makes PEFT change the base weights", init_lora_weights=start)
    refused("alora_invocation_tokens makes PEFT apply", alora_invocation_tokens=[7, 8])
    settings.unlink()
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        read_adapter(place, lm)
    expert = Expert({"model.layers.0.mlp.up_proj.weight": np.ones(96, "f4")}, "ia3")
    save_adapter(tmp_path / "b", lm, expert, title="mine")
    with pytest.raises(UserError, match="is an adapter of .*llama .* not of .*qwen2"):
        read_adapter(tmp_path / "b", other)
    dense = dataclasses.replace(expert, parametrisation="full")
    with pytest.raises(UserError, match="PEFT has no adapter like full; export with --format hf"):
        save_adapter(tmp_path / "c", lm, dense, title="mine")
