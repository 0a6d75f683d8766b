"""The page of a server in a real Chromium, and what it reads: its files, and spectra. One server that wants a token."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from served import serving

from sva.serving import page_files
from sva.serving.config import ServerConfig

TOKEN = "a-token-of-24-characters"
QUESTION = "what colour the boat ?"  # adaptive: `red` answers, with as many tokens as it may
WEIGHT = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def server(toy):
    with serving(toy, ServerConfig(port=0, token=TOKEN)) as found:
        yield found


def _answer(server, **settings) -> dict:
    """The first choice that the API gives to what the page asks."""
    body = dict(messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=200) | settings
    return server.http.post("/v1/chat/completions", json=body).json()["choices"][0]


# Without a browser.


def test_every_file_of_the_page_needs_no_token_and_all_else_does(server):
    folder = Path(page_files.__file__).parent / "page"
    assert {path.name for path in folder.iterdir()} == set(page_files.FILES.values())
    for path, name in page_files.FILES.items():
        answer = server.http.get(path, headers={"Authorization": ""})
        assert (answer.status_code, answer.content) == (200, (folder / name).read_bytes())
        assert answer.headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/v1/experts", "/v1/models", "/v1/spectra", f"/v1/spectra/{WEIGHT}", "/openapi.json", "/page/", "/x"):
        assert server.http.get(path, headers={"Authorization": ""}).status_code == 401
    assert server.http.get("/page/../app.py").status_code == 404


def test_the_page_is_for_its_own_names_and_origin(server):
    for header in ({"Host": "evil.com"}, {"Origin": "http://evil.com"}):
        assert server.http.get("/", headers=header).status_code == 403
    assert server.http.post("/").status_code == 405


def test_the_page_asks_no_other_host():
    folder = Path(page_files.__file__).parent / "page"
    text = "".join(path.read_text() for path in folder.iterdir())
    assert set(re.findall(r"\bhttps?://[^\s\"'`)]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    html = (folder / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\son\w+=|\sstyle=", html)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_spectra_are_those_of_the_bank_and_every_number_is_exact(server):
    listed = server.http.get("/v1/spectra").json()["data"]
    assert [each["weight"] for each in listed] == list(server.worker.bank.names)
    assert {each["rank"] for each in listed} == {32}
    told = server.http.get(f"/v1/spectra/{WEIGHT}", params={"red": 0.25, "boat": 1}).json()
    s, z = server.worker.bank.spectrum(WEIGHT, {"red": 0.25, "boat": 1.0})
    np.testing.assert_array_equal(np.asarray(told["s"], np.float32), s)
    np.testing.assert_array_equal(np.asarray(told["z"], np.float32), z)
    assert told["experts"] == {"red": 0.25, "boat": 1.0}
    assert set(server.http.get(f"/v1/spectra/{WEIGHT}").json()["z"]) == {1.0}  # the base


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("model.norm.weight", 404, "no expert here can adapt 'model.norm.weight'; GET /v1/spectra lists"),
        (f"{WEIGHT}?blue=1", 404, "no expert 'blue' is loaded; there is red, boat"),
        (f"{WEIGHT}?red=much", 400, "red=much: the weight of an expert is a number from 0 to 100"),
        (f"{WEIGHT}?red=nan", 400, "red=nan"),
        (f"{WEIGHT}?red=-1", 400, "red=-1"),
        (f"{WEIGHT}?red=1e3", 400, "red=1e3"),
        (f"{WEIGHT}?red=", 400, "red=:"),
        (f"{WEIGHT}?red=1&red=0.5", 400, "red has two weights"),
        ("..%2f..%2fetc%2fpasswd", 404, "there is nothing at this path"),
    ],
)
def test_a_spectrum_that_cannot_be_is_told(server, path, status, words):
    answer = server.http.get(f"/v1/spectra/{path}")
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]


def test_spectra_are_on_the_openapi_page(server):
    operation = server.http.get("/openapi.json").json()["paths"]["/v1/spectra/{weight}"]["get"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert set(schema["required"]) == set(server.http.get(f"/v1/spectra/{WEIGHT}").json())
    assert [each["in"] for each in operation["parameters"]] == ["path", "query"]


# In a browser.


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright; pip install 'sva[browser]' brings it"
    )
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as running:
        found = running.chromium.launch(executable_path=chromium)
        yield found
        found.close()


@pytest.fixture
def open_page(server, browser):
    """A function that opens the page, by default with the token; what the browser complains of fails the test."""
    contexts, complaints = [], []

    def note(message):
        if message.type == "error" and "Failed to load resource" not in message.text:  # of a status that is tested
            complaints.append(message.text)

    def opened(token=TOKEN, **settings):
        context = browser.new_context(reduced_motion="reduce", **settings)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", note)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if token:
            page.add_init_script(f"sessionStorage.setItem('sva-token', {json.dumps(token)})")
        page.goto(server.url.removesuffix("v1"))
        if token == TOKEN:
            page.wait_for_selector("#who input", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def slow(server, monkeypatch):
    """Every step of the server takes a while, so that an answer is seen to come."""
    step = server.worker._rows.step

    def waiting():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(server.worker._rows, "step", waiting)


def _ask(page, text=QUESTION, *, waits=True):
    page.fill("#question", text)
    page.press("#question", "Enter")
    if waits:
        page.wait_for_selector("#send")


def _until(page, claim: str) -> None:
    """Waits until an expression is true; Playwright's own wait evaluates text in the page, which its policy forbids."""
    until = time.monotonic() + 15
    while not page.evaluate(claim):
        assert time.monotonic() < until, claim
        page.wait_for_timeout(20)


