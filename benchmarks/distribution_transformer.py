"""How near is a Distribution Transformer to exact posteriors, for priors it meets on the fly?

Two tasks of Whittle, Ziomek, Rawling and Osborne, "Distribution Transformers" (2025):

* *conjugate* (section 4.1): the variance of ten centred normal observations, with an inverse gamma
  prior whose two parameters are drawn from IG(4, 6) (wide) or IG(10^4, 2 10^4) (narrow). The mean
  of `KL(exact posterior || q)` over 3,000 cases is by quadrature; so is that under a meta-prior
  that was not trained on, IG(24, 6).
* *fusion* (section 4.3.1): a damped motion in the plane seen by a rangefinder (a mixture with
  outliers) and a bearing. Filtering by feeding the posterior back as the prior is compared with a
  particle filter of 10,000 particles: mean log density of the true state, and seconds.

    python -m benchmarks.distribution_transformer --only conjugate --steps 2000
"""

import argparse
import math
import time
from typing import Any

import numpy as np

from benchmarks.measure import markdown_table, write_results

__all__ = ["main"]

NUM_CASES = 3000
NUM_OBSERVATIONS = 10
META = {"wide": (4.0, 6.0), "narrow": (1e4, 2e4), "unseen": (24.0, 6.0)}
NUM_PARTICLES = 10_000
FUSION_STEPS = 25
FUSION_COMPONENTS = 4
DAMPING, TIME_STEP = 0.95, 0.2
MOTION_SD, BEARING_SD = 0.3, 0.1


# ---------------------------------------------------------------------- conjugate


def conjugate_estimator(hyper, options, equivariant=True):
    """The estimator of the variance task under a meta-prior."""
    import jax
    import jax.numpy as jnp

    import abduce as ab
    import abduce.dist as dist
    from abduce.amortized.distribution_transformer import distribution_transformer
    from abduce.amortized.equivariance import ScaleEquivariance

    @ab.model
    def variance():
        v = ab.sample("variance", dist.InverseGamma(3.0, 3.0))
        z = lambda _: ab.sample("z", dist.Normal(0.0, jnp.sqrt(v)))  # noqa: E731
        jax.vmap(z)(jnp.arange(NUM_OBSERVATIONS))

    @ab.model
    def priors():
        a = ab.sample("a", dist.InverseGamma(*hyper))
        b = ab.sample("b", dist.InverseGamma(*hyper))
        return {"variance": dist.InverseGamma(a, b)}

    scale = ScaleEquivariance(observed={"z": 1.0}, latents={"variance": 2.0})
    return distribution_transformer(
        variance, observed=["z"], priors=priors, equivariance=scale if equivariant else None,
        num_candidates=options.candidates,
    )  # fmt: skip


def conjugate_divergence(est, hyper, key, num=NUM_CASES):
    """`KL(exact || q)` of each case by quadrature, and that of the prior's fit, in nats."""
    import jax
    import jax.numpy as jnp

    import abduce.dist as dist
    from abduce.amortized.dt_priors import fit_laws
    from abduce.amortized.mixture_fits import quadrature

    def one(key):
        k1, k2, k3 = jax.random.split(key, 3)
        a, b = hyper[1] / jax.random.gamma(k1, hyper[0], (2,))
        v = b / jax.random.gamma(k2, a)
        z = jnp.sqrt(v) * jax.random.normal(k3, (NUM_OBSERVATIONS,))
        plan = est.plan
        prior = fit_laws({"variance": dist.InverseGamma(a, b)}, plan.prior, plan.num_components, 1)
        q = est.infer(prior.mixture, {"z": z})
        shape = a + NUM_OBSERVATIONS / 2
        rate = b + 0.5 * jnp.sum(z**2)
        centre = jnp.log(rate) - jnp.log(shape)
        # Of w = log v - centre, up to a constant: what is large cancels before it is rounded.
        log_p = lambda w: shape * (1 - w - jnp.exp(-w))  # noqa: E731
        w, weights, log_p_at = quadrature(log_p, 0.0, shape**-0.5, 256)
        log_q = jax.vmap(lambda x: q.log_prob((centre + x)[None]))(w)
        return jnp.sum(weights * (log_p_at - log_q)), prior.kl

    run = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))
    return [np.asarray(x, np.float64) for x in run(jax.random.split(key, num))]


