"""The page of a report: one file that needs no network."""

from __future__ import annotations

import datetime
from html import escape

import numpy as np
import plotly.io
from plotly.offline import get_plotlyjs

from ...planners.recording import Recording
from .figures import Plot, plots
from .measured import Measured

_CONFIG = {"responsive": True, "displaylogo": False, "displayModeBar": False}

_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""What the browser may load: nothing that is not in the page."""

_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #1c2530; font: 16px/1.45 system-ui, sans-serif; }
main { max-width: 1100px; margin: 0 auto; padding: 24px 16px 48px; }
h1 { font-size: 1.6rem; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 0 0 4px; }
p { margin: 0 0 8px; max-width: 72ch; }
.what, section p { color: #4a5663; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 8px;
  margin: 20px 0 28px; }
dl div { border: 1px solid #d9e0e7; border-radius: 6px; padding: 8px 10px; }
dt { font-size: .8rem; color: #4a5663; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
section { margin: 0 0 32px; break-inside: avoid; }
label { display: block; margin: 0 0 8px; font-size: .9rem; }
select { font: inherit; padding: 2px 6px; }
.plot { width: 100%; overflow: hidden; }
@media (max-width: 480px) { main { padding: 16px 12px 32px; }
  dl { grid-template-columns: repeat(2, 1fr); } dd { font-size: 1.1rem; } }
@media print { @page { size: A4; margin: 14mm; } main { max-width: none; padding: 0; }
  body { font-size: 11pt; } label { display: none; } .plot { width: 180mm; } }
"""

_SCRIPT = """
const every = () => document.querySelectorAll('.js-plotly-plot');
addEventListener('beforeprint', () => every().forEach(p => Plotly.relayout(p, {width: 680})));
addEventListener('afterprint', () => every().forEach(p => Plotly.relayout(p, {autosize: true,
  width: null})));
function choose(name, number) {
  const plot = document.getElementById(name);
  Plotly.restyle(plot, {visible: plot.data.map((_, index) => index === +number)});
}
"""


def page(title: str, recording: Recording, found: Measured) -> str:
    """The report as HTML.

    Args:
        title: its heading.
        recording: whose shape and header it shows.
        found: its figures.
    """
    sections = "\n".join(map(_section, plots(found)))
    figures = "\n".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in headlines(recording, found).items()
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
<script>{get_plotlyjs()}</script>
<script>{_SCRIPT}</script>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="what">{escape(_what(recording, found))}</p>
<dl>
{figures}
</dl>
{sections}
</main>
</body>
</html>
"""


def _section(plot: Plot) -> str:
    drawn = plotly.io.to_html(
        plot.figure,
        config=_CONFIG,
        include_plotlyjs=False,
        full_html=False,
        div_id=plot.name,
        default_height=f"{plot.figure.layout.height}px",
    )
    return (
        f"<section><h2>{escape(plot.title)}</h2>\n<p>{escape(plot.text)}</p>{_choice(plot)}\n"
        f'<div class="plot">{drawn}</div></section>'
    )


def _choice(plot: Plot) -> str:
    """What chooses one of a plot's traces, if only one is seen at once."""
    names = [trace.name for trace in plot.figure.data if trace.visible is not None]
    if len(names) < 2:
        return ""
    options = "".join(
        f'<option value="{n}">{escape(name)}</option>' for n, name in enumerate(names)
    )
    return (
        f"<label>Show <select onchange=\"choose('{plot.name}', value)\">{options}</select></label>"
    )


def _what(recording: Recording, found: Measured) -> str:
    """What was recorded, of which engine, when."""
    began = datetime.datetime.fromtimestamp(recording.header["run"] / 1e9, datetime.timezone.utc)
    models = ", ".join(filter(None, map(str, recording.header.get("models") or [])))
    runs = f"{found.runs} runs, the last from" if found.runs > 1 else "from"
    of = f" of {models}" if models else ""
    return (
        f"{recording.layers} layers, {recording.experts} experts on {recording.ranks} ranks x "
        f"{recording.slots} slots{of}; session {recording.header.get('session', '?')}; "
        f"{runs} {began:%Y-%m-%d %H:%M} UTC."
    )


def headlines(recording: Recording, found: Measured) -> dict[str, str]:
    """The figures at the top, by name."""
    plans, rounds = found.plans, found.rounds
    committed = rounds[rounds["committed"]]
    moves = int(
        committed["rows"].sum() if len(rounds) else plans[plans["committed"]]["moves"].sum()
    )
    ended = plans[~np.isnan(plans["ended"])]["committed"]
    first = found.first_commit
    plans_known = len(plans) > 0 or len(rounds) == 0  # `eplb record` sees rounds alone
    return {
        "steps": f"{found.steps:,}",
        "recorded for": _duration(float(found.edges[-1])),
        "tokens": f"{found.tokens:,}",
        "PAR before the first commit": _par(found.mean_par(0, first)),
        "PAR since then": _par(found.mean_par(first, float("inf"))),
        "plans sent": _count(len(plans), plans_known),
        "plans committed": _count(int(ended.sum()), plans_known),
        "plans given up": _count(int((~ended).sum()), plans_known),
        "rounds committed": f"{len(committed):,}",
        "rounds aborted": f"{len(rounds) - len(committed):,}",
        "slots moved": f"{moves:,}",
        "moved between ranks": _bytes(int(committed["received_bytes"].sum())),
        "steps not recorded": f"{int(found.missing[:, 1].sum()):,}",
        "records lost": f"{recording.lost:,}",
        "dropped by a slow disk": f"{recording.dropped:,}",
        "chunks missing": f"{len(recording.missing):,}",
        "steps of an unknown placement": f"{found.unplaced:,}",
    }


def _count(number: int, known: bool) -> str:
    return f"{number:,}" if known else "–"


def _par(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"


def _bytes(number: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number} bytes"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
