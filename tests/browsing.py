"""A server process and a real browser in front of it, for the tests of pages."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
START = 60  # seconds that a server may take until it answers
BROWSER = [
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--disable-sync",
]


@contextlib.contextmanager
def server(folder: Path, *options: str, **settings: str) -> Iterator[str]:
    "A server process on a free port, with settings of its own; gives its address."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder.parent / f"server-{port}.log"
    command = [sys.executable, str(HERE / "explained.py"), str(folder), str(port), *options]
    own = {f"TITANIC_{name.upper()}": value for name, value in settings.items()}
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | own)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START
    try:
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/healthz", timeout=5):
                break
            assert process.poll() is None and time.monotonic() < deadline, f"no server:\n{log.read_text()}"
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    "The browser, or the test is skipped where there is none."
    from playwright.sync_api import sync_playwright

    there = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if there is None:
        assert os.environ.get("CI") != "true", "chromium is not installed"
        pytest.skip("chromium is not installed")
    arguments = [*BROWSER, "--no-sandbox"] if os.getuid() == 0 else BROWSER
    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=there, args=arguments)
        yield made
        made.close()


class Seen:
    "What a page asked for and complained about."

    def __init__(self, page):
        self.asked, self.said = [], []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))


@contextlib.contextmanager
def visits(
    browser, path: str, there: Callable[[Any], object], height: int = 900
) -> Iterator[Callable[..., tuple[Any, Seen]]]:
    "Gives `visit(address, width=360)`, which opens a page until `there(page)` returns; all are closed at the end."
    with contextlib.ExitStack() as opened:

        def visit(address: str, width: int = 1280, height: int = height, answered: bool = True, **options):
            context = browser.new_context(viewport={"width": width, "height": height}, **options)
            opened.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(20_000)
            seen = Seen(page)
            page.goto(address + path)
            if answered:
                there(page)
            return page, seen

        yield visit


def asked(address: str, path: str, body: dict) -> Any:
    "The server's own answer, without a browser."
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def until(page, script: str, argument: object = None) -> None:
    "Wait until a script says true. Playwright's own way evaluates strings in the page, which the policy refuses."
    deadline = time.monotonic() + 20
    while not page.evaluate(script, argument):
        assert time.monotonic() < deadline, f"not within 20 s: {script}; {page.inner_text('body')[:2000]}"
        page.wait_for_timeout(50)


CONTRAST = """() => {
    const rgb = text => { const c = document.createElement('canvas').getContext('2d'); c.fillStyle = text; c.fillRect(0, 0, 1, 1); return [...c.getImageData(0, 0, 1, 1).data]; };
    const light = ([r, g, b]) => { const f = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4; return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
    const behind = e => { for (; e; e = e.parentElement) { const c = rgb(getComputedStyle(e).backgroundColor); if (c[3] > 250) return c; } return [255, 255, 255]; };
    return [...document.querySelectorAll('h1, h2, p, label, th, td, a, dt, dd, li, code, summary, button, output, .fate, .soft, .hint, .tag')].filter(e => e.offsetParent && e.textContent.trim() && !e.closest('.out-of-sight')).map(e => {
        const a = light(rgb(getComputedStyle(e).color)), b = light(behind(e));
        return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.tagName, e.textContent.trim().slice(0, 30)];
    }).filter(([ratio]) => ratio < 4.5);
}"""
