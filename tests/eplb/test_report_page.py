import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import browser
import synthetic
from typer.testing import CliRunner

from flash_eplb.eplb.cli import app
from flash_eplb.eplb.report import figures

PLOTS = {
    "par": ["PAR (1 is perfect)", "time since the first step, s", "mean", "first commit"],
    "par-by-layer": ["layer", "time since the first step, s", "PAR"],
    "rank-loads": ["EP rank", "time since the first step, s", "tokens over the mean rank's"],
    "layers-and-experts": ["layer", "expert", "tokens over the mean expert's"],
    "experts": ["expert", "time since the first step, s", "tokens over the mean expert's"],
    "moves": ["slots moved", "time since the first step, s", "plan given up", "round aborted"],
    "durations": ["milliseconds", "time since the first step, s", "planning", "commit of a round"],
    "missing": ["steps not recorded", "time since the first step, s"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page of a made-up recording."""
    folder = tmp_path_factory.mktemp("report")
    synthetic.record(folder / "recording")
    path = folder / "report.html"
    result = CliRunner().invoke(
        app,
        ["report", str(folder / "recording"), "-o", str(path), "--title", "A <b>made-up</b> day"],
    )
    assert result.exit_code == 0, result.output
    return path


@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_draws_every_plot_within_its_width_and_asks_for_nothing(written, width):
    page = browser.load(written, width)
    assert page.console == []
    assert [plot["id"] for plot in page.plots] == list(PLOTS)
    for plot in page.plots:
        assert set(PLOTS[plot["id"]]) <= set(plot["texts"]), plot
        assert plot["shapes"] > 0, plot
        assert min(width, 1100) - 40 <= plot["width"] <= width, plot
    assert page.scroll <= width
    assert page.outside == []
    assert page.fetched == []
    assert page.chosen
    assert not re.findall(
        r"(?:src|href|action)=[\"']?(?!data:)[^\"' >]*:", page.dom.split("<body>")[1]
    )


def test_a_title_that_is_no_text_is_shown_as_far_as_it_is(written, tmp_path):
    recording, path = str(written.parent / "recording"), tmp_path / "report.html"
    title = os.fsdecode(b"D\xfcsseldorf, Tuesday")
    result = CliRunner().invoke(app, ["report", recording, "-o", str(path), "--title", title])
    assert result.exit_code == 0, result.output
    assert "<h1>D?sseldorf, Tuesday</h1>" in path.read_text()


def test_every_plot_has_a_title_and_a_sentence(written):
    text = written.read_text()
    sections = text.split("<section>")[1:]
    assert len(sections) == len(PLOTS)
    for section in sections:
        assert re.match(r"<h2>[A-Z][^<]{5,60}</h2>\n<p>[A-Z][^<]{30,300}\.</p>", section), section[
            :400
        ]
    assert "@media print" in text
    assert "A &lt;b&gt;made-up&lt;/b&gt; day" in text
    assert "<b>made-up" not in text


def test_a_browser_that_is_missing_skips_by_name_and_fails_in_ci(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception) as skipped:
        browser.browser()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception) as failed:
        browser.browser()
    assert str(skipped.value) == str(failed.value) == browser.MISSING
    assert browser.MISSING in (Path(__file__).parents[2] / "scripts" / "chromium.sh").read_text()


@pytest.mark.parametrize(
    ("seconds", "unit", "end"), [(599, "s", 599), (600, "min", 10), (14_400, "h", 4)]
)
def test_the_time_axis_suits_the_length(seconds, unit, end):
    axis = figures.time_axis(seconds)
    assert axis.title == f"time since the first step, {unit}"
    assert axis.of(seconds) == end
