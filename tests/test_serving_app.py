"""The official client against a server of the toy model, and what any other client may send."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from served import serving, toy_expert

from sva.serving import page_files
from sva.serving.config import ServerConfig
from sva.serving.worker import Busy

QUESTION = [{"role": "user", "content": "what colour the boat ?"}]
LONG = dict(max_tokens=200, temperature=1.0, logit_bias={"1": -100})  # never the end token


@pytest.fixture(scope="module")
def server(toy):
    with serving(toy, ServerConfig(port=0, body_seconds=1.0)) as found:
        yield found


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=60) as found:
        yield found


def _chat(client, **settings):
    settings = {"model": "toy", "messages": QUESTION, "temperature": 0, "max_tokens": 6, **settings}
    return client.chat.completions.create(**settings)


def test_models_are_the_base_the_experts_and_two_passes(client):
    assert [model.id for model in client.models.list()] == ["toy", "red", "boat", "adaptive"]
    assert client.models.retrieve("red").owned_by == "expert"
    with pytest.raises(openai.NotFoundError, match="no model 'blue'; there is toy, red"):
        client.models.retrieve("blue")


def test_a_stream_has_the_text_of_the_answer_in_one_piece(client):
    whole = _chat(client, n=2, seed=3, temperature=1)
    chunks = list(_chat(client, n=2, seed=3, temperature=1, stream=True, stream_options={"include_usage": True}))
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks[1:-1] if chunk.choices[0].index == index]
        assert "".join(x.delta.content or "" for x in own) == whole.choices[index].message.content
        assert own[-1].finish_reason == whole.choices[index].finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (chunks[-1].choices, chunks[-1].usage.total_tokens) == ([], whole.usage.total_tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_seed_repeats_an_answer_and_another_does_not(client):
    texts = [_chat(client, seed=seed, temperature=1, max_tokens=20).choices[0].message.content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    free = {_chat(client, temperature=1, max_tokens=20).choices[0].message.content for _ in range(4)}
    assert len(free) > 1


def test_a_stop_string_ends_the_answer(client):
    free = _chat(client, **LONG | dict(max_tokens=12, temperature=0)).choices[0]
    word = free.message.content.split()[4]
    cut = _chat(client, stop=[word], **LONG | dict(max_tokens=12, temperature=0)).choices[0]
    assert (free.finish_reason, cut.finish_reason) == ("length", "stop")
    assert cut.message.content == free.message.content[: free.message.content.index(word)]


def test_a_bias_makes_a_token_certain(client):
    assert _chat(client, logit_bias={"5": 100}, max_tokens=3).choices[0].message.content == "red red red"


def test_log_probs_of_a_chat_are_of_its_tokens(client):
    choice = _chat(client, logprobs=True, top_logprobs=3).choices[0]
    content = choice.logprobs.content
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob == token.top_logprobs[0].logprob for token in content)  # greedy
    assert bytes(content[0].bytes).decode() == content[0].token
    streamed = list(_chat(client, logprobs=True, stream=True))
    tokens = [t.token for c in streamed for x in c.choices if x.logprobs for t in x.logprobs.content]
    assert tokens == [token.token for token in content]


def test_a_prompt_is_echoed_with_its_log_probs_and_tokens_are_as_good_as_text(client):
    ask = dict(model="toy", echo=True, logprobs=1, max_tokens=1, temperature=0)
    text = client.completions.create(prompt=["what red", "the blue boat"], **ask)
    ids = client.completions.create(prompt=[[27, 5], [25, 7, 11]], **ask)
    for one, other in zip(text.choices, ids.choices, strict=True):
        assert one.logprobs.tokens == other.logprobs.tokens
        assert one.logprobs.token_logprobs == pytest.approx(other.logprobs.token_logprobs)
        assert one.logprobs.token_logprobs[0] is None
        best = [max(top.values()) for top in one.logprobs.top_logprobs[1:]]
        assert best[-1] == one.logprobs.token_logprobs[-1]  # drawn greedily
        assert all(score <= top for score, top in zip(one.logprobs.token_logprobs[1:], best, strict=True))
    assert text.choices[1].text.startswith("the blue boat")
    scored = client.completions.create(prompt="what red", **ask | dict(max_tokens=0))
    assert scored.choices[0].text == "what red"
    assert scored.choices[0].logprobs.token_logprobs == text.choices[0].logprobs.token_logprobs[:2]
    assert (text.usage.prompt_tokens, scored.usage.completion_tokens) == (5, 0)
    streamed = list(client.completions.create(prompt="what red", stream=True, **ask))
    assert "".join(chunk.choices[0].text for chunk in streamed) == text.choices[0].text


def test_experts_answer_by_name_by_weight_and_by_the_first_pass(client):
    base, red = (_chat(client, model=model).choices[0] for model in ("toy", "red"))
    assert (base.sva["experts"], red.sva["experts"]) == ({}, {"red": 1.0})
    assert base.message.content != red.message.content
    one = _chat(client, extra_body={"mixture": {"red": 1.0, "boat": 0.0}}).choices[0]
    assert (one.message.content, one.sva["experts"]) == (red.message.content, {"red": 1.0})
    half = _chat(client, extra_body={"mixture": {"red": 0.5, "boat": 0.5}}).choices[0]
    assert half.sva["experts"] == {"red": 0.5, "boat": 0.5}
    chosen = _chat(client, model="adaptive", extra_body={"adaptive": {"choice": "soft"}}).choices[0].sva
    assert set(chosen["probs"]) == {"colour", "thing", "other"}
    assert chosen["prob"] == max(chosen["probs"].values())
    assert chosen["first_pass"]["read"] > 0
    assert chosen["second_pass"]["drawn"] > 0
    unsure = _chat(client, model="adaptive", extra_body={"adaptive": {"choice": 1.0}}).choices[0]
    assert (unsure.sva["experts"], unsure.sva["label"]) == ({}, "other")
    assert unsure.message.content == base.message.content


def test_system_and_developer_say_the_same(client):
    turns = [[{"role": role, "content": "name"}, *QUESTION] for role in ("system", "developer")]
    one, other = (_chat(client, messages=each).choices[0].message.content for each in turns)
    assert one == other
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION[0]["content"]}]}]
    assert _chat(client, messages=parts).choices[0].message.content == _chat(client).choices[0].message.content


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (dict(messages=[]), "messages: list should have at least 1 item"),
        (dict(messages=[{"role": "king", "content": "x"}]), "should be 'system', 'developer', 'user' or 'assistant'"),
        (dict(messages=[{"role": "user", "content": "  "}]), "last message must be the user's"),
        (dict(messages=[*QUESTION, {"role": "assistant", "content": "x"}]), "last message must be the user's"),
        (dict(temperature=-1), "temperature: input should be greater"),
        (dict(temperature=1e-9), "temperature=1e-09 must be a finite number of at least"),
        (dict(stop=["a", ""]), "stop should be a text, or at most 16"),
        (dict(stop="<end> x"), "holds the special token '<end>'"),
        (dict(logit_bias={"99": 1}), "no token 99"),
        (dict(top_logprobs=2), "top_logprobs needs logprobs"),
        (dict(presence_penalty=0.5), "presence_penalty"),
        (dict(tools=[]), "no field 'tools'"),
        (dict(max_tokens=2000), "context is 256"),
        (dict(messages=[{"role": "user", "content": "red " * 300}]), "prompt 0 has 302 tokens"),
        (dict(extra_body={"mixture": {"red": -1}}), "mixture.red: input should be greater than or equal to 0"),
        (dict(extra_body={"mixture": {}}), "mixture: dictionary should have at least 1 item"),
        (dict(model="red", extra_body={"mixture": {"red": 1}}), "`mixture` is for the model 'toy'"),
        (dict(extra_body={"adaptive": {}}), "`adaptive` is for the model 'adaptive'"),
        (dict(model="adaptive", extra_body={"adaptive": {"choice": 2}}), "adaptive"),
    ],
)
def test_a_mistake_is_answered_with_a_sentence(client, settings, words):
    with pytest.raises(openai.BadRequestError) as error:
        _chat(client, **settings)
    assert words in error.value.body["message"]
    assert "\n" not in error.value.body["message"]


@pytest.mark.parametrize("settings", [dict(model="nope"), dict(extra_body={"mixture": {"nope": 1.0}})])
def test_an_unknown_model_is_not_found(client, settings):
    with pytest.raises(openai.NotFoundError, match="nope") as error:
        _chat(client, **settings)
    assert error.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "has no token"),
        ([40], "the id 40 has no embedding"),
        ([10**16], "the id 10000000000000000 has no embedding"),  # more than the tokenizer's own numbers hold
        ([[3], []], "prompt should be a text"),
        ([], "prompt should be a text"),
        (3, "prompt should be a text"),
        ([-1], "prompt should be a text"),
    ],
)
def test_a_prompt_that_is_none_is_told(client, prompt, words):
    with pytest.raises(openai.BadRequestError, match=words):
        client.completions.create(model="toy", prompt=prompt)


def test_token_ids_cannot_be_classified(client):
    with pytest.raises(openai.BadRequestError, match="needs a prompt of text to classify"):
        client.completions.create(model="adaptive", prompt=[5, 6])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "the body is not JSON"),
        (b'{"model": "toy", "prompt": "\xff"}', "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON"),
        (b"3", "should be a JSON object"),
        (b'{"model": "toy", "prompt": "x", "mixture": {"red": NaN}}', "mixture.red: input should be a finite number"),
        (b'{"model": "toy", "prompt": "x", "temperature": 1e999}', "temperature: input should be a finite number"),
        (b'{"model": "toy", "prompt": "x", "n": true}', "n: input should be a valid integer"),
        (b'{"model": "toy"}', "prompt: field required"),
    ],
)
def test_a_body_that_is_none_is_told(server, content, words):
    answer = server.http.post("/v1/completions", content=content)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_ten_megabytes_are_refused_told_or_not(server):
    for content in (b" " * 10_000_000, (b" " * 1_000_000 for _ in range(10))):
        answer = server.http.post("/v1/completions", content=content)
        assert answer.status_code == 413
        assert "over 2097152 bytes" in answer.json()["error"]["message"]


def test_paths_and_methods_that_are_none_are_told(server):
    assert server.http.get("/v1/none").status_code == 404
    answer = server.http.get("/v1/completions")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
    assert "error" in answer.json()


def test_a_client_that_leaves_frees_its_rows_within_a_second(server, client):
    rows = lambda: server.worker.metrics.registry.get_sample_value("sva_rows_in_use")  # noqa: E731
    stream = _chat(client, n=2, stream=True, **LONG)
    next(iter(stream))
    server.until(lambda: rows() == 2)
    stream.close()
    assert server.until(lambda: rows() == 0) < 1
    body = json.dumps({"model": "toy", "messages": QUESTION, **LONG})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))) as plain:
        plain.sendall((head + body).encode())
        server.until(lambda: rows() == 1)
    assert server.until(lambda: rows() == 0) < 1


def test_a_full_queue_is_429_with_a_time_to_come_again(server, client, monkeypatch):
    def full(*tickets):
        raise Busy(7)

    monkeypatch.setattr(server.worker, "submit", full)
    with pytest.raises(openai.RateLimitError, match="queue is full; try again in about 7 seconds") as error:
        _chat(client)
    assert error.value.response.headers["retry-after"] == "7"


def test_a_slow_body_is_given_up(server):
    with socket.create_connection(("127.0.0.1", int(server.url.split(":")[2].split("/")[0]))) as plain:
        plain.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
        started = time.monotonic()
        assert plain.recv(1000).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - started < 5


def test_health_readiness_and_metrics(server):
    assert server.http.get("/healthz").json() == {"status": "ok"}
    assert server.http.get("/readyz").json() == {"status": "ready"}
    text = server.http.get("/metrics").text
    assert 'sva_requests_total{path="/healthz",status="200"}' in text
    assert "sva_first_token_seconds_count" in text
    assert "sva_experts 2.0" in text


def test_a_draining_server_finishes_what_runs_and_refuses_what_comes(server, client):
    stream = _chat(client, stream=True, **LONG)
    next(iter(stream))
    server.worker.is_accepting = False
    try:
        with pytest.raises(openai.InternalServerError) as error:
            _chat(client)
        assert (error.value.status_code, error.value.response.headers["retry-after"]) == (503, "5")
        assert server.http.get("/readyz").status_code == 503
        assert list(stream)[-1].choices[0].finish_reason == "length"
    finally:
        server.worker.is_accepting = True


def test_every_answer_is_what_the_page_says(server, client):
    page = server.http.get("/openapi.json").json()
    assert page["openapi"] == "3.1.0"
    told = {(method.upper(), path) for path, methods in page["paths"].items() for method in methods}
    files = {("GET", path) for path in [*page_files.FILES, "/openapi.json"]}
    routes = server.app.routes
    assert told | files == {(method, route.path) for route in routes for method in route.methods - {"HEAD"}}
    answer = _chat(client).model_dump()
    schema = page["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(schema["required"]) <= set(answer)
    choice = schema["properties"]["choices"]["items"]
    assert set(choice["required"]) <= set(answer["choices"][0])
    assert set(choice["properties"]["sva"]["required"]) <= set(answer["choices"][0]["sva"])


# Experts at run time.


def _file(tmp_path, expert):
    expert.save(tmp_path / "e.safetensors")
    return (tmp_path / "e.safetensors").read_bytes()


def test_an_expert_is_put_asked_replaced_and_dropped(server, client, toy, tmp_path):
    content = _file(tmp_path, toy_expert(toy, 7, label="colour", description="d", task="t"))
    told = server.http.put("/v1/experts/mine", content=content).json()
    assert (told["name"], told["label"], told["about"]["task"]) == ("mine", "colour", "t")
    first = _chat(client, model="mine").choices[0].message.content
    server.http.put("/v1/experts/mine", content=_file(tmp_path, toy_expert(toy, 8))).raise_for_status()
    assert _chat(client, model="mine").choices[0].message.content != first
    listed = server.http.get("/v1/experts").json()["data"]
    assert [(x["name"], x["in_use"]) for x in listed] == [("red", 0), ("boat", 0), ("mine", 0)]
    running = _chat(client, model="mine", stream=True, **LONG)
    next(iter(running))
    assert server.http.delete("/v1/experts/mine").json()["deleted"]
    assert list(running)[-1].choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError):
        _chat(client, model="mine")
    assert server.http.delete("/v1/experts/mine").status_code == 404


def test_a_mixture_is_an_expert_of_its_own(server, client):
    body = {"name": "both", "mixture": {"red": 0.5, "boat": 0.5}}
    assert server.http.post("/v1/experts", json=body).json()["about"]["mixture"] == body["mixture"]
    one = _chat(client, model="both").choices[0].message.content
    assert one == _chat(client, extra_body={"mixture": body["mixture"]}).choices[0].message.content
    server.http.delete("/v1/experts/both").raise_for_status()


def test_examples_find_the_expert_that_answers_them(server, client):
    """The examples' answers are what `red` alone says."""
    examples = []
    for prompt in (f"what {a} {b}" for a in ("red", "blue", "boat", "lamp") for b in ("door", "kite", "thing", "of")):
        ask = dict(messages=[{"role": "user", "content": prompt}], max_tokens=1)
        base, red = (_chat(client, model=model, **ask).choices[0].message.content for model in ("toy", "red"))
        examples += [dict(prompt=prompt, answer=red)] if red.isalpha() and red != base else []
    assert len(examples) >= 3
    body = {"name": "found", "examples": examples, "max_tokens": 1, "iterations": 4, "population": 12, "seed": 1}
    body["experts"] = ["red", "boat"]
    told = server.http.post("/v1/adapt", json=body).json()
    history, mixture = told["about"]["adapted"]["history"], told["about"]["mixture"]
    assert len(history) == 4
    assert max(row["best"] for row in history) > 0.5
    assert mixture["red"] > mixture.get("boat", 0)
    assert server.http.post("/v1/adapt", json=body).json()["digest"] == told["digest"]  # by its seed
    assert _chat(client, model="found").choices[0].sva["experts"] == {"found": 1.0}
    server.http.delete("/v1/experts/found").raise_for_status()


