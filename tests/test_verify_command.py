import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from sva.cli.main import main
from sva.evaluation import verify
from sva.generation.testing import VOCABULARY, tokenizer
from sva.interop.transformers_run import Run, Text

TEXTS = (
    Text("chat", ("what colour is the apple ?",)),
    Text("prose", ("the name of the island",)),
    Text("code", ("red red green",)),
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny random checkpoint with the toy tokenizer."""
    directory = tmp_path_factory.mktemp("verify") / "model"
    tiny.make("llama", directory, vocab_size=len(VOCABULARY))
    tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def few(monkeypatch):
    """Few texts and short answers, and no cache but the tests'."""
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)
    monkeypatch.setattr(verify, "texts", lambda: list(TEXTS))
    monkeypatch.setattr(verify, "NEW_TOKENS", 8)


def test_a_checkpoint_that_both_read_alike_is_equal(checkpoint, few, capsys):
    assert main(["verify", str(checkpoint), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["equal"]
    assert [part["name"] for part in result["parts"]] == ["weights", "token ids", "logits", "answers"]
    assert all(not part["differing"] for part in result["parts"])
    assert result["parts"][0]["summary"] == "30 of 30 equal, bit for bit"


def test_a_file_of_ones_own_is_compared_in_bfloat16(checkpoint, few, tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "red"}\n{"prompt": "the boat of the island"}\n')
    assert main(["verify", str(checkpoint), "--file", str(file), "--dtype", "bfloat16"]) == 0
    assert "those of 2 of 2 texts equal" in capsys.readouterr().out


def test_an_altered_weight_is_named(checkpoint, few, monkeypatch, capsys):
    from sva.generation import load as loading

    real = loading.load_params
    name = "model.layers.1.mlp.up_proj.weight"

    def altered(*args, **settings):
        params, known = real(*args, **settings)
        weight = params["layers_1"]["mlp"]["up_proj"]["weight"]
        params["layers_1"]["mlp"]["up_proj"]["weight"] = jnp.asarray(weight).at[3].multiply(-1.0)
        return params, known

    monkeypatch.setattr(loading, "load_params", altered)
    assert main(["verify", str(checkpoint)]) == 1
    shown = capsys.readouterr().out
    assert f"weights    DIFFERS  29 of 30 equal, bit for bit\n    {name}\n" in shown
    assert "token ids  equal" in shown
    assert "logits     DIFFERS" in shown
    assert shown.splitlines()[-1].startswith("different from transformers: weights, logits")


def test_another_tokenizer_is_said_with_the_first_token_that_differs(checkpoint, few, monkeypatch, capsys):
    from sva.generation import chat

    real = chat.tokenize
    monkeypatch.setattr(chat, "tokenize", lambda lm, rows: [[0, *row] for row in real(lm, rows)])
    assert main(["verify", str(checkpoint)]) == 1
    shown = capsys.readouterr().out
    assert "text 2 (prose): token 0 is [0] here, [" in shown
    assert shown.splitlines()[-1] == "different from transformers: token ids"


def test_without_torch_one_line_says_what_to_install(checkpoint, few, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["verify", str(checkpoint)]) == 2
    shown = capsys.readouterr().err
    assert len(shown.splitlines()) == 1
    assert "pip install torch" in shown


@pytest.mark.parametrize(
    ("text", "words"), [("", "holds no text"), ('{"prompt": 3}\n', 'line 1 has no "prompt"'), (None, "cannot be read")]
)
def test_a_file_without_texts_is_refused(text, words, checkpoint, few, tmp_path, capsys):
    file = tmp_path / "own.jsonl"
    if text is not None:
        file.write_text(text)
    assert main(["verify", str(checkpoint), "--file", str(file)]) == 2
    assert words in capsys.readouterr().err


def test_a_gguf_file_is_refused(tmp_path, few, capsys):
    tiny.write_gguf(tiny.make("llama", tmp_path / "model"), tmp_path / "m.gguf")
    assert main(["verify", str(tmp_path / "m.gguf")]) == 2
    assert "name a Hugging Face directory" in capsys.readouterr().err


def test_the_built_in_texts_are_fifty_of_many_kinds():
    texts = verify.texts()
    assert len(texts) == 50
    assert len({text.kind for text in texts}) >= 8
    assert sum(text.is_chat for text in texts) >= 10


def _answers(ours, theirs, margins):
    runs = (Run({}, [[]], [np.ones((1, 2))], np.array([tokens])) for tokens in (ours, theirs))
    return verify.compare([Text("prose", ("a",))], *runs, np.array([margins]), verify.TOLERANCES["float32"])[-1]


def test_answers_may_part_from_the_first_step_on_whose_margin_is_small():
    assert _answers([1, 2, 3], [1, 2, 3], [5.0, 5.0, 5.0]) == _answers([1, 2, 3], [1, 2, 3], [5.0, 5.0, 0.0])
    far = _answers([1, 2, 3], [1, 9, 3], [5.0, 5.0, 0.0])
    assert (far.equal, far.differing) == (False, ["text 1 (prose): step 1 is token 2 here, 9 there, margin 5"])
    for margins in ([5.0, 5e-4, 5.0], [5e-4, 5.0, 5.0]):
        near = _answers([1, 2, 3], [1, 9, 8], margins)
        assert near.equal
        assert len(near.near) == 1


def test_logits_may_be_far_off_at_few_tokens_and_never_a_little_at_most():
    asked, theirs = [Text("prose", ("a",))], np.full((9, 2), 20.0)
    scattered, everywhere = theirs.copy(), theirs + 1e-3
    scattered[4] += 1.5e-3

    def part(logits):
        ours, other = (Run({}, [[]], [x], np.array([[1]])) for x in (logits, theirs))
        return verify.compare(asked, ours, other, np.ones((1, 1)), verify.TOLERANCES["float32"])[2]

    assert part(scattered).equal
    assert part(everywhere).differing == ["text 1 (prose): by 0.001 at token 0, by 0.001 at half of its tokens"]
    assert not part(theirs + np.array([np.nan, 0])).equal
    scattered[4] += 1e-3
    assert part(scattered).differing == ["text 1 (prose): by 0.0025 at token 4, by 0 at half of its tokens"]
