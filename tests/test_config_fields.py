"""No key of a config is ignored: each changes the logits as in transformers, or is refused, or has no effect there."""

import ast
import copy
import dataclasses
import importlib
import inspect
import sys
import textwrap
from functools import cache

import jax
import numpy as np
import pytest
import tiny
import torch
import transformers
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from sva.models.architectures import TABLE
from sva.models.checkpoint_formats import open_checkpoint
from sva.models.config import from_hf
from sva.models.fields import Only, Sets, Unused
from sva.models.load import load_params
from sva.models.transformer import Transformer, logits
from sva.utils.errors import UserError

KINDS = {"gemma3_text": "gemma3"}  # of tiny.py, where it has another name
# Beside what the tiny config says: switched on, or left to its default, so that a change of another key shows.
BASES = {
    "qwen2": {"layer_types": None, "max_window_layers": 2},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 7},
    "qwen3": {"layer_types": None, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 2.0, 3.0, 4.0] * 2, "long_factor": [2.0] * 8}
NESTED = {
    "full_attention": {"rope_type": "default", "rope_theta": 77.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 55.0},
}
# Keys that sva keeps for generation, packing and bounds; they are no part of a forward pass.
NOT_OF_LOGITS = {"max_position_embeddings": 512, "bos_token_id": 5, "eos_token_id": 5, "pad_token_id": 5}
# What each key becomes, with what must change beside it for that to show.
CHANGES = {
    "vocab_size": {"vocab_size": 160},
    "hidden_size": {"hidden_size": 96},
    "intermediate_size": {"intermediate_size": 112},
    "num_hidden_layers": {"num_hidden_layers": 2},
    "num_attention_heads": {"num_attention_heads": 8},
    "num_key_value_heads": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 32},
    "hidden_act": {"hidden_act": "gelu"},
    "hidden_activation": {"hidden_activation": "silu"},
    "rms_norm_eps": {"rms_norm_eps": 0.5},
    "rope_theta": {"rope_theta": 77.0, "rope_parameters": None},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
    "rope_scaling": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "original_max_position_embeddings": {"rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
    "rope_local_base_freq": {"rope_local_base_freq": 33.0, "rope_parameters": None},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5, "rope_parameters": None},
    "layer_types": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "use_sliding_window": {"use_sliding_window": False, "layer_types": None},
    "sliding_window": {"sliding_window": 3},
    "max_window_layers": {"max_window_layers": 1},
    "sliding_window_pattern": {"sliding_window_pattern": 3, "layer_types": None},
    "query_pre_attn_scalar": {"query_pre_attn_scalar": 7},
    "final_logit_softcapping": {"final_logit_softcapping": 2.0},
    "attn_logit_softcapping": {"attn_logit_softcapping": 1.0},
    "no_rope_layers": {"no_rope_layers": [0, 1, 1]},
    "no_rope_layer_interval": {"no_rope_layer_interval": 3, "no_rope_layers": None, "layer_types": None},
    "embedding_multiplier": {"embedding_multiplier": 7.0},
    "residual_multiplier": {"residual_multiplier": 0.3},
    "attention_multiplier": {"attention_multiplier": 0.4},
    "logits_scaling": {"logits_scaling": 5.0},
    "num_experts": {"num_experts": 4},
    "num_local_experts": {"num_local_experts": 4},
    "num_experts_per_tok": {"num_experts_per_tok": 1},
    "moe_intermediate_size": {"moe_intermediate_size": 48},
    "decoder_sparse_step": {"decoder_sparse_step": 2, "mlp_only_layers": []},
    "mlp_only_layers": {"mlp_only_layers": [1]},
}
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "norm_topk_prob")
COUNTS = ("num_experts", "num_local_experts")  # two names of one count
CHANGES_OF = {
    ("smollm3", "layer_types"): {"layer_types": ["full_attention", "full_attention", "sliding_attention"]},
    ("phi3", "rope_scaling"): {"rope_scaling": LONGROPE},
    ("phi3", "original_max_position_embeddings"): {"rope_scaling": LONGROPE, "original_max_position_embeddings": 8},
    ("gemma3_text", "rope_parameters"): {"rope_parameters": NESTED},
    ("olmo3", "rope_parameters"): {"rope_parameters": NESTED},
    ("gemma3_text", "rope_theta"): {"rope_theta": 77.0, "rope_parameters": None},
}
REFUSED = {("olmo3", "rope_theta"): "read differently by transformers 4 and 5"}
IMPOSSIBLE = {("olmoe", "head_dim")}  # transformers builds norms of hidden_size entries then, which do not fit
UNUSED = {
    "initializer_range": 0.5,
    "attention_dropout": 0.5,
    "resid_pdrop": 0.5,
    "embd_pdrop": 0.5,
    "router_jitter_noise": 0.5,
    "router_aux_loss_coef": 0.5,
    "output_router_logits": True,
    "output_attentions": True,
    "output_hidden_states": True,
    "use_cache": False,
    "cache_implementation": "static",
    "chunk_size_feed_forward": 2,
    "pretraining_tp": 2,
    "hidden_act": "gelu",
    "attention_bias": True,
    "mlp_bias": True,
    "sliding_window": 3,
    "_sliding_window_pattern": 3,
    "max_window_layers": 1,
    "attn_logit_softcapping": 1.0,
    "id2label": {"0": "a", "1": "b", "2": "c"},
    "label2id": {"a": 0, "b": 1, "c": 2},
    "num_labels": 3,
    "problem_type": "regression",
    "transformers_version": "4.0.0",
    "unsloth_version": "1",
    "unsloth_fixed": True,
    "is_llama_config": True,
    "transformers.js_config": {"dtype": "q4"},
    "auto_map": {"AutoModelForCausalLM": "code.Model"},
    "_name_or_path": "somebody/some-model",
    "name_or_path": "somebody/some-model",
    "_commit_hash": "0",
    "_attn_implementation_autoset": True,
}
# Keys without effect here of which transformers' logits say nothing.
NOT_COMPARED = {
    "model_type": "chooses the class",
    "architectures": "chooses the class",
    "attn_implementation": "chooses a kernel, which rounds in another way",
    "experts_implementation": "chooses a kernel, which rounds in another way",
    "dtype": "transformers computes in it",
    "torch_dtype": "transformers computes in it",
    "return_dict": "the logits come in a tuple",
}
# Values that are refused, where True is not one.
OTHERS = {
    "quantization_config": {"quant_method": "gptq"},
    "partial_rotary_factor": 0.5,
    "is_causal": False,
    "per_layer_config": {"0": {"hidden_act": "gelu"}},
    "sliding_window": 4,
}
# Names in transformers' code that are no settings of these models: its methods, and images beside Gemma 3's text.
NO_SETTINGS = {"_attn_implementation", "get_text_config"}
NO_SETTINGS |= {"image_token_id", "mm_tokens_per_image", "text_config", "vision_config", "token_type_ids"}
SETS = [(kind, key) for kind, a in TABLE.items() for key, field in a.fields.items() if isinstance(field, Sets)]
ONLY = [(kind, key) for kind, a in TABLE.items() for key, field in a.fields.items() if isinstance(field, Only)]
IDS = np.random.default_rng(0).integers(0, tiny.VOCAB, (1, 13))


