"""Continuous flows: a bijection as the solution of a differential equation.

Chen, Rubanova, Bettencourt and Duvenaud, "Neural Ordinary Differential Equations", NeurIPS 2018,
section 4: if `dz/dt = v(z, t)` carries `x` at time 0 to `y` at time 1, then `log |det dy/dx|` is
the integral of the divergence of `v` along the way (theorem 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from abduce.errors import InvalidValue
from abduce.inference.vi.flows.bijection import Bijection, check_count
from abduce.inference.vi.flows.networks import MLP, check_sizes, dot
from abduce.ppl.operations import typed_key

__all__ = ["Continuous"]


class Continuous(Bijection):
    """The flow of a neural velocity field from time 0 to time 1; `inverse` runs it backwards.

    The divergence is exact: the Jacobian is carried through the layers together with the value.
    With one hidden layer that costs as much as the value itself; each further layer costs `dim`
    times the value. So nothing is estimated by random probes.

    The equation is solved by `num_steps` steps of the classical Runge-Kutta method. Value and log
    determinant have a global error of order `num_steps**-4`, and so has the difference between
    `log_det` and the Jacobian of the discrete map, between `inverse(forward(x))` and `x`, and
    between 1 and the integral of the density. `step_error` tells how large it is.

    Args:
        key: Typed PRNG key.
        dim: Length of a vector.
        hidden: Widths of the velocity's hidden layers (of tanh), at least one.
        num_steps: Steps of the solver.
        context_dim: Length of the context, an additional input of the velocity; 0 for none.
    """

    network: MLP
    dim: int = eqx.field(static=True)
    context_dim: int = eqx.field(static=True)
    num_steps: int = eqx.field(static=True)

    def __init__(
        self,
        key: Any,
        dim: int,
        *,
        hidden: Sequence[int] = (64,),
        num_steps: int = 20,
        context_dim: int = 0,
    ):
        name = "flows.Continuous"
        self.dim = check_count(name, "dim", dim)
        self.num_steps = check_count(name, "num_steps", num_steps)
        self.context_dim = check_count(name, "context_dim", context_dim, 0)
        # tanh: a bounded velocity moves points far out by a bounded distance
        if not check_sizes(name, hidden, "tanh"):
            raise InvalidValue(f"{name} needs at least one hidden layer, got hidden=().")
        key = typed_key(key, name)
        self.network = MLP(key, dim + 1 + context_dim, dim, hidden, "tanh")

    def _forward(self, x, context):
        return self._solve(x, context, 0.0, 1.0, self.num_steps)

    def _backward(self, y, context):
        return self._solve(y, context, 1.0, 0.0, self.num_steps)

    def step_error(self, x: Any, context: Any = None) -> tuple[jax.Array, jax.Array]:
        """An estimate of the solver's error at one point, by halving the steps.

        Args:
            x: Shape `(dim,)`, in the base space.
            context: Shape `(context_dim,)`, or None.

        Returns:
            Largest absolute error of a coordinate of `forward(x)`, and of its log determinant in
            nats, each of shape `()`.
        """
        x, context = self._checked(x, context, "step_error")
        y, log_det = self._solve(x, context, 0.0, 1.0, self.num_steps)
        y_fine, log_det_fine = self._solve(x, context, 0.0, 1.0, 2 * self.num_steps)
        richardson = 16 / 15  # of a method of order 4
        return (
            richardson * jnp.max(jnp.abs(y - y_fine)),
            richardson * jnp.abs(log_det - log_det_fine),
        )

    def _solve(self, z, context, start, end, num_steps):
        dtype = jnp.result_type(z, *self.network.biases)
        h = (end - start) / num_steps

        def add(state, slope, size):
            return state[0] + size * slope[0], state[1] + size * slope[1]

        def step(state, i):
            t = start + h * i.astype(dtype)
            k1 = self._velocity(state[0], t, context)
            k2 = self._velocity(add(state, k1, h / 2)[0], t + h / 2, context)
            k3 = self._velocity(add(state, k2, h / 2)[0], t + h / 2, context)
            k4 = self._velocity(add(state, k3, h)[0], t + h, context)
            for k, weight in ((k1, 1), (k2, 2), (k3, 2), (k4, 1)):
                state = add(state, k, weight * h / 6)
            return state, None

        state = z.astype(dtype), jnp.zeros((), dtype)
        return jax.lax.scan(step, state, jnp.arange(num_steps))[0]

    def _velocity(self, z, t, context):
        """The velocity, shape `(dim,)`, and its divergence, shape `()`."""
        inputs = [z, t[None]] if context is None else [z, t[None], context]
        weights, biases = self.network.weights, self.network.biases
        out = jnp.tanh(dot(weights[0], jnp.concatenate(inputs)) + biases[0])
        jacobian = (1 - out * out)[:, None] * weights[0][:, : self.dim]
        for w, b in zip(weights[1:-1], biases[1:-1], strict=True):
            out = jnp.tanh(dot(w, out) + b)
            jacobian = (1 - out * out)[:, None] * dot(w, jacobian)
        return dot(weights[-1], out) + biases[-1], jnp.sum(weights[-1].T * jacobian)
