"""Figures of posterior draws.

Every function takes plain arrays and returns a `matplotlib.figure.Figure`, made without pyplot:
nothing is shown, no global state is touched, no display is needed. `figure.savefig("x.png")`
writes it, and a notebook shows it.

Draws have shape `(chain, draw, ...)`. Densities are kernel estimates, reflected where
draws pile up at an end, so that a positive quantity has no density below zero; integers and
booleans are shown as proportions.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from abduce.errors import InvalidValue
from abduce.inference.drawing import (
    COLOURS,
    DIVERGENT,
    Element,
    central_range,
    check_divergences,
    check_interval,
    draw_bars,
    draw_density,
    draw_marks,
    elements_of,
    is_few_valued,
    legend,
    new_figure,
    quantiles,
    rug,
    shorten,
    thin,
)
from abduce.inference.training_plot import plot_objective

__all__ = [
    "plot_compare",
    "plot_intervals",
    "plot_objective",
    "plot_pairs",
    "plot_predictive_check",
    "plot_trace",
]


def plot_trace(
    draws: Mapping[str, np.ndarray],
    names: Sequence[str] | None = None,
    *,
    divergences=None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Sequence] | None = None,
    max_rows: int = 12,
):
    """Density and path of every chain, one row per scalar element.

    What to see: the chains' densities coincide, and the paths look like a flat band without
    drifts or standstills. Red ticks mark divergent transitions.

    Args:
        draws: Site to draws, `(chain, draw, ...)`.
        names: Sites or row labels to show; all by default.
        divergences: Boolean, `(chain, draw)`.
        dims: Site to the names of its axes.
        coords: Name of an axis to its labels.
        max_rows: Elements beyond this many are left out, which the title says.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        UnknownAddress: A name matches nothing.
        InvalidValue: Shapes do not fit, or there is nothing to show.
    """
    elements, title = elements_of(draws, names, dims, coords, max_rows)
    divergences = check_divergences(divergences, elements)
    count = len(elements)
    figure, axes = new_figure(count, 2, (9.5, 1.55 * count + 0.6), ratios=[1, 2], title=title)
    for row, element in enumerate(elements):
        left, right = axes[row]
        values = element.values
        draw = draw_marks if is_few_valued(element) else draw_density
        for chain, path in enumerate(values):
            colour = COLOURS[chain % len(COLOURS)]
            draw(left, path, colour, width=1.2)
            keep = thin(len(path))
            right.plot(keep, path[keep], color=colour, linewidth=0.5, alpha=0.75)
        if divergences is not None and divergences.any():
            limits = left.get_xlim()
            rug(right, np.nonzero(divergences.any(axis=0))[0])
            rug(left, values[divergences])
            left.set_xlim(limits)  # a far divergence must not squeeze the density
        label = shorten(element.label, 60)
        if len(label) > 16:
            label = label.replace("[", "\n[", 1)
        left.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        left.set_yticks([])
        left.set_ylim(bottom=0)
        right.margins(x=0.01)
        if row < count - 1:
            right.tick_params(labelbottom=False)
    axes[-1][0].set_xlabel("value", fontsize=9)
    axes[-1][1].set_xlabel("draw", fontsize=9)
    return figure


def plot_intervals(
    draws: Mapping[str, np.ndarray],
    names: Sequence[str] | None = None,
    *,
    interval: float = 0.9,
    reference: float | None = None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Sequence] | None = None,
    max_rows: int = 60,
):
    """Median, 50% and `interval` equal-tailed intervals, one line per scalar element.

    Args:
        draws: Site to draws, `(chain, draw, ...)`.
        names: Sites or row labels to show; all by default.
        interval: Probability inside the thin line; the thick one holds 50%.
        reference: Draws a vertical line here, at 0 for effects, say.
        dims: Site to the names of its axes.
        coords: Name of an axis to its labels.
        max_rows: Elements beyond this many are left out, which the title says.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        UnknownAddress: A name matches nothing.
        InvalidValue: Shapes do not fit, or there is nothing to show.
    """
    check_interval(interval)
    elements, title = elements_of(draws, names, dims, coords, max_rows)
    return _forest({"": elements}, interval, reference, title)


def plot_compare(
    posteriors: Mapping[str, Mapping[str, np.ndarray]],
    names: Sequence[str] | None = None,
    *,
    kind: str = "density",
    interval: float = 0.9,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Sequence] | None = None,
    max_rows: int = 12,
):
    """Several posteriors of the same quantities: two algorithms, two priors, two data sets.

    Args:
        posteriors: Label (shown in the legend) to draws.
        names: Sites or row labels to show; by default all that every posterior has.
        kind: "density" (overlaid, with the interval below) or "interval" (a forest).
        interval: Probability inside the equal-tailed interval.
        dims: Site to the names of its axes.
        coords: Name of an axis to its labels.
        max_rows: Elements beyond this many are left out, which the title says.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        UnknownAddress: A name matches nothing.
        InvalidValue: Shapes do not fit, `kind` is unknown, or there is nothing in common.
    """
    check_interval(interval)
    if kind not in ("density", "interval"):
        raise InvalidValue(
            f'plot_compare: unknown kind {kind!r}; choose from "density", "interval".'
        )
    shared = [
        site
        for site in next(iter(posteriors.values()), {})
        if all(site in draws for draws in posteriors.values())
    ]
    if not shared:
        raise InvalidValue("plot_compare: the posteriors have no site in common.")
    sets, title = {}, None
    for label, draws in posteriors.items():
        common = {site: draws[site] for site in shared}
        sets[label], title = elements_of(common, names, dims, coords, max_rows)
    rows = {tuple(e.label for e in elements) for elements in sets.values()}
    if len(rows) > 1:
        raise InvalidValue("plot_compare: a site has different shapes in the posteriors.")
    if kind == "interval":
        return _forest(sets, interval, None, title)

    first = next(iter(sets.values()))
    columns = 2 if len(first) in (2, 4) else min(3, len(first))
    count = -(-len(first) // columns)
    figure, axes = new_figure(count, columns, (3.4 * columns, 2.3 * count + 0.5), title=title)
    flat = axes.ravel()
    for axis in flat[len(first) :]:
        axis.set_visible(False)
    for axis, elements in zip(flat, zip(*sets.values(), strict=True), strict=False):
        _compare_one(axis, elements, interval)
    legend(figure, list(sets))
    return figure


def plot_predictive_check(
    observed,
    replicated,
    *,
    x=None,
    kind: str | None = None,
    label: str = "y",
    x_label: str | None = None,
    num_replicates: int = 50,
):
    """Observed data against data replicated from the posterior predictive distribution.

    What to see: the observed line or points look like one more replicate.

    Args:
        observed: Data, shape `(...)`; NaN is skipped.
        replicated: Draws of it, shape `(chain, draw, ...)`.
        x: Where the observations lie, as many as there are; only for bands.
        kind: "density" (of all values of one replicate), or "band" (quantiles of each value over
            the replicates). By default a band where `x` is given, else a density.
        label: What was observed.
        x_label: What `x` is.
        num_replicates: Densities drawn, spread evenly over the draws.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InvalidValue: Shapes do not fit, or `kind` is unknown.
    """
    observed, replicated = np.asarray(observed), np.asarray(replicated)
    if replicated.ndim < 2 or replicated.shape[2:] != observed.shape or not replicated.size:
        raise InvalidValue(
            f"plot_predictive_check: replicated must have shape (chain, draw, "
            f"{', '.join(map(str, observed.shape))}), got {replicated.shape}."
        )
    is_discrete = observed.dtype.kind in "iub"
    observed = observed.astype(np.float64).ravel()
    replicates = replicated.reshape(-1, observed.size).astype(np.float64)
    kind = kind or ("density" if x is None else "band")
    figure, ((axis,),) = new_figure(1, 1, (7.5, 4.4), ticks=8)
    if kind == "band":
        positions = np.arange(observed.size) if x is None else np.asarray(x).ravel()
        if positions.shape != observed.shape:
            raise InvalidValue(
                f"plot_predictive_check: x has {positions.size} values, observed {observed.size}."
            )
        _draw_bands(axis, positions, observed, replicates)
        axis.set_xlabel(x_label or ("index" if x is None else "x"))
        axis.set_ylabel(label)
    elif kind == "density":
        _draw_replicates(axis, observed, replicates, is_discrete, num_replicates)
        axis.set_xlabel(label)
        axis.set_ylabel("proportion" if is_discrete else "density")
    else:
        raise InvalidValue(
            f'plot_predictive_check: unknown kind {kind!r}; choose from "density", "band".'
        )
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def plot_pairs(
    draws: Mapping[str, np.ndarray],
    names: Sequence[str] | None = None,
    *,
    divergences=None,
    dims: Mapping[str, Sequence[str | None]] | None = None,
    coords: Mapping[str, Sequence] | None = None,
    max_rows: int = 6,
):
    """Scatter plots of every pair of elements, densities on the diagonal.

    What to see: ridges (a reparametrization would help), separate clouds (several modes), and
    divergent transitions, in red, crowded in one corner (a neck that the sampler cannot enter).

    Args:
        draws: Site to draws, `(chain, draw, ...)`, all with the same chains and draws.
        names: Sites or row labels to show; all by default.
        divergences: Boolean, `(chain, draw)`.
        dims: Site to the names of its axes.
        coords: Name of an axis to its labels.
        max_rows: Elements beyond this many are left out, which the title says.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        UnknownAddress: A name matches nothing.
        InvalidValue: Shapes do not fit, or there are fewer than two elements.
    """
    elements, title = elements_of(draws, names, dims, coords, max_rows)
    if len(elements) < 2:
        raise InvalidValue(
            "plot_pairs: needs at least two scalar elements; use plot_trace for one."
        )
    if len({e.values.shape for e in elements}) > 1:
        raise InvalidValue("plot_pairs: the sites differ in their numbers of chains or draws.")
    divergences = check_divergences(divergences, elements)
    n = len(elements)
    side = max(1.9 * n, 4.5)
    figure, axes = new_figure(n, n, (side, side), title=title, ticks=4)
    flat = [element.values.ravel() for element in elements]
    ranges = [_padded_range(x) for x in flat]
    keep = thin(len(flat[0]))
    bad = np.zeros(len(flat[0]), bool) if divergences is None else divergences.ravel()
    for i in range(n):
        for j in range(n):
            axis = axes[i][j]
            if j > i:
                axis.set_visible(False)
                continue
            if i == j:
                draw = draw_bars if is_few_valued(elements[i]) else draw_density
                draw(axis, flat[i], COLOURS[0], **({} if draw is draw_bars else {"fill": True}))
                axis.set_yticks([])
                axis.set_ylim(bottom=0)
            else:
                axis.plot(
                    flat[j][keep],
                    flat[i][keep],
                    ".",
                    color=COLOURS[0],
                    markersize=2.5,
                    alpha=0.35,
                    markeredgewidth=0,
                    rasterized=True,
                )
                axis.plot(
                    flat[j][bad],
                    flat[i][bad],
                    ".",
                    color=DIVERGENT,
                    markersize=5,
                    markeredgewidth=0,
                )
            axis.set_xlim(*ranges[j])
            if i == n - 1:
                axis.set_xlabel(shorten(elements[j].label, 22), fontsize=9)
                axis.tick_params(axis="x", labelrotation=30)
            else:
                axis.tick_params(labelbottom=False)
            if j == 0 and i > 0:
                axis.set_ylabel(shorten(elements[i].label, 22), fontsize=9)
            elif j > 0:
                axis.tick_params(labelleft=False)
    if divergences is not None and divergences.any():
        figure.text(
            0.98, 0.98, f"{int(divergences.sum())} divergent", color=DIVERGENT, ha="right", va="top"
        )
    return figure


def _padded_range(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def _compare_one(axis, elements: Sequence[Element], interval: float) -> None:
    """One quantity: a density for each posterior, its interval below."""
    few = all(is_few_valued(element) for element in elements)
    tops = []
    for j, element in enumerate(elements):
        colour, values = COLOURS[j % len(COLOURS)], element.values.ravel()
        if few:
            tops.append(draw_bars(axis, values, colour, rank=j, of=len(elements)))
        else:
            tops.append(draw_density(axis, values, colour, fill=True))
    step = 0.07 * max(tops)
    for j, element in enumerate(elements):
        low, middle, high = quantiles(element, [(1 - interval) / 2, 0.5, (1 + interval) / 2])
        colour, level = COLOURS[j % len(COLOURS)], -(j + 1) * step
        axis.plot([low, high], [level, level], color=colour, linewidth=2.2)
        axis.plot([middle], [level], "o", color=colour, markersize=4.5)
    axis.set_ylim(bottom=-(len(elements) + 0.8) * step)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    axis.set_title(shorten(elements[0].label, 34), fontsize=10)


def _forest(sets: Mapping[str, list[Element]], interval, reference, title):
    first = next(iter(sets.values()))
    spread = 0.55 if len(sets) > 1 else 0.0
    height = max(1.8, 0.28 * len(first) * max(1, 0.6 * len(sets)) + 0.9)
    figure, ((axis,),) = new_figure(1, 1, (7.5, height), title=title, ticks=8)
    probs = [(1 - interval) / 2, 0.25, 0.5, 0.75, (1 + interval) / 2]
    for j, elements in enumerate(sets.values()):
        shift = spread * (j / max(len(sets) - 1, 1) - 0.5)
        colour = COLOURS[j % len(COLOURS)]
        for i, element in enumerate(elements):
            q = quantiles(element, probs)
            axis.plot([q[0], q[4]], [i + shift] * 2, color=colour, linewidth=1.3)
            axis.plot([q[1], q[3]], [i + shift] * 2, color=colour, linewidth=3.6)
            axis.plot(
                [q[2]],
                [i + shift],
                "o",
                color="white",
                markeredgecolor=colour,
                markersize=5,
                markeredgewidth=1.5,
            )
    axis.set_yticks(range(len(first)), [shorten(e.label, 40) for e in first], fontsize=9)
    axis.set_ylim(len(first) - 0.4, -0.6)  # the first row on top
    axis.grid(axis="x", color="#E5E5E5", linewidth=0.7)
    axis.set_axisbelow(True)
    axis.set_xlabel(f"median, 50% and {100 * interval:.6g}% interval", fontsize=9)
    if reference is not None:
        axis.axvline(reference, color="#777777", linewidth=1, linestyle="--", zorder=0)
    if len(sets) > 1:
        legend(figure, list(sets))
    return figure


def _draw_bands(axis, positions, observed, replicates) -> None:
    order = np.argsort(positions, kind="stable")
    with np.errstate(invalid="ignore"):
        q = np.nanquantile(replicates, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)[:, order]
    where = positions[order]
    axis.fill_between(
        where, q[0], q[4], color=COLOURS[5], alpha=0.3, linewidth=0, label="90% of replicates"
    )
    axis.fill_between(
        where, q[1], q[3], color=COLOURS[0], alpha=0.35, linewidth=0, label="50% of replicates"
    )
    axis.plot(where, q[2], color=COLOURS[0], linewidth=1.4, label="median")
    axis.plot(where, observed[order], "o", color="black", markersize=3, label="observed")
    axis.margins(x=0.02)


def _draw_replicates(axis, observed, replicates, is_discrete, num_replicates) -> None:
    chosen = np.unique(
        np.linspace(0, len(replicates) - 1, min(num_replicates, len(replicates))).astype(int)
    )
    inside = np.isfinite(replicates[chosen])
    shown = replicates[chosen][inside]
    if is_discrete and len(np.unique(shown)) <= 40:
        points = np.unique(np.concatenate([shown, observed[np.isfinite(observed)]]))
        shares = (replicates[:, :, None] == points).mean(axis=1)
        low, middle, high = np.quantile(shares, [0.05, 0.5, 0.95], axis=0)
        axis.vlines(
            points, low, high, color=COLOURS[5], linewidth=7, alpha=0.6, label="90% of replicates"
        )
        axis.plot(points, middle, "_", color=COLOURS[0], markersize=9, label="median")
        share = (observed[:, None] == points).mean(axis=0)
        axis.plot(points, share, "o", color="black", markersize=4.5, label="observed")
    else:
        for i, row in enumerate(chosen):
            name = f"{len(chosen)} replicates" if i == 0 else None
            draw_density(axis, replicates[row], COLOURS[0], width=0.7, alpha=0.35, label=name)
        draw_density(axis, observed, "black", width=2, label="observed")
        # a heavy-tailed replicate must not squeeze everything else into one bin
        seen = observed[np.isfinite(observed)]
        low, high = central_range(np.concatenate([shown, seen]))
        low, high = min(low, seen.min()), max(high, seen.max())
        pad = 0.04 * (high - low) or 1.0
        axis.set_xlim(low - pad, high + pad)
    axis.set_ylim(bottom=0)
