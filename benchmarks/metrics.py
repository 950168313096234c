"""What a set of draws is worth: effective sample size, and agreement with the gold draws.

One implementation, used for every package, and belonging to none of them. It follows Vehtari,
Gelman, Simpson, Carpenter and Bürkner, "Rank-normalization, folding, and localization" (Bayesian
Analysis 16, 2021), section 3: chains split in half, Geyer's initial monotone sequence.
"""

import numpy as np
from scipy import stats

__all__ = ["agreement", "ess", "geometric_mean", "min_bulk_ess", "min_square_ess"]


def ess(draws: np.ndarray, *, bulk: bool) -> float:
    """Effective sample size of one quantity.

    Args:
        draws: Shape `(num_chains, num_draws)`.
        bulk: Of the rank-normalized draws ("bulk ESS"), else of the draws themselves (the ESS
            that the standard error of the mean needs).

    Returns:
        The effective sample size; NaN where draws are constant or not finite.
    """
    half = draws.shape[1] // 2
    halves = np.concatenate([draws[:, :half], draws[:, -half:]])
    if not np.all(np.isfinite(halves)) or np.ptp(halves) == 0:
        return float("nan")
    if bulk:
        ranks = stats.rankdata(halves).reshape(halves.shape)
        halves = stats.norm.ppf((ranks - 0.375) / (halves.size + 0.25))
    num_chains, n = halves.shape

    centred = halves - halves.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(centred, 2 * n, axis=1)
    autocovariance = np.fft.irfft(np.abs(spectrum) ** 2, axis=1)[:, :n].mean(axis=0) / n
    within = autocovariance[0] * n / (n - 1)
    pooled = autocovariance[0] + np.var(halves.mean(axis=1), ddof=1)
    rho = 1 - (within - autocovariance) / pooled
    rho[0] = 1

    pairs = rho[: n - n % 2].reshape(-1, 2).sum(axis=1)
    first_negative = np.argmax(pairs < 0) if np.any(pairs < 0) else len(pairs)
    tau = -1 + 2 * np.minimum.accumulate(pairs[:first_negative]).sum()
    if first_negative < len(pairs):
        tau += max(rho[2 * first_negative], 0.0)  # less bias where draws alternate
    size = num_chains * n
    return float(size / max(tau, 1 / np.log10(size)))  # antithetic chains: capped as in the paper


def min_bulk_ess(draws: np.ndarray) -> float:
    """Smallest bulk ESS over quantities; `draws` has shape (num_chains, num_draws, num_quantities).

    A quantity whose ESS is undefined (a chain that never moved, a value that is not finite) counts
    as 0: it must not drop out of the minimum.
    """
    values = [ess(draws[..., i], bulk=True) for i in range(draws.shape[-1])]
    return float(np.min(np.nan_to_num(values, nan=0.0)))


def min_square_ess(draws: np.ndarray) -> float:
    """Smallest ESS over quantities of the squared distance from the mean.

    It is what the standard deviation rests on. Draws that alternate around the mean have a bulk ESS
    above their number, but not this one, so the two belong side by side.
    """
    values = _ess_each((draws - draws.mean(axis=(0, 1))) ** 2)
    return float(np.min(np.nan_to_num(values, nan=0.0)))


def agreement(draws: np.ndarray, mean, sd, mcse_mean, mcse_sd) -> dict[str, float]:
    """Distance of draws from the gold draws, the worst over the quantities.

    Args:
        draws: Shape `(num_chains, num_draws, num_quantities)`.
        mean: Gold means, shape `(num_quantities,)`.
        sd: Gold standard deviations, shape `(num_quantities,)`.
        mcse_mean: Monte Carlo standard errors of the gold means, shape `(num_quantities,)`.
        mcse_sd: Monte Carlo standard errors of the gold sds, shape `(num_quantities,)`.

    Returns:
        `mean_error`: the largest error of a mean, in combined Monte Carlo standard errors.
        `sd_error`: the largest relative error of a standard deviation.
        `sd_error_mcse`: the largest error of a standard deviation, in combined Monte Carlo
        standard errors. All are infinite where draws are constant or not finite.
    """
    flat = draws.reshape(-1, draws.shape[-1])
    own_mean, own_sd = flat.mean(axis=0), flat.std(axis=0, ddof=1)
    own_mcse_mean = own_sd / np.sqrt(_ess_each(draws))
    squares = (draws - own_mean) ** 2
    own_mcse_sd = squares.std(axis=(0, 1)) / np.sqrt(_ess_each(squares)) / (2 * own_sd)
    errors = {
        "mean_error": np.abs(own_mean - mean) / np.hypot(own_mcse_mean, mcse_mean),
        "sd_error": np.abs(own_sd / sd - 1),
        "sd_error_mcse": np.abs(own_sd - sd) / np.hypot(own_mcse_sd, mcse_sd),
    }
    return {name: float(np.max(np.nan_to_num(x, nan=np.inf))) for name, x in errors.items()}


def _ess_each(draws: np.ndarray) -> np.ndarray:
    return np.array([ess(draws[..., i], bulk=False) for i in range(draws.shape[-1])])


def geometric_mean(values) -> float:
    """Geometric mean of positive numbers; NaN of none."""
    values = np.asarray(list(values), dtype=float)
    return float(np.exp(np.mean(np.log(values)))) if values.size else float("nan")
