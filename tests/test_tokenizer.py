import gzip
import hashlib
import json
import subprocess
import sys

import gguf
import pytest
import tiny
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from sva.models.checkpoint_formats import open_checkpoint
from sva.models.end_tokens import end_tokens
from sva.models.export import save_checkpoint
from sva.models.gguf import read_gguf
from sva.models.tokenizer import load_tokenizer
from sva.utils.errors import UserError
from sva.utils.paths import data_dir

# sha256 of llama.cpp's ids of GSM8K's test questions, made by experiments/studies/tokenizer_parity.py
# with llama-cpp-python 0.3.36 and SmolLM2-135M-Instruct.Q4_1.gguf
LLAMA_CPP_GSM8K = "7c7fbac869141caf1efcbd13b9aa3dd0c213481b15ca3c150fff737a42d87d79"

TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
SPECIAL = ["<|end|>", "<|start|>", "<|user|>"]
WORDS = ["th", "the", "Ġthe", "12", "Ġ1", "ĠĠ", "'s"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["t h", "th e", "Ġ the", "1 2", "Ġ 1", "Ġ Ġ", "' s"]


def bpe_gguf(path, pre="smollm", model="gpt2", tokens=(), types=(), merges=MERGES, **settings):
    """A file with a small byte-level vocabulary; `settings` are tokenizer.ggml.* keys."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    tokens = [*SPECIAL, *BYTES, *WORDS, *tokens]
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3 - len(types)) + list(types))
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_chat_template(TEMPLATE)
    for key, value in settings.items():
        add = writer.add_bool if isinstance(value, bool) else writer.add_uint32
        add(f"tokenizer.ggml.{key}", value)
    return finished(writer, path)


def sentencepiece_gguf(path, pieces, **settings):
    """A file with control tokens, the 256 bytes, then `pieces`, best first."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(pieces))
    writer.add_token_scores([0.0] * 259 + [-float(i) for i in range(len(pieces))])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for key, value in settings.items():
        writer.add_bool(f"tokenizer.ggml.{key}", value)
    return finished(writer, path)


def finished(writer, path):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pieces_of(tokenizer, text):
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("smollm", ["the", "Ġ", "1", "2", "3", "Ġthe", "'s", "Ġ", "1"]),
        ("gpt-2", ["the", "Ġ", "12", "3", "Ġthe", "'s", "Ġ1"]),
        ("llama-bpe", ["the", "Ġ", "12", "3", "Ġthe", "'s", "Ġ", "1"]),
        ("qwen2", ["the", "Ġ", "1", "2", "3", "Ġthe", "'s", "Ġ", "1"]),
    ],
)
def test_words_are_cut_as_the_file_says(pre, expected, tmp_path):
    tokenizer = load_tokenizer(bpe_gguf(tmp_path / "m.gguf", pre))
    assert pieces_of(tokenizer, "the 123 the's 1") == expected
    text = "Grüße, 日本 🙂\n\n\t x  12"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_llama3_takes_a_whole_word_that_is_a_token_and_ignores_case_in_contractions(tmp_path):
    for pre, expected in [("llama-bpe", ["eht"]), ("qwen2", ["e", "h", "t"])]:
        path = bpe_gguf(tmp_path / f"{pre}.gguf", pre, tokens=["eht"], types=[1])
        assert pieces_of(load_tokenizer(path), "eht") == expected
    qwen, gpt = (load_tokenizer(bpe_gguf(tmp_path / "m.gguf", pre)) for pre in ("qwen2", "gpt-2"))
    offsets = [t(["x'Sa"], return_offsets_mapping=True)["offset_mapping"][0] for t in (qwen, gpt)]
    assert offsets[0] == offsets[1] == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_special_tokens_are_parsed_and_skipped(tmp_path):
    tokenizer = load_tokenizer(bpe_gguf(tmp_path / "m.gguf", tokens=["<tool>"], types=[4]))
    assert pieces_of(tokenizer, "the<|user|><tool>the<|end|>") == ["the", "<|user|>", "<tool>", "the", "<|end|>"]
    ids = tokenizer("the<|user|><tool><|end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the<tool>"
    assert tokenizer.decode(ids) == "the<|user|><tool><|end|>"


def test_the_file_says_which_tokens_are_special_and_what_goes_in_front(tmp_path):
    def ids(pre, **settings):
        return load_tokenizer(bpe_gguf(tmp_path / "m.gguf", pre, **settings))("the")["input_ids"]

    the = 3 + len(BYTES) + WORDS.index("the")
    assert ids("smollm") == ids("qwen2") == [the]
    assert ids("llama-bpe") == [1, the]
    assert ids("llama-bpe", add_bos_token=False) == [the]
    assert ids("smollm", add_bos_token=True, add_eos_token=True) == [1, the, 0]
    tokenizer = load_tokenizer(bpe_gguf(tmp_path / "m.gguf", padding_token_id=2, unknown_token_id=0))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|start|>", "<|end|>")
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (2, 0)
    assert load_tokenizer(bpe_gguf(tmp_path / "m.gguf")).pad_token is None


@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize(
    "text", ["<|eot_id|>", "<|im_end|>", "<end_of_turn>", "<|endoftext|>", "<EOT>", "▁<EOT>", "</s>"]
)
def test_an_end_token_is_known_by_its_text_and_is_no_text_of_an_answer(text, kind, tmp_path):
    path = bpe_gguf(tmp_path / "a.gguf", tokens=[text, "<note>"], types=[kind, kind])
    number = len([*SPECIAL, *BYTES, *WORDS])
    assert end_tokens(read_gguf(path).metadata) == [number, 0]
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode([*tokenizer("the").input_ids, number], skip_special_tokens=True) == "the"
    note = tokenizer.decode([number + 1], skip_special_tokens=True)
    assert note == ("" if kind == 3 else "<note>")


def test_a_word_of_the_vocabulary_ends_nothing(tmp_path):
    path = bpe_gguf(tmp_path / "a.gguf", tokens=["</s>", "<|im_end|>"], types=[1, 1])
    assert end_tokens(read_gguf(path).metadata) == [0]


def test_the_last_end_token_is_the_one_that_ends_a_turn():
    def ends(tokens, template="", **named):
        keys = {f"tokenizer.ggml.{name}_token_id": number for name, number in named.items()}
        keys |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [3] * len(tokens)}
        return end_tokens(keys | {"tokenizer.chat_template": template})

    llama3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert ends(llama3, "...<|eot_id|>...<|eom_id|>", eos=1) == [2, 1, 3]
    assert ends(llama3, eos=1, eot=3) == [2, 1, 3]
    assert ends(llama3, eos=1, eot=3, eom=2) == [1, 2, 3]
    assert ends(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", eos=2) == [0, 2]
    assert ends(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos=0) == [2, 0]  # a base model without a template
    assert ends(["<unk>", "<s>", "</s>"], eos=2, eot=0xFFFFFFFF) == [2]
    assert ends(["<|return|>", "<|call|>", "<|end|>", "<|endoftext|>"], eos=0) == [1, 3, 0]  # <|end|> ends a message
    assert end_tokens({"tokenizer.ggml.eos_token_id": 7}) == [7]
    assert end_tokens({}) == []
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.eos_token_id must be null, a token id"):
        end_tokens({"tokenizer.ggml.eos_token_id": "two"})


def test_the_chat_template_comes_along(tmp_path):
    tokenizer = load_tokenizer(bpe_gguf(tmp_path / "m.gguf"))
    turns = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|user|>the"


def test_sentencepiece_joins_the_best_pair_first_and_falls_back_to_bytes(tmp_path):
    pieces = ["ab", "bc", "▁a", "abc", "▁", "a", "b", "c"]
    tokenizer = load_tokenizer(sentencepiece_gguf(tmp_path / "m.gguf", pieces))
    assert pieces_of(tokenizer, "abc") == ["▁", "abc"]
    assert pieces_of(tokenizer, "a bc") == ["▁a", "▁", "bc"]
    assert pieces_of(tokenizer, "é") == ["▁", "<0xC3>", "<0xA9>"]
    assert tokenizer("abc é")["input_ids"][0] == 1
    assert tokenizer.decode(tokenizer("abc é\n", add_special_tokens=False)["input_ids"]) == "abc é\n"
    bare = load_tokenizer(sentencepiece_gguf(tmp_path / "m.gguf", pieces, add_space_prefix=False))
    assert pieces_of(bare, "abc") == ["abc"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pre": "poro"}, ["tokenizer.ggml.pre 'poro'", "smollm, gpt-2, llama-bpe"]),
        ({"pre": None}, ["tokenizer.ggml.pre 'default'"]),
        ({"model": "t5"}, ["tokenizer.ggml.model 't5'", "gpt2, llama"]),
        ({"merges": ["t h", "zz q"]}, ["its vocabulary is damaged"]),
    ],
)
def test_vocabularies_that_cannot_be_built_are_named(settings, words, tmp_path):
    path = bpe_gguf(tmp_path / "m.gguf", **settings)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_saved_tokenizer_is_the_same_to_sva_and_transformers(tmp_path):
    tiny.make("llama", tmp_path / "old")
    checkpoint = open_checkpoint(tmp_path / "old")
    tokenizer = load_tokenizer(bpe_gguf(tmp_path / "m.gguf", "llama-bpe"))
    tensors = [(name, checkpoint.read(name)) for name in checkpoint.shapes]
    save_checkpoint(tmp_path / "new", checkpoint.config, tensors, tokenizer)
    text = "<|user|>the 123 the's\n é"
    for again in (
        load_tokenizer(tmp_path / "new"),
        transformers.AutoTokenizer.from_pretrained(tmp_path / "new"),
    ):
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.chat_template == TEMPLATE
        assert (again.bos_token_id, again.eos_token_id, again.pad_token_id) == (1, 0, None)
    # a class that transformers 4 knows too
    assert json.loads((tmp_path / "new" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )


def test_a_directorys_own_files_are_used(tmp_path):
    assert load_tokenizer(tmp_path) is None
    plain = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *BYTES])}, []))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    plain.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).eos_token is None
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizerFast", "eos_token": "<|end|>", "chat_template": "old"})
    )
    assert load_tokenizer(tmp_path).eos_token_id == 0
    assert load_tokenizer(tmp_path).chat_template == "old"
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(tmp_path).chat_template == TEMPLATE
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def directory(tmp_path):
    """Writes a SentencePiece-like tokenizer (BOS and a space in front) with settings, and returns its directory."""

    def write(**settings):
        load_tokenizer(sentencepiece_gguf(tmp_path / "m.gguf", ["ab", "▁a", "▁", "a", "b"])).save_pretrained(
            tmp_path / "d"
        )
        path = tmp_path / "d" / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return tmp_path / "d"

    return write


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, None),
        ({"add_bos_token": True, "add_eos_token": False, "add_prefix_space": True, "legacy": True}, None),
        ({"add_bos_token": None, "legacy": None, "do_lower_case": False, "sp_model_kwargs": {}}, None),
        ({"add_bos_token": False}, "add_bos_token is false, but tokenizer.json puts <s> in front of a text"),
        ({"add_eos_token": True}, "add_eos_token is true, but tokenizer.json puts no token behind a text"),
        ({"add_prefix_space": False}, "add_prefix_space is false, but tokenizer.json puts a space in front of a text"),
        ({"legacy": False}, "legacy is false, but tokenizer.json puts a space behind special tokens"),
        ({"do_lower_case": True}, "do_lower_case is true, but tokenizer.json keeps capitals"),
        ({"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces is passed over"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs is passed over"),
    ],
)
def test_a_setting_that_tokenizer_json_does_not_follow_is_said(settings, words, directory, capsys):
    where = directory(**settings)
    capsys.readouterr()
    tokenizer = load_tokenizer(where)
    assert pieces_of(tokenizer, "ab a") == ["▁", "ab", "▁a"]
    assert tokenizer("ab")["input_ids"][0] == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (words is not None)
    if words:
        assert lines[0].startswith(f"sva: {where}: tokenizer_config.json: {words}")