def _texts(page, selector: str) -> list[str]:
    return page.locator(selector).all_text_contents()


def _arms(page, answer=0) -> dict[str, str]:
    """{expert: the weight at its tip} of the coloured arms beside an answer."""
    arms = page.locator(".answer").nth(answer).locator(".arm.at-work").all()
    return {arm.get_attribute("data-expert"): arm.text_content() for arm in arms}


def test_a_token_is_asked_for_kept_for_the_tab_and_nowhere_else(open_page):
    page = open_page(token=None)
    page.wait_for_selector("#token")
    assert page.text_content("#trouble") == "the token is missing or wrong; send it as Authorization: Bearer TOKEN"
    page.fill("#token", "wrong")
    page.press("#token", "Enter")
    _until(page, "sessionStorage.getItem('sva-token') === 'wrong'")
    assert page.is_visible("#trouble")
    page.fill("#token", TOKEN)
    page.press("#token", "Enter")
    page.wait_for_selector("#who input")
    assert page.is_hidden("#trouble")
    assert page.evaluate("sessionStorage.getItem('sva-token')") == TOKEN
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    page.reload()
    page.wait_for_selector("#who input")
    assert TOKEN not in page.content()


def test_an_answer_streams_with_the_arm_of_the_expert_that_the_first_pass_chose(open_page, server, slow):
    page = open_page()
    assert page.is_checked("input[value=adaptive]")
    assert _texts(page, ".choice b") == ["base", "red", "boat", "mixture", "adaptive"]
    page.fill("#max-tokens", "60")
    _ask(page, waits=False)
    seen = set()
    while page.is_visible("#stop"):
        seen.add(page.locator(".text").text_content())
        page.wait_for_timeout(20)
    expected = _answer(server, model="adaptive", max_tokens=60)
    whole = expected["message"]["content"]
    assert page.text_content(".text") == whole
    assert len(seen) > 5
    assert all(whole.startswith(part) for part in seen)
    assert page.text_content("h2") == QUESTION
    assert _arms(page) == {"red": "1"} == {name: f"{x:g}" for name, x in expected["sva"]["experts"].items()}
    assert page.get_attribute(".octopus >> nth=-1", "aria-label") == "The first pass chose red."
    probs = expected["sva"]["probs"]
    bars = dict(zip(_texts(page, ".bars li > span:first-child"), _texts(page, ".bars .number"), strict=True))
    assert bars == {name: f"{100 * prob:.0f} %" for name, prob in probs.items()}
    assert list(bars) == sorted(probs, key=probs.get, reverse=True)
    assert _texts(page, ".bars .chosen > span:first-child") == ["colour"]
    assert "60 tokens" in page.text_content(".cost")
    assert page.text_content(".answer .note") == "Cut at the most tokens that were asked for."
    assert whole in page.text_content("#said")  # for who hears the page


def test_a_mixture_is_asked_for_by_sliders_and_numbers(open_page, server):
    page = open_page()
    page.check("input[value=mixture]")
    page.get_by_label("red, slider").fill("0.3")
    page.get_by_label("boat", exact=True).fill("2.5")
    assert page.input_value("[data-expert=red]") == "0.3"
    page.fill("#max-tokens", "12")
    _ask(page)
    expected = _answer(server, model="toy", mixture={"red": 0.3, "boat": 2.5}, max_tokens=12)
    assert page.text_content(".text") == expected["message"]["content"]
    assert _arms(page) == {"red": "0.3", "boat": "2.5"}
    assert _texts(page, ".shares .number") == ["0.3", "2.5"]
    assert page.locator(".bars").count() == 0
    page.check("input[value='expert:boat']")
    _ask(page, "name the thing")
    assert _arms(page, 1) == {"boat": "1"}


