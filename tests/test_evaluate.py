import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import spoken
from test_tokenizer import sentencepiece_gguf
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import sva.tasks
from sva.cli import evaluate as evaluate_command
from sva.cli.main import main
from sva.evaluation import evaluate, likelihood
from sva.evaluation.evaluate import Item
from sva.generation import chat, stop_strings
from sva.generation.testing import THINGS, NameAColour, tokenizer, toy_lm
from sva.models.tokenizer import load_tokenizer
from sva.tasks.base import Grade, reason
from sva.utils.errors import UserError
from sva.utils.jsonl import read_records, resumed


def test_records_are_the_greedy_answers_in_order_graded_by_their_own_task(toy):
    task, terse = NameAColour(), NameAColour(name="terse", max_new_tokens=2)
    source = task.source("test")
    todo = [Item(task if i % 2 else terse, source[i]) for i in range(5)]
    records = evaluate.evaluate(toy, todo, batch_size=2, progress=False)
    assert [record.task for record in records] == ["terse", "name_a_colour"] * 2 + ["terse"]
    assert [record.question for record in records] == [item.question for item in todo]
    for item, record in zip(todo, records, strict=True):
        ids, mask = chat.encode(toy, [chat.render(toy, item.question)])
        out = toy.generate(ids, mask, 4, [1])
        assert record.completion == chat.decode(toy, out.tokens, out.lengths)[0]
        assert record.tokens == int(out.lengths[0])
        assert (record.correct, record.answer) == task.grade(record.completion, item.example)[:2]


def test_rows_that_are_refilled_answer_as_rows_that_wait_do():
    lm = toy_lm(9)  # one whose answers end, at different lengths
    todo = evaluate.items(NameAColour(), "test", 7)
    waiting = evaluate.by_generation(lm, 24)(todo)
    assert evaluate.by_refilling(lm, 24, 2, progress=False)(todo) == waiting
    assert len({record.tokens for record in waiting}) > 3


def test_only_long_answers_are_refilled_in_batches_of_many_rows(toy):
    assert [evaluate.greedy(toy, budget, 2)[1] for budget in (8, 64)] == [2, 32]


def test_the_budget_may_be_given(toy):
    (record,) = evaluate.evaluate(toy, evaluate.items(NameAColour(), "test", 1), max_new_tokens=1, progress=False)
    assert record.tokens == 1


def test_items_are_the_first_of_a_split():
    task = NameAColour()
    assert [item.example for item in evaluate.items(task, "validation", 3)] == task.source("validation")[:3]
    assert len(evaluate.items(task, "test", 10**6)) == len(task.source("test"))


def test_the_toy_task_keeps_its_splits_apart_and_grades_by_the_first_word():
    task = NameAColour()
    rows = [{tuple(row.values()) for row in task.source(split)} for split in ("train", "validation", "test")]
    assert sum(map(len, rows)) == len(set.union(*rows)) == 144
    verdicts = [task.grade(text, {}).correct for text in ("red", " Red", "green thing", "the red", "", "redder")]
    np.testing.assert_array_equal(verdicts, [True, False, True, False, False, False])


def test_records_are_kept_and_made_again_only_for_other_items(toy, tmp_path):
    todo, made = evaluate.items(NameAColour(), "test", 3), []

    def answers(items):
        made.append(len(items))
        return evaluate.evaluate(toy, items, progress=False)

    path = tmp_path / "deep" / "base.jsonl"
    first = evaluate.kept(path, todo, lambda: answers(todo))
    assert evaluate.kept(path, todo, lambda: answers(todo)) == first
    assert made == [3]
    assert evaluate.kept_before(path, todo) == first
    assert evaluate.kept_before(path, todo[:2]) is evaluate.kept_before(tmp_path / "none.jsonl", todo) is None
    assert len(evaluate.kept(path, todo[:2], lambda: answers(todo[:2]))) == 2
    assert made == [3, 2]


def settings(**changes):
    return {"task": "name_a_colour", "n": 5, **changes}


def interrupted(answer, after):
    """`answer`, which is stopped after so many batches, as by a signal."""
    calls = iter(range(after))

    def maybe(batch):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return answer(batch)

    return maybe


def test_a_stopped_evaluation_ends_with_the_file_of_an_unstopped_one(toy, tmp_path):
    todo = evaluate.items(NameAColour(), "test", 5)
    answer = evaluate.by_generation(toy, 4)
    with resumed(tmp_path / "whole.jsonl", settings(), {}) as file:
        whole = evaluate.recorded(file, todo, answer, batch_size=2)
    path = tmp_path / "stopped.jsonl"
    for done in (1, 0):
        with pytest.raises(KeyboardInterrupt), resumed(path, settings(), {}) as file:
            evaluate.recorded(file, todo, interrupted(answer, done), batch_size=2)
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:3]) + lines[1][:20])  # and cut off within a line
    with resumed(path, settings(), {}) as file:
        assert [record["index"] for record in file.records] == [0, 1]
        assert evaluate.recorded(file, todo, answer, batch_size=2) == whole
    assert path.read_text() == (tmp_path / "whole.jsonl").read_text()
    first = whole[0]
    assert first["prompt"] == chat.render(toy, todo[0].question)
    assert first["reason"] == ("right" if first["correct"] else "wrong")
    assert set(first) == {"index", *evaluate.Record._fields}


