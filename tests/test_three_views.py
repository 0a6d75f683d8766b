"""Macro view, micro view and self-adaptation in one table (`experiments.paper.three_views`), at toy size.

What needs everything trained takes a minute or two and is marked slow.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.paper import page
from experiments.paper.records import read
from experiments.paper.three_views import __main__ as command
from experiments.paper.three_views import measure, picture, table
from experiments.paper.three_views.sizes import SMOL, TOY, in_turn
from experiments.paper.three_views.trained import ALL, Cell, Shop, chosen_rate
from experiments.paper.three_views.views import VIEWS
from sva.utils.errors import UserError
from sva.utils.files import read_json, write_json

ONE_SEED = dataclasses.replace(TOY, seeds=(0,))


@pytest.fixture(scope="module")
def shop(toy, tmp_path_factory):
    """Everything of one seed, trained and measured in this process."""
    del toy  # for its cache directory
    directory = tmp_path_factory.mktemp("three_views")
    made = Shop(ONE_SEED, directory, directory / "weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "in_a_process", measure.measure)
        assert not command.run(made, minutes=1e-6)
        assert command.run(made)
    return made


@pytest.fixture(scope="module")
def data(shop):
    text = table.make(shop, shop.results.parent)
    assert "Three views: right answers" in text
    return json.loads((shop.results.parent / "three_views.json").read_text())


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(shop):
    assert [part.name for part in command.parts(shop) if not part.is_done] == []


@pytest.mark.slow
def test_a_view_without_a_record_is_measured_anew_and_lost_weights_are_trained_anew(shop, monkeypatch):
    lost = Cell("full", TOY.tasks[1], chosen_rate(shop, "full"), 0)
    kept, away = measure.path_of(shop, "macro", 0), shop.weights / "away"
    kept.rename(away)
    assert [part.name for part in command.parts(shop) if not part.is_done] == ["macro-seed0.json"]
    monkeypatch.setattr(Shop, "place", lambda self, cell: away / "nowhere" if cell == lost else self.weights)
    assert [part.name for part in command.parts(shop) if not part.is_done] == [lost.name, "macro-seed0.json"]
    away.rename(kept)


@pytest.mark.slow
def test_all_methods_see_the_same_prompts_as_often(shop):
    cells = [read_json(path) for path in sorted(shop.results.glob("cells/*.json"))]
    assert len(cells) == 2 * len(TOY.tasks) + 3 * 2  # specialists and experts, and two rates tried of each method
    assert {(each["updates"], each["prompts"]) for each in cells} == {(TOY.steps, TOY.steps * TOY.prompts)}
    for name in TOY.tasks:
        tokens = {each["answer_tokens"] for each in cells if each["task"] == name}
        assert len(tokens) == 1
    assert all(len(each["curve"]) == TOY.steps for each in cells)


@pytest.mark.slow
def test_the_rate_is_the_best_one_on_validation(shop):
    for method, rates in TOY.rates:
        found = [shop.record(Cell(method, ALL, lr, 0))["after"]["mean"] for lr in rates]
        assert chosen_rate(shop, method) == rates[int(np.argmax(found))]


@pytest.mark.slow
def test_training_helps_and_every_system_is_scored_on_the_same_prompts(data):
    scores = {name: each["score"]["mean"] for name, each in data["systems"].items()}
    assert list(scores) == list(table.ORDER)
    assert data["n"] == len(TOY.tasks) * TOY.held_out
    assert scores[table.ORACLE["macro"]] > scores[table.BASE]
    assert scores[table.ORACLE["self-adaptive"]] > scores[table.BASE]
    assert data["systems"][table.MACRO]["routed_right"] > 0.9
    assert data["systems"][table.ADAPTIVE]["routed_right"] > 0.9


@pytest.mark.slow
def test_what_is_routed_rightly_is_answered_as_the_part_alone_does(shop):
    for view in ("macro", "self-adaptive"):
        record = read(measure.path_of(shop, view, 0))
        for place, label in enumerate(record["chosen"]):
            assert record["answers"][place][:3] == record["alone"][label][place][:3]


@pytest.mark.slow
def test_costs_are_those_of_the_parts(shop, data):
    costs, k = data["costs"], len(TOY.tasks)
    size = sum(weight.size for weight in shop.base.named_params().values())
    mlp = sum(x.size for name, x in shop.base.named_params().items() if ".mlp." in name)
    router = sum(k * shop.base.model.cfg.hidden_size for _ in range(shop.base.model.cfg.num_layers))
    assert costs["base"]["stored_parameters"] == size
    assert costs["macro"]["stored_parameters"] == k * size
    assert costs["micro"]["stored_parameters"] == size + (k - 1) * mlp + 2 * router  # as it was made, and as trained
    assert costs["self-adaptive"]["stored_parameters"] == size + costs["self-adaptive"]["parameters"]
    assert costs["micro"]["parameters"] == costs["macro"]["parameters"] + router
    assert costs["micro"]["updates"] == costs["macro"]["updates"] + TOY.steps
    assert costs["base"]["updates"] == 0
    assert all(each["first_answer_seconds"] > 0 and each["peak_bytes"] > 0 for each in costs.values())


@pytest.mark.slow
def test_areas_of_the_picture_are_the_stored_numbers(data, tmp_path):
    base = data["costs"]["base"]["stored_parameters"]
    assert picture._area(data, 2 * base) == pytest.approx(2 * picture.AREA)
    picture.write(data, tmp_path)
    texts = (tmp_path / "three_views.svg").read_text()
    for name in picture.SYSTEMS.values():
        assert f"{100 * data['systems'][name]['score']['mean']:.0f} % right" in texts
    assert (tmp_path / "three_views.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_page_of_results_says_what_came_out(shop, data):
    (section,) = page._sections(shop.results.parent, Path("results"))
    right = 100 * data["systems"][table.ADAPTIVE]["score"]["mean"]
    assert f"two passes {right:.1f} %" in section
    assert "![Whole models, a mixture of experts, or experts of z](results/three_views.png)" in section
    assert f"two passes {data['costs']['self-adaptive']['bytes_held'] / 1e6:.0f} MB" in section


@pytest.mark.slow
def test_a_view_is_measured_in_a_process_of_its_own(shop, tmp_path, monkeypatch):
    own = Shop(ONE_SEED, tmp_path, shop.weights)
    measure.in_a_process(own, "base", 0)
    there, here = (read(measure.path_of(each, "base", 0)) for each in (own, shop))
    assert there["answers"] == here["answers"]
    monkeypatch.setattr(measure.sys, "executable", "false")
    with pytest.raises(UserError, match="measuring macro of seed 0 failed"):
        measure.in_a_process(own, "macro", 0)


@pytest.mark.slow
def test_a_record_of_other_settings_is_told_and_not_used(shop, tmp_path):
    cell = Cell("svf", TOY.tasks[0], chosen_rate(shop, "svf"), 0)
    record = read_json(shop.record_path(cell))
    own = Shop(ONE_SEED, tmp_path, shop.weights)
    write_json(own.record_path(cell), record)
    assert own.record(cell) == record
    write_json(own.record_path(cell), record | {"config": record["config"] | {"train.steps": 99}})
    with pytest.raises(UserError, match="trained with other settings"):
        own.record(cell)


def test_tasks_take_turns():
    tasks = TOY.made()
    mixed = in_turn(tasks)
    rows = mixed.source("train")
    assert [row["task"] for row in rows[:4]] == [0, 1, 2, 0]
    assert [mixed.question(row) for row in rows[:3]] == [t.question(t.source("train")[0]) for t in tasks]
    assert all(mixed.grade(row["answer"], row).correct for row in rows[:6])
    assert not mixed.grade(rows[1]["answer"], rows[0]).correct


def test_nothing_is_written_before_a_seed_is_complete(tmp_path):
    assert table.make(Shop(TOY, tmp_path, tmp_path), tmp_path) == ""
    assert set(VIEWS) == set(table.VIEW_OF.values())


def test_real_tasks_have_labels_of_their_own():
    assert len({task.label for task in SMOL.made()}) == len(SMOL.tasks)


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    code = "from experiments.paper.three_views.measure import peak_bytes; print(peak_bytes())"
    parent = f"import subprocess, sys; held = bytes(b'1') * 2**31; subprocess.run([sys.executable, '-c', {code!r}])"
    found = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True, cwd=measure.ROOT)
    assert 0 < int(found.stdout) < 2**31