def test_settings_of_the_first_pass_are_sent(open_page, server):
    page = open_page()
    page.fill("#max-tokens", "4")
    page.select_option("#choice", "soft")
    _ask(page)
    weights = _answer(server, model="adaptive", adaptive={"choice": "soft"}, max_tokens=4)["sva"]["experts"]
    assert _arms(page) == {name: f"{weight:.3g}" for name, weight in weights.items()}
    page.select_option("#choice", "threshold")
    page.fill("#threshold", "0.9")
    page.click("#new")
    _ask(page)
    assert _arms(page) == {}
    assert page.text_content(".who") == "The first pass leaves it to the base."


def test_the_base_answers_beside_the_expert_at_the_same_time(open_page, server, slow):
    page = open_page()
    page.check("#compare")
    page.fill("#max-tokens", "60")
    _ask(page, waits=False)
    filled = "[...document.querySelectorAll('.answers.two .text')].filter((x) => x.textContent).length === 2"
    _until(page, filled)
    assert page.is_visible("#stop")  # both have begun, and neither has ended
    page.wait_for_selector("#send")
    expected = [_answer(server, model=model, max_tokens=60)["message"]["content"] for model in ("adaptive", "toy")]
    assert _texts(page, ".text") == expected
    assert expected[0] != expected[1]
    assert _texts(page, "h3") == ["adaptive", "toy"]
    assert (_arms(page, 0), _arms(page, 1)) == ({"red": "1"}, {})
    page.fill("#max-tokens", "2")
    with page.expect_request(
        lambda request: request.method == "POST" and '"adaptive"' not in request.post_data
    ) as asked:
        _ask(page, "name the thing")
    told = [turn["content"] for turn in asked.value.post_data_json["messages"]]
    assert told == [QUESTION, expected[1], "name the thing"]  # the base's own chat


def test_escape_stops_the_answer_and_frees_its_row(open_page, server, slow):
    page = open_page()
    _ask(page, waits=False)
    _until(page, "document.querySelector('.text')?.textContent.length > 20")
    page.locator("#temperature").focus()
    page.keyboard.press("Escape")
    page.wait_for_selector("#send")
    assert page.text_content(".answer .note") == "Stopped."
    assert page.evaluate("document.activeElement.id") == "question"
    kept = page.text_content(".text")
    server.until(lambda: server.worker.metrics.registry.get_sample_value("sva_rows_in_use") == 0)
    page.fill("#max-tokens", "2")
    with page.expect_request(lambda request: request.method == "POST") as asked:
        _ask(page, "name the thing")
    assert [turn["content"] for turn in asked.value.post_data_json["messages"]] == [QUESTION, kept, "name the thing"]


def test_the_spectrum_that_answered_is_drawn_and_read_by_keys(open_page, server):
    page = open_page()
    page.fill("#max-tokens", "4")
    _ask(page)
    page.click("summary")
    page.wait_for_selector(".chart .dots", state="attached")
    names = server.worker.bank.names
    assert _texts(page, "details option") == [name.removesuffix(".weight") for name in names]
    page.select_option("details select", WEIGHT)
    _until(page, f"document.querySelector('.chart').getAttribute('aria-label').startsWith('{WEIGHT}')")
    s, z = server.worker.bank.spectrum(WEIGHT, {"red": 1.0})
    page.focus(".chart")
    for place in (0, 1, 31):
        reading = page.text_content(".reading").split()
        assert reading[:3] == [str(place + 1), "of", "32:"]
        shown = [float(reading[4]), float(reading[6]), float(reading[9])]
        assert shown == pytest.approx([s[place], z[place], s[place] * z[place]], rel=1e-3)
        page.keyboard.press("ArrowRight" if place == 0 else "End")
    line, dots = (_places(page, kind) for kind in (".s", ".dots:not(.small):not(.z)"))
    assert len(line) == len(dots) == 32
    assert [x for x, _ in line] == [x for x, _ in dots]
    # On a logarithmic axis the way from s to s z is log z, for all of them alike; upwards where z is above 1.
    ways = np.asarray([y - down for (_, y), (_, down) in zip(line, dots, strict=True)])
    np.testing.assert_allclose(ways, np.log(z) * (ways[0] / np.log(z[0])), atol=0.3)
    assert ways[0] / np.log(z[0]) > 0
    page.context.set_offline(True)
    page.select_option("details select", names[0])
    page.wait_for_selector("details .error")
    assert page.text_content("details .error") == "The server does not answer. Is it running?"


def _places(page, kind: str) -> list[tuple[float, float]]:
    path = page.get_attribute(f".chart path{kind}", "d")
    return [(float(x), float(y)) for x, y in re.findall(r"([\d.]+) ([\d.]+)", path)]