def test_a_byte_level_tokenizer_has_no_false_notes(tmp_path, capsys):
    load_tokenizer(bpe_gguf(tmp_path / "m.gguf", "llama-bpe")).save_pretrained(tmp_path / "d")
    path = tmp_path / "d" / "tokenizer_config.json"
    consistent = {"add_bos_token": True, "add_eos_token": False, "add_prefix_space": False, "legacy": True}
    path.write_text(json.dumps(json.loads(path.read_text()) | consistent))
    load_tokenizer(tmp_path / "d")
    assert capsys.readouterr().err == ""
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "old"}))
    (tmp_path / "d" / "chat_template.jinja").write_text(TEMPLATE)
    assert load_tokenizer(tmp_path / "d").chat_template == TEMPLATE
    assert "chat_template is passed over; chat_template.jinja beside it is followed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"add_space_prefix": False, "remove_extra_whitespaces": False, "add_sep_token": False}, None),
        ({"add_bos_token": True, "padding_token_id": 0xFFFFFFFF}, None),
        ({"add_space_prefix": True}, "add_space_prefix is passed over: a vocabulary of the kind gpt2 puts no space"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is passed over: spaces are kept"),
        ({"add_sep_token": True}, "add_sep_token is passed over: no separator"),
        ({"padding_token_id": 5000}, "padding_token_id is passed over: there are 266 tokens, 5000 is none of them"),
    ],
)
def test_what_a_gguf_file_says_in_vain_is_said(settings, words, tmp_path, capsys):
    path = bpe_gguf(tmp_path / "m.gguf", **settings)
    assert pieces_of(load_tokenizer(path), "the  the") == ["the", "Ġ", "Ġthe"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (words is not None)
    if words:
        assert lines[0].startswith(f"sva: {path}: tokenizer.ggml.{words}")


def test_named_chat_templates_are_read_wherever_they_stand(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*SPECIAL, *BYTES, *WORDS])
    writer.add_token_types([3] * 3 + [1] * (len(BYTES) + len(WORDS)))
    writer.add_token_merges(MERGES)
    writer.add_chat_template([{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "R"}])
    finished(writer, tmp_path / "m.gguf")
    named = {"default": TEMPLATE, "rag": "R"}
    assert load_tokenizer(tmp_path / "m.gguf").chat_template == named
    load_tokenizer(tmp_path / "m.gguf").save_pretrained(tmp_path / "files")
    assert load_tokenizer(tmp_path / "files").chat_template == named
    path = tmp_path / "files" / "tokenizer_config.json"
    for stray in (tmp_path / "files").rglob("*.jinja"):
        stray.unlink()
    settings = json.loads(path.read_text())
    for written in (named, [{"name": name, "template": text} for name, text in named.items()]):
        path.write_text(json.dumps(settings | {"chat_template": written}))
        assert load_tokenizer(tmp_path / "files").chat_template == named
    for broken in ([{"template": "x"}], ["x"], 5, {"default": 5}, [{"name": "default", "template": None}]):
        path.write_text(json.dumps(settings | {"chat_template": broken}))
        with pytest.raises(UserError, match=r"chat_template in tokenizer_config\.json must be a text, or a list"):
            load_tokenizer(tmp_path / "files")


