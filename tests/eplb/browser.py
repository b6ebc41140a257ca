"""A headless browser that loads a page and tells what it found there."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
from html import unescape
from typing import NamedTuple

import pytest

MISSING = "no browser: install chromium or google-chrome to have the report's page tested"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--allow-file-access-from-files",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
)

LOOK = """<!doctype html><body style="margin:0"><iframe src="PAGE"></iframe><script>
const frame = document.querySelector('iframe');
frame.style = 'border:0;height:3000px;width:WIDTHpx';
const boxes = (all) => [...all].map(e => [e.outerHTML.slice(0, 90), e.getBoundingClientRect()]);
const outside = (all) => boxes(all).filter(([_, box]) => box.width && (box.right > WIDTH + 0.5 ||
  box.left < -0.5)).map(([text]) => text);
const drawn = plot => ({id: plot.id, width: plot.querySelector('svg').getBoundingClientRect().width,
  texts: [...plot.querySelectorAll('text')].map(e => e.textContent),
  shapes: [...plot.querySelectorAll('.plot image, .plot .trace path, .plot .point path')].filter(
    e => (e.getAttribute('d') || e.getAttribute('href') || '').length > 8).length});
frame.onload = () => setTimeout(() => {
  const page = frame.contentDocument;
  const first = page.querySelector('#experts image').getAttribute('href');
  const plots = [...page.querySelectorAll('.js-plotly-plot')].map(drawn);
  const found = {plots, scroll: page.documentElement.scrollWidth,
    outside: outside(page.querySelectorAll('main, main *:not(svg *), main svg text')),
    fetched: frame.contentWindow.performance.getEntriesByType('resource').map(e => e.name)};
  const choice = page.querySelector('select');
  choice.value = '1';
  choice.dispatchEvent(new Event('change'));
  setTimeout(() => {
    found.chosen = page.querySelector('#experts image').getAttribute('href') !== first;
    document.body.textContent = 'FOUND' + JSON.stringify(found) + 'END';
  }, 2000);
}, 3000);
</script></body>"""


class Page(NamedTuple):
    """What a browser made of a page.

    `dom` is its source after its scripts have run, `console` what they have said; `plots` tells of
    each plot its id, width, texts and number of shapes, `scroll` is the page's width, `outside`
    what lies beyond its sides, `fetched` what it asked for,
    `chosen` whether its menu changes its plot.
    """

    dom: str
    console: list[str]
    plots: list[dict]
    scroll: int
    outside: list[str]
    fetched: list[str]
    chosen: bool


def browser():
    """The browser; the test is skipped without one, and fails if CI is set."""
    for name in ("chromium", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("CI"):
        pytest.fail(MISSING)
    pytest.skip(MISSING)


def load(path, width):
    """The page at `path` in a frame of `width` pixels."""
    wrapper = path.with_name(f"frame-{width}.html")
    wrapper.write_text(LOOK.replace("PAGE", path.name).replace("WIDTH", str(width)))
    # Not in pytest's folder: the browser's socket must have a short name.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        dom, console = _dump(path, folder)
        looked, more = _dump(wrapper, folder)
    found = re.search("FOUND({.*})END", unescape(looked), re.DOTALL)
    assert found, (looked[:2000], more)
    return Page(dom, console + more, **json.loads(found[1]))


def _dump(path, folder):
    """(the page's source, console lines) of one run of the browser."""
    command = [browser(), *FLAGS, f"--user-data-dir={folder}/{path.stem}", "--dump-dom"]
    process = subprocess.Popen(
        [*command, path.as_uri()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"TMPDIR": folder},
    )
    try:
        dom, said = process.communicate(timeout=150)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert dom, said
    return dom, [line for line in said.splitlines() if "CONSOLE" in line]