def test_an_error_is_the_servers_sentence(open_page, server):
    page = open_page()
    page.fill("#max-tokens", "5000")
    _ask(page)
    body = dict(model="adaptive", messages=[{"role": "user", "content": QUESTION}], max_tokens=5000)
    sentence = server.http.post("/v1/chat/completions", json=body).json()["error"]["message"]
    assert page.text_content(".column .error") == sentence
    assert "this server's context is 256" in sentence
    page.fill("#max-tokens", "4")
    with page.expect_request(lambda request: request.method == "POST") as asked:
        _ask(page)
    assert len(asked.value.post_data_json["messages"]) == 1  # what failed is no part of the chat
    assert page.locator(".answer").nth(1).locator(".text").text_content()


def test_html_is_text_and_a_broken_stream_is_told(open_page):
    page = open_page()
    html = "<img src=x onerror='window.taken = 1'><b>bold</b>"
    sva = {"experts": {"<i>x</i>": 1}, "label": html, "prob": 1.0, "probs": {html: 1.0}}
    choice = {"index": 0, "delta": {"content": html}, "finish_reason": None, "sva": sva}
    events = f"data: {json.dumps({'choices': [choice]})}\n\ndata: {json.dumps({'error': {'message': html}})}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=events, content_type="text/event-stream"))
    _ask(page, html)
    for place in ("h2", ".text", ".column .error", ".bars li > span:first-child"):
        assert page.text_content(place) == html
    assert page.locator("#turns :is(img, b, i)").count() == 0
    assert page.evaluate("window.taken") is None
    page.unroute("**/v1/chat/completions")
    cut = f"data: {json.dumps({'choices': [choice]})}\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=cut, content_type="text/event-stream"))
    _ask(page)
    assert _texts(page, ".column .error")[1] == "The server broke off in the middle of its answer."


def test_keys_and_names_suffice_without_a_mouse(open_page):
    page = open_page()
    page.focus("#question")
    page.keyboard.type("what red")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("?")
    assert page.input_value("#question") == "what red\n?"
    assert page.locator(".turn").count() == 0
    seen = []
    for _ in range(12):
        page.keyboard.press("Shift+Tab")
        seen.append(page.evaluate("document.activeElement.id || document.activeElement.value"))
        if seen[-1] is None:  # the browser's own controls
            break
        outline = "(x => getComputedStyle(x.closest('.choice') ?? x).outlineStyle)(document.activeElement)"
        assert page.evaluate(outline) == "solid"
    assert {"max-tokens", "temperature", "compare", "choice", "adaptive", "new"} <= set(seen)
    unnamed = """[...document.querySelectorAll('input, select, textarea, button')].filter((x) =>
        !x.labels?.length && !x.ariaLabel && !x.textContent.trim()).length"""
    assert page.evaluate(unnamed) == 0


def test_a_phone_shows_all_of_it_in_one_column(open_page):
    page = open_page(viewport={"width": 390, "height": 844}, has_touch=True)
    assert page.is_hidden("#settings")
    page.click("#show-settings")
    assert page.get_attribute("#show-settings", "aria-expanded") == "true"
    page.check("#compare")
    page.fill("#max-tokens", "30")
    _ask(page)
    assert page.is_hidden("#settings")
    page.click("summary >> nth=0")
    _until(page, "document.querySelectorAll('.chart[aria-label]').length === 2")  # of both answers
    one, other = (each.bounding_box() for each in page.locator(".answer").all())
    assert one["x"] == other["x"]
    assert other["y"] > one["y"] + one["height"]
    assert page.evaluate("document.scrollingElement.scrollWidth") == 390


def test_the_page_is_dark_where_the_browser_is(open_page):
    brightness = []
    for scheme in ("light", "dark"):
        page = open_page(color_scheme=scheme)
        for element, what in (("body", "color"), ("html", "backgroundColor")):
            rgb = page.evaluate(f"getComputedStyle(document.querySelector('{element}')).{what}")
            brightness.append(sum(map(int, re.findall(r"\d+", rgb)[:3])))
    light_ink, light_ground, dark_ink, dark_ground = brightness
    assert light_ink < 150 < 650 < light_ground
    assert dark_ground < 150 < 600 < dark_ink


def test_an_expert_that_was_replaced_has_no_spectrum_any_more(open_page, server):
    page = open_page()
    page.fill("#max-tokens", "2")
    server.http.post("/v1/experts", json={"name": "late", "mixture": {"red": 1.0}}).raise_for_status()
    page.evaluate("dispatchEvent(new Event('focus'))")  # the reader comes back to the tab
    page.check("input[value='expert:late']")
    _ask(page)
    server.http.post("/v1/experts", json={"name": "late", "mixture": {"boat": 1.0}}).raise_for_status()
    page.click("summary")
    page.wait_for_selector("details .error")
    assert page.text_content("details .error").startswith("late was replaced after this answer")
    server.http.delete("/v1/experts/late").raise_for_status()
