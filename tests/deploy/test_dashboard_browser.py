"""A person at the dashboard, in headless Chromium: nothing is asked of another host, and nothing
breaks the page's own security policy."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from umbel.deploy.jobs import Jobs

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

PATIENCE = 60_000


def _chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (found := shutil.which(name)) is not None:
            return found
    pytest.skip("no Chromium: apt-get install chromium")


@pytest.fixture(scope="module")
def address(made: Any) -> Iterator[str]:
    """The dashboard as it is run, in a process of its own."""
    program = "import sys; from umbel.cli.main import main; sys.exit(main())"
    options = ["dashboard", "--folder", str(made.folder.path), "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        if found := re.match(r"dashboard on (http://127\.0\.0\.1:\d+)", line):
            break
    else:
        pytest.fail("".join(said))
    yield found.group(1)
    process.terminate()
    process.stderr.read()
    process.wait()


@pytest.fixture
def page(address: str) -> Iterator[Any]:
    """A page whose wrongs are collected, and must be none."""
    wrong: list[str] = []
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=_chromium(), args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1240, "height": 900})
        context.set_default_timeout(PATIENCE)
        opened = context.new_page()
        own = urlsplit(address).netloc

        def asked(request: Any) -> None:
            if urlsplit(request.url).netloc != own:
                wrong.append(f"asked {request.url}")

        def said(message: Any) -> None:
            if message.type == "error" or "Content Security Policy" in message.text:
                wrong.append(message.text)

        context.on("request", asked)
        opened.on("console", said)
        opened.on("pageerror", lambda error: wrong.append(str(error)))
        opened.wrong = wrong
        yield opened
        browser.close()
    assert wrong == []


def test_from_login_to_stop(page: Any, address: str, made: Any, tmp_path: Path) -> None:
    page.goto(address)
    page.wait_for_url(f"{address}/login")
    page.fill("input[name=user]", "admin")
    page.fill("input[name=password]", made.password)
    page.click("button.main")
    page.wait_for_url(f"{address}/")
    assert page.inner_text("h1") == "Overview"

    # A live run: its grid grows while somebody looks.
    page.click(f'td a[href="/runs/{made.live}"]')
    page.wait_for_selector("svg.heat")
    assert page.locator("svg.heat rect").count() == 15
    made.go_on(6)
    page.wait_for_selector("svg.heat rect:nth-of-type(18)")
    titles = page.locator("svg.heat rect.failed title").all_text_contents()
    assert any("update is not finite" in title for title in titles)

    # Two runs side by side.
    page.goto(f"{address}/runs")
    for run_id in (made.finished, made.other):
        page.check(f'input[value="{run_id}"]')
    page.click("text=Compare the chosen")
    page.wait_for_selector("svg.chart")
    assert page.locator("svg.chart").first.locator("polyline").count() == 2

    # A model, by its hash.
    page.goto(f"{address}/models")
    row = page.locator("tr", has_text=made.finished)
    shown = row.locator("code").nth(1).inner_text()
    with page.expect_download() as download:
        row.locator("text=Download").click()
    target = tmp_path / "model.safetensors"
    download.value.save_as(target)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == shown

    # Stop, which asks first.
    jobs = Jobs(made.folder.jobs_database)
    page.goto(f"{address}/runs/{made.live}")
    asked: list[str] = []

    def refuse(dialog: Any) -> None:
        asked.append(dialog.message)
        dialog.dismiss()

    page.once("dialog", refuse)
    page.click("text=Stop")
    assert "committed rounds stay" in asked[0]
    assert jobs.get(made.job.id).wanted == ""
    page.once("dialog", lambda dialog: dialog.accept())
    page.click("text=Stop")
    page.wait_for_selector("text=stop ordered")
    assert jobs.get(made.job.id).wanted == "stop"

    for path in ("clients", "audit", "users", "account"):
        page.goto(f"{address}/{path}")
        assert page.locator("h1").count() == 1
    page.click("text=Log out")
    page.wait_for_url(f"{address}/login")
    page.goto(f"{address}/users")
    page.wait_for_url(f"{address}/login")


def test_the_policy_is_in_force(page: Any, address: str) -> None:
    page.goto(f"{address}/login")
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = true";
            document.body.append(script);
        }"""
    )
    assert not page.evaluate("Boolean(window.hacked)")
    until = time.monotonic() + 60
    while not page.wrong and time.monotonic() < until:
        page.wait_for_timeout(50)
    # The collector sees what the browser refused: an empty list elsewhere means something.
    assert any("Content Security Policy" in text for text in page.wrong)
    page.wrong.clear()