def test_a_byte_order_mark_is_skipped_in_every_file_of_a_tokenizer(directory, capsys):
    where = directory(chat_template=None)
    (where / "chat_template.jinja").write_text("{% for m in messages %}<s>{{ m.content }}\n{% endfor %}")
    plain = load_tokenizer(where)
    (where / "config.json").write_text("{}")
    for path in where.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    marked = load_tokenizer(where)
    turns = [{"role": "user", "content": "ab a"}]
    assert marked.chat_template == plain.chat_template
    assert marked.apply_chat_template(turns)["input_ids"] == plain.apply_chat_template(turns)["input_ids"]
    (where / "tokenizer_config.json").write_text("{}", encoding="utf-16")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is not UTF-8 \(byte 1\)"):
        load_tokenizer(where)
    assert capsys.readouterr().err == ""


def test_tokenizers_need_no_torch_and_print_nothing(tmp_path):
    path = bpe_gguf(tmp_path / "m.gguf")
    tokenizer = load_tokenizer(path)
    tokenizer.save_pretrained(tmp_path / "directory")
    expected = tokenizer("the 12")["input_ids"]
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from sva.models.tokenizer import load_tokenizer\n"
        f"for p in ({str(path)!r}, {str(tmp_path / 'directory')!r}): print(load_tokenizer(p)('the 12')['input_ids'])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == [str(expected)] * 2, done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("model", "digest"),
    [
        (tiny.smollm2, LLAMA_CPP_GSM8K),
        # 262,144 tokens by SentencePiece's merges, byte fallback, runs of spaces and newlines as tokens
        (tiny.gemma3, "5ca9e15321d69b0ad2f205806dd9dfc1894b38d221475eab4eab1e77b1fce3cd"),
    ],
)
def test_token_ids_of_packaged_models_are_llama_cpps_on_gsm8k(model, digest):
    folder = data_dir()
    if folder is None or not (folder / "gsm8k_test.jsonl.gz").is_file():
        pytest.skip("gsm8k_test.jsonl.gz is not in $SVA_DATA nor in ../shared/data")
    tokenizer = load_tokenizer(model())
    with gzip.open(folder / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["question"] for line in lines]
    assert len(texts) == 1319
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    written = "".join(" ".join(map(str, row)) + "\n" for row in rows)
    assert hashlib.sha256(written.encode()).hexdigest() == digest


