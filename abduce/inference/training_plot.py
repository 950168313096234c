"""A figure of what a fit optimized; see `abduce.inference.plots`."""

from collections.abc import Mapping

import numpy as np

from abduce.errors import InvalidValue
from abduce.inference.drawing import COLOURS, DIVERGENT, new_figure, rug, thin

__all__ = ["plot_objective"]


def plot_objective(history, *, window: int | None = None, label: str | None = None):
    """What was optimized, step by step, with a running median.

    What to see: the median levels off before the end. Where it still climbs (an objective) or falls
    (a loss), more steps help; where it jumps about, a lower rate does. Red ticks mark steps that
    were skipped because a number was not finite.

    Args:
        history: One number a step, NaN or infinite where the step was skipped; or a dict that has
            them as 'objective', 'loss' or 'elbo': `post.diagnostics` of `ab.vi` and
            `ab.gaussian_vi`, `est.history` of an estimator, whose 'validation_loss' at
            'validation_step' is shown as well.
        window: Steps that a median is over; None: a fiftieth of all, at least 5.
        label: Of the vertical axis; None: the name in the dict.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        InvalidValue: There are no such numbers, or none is finite.

    Example:
        >>> post = ab.vi()(model).posterior(key, given={"y": y})
        >>> plot_objective(post.diagnostics).savefig("objective.png")
    """
    values, name, validation = _history(history)
    finite = np.isfinite(values)
    if not finite.any():
        raise InvalidValue(f"plot_objective: none of the {len(values)} steps is finite.")
    if window is None:
        window = max(5, len(values) // 50)
    elif isinstance(window, bool) or not isinstance(window, (int, np.integer)) or window < 1:
        raise InvalidValue(f"plot_objective: window must be an int >= 1, got {window!r}.")
    figure, ((axis,),) = new_figure(1, 1, (7.5, 4.0), ticks=8)
    steps = np.arange(1, len(values) + 1)
    keep = thin(len(values))
    axis.plot(
        steps[keep], np.where(finite, values, np.nan)[keep], color=COLOURS[5], linewidth=0.6,
        alpha=0.8, label=name, rasterized=True,
    )  # fmt: skip
    at, medians = _running_median(values, window)
    if len(values) > 1:
        axis.plot(
            at + 1, medians, color=COLOURS[0], linewidth=1.8, label=f"median of {window} steps"
        )
    if validation is not None:
        axis.plot(
            *validation, "o-", color=COLOURS[1], markersize=3.5, linewidth=1, label="validation"
        )
    # the climb from a bad start must not squeeze the rest into a line
    late = values[len(values) // 10 :]
    late = late[np.isfinite(late)]
    shown = late if len(late) else values[finite]
    low, high = np.quantile(shown, [0.005, 0.995])
    if validation is not None:
        low, high = min(low, np.min(validation[1])), max(high, np.max(validation[1]))
    pad = 0.05 * (high - low) or 0.5
    axis.set_ylim(low - pad, high + pad)
    axis.margins(x=0.01)
    if not finite.all():
        rug(axis, steps[~finite])
        axis.plot([], [], "|", color=DIVERGENT, label=f"{int((~finite).sum())} skipped")
    axis.set_xlabel("step", fontsize=9)
    axis.set_ylabel(label or name, fontsize=9)
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _history(history):
    """Values, their name, and steps and values of a validation loss."""
    name, validation = "objective", None
    if isinstance(history, Mapping):
        found = [k for k in ("objective", "loss", "elbo") if np.ndim(history.get(k)) == 1]
        if not found:
            raise InvalidValue(
                f"plot_objective: needs 'objective', 'loss' or 'elbo' with one number a step; the "
                f"dict has {', '.join(map(repr, history)) or 'nothing'}."
            )
        name = found[0]
        steps, losses = (np.ravel(history.get(f"validation_{k}", ())) for k in ("step", "loss"))
        keep = np.isfinite(losses) if len(steps) == len(losses) else np.zeros(0, bool)
        if name == "loss" and keep.any():
            validation = steps[keep], losses[keep]
        history = history[name]
    values = np.asarray(history, np.float64)
    if values.ndim != 1 or not values.size:
        raise InvalidValue(
            f"plot_objective: needs one number a step, shape (steps,), got {values.shape}."
        )
    return values, name, validation


def _running_median(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Medians of the finite values around some hundreds of steps; NaN where there are none."""
    at = np.unique(np.linspace(0, len(values) - 1, min(len(values), 500)).astype(int))
    medians = np.full(len(at), np.nan)
    for i, t in enumerate(at):
        start = max(0, min(t - window // 2, len(values) - window))
        near = values[start : start + window]
        near = near[np.isfinite(near)]
        if len(near):
            medians[i] = np.median(near)
    return at, medians