def seconds_per_thousand(est, key):
    """Wall time of a thousand posteriors in one call, compiled before."""
    import jax
    import jax.numpy as jnp

    from abduce.amortized.mixtures import normal, split

    prior = split(normal(jnp.zeros(1), jnp.eye(1)), est.plan.num_components)
    run = jax.jit(jax.vmap(lambda z: est.infer(prior, {"z": z})))
    zs = jax.random.normal(key, (1000, NUM_OBSERVATIONS))
    jax.block_until_ready(run(zs))
    start = time.perf_counter()
    for _ in range(5):
        jax.block_until_ready(run(zs))
    return (time.perf_counter() - start) / 5


def conjugate(options) -> list[dict[str, Any]]:
    """Trains and judges the estimators of the variance task."""
    import jax

    rows = []
    for name in ("wide", "narrow"):
        est = conjugate_estimator(META[name], options)
        start = time.perf_counter()
        est = est.fit(
            jax.random.key(options.seed), num_steps=options.steps, batch_size=options.batch,
            learning_rate=options.learning_rate, progress_bar=False,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        for judged in (name, "unseen") if name == "wide" else (name,):
            key = jax.random.fold_in(jax.random.key(options.seed + 1), len(rows))
            kl, fit = conjugate_divergence(est, META[judged], key)
            rows.append({
                "trained": name,
                "judged": judged,
                "steps": options.steps,
                "seconds": seconds,
                "kl": float(kl.mean()),
                "standard_error": float(kl.std() / math.sqrt(kl.size)),
                "largest": float(kl.max()),
                "prior_fit": float(fit.mean()),
                "seconds_per_1000": seconds_per_thousand(est, key),
            })  # fmt: skip
            print(rows[-1], flush=True)
    return rows


# ---------------------------------------------------------------------- fusion


def sensors():
    """Distributions of the two sensors."""
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    class Rangefinder(dist.Distribution):
        """.7 N(r, .1 (r + 1)) + .2 Exp(1) + .1 U(0, 20)."""

        arg_constraints = {"r": constraints.real}  # noqa: RUF012
        support = constraints.real
        pytree_data_fields = ("r",)

        def __init__(self, r):
            self.r = r
            super().__init__(jnp.shape(r), ())

        def sample(self, key, sample_shape=()):
            shape = (*sample_shape, *jnp.shape(self.r))
            k1, k2, k3, k4 = jax.random.split(key, 4)
            near = self.r + 0.1 * (self.r + 1) * jax.random.normal(k1, shape)
            short, far = jax.random.exponential(k2, shape), 20 * jax.random.uniform(k3, shape)
            which = jax.random.uniform(k4, shape)
            return jnp.where(which < 0.7, near, jnp.where(which < 0.9, short, far))

        def log_prob(self, value, intermediates=None):
            scale = 0.1 * (self.r + 1)
            near = -0.5 * ((value - self.r) / scale) ** 2 - jnp.log(scale)
            near = near - 0.5 * math.log(2 * math.pi) + math.log(0.7)
            short = jnp.where(value >= 0, math.log(0.2) - value, -jnp.inf)
            far = jnp.where((value >= 0) & (value <= 20), math.log(0.1 / 20), -jnp.inf)
            return jnp.logaddexp(near, jnp.logaddexp(short, far))

    class Bearing(dist.Distribution):
        """A wrapped normal angle, given as a unit vector; the density is per radian."""

        arg_constraints = {"angle": constraints.real}  # noqa: RUF012
        support = constraints.real_vector
        pytree_data_fields = ("angle",)

        def __init__(self, angle):
            self.angle = angle
            super().__init__(jnp.shape(angle), (2,))

        def sample(self, key, sample_shape=()):
            noise = BEARING_SD * jax.random.normal(key, (*sample_shape, *jnp.shape(self.angle)))
            return jnp.stack([jnp.cos(self.angle + noise), jnp.sin(self.angle + noise)], -1)

        def log_prob(self, value, intermediates=None):
            off = jnp.arctan2(value[..., 1], value[..., 0]) - self.angle
            turns = 2 * math.pi * jnp.arange(-2, 3)
            z = (off[..., None] + turns) / BEARING_SD
            log_norm = math.log(BEARING_SD) + 0.5 * math.log(2 * math.pi)
            return jax.nn.logsumexp(-0.5 * z**2, -1) - log_norm

    return Rangefinder, Bearing


def motion():
    """Matrix and noise covariance of a step of the state (x, y, and their velocities)."""
    a = np.eye(4)
    a[0, 2] = a[1, 3] = TIME_STEP
    a[2, 2] = a[3, 3] = DAMPING
    b = np.zeros((4, 2))
    b[0, 0] = b[1, 1] = TIME_STEP / 2
    b[2, 0] = b[3, 1] = 1.0
    return a, MOTION_SD**2 * b @ b.T + 1e-4 * np.eye(4)


START_MEAN, START_SD = np.array([4.0, 4.0, 0.0, 0.0]), np.array([2.0, 2.0, 1.0, 1.0])


def fusion_estimator(options):
    """The estimator of one update: a prior over the state and two sensor readings."""
    import jax
    import jax.numpy as jnp

    import abduce as ab
    import abduce.dist as dist
    from abduce.amortized.distribution_transformer import distribution_transformer
    from abduce.amortized.mixtures import GaussianMixture

    rangefinder, bearing = sensors()

    @ab.model
    def update():
        x = ab.sample("x", dist.MultivariateNormal(jnp.zeros(4), jnp.eye(4)))
        ab.sample("range", rangefinder(jnp.hypot(x[0], x[1])))
        ab.sample("bearing", bearing(jnp.arctan2(x[1], x[0])))

    @ab.model
    def priors():
        """Mixtures such as a filter meets: anywhere between sharp and the start's width."""
        k = FUSION_COMPONENTS
        spread = jnp.array([1.0, 1.0, 0.5, 0.5])
        centre = ab.sample("centre", dist.Normal(0.0, jnp.array([5.0, 5.0, 0.8, 0.8])).to_event(1))
        log_size = ab.sample("log_size", dist.Uniform(-2.0, 0.9))
        shift = ab.sample("shift", dist.Normal(0.0, 1.0).expand([k, 4]).to_event(2))
        scale = ab.sample("scale", dist.Normal(-0.3, 0.4).expand([k, 4]).to_event(2))
        below = ab.sample("below", dist.Normal(0.0, 0.4).expand([k, 4, 4]).to_event(3))
        weights = ab.sample("weights", dist.Normal(0.0, 1.5).expand([k]).to_event(1))
        size = jnp.exp(log_size) * spread
        diagonal = jnp.exp(scale) * size
        trils = diagonal[:, :, None] * (jnp.tril(below, -1) + jnp.eye(4))
        return GaussianMixture(jax.nn.log_softmax(weights), centre + shift * size, trils)

    return distribution_transformer(
        update, observed=["range", "bearing"], priors=priors, prior=["x"],
        num_components=FUSION_COMPONENTS, num_candidates=options.candidates,
    )  # fmt: skip


def fusion_series(key, num):
    """True states and readings, leading axes (series, step)."""
    import jax
    import jax.numpy as jnp

    rangefinder, bearing = sensors()
    a, q = (jnp.asarray(x, jnp.float32) for x in motion())
    root = jnp.linalg.cholesky(q)

    def one(key):
        k0, *keys = jax.random.split(key, FUSION_STEPS + 1)
        x = jnp.asarray(START_MEAN + 0.0, jnp.float32)
        x = x + jnp.asarray(START_SD, jnp.float32) * jax.random.normal(k0, (4,))
        states, readings = [], {"range": [], "bearing": []}
        for i, k in enumerate(keys):
            k1, k2, k3 = jax.random.split(k, 3)
            x = x if i == 0 else a @ x + root @ jax.random.normal(k1, (4,))
            states.append(x)
            readings["range"].append(rangefinder(jnp.hypot(x[0], x[1])).sample(k2))
            readings["bearing"].append(bearing(jnp.arctan2(x[1], x[0])).sample(k3))
        return jnp.stack(states), {n: jnp.stack(v) for n, v in readings.items()}

    return jax.jit(jax.vmap(one))(jax.random.split(key, num))


def by_transformer(est, states, readings):
    """Log density of the true states, `(series, step)`, and seconds."""
    import jax
    import jax.numpy as jnp

    from abduce.amortized.dt_filter import LinearGaussian
    from abduce.amortized.mixtures import normal, split

    start = normal(jnp.asarray(START_MEAN), jnp.diag(jnp.asarray(START_SD**2)))
    start = split(start, FUSION_COMPONENTS)
    move = LinearGaussian(*(jnp.asarray(x, jnp.float32) for x in motion()))
    run = jax.jit(jax.vmap(lambda z: est.filter(start, z, transition=move).posterior))
    seconds, out = _timed(run, readings)
    score = jax.jit(jax.vmap(jax.vmap(lambda m, x: m.log_prob(x))))
    return np.asarray(score(out, states)), seconds


def by_particles(states, readings, key):
    """The same by a bootstrap filter; seconds are those of `ab.smc`.

    The density that particles stand for is that of the mixture of four normals which fits them
    best, or of the normal with their moments, whichever is better on average.
    """
    import jax
    import jax.numpy as jnp

    import abduce as ab
    import abduce.dist as dist
    from abduce.amortized.mixture_fits import fit_draws

    rangefinder, bearing = sensors()
    a, q = (jnp.asarray(x, jnp.float32) for x in motion())
    root = jnp.linalg.cholesky(q)

    def log_likelihood(x, z):
        near = rangefinder(jnp.hypot(x[..., 0], x[..., 1])).log_prob(z["range"])
        return near + bearing(jnp.arctan2(x[..., 1], x[..., 0])).log_prob(z["bearing"])

    def one(key, truth, readings):
        k0, k1 = jax.random.split(key)
        noise = jax.random.normal(k0, (NUM_PARTICLES, 4))
        x = jnp.asarray(START_MEAN + 0.0, jnp.float32) + jnp.asarray(START_SD, jnp.float32) * noise

        def step(x, inputs):
            i, k, z, state = inputs
            k2, k3 = jax.random.split(k)
            moved = x @ a.T + jax.random.normal(k2, x.shape) @ root.T
            x = jnp.where(i > 0, moved, x)
            w = jax.nn.softmax(log_likelihood(x, z))
            u = (jax.random.uniform(k3) + jnp.arange(NUM_PARTICLES)) / NUM_PARTICLES
            x = x[jnp.clip(jnp.searchsorted(jnp.cumsum(w), u), 0, NUM_PARTICLES - 1)]
            four, plain = fit_draws(x[::5], FUSION_COMPONENTS), fit_draws(x[::5], 1)
            return x, jnp.stack([four.log_prob(state), plain.log_prob(state)])

        keys = jax.random.split(k1, FUSION_STEPS)
        return jax.lax.scan(step, x, (jnp.arange(FUSION_STEPS), keys, readings, truth))[1]

    run = jax.jit(lambda k, s, z: jax.lax.map(lambda t: one(*t), (k, s, z)))
    both = np.asarray(run(jax.random.split(key, len(states)), states, readings))

    @ab.model
    def series():
        def advance(x, i):
            first = dist.MultivariateNormal(
                jnp.asarray(START_MEAN + 0.0, jnp.float32),
                scale_tril=jnp.diag(jnp.asarray(START_SD, jnp.float32)),
            )
            loc = jnp.where(i > 0, a @ x, first.loc)
            tril = jnp.where(i > 0, root, first.scale_tril)
            x = ab.sample("x", dist.MultivariateNormal(loc, scale_tril=tril))
            ab.sample("range", rangefinder(jnp.hypot(x[0], x[1])))
            ab.sample("bearing", bearing(jnp.arctan2(x[1], x[0])))
            return x, None

        jax.lax.scan(advance, jnp.zeros(4), jnp.arange(FUSION_STEPS))

    smc = ab.smc(num_particles=NUM_PARTICLES, store="filter")(series)
    first = jax.tree.map(lambda x: x[0], readings)
    smc.posterior(key, given=first)
    start = time.perf_counter()
    for i in range(min(3, len(states))):
        smc.posterior(key, given=jax.tree.map(lambda x, i=i: x[i], readings))
    seconds = (time.perf_counter() - start) / min(3, len(states))
    best = both[..., int(np.argmax(both.mean((0, 1))))]
    return best, seconds * len(states)


def _timed(run, *args) -> tuple[float, Any]:
    import jax

    out = jax.block_until_ready(run(*args))
    start = time.perf_counter()
    jax.block_until_ready(run(*args))
    return time.perf_counter() - start, out


def fusion(options) -> list[dict[str, Any]]:
    """Trains the estimator of the update and filters."""
    import jax

    est = fusion_estimator(options)
    start = time.perf_counter()
    est = est.fit(
        jax.random.key(options.seed), num_steps=options.steps, batch_size=options.batch,
        learning_rate=options.learning_rate, progress_bar=False,
    )  # fmt: skip
    trained = time.perf_counter() - start
    k1, k2 = jax.random.split(jax.random.key(options.seed + 1))
    states, readings = fusion_series(k1, options.series)
    rows = []
    for name, (scores, seconds) in {
        "Distribution Transformer": by_transformer(est, states, readings),
        f"particle filter, {NUM_PARTICLES:,}": by_particles(states, readings, k2),
    }.items():
        per_series = scores.mean(1)
        rows.append({
            "filter": name,
            "log_density": float(scores.mean()),
            "standard_error": float(per_series.std() / math.sqrt(len(per_series))),
            "milliseconds": 1000 * seconds / len(states) / FUSION_STEPS,
            "trained": trained if name.startswith("D") else 0.0,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.distribution_transformer", description=__doc__
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="*", default=None, help="conjugate, fusion")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--candidates", type=int, default=7)
    parser.add_argument("--series", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="distribution_transformer", help="stem of the files")
    options = parser.parse_args()
    parts = options.only or ["conjugate", "fusion"]
    body, record = [], {}
    if "conjugate" in parts:
        rows = record["conjugate"] = conjugate(options)
        header = ["trained on", "judged on", "steps", "mean KL, nats", "its standard error",
                  "largest", "KL of the prior's fit", "training, s",
                  "1,000 posteriors, ms"]  # fmt: skip
        cells = [
            [r["trained"], r["judged"], r["steps"], f"{r['kl']:.5f}", f"{r['standard_error']:.5f}",
             f"{r['largest']:.4f}", f"{r['prior_fit']:.5f}", f"{r['seconds']:.0f}",
             f"{1000 * r['seconds_per_1000']:.0f}"]
            for r in rows
        ]  # fmt: skip
        body.append(
            f"**Variance of {NUM_OBSERVATIONS} normal observations.** `KL(exact || q)` over "
            f"{NUM_CASES:,} cases, by quadrature. The network is equivariant under changes of "
            "scale.\n\n" + markdown_table(header, cells)
        )
    if "fusion" in parts:
        rows = record["fusion"] = fusion(options)
        header = ["filter", "mean log density of the true state", "its standard error",
                  "ms per step of a series", "training, s"]  # fmt: skip
        cells = [
            [r["filter"], f"{r['log_density']:.3f}", f"{r['standard_error']:.3f}",
             f"{r['milliseconds']:.3f}", f"{r['trained']:.0f}"]
            for r in rows
        ]  # fmt: skip
        body.append(
            f"**Sensor fusion**, {options.series} series of {FUSION_STEPS} steps. The transformer "
            "filters all series in one call; the particle filter is timed one series at a time, "
            "as `ab.smc(store='filter')`.\n\n" + markdown_table(header, cells)
        )
    write_results(options.name, "Distribution Transformer", "\n\n".join(body), record)


if __name__ == "__main__":
    main()