# llama.cpp's ids of texts with what GSM8K has little of.
GEMMA3_IDS = {
    "a  b   c": "2 236746 138 236763 139 236755",
    "\n\n\nx": "2 109 236781",
    "x\ty": "2 236781 255968 236762",
    "\u2177 \xe9 \u6f22\u5b57 \U0001f642\U0001f469\u200d\U0001f469\u200d\U0001f467": (
        "2 464 371 421 1559 236743 201637 57235 243767 237243 243767 237243 244814"
    ),
    " lead": "2 2080",
    "trail ": "2 144938 236743",
    "aaaaaaa    aaaa": "2 50354 72004 140 50354",
    "\xa0nbsp": "2 432 398 11539",
    "1234567890.50%": (
        "2 236770 236778 236800 236812 236810 236825 236832 236828 236819 236771 236761 236810 236771 236908"
    ),
    "\x01\x7f": "2 249732 251541",
    "\u017f \ufb01 \xc5": "2 238071 97940 44667",
    "def f(x):\n    return x  # ok\n\n\n\n        pass": (
        "2 2063 517 236769 236781 1473 107 140 2060 1123 138 236865 7546 110 144 4373"
    ),
    "zzzzzzzzzzzzzz": "2 9961 9961 9961 9961 9961 9961 9961",
    "hahahahahahahaha banananana": "2 89009 168508 168508 118653 8418 17822 1925",
}


def test_gemma3_cuts_odd_texts_as_llama_cpp_does():
    tokenizer = load_tokenizer(tiny.gemma3())
    assert {text: " ".join(map(str, tokenizer(text)["input_ids"])) for text in GEMMA3_IDS} == GEMMA3_IDS
    for text in GEMMA3_IDS:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
