import copy
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from sva.models.architectures import TABLE
from sva.models.config import from_hf, to_hf
from sva.models.rope import Rope, inverse_frequencies
from sva.training import config as settings
from sva.utils.errors import UserError

BASE = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf(**changes):
    """BASE with changes; a value of ... leaves the key out."""
    return {k: v for k, v in (BASE | changes).items() if v is not ...}


def effective(raw):
    """What transformers makes of the same dictionary."""
    return transformers.AutoConfig.for_model(**copy.deepcopy(raw))


@pytest.mark.parametrize("kind", TABLE)
def test_defaults_are_those_of_transformers_classes(kind):
    given = effective({"model_type": kind})
    fields = {name: field.default for name, field in type(given).__dataclass_fields__.items()}
    ours = TABLE[kind].defaults()
    # transformers' modules take these from a config that has them, whether its class knows them or not
    loose = dict.fromkeys(("head_dim", "rope_scaling", "original_max_position_embeddings", "sliding_window_pattern"))
    loose |= {"num_experts": None, "num_local_experts": None}  # one is the other's name in older files
    loose |= {"partial_rotary_factor": 1.0}
    theta = ours.pop("rope_theta")
    thetas = {"full_attention": theta, "sliding_attention": ours.pop("rope_local_base_freq", theta)}
    assert {key: (loose | fields)[key] for key in ours} == ours
    ropes = given.rope_parameters
    ropes = ropes if "full_attention" in ropes else {"full_attention": ropes}
    for layer_type, rope in ropes.items():
        rope.pop("partial_rotary_factor", None)
        assert rope == {"rope_theta": thetas[layer_type], "rope_type": "default"}


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_tiny_configs_are_read_as_transformers_means_them(kind):
    theirs = tiny.config(kind)
    cfg = from_hf(theirs.to_dict())
    assert cfg.architecture == theirs.model_type
    assert (cfg.num_layers, cfg.num_heads, cfg.num_kv_heads) == (3, 4, 2)
    assert cfg.head_dim == (24 if kind == "qwen3" else 16)
    assert cfg.qk_norm == ("head" if kind == "qwen3" else "")
    assert (cfg.attention_bias, cfg.attention_output_bias) == (kind == "qwen2", False)
    assert cfg.tie_word_embeddings == (kind in ("qwen3", "llama3"))
    assert cfg.windows == {"mistral": (6, 6, 6), "qwen2": (0, 0, 7)}.get(kind, (0, 0, 0))
    assert cfg.rope.kind == ("llama3" if kind == "llama3" else "default")
    assert (cfg.bos_token_id, cfg.eos_token_ids, cfg.pad_token_id) == (1, (2,), 0)
    assert hash(cfg) == hash(from_hf(theirs.to_dict()))


def test_both_rope_spellings_give_the_same_model():
    four = hf(rope_theta=5e5, rope_scaling=LLAMA3, max_position_embeddings=131072)
    five = hf(rope_parameters=LLAMA3 | {"rope_theta": 5e5}, max_position_embeddings=131072)
    older = hf(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2})
    assert from_hf(four) == from_hf(five)
    assert from_hf(four).rope == Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192)
    assert from_hf(older).rope == Rope(5e5, "linear", 2.0)
    assert from_hf(hf()).rope == from_hf(hf(rope_scaling=None, rope_theta=10000)).rope == Rope(10000.0)
    assert from_hf(hf(rope_theta=1e6, rope_parameters={"rope_type": "default"})).rope == Rope(1e6)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 3.0, "rope_type": "default"}, "rope_theta": 7.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 3.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3.0}, "rope_theta": 7.0},
        {"rope_scaling": {k: v for k, v in LLAMA3.items() if not k.startswith("original")}},
    ],
)
def test_conflicting_rope_settings_resolve_as_in_transformers(changes):
    theirs = effective(hf(**changes)).rope_parameters
    ours = from_hf(hf(**changes)).rope
    assert (ours.theta, ours.kind) == (theirs["rope_theta"], theirs["rope_type"])
    assert ours.factor == theirs.get("factor", 1.0)
    if ours.kind == "llama3":
        assert ours.original_max_position_embeddings == theirs["original_max_position_embeddings"]


