import chex
import jax
import numpy as np
import pytest

from sva.evaluation import evaluate, likelihood, option_rows
from sva.evaluation.option_rows import Batch
from sva.generation.decompose import decompose
from sva.generation.merge import merge, with_z
from sva.generation.testing import COLOURS, THINGS, NameAColour, toy_lm
from sva.tasks.base import Options
from sva.utils.errors import UserError

PROMPTS = ["the colour of the apple", "what is the name ?", "red", "the thing of the house is the colour of"]
OPTIONS = [
    [" red", " green blue", " green blue boat", " the door of the house", " green blue"],
    [" kite", " lamp lamp"],
    [" green thing", " green", " green house door"],
    [" what", " name", " what name", " question ?"],
]


@pytest.fixture(scope="module")
def spectra(toy):
    return decompose(toy, "mlp", progress=False)


def _zs(spectra, count):
    rng = np.random.default_rng(0)
    return {name: rng.uniform(0.5, 1.5, (count, len(x.s))).astype(np.float32) for name, x in spectra.items()}


def _one_at_a_time(lm, prompt, text):
    """Log-probability of one option, of the whole text in one pass."""
    head = lm.tokenizer(prompt)["input_ids"]
    row = [*head, *lm.tokenizer(text)["input_ids"]]
    ids, mask = np.zeros((2, 1, 32), np.int32)
    ids[0, : len(row)], mask[0, : len(row)] = row, 1
    logps = np.asarray(jax.nn.log_softmax(lm.logits(ids, mask)[0], axis=-1))
    return sum(logps[place - 1, row[place]] for place in range(len(head), len(row)))


def _expected(lm, prompts=PROMPTS, options=OPTIONS):
    return [
        [_one_at_a_time(lm, prompt, text) for text in texts] for prompt, texts in zip(prompts, options, strict=True)
    ]


