"""Group equivariant neural posterior estimation: data in a standard pose, pose by Gibbs iterations.

Dax, Green, Gair, Deistler, Schoelkopf and Macke, "Group equivariant neural posterior estimation",
ICLR 2022. With `g` the pose of the latents `theta`, `T_a` the action of a pose on data, and the
proxy

    g_hat = g + kernel * e,   e ~ N(0, I),

a network learns `q(theta | T_{-g_hat} x, g_hat)`, with the pose counted from the proxy. That is the
conditional `p(theta | x, g_hat)` of the joint law `p(theta | x) N(g_hat; g, kernel^2)`, whatever
the symmetry: `x` can be had back from `T_{-g_hat} x` and `g_hat`. Where the symmetry is exact,
`T_{-g_hat} x` alone tells all. The other conditional, of the proxy, is known. Alternating between
both leaves the joint law invariant, and the draws of `theta` that of the posterior.

A second, small network learns the proxy given the data as they are. Chains start from its draws.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.encoder import feature_scales, raw_features, robust_scale
from abduce.amortized.layout import Latent, Layout
from abduce.amortized.pose_equivariance import PoseEquivariance, pose_slot
from abduce.amortized.posterior_model import AmortizedLaw, make_law
from abduce.amortized.posterior_network import (
    PROXY,
    PosteriorNetwork,
    PosteriorTask,
    Settings,
    encode,
)
from abduce.amortized.probes import verify
from abduce.amortized.reading import read_example
from abduce.errors import InvalidAlgorithm, NoDensity, NotFitted
from abduce.inference.problem import Problem
from abduce.inference.static import Static

__all__ = [
    "GibbsTask",
    "PosedNetwork",
    "attach",
    "gibbs",
    "gibbs_draws",
    "main_part",
    "make_task",
    "new_network",
    "pose_scales",
    "refuse_density",
]

_DRIFT = 0.1  # of the pose over the second half of the chain, in its standard deviations
_MEMORY = 0.1  # correlation of the pose with itself half-way, over chains
_KERNEL_KEY = 0x6A7E


class PosedNetwork(eqx.Module):
    """The network of the posterior given the proxy, and that of the proxy to start from."""

    main: PosteriorNetwork
    start: PosteriorNetwork

    def __init__(self, key: Any, layout: Layout, settings: Settings, shapes: Any):
        k1, k2 = jax.random.split(key)
        self.main = PosteriorNetwork(k1, layout, settings, shapes)
        self.start = PosteriorNetwork(
            k2, _start_layout(layout, settings), _start_settings(settings), shapes
        )


def _start_layout(layout: Layout, settings: Settings) -> Layout:
    """That of a law of the proxy alone."""
    assert settings.pose is not None
    slot = pose_slot(layout, settings.pose.latent)
    only = Latent(slot.address, slot.shape, 0, slot.stop - slot.start)
    return dataclasses.replace(layout, latents=(only,), discrete=(), conditional=False)


def _start_settings(settings: Settings) -> Settings:
    return dataclasses.replace(settings, head="mixture", pose=None)


def new_network(key: Any, layout: Layout, settings: Settings, shapes: Any) -> Any:
    """The network that an estimator with these settings has."""
    make = PosteriorNetwork if settings.pose is None else PosedNetwork
    return make(key, layout, settings, shapes)


def main_part(est: Any) -> Any:
    """The estimator with the network of the posterior alone."""
    if est.settings.pose is None or est.network is None:
        return est
    return dataclasses.replace(est, network=est.network.main)


@dataclasses.dataclass(frozen=True)
class GibbsTask(PosteriorTask):
    """Training on data moved back by a proxy of their pose.

    Examples have the moved data in `observed`, with the proxy, the data as they were in `plain`,
    and in `u` the pose counted from the proxy.
    """

    equivariance: PoseEquivariance

    def simulate(self, key: Any, num: int, data: Any) -> Any:
        return self._standardize(super().simulate(key, num, data), key)

    def read(self, rows: Any, key: Any, data: Any) -> Any:
        return self._standardize(super().read(rows, key, data), key)

    def _standardize(self, batch: Any, key: Any) -> Any:
        pose = self.settings.pose
        assert pose is not None
        slot = pose_slot(self.layout, pose.latent)
        u = batch["u"]
        mine = slice(slot.start, slot.stop)
        noise = jax.random.normal(jax.random.fold_in(key, _KERNEL_KEY), u[:, mine].shape, u.dtype)
        offset = noise * jnp.asarray(pose.kernel, u.dtype)
        proxy = u[:, mine] + offset
        move = functools.partial(at_proxy, self.equivariance, self.layout)
        return {
            **batch,
            "u": u.at[:, mine].set(-offset),
            "observed": jax.vmap(move)(batch["observed"], proxy),
            "plain": batch["observed"],
        }

    def _example(self, network: Any, example: Any, key: Any, data: Any) -> Any:
        scales = data["scales"]
        context = _start_context(self.layout, self.settings, network.start, scales, {
            **example, "observed": example["plain"],
        })  # fmt: skip
        centre, spread = scales["start"]["u"]
        proxy = (example["observed"][PROXY] - centre) / spread
        start = network.start.head.loss(context, proxy, key)
        return start + super()._example(network.main, example, key, data)


def make_task(layout: Layout, settings: Settings, equivariance: Any) -> PosteriorTask:
    """What an estimator with these settings is trained on."""
    if settings.pose is None:
        return PosteriorTask(layout, settings)
    return GibbsTask(layout, settings, equivariance)


def at_proxy(equivariance: PoseEquivariance, layout: Layout, observed: Any, proxy: Any) -> Any:
    """The data of one example moved back by the proxy, and the proxy."""
    return {**equivariance.moved(layout, observed, -proxy), PROXY: proxy}


def _start_context(layout: Layout, settings: Settings, network: Any, scales: Any, example: Any):
    return encode(_start_layout(layout, settings), network, scales["start"], example)


def pose_scales(est: Any, sample: Any) -> dict[str, Any]:
    """Scales that `encode` and the start need, and a transformed probe; from training examples."""
    settings, dtype = est.settings, jnp.result_type(float)
    if settings.pose is None:
        return {}
    proxy = tuple(
        jnp.asarray(x, dtype) for x in robust_scale(np.asarray(sample["observed"][PROXY]))
    )
    plain = {**sample, "observed": sample["plain"]}
    raw = jax.vmap(lambda x: raw_features(est.layout, x, x["missing"]))(plain)
    first = jax.tree.map(lambda x: x[0], sample["plain"])
    out = {
        "start": {"u": proxy, "features": feature_scales(est.layout, raw)},
        "moved": _probe(est.equivariance, est.layout, settings, first),
    }
    return out if settings.pose.exact else {**out, "proxy": proxy}


def _probe(equivariance: Any, layout: Layout, settings: Settings, observed: Any) -> Any:
    """Data moved by one kernel: tells transformations apart."""
    pose = jnp.asarray(settings.pose.kernel, jnp.result_type(float))  # type: ignore[union-attr]
    out = equivariance.moved(layout, observed, pose)
    return {a: jnp.asarray(out[a], jnp.result_type(float)) for a in layout.observed}


def attach(est: Any, equivariance: Any) -> Any:
    """A loaded estimator with its transformation again.

    Raises:
        InvalidAlgorithm: It has none, or had another one in training.
    """
    pose = est.settings.pose
    if pose is None:
        raise InvalidAlgorithm(
            f"ab.{est.name}: the estimator was trained without equivariance=; there is nothing to "
            f"attach."
        )
    if not isinstance(equivariance, PoseEquivariance):
        raise InvalidAlgorithm(
            f"ab.{est.name}: with_equivariance takes the ab.amortized.PoseEquivariance of "
            f"training, got {type(equivariance).__name__}."
        )
    mine = dataclasses.replace(equivariance.pose(len(pose.kernel)),
                               num_iterations=pose.num_iterations)  # fmt: skip
    if mine != pose:
        raise InvalidAlgorithm(
            f"ab.{est.name}: the estimator was trained with latent={pose.latent!r}, "
            f"kernel={pose.kernel}, exact={pose.exact}; got latent={mine.latent!r}, "
            f"kernel={mine.kernel}, exact={mine.exact}."
        )
    first = {a: jnp.asarray(est.probes.values[a][0]) for a in est.layout.observed}
    moved = _probe(equivariance, est.layout, est.settings, first)
    for a, before in est.scales["moved"].items():
        gap = np.abs(np.asarray(moved[a]) - np.asarray(before))
        if not (gap <= 1e-3 * (1 + np.abs(np.asarray(before)))).all():
            raise InvalidAlgorithm(
                f"ab.{est.name}: transform of {a!r} is another one than in training: stored data "
                f"come out {float(gap.max()):.3g} apart."
            )
    settings = dataclasses.replace(est.settings, pose=equivariance.pose(len(pose.kernel)))
    return dataclasses.replace(est, settings=settings, equivariance=equivariance)


def refuse_density(est: Any, what: str) -> None:
    """Where a log density is needed, draws of a chain do not do.

    Raises:
        NoDensity: The estimator has draws alone.
    """
    if est.settings.pose is not None:
        raise NoDensity(
            f"ab.{est.name}(equivariance=...): {what} needs the log density of the posterior, but "
            f"Gibbs iterations over the pose of {est.settings.pose.latent!r} give draws alone. Use "
            f"est(model).posterior(...), or an estimator without equivariance=."
        )


# ---------------------------------------------------------------------- inference


def gibbs(
    draw: Callable[[Any, Any], Any],
    start: Any,
    where: slice,
    kernel: Any,
    num_iterations: int,
    key: Any,
) -> tuple[Any, Any, Any]:
    """A chain between latents and proxy (section 3 of the paper).

    Args:
        draw: `f(key, proxy)` draws a vector of latents given the data and the proxy, with the pose,
            `vector[where]`, counted from the proxy.
        start: The first proxy, shape `(size,)`.
        where: The pose in the vector.
        kernel: Standard deviation of the proxy about the pose, shape `(size,)`.
        num_iterations: How many.
        key: Random key.

    Returns:
        The last vector, the proxy that it was drawn under, and the pose in every iteration, shape
        `(num_iterations, size)`.
    """

    def step(carry, key):
        proxy = carry[2]
        k1, k2 = jax.random.split(key)
        vector = draw(k1, proxy)
        vector = vector.at[where].add(proxy)
        pose = vector[where]
        new = pose + kernel * jax.random.normal(k2, pose.shape, pose.dtype)
        return (vector, proxy, new), pose

    empty = jnp.zeros(jax.eval_shape(draw, key, start).shape, start.dtype)
    carry, poses = jax.lax.scan(
        step, (empty, start, start), jax.random.split(key, num_iterations)
    )
    return carry[0], carry[1], poses


def gibbs_draws(est: Any, problem: Problem, key: Any) -> tuple[Any, Any, Any, list[str]]:
    """Draws of the posterior, each the end of a chain of its own.

    Returns:
        The law, its operands at the data as they are, vectors `(num_samples, dim)`, and messages.

    Raises:
        NotFitted: The estimator was loaded and does not know its transformation.
    """
    if est.settings.pose is not None and est.equivariance is None:
        raise NotFitted(
            f"ab.{est.name}: an estimator loaded from disk does not know how the pose "
            f"{est.settings.pose.latent!r} moves the data, which is code. Write "
            f"est.with_equivariance(ab.amortized.PoseEquivariance(...)), as in training."
        )
    example = read_example(est, problem)
    me = main_part(est)
    law, operands = make_law(me, problem, example)
    arrays, static = eqx.partition(est.network.start, eqx.is_array)
    is_traced = problem.is_traced or isinstance(key, jax.core.Tracer)
    messages = [] if is_traced else verify(est, problem)
    vectors, proxies, halfway, ends = _chains(
        law, est.equivariance, Static(static), est.num_samples, arrays, operands, key
    )
    if is_traced:
        return law, operands, vectors, messages
    messages += _unsettled(est, *(np.asarray(x, np.float64) for x in (halfway, ends)))
    if est.novelty is not None:
        middle = jnp.median(proxies, 0)
        moved = at_proxy(est.equivariance, est.layout, example["observed"], middle)
        messages += est.novelty.messages(me, {**example, "observed": moved}, problem.arguments)
    return law, operands, vectors, messages


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _chains(
    law: AmortizedLaw,
    equivariance: PoseEquivariance,
    start: Static,
    num: int,
    arrays: Any,
    operands: Any,
    key: Any,
) -> Any:
    layout, settings = law.layout, law.settings
    main, scales, example, dynamic = operands
    pose = settings.pose
    assert pose is not None
    slot = pose_slot(layout, pose.latent)
    size = slot.stop - slot.start
    first = AmortizedLaw(
        _start_layout(layout, settings), _start_settings(settings), law.static, start
    )

    def draw(key, proxy):
        moved = {**example, "observed": at_proxy(equivariance, layout, example["observed"], proxy)}
        return law.draw(key, (main, scales, moved, dynamic))

    def chain(key):
        k1, k2 = jax.random.split(key)
        proxy = first.draw(k1, (arrays, scales["start"], example, dynamic))[:size]
        kernel = jnp.asarray(pose.kernel, proxy.dtype)
        where = slice(slot.start, slot.stop)
        return gibbs(draw, proxy, where, kernel, pose.num_iterations, k2)

    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(num, dtype=jnp.uint32))
    vectors, proxies, poses = jax.vmap(chain)(keys)
    return vectors, proxies, poses[:, (pose.num_iterations - 1) // 2], poses[:, -1]


def _unsettled(est: Any, halfway: np.ndarray, ends: np.ndarray) -> list[str]:
    """A warning where chains remember where they were half-way, or still move together.

    Args:
        est: The estimator.
        halfway, ends: The pose of each chain, shape `(num_samples, size)`.
    """
    pose, num = est.settings.pose, len(ends)
    if pose.num_iterations < 2 or num < 2:
        return []
    a, b = halfway - halfway.mean(0), ends - ends.mean(0)
    widths = np.sqrt(np.maximum((a**2).mean(0) * (b**2).mean(0), 1e-60))
    memory = float(np.max(np.abs((a * b).mean(0)) / widths))
    drift = float(np.max(np.abs(halfway.mean(0) - ends.mean(0)) / np.maximum(b.std(0), 1e-30)))
    # Five standard errors of each: less than one false warning in a million.
    if memory <= _MEMORY + 5 / num**0.5 and drift <= _DRIFT + 5 * (2 / num) ** 0.5:
        return []
    return [
        f"ab.{est.name}: after {pose.num_iterations} iterations the chains have not forgotten "
        f"their start: the pose of {pose.latent!r} has a correlation of {memory:.2g} with that "
        f"half-way, and its mean moved by {drift:.2g} standard deviations since. Train longer, "
        f"or raise kernel= or num_iterations= of the PoseEquivariance."
    ]
