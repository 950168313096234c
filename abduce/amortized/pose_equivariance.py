"""How a latent pose moves the data: what the user says of a symmetry, and what is checked of it.

A *pose* is a latent, such as a shift in time or a scale, whose change by `a` acts on the data as a
known transformation `T_a`, exactly or nearly. The pose is a real vector: a real latent itself, or
the logarithm of a positive one; poses add, so `T_a T_b = T_{a+b}` and `T_{-a}` undoes `T_a`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from abduce.amortized.encoder import robust_scale
from abduce.amortized.layout import Latent, Layout
from abduce.errors import InvalidAlgorithm, InvalidValue, UnknownAddress, suggest
from abduce.inference.algorithm import check_count
from abduce.ppl.operations import outside_scopes
from abduce.ppl.program import stage_packed

__all__ = ["Pose", "PoseEquivariance", "check_pose", "pose_of", "pose_slot"]

_TOLERANCE = 1e-3  # of the composition law, relative to the spread of the data
_WIDER = 1.2  # spread of data without their pose, relative to the data: wrong way


@dataclasses.dataclass(frozen=True)
class Pose:
    """What is saved of a `PoseEquivariance`: all but the transformation.

    Attributes:
        latent: Address of the pose.
        kernel: Standard deviation of the proxy about each of its coordinates.
        exact: Whether the network is told nothing of the proxy.
        num_iterations: Of the Gibbs chain.
    """

    latent: str
    kernel: tuple[float, ...]
    exact: bool
    num_iterations: int

    def __post_init__(self):
        scale = np.asarray(self.kernel, np.float64)
        if not (scale.size and np.isfinite(scale).all() and (scale > 0).all()):
            raise InvalidValue(f"pose: kernel={self.kernel!r} is no tuple of positive numbers.")
        check_count("pose", "num_iterations", self.num_iterations)


@dataclasses.dataclass(frozen=True, init=False)
class PoseEquivariance:
    """A latent pose that moves the data in a known way, for `ab.npe(..., equivariance=)`.

    Dax, Green, Gair, Deistler, Schoelkopf and Macke, "Group equivariant neural posterior
    estimation", ICLR 2022. The network sees data moved back by a blurred pose, the *proxy*, so it
    need not learn what the transformation does; a Gibbs chain finds pose and proxy together. The
    network is told the proxy, so the symmetry need not be exact.

    `ab.amortized.ScaleEquivariance` is another thing: there the group element is computed from data
    and prior, nothing is blurred, and no chain is needed.

    Args:
        latent: Address of the pose: a latent with real values, or positive ones.
        transform: `f(value, pose)`: the data of one site moved by a pose of the latent's shape (the
            logarithm, for a positive latent). A function where one site is observed, otherwise a
            dict by address; sites that are not in it do not move.
        kernel: Standard deviation of the proxy about the pose, one number or one for each
            coordinate, in units of the pose. The chain forgets its start by
            `s^2 / (s^2 + kernel^2)` in each iteration, `s` the posterior's standard deviation: take
            a few times that, or where it starts off (the error of a plain estimate) if that is
            more. The larger it is, the more is left to the network.
        exact: Whether the law of everything else is the same for every pose, and the prior of the
            pose flat over many kernels. Then the network is not told the proxy.
        num_iterations: Of the chain.

    Raises:
        InvalidAlgorithm, InvalidValue: A setting does not fit.

    Example:
        >>> shifted = ab.amortized.PoseEquivariance("shift", lambda y, a: y + a, kernel=1.0)
        >>> est = ab.npe(model, observed=["y"], equivariance=shifted)
    """

    latent: str
    transform: Callable[[Any, Any], Any] | tuple[tuple[str, Callable[[Any, Any], Any]], ...]
    kernel: tuple[float, ...]
    exact: bool
    num_iterations: int

    def __init__(
        self,
        latent: str,
        transform: Callable[[Any, Any], Any] | Mapping[str, Callable[[Any, Any], Any]],
        kernel: Any,
        *,
        exact: bool = False,
        num_iterations: int = 30,
    ):
        name = "ab.amortized.PoseEquivariance"
        check_count(name, "num_iterations", num_iterations)
        moves: Any = transform
        if isinstance(transform, Mapping):
            moves = tuple(sorted(transform.items()))
        each = [f for _, f in moves] if isinstance(transform, Mapping) else [moves]
        if not each or not all(callable(f) for f in each):
            raise InvalidAlgorithm(
                f"{name}: transform= is a function f(value, pose), or a dict of them by address, "
                f"got {transform!r}."
            )
        scale = np.atleast_1d(np.asarray(kernel, np.float64)).reshape(-1)
        if not (scale.size and np.isfinite(scale).all() and (scale > 0).all()):
            raise InvalidValue(
                f"{name}: kernel= is a positive standard deviation, got {kernel!r}."
            )
        values = (latent, moves, tuple(scale.tolist()), bool(exact), int(num_iterations))
        for field, value in zip(dataclasses.fields(self), values, strict=True):
            object.__setattr__(self, field.name, value)

    def pose(self, size: int) -> Pose:
        """What is saved, for a pose of `size` coordinates."""
        kernel = self.kernel * size if len(self.kernel) == 1 else self.kernel
        return Pose(self.latent, kernel, self.exact, self.num_iterations)

    def by_address(self, layout: Layout) -> dict[str, Callable[[Any, Any], Any]]:
        """The transformation of each site that moves."""
        if isinstance(self.transform, tuple):
            return dict(self.transform)
        return {layout.observed[0]: self.transform}

    def moved(self, layout: Layout, observed: Mapping[str, Any], pose: Any) -> dict[str, Any]:
        """The data of one example after a change of the pose.

        Args:
            layout: Of the estimator.
            observed: Values by address.
            pose: By how much it changes, shape `(size,)`.
        """
        shape = dict(layout.addresses)[self.latent]
        out, dtype = dict(observed), jnp.result_type(float)
        for a, f in self.by_address(layout).items():
            out[a] = f(jnp.asarray(observed[a], dtype), pose.reshape(shape))
        return out


def pose_slot(layout: Layout, latent: str) -> Latent:
    """Where the coordinates of the pose are."""
    return next(s for s in layout.latents if s.address == latent)


def pose_of(
    name: str, equivariance: Any, layout: Layout, settings: Mapping[str, Any], missing: Any
) -> Pose:
    """Checks an equivariance against the layout and the other settings.

    Raises:
        UnknownAddress: It names no latent, or no observed site.
        InvalidAlgorithm, InvalidValue: See the messages.
    """
    if not isinstance(equivariance, PoseEquivariance):
        raise InvalidAlgorithm(
            f"ab.{name}: equivariance= takes ab.amortized.PoseEquivariance(latent, transform, "
            f"kernel), got {type(equivariance).__name__}."
        )
    for setting in ("num_candidates", "frame", "robustness", "compose"):
        if settings.get(setting):
            raise InvalidAlgorithm(
                f"ab.{name}: equivariance= and {setting}= exclude each other: the network learns "
                f"the posterior given a proxy of the pose, not that of the data alone."
            )
    if missing:
        raise InvalidAlgorithm(
            f"ab.{name}: equivariance= and missing= exclude each other: a transformation of the "
            f"data may mix entries that are there with others that are not."
        )
    known = {s.address: s for s in layout.latents}
    if equivariance.latent not in known:
        raise UnknownAddress(
            f"ab.{name}: equivariance: {equivariance.latent!r} is no continuous latent of "
            f"`{layout.model_name}` ({', '.join(known)}).{suggest(equivariance.latent, known)}"
        )
    if not isinstance(equivariance.transform, tuple) and len(layout.observed) > 1:
        raise InvalidAlgorithm(
            f"ab.{name}: equivariance: {', '.join(layout.observed)} are observed; say which of "
            f'them move, as transform={{"{layout.observed[0]}": f}}.'
        )
    for a in equivariance.by_address(layout):
        if a not in layout.observed:
            raise UnknownAddress(
                f"ab.{name}: equivariance: transform={{{a!r}: ...}} is no observed site "
                f"({', '.join(layout.observed)}).{suggest(a, layout.observed)}"
            )
    slot = known[equivariance.latent]
    size = slot.stop - slot.start
    if len(equivariance.kernel) not in (1, size):
        raise InvalidValue(
            f"ab.{name}: equivariance: kernel= has {len(equivariance.kernel)} numbers, but the "
            f"latent {slot.address!r} has shape {slot.shape}, {size} coordinates."
        )
    return equivariance.pose(size)


def check_pose(
    name: str, equivariance: PoseEquivariance, layout: Layout, rows: Any, batch: Any, arguments: Any
) -> None:
    """Compares what the user said with simulations.

    Args:
        name: Of the estimator, for messages.
        equivariance: What the user said.
        layout: Of the estimator.
        rows: Simulations by address.
        batch: The same as training examples, as they are.
        arguments: Of the model.

    Raises:
        InvalidAlgorithm: The pose is neither real nor positive, a site that moves is discrete, the
            transformation does not compose, or it moves the wrong way.
    """
    slot = pose_slot(layout, equivariance.latent)
    with outside_scopes():
        sites = stage_packed(arguments).sites
    u = np.asarray(batch["u"])[:, slot.start : slot.stop]
    value = np.asarray(rows[slot.address]).reshape(len(u), -1)
    is_pose = value.shape == u.shape and (
        np.allclose(u, value, rtol=1e-4, atol=1e-5)
        or ((value > 0).all() and np.allclose(u, np.log(value), rtol=1e-4, atol=1e-4))
    )
    if not is_pose:
        raise InvalidAlgorithm(
            f"ab.{name}: equivariance: the latent {slot.address!r} ({sites[slot.address].family}, "
            f"shape {slot.shape}) has a support with edges that a pose could be moved across. "
            f"Poses take real or positive values: use dist.Normal or dist.LogNormal instead."
        )
    pose, observed = jnp.asarray(u), batch["observed"]
    other = jnp.roll(pose, 1, 0) / 2

    def move(observed, pose):
        return jax.vmap(lambda x, a: equivariance.moved(layout, x, a))(observed, pose)

    after = {
        "still": move(observed, 0 * pose),
        "back": move(observed, -pose),
        "whole": move(observed, pose + other),
        "twice": move(move(observed, pose), other),
    }
    is_log = not np.allclose(u, value, rtol=1e-4, atol=1e-5)
    hint = ", and that of a positive latent is its logarithm" if is_log else ""
    for a in equivariance.by_address(layout):
        if sites[a].is_discrete:
            raise InvalidAlgorithm(
                f"ab.{name}: equivariance: the observed site {a!r} ({sites[a].family}) is "
                f"discrete, so it cannot be moved."
            )
        x = np.asarray(observed[a])
        got = {k: np.asarray(v[a]) for k, v in after.items()}
        if got["still"].shape != x.shape:
            raise InvalidAlgorithm(
                f"ab.{name}: equivariance: transform of {a!r} turns shape {x.shape[1:]} into "
                f"{got['still'].shape[1:]}; it has to keep it."
            )
        gaps = {
            "f(x, 0) is not x": _gap(got["still"], x),
            "f(f(x, a), b) is not f(x, a + b)": _gap(got["twice"], got["whole"]),
        }
        for what, gap in gaps.items():
            if not gap < _TOLERANCE:
                raise InvalidAlgorithm(
                    f"ab.{name}: equivariance: transform of {a!r}: {what} (off by {gap:.2g} "
                    f"spreads). Poses add{hint}."
                )
        behind = _width(got["back"]) / _width(x)
        if behind > _WIDER:
            raise InvalidAlgorithm(
                f"ab.{name}: equivariance: transform of {a!r} moves the wrong way: f(x, -pose) "
                f"should undo the pose, but it leaves simulations {behind:.3g} times as spread out "
                f"as they are. Change the sign of the pose in it."
            )


def _gap(a: Any, b: Any) -> float:
    return float(np.max(np.abs(a - b)) / max(_width(b), 1e-30))


def _width(x: Any) -> float:
    """Spread of simulations, averaged over entries; logarithms where all are positive."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    return float(np.mean(robust_scale(np.log(x) if (x > 0).all() else x)[1]))
