"""Bijections one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidValue
from abduce.inference.vi.flows.bijection import Bijection

__all__ = ["Chain", "Stack"]


class Chain(Bijection):
    """Bijections one after the other; the first acts first on the way from the base.

    Parts that take a context all get the same one.

    Args:
        parts: Bijections of equal `dim`; the context lengths of those that take one are equal.

    Example:
        >>> flow = flows.Chain([flows.Planar(key, 2), flows.Permutation((1, 0))])
        >>> y, log_det = flow.forward(jnp.zeros(2))
    """

    parts: tuple[Bijection, ...]

    def __init__(self, parts: Iterable[Bijection]):
        self.parts = tuple(parts)
        for i, part in enumerate(self.parts):
            if not isinstance(part, Bijection):
                raise InvalidValue(
                    f"flows.Chain: part {i} is {part!r}, not a bijection. For a map onto a "
                    f"constrained space use flows.distribution(flow, support=...)."
                )
        if not self.parts:
            raise InvalidValue("flows.Chain needs at least one bijection, got none.")
        _check_equal("dim", self.parts, [p.dim for p in self.parts])
        _check_equal("context_dim", self.parts, [p.context_dim or None for p in self.parts])

    @property
    def dim(self) -> int:
        return self.parts[0].dim

    @property
    def context_dim(self) -> int:
        return max(p.context_dim for p in self.parts)

    @property
    def fast_forward(self) -> bool:
        return all(p.fast_forward for p in self.parts)

    @property
    def fast_inverse(self) -> bool:
        return all(p.fast_inverse for p in self.parts)

    def _forward(self, x, context):
        log_det = jnp.zeros((), x.dtype)
        for part in self.parts:
            x, term = part._forward(x, context if part.context_dim else None)
            log_det = log_det + term
        return x, log_det

    def _backward(self, y, context):
        log_det = jnp.zeros((), y.dtype)
        for part in reversed(self.parts):
            y, term = part._backward(y, context if part.context_dim else None)
            log_det = log_det + term
        return y, log_det

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, i: int) -> Bijection:
        return self.parts[i]


class Stack(Bijection):
    """A chain of bijections of one kind, run by `lax.scan`: compiled once however many there are.

    Args:
        layers: Bijections with the same structure, shapes and static settings, the first of which
            acts first; or such bijections as one, with a leading axis on every leaf, as
            `jax.vmap` of a constructor makes them.

    Example:
        >>> flow = flows.Stack(jax.vmap(lambda k: flows.Planar(k, 2))(jax.random.split(key, 32)))
    """

    layers: Bijection
    num_layers: int = eqx.field(static=True)

    def __init__(self, layers: Sequence[Bijection] | Bijection):
        if isinstance(layers, Bijection):
            sizes = {jnp.shape(x)[:1] for x in jax.tree.leaves(layers)}
            if len(sizes) != 1 or sizes == {()} or sizes == {(0,)}:
                raise InvalidValue(
                    f"flows.Stack: the leaves of one stacked {type(layers).__name__} need a common "
                    f"leading axis, got {sorted(sizes)}. Make it by jax.vmap of a constructor, or "
                    f"pass a list of bijections."
                )
            self.layers, self.num_layers = layers, sizes.pop()[0]
            return
        layers = tuple(layers)
        shapes = [[jnp.shape(x) for x in jax.tree.leaves(b)] for b in layers]
        structures = [jax.tree.structure(b) for b in layers]
        same = all(a == shapes[0] for a in shapes) and all(s == structures[0] for s in structures)
        if not layers or not same:
            raise InvalidValue(
                f"flows.Stack takes at least one bijection, all of the same kind, shapes and "
                f"settings; got {[type(b).__name__ for b in layers]}. Chain those that differ: "
                f"flows.Chain(parts)."
            )
        self.layers = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        self.num_layers = len(layers)

    @property
    def dim(self) -> int:
        return self.layers.dim

    @property
    def context_dim(self) -> int:
        return self.layers.context_dim

    @property
    def fast_forward(self) -> bool:
        return self.layers.fast_forward

    @property
    def fast_inverse(self) -> bool:
        return self.layers.fast_inverse

    def _forward(self, x, context):
        return self._run(x, lambda layer, x: layer._forward(x, context), reverse=False)

    def _backward(self, y, context):
        return self._run(y, lambda layer, y: layer._backward(y, context), reverse=True)

    def _run(self, x, function, reverse):
        dtype = jnp.result_type(x, *jax.tree.leaves(self.layers))
        start = x.astype(dtype), jnp.zeros((), dtype)

        def step(carry, layer):
            x, term = function(layer, carry[0])
            return (x.astype(dtype), carry[1] + term.astype(dtype)), None

        return jax.lax.scan(step, start, self.layers, length=self.num_layers, reverse=reverse)[0]


def _check_equal(what: str, parts: Sequence[Bijection], values: Sequence[int | None]) -> None:
    known = {v for v in values if v is not None}
    if len(known) > 1:
        shown = ", ".join(
            f"{i} {type(p).__name__} {v}"
            for i, (p, v) in enumerate(zip(parts, values, strict=True))
        )
        raise InvalidValue(f"flows.Chain: the parts differ in {what}: {shown}.")
