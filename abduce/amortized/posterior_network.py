"""The network of a posterior estimator, and what it is trained on."""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.dynamics import FlowMatching, Score
from abduce.amortized.encoder import Encoder, features, raw_features
from abduce.amortized.fitting import with_arguments
from abduce.amortized.frames import frame_features, laplace_frame, to_frame
from abduce.amortized.heads import Choices, Flow, Mixture
from abduce.amortized.layout import Group, Layout, Simulation, continuous_target
from abduce.amortized.networks import SIZES, Linear, check_settings, squash
from abduce.amortized.pose_equivariance import Pose
from abduce.amortized.robustness import no_perturbation, perturbed, sensitivity
from abduce.errors import InvalidAlgorithm
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import Arguments, stage_packed

__all__ = [
    "HEADS",
    "PROXY",
    "PosteriorNetwork",
    "PosteriorTask",
    "Settings",
    "encode",
    "find_frame",
    "fits",
    "standardized",
]

HEADS = ("spline", "coupling", "mixture", "flow matching", "score")
PROXY = "<proxy of the pose>"  # among the data of an example; see `abduce.amortized.gnpe`


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a posterior network is made of; see `ab.npe`."""

    head: str = "spline"
    width: int = 64
    depth: int = 2
    context_dim: int = 64
    num_layers: int = 4
    num_bins: int = 8
    num_components: int = 8
    num_candidates: int | None = 0
    num_networks: int = 1
    precision: str | None = None
    frame: bool | None = False
    missing: tuple[tuple[str, float], ...] = ()
    sets: str = "pool"
    compose: bool = False
    robustness: float = 0.0
    pose: Pose | None = None

    def __post_init__(self):
        check_settings(self, HEADS, (*SIZES, "num_networks"))
        if self.sets not in ("pool", "transformer"):
            raise InvalidAlgorithm(f"sets={self.sets!r} is not 'pool' or 'transformer'.")


class PosteriorNetwork(eqx.Module):
    """Encoder, discrete latents, continuous latents.

    Attributes:
        encoder: From observations to a context.
        choices: Law of the discrete latents, or None.
        link: Tells the head what the discrete latents are.
        head: Law of the standardized continuous coordinates, or None.
    """

    encoder: Encoder
    choices: Choices | None
    link: Linear | None
    head: Any

    def __init__(self, key: Any, layout: Layout, settings: Settings, shapes: Any):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        c = settings.context_dim
        extra = 2 * layout.dim if settings.frame else 0
        if settings.pose is not None and not settings.pose.exact:
            extra = len(settings.pose.kernel)
        self.encoder = Encoder(
            k1, layout, shapes, c, settings.width, settings.depth, settings.precision,
            extra, settings.sets,
        )  # fmt: skip
        self.choices = self.link = self.head = None
        if layout.discrete:
            counts = tuple(d.num_values for d in layout.discrete for _ in range(d.size))
            self.choices = Choices(k2, c, counts, settings.width)
            self.link = Linear(k4, self.choices.width, c)
        if layout.dim:
            self.head = make_head(k3, c, layout.dim, settings)

    def continue_from(self, context: Any, discrete: Any) -> Any:
        """The context of the continuous latents."""
        if self.choices is None or self.link is None:
            return context
        return context + self.link(self.choices.one_hot(discrete))

    def log_density(self, context: Any, v: Any, discrete: Any) -> Any:
        """Of standardized coordinates and discrete latents."""
        total = jnp.zeros((), jnp.result_type(float))
        if self.choices is not None:
            total = total + self.choices.log_density(context, discrete)
        if self.head is not None:
            total = total + self.head.log_density(self.continue_from(context, discrete), v)
        return total

    def draw(self, context: Any, key: Any, e: Any) -> tuple[Any, Any, Any]:
        """Standardized coordinates, discrete latents, and their log density."""
        total = jnp.zeros((), jnp.result_type(float))
        discrete, v = jnp.zeros((0,), jnp.int32), jnp.zeros((0,), jnp.result_type(float))
        if self.choices is not None:
            discrete, score = self.choices.draw(context, key)
            total = total + score
        if self.head is not None:
            v, score = self.head.draw(self.continue_from(context, discrete), e)
            total = total + score
        return v, discrete, total


def make_head(key: Any, context_dim: int, dim: int, settings: Settings) -> Any:
    """The law of `dim` coordinates."""
    hidden = (settings.width, settings.width)
    if settings.head == "mixture":
        return Mixture(key, context_dim, dim, settings.num_components)
    if settings.head == "flow matching":
        return FlowMatching(key, context_dim, dim, 2 * settings.width, settings.depth + 1, 24)
    if settings.head == "score":
        return Score(key, context_dim, dim, 2 * settings.width, settings.depth + 1, 32)
    return Flow(
        key, context_dim, dim, settings.num_layers, hidden, settings.num_bins,
        settings.head == "coupling",
    )  # fmt: skip


def standardized(scales: Any, u: Any) -> Any:
    """Coordinates in units of the prior's spread."""
    centre, spread = scales["u"]
    return (u - centre) / spread