_BARE = {key: value for key, value in LLAMA3.items() if not key.startswith("original")}
ROPES = [
    {"original_max_position_embeddings": 512},
    {"original_max_position_embeddings": 512, "rope_theta": 5e5},
    {"rope_scaling": _BARE, "original_max_position_embeddings": 512},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 512},
    {"rope_scaling": LLAMA3, "max_position_embeddings": 131072},
    {"rope_scaling": _BARE, "max_position_embeddings": 4096},
    {"rope_scaling": _BARE | {"type": "llama3", "rope_theta": 300.0}, "original_max_position_embeddings": 16},
    {"rope_parameters": _BARE, "rope_theta": 5e5, "original_max_position_embeddings": 512},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "original_max_position_embeddings": 64},
    {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}, "rope_theta": 3e3},
    {"rope_parameters": _BARE, "rope_scaling": LLAMA3, "original_max_position_embeddings": 1024},
    {"rope_parameters": {"rope_theta": 700.0}, "original_max_position_embeddings": 64},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "original_max_position_embeddings": 64},
    {"rope_scaling": {"type": "linear", "factor": 4.0, "original_max_position_embeddings": 64}, "rope_theta": 1e6},
    {"rope_scaling": {"type": "llama3", "rope_type": "default", "factor": 8.0}},
]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("changes", ROPES)
def test_frequencies_are_those_of_transformers(kind, changes):
    raw = hf(model_type=kind, head_dim=32, **changes)
    theirs = transformers.AutoModel.from_config(effective(raw)).rotary_emb
    rope = from_hf(raw).rope
    np.testing.assert_allclose(inverse_frequencies(rope, 32), theirs.inv_freq.numpy(), rtol=1e-6)
    assert theirs.attention_scaling == 1.0
    again = from_hf(to_hf(from_hf(raw))).rope
    np.testing.assert_array_equal(inverse_frequencies(again, 32), inverse_frequencies(rope, 32))


def test_an_original_length_beside_the_rope_settings_is_taken_before_the_one_inside():
    for inside in (_BARE, LLAMA3):
        for key in ("rope_scaling", "rope_parameters"):
            read = from_hf(hf(**{key: inside}, original_max_position_embeddings=16))
            assert read.rope.original_max_position_embeddings == 16
    assert (
        from_hf(hf(rope_scaling=LLAMA3, original_max_position_embeddings=None)).rope
        == from_hf(hf(rope_scaling=LLAMA3)).rope
    )


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_sliding_window": True},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
)
def test_qwen_windows_follow_transformers(kind, changes):
    raw = hf(model_type=kind, **changes)
    theirs = effective(raw)
    expected = tuple(theirs.sliding_window if t == "sliding_attention" else 0 for t in theirs.layer_types)
    assert from_hf(raw).windows == expected


@pytest.mark.parametrize("kind", ["gemma2", "gemma3_text", "olmo3"])
def test_a_pattern_of_windows_counts_where_transformers_reads_it(kind):
    raw = hf(model_type=kind, num_hidden_layers=6, sliding_window=8, sliding_window_pattern=3)
    expected = tuple(8 if t == "sliding_attention" else 0 for t in effective(raw).layer_types)
    assert from_hf(raw).windows == expected
    types = ["full_attention"] * 6
    assert from_hf(raw | {"layer_types": types, "sliding_window_pattern": None}).windows == (0,) * 6


def test_olmo3s_own_theta_may_lie_beside_those_of_both_layer_types():
    inside = {"full_attention": {"rope_theta": 70.0}, "sliding_attention": {"rope_theta": 50.0}}
    raw = hf(model_type="olmo3", rope_theta=1e4, rope_parameters=inside)
    theirs = effective(raw).rope_parameters
    cfg = from_hf(raw)
    assert (cfg.rope, cfg.local_rope) == (Rope(70.0), Rope(50.0))
    assert [theirs[kind]["rope_theta"] for kind in inside] == [70.0, 50.0]