def base(kind):
    return copy.deepcopy(tiny.config(KINDS.get(kind, kind)).to_dict()) | BASES.get(kind, {})


def changed(kind, key):
    """The config with one key changed; lists of layers are cut where there are fewer."""
    raw = base(kind)
    if key in COUNTS:
        raw = {name: value for name, value in raw.items() if name not in COUNTS}
    if key in FLAGS:
        raw |= {key: not raw[key]}
    else:
        raw |= copy.deepcopy(CHANGES_OF.get((kind, key)) or CHANGES[key])
    for name in ("layer_types", "no_rope_layers"):
        if raw.get(name):
            raw[name] = raw[name][: raw["num_hidden_layers"]]
    return raw


def theirs(raw):
    """(their model with random weights, the same for the same shapes; its logits of IDS)."""
    cfg = transformers.AutoConfig.for_model(**copy.deepcopy(raw))
    cfg._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(cfg).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            seed = torch.Generator().manual_seed(sum(map(ord, name)))
            spread = 0.3 if weight.ndim == 1 else 1.2 / weight.shape[-1] ** 0.5
            weight.copy_(torch.randn(weight.shape, generator=seed) * spread + ("norm" in name))
    return model, tiny.logits(model, IDS, np.ones_like(IDS))


@cache
def before(kind):
    """Their logits of IDS of the unchanged config."""
    return theirs(base(kind))[1]