def test_records_of_another_run_are_refused_with_what_differs(tmp_path):
    path = tmp_path / "a.jsonl"
    with resumed(path, settings(), {}):
        pass
    other = resumed(path, settings(n=6), {})
    with pytest.raises(UserError, match=r"a.jsonl was begun with other settings \(n: 5 there, 6 asked for\)"), other:
        pass
    again, busy = resumed(path, settings(), {}), pytest.raises(UserError, match="another process writes")
    with resumed(path, settings(), {}), busy, again:
        pass


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no records at"),
        ('{"x": 1}\n', "has no settings in its first line"),
        ("[1]\n", "has no settings in its first line"),
        ('{"settings": {}}\n{"index": 0\n{"index": 1}\n', "line 2 is not JSON"),
    ],
)
def test_a_file_that_is_no_evaluations_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_records(path)


def test_what_follows_a_stop_text_is_no_part_of_an_answer():
    assert stop_strings.cut("red Instruction: name", ("Instruction:", "Response")) == "red "
    assert stop_strings.cut("red Response Instruction:", ("Instruction:", "Response")) == "red "
    assert stop_strings.cut("red", ("Instruction:",)) == "red"
    item = Item(NameAColour(stop=("!",)), {"thing": "a", "of": "b"})
    (record,) = evaluate.grade([item], ["red ! green"], [3])
    assert (record.completion, record.correct, record.reason) == ("red ", True, "right")


def test_each_answer_ends_at_its_own_tasks_stops_special_tokens_too():
    tokenizer = spoken.byte_level()
    lm = spoken.saying(tokenizer, "r", "e", "d", "<turn>", "Ċ", "Q", "!", "<end>", ends=(tokenizer.eos_token_id,))
    wanted = {(): ("red\nQ!", 8), ("<turn>",): ("red", 4), ("Q", "!"): ("red\n", 6), ("Q", "<turn>"): ("red", 4)}
    todo = [Item(NameAColour(stop=stop), {"thing": "a", "of": "b"}) for stop in wanted]
    for answer in (evaluate.by_generation(lm, 24), evaluate.by_refilling(lm, 24, 2, progress=False)):
        for batch in (todo, *([item] for item in todo)):
            for item, record in zip(batch, answer(batch), strict=True):
                assert (record.completion, record.tokens) == wanted[item.task.stop]


def test_reasons_name_what_a_verdict_cannot():
    assert [reason(grade) for grade in (Grade(True, "1"), Grade(False, "2"), Grade(False, None))] == [
        "right",
        "wrong",
        "no answer",
    ]
    assert reason(Grade(False, "x", "unreadable")) == "unreadable"
    verdicts = [(True, "right"), (False, "no answer")]
    rows = [{"task": "t", "correct": right, "reason": why, "scores": []} for right, why in verdicts]
    assert evaluate_command.scores(rows)["reasons"] == {"right": 1, "no answer": 1}


def test_option_scores_are_sums_of_token_log_probabilities(toy):
    prompts = ["the colour of the apple", "what is the name ?"]
    options = [[" red", " green blue", " the door of the house"], [" kite", " lamp lamp"]]
    scored = likelihood.option_logprobs(toy, prompts, options)
    for prompt, texts, nats in zip(prompts, options, scored, strict=True):
        start = len(toy.tokenizer(prompt)["input_ids"])
        for text, value in zip(texts, nats, strict=True):
            ids = np.asarray([toy.tokenizer(prompt + text)["input_ids"]])
            logits = np.asarray(toy.logits(ids, np.ones_like(ids)), np.float64)[0]
            logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            by_hand = sum(logps[t - 1, ids[0, t]] for t in range(start, ids.shape[1]))
            np.testing.assert_allclose(value, by_hand, atol=1e-4)


def test_a_tokenizer_that_adds_an_end_token_moves_no_option_score(toy):
    own = tokenizer()
    own.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <end>", special_tokens=[("<pad>", 0), ("<end>", 1)]
    )
    lm = dataclasses.replace(toy, tokenizer=own)
    red, green = 5, 6
    logits = np.asarray(toy.logits([[0, red, green]], [[1, 1, 1]]), np.float64)[0]
    logps = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    scored = likelihood.option_logprobs(lm, ["red"], [[" green", " red"]])
    np.testing.assert_allclose(scored, [(logps[1, green], logps[1, red])], atol=1e-4)


