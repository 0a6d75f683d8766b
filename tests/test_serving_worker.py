"""The worker's thread over the toy model: no HTTP."""

import asyncio
import queue
import threading
import time

import numpy as np
import pytest
from margins import assert_same_tokens
from served import toy_expert, toy_worker

from sva.adaptation.label_scoring import Hard, Soft
from sva.generation import chat
from sva.generation.engine import EngineConfig
from sva.generation.row_sampling import row_settings
from sva.serving import adapting, experts_api
from sva.serving.bodies import AdaptBody
from sva.serving.rows import samples_keys, tiers
from sva.serving.tickets import Ended, Failed, Mixed, Piece, Prompted, Question, Ticket
from sva.serving.worker import Busy, Draining, WorkerConfig
from sva.utils import seeds
from sva.utils.errors import UserError

PROMPT = [3, 5, 7, 4]


@pytest.fixture(scope="module")
def worker(toy):
    found, _ = toy_worker(toy)
    found.start()
    yield found
    found.end()


class Asked:
    """A ticket, and what has been told of it."""

    def __init__(self, worker, **settings):
        self.events = queue.Queue()
        self.seen = []
        self.ticket = Ticket(tell=self.events.put, **{"prompt_ids": PROMPT, "max_new_tokens": 8, **settings})
        worker.submit(self.ticket)

    def next(self):
        self.seen.append(self.events.get(timeout=60))
        return self.seen[-1]

    def all(self):
        """Every event up to the end of the last sample, or the failure."""
        ended = sum(isinstance(event, Ended) for event in self.seen)
        while ended < self.ticket.samples:
            event = self.next()
            if isinstance(event, Failed):
                break
            ended += isinstance(event, Ended)
        return self.seen

    def tokens(self, sample=0):
        pieces = [event for event in self.all() if isinstance(event, Piece) and event.sample == sample]
        return [token for piece in pieces for token in piece.tokens]

    def text(self, sample=0):
        return "".join(e.text for e in self.all() if isinstance(e, Piece) and e.sample == sample)

    def only(self, kind):
        return [event for event in self.all() if isinstance(event, kind)]


def _until(is_true, seconds=10.0):
    started = time.monotonic()
    while not is_true():
        assert time.monotonic() - started < seconds
        time.sleep(0.005)


def test_an_answer_is_what_the_model_generates_alone(worker):
    lm, ids = worker.lm, np.asarray([PROMPT])
    ends = chat.end_tokens(lm)
    alone = lm.generate(ids, np.ones_like(ids), 8, ends)
    found = np.asarray([Asked(worker).tokens()])
    assert_same_tokens(
        found,
        alone.tokens[:, : found.shape[1]],
        ids,
        np.ones_like(ids),
        lambda x: np.asarray(lm.logits(x[None], np.ones_like(x[None])))[0, -1],
    )
    z = worker.bank.mixed({"red": 0.5, "boat": 0.25})
    mixed = lm.generate(ids, np.ones_like(ids), 8, ends, z=z)
    asked = Asked(worker, weights={"red": 0.5, "boat": 0.25})
    assert asked.tokens() == mixed.tokens[0, : mixed.lengths[0]].tolist()
    assert asked.tokens() != found[0].tolist()
    assert asked.seen[0] == Mixed({"red": 0.5, "boat": 0.25})
    nats = [x for e in asked.seen if isinstance(e, Piece) for x in e.logprobs]
    np.testing.assert_allclose(nats, mixed.logprobs[0, : len(nats)], atol=1e-3)


def test_samples_with_a_seed_are_those_of_complete(worker):
    from sva.generation.complete import CompleteOptions, complete
    from sva.generation.sampling import Temperature

    keys = seeds.of_rows(seeds.key(5), [1])
    options = CompleteOptions(engine=EngineConfig(rows=4))
    alone = complete(worker.lm, [PROMPT], 8, sampling=Temperature(0.8), key=keys, samples=3, options=options)
    asked = Asked(worker, samples=3, seed=5, settings=row_settings(0.8))
    for one in alone:
        assert asked.tokens(one.sample) == one.tokens.tolist()
        assert asked.text(one.sample) == one.text
    assert len({tuple(asked.tokens(sample)) for sample in range(3)}) > 1
    assert len(samples_keys(seeds.key(5), 1, 1)) == 1


