"""`ab.smc`: particle filtering or tempering, whichever the model asks for."""

from __future__ import annotations

import dataclasses
from typing import Any

from abduce.errors import InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.posterior import Posterior
from abduce.inference.problem import Problem
from abduce.inference.smc.cloud import Settings
from abduce.inference.smc.filtering import filter_posterior, run_filter
from abduce.inference.smc.flow import evidence_scans
from abduce.inference.smc.population import Resampling
from abduce.ppl.model import Model

__all__ = ["smc"]


@algorithm
class smc(Algorithm):
    """Sequential Monte Carlo: particles, weighted, resampled, moved.

    A model with a `lax.scan` that holds observed sites or factors runs as a **particle filter
    through that scan** (Gordon, Salmond and Smith 1993; Chopin and Papaspiliopoulos 2020):
    particles are resampled at its steps. Any other model is **tempered** from the prior (or from
    `proposal`) to the posterior (Del Moral, Doucet and Jasra 2006), with adaptive temperatures and
    MCMC moves.

    Args:
        num_particles: N.
        resampler: 'systematic', 'multinomial', 'stratified', 'residual', 'ssp', 'killing' or
            'optimal_transport'.
        threshold: Resample where the effective sample size is below this fraction of N; 0 never,
            1 at every step.
        proposal: Filtering: a Model called at each step of the scan as `proposal(given, carry,
            x)`, where `given` holds the step's observations. Tempering: a Model called as
            `proposal(given, *args)`, where the path starts.
        initial: Filtering: a Model called as `initial(given, *args)`, which proposes latents
            outside of the scan.
        lookahead: Filtering: a function `lookahead(given, carry, x)` of the *next* step's
            observations and input; a log weight by which particles are resampled in advance, and
            which is taken back at the step itself (the auxiliary particle filter of Pitt and
            Shephard 1999).
        store: Filtering: 'paths' returns whole paths; 'filter' keeps no past, so memory does not
            grow with the number of steps but for the moments of each step, which are in
            `diagnostics['filtered_mean/<address>']` and `['filtered_sd/<address>']`.
        smoothing: Filtering: 'genealogy' traces paths through their ancestors; 'ffbs' draws them
            by backward simulation (Godsill, Doucet and West 2004), N^2 work a step, for one scan
            whose carry depends on its past only through the step's latents.
        kernel: Tempering: the moves, `None` (Hamiltonian moves where latents are continuous),
            `ab.hmc(...)` or `ab.mh(...)`.
        num_moves: Tempering: moves at each temperature.
        temperatures: Tempering: a fixed increasing sequence that ends in 1, or None: adaptive.
        min_steps: Tempering: the least number of temperatures. The effective sample size cannot
            see what no particle has met, so it alone may not decide.
        path: Tempering: 'likelihood', 'data' (observations enter along their leading axis), or a
            tuple of Models over the same latents that leads up to the model.
        mesh: Filtering: a `jax.sharding.Mesh` over whose first axis the particles are spread. They
            are resampled globally, as on one device; `num_particles` must divide evenly.
        waste_free: Tempering: length of the chains whose states are all kept (Dau and Chopin
            2022), or None.

    The posterior has one chain of weighted draws, `log_evidence`, and per-step diagnostics.

    Raises (on use):
        Degenerate: Every particle has weight zero at some step.

    Example:
        >>> post = ab.smc(num_particles=4096)(model).posterior(key, given={"y": y})
        >>> post.log_evidence
    """

    num_particles: int = 1024
    resampler: str = "systematic"
    threshold: float = 0.5
    proposal: Any = None
    initial: Any = None
    lookahead: Any = None
    store: str = "paths"
    smoothing: str = "genealogy"
    kernel: Any = None
    num_moves: int | None = None
    temperatures: Any = None
    min_steps: int = 100
    path: Any = "likelihood"
    waste_free: int | None = None
    mesh: Any = None

    def __post_init__(self):
        check_count("smc", "num_particles", self.num_particles)
        check_count("smc", "min_steps", self.min_steps)
        for field, options in _OPTIONS.items():
            if getattr(self, field) not in options:
                raise InvalidAlgorithm(
                    f"ab.smc: {field}={getattr(self, field)!r}; there are "
                    f"{', '.join(map(repr, options))}."
                )
        if self.lookahead is not None and not callable(self.lookahead):
            raise InvalidAlgorithm(
                f"ab.smc: lookahead= takes a function lookahead(given, carry, x), got "
                f"{self.lookahead!r}."
            )
        for field in ("proposal", "initial"):
            value = getattr(self, field)
            if isinstance(value, type) or (
                value is not None and not isinstance(value, Model) and callable(value)
            ):
                raise InvalidAlgorithm(
                    f"ab.smc: {field}= takes a Model, got {type(value).__name__}. Decorate the "
                    f"function with @ab.model."
                )
        if self.temperatures is not None:
            object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        if self.mesh is not None and self.num_particles % self.mesh.devices.shape[0]:
            raise InvalidAlgorithm(
                f"ab.smc: {self.num_particles} particles do not divide evenly over the "
                f"{self.mesh.devices.shape[0]} devices of mesh={self.mesh.axis_names[0]!r}."
            )
        self.resampling()

    def resampling(self, *, conditional: bool = False) -> Resampling:
        """The resampling rule."""
        return Resampling(self.resampler, self.threshold, conditional)

    def settings(self) -> Settings:
        """How programs are run for the population."""
        return Settings(
            self.num_particles, self.resampling(), self.store, self.smoothing, mesh=self.mesh
        )

    def conditional_evidence(
        self, key: Any, model: Model, args: Any, kwargs: Any, choices: dict[str, Any]
    ) -> Any:
        """Log evidence estimate of a run in which particle 0 retains `choices`."""
        program, arguments = model._stage(args, kwargs)
        if not evidence_scans(program.jaxpr, {}):
            raise InvalidAlgorithm(
                f"ab.smc: `{program.name}` has no scan with data in it; a tempered run cannot "
                f"retain a draw. Use ab.importance(...)."
            )
        settings = dataclasses.replace(
            self.settings(), resampling=self.resampling(conditional=True), store="filter"
        )
        out = run_filter(
            settings, arguments, {}, key, proposal=self.proposal, initial=self.initial,
            lookahead=self.lookahead, retained=choices,
        )  # fmt: skip
        return out["population"].total

    def run(self, problem: Problem, key: Any) -> Posterior:
        if evidence_scans(problem.program.jaxpr, problem.given):
            return filter_posterior(self, problem, key)
        from abduce.inference.smc.tempering import run

        return run(self, problem, key)


_OPTIONS = {"store": ("paths", "filter"), "smoothing": ("genealogy", "ffbs")}