def test_an_option_that_would_join_the_prompts_last_token_is_scored_whole_behind_it(toy):
    vocabulary = {token: i for i, token in enumerate(["z", "q", "zq", "x", "\n"])}
    own = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [("z", "q")])))
    lm = dataclasses.replace(toy, tokenizer=own)
    assert own("xzq")["input_ids"] == [3, 2]
    assert likelihood.followed(lm, "xz", ["q", "x", "zq"]) == ([3, 0], [[1], [3], [2]])


def test_a_word_behind_a_joined_border_gets_no_space_of_its_own(toy, tmp_path):
    own = load_tokenizer(sentencepiece_gguf(tmp_path / "m.gguf", ["▁a", "ab", "▁", "a", "b", "<nl>"]))
    lm = dataclasses.replace(toy, tokenizer=own)
    lm = dataclasses.replace(lm, model=toy.model.clone(cfg=dataclasses.replace(toy.model.cfg, vocab_size=len(own))))
    head, (tail, other) = likelihood.followed(lm, "b ", ["a", "b"])
    assert own.convert_ids_to_tokens(head) == ["<s>", "▁", "b", "▁"]
    assert (own.convert_ids_to_tokens(tail), own.convert_ids_to_tokens(other)) == (["a"], ["b"])


@pytest.mark.parametrize(
    ("prompt", "option", "words"), [("red", "", "the option ''"), ("", "red", "the prompt before")]
)
def test_an_option_without_a_token_or_with_nothing_before_it_is_refused(prompt, option, words, toy):
    with pytest.raises(UserError, match=f"{words}.* has no token"):
        likelihood.option_logprobs(toy, [prompt], [[option]])


def test_the_likeliest_option_is_the_highest_sum_or_the_highest_per_character():
    assert evaluate.likeliest([-2.0, -3.0, -2.0]) == 0
    assert evaluate.likeliest([-2.0, -3.0], [1, 6]) == 1


def run(arguments, capsys):
    assert main(["evaluate", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def checkpoint(toy, tmp_path, monkeypatch):
    """The toy model on disk, and a task file about it."""
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)
    monkeypatch.chdir(tmp_path)
    toy.save(tmp_path / "model")
    rows = [{"prompt": f"what colour the {a} of the {b} ?", "answer": "red"} for a in THINGS for b in THINGS]
    (tmp_path / "red.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["red.jsonl", "--model", tmp_path / "model", "--json", "--max-new-tokens", 2]


def _rows(result):
    return read_records(Path(result["records"]))[1]


def test_the_command_writes_records_and_a_second_run_only_reads_them(checkpoint, capsys, monkeypatch):
    first = run(checkpoint, capsys)
    rows = _rows(first)
    assert len(rows) == first["n"] == len(sva.tasks.task("red.jsonl").source("test"))
    assert first["accuracy"]["mean"] == sum(row["correct"] for row in rows) / len(rows)
    monkeypatch.setattr("sva.evaluation.evaluate.grade", None)
    assert run(checkpoint, capsys) == first


def test_two_evaluations_are_compared_item_by_item(checkpoint, capsys):
    first = run([*checkpoint, "--out", "a.jsonl"], capsys)
    second = run([*checkpoint, "--out", "b.jsonl", "--shots", 1], capsys)
    result = run(["--compare", "a.jsonl", "b.jsonl", "--json"], capsys)
    assert result["n"] == first["n"]
    assert result["b_minus_a"]["mean"] == pytest.approx(second["accuracy"]["mean"] - first["accuracy"]["mean"])
    run([*checkpoint, "--out", "c.jsonl", "--split", "train", "--size", 3], capsys)
    assert main(["evaluate", "--compare", "a.jsonl", "c.jsonl"]) == 2
    assert "cannot be compared: question 0 is another" in capsys.readouterr().err


@pytest.fixture
def experts(checkpoint, toy):
    """Files of two experts and of a classification expert of theirs, and tasks whose labels they have."""
    spectra = sva.decompose(toy, "mlp", progress=False)
    labels = {"colour": "a colour", "thing": "a thing", "other": "anything else"}
    known = {"fingerprint": toy.fingerprint, "base": "toy"}
    for seed, name in enumerate(("colour", "thing", "judge")):
        rng = np.random.default_rng(seed)
        raw = {weight: rng.uniform(0.3, 1.7, len(x.s)).astype(np.float32) for weight, x in spectra.items()}
        own = {"labels": labels} if name == "judge" else {"label": name, "description": labels[name]}
        own |= {"task": f"{name}.py"}
        sva.Expert(raw, "linear", known | own).save(f"{name}.safetensors")
        sva.Expert(raw, "linear", {"fingerprint": "0" * 64, "base": "elsewhere", **own}).save(
            f"foreign-{name}.safetensors"
        )
        text = f"from sva.generation.testing import NameAColour\nTASK = NameAColour(name={name!r}, label={name!r})\n"
        Path(f"{name}.py").write_text(text)
    model = checkpoint[1:]
    files = ["--expert", "colour.safetensors", "--expert", "thing.safetensors"]
    return ["colour.py", "thing.py", *files, "--size", 3, *model]


def test_two_passes_over_mixed_tasks_record_what_was_chosen_and_what_it_took(experts, capsys):
    result = run(experts, capsys)
    assert (result["n"], result["task"], result["dispatch"]) == (6, "colour.py+thing.py", "prompt")
    rows = _rows(result)
    assert [row["task"] for row in rows] == ["colour", "thing"] * 3
    assert [row["right_label"] for row in rows] == ["colour", "thing"] * 3
    found = result["first_pass"]
    hits = [row["label"] == row["right_label"] for row in rows]
    assert found["right_label"]["mean"] == np.mean(hits)
    assert np.sum(found["confusion"]) == 6
    assert set(result["by_task"]) == {"colour", "thing"}
    for name in ("first", "second"):
        assert found["cost"][name]["flops"] == pytest.approx(sum(row[name]["flops"] for row in rows))
    assert 0 < found["cost"]["share_of_first"]["seconds"] < 1
    assert run(experts, capsys)["first_pass"] == found  # as recorded: nothing ran again
    oracle = run([*experts, "--dispatch", "oracle"], capsys)
    assert oracle["first_pass"]["right_label"]["mean"] == 1
    assert oracle["first_pass"]["cost"]["share_of_first"]["flops"] == 0
    compared = run(["--compare", result["records"], oracle["records"], "--json"], capsys)
    assert compared["n"] == 6
    plain = [argument for argument in experts if argument != "--json"]
    assert main(["evaluate", *map(str, plain), "--dispatch", "fixed:thing"]) == 0
    assert "sent to the right expert: 50.0 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (["--dispatch", "embedding"], "embedding"),
        (["--classifier", "judge.safetensors"], "classifier"),
        (["--dispatch", "uniform"], "uniform"),
        (["--choice", "0.99"], "prompt"),
    ],
)
def test_the_dispatcher_is_the_one_asked_for(experts, changes, wanted, capsys):
    result = run([*experts, *changes], capsys)
    assert result["dispatch"] == wanted
    assert result["choice"] == {"uniform": "soft", "prompt": "0.99"}.get(wanted, "hard")
    assert len(_rows(result)) == 6