def encode(
    layout: Layout, network: PosteriorNetwork, scales: Any, example: Any, frame: Any = None
) -> Any:
    """The context of one example: `observed`, `arguments`, `mask` and `missing`."""
    groups = features(scales["features"], raw_features(layout, example, example["missing"]))
    extra = None if frame is None else frame_features(frame)
    if "proxy" in scales:
        centre, spread = scales["proxy"]
        extra = squash((example["observed"][PROXY] - centre) / spread)
    return network.encoder(groups, example["mask"], extra)


def find_frame(
    layout: Layout, settings: Settings, example: Any, scales: Any, arguments: Arguments
) -> Any:
    """Laplace's approximation for an example, or None where the head does without."""
    if not settings.frame:
        return None
    task = PosteriorTask(layout, settings)
    data = {"scales": scales, "simulation": {"arguments": arguments}}
    return laplace_frame(lambda v: task.log_joint(v, example, data), layout.dim)


@dataclasses.dataclass(frozen=True)
class PosteriorTask:
    """Training on pairs of latents and data; `data` is `{"simulation", "scales"}`."""

    layout: Layout
    settings: Settings

    def simulate(self, key: Any, num: int, data: Any) -> Any:
        k1, k2 = jax.random.split(key)
        one = Simulation(self.layout).one
        batch = jax.vmap(lambda k: one(k, data["simulation"]))(jax.random.split(k1, num))
        return self._hide(batch, k2, num)

    def read(self, rows: Any, key: Any, data: Any) -> Any:
        layout = self.layout
        arguments = data["simulation"]["arguments"]
        num = len(next(iter(rows.values())))
        k1, k2 = jax.random.split(key)

        def one(row, key):
            values, mine = with_arguments(row, arguments)
            return Simulation(layout).arrange(values, mine, key)

        batch = jax.vmap(one)(rows, jax.random.split(k1, num))
        return self._hide(batch, k2, num)

    def _hide(self, batch: Any, key: Any, num: int) -> Any:
        """Adds which elements there are, and which entries are missing."""
        k1, k2 = jax.random.split(key)
        batch["mask"] = None
        if self.layout.sizes is not None:
            low, high = self.layout.sizes
            counts = random_sizes(k1, num, low, high)
            batch["mask"] = jnp.arange(high) < counts[:, None]
        batch["missing"] = None
        if self.settings.missing:
            rates = dict(self.settings.missing)
            gone = {}
            for i, (a, x) in enumerate(batch["observed"].items()):
                k, q = jax.random.split(jax.random.fold_in(k2, i))
                # A rate for each example, so that all degrees of missingness are seen.
                most = 2 * rates.get(a, 0.0)
                rate = most * jax.random.uniform(q, (num,) + (1,) * (x.ndim - 1))
                gone[a] = jax.random.uniform(k, x.shape) < rate
            batch["missing"] = gone
        return batch

    def loss(self, network: Any, key: Any, batch: Any, data: Any) -> Any:
        num = len(jax.tree.leaves(batch["observed"])[0])
        if self.settings.num_networks == 1:
            return self._loss(network, key, batch, data, num)
        keys = jax.random.split(key, self.settings.num_networks)
        losses = eqx.filter_vmap(
            lambda net, k: self._loss(net, k, batch, data, num), in_axes=(eqx.if_array(0), 0)
        )(network, keys)
        return jnp.mean(losses)

    def _loss(self, network, key, batch, data, num):
        def one(example, key):
            return self._example(network, example, key, data)

        return jnp.mean(jax.vmap(one)(batch, jax.random.split(key, num)))

    def _example(self, network: PosteriorNetwork, example: Any, key: Any, data: Any) -> Any:
        layout, scales = self.layout, data["scales"]
        frame = find_frame(
            layout, self.settings, example, scales, data["simulation"]["arguments"]
        )
        context = encode(layout, network, scales, example, frame)
        discrete = flat_discrete(layout, example["discrete"])
        total = jnp.zeros((), jnp.result_type(float))
        if self.settings.robustness:
            total = total + self.settings.robustness * sensitivity(
                network,
                lambda d: encode(layout, network, scales, perturbed(layout, scales, example, d)),
                no_perturbation(example),
                jax.random.fold_in(key, 1),
            )
        if network.choices is not None:
            total = total - network.choices.log_density(context, discrete)
        if network.head is not None:
            context = network.continue_from(context, discrete)
            v = standardized(scales, example["u"])
            if frame is not None:
                v = to_frame(frame, v)
                total = total + jnp.sum(jnp.log(jnp.diagonal(frame[1])))
            if self.settings.num_candidates:
                total = total + self._candidates(network, context, example, v, key, data, frame)
            else:
                total = total + network.head.loss(context, v, key)
        return total

    def _candidates(self, network, context, example, v, key, data, frame):
        """Forward divergence over several points, weighted by the model's density.

        The true latent is an exact posterior draw; with `K` draws of `q` and self-normalized
        weights `p / q` the average stays exact (iterated sampling importance resampling leaves the
        posterior invariant). Minus `1 / (K + 1)` for each draw of `q` is a control variate of mean
        zero: at `q = p` the gradient vanishes.
        """
        k = self.settings.num_candidates or 0
        frozen = jax.lax.stop_gradient(network.head)
        at = jax.lax.stop_gradient(context)
        noise = jax.random.normal(key, (k, frozen.noise_dim), v.dtype)
        drawn, log_q = jax.vmap(lambda e: frozen.draw(at, e))(noise)
        points = jax.lax.stop_gradient(jnp.concatenate([v[None], drawn]))
        log_q = jnp.concatenate([frozen.log_density(at, v)[None], log_q])
        at_points = points if frame is None else frame[0] + points @ frame[1].T
        log_p = jax.vmap(lambda x: self.log_joint(x, example, data))(at_points)
        log_w = jax.lax.stop_gradient(log_p - log_q)
        log_w = jnp.where(jnp.isnan(log_w), -jnp.inf, log_w)
        # Where the model's density fails at the truth itself, the plain loss is left.
        log_w = log_w.at[0].set(jnp.where(jnp.isfinite(log_w[0]), log_w[0], jnp.inf))
        weights = jnp.where(jnp.isfinite(log_w[0]), jax.nn.softmax(log_w), jnp.eye(k + 1)[0])
        control = jnp.full((k + 1,), 1 / (k + 1)).at[0].set(0.0)
        scores = jax.vmap(lambda x: network.head.log_density(context, x))(points)
        better = -jnp.sum((weights - control) * scores)
        # The value reported stays -log q at the true latents, in nats.
        return jax.lax.stop_gradient(-scores[0] - better) + better

    def log_joint(self, v: Any, example: Any, data: Any) -> Any:
        """Log density of the model at standardized coordinates, up to a constant."""
        layout = self.layout
        target, held, u = self._at(v, example, data)
        if example["mask"] is None and example["missing"] is None:
            return target(held, u)
        total, records = self._scores(target, held, u)
        for group in layout.groups:
            for a in group.sites:
                score = records[a]["score"]
                total = total - jnp.sum(jnp.where(_absent(group, a, score, example), score, 0.0))
        return total

    def _at(self, v: Any, example: Any, data: Any) -> tuple[Any, Any, Any]:
        """The target of the continuous latents, what it holds, and the point in it."""
        layout = self.layout
        centre, spread = data["scales"]["u"]
        arguments = data["simulation"]["arguments"]
        if layout.arguments:
            arguments = Arguments(arguments.static, list(example["arguments"]))
        values = dict(example["observed"])
        for d in layout.discrete:
            values[d.address] = example["discrete"][d.address].reshape(d.shape) + d.low
        with outside_scopes():
            program = stage_packed(arguments)
        target, held = continuous_target(layout, program, arguments, values)
        return target, held, centre + spread * v

    @staticmethod
    def _scores(target: Any, held: Any, u: Any) -> tuple[Any, Any]:
        out = target.split_run(held, u, frozenset({"score"}))
        return out["log_density"] + out["weight"], out["records"]

    def log_prior(self, v: Any, example: Any, data: Any) -> Any:
        """Log density of the latents alone at standardized coordinates, up to a constant."""
        target, held, u = self._at(v, example, data)
        total, records = self._scores(target, held, u)
        scores = [records[a]["score"] for a in self.layout.observed if "score" in records[a]]
        return total - sum(jnp.sum(x) for x in scores)

    def explain(self, batch: Any) -> str:
        for a, x in batch["observed"].items():
            bad = ~np.isfinite(np.asarray(x, np.float64))
            if bad.any():
                return (
                    f"{int(bad.sum())} of the {bad.size} simulated values of site {a!r} are not "
                    f"finite. Make the simulator return finite values there."
                )
        u = np.asarray(batch["u"])
        for latent in self.layout.latents:
            bad = ~np.isfinite(u[..., latent.start : latent.stop])
            if bad.any():
                return (
                    f"the coordinates of the latent {latent.address!r} are not finite in "
                    f"{int(bad.any(-1).sum())} simulations. Its prior draws lie on the edge of its "
                    f"support."
                )
        return (
            "latents and data are finite, so the network itself diverged. Lower learning_rate= or "
            "clip=."
        )


