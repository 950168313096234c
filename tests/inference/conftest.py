"""Runs that several files of tests look at."""

import jax
import pytest
from gaussian import DATA, NAMES, SCALES, groups

import abduce as ab


@pytest.fixture(scope="session")
def fits():
    """Each algorithm on `groups`, its settings and its posterior; later calls find its programs."""
    configurations = {
        "nuts": ab.nuts(num_warmup=300, num_samples=1000),
        "hmc": ab.hmc(num_warmup=300, num_samples=500),
        "importance": ab.importance(num_samples=2000),
        "laplace": ab.laplace(num_samples=4000),
        "mh": ab.mh(num_warmup=500, num_samples=2000),
    }
    key, options = jax.random.key(11), {"given": {"y": DATA}, "coords": {"group": NAMES}}
    posts = {
        name: alg(groups).posterior(key, SCALES, **options)
        for name, alg in configurations.items()
    }
    return configurations, posts
