"""One gradient of a variational autoencoder: ours, one written by hand in JAX, and NumPyro's.

The 8 by 8 digits of scikit-learn, black and white; 10 latent numbers, 200 hidden units (the sizes
of Kingma and Welling 2014). All sides have the same equinox networks, which are arguments of a
jitted function `(params, key, x) -> (value, gradient)`, and one draw per image:

* abduce: `ab.expectation` of a guide and a model, each a `jax.vmap` over the images, with the
  networks as arguments; besides, the same without an enclosing `jax.jit`, as in a loop in Python;
* by hand: `jax.value_and_grad` of the reparametrized bound, with two ways to write the Bernoulli
  density, of which the faster counts;
* NumPyro: `Trace_ELBO` with a plate.

First the means over many keys of the value and of projections of the gradient are compared. Then
blocks of calls alternate, as in `benchmarks.gradient`.

    python -m benchmarks.vae
    python -m benchmarks.vae --rounds 50 --batches 64
"""

import argparse
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as npd
from numpyro.infer import Trace_ELBO

import abduce as ab
import abduce.dist as dist
from benchmarks.gradient import _block, _calls_in
from benchmarks.measure import markdown_table, write_results

LATENT, HIDDEN, PIXELS = 10, 200, 64
BATCHES = (64, 128, 256, 512, 1024)
CHECKED_KEYS = 1000
MOST_STANDARD_ERRORS = 5.0
HALF_LOG_2_PI = 0.5 * np.log(2 * np.pi)


class Encoder(eqx.Module):
    """An image's location and scale of the latents."""

    hidden: eqx.nn.Linear
    loc: eqx.nn.Linear
    log_scale: eqx.nn.Linear

    def __init__(self, key):
        k1, k2, k3 = jax.random.split(key, 3)
        self.hidden = eqx.nn.Linear(PIXELS, HIDDEN, key=k1)
        self.loc = eqx.nn.Linear(HIDDEN, LATENT, key=k2)
        self.log_scale = eqx.nn.Linear(HIDDEN, LATENT, key=k3)

    def __call__(self, x):
        h = jax.nn.relu(self.hidden(x))
        return self.loc(h), jnp.exp(self.log_scale(h))


class Decoder(eqx.Module):
    """The logits of an image's pixels."""

    hidden: eqx.nn.Linear
    logits: eqx.nn.Linear

    def __init__(self, key):
        k1, k2 = jax.random.split(key)
        self.hidden = eqx.nn.Linear(LATENT, HIDDEN, key=k1)
        self.logits = eqx.nn.Linear(HIDDEN, PIXELS, key=k2)

    def __call__(self, z):
        return self.logits(jax.nn.relu(self.hidden(z)))


# ------------------------------------------------------------------------ abduce


@ab.model
def _guide(images, encoder):
    def one(image):
        loc, scale = encoder(image)
        ab.sample("z", dist.Normal(loc, scale).to_event(1))

    jax.vmap(one)(images)


@ab.model
def _model(size, decoder):
    def one(_):
        z = ab.sample("z", dist.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
        ab.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1))

    jax.vmap(one)(jnp.arange(size))


@ab.expectation
def _elbo(params, images):
    encoder, decoder = params
    size = len(images)
    z, log_q = ab.propose(_guide, images, encoder)
    return (ab.log_density(_model, {**z, "x": images}, size, decoder) - log_q) / size


def abduce(params, key, images):
    return _elbo.value_and_grad(key, params, images)


# ------------------------------------------------------------------------ by hand