def _absent(group: Group, address: str, score: Any, example: Any) -> Any:
    """Which elements are not there; without their score they are summed out."""
    absent = jnp.zeros(score.shape, bool)
    if group.kind == "set" and example["mask"] is not None:
        absent |= ~example["mask"].reshape((-1,) + (1,) * (score.ndim - 1))
    if example["missing"] is not None:
        gone = example["missing"][address]
        absent |= gone.any(tuple(range(score.ndim, gone.ndim)))
    return absent


def fits(task: PosteriorTask, sample: Any, scales: Any, simulation: Any) -> bool:
    """Whether Laplace's approximation is of use: true latents lie within it, not far outside.

    Their squared distance per coordinate is 1 on average where it is exact. Several modes, or a
    ridge, put most of them many of its spreads away.
    """
    framed = PosteriorTask(task.layout, dataclasses.replace(task.settings, frame=True))
    some = {k: jax.tree.map(lambda x: x[:256], sample[k]) for k in _EXAMPLE}
    square = np.asarray(_distances(framed, some, scales, simulation["arguments"]))
    return bool(np.isfinite(square).all() and np.quantile(square, 0.98) < _FAR)


_FAR = 12.0  # squared distance per coordinate; 98% of normal draws are below 5.4 (and less in many)
_EXAMPLE = ("u", "discrete", "observed", "arguments", "mask", "missing")


def _distances_now(task, sample, scales, arguments):
    def one(example):
        frame = find_frame(task.layout, task.settings, example, scales, arguments)
        w = to_frame(frame, standardized(scales, example["u"]))
        return jnp.mean(w**2)

    return jax.vmap(one)(sample)


_distances = jax.jit(_distances_now, static_argnums=0)


def flat_discrete(layout: Layout, discrete: Any) -> Any:
    """All discrete latents in one vector, each from 0."""
    parts = [discrete[d.address].reshape(-1) for d in layout.discrete]
    return jnp.concatenate(parts) if parts else jnp.zeros((0,), jnp.int32)


def random_sizes(key: Any, num: int, low: int, high: int) -> Any:
    """Sizes between `low` and `high`: half uniform, half with uniform logarithm."""
    z = jax.random.uniform(key, (2, num))
    least, most = jnp.log(low + 0.5), jnp.log(high + 0.5)
    flat = low + jnp.floor(z[0] * (high + 1 - low))
    steep = jnp.round(jnp.exp(least + z[0] * (most - least)))
    sizes = jnp.where(z[1] < 0.5, flat, steep)
    return jnp.clip(sizes, low, high).astype(jnp.int32)