def _close(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("scan", [False, True])
def test_options_side_by_side_score_as_each_alone(scan):
    lm = toy_lm(scan_layers=scan)
    _close(likelihood.option_logprobs(lm, PROMPTS, OPTIONS), _expected(lm))


def test_options_score_as_each_alone_where_layers_have_windows(tmp_path):
    tiny = pytest.importorskip("tiny", reason="the checkpoint needs torch: requirements-torch.txt")
    from sva.generation.load import load
    from sva.generation.testing import tokenizer

    tiny.make("mistral", tmp_path / "model")  # a window of 6 tokens
    tokenizer().save_pretrained(tmp_path / "model")
    lm = load(str(tmp_path / "model"), progress=False)
    _close(likelihood.option_logprobs(lm, PROMPTS, OPTIONS), _expected(lm))


def test_one_z_scores_as_the_merged_model(toy, spectra):
    z = {name: x[0] for name, x in _zs(spectra, 1).items()}
    expected = _expected(merge(toy, spectra, z))
    _close(likelihood.option_logprobs(toy, PROMPTS, OPTIONS, z=z), expected)
    _close(likelihood.option_logprobs(with_z(toy, spectra, z), PROMPTS, OPTIONS), expected)


def test_every_prompt_scores_on_a_z_of_its_own(toy, spectra):
    zs = _zs(spectra, len(PROMPTS))
    expected = []
    for place in range(len(PROMPTS)):
        lm = merge(toy, spectra, {name: x[place] for name, x in zs.items()})
        expected += _expected(lm, PROMPTS[place : place + 1], OPTIONS[place : place + 1])
    _close(likelihood.option_logprobs(toy, PROMPTS, OPTIONS, z=zs), expected)
    with pytest.raises(UserError):
        likelihood.option_logprobs(toy, PROMPTS[:2], OPTIONS[:2], z=zs)


def test_tokens_are_scored_right_where_chunks_do_not_divide_the_states(toy):
    ids = np.random.default_rng(0).integers(0, 32, (2, 77))
    trees = [option_rows.tree(row[:1].tolist(), [row[1:].tolist()]) for row in ids]
    rows = option_rows.option_rows(Batch(80, [[0], [1]]), trees)
    assert len(rows.states) == 160 > rows.count > likelihood._STATES
    nats, likeliest = likelihood.target_logprobs(toy.model, toy.params, rows)
    logps = np.asarray(jax.nn.log_softmax(toy.logits(ids, np.ones_like(ids))[:, :-1], axis=-1))
    expected = np.take_along_axis(logps, ids[:, 1:, None], axis=-1).ravel()
    np.testing.assert_allclose(nats[: expected.size], expected, atol=1e-4)
    np.testing.assert_array_equal(likeliest[: expected.size], expected == logps.max(axis=-1).ravel())


def test_other_questions_in_the_same_bucket_meet_the_same_program(toy, compilations):
    @chex.assert_max_traces(n=1)
    def traced(*args):
        return likelihood.target_logprobs.__wrapped__(*args)

    program = jax.jit(traced, static_argnums=0)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(3):
        prompts = [" ".join(rng.choice(THINGS, rng.integers(2, 26))) for _ in range(12)]
        options = [[" " + " ".join(rng.choice(COLOURS, rng.integers(1, 5))) for _ in range(4)] for _ in prompts]
        trees = [option_rows.tree(*likelihood.followed(toy, *each)) for each in zip(prompts, options, strict=True)]
        (batch,) = option_rows.batches([len(each.ids) for each in trees], 2048, alone=False)
        rows = option_rows.option_rows(batch, trees)
        program(toy.model, toy.params, rows, None)
        seen.add((len(batch.rows), int(rows.count)))
        _close(likelihood.option_logprobs(toy, prompts, options), _expected(toy, prompts, options))
    assert len(seen) > 1  # the amounts in the batches differ
    assert compilations.count("target_logprobs") <= 1


def test_a_tree_reads_what_options_share_once():
    tree = option_rows.tree([1, 2], [[5, 6, 7], [5, 6, 8, 9], [4], [5, 6, 7]])
    assert tree.ids == [1, 2, 5, 6, 8]  # 7, 9 and 4 are predicted and never read
    assert tree.depths == [0, 1, 2, 3, 4]
    assert tree.ends == [5] * 5
    assert tree.sources == [1, 2, 3, 1, 2, 3, 4, 1, 1, 2, 3]
    assert tree.targets == [5, 6, 7, 5, 6, 8, 9, 4, 5, 6, 7]
    assert tree.counts == [3, 4, 1, 3]


def test_a_subtree_ends_before_the_next_option():
    tree = option_rows.tree([1], [[3, 3, 0], [2, 9, 0], [2, 8, 8, 0]])
    assert tree.ids == [1, 2, 8, 8, 9, 3, 3]
    assert tree.ends == [7, 5, 4, 4, 5, 7, 7]


def test_small_trees_fill_the_rows_that_large_ones_need():
    assert option_rows.fill([100, 30, 28, 130, 90]) == {256: [[3, 0]], 128: [[4, 1], [2]]}
    assert option_rows.fill([128, 129, 1000]) == {1024: [[2]], 256: [[1]], 128: [[0]]}


def test_batches_hold_every_tree_once_within_the_tokens():
    sizes = np.random.default_rng(0).integers(5, 400, 300).tolist()
    for alone in (False, True):
        found = option_rows.batches(sizes, 2048, alone=alone)
        assert sorted(i for batch in found for row in batch.rows for i in row) == list(range(300))
        for length, rows in found:
            assert len(rows) * length <= 2048
            assert all(sum(sizes[i] for i in row) <= length for row in rows)
            assert not alone or all(len(row) == 1 for row in rows)
    assert option_rows.batches([5000], 2048, alone=False) == [Batch(8192, [[0]])]


class _Choosing(NameAColour):
    """The colours as options, the first one right."""

    def options(self, example):
        return Options(self.question(example), tuple(f" {colour}" for colour in COLOURS), COLOURS, 0)


def test_records_hold_the_scores_and_do_not_depend_on_the_batch(toy):
    todo = evaluate.items(_Choosing(), "test", 9)
    answer, size = evaluate.choosing(toy, 2)
    assert size == 8
    together, alone = answer(todo), [record for item in todo for record in answer([item])]
    _close([record.scores for record in together], [record.scores for record in alone])
    for one, other in zip(together, alone, strict=True):
        chosen = evaluate.likeliest(one.scores, [len(colour) + 1 for colour in COLOURS])
        assert one.answer == other.answer == COLOURS[chosen]
        assert one.correct == (chosen == 0)
