"""Minibatches: which arrays lose rows, and which sites are scaled for it.

A site follows the rows if its shape changes with their number, which is found by staging the model
with one row more. Its log density is multiplied by `N / B`, so that the objective's mean is that
of all the data.
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from abduce.errors import InvalidAlgorithm, suggest
from abduce.inference.problem import Problem, make_problem
from abduce.ppl.data import as_data
from abduce.ppl.model import Model
from abduce.ppl.naming import scoped
from abduce.ppl.transforms import Transformed, emit_again

__all__ = ["Batches", "Rescaled", "Rows"]

_MOST_PERMUTED = 100_000  # rows; above, they are drawn with replacement


class Rescaled(Transformed):
    """A model some of whose sites have their log density multiplied."""

    base: Model
    addresses: tuple[str, ...] = eqx.field(static=True)
    scale: float = eqx.field(static=True)
    algorithm: Any = None

    def emit(self, *args, **kwargs):
        chosen = {scoped(a) for a in self.addresses}

        def edit(site, operands, given):
            if site.address not in chosen:
                return site, operands
            old = site.operand(operands, "scale")
            if old is None:
                return site.with_operand(operands, "scale", jnp.asarray(self.scale), mapped=False)
            i = site.roles.index("scale")
            return site, [*operands[:i], old * self.scale, *operands[i + 1 :]]

        return emit_again(self.base, args, kwargs, edit, {})


class Rows:
    """Takes random rows of a pytree; hashable.

    Args:
        full, small: The pytree with all rows, and with those of a step.
        total, size: Their numbers.
    """

    def __init__(self, full: Any, small: Any, total: int, size: int):
        self.total, self.size = total, size
        axes = []
        for a, b in zip(jax.tree.leaves(full), jax.tree.leaves(small), strict=True):
            shapes = zip(np.shape(a), np.shape(b), strict=True)
            axes.append(next((i for i, (m, n) in enumerate(shapes) if m != n), None))
        self.key = (tuple(axes), total, size)

    def __call__(self, data: Any, key: Any) -> Any:
        leaves, treedef = jax.tree.flatten(data)
        if self.total <= _MOST_PERMUTED:
            index = jax.random.choice(key, self.total, (self.size,), replace=False)
        else:
            index = jax.random.randint(key, (self.size,), 0, self.total)
        taken = [
            x if axis is None else jnp.take(x, index, axis)
            for x, axis in zip(leaves, self.key[0], strict=True)
        ]
        return jax.tree.unflatten(treedef, taken)

    def __hash__(self):
        return hash(self.key)

    def __eq__(self, other):
        return isinstance(other, Rows) and self.key == other.key


class Batches:
    """What `batch=` and `batch_size=` mean for a problem.

    Raises:
        InvalidAlgorithm: A name is neither an argument nor data; lengths differ.
    """

    def __init__(self, batch: Any, size: int, problem: Problem):
        from abduce.inference.vi.tasks import accepts

        self.axes = dict(batch)
        self.names = accepts(problem.model)
        self.given = {a: _value(g) for a, g in problem.given.items()}
        lengths = {}
        for name, axis in self.axes.items():
            x = self._find(name, problem)
            for leaf in jax.tree.leaves(x):
                if isinstance(axis, bool) or not isinstance(axis, int) or axis >= np.ndim(leaf):
                    raise InvalidAlgorithm(
                        f"ab.vi: batch={{{name!r}: {axis!r}}} is no axis of an array of shape "
                        f"{np.shape(leaf)}."
                    )
                lengths[name] = np.shape(leaf)[axis]
        if len(set(lengths.values())) != 1:
            raise InvalidAlgorithm(
                f"ab.vi: what batch= names must have the same number of rows, got "
                f"{', '.join(f'{a}: {n}' for a, n in lengths.items())}."
            )
        self.total = next(iter(lengths.values()))
        if size > self.total:
            raise InvalidAlgorithm(
                f"ab.vi: batch_size={size} is more than the {self.total} rows of the data."
            )
        self.size = size
        self.scale = self.total / size

    def _find(self, name: str, problem: Problem) -> Any:
        if name in self.given:
            return self.given[name]
        if name in self.names and self.names.index(name) < len(problem.args):
            return problem.args[self.names.index(name)]
        if name in problem.kwargs:
            return problem.kwargs[name]
        known = [*self.names, *self.given]
        raise InvalidAlgorithm(
            f"ab.vi: batch= names {name!r}, which is neither an argument of "
            f"`{problem.program.name}` nor in given ({', '.join(known)}).{suggest(name, known)}"
        )

    def take(self, given: Any, args: Any, kwargs: Any, n: int) -> tuple[Any, Any, Any]:
        """The first `n` rows."""

        def cut(name, x):
            if name not in self.axes:
                return x
            axis = self.axes[name]
            return jax.tree.map(
                lambda v: jax.lax.slice_in_dim(jnp.asarray(as_data(v)), 0, n, axis=axis), x
            )

        names = [*self.names, *[""] * len(args)]
        return (
            {a: cut(a, x) for a, x in given.items()},
            tuple(cut(a, x) for a, x in zip(names, args, strict=False)),
            {a: cut(a, x) for a, x in kwargs.items()},
        )

    def addresses(
        self, model: Any, given: Any, args: Any, kwargs: Any, *, given_first: bool
    ) -> list[str]:
        """The sites that follow the rows."""
        shapes = []
        sizes = (self.size, self.size - 1 if self.size == self.total else self.size + 1)
        for n in sizes:
            g, a, k = self.take(given, args, kwargs, max(n, 1))
            program, _ = model._stage((g, *a) if given_first else a, k)
            shapes.append({
                s: (i.shape, tuple(x.size for x in i.site.axes)) for s, i in program.sites.items()
            })  # fmt: skip
        return [a for a in shapes[0] if shapes[0][a] != shapes[1].get(a)]

    def require_no_local(self, problem: Problem) -> None:
        """A family has no coordinates for latents that change with the rows."""
        local = self.addresses(
            problem.model, self.given, problem.args, problem.kwargs, given_first=False
        )
        self.local = tuple(local)
        latents = [a for a in local if a in problem.latents]
        if latents:
            raise InvalidAlgorithm(
                f"ab.vi: {', '.join(map(repr, latents))} has an element for each row, which a "
                f"family of ab.guides cannot fit in batches. Pass a Model as guide= that draws it "
                f"from the rows at hand (an amortized guide), or leave batch= out."
            )

    def problem(self, problem: Problem) -> Problem:
        """The problem of a step, with scaled sites."""
        given, args, kwargs = self.take(self.given, problem.args, problem.kwargs, self.size)
        model = Rescaled(problem.model, self.local, self.scale)
        return make_problem(model, args, given, dict(kwargs), "ab.vi")


def _value(g: Any) -> Any:
    if g.mask is not None:
        raise InvalidAlgorithm(
            "ab.vi: batch= does not go with data that are observed in part (ab.masked)."
        )
    return g.value