def ours(raw, model, directory):
    """sva's logits of IDS, by the weights that transformers saves."""
    model.save_pretrained(directory)
    network = Transformer(from_hf(raw))
    params, _ = load_params(open_checkpoint(directory), network, progress=False)
    with jax.disable_jit():  # a hundred shapes: compiling each model would take minutes
        return np.asarray(logits(network, params, IDS, np.ones_like(IDS)))


def settings_read(*code):
    """What transformers' code asks of a config: `config.KEY`, `getattr(config, "KEY")`, `kwargs.pop("KEY")`."""

    def is_of(node, *names):
        return getattr(node, "id", getattr(node, "attr", None)) in names

    found = set()
    for node in (node for text in code for node in ast.walk(ast.parse(textwrap.dedent(text)))):
        if isinstance(node, ast.Attribute) and is_of(node.value, "config"):
            found.add(node.attr)
        if isinstance(node, ast.Call) and len(node.args) > 0:
            args = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
            on = node.args[0] if is_of(node.func, "getattr", "hasattr") else getattr(node.func, "value", None)
            is_asked = is_of(node.func, "getattr", "hasattr") and is_of(on, "config", "self")
            if is_asked or (is_of(node.func, "get", "pop", "setdefault") and is_of(on, "kwargs")):
                found.update(args[:1])
    return found


@pytest.mark.parametrize("kind", TABLE)
def test_every_setting_that_transformers_reads_is_in_the_table(kind):
    config = type(transformers.AutoConfig.for_model(kind))
    network = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    masks = (create_causal_mask, create_sliding_window_causal_mask)
    code = [sys.modules[config.__module__], network, transformers.PreTrainedConfig.__post_init__]
    code += [mask for mask in masks if hasattr(network, mask.__name__)]
    found = settings_read(*map(inspect.getsource, code)) | {field.name for field in dataclasses.fields(config)}
    assert {"is_causal", "per_layer_config", "num_hidden_layers", "head_dim"} <= found
    assert sorted(found - set(TABLE[kind].fields) - NO_SETTINGS) == []


def once_each():
    """The pairs whose key has an effect, those marked long whose key another architecture reads in the same way."""
    seen = set()
    for kind, key in SETS:
        if key not in NOT_OF_LOGITS and (kind, key) not in IMPOSSIBLE:
            same = key, TABLE[kind].fields[key].sets, TABLE[kind].fields[key].read
            yield pytest.param(kind, key, marks=[pytest.mark.long] if same in seen else [])
            seen.add(same)


@pytest.mark.parametrize(("kind", "key"), [*once_each()])
def test_a_key_that_is_read_changes_the_logits_as_in_transformers(kind, key, tmp_path):
    raw = changed(kind, key)
    if (kind, key) in REFUSED:
        with pytest.raises(UserError, match=REFUSED[kind, key]):
            from_hf(raw)
        return
    assert from_hf(raw) != from_hf(base(kind))
    model, expected = theirs(raw)
    found = ours(raw, model, tmp_path)
    assert np.abs(found - expected).max() < 3e-4
    unchanged = before(kind)
    assert unchanged.shape != expected.shape or np.abs(unchanged - expected).max() > 1e-2


@pytest.mark.parametrize("kind", TABLE)
def test_keys_that_are_kept_for_other_ends_leave_the_logits(kind):
    changes = {key: value for key, value in NOT_OF_LOGITS.items() if (kind, key) in SETS}
    for key, value in changes.items():
        assert from_hf(base(kind) | {key: value}) != from_hf(base(kind)), key
    np.testing.assert_array_equal(theirs(base(kind) | changes)[1], before(kind))


@pytest.mark.parametrize(("kind", "key"), ONLY)
def test_a_value_that_is_not_implemented_is_refused_by_name(kind, key):
    with pytest.raises(UserError, match=key if key != "quantization_config" else "quantised"):
        from_hf(base(kind) | {key: OTHERS.get(key, True)})


@pytest.mark.parametrize("kind", TABLE)
def test_keys_without_effect_have_none_and_say_why(kind):
    keys = {key: field.why for key, field in TABLE[kind].fields.items() if isinstance(field, Unused)}
    assert all(len(why.split()) >= 3 for why in keys.values())
    raw = base(kind) | copy.deepcopy({key: UNUSED[key] for key in keys if key not in NOT_COMPARED})
    assert from_hf(raw) == from_hf(base(kind))
    np.testing.assert_array_equal(theirs(raw)[1], before(kind))
