"""Pictures of the page of `sva serve` for docs/: a real server, a real question, a real Chromium.

    python experiments/benchmarks/serving/screenshots.py    # extra `browser`, and Chromium

SmolLM2-135M-Instruct with the shipped experts. A question that no expert was trained on is asked adaptively, and the
spectrum of the matrix that README.md's picture shows is opened: with the base's answer beside it at 1280 pixels in
light colours (page_desktop.png, beside this file), and at a phone's width in dark ones (page_phone.png).
"""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).resolve().parents[3]
MODEL, EXPERTS = "smollm2-135m-instruct-q4_1", ("capitals", "list_last")
QUESTION = "What is the capital of Switzerland? Answer with the city only."  # held out
MATRIX = "model.layers.13.mlp.down_proj.weight"
LARGEST = 200_000  # bytes of a picture


class Shot(NamedTuple):
    """One picture."""

    name: str
    window: dict[str, Any]  # of Playwright's new_context
    has_base: bool


SHOTS = (
    Shot("page_desktop", {"viewport": {"width": 1280, "height": 1090}, "color_scheme": "light"}, True),
    Shot(
        "page_phone",
        {"viewport": {"width": 390, "height": 1040}, "color_scheme": "dark", "device_scale_factor": 1.5},
        False,
    ),
)


@contextmanager
def served() -> Iterator[str]:
    """The address of a server with the experts, for as long as it is needed."""
    experts = [word for name in EXPERTS for word in ("--expert", str(ROOT / f"sva/assets/{name}.safetensors"))]
    words = [sys.executable, "-m", "sva.cli", "serve", "--model", MODEL, *experts, "--port", "0", "--rows", "4"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            assert server.stdout is not None
            yield server.stdout.readline().split()[-1].removesuffix("v1")
        finally:
            server.send_signal(signal.SIGTERM)


def take(browser: Browser, url: str, shot: Shot) -> Path:
    """Asks the question as a reader does, and photographs the window."""
    page = browser.new_context(reduced_motion="reduce", **shot.window).new_page()
    page.goto(url)
    page.wait_for_selector("#who input", state="attached")
    if shot.has_base:
        page.check("#compare")
    for _ in range(2):  # the first time the server compiles, and the times that the page tells are of that
        page.click("#new")
        page.fill("#question", QUESTION)
        page.press("#question", "Enter")
        page.wait_for_selector("#stop")
        page.wait_for_selector("#send", timeout=120_000)
    page.click("summary >> nth=0")
    page.wait_for_selector(".chart .dots", state="attached")
    page.select_option("details select >> nth=0", MATRIX)
    for chart in page.locator(".chart").all():
        expect(chart).to_have_attribute("aria-label", re.compile(rf"^{re.escape(MATRIX)}:"))
    _say_what_answered(page)
    page.evaluate("scrollTo(0, 0)")
    path = Path(__file__).with_name(f"{shot.name}.png")
    page.screenshot(path=path)
    assert path.stat().st_size < LARGEST, path
    return path


def _say_what_answered(page: Page) -> None:
    for title, text, who in zip(*(page.locator(x).all_text_contents() for x in ("h3", ".text", ".who")), strict=True):
        print(f"{title}: {text} ({who})")


def main() -> None:
    """Takes every picture from one server."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("no Chromium here; on Debian: apt-get install chromium")
    with served() as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        for shot in SHOTS:
            print(take(browser, url, shot))
        browser.close()


if __name__ == "__main__":
    main()
