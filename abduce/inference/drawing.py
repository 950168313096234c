"""Pieces that the figures are made of: elements, densities, axes in one style."""

from dataclasses import dataclass

import numpy as np

from abduce.errors import InvalidValue, UnknownAddress, suggest
from abduce.inference.table import element_labels

__all__ = [
    "COLOURS",
    "DIVERGENT",
    "Element",
    "central_range",
    "check_divergences",
    "check_interval",
    "density",
    "draw_bars",
    "draw_density",
    "draw_marks",
    "elements_of",
    "is_few_valued",
    "legend",
    "new_figure",
    "quantiles",
    "rug",
    "shorten",
    "thin",
]

# Okabe and Ito's palette: distinguishable with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#000000")
INK, DIVERGENT = "#333333", "#D00000"
MAX_DRAWN = 2000  # points of one line or cloud


@dataclass(frozen=True)
class Element:
    """One scalar of one site: label and draws, shape (chain, draw)."""

    label: str
    values: np.ndarray
    is_discrete: bool


def elements_of(draws, names, dims, coords, limit) -> tuple[list[Element], str | None]:
    """The scalars to show, at most `limit`, and a title if that leaves some out."""
    found: list[tuple[str, Element]] = []
    for site, x in draws.items():
        x = np.asarray(x)
        if x.ndim < 2 or 0 in x.shape[:2]:
            raise InvalidValue(
                f'plot: draws["{site}"] must have shape (chain, draw, ...) with at least one '
                f"draw, got {x.shape}."
            )
        labels = element_labels(site, x.shape[2:], (dims or {}).get(site), coords)
        is_discrete = x.dtype.kind in "iub"
        flat = x.reshape(*x.shape[:2], len(labels)).astype(np.float64)
        found += [
            (site, Element(label, flat[:, :, i], is_discrete)) for i, label in enumerate(labels)
        ]
    if names is not None:
        known = list(dict.fromkeys([*draws, *(e.label for _, e in found)]))
        for name in names:
            if name not in known:
                raise UnknownAddress(
                    f'plot: "{name}" is no site or element ({", ".join(known[:20])}).'
                    + suggest(name, known)
                )
        found = [(s, e) for name in names for s, e in found if name in (s, e.label)]
    if not found:
        raise InvalidValue("plot: there is nothing to show.")
    title = None
    if len(found) > limit:
        title = f"{limit} of {len(found)} elements; choose others with names=, more with max_rows="
    return [e for _, e in found[:limit]], title


def check_divergences(divergences, elements):
    if divergences is None:
        return None
    divergences = np.asarray(divergences, dtype=bool)
    if divergences.shape != elements[0].values.shape:
        raise InvalidValue(
            f"plot: divergences must have shape (chain, draw) = {elements[0].values.shape}, got "
            f"{divergences.shape}."
        )
    return divergences


def check_interval(interval: float) -> None:
    if not 0 < interval < 1:
        raise InvalidValue(f"plot: interval must lie strictly between 0 and 1, got {interval}.")