@pytest.mark.parametrize("kind", TABLE)
def test_classes_with_and_without_a_head_are_those_of_transformers(kind):
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind], MODEL_MAPPING_NAMES[kind]
    assert TABLE[kind].classes == names
    assert [from_hf(hf(model_type=kind, architectures=[name])).architecture for name in names] == [kind, kind]
    assert [from_hf(hf(model_type=..., architectures=[name])).architecture for name in names] == [kind, kind]


def test_mistral_window_is_on_unless_null():
    assert from_hf(hf(model_type="mistral")).windows == (4096,) * 3
    assert from_hf(hf(model_type="mistral", sliding_window=None)).windows == (0, 0, 0)
    assert from_hf(hf(model_type="llama", sliding_window=5)).windows == (0, 0, 0)


def test_absent_and_null_keys_are_filled_in():
    assert from_hf(hf(num_key_value_heads=...)).num_kv_heads == 4
    assert from_hf(hf(num_key_value_heads=None)).num_kv_heads == 4
    assert from_hf(hf(head_dim=None)).head_dim == 16
    assert from_hf(hf(model_type="qwen3")).head_dim == 128
    assert from_hf(hf()).tie_word_embeddings is False
    assert from_hf(hf()).eos_token_ids == (2,)
    assert from_hf(hf(eos_token_id=None, bos_token_id=None)).eos_token_ids == ()
    assert from_hf(hf(eos_token_id=[7, 9, 7])).eos_token_ids == (7, 9)
    assert from_hf(hf(pad_token_id=-1)).pad_token_id is None
    assert from_hf(hf(model_type=..., architectures=["LlamaForCausalLM"])).architecture == "llama"
    assert from_hf(hf(architectures=["LLaMAForCausalLM"])).architecture == "llama"


