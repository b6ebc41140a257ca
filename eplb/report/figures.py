"""The plots of a report, each with its title and a sentence that says what to see."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from .measured import COLUMNS, Measured

LAYERS_OF_EXPERTS = 4
"""Layers whose experts are shown over time."""

MOST_POINTS = 1000
"""Points of a scatter plot; of more, as many are taken evenly."""

GOOD, BAD, MAIN, OTHER = "#1b7f5c", "#c2410c", "#1f5fa8", "#8a5a00"
_SHARES = [[0, "#f7fbff"], [0.35, "#9ecae1"], [0.65, "#4292c6"], [1, "#08306b"]]
_EXCESS = [[0, "#fff7ec"], [0.3, "#fdbb84"], [0.65, "#d7301f"], [1, "#4a0000"]]
_BELOW, _MEAN, _ABOVE = "#2166ac", "#f7f7f7", "#b2182b"


class Plot(NamedTuple):
    """A plot with its place on the page: `name` is its id there."""

    name: str
    title: str
    text: str
    figure: go.Figure


class Axis(NamedTuple):
    """The time axis in a unit that suits the recording's length: `seconds / scale` of `unit`."""

    unit: str
    scale: float

    def of(self, seconds: np.ndarray) -> np.ndarray:
        """Seconds of recording in the unit."""
        return np.asarray(seconds, float) / self.scale

    @property
    def title(self) -> str:
        """Name of the axis."""
        return f"time since the first step, {self.unit}"


def time_axis(seconds: float) -> Axis:
    """The axis for a recording that is so long."""
    for unit, scale, most in (("s", 1.0, 600), ("min", 60.0, 4 * 3600)):
        if seconds < most:
            return Axis(unit, scale)
    return Axis("h", 3600.0)


def plots(found: Measured) -> list[Plot]:
    """All plots of a report, in order."""
    axis = time_axis(found.edges[-1])
    every = [
        _par(found, axis),
        _par_by_layer(found, axis),
        _rank_loads(found, axis),
        _layers_and_experts(found),
        _experts(found, axis),
        _moves(found, axis),
        _durations(found, axis),
        _missing(found, axis),
    ]
    return [plot for plot in every if plot is not None]


def _figure(x: str, y: str, height: int = 320, top: int = 12) -> go.Figure:
    figure = go.Figure()
    figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 52, "r": 14, "t": top, "b": 44},
        font={"size": 12, "family": "system-ui, sans-serif", "color": "#1c2530"},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
        bargap=0,
        dragmode=False,
    )
    # Plotly sets an axis title into the plot where a colour bar has moved the margins.
    figure.add_annotation(
        text=x, xref="paper", yref="paper", x=0.5, y=0, yshift=-22, yanchor="top",
        showarrow=False, font={"size": 13}, name="x title",
    )  # fmt: skip
    figure.update_yaxes(title={"text": y, "standoff": 6})
    return figure


def _heat_map(
    z: np.ndarray, x: np.ndarray, colours: list, bar: str, hover: str, **more: Any
) -> go.Heatmap:
    colour_bar = {
        "orientation": "h",
        "thickness": 10,
        "len": 1,
        "x": 0.5,
        "y": 1.02,
        "yanchor": "bottom",
        "title": {"text": bar, "side": "top"},
    }
    return go.Heatmap(
        z=z.astype(np.float32),
        x=x.astype(np.float32),
        colorscale=colours,
        colorbar=colour_bar,
        hovertemplate=hover + "<extra></extra>",
        **more,
    )


def _height(rows: int, least: int = 260, most: int = 620) -> int:
    """Of a heat map with so many rows."""
    return int(np.clip(140 + 8 * rows, least, most))


