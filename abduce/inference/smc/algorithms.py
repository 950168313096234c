"""`ab.smc`: particle filtering or tempering, whichever the model asks for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from abduce.errors import InvalidAlgorithm
from abduce.inference.algorithm import Algorithm, algorithm, check_count
from abduce.inference.posterior import Posterior
from abduce.inference.problem import Problem
from abduce.inference.proposals import as_proposal, is_proposal
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
            1 at every step. None: 0.5 for filtering and `post.update`, 0.9 for tempering, where
            moves follow each resampling and make the copies differ again.
        proposal: Filtering: a Model called at each step of the scan as `proposal(given, carry,
            x)`, where `given` holds the step's observations. Tempering: a Model called as
            `proposal(given, *args)`, where the path starts.
        initial: Filtering: a Model called as `initial(given, *args)`, which proposes latents
            outside of the scan.
        lookahead: Filtering: a function `lookahead(given, carry, x)` of the *next* step's
            observations and input; a log weight by which particles are resampled in advance, and
            which is taken back at the step itself (the auxiliary particle filter of Pitt and
            Shephard 1999).
        store: Filtering: 'paths' returns whole paths; 'tree' returns the same paths, but while the
            filter runs it keeps only what some particle still descends from, of the order of T + N
            log N values instead of N T (Jacob, Murray and Rubenthaler 2015), for states that are
            large; 'filter' keeps no past, so memory does not
            grow with the number of steps but for the moments of each step, which are in
            `diagnostics['filtered_mean/<address>']` and `['filtered_sd/<address>']`.
        capacity: Filtering: how many values `store='tree'` has room for, at least
            `num_particles`; None: T + 12 N log N + 2 N.
        smoothing: Filtering: 'genealogy' traces paths through their ancestors; 'ffbs' draws them
            by backward simulation (Godsill, Doucet and West 2004), N^2 work a step, for one scan
            whose carry depends on its past only through the step's latents; 'two_filter' runs a
            backward information filter on normals fitted to the filter's particles, and draws
            paths forwards from its particles (Briers, Doucet and Maskell 2010), N^2 work a step,
            under the same condition and for continuous latents; 'paris' traces
            ancestors for the paths, and estimates `functionals` with N work a step (Olsson and
            Westerborn 2017), under the same condition.
        functionals: Filtering, `smoothing='paris'`: a dict of functions `h(given, carry, x,
            new_carry)` of a step: its observations, the carry before it, its input, the carry
            after it. Each returns an array; the smoothed expectation of its sum over the steps of
            the first scan is `diagnostics['paris/<name>']`. With `store='filter'`, memory does not
            grow with the number of steps.
        kernel: Tempering: the moves, `None` (Hamiltonian moves where latents are continuous),
            `ab.hmc(...)` or `ab.mh(...)`. Filtering: `None`, or an `ab.mh(...)` that after each
            resampling moves the latents of the last step, given the carry that entered it
            (resample-move, Gilks and Berzuini 2001); its proposals are called as `q(given, carry,
            x)`, where `given` holds the step's observations and current latents.
        num_moves: Tempering: moves at each temperature. Filtering: moves after a resampling, None:
            one.
        temperatures: Tempering: a fixed increasing sequence that ends in 1, or None: adaptive.
        min_steps: Tempering: the least number of temperatures. The effective sample size cannot
            see what no particle has met, so it alone may not decide.
        path: Tempering: 'likelihood', 'data' (observations enter along their leading axis), or a
            tuple of Models over the same latents that leads up to the model.
        mesh: Filtering: a `jax.sharding.Mesh` over whose first axis the particles are spread. They
            are resampled globally, as on one device; `num_particles` must divide evenly. Devices
            may belong to several processes (`jax.distributed`): each gets the whole posterior.
        islands: Filtering: how many filters of `num_particles / islands` run side by side, weighted
            by their evidences (Verge et al. 2015). They resample on their own; with `mesh=`,
            devices exchange nothing until the end. Per-step diagnostics have the islands in front.
        qmc: Filtering: whether particles come from a scrambled Sobol point set at each step instead
            of independent draws (sequential quasi-Monte Carlo, Gerber and Chopin 2015). The
            evidence stays unbiased, and its variance falls faster than 1 / N where states have few
            dimensions. Particles are resampled at every step, in order along the carry;
            `num_particles` (of an island) is a power of 2, and latents have a quantile function
            (`icdf`), or are multivariate normal, Bernoulli or Categorical.
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
    threshold: float | None = None
    proposal: Any = None
    initial: Any = None
    lookahead: Any = None
    store: str = "paths"
    capacity: int | None = None
    smoothing: str = "genealogy"
    functionals: Any = None
    kernel: Any = None
    num_moves: int | None = None
    temperatures: Any = None
    min_steps: int = 100
    path: Any = "likelihood"
    waste_free: int | None = None
    mesh: Any = None
    islands: int = 1
    qmc: bool = False

    def __post_init__(self):
        check_count("smc", "num_particles", self.num_particles)
        check_count("smc", "min_steps", self.min_steps)
        for field, options in _OPTIONS.items():
            if getattr(self, field) not in options:
                raise InvalidAlgorithm(
                    f"ab.smc: {field}={getattr(self, field)!r}; there are "
                    f"{', '.join(map(repr, options))}."
                )
        if self.capacity is not None:
            check_count("smc", "capacity", self.capacity, self.num_particles)
            if self.store != "tree":
                raise InvalidAlgorithm(
                    f"ab.smc: capacity= is of the tree of store='tree', but store={self.store!r}."
                )
        self._check_functionals()
        if self.store == "tree" and self.smoothing in ("ffbs", "two_filter"):
            raise InvalidAlgorithm(
                f"ab.smc: smoothing={self.smoothing!r} needs the particles of every step, which "
                f"store='tree' prunes. Use store='paths'."
            )
        if self.lookahead is not None and not callable(self.lookahead):
            raise InvalidAlgorithm(
                f"ab.smc: lookahead= takes a function lookahead(given, carry, x), got "
                f"{self.lookahead!r}."
            )
        for field in ("proposal", "initial"):
            value = getattr(self, field)
            if isinstance(value, type) or (
                value is not None and not is_proposal(value) and callable(value)
            ):
                raise InvalidAlgorithm(
                    f"ab.smc: {field}= takes a Model, got {type(value).__name__}. Decorate the "
                    f"function with @ab.model."
                )
        if self.temperatures is not None:
            object.__setattr__(self, "temperatures", tuple(float(t) for t in self.temperatures))
        check_count("smc", "islands", self.islands)
        if self.num_particles % self.islands:
            raise InvalidAlgorithm(
                f"ab.smc: {self.num_particles} particles do not divide evenly over "
                f"islands={self.islands}."
            )
        if self.mesh is not None and self.islands > 1:
            if self.islands % self.mesh.devices.shape[0]:
                raise InvalidAlgorithm(
                    f"ab.smc: islands={self.islands} do not divide evenly over the "
                    f"{self.mesh.devices.shape[0]} devices of mesh={self.mesh.axis_names[0]!r}."
                )
        elif self.mesh is not None and self.num_particles % self.mesh.devices.shape[0]:
            raise InvalidAlgorithm(
                f"ab.smc: {self.num_particles} particles do not divide evenly over the "
                f"{self.mesh.devices.shape[0]} devices of mesh={self.mesh.axis_names[0]!r}."
            )
        self.resampling()
        if self.qmc:
            self._check_quasi()

    def _check_quasi(self) -> None:
        n = self.num_particles // self.islands
        if n & (n - 1) or n < 2:
            near = 2 ** max(1, round(math.log2(n)))
            raise InvalidAlgorithm(
                f"ab.smc(qmc=True): Sobol points are balanced in powers of 2, but there are {n} "
                f"particles{' on an island' if self.islands > 1 else ''}. Set num_particles="
                f"{near * self.islands}."
            )
        fixed = {
            "threshold": self.threshold in (None, 1), "resampler": self.resampler == "systematic",
            "mesh": self.mesh is None or self.islands > 1,
        }  # fmt: skip
        for field, fits in fixed.items():
            if not fits:
                raise InvalidAlgorithm(
                    f"ab.smc(qmc=True) resamples at every step by the points of the step, over all "
                    f"particles in order; {field}={getattr(self, field)!r} does not go with it. "
                    f"Leave {field}= out."
                )

    def _check_functionals(self) -> None:
        if self.functionals is None and self.smoothing != "paris":
            return
        pairs = tuple(dict(self.functionals or {}).items())
        if self.smoothing != "paris" or not pairs or not all(callable(h) for _, h in pairs):
            raise InvalidAlgorithm(
                f"ab.smc: smoothing='paris' and functionals= go together, a dict of functions "
                f"h(given, carry, x, new_carry) of a step; got smoothing={self.smoothing!r}, "
                f"functionals={self.functionals!r}."
            )
        object.__setattr__(self, "functionals", pairs)  # hashable

    def resampling(self, *, conditional: bool = False, tempering: bool = False) -> Resampling:
        """The resampling rule of a filter, or of tempering."""
        default = _TEMPERING_THRESHOLD if tempering else 1.0 if self.qmc else _FILTER_THRESHOLD
        threshold = default if self.threshold is None else self.threshold
        return Resampling(self.resampler, threshold, conditional)

    def settings(self) -> Settings:
        """How programs are run for the population."""
        return Settings(
            self.num_particles, self.resampling(), self.store, self.capacity, self.smoothing,
            self.functionals or (), num_moves=1 if self.num_moves is None else self.num_moves,
            islands=self.islands, mesh=self.mesh, qmc=self.qmc,
        )  # fmt: skip

    def require_one_island(self, where: str) -> None:
        """Filters inside other algorithms have no islands."""
        if self.islands > 1:
            raise InvalidAlgorithm(
                f"ab.smc: islands={self.islands} inside {where}; they are of a filter on its own. "
                f"Leave islands= out."
            )

    def filter_moves(self) -> tuple[Model, ...] | None:
        """Proposals of the kernel that moves the particles of a filter, or None."""
        from abduce.inference.mcmc.mh import as_proposals, mh

        if self.kernel is None:
            return None
        if not isinstance(self.kernel, mh):
            raise InvalidAlgorithm(
                f"ab.smc: in a particle filter kernel= takes an ab.mh(...), got {self.kernel!r}. A "
                f"gradient move is a proposal too: ab.mh(proposal=q) with q(given, carry, x)."
            )
        if self.qmc:
            raise InvalidAlgorithm(
                "ab.smc(qmc=True) resamples in the order of the carry, at the beginnings of steps; "
                "a kernel moves at their ends. Leave kernel= out."
            )
        if self.num_moves is not None:
            check_count("smc", "num_moves", self.num_moves)
        return as_proposals(self.kernel.proposal)

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
        self.require_one_island("a density that is estimated")
        if self.qmc:
            raise InvalidAlgorithm(
                "ab.smc(qmc=True): a conditional run (a density that is estimated by particles) "
                "cannot retain a path among the points of a set. Leave qmc= out."
            )
        if self.kernel is not None:
            raise InvalidAlgorithm(
                "ab.smc: a conditional run (a density that is estimated by particles) cannot move "
                "its retained path. Leave kernel= out."
            )
        settings = dataclasses.replace(
            self.settings(),
            resampling=self.resampling(conditional=True),
            store="filter",
            smoothing="genealogy",
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

        self.require_one_island("tempering")
        if self.qmc:
            raise InvalidAlgorithm(
                "ab.smc(qmc=True) is of particle filters, but the model has no scan with data in "
                "it and is tempered. Leave qmc= out."
            )
        alg = self
        if self.proposal is not None:
            alg = self.replace(proposal=as_proposal(self.proposal, problem.model, "smc"))
        return run(alg, problem, key)


_FILTER_THRESHOLD, _TEMPERING_THRESHOLD = 0.5, 0.9
_OPTIONS = {
    "store": ("paths", "tree", "filter"),
    "smoothing": ("genealogy", "ffbs", "two_filter", "paris"),
}