def test_neighbours_change_nothing_and_rows_come_and_go(worker):
    settings = [dict(seed=i, settings=row_settings(1.0), max_new_tokens=3 + 5 * i) for i in range(7)]
    alone = [Asked(worker, **each).tokens() for each in settings]
    together = [Asked(worker, **each) for each in settings]
    assert [each.tokens() for each in together] == alone
    assert len({len(tokens) for tokens in alone}) > 2


def test_a_prompt_and_its_answer_are_scored_alike(worker):
    answer = Asked(worker, likeliest=3, is_rich=True, weights={"red": 1.0})
    tokens = answer.tokens()
    scored = Asked(
        worker, prompt_ids=[*PROMPT, *tokens], max_new_tokens=0, scores_prompt=True, likeliest=3, weights={"red": 1.0}
    )
    (found,) = scored.only(Prompted)
    drawn = [x for e in answer.seen if isinstance(e, Piece) for x in e.logprobs]
    np.testing.assert_allclose(found.logprobs[len(PROMPT) - 1 :], drawn, atol=1e-4)
    likeliest = [pair for e in answer.seen if isinstance(e, Piece) for pair in e.likeliest]
    assert [pair[0][0] for pair in likeliest] == tokens  # greedy
    assert [x[0][1] for x in found.likeliest[len(PROMPT) - 1 :]] == pytest.approx(drawn, abs=1e-4)
    assert all(len(pair) == 3 for pair in likeliest)
    one = Asked(worker, prompt_ids=[*PROMPT, *tokens], max_new_tokens=0, scores_prompt=True, likeliest=1)
    assert [len(x) for x in one.only(Prompted)[0].likeliest] == [1] * (len(PROMPT) + len(tokens) - 1)


def test_the_first_pass_chooses_by_each_questions_own_choice(worker):
    hard, soft = (Asked(worker, question=Question("what colour the boat", choice)) for choice in (Hard(), Soft()))
    (one,), (other,) = hard.only(Mixed), soft.only(Mixed)
    assert one.probs == pytest.approx(other.probs)
    assert sum(one.probs.values()) == pytest.approx(1)
    assert set(one.probs) == {"colour", "thing", "other"}
    assert sorted(other.weights) == ["boat", "red"]
    assert one.prob == max(one.probs.values())
    assert one.first.read > 0
    assert one.first.flops > 0
    ended = hard.only(Ended)[0]
    assert (ended.cost.read, ended.cost.drawn) == (len(PROMPT), len(hard.tokens()))


def test_a_client_that_leaves_frees_its_rows_at_the_next_step(worker):
    asked = Asked(worker, samples=3, max_new_tokens=200, settings=row_settings(1.0, bias=((1, -100.0),)), is_rich=True)
    while not isinstance(asked.next(), Piece):
        pass
    asked.ticket.is_cancelled = True
    _until(lambda: worker.is_idle, 1.0)
    assert worker.metrics.registry.get_sample_value("sva_rows_in_use") == 0
    assert not any(worker.bank.uses(entry) for entry in worker.bank.entries)


def test_a_request_whose_time_is_up_is_told_so(worker):
    asked = Asked(worker, deadline=time.monotonic() - 1)
    assert asked.all()[-1].status == 504
    running = Asked(
        worker,
        max_new_tokens=240,
        settings=row_settings(bias=((1, -100.0),)),
        is_rich=True,
        deadline=time.monotonic() + 0.05,
    )
    assert running.all()[-1].status == 504
    assert worker.is_idle


def test_a_full_queue_says_when_to_come_again(worker):
    gate = threading.Event()
    worker.call(gate.wait)  # nothing takes a row meanwhile
    try:
        waiting = Asked(worker, samples=12, max_new_tokens=1)
        with pytest.raises(Busy, match="queue is full") as busy:
            Asked(worker)
        assert busy.value.seconds >= 1
        with pytest.raises(UserError, match="asks for 13 answers, this server lets 12 wait"):
            Asked(worker, samples=13)
    finally:
        gate.set()
    assert len(waiting.only(Ended)) == 12


def test_an_expert_that_overflows_fails_alone(worker):
    def load():
        z = {name: np.full(32, 1e30, np.float32) for name in worker.bank.names}
        worker.bank.put("huge", z, "", {})
        worker.refresh()

    worker.call(load).result()
    good, bad = Asked(worker, max_new_tokens=20), Asked(worker, weights={"huge": 1.0})
    failed = bad.all()[-1]
    assert failed.status == 400
    assert "NaN under the mixture {'huge': 1.0}" in failed.message
    assert good.only(Ended)
    assert worker.bank.drop("huge").name == "huge"