def test_biases_come_from_the_settings_of_their_architecture():
    llama = from_hf(hf(attention_bias=True, mlp_bias=True))
    assert (llama.attention_bias, llama.attention_output_bias, llama.mlp_bias) == (True, True, True)
    qwen2 = from_hf(hf(model_type="qwen2"))
    assert (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.mlp_bias) == (True, False, False)
    assert from_hf(hf(model_type="qwen3", attention_bias=True)).attention_output_bias is True
    assert from_hf(hf(model_type="mistral", attention_bias=True)).attention_bias is False


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gemma"}, ["gemma", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": ..., "architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "supported"]),
        ({"model_type": ...}, ["no model_type", "supported"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        (
            {"rope_scaling": {"type": "su", "short_factor": [1.0]}},
            ["'su'", "default, linear, dynamic, yarn, longrope, llama3"],
        ),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}}, ["short_factor has 1"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "factor"]),
        ({"rope_scaling": "linear"}, ["rope_scaling"]),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_scaling needs 'factor'"]),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 4.0}}, ["'proportional'"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}, ["'mrope'"]),
        (
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": "x"},
            ["original_max_position_embeddings", "'x'"],
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e6}}},
            ["layer types (full_attention, sliding_attention)"],
        ),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ({"rope_theta": "big"}, ["rope_theta", "'big'"]),
        ({"hidden_act": "relu"}, ["hidden_act", "relu", "silu"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads 4", "num_key_value_heads 3"]),
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, ["hidden_size 64", "num_attention_heads 6"]),
        ({"head_dim": 15}, ["head_dim 15"]),
        ({"hidden_size": ...}, ["hidden_size", "missing"]),
        ({"vocab_size": None}, ["vocab_size"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers"]),
        ({"num_hidden_layers": "3"}, ["num_hidden_layers", "'3'"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings"]),
        ({"eos_token_id": "</s>"}, ["eos_token_id"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "unquantised"]),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window"]),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, ["layer_types", "3"]),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 3}, ["use_sliding_window"]),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 3}, ["layer_types"]),
        ({"model_type": ["llama"]}, ["unsupported architecture ['llama']", "supported: llama"]),
        ({"hidden_act": ["silu"]}, ["hidden_act ['silu']", "silu, swish"]),
        ({"rope_scaling": {"rope_type": ["x"]}}, ["rope type ['x']", "default, linear"]),
        ({"model_type": "mixtral", "num_local_experts": [8]}, ["num_local_experts", "[8]"]),
        ({"model_type": "olmo3", "rope_parameters": {"full_attention": "x"}}, ["full_attention must be a dict", "'x'"]),
        ({"model_type": "gemma3_text", "rope_parameters": {"sliding_attention": [1, 2]}}, ["rope_parameters.sliding"]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": "6"}, ["sliding_window_pattern", "'6'"]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 2.5}, ["sliding_window_pattern", "2.5"]),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, ["sliding_window_pattern", "not 0"]),
        (
            {
                "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
                "original_max_position_embeddings": 1,
            },
            ["original_max_position_embeddings must be at least 2 tokens, not 1"],
        ),
        ({"rope_scaling": LLAMA3, "original_max_position_embeddings": 0.5}, ["at least 2 tokens, not 0.5"]),
        ({"model_type": "olmo3", "rope_theta": 1e4}, ["rope_theta 10000.0", "in rope_parameters"]),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(changes, words):
    with pytest.raises(UserError) as caught:
        from_hf(hf(**changes), where="there/config.json")
    message = str(caught.value)
    assert message.startswith("there/config.json: ")
    assert "\n" not in message
    assert all(word in message for word in words), message


VARIANTS = [
    {},
    {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
    {"rope_theta": 5e5, "rope_scaling": LLAMA3, "max_position_embeddings": 131072, "eos_token_id": [2, 7]},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "eos_token_id": None, "pad_token_id": 0},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 1.5] * 4, "long_factor": [1.0, 1.5] * 4,
                      "attention_factor": 1.0, "factor": 1.0, "original_max_position_embeddings": 8192}},
    {"model_type": "mistral", "sliding_window": 9},
    {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "qwen3", "head_dim": 24, "attention_bias": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS)
def test_written_config_is_read_alike_by_sva_and_by_transformers(changes, tmp_path):
    cfg = from_hf(hf(**changes))
    (tmp_path / "config.json").write_text(json.dumps(to_hf(cfg)))
    assert from_hf(json.loads((tmp_path / "config.json").read_text())) == cfg
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert from_hf(theirs.to_dict()) == cfg
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (cfg.num_heads * cfg.head_dim, cfg.hidden_size)
    assert ("model.layers.0.self_attn.o_proj.bias" in shapes) == cfg.attention_output_bias
    assert ("model.layers.0.mlp.up_proj.bias" in shapes) == cfg.mlp_bias
    assert ("lm_head.weight" in shapes) != cfg.tie_word_embeddings


def test_phi3s_longrope_is_written_as_transformers_4_takes_it():
    longrope = {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    raw = hf(model_type="phi3", rope_scaling=longrope, original_max_position_embeddings=64)
    assert to_hf(from_hf(raw))["rope_scaling"] == longrope
    own = from_hf(raw | {"rope_scaling": longrope | {"attention_factor": 1.5}})
    assert from_hf(to_hf(own)) == own


def test_windows_no_config_can_express_are_not_written():
    cfg = from_hf(hf(model_type="mistral"))
    mixed = type(cfg)(**(cfg.__dict__ | {"windows": (4096, 0, 8)}))
    with pytest.raises(UserError, match="windows"):
        to_hf(mixed)


def test_reading_a_config_imports_no_torch():
    code = f"import sys; from sva.models.config import from_hf; from_hf({BASE!r}); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_yaml_file_may_begin_with_a_byte_order_mark(tmp_path):
    text = "seed: 3\ntask: ä\ntrain:\n  steps: 7\n"
    plain, marked, other = (tmp_path / f"{name}.yaml" for name in ("plain", "marked", "other"))
    plain.write_text(text)
    marked.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert settings.load(marked) == settings.load(plain)
    assert settings.load(marked).train.steps == 7
    other.write_text(text, encoding="utf-16")
    with pytest.raises(UserError, match=r"other\.yaml is not readable as YAML: it is not UTF-8 \(byte 1\); save"):
        settings.load(other)