def test_a_draining_server_finishes_a_search_and_begins_none(server):
    body = {"name": "late", "examples": [dict(prompt="what", answer="red")], "experts": ["red", "boat"]}
    body |= {"max_tokens": 1, "iterations": 30}
    with ThreadPoolExecutor(1) as pool:
        search = pool.submit(server.http.post, "/v1/adapt", json=body)
        server.until(lambda: server.worker.searches == 1)
        server.worker.is_accepting = False
        try:
            assert server.http.post("/v1/adapt", json=body).status_code == 503
            assert search.result().status_code == 200
        finally:
            server.worker.is_accepting = True
    assert server.worker.searches == 0
    server.http.delete("/v1/experts/late").raise_for_status()


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (dict(name="x", examples=[]), 400, "examples: list should have at least 1"),
        (dict(name="x", examples=[dict(prompt="a", answer="b", grader="no")]), 400, "example 0: no grader 'no'"),
        (dict(name="x", examples=[dict(prompt="a", answer="b")], experts=["no"]), 404, "no expert 'no'"),
        (dict(name="x", examples=[dict(prompt="red " * 300, answer="b")]), 400, "this server's context is 256"),
        (dict(name="adaptive", examples=[dict(prompt="a", answer="b")]), 400, "is the name of another model"),
    ],
)
def test_examples_that_make_no_sense_are_told(server, body, status, words):
    answer = server.http.post("/v1/adapt", json=body)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_files_that_are_no_expert_of_this_model_are_refused(server, toy, tmp_path):
    foreign = toy_expert(toy, 1)
    foreign.metadata.update(fingerprint="f" * 64, base="another")
    wide = toy_expert(toy, 1)
    wide.raw["model.layers.0.self_attn.q_proj.weight"] = wide.raw["model.layers.0.mlp.up_proj.weight"]
    empty = toy_expert(toy, 1)
    empty.raw["model.layers.0.mlp.up_proj.weight"][0] = float("nan")
    for expert, words in ((foreign, "trained on another"), (wide, "--targets all"), (empty, "NaN")):
        answer = server.http.put("/v1/experts/x", content=_file(tmp_path, expert))
        assert answer.status_code == 400
        assert words in answer.json()["error"]["message"]
    for content, status in ((b"", 400), (b"no expert", 400), (b" " * 5_000_000, 413)):
        assert server.http.put("/v1/experts/x", content=content).status_code == status


@pytest.mark.parametrize(
    "name", ["..%2f..%2fetc%2fpasswd", "%2e%2e", "a..b", ".x", "a%20b", "a%00b", "toy", "base", "x" * 65]
)
def test_names_that_are_paths_or_taken_are_refused(server, name):
    answer = server.http.put(f"/v1/experts/{name}", content=b"x")
    assert answer.status_code in (400, 404, 405)
    assert answer.json()["error"]["message"]


def test_a_full_bank_is_a_conflict(server):
    answers = [
        server.http.post("/v1/experts", json={"name": f"copy{i}", "mixture": {"red": 1.0}}) for i in range(6)
    ]  # 7 slots
    assert [answer.status_code for answer in answers] == [200] * 5 + [409]
    assert "all 7 slots for experts are taken" in answers[-1].json()["error"]["message"]
    for i in range(5):
        server.http.delete(f"/v1/experts/copy{i}").raise_for_status()
