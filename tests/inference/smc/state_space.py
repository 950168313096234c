"""State-space models whose answers are known: linear-Gaussian ones, and chains to enumerate."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

import abduce as ab
import abduce.dist as dist

SE = 4.5  # standard errors; a false alarm in 1.5e5 comparisons, and keys are fixed

# ---------------------------------------------------------------------- linear-Gaussian

DECAY, DRIVE, NOISE, START = 0.9, 0.6, 0.5, 1.2
Y = np.array([0.7, 1.3, 0.2, -0.4, 0.9, 1.8, 1.1, 0.3])


@ab.model
def walk(n):
    """x0 before the scan, x and y in it."""
    x0 = ab.sample("x0", dist.Normal(0.0, START))

    def step(x, _):
        x = ab.sample("x", dist.Normal(DECAY * x, DRIVE))
        ab.sample("y", dist.Normal(x, NOISE))
        return x, x

    return jax.lax.scan(step, x0, None, length=n)


@ab.model
def optimal(given, carry, x):
    """The law of the next state given its observation."""
    precision = 1 / DRIVE**2 + 1 / NOISE**2
    mean = (DECAY * carry / DRIVE**2 + given["y"] / NOISE**2) / precision
    ab.sample("x", dist.Normal(mean, precision**-0.5))


def predictive(given, carry, x):
    """The law of the next observation given the state: the perfect look-ahead."""
    return dist.Normal(DECAY * carry, (DRIVE**2 + NOISE**2) ** 0.5).log_prob(given["y"])


def normal_logpdf(y, mean, var):
    return -0.5 * ((y - mean) ** 2 / var + np.log(2 * np.pi * var))


def kalman(y=Y, observed=None, decay=DECAY, drive=DRIVE, noise=NOISE, start=START, mean=0.0):
    """Evidence; filtering means and variances; smoothing means and variances (x0 in front)."""
    seen = np.ones(len(y), bool) if observed is None else observed
    m, v, log_z = mean, start**2, 0.0
    filtered, predicted = [(m, v)], []
    for value, on in zip(y, seen, strict=True):
        m, v = decay * m, decay**2 * v + drive**2
        predicted.append((m, v))
        if on:
            log_z += normal_logpdf(value, m, v + noise**2)
            gain = v / (v + noise**2)
            m, v = m + gain * (value - m), (1 - gain) * v
        filtered.append((m, v))
    smooth = [filtered[-1]]
    for (fm, fv), (pm, pv) in zip(filtered[-2::-1], predicted[::-1], strict=True):
        g = decay * fv / pv
        sm, sv = smooth[0]
        smooth.insert(0, (fm + g * (sm - pm), fv + g**2 * (sv - pv)))
    return log_z, np.array(filtered).T, np.array(smooth).T


def evidences(alg, m, args, given, n, seed=3):
    """Log evidence estimates of `n` independent runs, in one compiled program."""

    def one(key):
        return alg(m).posterior(key, *args, given=given).log_evidence

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), n)), float)


def assert_unbiased(log_z, truth, precision=0.05):
    """The mean of the estimates of Z is Z within 4.5 of its standard errors, which are small."""
    ratio = np.exp(np.asarray(log_z, float) - truth)
    error = ratio.std() / len(ratio) ** 0.5
    assert error < precision, error
    assert abs(ratio.mean() - 1) < SE * error + 1e-5, (ratio.mean(), error)


# ---------------------------------------------------------------------- a chain to enumerate

PRIOR = np.array([0.6, 0.4])
MOVES = np.array([[0.7, 0.3], [0.2, 0.8]])
EMITS = np.array([[0.8, 0.2], [0.35, 0.65]])
TOKENS = np.array([1, 0, 1])


@ab.model
def chain(n):
    """z0 before the scan, z and the token in it: 2^(n+1) paths."""
    z0 = ab.sample("z0", dist.Categorical(probs=jnp.array(PRIOR)))

    def step(z, _):
        z = ab.sample("z", dist.Categorical(probs=jnp.array(MOVES)[z]))
        ab.sample("token", dist.Categorical(probs=jnp.array(EMITS)[z]))
        return z, None

    jax.lax.scan(step, z0, None, length=n)


def path_probabilities(tokens=TOKENS, moves=MOVES, emits=EMITS):
    """Probability of each path (z0, z1, ...), shape (2, 2, ...), and the evidence."""
    joint = np.zeros((2,) * (len(tokens) + 1))
    for path in itertools.product(range(2), repeat=len(tokens) + 1):
        p = PRIOR[path[0]]
        for before, now, token in zip(path, path[1:], tokens, strict=False):
            p *= moves[before, now] * emits[now, token]
        joint[path] = p
    return joint / joint.sum(), joint.sum()


def path_index(z0, z):
    """One number for each path."""
    bits = np.concatenate([np.asarray(z0)[..., None], np.asarray(z)], -1)
    return (bits * 2 ** np.arange(bits.shape[-1])[::-1]).sum(-1)
