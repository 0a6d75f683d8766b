import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure

from sva.cli import main as cli
from sva.training import report
from sva.utils.errors import UserError

VOID = {"meta", "img", "br"}
RECORDS = (("2 + 2 ?", "5", "4"), ("<b>3</b> & 3 ?", "6", "<script>alert(1)</script>"), ("same", "x", "x"))


class Page(HTMLParser):
    """Tags that are open, text, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.fetched, self.tags = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href") and not v.startswith(("#", "data:"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def run_dir(tmp_path):
    (tmp_path / "config.yaml").write_text("task: sums\ntrain: {steps: 3}\n")
    rows = [{"step": i, "reward": i / 3, "loss": 1.0, "rollout_seconds": 1.0, "rest_seconds": 0.1} for i in range(3)]
    rows[1] |= {"alarms": ["kl 9 nats is above guards.max_kl=5"], "validation_accuracy": 0.5}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def finish(run_dir):
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6}
    result = {"task": "sums", "model": "toy", "n": 3, "split": "test", "parameters": 9, "versions": {"jax": "9.9"}}
    result |= {"before": interval, "after": interval, "gain": interval, "command": "sva train x.yaml"}
    (run_dir / "result.json").write_text(json.dumps(result))
    for name, is_right, place in (("before", [False, True, True], 1), ("after", [True, False, True], 2)):
        lines = [
            json.dumps({"question": record[0], "completion": record[place], "correct": right})
            for record, right in zip(RECORDS, is_right, strict=True)
        ]
        (run_dir / f"{name}.jsonl").write_text("\n".join(lines))
    Figure(figsize=(1, 1)).savefig(run_dir / "spectrum.png")


def test_a_finished_runs_page_holds_everything_and_fetches_nothing(run_dir):
    finish(run_dir)
    found = Page(report.page(run_dir))
    assert found.open == []
    assert found.fetched == []
    assert {"svg", "img", "table", "pre"} <= set(found.tags)
    for words in ("sums on toy", "From wrong to right: 1 of 3", "From right to wrong: 1 of 3", "50.0 % [40.0, 60.0]"):
        assert words in found.text
    for words in ("step 1: kl 9 nats is above", "train: {steps: 3}", "9.9", "sva train x.yaml", "reward of sampled"):
        assert words in found.text
    assert "same" not in found.text


def test_what_a_model_wrote_is_text_and_no_markup(run_dir):
    finish(run_dir)
    found = Page(report.page(run_dir))
    assert "script" not in found.tags
    assert "<script>alert(1)</script>" in found.text
    assert "<b>3</b> & 3 ?" in found.text


HOSTILE = "</pre><script src='http://a/b.js'>1</script>{{ 7 * 7 }}"


def test_every_text_of_a_record_is_escaped(run_dir):
    finish(run_dir)
    result = json.loads((run_dir / "result.json").read_text())
    result |= dict.fromkeys(("task", "model", "split", "command", "fingerprint"), HOSTILE)
    (run_dir / "result.json").write_text(json.dumps(result | {"versions": {HOSTILE: HOSTILE}}))
    (run_dir / "config.yaml").write_text(f"# {HOSTILE}")
    (run_dir / "metrics.jsonl").write_text(json.dumps({"step": 0, "reward": 1.0, "alarms": [HOSTILE]}))
    (run_dir / "failed").mkdir()
    (run_dir / "failed" / "0.json").write_text(json.dumps({"reason": HOSTILE}))
    for name in ("before", "after"):
        line = {"question": HOSTILE, "completion": HOSTILE, "correct": name == "after"}
        (run_dir / f"{name}.jsonl").write_text(json.dumps(line))
    found = Page(report.page(run_dir))
    assert (found.open, found.fetched) == ([], [])
    assert "script" not in found.tags
    assert (
        found.text.count(HOSTILE) == 2 * 2 + 1 + 2 + 2 + 2 + 1 + 3
    )  # title, split, environment, alarms, settings, row


def test_a_run_that_goes_on_has_a_page_too(run_dir):
    found = Page(report.page(run_dir))
    assert "Not finished: 3 steps are done" in found.text
    assert found.open == []
    (run_dir / "metrics.jsonl").unlink()
    assert "No step is done yet" in Page(report.page(run_dir)).text


def test_the_command_writes_the_page_beside_the_run_or_where_asked(run_dir, monkeypatch, capsys):
    monkeypatch.setattr("sva.parallel.compile_cache.start", lambda: None)
    assert cli.main(["report", str(run_dir)]) == 0
    assert cli.main(["report", str(run_dir), "--out", str(run_dir / "other.html")]) == 0
    assert capsys.readouterr().out.split() == [str(run_dir / "report.html"), str(run_dir / "other.html")]
    assert (run_dir / "report.html").read_text().startswith("<!doctype html>")


def test_a_directory_without_a_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no run of `sva train`"):
        report.page(tmp_path)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_shows_all_of_the_page_and_asks_for_nothing(run_dir, tmp_path):
    finish(run_dir)
    probe = (
        "<script>addEventListener('load', () => { const pictures = [...document.images, ...document.querySelectorAll("
        "'svg')]; document.body.dataset.seen = JSON.stringify({pictures: pictures.length, empty: pictures.filter("
        "p => !p.getBoundingClientRect().width || p.naturalWidth === 0).length, wide: document.body.scrollWidth > "
        "innerWidth, asked: performance.getEntriesByType('resource').filter(r => !r.name.startsWith('data:')).length})"
        "})</script></body>"
    )
    page = tmp_path / "probed.html"
    page.write_text(report.page(run_dir).replace("</body>", probe))
    flags = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    call = [str(BROWSER), *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", page.as_uri()]
    shown = subprocess.run(call, capture_output=True, text=True, timeout=60, check=True).stdout
    found = re.search(r'data-seen="([^"]*)"', shown)
    assert found
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert seen == {"pictures": seen["pictures"], "empty": 0, "wide": False, "asked": 0}
    assert seen["pictures"] >= 2