def _par(found: Measured, axis: Axis) -> Plot:
    """Mean over layers, and between which values nine in ten layers lie."""
    ends, par = _binned(found.ends, found.par)
    figure = _figure(axis.title, "PAR (1 is perfect)", top=36)
    if len(ends):
        low, high = np.nanpercentile(par, [5, 95], axis=1)
        x = axis.of(ends)
        line = {"x": x, "mode": "lines"}
        hidden = {"width": 0}
        figure.add_scatter(**line, y=high, line=hidden, showlegend=False, hoverinfo="skip")
        figure.add_scatter(
            **line, y=low, line=hidden, fill="tonexty", fillcolor="rgba(31,95,168,.18)",
            name="nine in ten layers", hoverinfo="skip",
        )  # fmt: skip
        figure.add_scatter(**line, y=np.nanmean(par, axis=1), line={"color": MAIN}, name="mean")
    for begin, end in axis.of(found.gaps).tolist():
        figure.add_vrect(x0=begin, x1=end, fillcolor="#fff", line_width=0, layer="above")
    if np.isfinite(found.first_commit):
        figure.add_vline(
            x=float(axis.of(np.array(found.first_commit))), line={"dash": "dot", "color": GOOD},
            annotation={"text": "first commit", "font": {"color": GOOD}},
        )  # fmt: skip
    return Plot(
        "par",
        "Balance over time",
        f"PAR is the busiest rank's tokens over the mean rank's, per layer and episode of "
        f"{found.episode_steps} steps, as measured. Lower is better: after the first commit the "
        "line should fall, and rise again only where the traffic changes. Blank is a time "
        "without steps.",
        figure,
    )