def new_figure(rows, columns, size, *, ratios=None, title=None, ticks=5):
    """A figure and its axes (an array of shape `(rows, columns)`), without pyplot."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained", dpi=110)
    figure.set_facecolor("white")
    axes = figure.subplots(
        rows, columns, squeeze=False, gridspec_kw={"width_ratios": ratios} if ratios else None
    )
    for axis in axes.ravel():
        axis.spines[["top", "right"]].set_visible(False)
        axis.spines[["left", "bottom"]].set_color("#999999")
        axis.tick_params(labelsize=8, colors=INK)
        axis.locator_params(nbins=ticks)
    if title:
        figure.suptitle(title, fontsize=9, color=INK)
    return figure, axes


def legend(figure, labels: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=COLOURS[i % len(COLOURS)], lw=2.5) for i in range(len(labels))]
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=min(len(labels), 5),
        frameon=False,
        fontsize=9,
    )


def shorten(label: str, width: int) -> str:
    return label if len(label) <= width else label[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def thin(count: int) -> np.ndarray:
    """Indices, evenly spread, of at most `MAX_DRAWN` out of `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_DRAWN)).astype(int))


def rug(axis, positions) -> None:
    """Red ticks just above the x axis."""
    axis.plot(
        positions,
        np.full(len(positions), 0.035),
        "|",
        color=DIVERGENT,
        markersize=7,
        markeredgewidth=1,
        transform=axis.get_xaxis_transform(),
        zorder=5,
    )


def quantiles(element: Element, probs) -> np.ndarray:
    values = element.values[np.isfinite(element.values)]
    if not len(values):
        return np.full(len(probs), np.nan)
    return np.quantile(values, probs, method="inverted_cdf" if element.is_discrete else "linear")


def central_range(values: np.ndarray) -> tuple[float, float]:
    """Where nearly all draws are: a few far ones must not squeeze the rest into a spike."""
    low, high = np.quantile(values, [0.005, 0.995])
    pad = 0.25 * (high - low)
    return max(float(values.min()), low - pad), min(float(values.max()), high + pad)


def density(values: np.ndarray, size: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian kernel density on a grid over the central range, with Silverman's bandwidth.

    Where draws pile up at an end, as a positive quantity's do at 0, that end is an edge and the
    estimate is reflected there; elsewhere the curve runs out smoothly.
    """
    low, high = central_range(values)
    if not low < high:  # all but a few draws are equal
        low, high = float(values.min()), float(values.max())
    total = len(values)
    values = values[(values >= low) & (values <= high)]
    spread = np.subtract(*np.quantile(values, [0.75, 0.25])) / 1.34
    spread = min(s for s in (values.std(), spread, high - low) if s > 0)
    bandwidth = max(0.9 * spread * total**-0.2, (high - low) / size)
    room = 3 * bandwidth
    left = low if _is_edge(values - low, bandwidth) else low - room
    right = high if _is_edge(high - values, bandwidth) else high + room
    if low >= 0:
        left = max(left, 0.0)
    step = (right - left) / (size - 1)
    position = (values - left) / step  # linear binning: each draw shared by its two neighbours
    cell = np.minimum(position.astype(int), size - 2)
    share = position - cell
    counts = np.bincount(cell, 1 - share, size) + np.bincount(cell + 1, share, size)
    mirrored = np.concatenate([counts[::-1], counts, counts[::-1]])
    frequency = np.fft.rfftfreq(len(mirrored), step)
    smooth = np.fft.irfft(
        np.fft.rfft(mirrored) * np.exp(-2 * (np.pi * frequency * bandwidth) ** 2), len(mirrored)
    )[size : 2 * size]
    return np.linspace(left, right, size), np.maximum(smooth, 0) / (total * step)


def _is_edge(distance: np.ndarray, bandwidth: float) -> bool:
    """Whether the density just inside an end is most of the highest density."""
    near = np.mean(distance < bandwidth)
    width = max(int(np.ceil(distance.max() / bandwidth)), 1)
    highest = np.histogram(distance, bins=width)[0].max() / len(distance)
    return near > 0.6 * highest


def draw_density(axis, values, colour, *, width=1.5, fill=False, alpha=1.0, label=None) -> float:
    """Draws a density, or a line for a constant; returns its height."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 1.0
    if np.ptp(values) == 0:
        axis.axvline(values[0], color=colour, linewidth=width, alpha=alpha, label=label)
        return 1.0
    grid, height = density(values)
    grid = np.concatenate([grid[:1], grid, grid[-1:]])  # down to zero at both ends
    height = np.concatenate([[0], height, [0]])
    axis.plot(grid, height, color=colour, linewidth=width, alpha=alpha, label=label)
    if fill:
        axis.fill_between(grid, height, color=colour, alpha=0.15 * alpha, linewidth=0)
    return float(height.max())


def is_few_valued(element: Element, limit: int = 40) -> bool:
    """Whether proportions of single values are the better picture."""
    return element.is_discrete and len(np.unique(element.values)) <= limit


def draw_marks(axis, values, colour, *, width=1.0) -> float:
    """Proportions as points joined by thin lines, so that several chains can be told apart."""
    points, counts = np.unique(values, return_counts=True)
    share = counts / len(values)
    axis.plot(points, share, "o-", color=colour, linewidth=width, markersize=3)
    _integer_ticks(axis)
    return float(share.max())


def draw_bars(axis, values, colour, *, rank=0, of=1) -> float:
    """Proportions as bars, the `rank`-th of `of` sets side by side."""
    points, counts = np.unique(values, return_counts=True)
    share = counts / len(values)
    gap = np.diff(points).min() if len(points) > 1 else 1.0
    width = 0.8 * gap / of
    axis.bar(points + (rank - (of - 1) / 2) * width, share, width, color=colour, alpha=0.8)
    _integer_ticks(axis)
    return float(share.max())


def _integer_ticks(axis) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
