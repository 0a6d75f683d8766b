"""The public code's files, written by torch the way that code does, against its own formula in torch."""

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import sva
from sva.interop.sakana import read_expert
from sva.interop.torch_files import read_tensors
from sva.models.config import from_hf
from sva.models.weights import expected
from sva.utils.errors import UserError
from sva.utils.trees import select


class Policy(nn.Module):
    """Holds p as the public code's policy does: a dictionary that is no module, and the same in a ParameterList."""

    def __init__(self, weights, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        p = {k: torch.randn(min(w.shape), generator=generator) for k, w in weights.items() if "mlp" in k}
        self.learnable_params = {k: nn.Parameter((x * 0.5 + 0.1).bfloat16()) for k, x in p.items()}
        self.learnable_params_module_list = nn.ParameterList(self.learnable_params.values())


class Mixture(nn.Module):
    """Few-shot mixture of several policies: alpha of each, or of each and matrix."""

    def __init__(self, policies, alphas):
        super().__init__()
        self.adaptive_weights = nn.Parameter(torch.tensor(alphas))
        self.experts = [policy.learnable_params for policy in policies]
        for i, expert in enumerate(self.experts):
            for k, p in expert.items():
                self.register_buffer(f"weights_{i}_k_{k.replace('.', '_')}", p.detach().clone())

    def mixed(self):
        alphas = self.adaptive_weights.expand(len(self.experts), len(self.experts[0]))
        return {
            k: sum(expert[k] * alphas[e, column] for e, expert in enumerate(self.experts))
            for column, k in enumerate(self.experts[0])
        }


def composed(model, masks):
    """The torch model with the public code's composition of every mlp weight, in float32."""
    with torch.no_grad():
        for name, mask in masks.items():
            weight = model.get_parameter(name)
            u, s, v = torch.svd(weight)
            mask = mask.float()
            weight.copy_((u @ torch.diag(s * mask) @ v.T) * (s.sum() / (s * mask).sum()))
    return model


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(tiny Llama in torch, the same as an LM)."""
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVA_CACHE", str(tmp_path_factory.mktemp("cache")))
        model = tiny.make("llama", folder / "llama")
        yield model, sva.load(str(folder / "llama"), progress=False)


def saved(what, path):
    torch.save(what, path)
    return path


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_the_order_of_the_module_list_is_that_of_the_checkpoint(kind):
    model = tiny.transformers.AutoModelForCausalLM.from_config(tiny.config(kind))
    theirs = [name for name in model.state_dict() if "mlp" in name]
    assert select(expected(from_hf(model.config.to_dict())), "mlp") == theirs


@pytest.mark.parametrize("layout", ["policy_params", "learnable_params"])
def test_an_expert_of_either_layout_gives_the_public_codes_logits(layout, base, tmp_path):
    model, lm = base
    policy = Policy(model.state_dict())
    what = policy.state_dict() if layout == "policy_params" else policy.learnable_params
    expert = read_expert(saved(what, tmp_path / f"{layout}_latest.pt"), lm)
    assert expert.parametrisation == "sigmoid_nuclear"
    assert expert.metadata["imported_from"]["layout"] == layout
    assert expert.metadata["fingerprint"] == lm.fingerprint
    for name, p in policy.learnable_params.items():
        np.testing.assert_array_equal(expert.raw[name], p.detach().float().numpy())
    z = expert.z(sva.decompose(lm, progress=False))
    _compare(lm, z, model, {k: torch.sigmoid(p.float()) for k, p in policy.learnable_params.items()})


@pytest.mark.parametrize("layout", ["policy_params", "learnable_params"])
@pytest.mark.parametrize("per_matrix", [False, True])
def test_a_mixture_of_either_layout_gives_the_public_codes_logits(layout, per_matrix, base, tmp_path):
    model, lm = base
    policies = [Policy(model.state_dict(), seed) for seed in range(2)]
    for policy in policies:  # raw p are mixed: keep them away from sums near zero
        for p in policy.learnable_params.values():
            p.data.abs_()
    alphas = np.random.default_rng(0).uniform(0.2, 0.8, (2, 9 if per_matrix else 1)).astype("f4").tolist()
    mixture = Mixture(policies, alphas)
    what = mixture.state_dict() if layout == "policy_params" else mixture.mixed()
    expert = read_expert(saved(what, tmp_path / "x.pt"), lm)
    assert expert.parametrisation == "linear"
    assert expert.metadata["imported_from"]["layout"] == f"{layout} of a mixture"
    masks = mixture.mixed()
    if layout == "policy_params":  # torch rounds each product to bfloat16, sva does not
        masks = {k: sum(a * p[k].detach().float() for a, p in _columns(mixture, k)) for k in masks}
    _compare(lm, expert.z(sva.decompose(lm, progress=False)), model, {k: m.detach() for k, m in masks.items()})


def _columns(mixture, name):
    column = list(mixture.experts[0]).index(name)
    alphas = mixture.adaptive_weights.detach().expand(2, 9)[:, column]
    return zip(alphas, mixture.experts, strict=True)


def _compare(lm, z, model, masks):
    import copy

    ids = np.random.default_rng(0).integers(3, tiny.VOCAB, (2, 12))
    mask = np.ones_like(ids)
    # In float64, so that the bound is ours alone: torch's own float32 moves by as much from one processor to the next.
    doubles = {name: scale.double() for name, scale in masks.items()}
    theirs = tiny.logits(composed(copy.deepcopy(model).double(), doubles), ids, mask)
    base_logits = tiny.logits(model, ids, mask)
    ours = np.asarray(lm.logits(ids, mask, z))
    assert np.abs(theirs - base_logits).max() > 0.1  # the expert does something
    assert np.abs(ours - theirs).max() < 3e-5


def test_tensors_without_a_gradient_are_read_as_p(base, tmp_path):
    model, lm = base
    plain = {k: p.detach() for k, p in Policy(model.state_dict()).learnable_params.items()}
    assert not any(tensor.requires_grad for tensor in read_tensors(saved(plain, tmp_path / "x.pt")).values())
    assert read_expert(tmp_path / "x.pt", lm).parametrisation == "sigmoid_nuclear"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda p: p.pop("model.layers.1.mlp.up_proj.weight"),
            "8 tensors, the model has 9 mlp weights; none for model",
        ),
        (lambda p: p.update(extra=torch.ones(3)), "10 tensors, the model has 9 mlp weights; 'extra' is none of them"),
        (lambda p: p.update({"model.layers.0.mlp.up_proj.weight": torch.ones(63)}), "has shape [63], "),
        (lambda p: p.update({"model.layers.0.mlp.up_proj.weight": torch.ones(1, 64)}), "has shape [1, 64], "),
        (lambda p: p.update({"model.layers.0.mlp.up_proj.weight": torch.full([64], torch.nan)}), "NaN"),
        (lambda p: p.clear() or p.update(weight=torch.ones(3)), "'weight' are those of no file of the public code"),
    ],
)
def test_a_file_that_does_not_fit_the_model_is_one_line(change, words, base, tmp_path):
    model, lm = base
    what = dict(Policy(model.state_dict()).learnable_params)
    change(what)
    with pytest.raises(UserError) as caught:
        read_expert(saved(what, tmp_path / "x.pt"), lm)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(adaptive_weights=torch.ones(2)), "adaptive_weights has shape [2]"),
        (lambda m: m.update(adaptive_weights=torch.ones(2, 5)), "[experts, 1 or 9]"),
        (lambda m: m.update(adaptive_weights=torch.ones(1, 1)), "belongs to none of the 1 experts"),
        (lambda m: m.update(adaptive_weights=torch.ones(3, 1)), "0 tensors, the model has 9"),
        (lambda m: m.update(adaptive_weights=torch.zeros(2, 1)), "adds up to nothing"),
        (lambda m: m.update(other=torch.ones(2)), "'other' belongs to none"),
    ],
)
def test_a_mixture_that_does_not_fit_is_one_line(change, words, base, tmp_path):
    model, lm = base
    what = dict(Mixture([Policy(model.state_dict(), seed) for seed in range(2)], [[0.5], [0.5]]).state_dict())
    change(what)
    with pytest.raises(UserError) as caught:
        read_expert(saved(what, tmp_path / "x.pt"), lm)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_policy_params_of_a_model_with_more_layers_are_refused(base, tmp_path):
    model, lm = base
    bigger = tiny.transformers.AutoModelForCausalLM.from_config(tiny.config("llama", num_hidden_layers=4))
    with pytest.raises(UserError, match="12 tensors, the model has 9 mlp weights"):
        read_expert(saved(Policy(bigger.state_dict()).state_dict(), tmp_path / "x.pt"), lm)