def _binned(ends: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Episodes without tokens left out, then at most 240 means: (when they end, [n, layers])."""
    with_tokens = ~np.isnan(values).all(axis=1)
    ends, values = ends[with_tokens], values[with_tokens]
    groups = np.array_split(np.arange(len(ends)), min(240, max(1, len(ends))))
    groups = [group for group in groups if len(group)]
    layers = values.shape[1]
    means = np.full((len(groups), layers), np.nan)
    for row, group in zip(means, groups, strict=True):
        known = ~np.isnan(values[group])
        total = np.where(known, values[group], 0).sum(axis=0)
        np.divide(total, known.sum(axis=0), out=row, where=known.any(axis=0))
    return np.array([ends[group[-1]] for group in groups]), means


def _par_by_layer(found: Measured, axis: Axis) -> Plot:
    ends, par = _binned(found.ends, found.par)
    figure = _figure(axis.title, "layer", _height(found.par.shape[1]), top=20)
    if len(ends):
        most = max(1.05, float(np.nanpercentile(par, 99)))
        edges, cells = found.cells(np.concatenate([found.edges[:1], ends]), par)
        hover = "layer %{y}, %{x:.1f} " + axis.unit + ": PAR %{z:.3f}"
        figure.add_trace(
            _heat_map(cells.T, axis.of(edges), _EXCESS, "PAR", hover, zmin=1, zmax=most)
        )
    figure.update_yaxes(autorange="reversed", dtick=max(1, found.par.shape[1] // 12))
    return Plot(
        "par-by-layer",
        "Balance of each layer",
        "Each row is a layer, dark is out of balance. A row that stays dark is one that the plans "
        "do not help or leave alone. White is a time without steps.",
        figure,
    )


def _rank_loads(found: Measured, axis: Axis) -> Plot:
    load = found.load.sum(axis=1).astype(float)
    mean = load.mean(axis=1, keepdims=True)
    shares = np.divide(load, mean, out=np.full_like(load, np.nan), where=mean > 0)
    away = max(0.05, float(np.nanmax(np.abs(shares - 1), initial=0)))
    low, high = max(0.0, 1 - away), 1 + away  # no rank gets less than nothing
    colours = [[0, _BELOW], [(1 - low) / (high - low), _MEAN], [1, _ABOVE]]
    figure = _figure(axis.title, "EP rank", _height(load.shape[1]), top=20)
    hover = "rank %{y}, %{x:.1f} " + axis.unit + ": %{z:.2f} of the mean"
    edges, cells = found.cells(found.edges, shares)
    figure.add_trace(
        _heat_map(
            cells.T, axis.of(edges), colours, "tokens over the mean rank's", hover,
            zmin=low, zmax=high,
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", dtick=max(1, load.shape[1] // 8))
    return Plot(
        "rank-loads",
        "Load of the ranks",
        "The tokens of all layers that each rank got, over the mean: red ranks work for the "
        "others, blue ones wait. Even ranks are pale.",
        figure,
    )


def _even_shares(heat: np.ndarray) -> np.ndarray:
    """Heat [..., experts] over the mean of the experts; nan where there is none."""
    mean = heat.mean(axis=-1, keepdims=True)
    return np.divide(heat, mean, out=np.full(heat.shape, np.nan), where=mean > 0)


def _layers_and_experts(found: Measured) -> Plot:
    shares = _even_shares(found.heat.sum(axis=0))
    figure = _figure("expert", "layer", _height(len(shares)), top=20)
    experts = np.arange(shares.shape[1])
    hover = "layer %{y}, expert %{x}: %{z:.2f} of the mean expert"
    figure.add_trace(
        _heat_map(
            shares, experts, _SHARES, "tokens over the mean expert's", hover, **_range(shares)
        )
    )
    figure.update_yaxes(autorange="reversed", dtick=max(1, len(shares) // 12))
    return Plot(
        "layers-and-experts",
        "Which experts are hot",
        "All tokens of the recording by layer and expert. Dark cells are experts that get many "
        "times the mean; they are the ones that deserve replicas.",
        figure,
    )


def _range(shares: np.ndarray) -> dict[str, float]:
    """Colours for all but the few largest."""
    known = shares[~np.isnan(shares)]
    return {"zmin": 0, "zmax": max(2.0, float(np.percentile(known, 99.5)) if len(known) else 2.0)}


def _experts(found: Measured, axis: Axis) -> Plot:
    """The experts of a few layers over time, one layer at once."""
    total = found.load.sum(axis=0).astype(float)
    uneven = total.max(axis=1) / np.maximum(total.mean(axis=1), 1)
    layers = np.argsort(-uneven, kind="stable")[:LAYERS_OF_EXPERTS]
    experts = found.heat.shape[2]
    figure = _figure(axis.title, "expert", _height(experts, most=520), top=20)
    hover = "expert %{y}, %{x:.1f} " + axis.unit + ": %{z:.2f} of the mean expert"
    for number, layer in enumerate(layers):
        edges, shares = found.cells(found.edges, _even_shares(found.heat[:, layer]))
        figure.add_trace(
            _heat_map(
                shares.T, axis.of(edges), _SHARES, "tokens over the mean expert's", hover,
                **_range(shares), visible=number == 0, name=f"layer {layer}",
            )
        )  # fmt: skip
    figure.update_yaxes(autorange="reversed", dtick=max(1, experts // 8))
    return Plot(
        "experts",
        "Experts over time",
        "The layers whose ranks were least even, one at a time. A row that changes its colour is "
        "an expert that another topic made hot or cold.",
        figure,
    )


def _moves(found: Measured, axis: Axis) -> Plot:
    """Slots moved per column, and the plans sent."""
    rounds, plans = found.rounds, found.plans
    figure = _figure(axis.title, "slots moved", top=36)
    done = rounds[rounds["committed"]]
    bars = _bars(found, axis, done["end"], done["rows"])
    if len(rounds) == 0:
        known = plans[plans["committed"]]
        bars = _bars(found, axis, known["ended"], known["moves"])
    figure.add_bar(**bars, marker=_solid(MAIN), name="slots moved")
    top = float(np.nanmax(bars["y"], initial=1)) * 1.12
    kinds = (
        ("plan committed", GOOD, "triangle-up", plans[plans["committed"]]["ended"], top),
        ("plan given up", BAD, "x", _given_up(plans), top * 1.08),
        ("round aborted", OTHER, "line-ns-open", rounds[~rounds["committed"]]["end"], top * 1.16),
    )
    for name, colour, symbol, when, height in kinds:
        x = axis.of(_thinned(when))
        if len(x):
            figure.add_scatter(
                x=x, y=np.full(len(x), height), mode="markers", name=name,
                marker={"color": colour, "symbol": symbol, "size": 8},
                hovertemplate="%{x:.2f} " + axis.unit,
            )  # fmt: skip
    figure.update_xaxes(range=_all_of(found, axis))
    return Plot(
        "moves",
        "Plans, commits and moves",
        "Bars are slots that were written by committed rounds; the marks above say how plans and "
        "rounds ended. Moves should follow changes of the traffic and cease when it is steady.",
        figure,
    )


def _solid(colour: str) -> dict[str, Any]:
    """A bar that is seen however narrow it is."""
    return {"color": colour, "line": {"color": colour, "width": 1.5}}


def _bars(found: Measured, axis: Axis, when: np.ndarray, amounts: np.ndarray) -> dict[str, Any]:
    """x, y and width of bars that sum up amounts; none where there is nothing."""
    sums, edges = np.histogram(
        when, COLUMNS, (0, max(1e-9, float(found.edges[-1]))), weights=amounts
    )
    middle, width = (edges[1:] + edges[:-1]) / 2, edges[1] - edges[0]
    return {
        "x": axis.of(middle),
        "y": np.where(sums > 0, sums, np.nan),
        "width": float(axis.of(width)),
    }


def _given_up(plans: np.ndarray) -> np.ndarray:
    return plans[~plans["committed"] & ~np.isnan(plans["ended"])]["ended"]


def _all_of(found: Measured, axis: Axis) -> list[float]:
    """The range of the time axis, with room for a mark at its ends."""
    end = float(axis.of(found.edges[-1:])[0])
    return [-0.01 * end, 1.01 * end]


def _thinned(values: np.ndarray) -> np.ndarray:
    """At most `MOST_POINTS` of the rows, evenly."""
    if len(values) <= MOST_POINTS:
        return values
    return values[np.linspace(0, len(values) - 1, MOST_POINTS).astype(int)]


def _durations(found: Measured, axis: Axis) -> Plot | None:
    """What planning, transfers, commits and deliveries took."""
    plans, rounds = _thinned(found.plans), _thinned(found.rounds)
    figure = _figure(axis.title, "milliseconds", top=60)
    kinds = (
        ("planning", MAIN, "circle", plans["sent"], plans["seconds"]),
        ("plan sent to committed", GOOD, "triangle-up", plans["sent"],
         np.where(plans["committed"], plans["ended"] - plans["sent"], np.nan)),
        ("transfer of a round", OTHER, "diamond", rounds["end"], rounds["transfer"]),
        ("commit of a round", BAD, "x", rounds["end"],
         np.where(rounds["committed"], rounds["commit"], np.nan)),
    )  # fmt: skip
    for name, colour, symbol, when, seconds in kinds:
        known = ~np.isnan(seconds) & (seconds > 0)
        if known.any():
            figure.add_scatter(
                x=axis.of(when[known]), y=1000 * seconds[known], mode="markers", name=name,
                marker={"color": colour, "symbol": symbol, "size": 7, "opacity": 0.8},
                hovertemplate="%{x:.2f} " + axis.unit + ": %{y:.3g} ms",
            )  # fmt: skip
    if not figure.data:
        return None
    figure.update_yaxes(type="log", dtick=1, exponentformat="none")
    figure.update_xaxes(range=_all_of(found, axis))
    return Plot(
        "durations",
        "Planning, transfers and commits",
        "How long each took, on a logarithmic axis. Planning and transfers run beside the steps; "
        "only a commit is time that the engine waits.",
        figure,
    )


def _missing(found: Measured, axis: Axis) -> Plot | None:
    if not len(found.missing):
        return None
    figure = _figure(axis.title, "steps not recorded", height=240)
    bars = _bars(found, axis, *found.missing.T)
    figure.add_bar(**bars, marker=_solid(BAD))
    figure.update_yaxes(range=[0, 1.1 * float(np.nanmax(bars["y"], initial=1))])
    figure.update_xaxes(range=_all_of(found, axis))
    return Plot(
        "missing",
        "Steps that are not in the recording",
        "Dummy steps of an idle engine, steps of a phase that does not count, and steps that were "
        "lost or dropped. A busy engine should show nothing here.",
        figure,
    )