def test_experts_come_and_go_under_load_without_compiling(worker, compilations):
    expert = toy_expert(worker.lm, 9)
    worker.call(lambda: experts_api.load(worker, "new", expert)).result()
    before = Asked(worker, weights={"new": 1.0}).tokens()
    Asked(worker, question=Question("what", Hard())).all()
    worker.call(lambda: experts_api.mix(worker, "mixed", {"new": 0.5, "red": 0.5}, {})).result()
    compilations.clear()
    running = Asked(worker, weights={"new": 1.0}, max_new_tokens=60, settings=row_settings(0.5), seed=3)
    for number in range(20):
        worker.call(lambda: experts_api.drop(worker, "new")).result()
        other = toy_expert(worker.lm, 100 + number)
        worker.call(lambda other=other: experts_api.load(worker, "other", other)).result()
        worker.call(lambda: experts_api.load(worker, "new", expert)).result()
        worker.call(lambda: experts_api.mix(worker, "mixed", {"new": 0.5, "other": 0.5}, {})).result()
        assert Asked(worker, weights={"new": 1.0}).tokens() == before
    assert running.only(Ended)
    assert (
        running.tokens()
        == Asked(worker, weights={"new": 1.0}, max_new_tokens=60, settings=row_settings(0.5), seed=3).tokens()
    )
    assert compilations == []


def test_a_ticket_that_leaves_its_line_has_a_row_already(worker, monkeypatch):
    idle, remove = [], worker._lines.remove

    def noted(one):
        remove(one)
        idle.append(worker.is_idle)

    with monkeypatch.context() as patch:
        patch.setattr(worker._lines, "remove", noted)
        Asked(worker, max_new_tokens=20).all()
    assert idle == [False]


def test_a_search_is_waited_for_and_its_tickets_are_taken_while_the_server_drains(worker, monkeypatch):
    assert worker.is_idle
    monkeypatch.setattr(worker, "searches", 1)
    monkeypatch.setattr(worker, "is_accepting", False)
    assert not worker.is_idle
    assert Asked(worker, is_background=True).only(Ended)
    with pytest.raises(Draining):
        Asked(worker)


def test_a_search_whose_server_is_gone_harms_nobody(worker):
    body = AdaptBody(name="x", examples=[{"prompt": "what", "answer": "red"}])
    search = adapting.Search(worker, body, ["red"], context=256, deadline=float("inf"))
    loop = asyncio.new_event_loop()
    answer = adapting._Answer(loop.create_future())
    loop.close()
    worker.submit(search._ticket(PROMPT, [1.0], answer, loop))
    _until(lambda: not any(worker.bank.uses(entry) for entry in worker.bank.entries))
    assert Asked(worker).only(Ended)


def test_a_worker_that_cannot_go_on_tells_whoever_waits_and_refuses_what_comes(toy, monkeypatch):
    def broken():
        raise RuntimeError("out of memory")

    worker, _ = toy_worker(toy)
    worker.start()
    for name in ("step", "clear"):
        monkeypatch.setattr(worker._rows, name, broken)
    assert Asked(worker).all()[-1].status == 503
    worker._thread.join(timeout=10)
    assert not worker.is_alive
    for ask in (lambda: Asked(worker, is_background=True), lambda: worker.call(print)):
        with pytest.raises(Draining):
            ask()


def test_a_step_that_fails_is_told_and_the_next_request_answered(worker, monkeypatch):
    def broken():
        worker._rows._state.decoding.done.delete()  # as of a step that was given the state and failed
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(worker._rows, "step", broken)
        failed = Asked(worker).all()[-1]
    assert failed.status == 500
    assert "log says why" in failed.message
    assert Asked(worker).only(Ended)


def test_an_ended_worker_tells_whoever_waits(toy):
    worker, _ = toy_worker(toy, WorkerConfig(rows=4))
    worker.start()
    asked = Asked(worker, max_new_tokens=240, settings=row_settings(bias=((1, -100.0),)), is_rich=True)
    worker.end()
    assert asked.all()[-1].status == 503
    assert not worker.is_alive


def test_tiers_of_rows_divide_over_a_mesh():
    assert tiers(32, 1) == [4, 16, 32]
    assert tiers(4, 1) == [4]
    assert tiers(2, 1) == [2]
    assert tiers(64, 8) == [8, 16, 64]
