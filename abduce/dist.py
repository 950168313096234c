"""Distributions: NumPyro's, and ours.

Everything in `numpyro.distributions` is here under its own name. `Simulator` is a draw without a
density.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpyro.distributions as _numpyro
from numpyro.distributions import *  # noqa: F403
from numpyro.distributions import biject_to, constraints, transforms

from abduce.errors import InvalidModel, NoDensity

__all__ = [
    *_numpyro.__all__,
    "OneHotCategorical",
    "Simulator",
    "biject_to",
    "constraints",
    "transforms",
]


class Simulator(_numpyro.Distribution):
    """A draw `f(key, *args)` of any JAX function, without a density.

    It can be simulated and observed by methods that only simulate; whatever needs its density
    raises `NoDensity`.

    Args:
        f: From a key and arrays to one array.
        *args: Pytrees of arrays.

    Example:
        >>> d = dist.Simulator(lambda key, rate: jax.random.poisson(key, rate), 3.0)
        >>> d.sample(jax.random.key(0)).shape
        ()
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012
    support = None

    def __init__(self, f: Any, *args: Any):
        if not callable(f):
            raise InvalidModel(f"dist.Simulator takes a function f(key, *args), got {f!r}.")
        self.f, self.args = f, args
        key = jax.eval_shape(lambda: jax.random.key(0))
        out = jax.eval_shape(f, key, *args)
        if not hasattr(out, "shape"):
            raise InvalidModel(
                f"dist.Simulator: {getattr(f, '__name__', f)} must return one array, got "
                f"{type(out).__name__}. Use one site per array."
            )
        self.value_dtype = out.dtype
        super().__init__(batch_shape=(), event_shape=out.shape)

    def sample(self, key, sample_shape=()):
        if sample_shape == ():
            return self.f(key, *self.args)
        n = 1
        for s in sample_shape:
            n *= s
        draws = jax.vmap(lambda k: self.f(k, *self.args))(jax.random.split(key, n))
        return draws.reshape((*sample_shape, *self.event_shape))

    def log_prob(self, value, intermediates=None):
        raise NoDensity(
            f"dist.Simulator({getattr(self.f, '__name__', self.f)}) has no density: it can be "
            f"simulated but not scored."
        )

    def tree_flatten(self):
        return (self.args,), (self.f, self.event_shape, self.value_dtype)

    @classmethod
    def tree_unflatten(cls, aux, children):
        d = cls.__new__(cls)
        d.f, event_shape, d.value_dtype = aux
        d.args = children[0]
        _numpyro.Distribution.__init__(d, (), event_shape)
        return d


class OneHotCategorical(_numpyro.Distribution):
    """A categorical choice as a one-hot float vector.

    Args:
        logits: Log probabilities, up to a constant; shape `(..., K)`.
        probs: Or probabilities, which are normalized.

    Example:
        >>> dist.OneHotCategorical(probs=jnp.array([0.2, 0.8])).sample(key).shape
        (2,)
    """

    arg_constraints = {"logits": constraints.real_vector}  # noqa: RUF012
    has_enumerate_support = True

    def __init__(self, logits=None, probs=None, *, validate_args=None):
        if (logits is None) == (probs is None):
            raise InvalidModel("dist.OneHotCategorical takes logits= or probs=, one of them.")
        self.logits = jnp.log(jnp.asarray(probs)) if logits is None else jnp.asarray(logits)
        super().__init__(
            self.logits.shape[:-1], self.logits.shape[-1:], validate_args=validate_args
        )

    @property
    def support(self):
        return constraints.simplex

    def sample(self, key, sample_shape=()):
        shape = (*sample_shape, *self.batch_shape)
        index = jax.random.categorical(key, self.logits, shape=shape)
        return jax.nn.one_hot(index, self.event_shape[0], dtype=jnp.result_type(float))

    def log_prob(self, value, intermediates=None):
        logits = jax.nn.log_softmax(self.logits)
        return jnp.sum(jnp.where(value > 0, value * logits, 0.0), -1)

    def enumerate_support(self, expand=True):
        n = self.event_shape[0]
        values = jnp.eye(n, dtype=jnp.result_type(float))
        values = values.reshape((n, *(1,) * len(self.batch_shape), n))
        return jnp.broadcast_to(values, (n, *self.batch_shape, n)) if expand else values

    @property
    def mean(self):
        return jax.nn.softmax(self.logits)

    @property
    def variance(self):
        return self.mean * (1 - self.mean)


class Estimated(_numpyro.Distribution):
    """A law whose density is known only through unbiased estimates; `ab.marginal` and
    `ab.normalize` make it.

    Args:
        law: Static. `law.draw(*operands)` is a draw, a function of operands that are random;
            `law.estimate(key, value, drawn, *operands)` is the log density estimate, where `drawn`
            says whether the value is that draw.
        operands: Arrays.
        shape, dtype: Of a value, which is one event.
        support: A constraint, or None.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, law: Any, operands: Any, shape: Any, dtype: Any, support: Any = None):
        self.law, self.operands = law, tuple(operands)
        self.value_dtype, self._support = dtype, support
        super().__init__(batch_shape=(), event_shape=tuple(shape))

    @property
    def support(self) -> Any:
        return self._support

    def sample(self, key, sample_shape=()):
        if sample_shape != ():
            raise NotImplementedError("one draw at a time")
        return self.law.draw(*self.operands)

    def estimate(self, key: Any, value: Any, drawn: bool) -> Any:
        """The log density estimate, in nats."""
        return self.law.estimate(key, value, drawn, *self.operands)

    def tree_flatten(self):
        return (self.operands,), (self.law, self.event_shape, self.value_dtype, self._support)

    @classmethod
    def tree_unflatten(cls, aux, children):
        d = cls.__new__(cls)
        d.law, event_shape, d.value_dtype, d._support = aux
        d.operands = children[0]
        _numpyro.Distribution.__init__(d, (), event_shape)
        return d
