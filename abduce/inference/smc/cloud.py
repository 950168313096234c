"""What a walk for a population carries: particles, weights, keys, and how it is set up."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from abduce.errors import InvalidModel
from abduce.inference.smc.population import Resampling, take
from abduce.ppl.interpreter import State, address_key, addresses

__all__ = [
    "BACKWARD",
    "ISLANDS",
    "MOVE",
    "NEXT_SCAN",
    "PARIS",
    "PROPOSE",
    "QMC",
    "RENEW",
    "STEP",
    "Cloud",
    "Particles",
    "Settings",
    "closed_error",
    "first_keys",
]

ISLANDS = "\0islands"  # the mapped axis of filters side by side
STEP = "\0step"  # the pseudo-address of the keys for resampling and proposals
# What the key of a step is folded with, apart from the times of a scan inside it.
PROPOSE, RENEW, BACKWARD, NEXT_SCAN, MOVE, PARIS, QMC = (2**32 - i for i in range(1, 8))


class Particles:
    """A value that differs by particle: `array` has the particle axis in front.

    `version` counts the ancestor maps that it has been read through.
    """

    __slots__ = ("array", "version")

    def __init__(self, array: Any, version: int = 0):
        self.array = array
        self.version = version


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a program is run for a population; static.

    Attributes:
        num_particles: N.
        resampling: When and how.
        store: 'paths' keeps each particle's whole past, 'tree' of it only what a particle descends
            from, 'filter' only moments of each step.
        capacity: Places in the tree; None: a default that grows with T + N log N.
        smoothing: 'genealogy' traces the ancestors back; 'ffbs' simulates backwards; 'two_filter'
            simulates forwards, guided by a backward filter; 'paris' also sums up functionals.
        functionals: Pairs of a name and an additive function of the path.
        ancestor_sampling: In conditional runs, the retained path gets a new past at each step.
        num_paths: How many paths 'ffbs' simulates (all particles share them); None: N.
        num_moves: How often a kernel moves the particles after a resampling.
        qmc: The particles of a step come from one randomised point set.
        islands: How many filters run side by side.
        mesh: Devices over whose first axis the particles are spread, or None.
        mesh_axis: Of islands, the name of the mesh's axis.
    """

    num_particles: int
    resampling: Resampling
    store: str = "paths"
    capacity: int | None = None
    smoothing: str = "genealogy"
    functionals: tuple[Any, ...] = ()
    ancestor_sampling: bool = False
    num_paths: int | None = None
    num_moves: int = 1
    qmc: bool = False
    islands: int = 1
    mesh: Any = None
    mesh_axis: str | None = None

    def spread(self, array: Any) -> Any:
        """Lays an array with a leading particle axis out over the mesh."""
        if self.mesh is None:
            return array
        spec = PartitionSpec(self.mesh.axis_names[0])
        return jax.lax.with_sharding_constraint(array, NamedSharding(self.devices, spec))

    @property
    def devices(self) -> Mesh:
        """The mesh, with axes that XLA may lay out."""
        return Mesh(self.mesh.devices, self.mesh.axis_names)

    @property
    def spans_processes(self) -> bool:
        """Whether the mesh has devices of several processes."""
        return self.mesh is not None and len({d.process_index for d in self.mesh.devices.flat}) > 1

    @property
    def conditional(self) -> bool:
        return self.resampling.conditional


class Cloud(State):
    """The state of a walk for a population.

    Attributes:
        keys: Per address, the key of its draws; folded along scans.
        population: The weights.
        increments: Log weights not yet added to the population, `(N,)` or scalar.
        guard: Where the particles are active, `(N,)`, or None: in a branch that some take.
        maps: Ancestor maps `(N,)` of the scans that have run, in order.
        retained: Per address, the value of particle 0 in conditional runs; in a 'score' walk, of
            all.
        proposed: Per address, values that a proposal drew.
        points: With quasi-Monte Carlo: per address, the uniform numbers of its draw; else None.
        sums: Per functional, its smoothed sum given each particle (`smoothing='paris'`).
        summaries: Per address, moments over particles (`store='filter'`).
        reports: What each scan reports of its steps.
        carries: The last carry of each scan, for resuming.
        mode: 'run'; 'propose' (latents are drawn and scored); 'score' (latents are given by
            `retained` and scored).
        closed: One path has been drawn backwards (particle Gibbs); nothing may weigh any more.
        scans: How many scans the walk has met; -1 inside one, where none is resumed.
    """

    __slots__ = (
        "carries", "closed", "guard", "increments", "keys", "maps", "mode", "points",
        "population", "proposed", "reports", "retained", "scans", "summaries", "sums",
    )  # fmt: skip

    def __init__(self, keys, inputs, population, *, retained=None, proposed=None, mode="run"):
        super().__init__(None, inputs, None)
        self.keys = keys
        self.population = population
        self.increments = jnp.zeros((), jnp.result_type(float))
        self.guard = None
        self.maps: list[Any] = []
        self.retained = retained or {}
        self.proposed = proposed or {}
        self.summaries: dict[str, Any] = {}
        self.sums: dict[str, Any] = {}
        self.reports: list[dict[str, Any]] = []
        self.carries: list[Any] = []
        self.mode = mode
        self.points: dict[str, Any] | None = None
        self.closed = False
        self.scans = 0

    def resolve(self, x: Any) -> tuple[Any, bool]:
        """A value read through the maps since, and whether it differs by particle."""
        if not isinstance(x, Particles):
            return x, False
        while x.version < len(self.maps):
            x.array = take(x.array, self.maps[x.version])
            x.version += 1
        return x.array, True

    def wrap(self, array: Any) -> Particles:
        """A value that differs by particle, made now."""
        return Particles(array, len(self.maps))

    def add(self, log_weights: Any) -> None:
        """Adds log weights, scalar or `(N,)`."""
        if self.closed and jnp.ndim(log_weights) > 0:
            raise closed_error()
        if self.guard is not None:
            log_weights = jnp.where(self.guard, log_weights, 0.0)
        self.increments = self.increments + log_weights

    def settle(self) -> None:
        """Moves the increments into the population."""
        self.population = self.population.reweight(self.increments)
        self.increments = jnp.zeros((), self.population.log_weights.dtype)


def closed_error() -> InvalidModel:
    return InvalidModel(
        "ab.particle_gibbs(backward_sampling=True) draws the path at the end of the scan, but the "
        "model has latents or data after it that depend on the path. Use ancestor_sampling alone."
    )


def first_keys(jaxpr: Any, key: Any) -> dict[str, Any]:
    """A key per address of a program."""
    return {a: address_key(key, a) for a in sorted({*addresses(jaxpr), STEP})}
