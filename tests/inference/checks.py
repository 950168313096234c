"""Comparisons of draws with what they should be, to 4.5 Monte Carlo standard errors.

That is a false alarm in 1.5e5 comparisons; keys are fixed, and no test makes more than 15.
"""

import numpy as np

from abduce.inference import diagnostics

SE = 4.5


def mcse(x):
    """The standard error of the mean; chains that do not mix would have an excuse for anything."""
    assert diagnostics.ess_mean(x) > 150
    return diagnostics.mcse_mean(x)


def assert_moments(draws, mean, sd):
    """Means and standard deviations of chains, `(chain, draw, k)`, to 4.5 MCSE."""
    draws = np.asarray(draws, float)
    draws = draws.reshape((*draws.shape[:2], -1))
    mean, sd = np.ravel(mean), np.ravel(sd)
    for i in range(draws.shape[-1]):
        x = draws[..., i]
        error = SE * mcse(x)
        assert abs(x.mean() - mean[i]) < error, (i, x.mean(), mean[i])
        spread = (x - mean[i]) ** 2
        error = SE * mcse(spread)
        assert abs(spread.mean() - sd[i] ** 2) < error, (i, spread.mean() ** 0.5, sd[i])


def assert_probability(hits, probability):
    hits = np.asarray(hits, float)
    assert abs(hits.mean() - probability) < SE * mcse(hits), hits.mean()