def _by_hand(log_likelihood: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def run(params, key, images):
        def elbo(params):
            encoder, decoder = params
            loc, scale = jax.vmap(encoder)(images)
            noise = jax.random.normal(key, loc.shape)
            z = loc + scale * noise
            log_q = -jnp.sum(0.5 * noise**2 + jnp.log(scale) + HALF_LOG_2_PI)
            log_p = -jnp.sum(0.5 * z**2 + HALF_LOG_2_PI)
            logits = jax.vmap(decoder)(z)
            return (log_likelihood(images, logits) + log_p - log_q) / len(images)

        return jax.value_and_grad(elbo)(params)

    return run


def _cross_entropy(x, logits):
    return jnp.sum(x * logits - jax.nn.softplus(logits))


def _signed(x, logits):
    return -jnp.sum(jax.nn.softplus((1 - 2 * x) * logits))


# ------------------------------------------------------------------------ NumPyro


def _numpyro_model(images, params):
    decoder = numpyro.param("decoder", params[1])
    with numpyro.plate("image", len(images)):
        z = numpyro.sample("z", npd.Normal(jnp.zeros(LATENT), 1.0).to_event(1))
        logits = jax.vmap(decoder)(z)
        numpyro.sample("x", npd.Bernoulli(logits=logits).to_event(1), obs=images)


def _numpyro_guide(images, params):
    encoder = numpyro.param("encoder", params[0])
    with numpyro.plate("image", len(images)):
        loc, scale = jax.vmap(encoder)(images)
        numpyro.sample("z", npd.Normal(loc, scale).to_event(1))


def numpyros(params, key, images):
    def elbo(params):
        values = {"encoder": params[0], "decoder": params[1]}
        loss = Trace_ELBO().loss(key, values, _numpyro_model, _numpyro_guide, images, params)
        return -loss / len(images)

    return jax.value_and_grad(elbo)(params)


# ------------------------------------------------------------------------ measuring

SIDES = {
    "abduce": abduce,
    "by_hand": _by_hand(_cross_entropy),
    "by_hand_signed": _by_hand(_signed),
    "numpyro": numpyros,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.vae", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=300, help="blocks of calls of each side")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--name", default="vae", help="stem of the result files")
    options = parser.parse_args()

    from sklearn.datasets import load_digits

    images = jnp.asarray(load_digits().data > 7.5, jnp.int32)
    k1, k2 = jax.random.split(jax.random.key(0))
    params = (Encoder(k1), Decoder(k2))
    agreement = _agreement(params, images[:64])
    results = [_compare(params, images[:n], options.rounds) for n in options.batches]
    header = [
        "images", "abduce, us", "by hand, us", "NumPyro, us", "abduce / by hand", "its quartiles",
        "CPU time, ratio", "NumPyro / abduce", "CPU time, ratio", "abduce without jit, us",
    ]  # fmt: skip
    rows = [
        [
            r["batch"], r["us"]["abduce"], r["us"][r["by_hand"]], r["us"]["numpyro"], r["ratio"],
            f"{r['ratio_quartiles'][0]:.3f} to {r['ratio_quartiles'][1]:.3f}", r["cpu_ratio"],
            r["numpyro_ratio"], r["numpyro_cpu_ratio"], r["us"]["direct"],
        ]
        for r in results
    ]  # fmt: skip
    kernels = _kernels(params, images[:64])
    body = (
        f"Value and gradient of the evidence lower bound, {LATENT} latents, {HIDDEN} hidden units, "
        f"{PIXELS} pixels, float32; medians over {options.rounds} interleaved blocks of each side. "
        "The ratios of CPU times are those of all blocks together; other work on the machine "
        "hardly touches them.\n\n"
        + markdown_table(header, rows)
        + f"\n\nThe means over {CHECKED_KEYS} keys of the value and of a projection of each "
        "array's gradient agree with those of the bound by hand: largest difference "
        + ", ".join(f"{n} {z:.1f}" for n, z in agreement.items())
        + f" standard errors ({MOST_STANDARD_ERRORS:g} are allowed).\n\n"
        "Operations of the compiled program of 64 images. Loops are those of the random bits: "
        "three of a hash each for the draw, for each word of the address, and for the elements.\n\n"
        + markdown_table(
            ["", "fusions", "matrix products", "loops", "other calls"],
            [[n, *k.values()] for n, k in kernels.items()],
        )
    )  # fmt: skip
    write_results(
        options.name, "One gradient of a variational autoencoder", body,
        {"results": results, "kernels": kernels, "agreement": agreement},
    )  # fmt: skip


def _compare(params: Any, images: Any, rounds: int) -> dict[str, Any]:
    functions = {name: jax.jit(f) for name, f in SIDES.items()} | {"direct": abduce}
    names = list(functions)
    data = (jax.random.key(1), images)
    for f in functions.values():
        jax.block_until_ready(f(params, *data))
    count = max(1, min(_calls_in(f, params, data) for f in functions.values()))
    rng = np.random.default_rng(0)
    wall, cpu = np.empty((2, rounds, len(names)))
    for i in range(rounds):
        for j in rng.permutation(len(names)):
            wall[i, j], cpu[i, j] = _block(functions[names[j]], params, data, count)
    wall, cpu = (dict(zip(names, x.T, strict=True)) for x in (wall, cpu))
    hand = min(("by_hand", "by_hand_signed"), key=lambda n: np.median(wall[n]))
    ratios = wall["abduce"] / wall[hand]
    return {
        "batch": len(images),
        "us": {n: float(1e6 * np.median(w)) for n, w in wall.items()},
        "cpu_us": {n: float(1e6 * np.mean(c)) for n, c in cpu.items()},
        "by_hand": hand,
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": [float(q) for q in np.quantile(ratios, [0.25, 0.75])],
        "cpu_ratio": float(cpu["abduce"].sum() / cpu[hand].sum()),
        "numpyro_ratio": float(np.median(wall["numpyro"] / wall["abduce"])),
        "numpyro_cpu_ratio": float(cpu["numpyro"].sum() / cpu["abduce"].sum()),
        "calls_per_block": count,
    }


def _agreement(params: Any, images: Any) -> dict[str, float]:
    """Largest difference of means to those of `by_hand`, in standard errors.

    Raises:
        RuntimeError: It is more than chance would have it: the sides differ in what they compute.
    """
    leaves, _ = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    directions = [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]

    def numbers(f, key):
        value, gradient = f(params, key, images)
        parts = [jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), directions, strict=True)]
        return jnp.stack([value, *parts])

    means, errors = {}, {}
    for i, (name, f) in enumerate(SIDES.items()):
        run = jax.jit(lambda ks, f=f: jax.lax.map(lambda k: numbers(f, k), ks))
        found = np.asarray(run(jax.random.split(jax.random.key(10 + i), CHECKED_KEYS)), np.float64)
        means[name], errors[name] = found.mean(0), found.std(0) / np.sqrt(CHECKED_KEYS)
    out = {}
    for name in set(SIDES) - {"by_hand"}:
        error = np.hypot(errors[name], errors["by_hand"])
        out[name] = float(np.max(np.abs(means[name] - means["by_hand"]) / error))
        if not out[name] < MOST_STANDARD_ERRORS:
            raise RuntimeError(f"{name} and by_hand differ by {out[name]:.1f} standard errors")
    return dict(sorted(out.items()))


def _kernels(params: Any, images: Any) -> dict[str, dict[str, int]]:
    """Counts of operations in the entry computation of each compiled program."""
    out = {}
    for name, f in SIDES.items():
        text = jax.jit(f).lower(params, jax.random.key(1), images).compile().as_text()
        entry = text[text.index("ENTRY") :]
        out[name] = {
            what: len(re.findall(pattern, entry))
            for what, pattern in (
                ("fusions", r" fusion\("), ("products", r" dot\("), ("loops", r" while\("),
                ("calls", r" (?:call|custom-call)\("),
            )
        }  # fmt: skip
    return out


if __name__ == "__main__":
    main()
