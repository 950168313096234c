"""How near do learned posteriors come to exact ones, for sets of 1 to 200 elements?

Three conjugate models with sets of random size: the mean of a normal, the probability of a coin,
and the coefficients of a linear regression with a random design. One estimator each is trained for
all sizes; its divergence `KL(exact || q)` is averaged over data sets drawn from the prior, with
exact posterior draws, at several sizes.

    python -m benchmarks.amortized
    python -m benchmarks.amortized --only normal --steps 4000
"""

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import abduce as ab
import abduce.dist as dist
from benchmarks.measure import markdown_table, write_results

MOST = 200
SIZES = (1, 2, 3, 5, 10, 20, 50, 100, 200)


@ab.model
def normal(n):
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    return jax.vmap(lambda _: ab.sample("y", dist.Normal(mu, 1.0)))(jnp.arange(n))


@ab.model
def coin(n):
    p = ab.sample("p", dist.Beta(2.0, 2.0))
    return jax.vmap(lambda _: ab.sample("y", dist.Bernoulli(p)))(jnp.arange(n))


@ab.model
def regression(x):
    w = ab.sample("w", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
    return jax.vmap(lambda row: ab.sample("y", dist.Normal(row @ w, 1.0)))(x)


@ab.model
def designs():
    return ab.sample("x", dist.Normal(0.0, 1.0).expand([MOST, 3]))


def exact_normal(y, x):
    n = len(y)
    return {"mu": dist.Normal(y.sum() / (n + 1), (n + 1) ** -0.5)}


def exact_coin(y, x):
    return {"p": dist.Beta(2.0 + y.sum(), 2.0 + (1 - y).sum())}


def exact_regression(y, x):
    precision = jnp.eye(3) + x.T @ x
    mean = jnp.linalg.solve(precision, x.T @ y)
    return {"w": dist.MultivariateNormal(mean, precision_matrix=precision)}


CASES: dict[str, Any] = {
    "normal": (normal, None, exact_normal),
    "coin": (coin, None, exact_coin),
    "regression": (regression, designs, exact_regression),
}


def divergence(est: Any, name: str, n: int, num_data: int, num_draws: int, key: Any) -> Any:
    """KL(exact || q) at `n` elements: mean over data sets and its standard error."""
    model, drawn, exact = CASES[name]

    def one(key):
        k1, k2, k3 = jax.random.split(key, 3)
        x = jax.random.normal(k1, (n, 3))
        args = (x,) if drawn is not None else (n,)
        trace = model.simulate(k2, *args)
        y = trace.choices["y"]
        (address, law), = exact(y, x).items()
        draws = law.sample(k3, (num_draws,))

        def gap(value):
            log_q = est.log_density({address: value}, *args, given={"y": y})
            return law.log_prob(value) - log_q

        return jnp.mean(jax.vmap(gap)(draws))

    kls = np.asarray(jax.lax.map(one, jax.random.split(key, num_data), batch_size=20), np.float64)
    return kls.mean(), kls.std() / len(kls) ** 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=list(CASES))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--head", default="spline")
    parser.add_argument("--candidates", type=int)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--name", default="amortized")
    options = parser.parse_args()
    rows = []
    for name in options.only or CASES:
        model, drawn, _ = CASES[name]
        args = () if drawn is not None else (MOST,)
        est = ab.npe(
            model, *args, observed=["y"], designs=drawn, sizes=(1, MOST), head=options.head,
            num_candidates=options.candidates,
        )  # fmt: skip
        cpu = time.process_time()
        est = est.fit(
            jax.random.key(0), num_steps=options.steps, learning_rate=options.rate,
            progress_bar=False,
        )
        cpu = time.process_time() - cpu
        row = [name, f"{cpu / 60:.1f}"]
        for n in SIZES:
            mean, error = divergence(est, name, n, 200, 128, jax.random.key(n))
            row.append(f"{mean:.4f}")
            print(name, n, f"{mean:.4f} +- {error:.4f}", f"{cpu:.0f} CPU s", flush=True)
        rows.append(row)
    table = markdown_table(["model", "CPU minutes of training", *map(str, SIZES)], rows)
    text = (
        f"KL(exact || q) in nats, mean over 200 data sets from the prior, by number of elements; "
        f"head={options.head!r}, num_candidates={options.candidates}, {options.steps} steps.\n\n"
    )
    title = "Learned posteriors of conjugate models"
    record = {"rows": rows, "settings": vars(options)}
    write_results(options.name, title, text + table, record)


if __name__ == "__main__":
    main()