def test_experts_of_another_base_are_all_named_and_left_out_only_if_asked(experts, capsys):
    foreign = ["--expert", "foreign-colour.safetensors", "--expert", "foreign-thing.safetensors"]
    assert main(["evaluate", *map(str, [*experts, *foreign])]) == 2
    told = capsys.readouterr().err
    assert "2 of 4 experts were not trained on" in told
    assert "foreign-colour.safetensors (elsewhere), foreign-thing.safetensors (elsewhere)" in told
    assert "--skip-foreign" in told
    assert run([*experts, *foreign, "--skip-foreign"], capsys)["experts"] == run(experts, capsys)["experts"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "name a task to evaluate"),
        (["red.jsonl", "--compare", "a", "b"], "name a task to evaluate"),
        (["--compare", "a.jsonl", "b.jsonl"], "no records at a.jsonl"),
        (["red.jsonl", "--by", "likelihood"], "has no options to score"),
        (["red.jsonl", "--grader", "reference"], "the public code has no such task"),
        (["red.jsonl", "--splits", "dirty"], "no splits 'dirty'; there is clean and reference"),
        (["red.jsonl", "--shots", "-1"], "shots = -1 must be at least 0"),
        (["red.jsonl", "--batch-size", "0"], "--batch-size=0 must be at least 1"),
        (["red.jsonl", "--classifier", "c.safetensors"], "name them with --expert"),
        (["red.jsonl", "--expert", "a", "--expert", "b", "--by", "likelihood"], "two passes generate their answers"),
        (["red.jsonl", "--dispatch", "prompt"], "--dispatch chooses between experts"),
        (["red.jsonl", "--expert", "a", "--dispatch", "guess"], "no dispatcher 'guess'; there is prompt"),
        (["red.jsonl", "--expert", "a", "--choice", "soft"], "--choice is between experts"),
        (["red.jsonl", "--expert", "a", "--expert", "b", "--choice", "sofd"], "--choice sofd is not known"),
    ],
)
def test_a_users_mistake_is_said_before_a_model_is_loaded(checkpoint, arguments, words, capsys):
    assert main(["evaluate", *arguments]) == 2
    assert words in capsys.readouterr().err
