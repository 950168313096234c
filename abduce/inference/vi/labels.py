"""Which random choices a value depends on, and along which of its axes.

A *label* `(address, level)` says that a value depends on a choice: on its latest draw (level
None), or on its draws at earlier steps of the enclosing scan number `level`. To each label belongs
an *alignment*: for each batch axis of the choice, the axis of the value along which element `i`
depends on element `i` of the choice only; None where elements are mixed. Labels flow through
equations by the rules below; an equation without a rule mixes. A dependence is never missed, and
an alignment never claimed wrongly; `0 * x` still depends on `x`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from abduce.ppl import _jax

__all__ = ["Labels", "flow", "join", "map_axes", "mixed"]

Alignment = tuple[int | None, ...]
Labels = dict[tuple[str, int | None], Alignment]

_ELEMENTWISE = frozenset(
    {
        "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2",
        "atanh", "bessel_i0e", "bessel_i1e", "cbrt", "ceil", "clamp", "convert_element_type",
        "copy", "copy_p", "cos", "cosh", "digamma", "div", "eq", "erf", "erf_inv", "erfc",
        "exp", "exp2", "expm1", "floor", "ge", "gt", "igamma", "igamma_grad_a", "igammac",
        "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "log2", "logistic",
        "lt", "max", "min", "mul", "ne", "neg", "nextafter", "not", "or", "polygamma", "pow",
        "random_gamma_grad", "real", "reduce_precision", "regularized_incomplete_beta", "rem",
        "round", "rsqrt", "select_n", "shift_left", "shift_right_arithmetic",
        "shift_right_logical", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub",
        "tan", "tanh", "xor", "zeta",
    }
)  # fmt: skip
_REDUCE = frozenset(
    {
        "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or",
        "reduce_xor", "argmax", "argmin",
    }
)  # fmt: skip
_ALONG = frozenset(
    {
        "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp",
    }
)  # fmt: skip
_MATRIX = frozenset(
    {
        "cholesky", "triangular_solve", "lu", "qr", "eigh", "svd", "householder_product",
    }
)  # fmt: skip


def join(parts: Iterable[Labels]) -> Labels:
    """Labels of a value made element by element from several."""
    out: Labels = {}
    for labels in parts:
        for key, axes in labels.items():
            if key in out:
                axes = tuple(a if a == b else None for a, b in zip(out[key], axes, strict=True))
            out[key] = axes
    return out


def map_axes(labels: Labels, where: dict[int, int]) -> Labels:
    """Labels after axes have moved: `where[old] = new`; what is not there is mixed."""
    return {
        key: tuple(None if a is None else where.get(a) for a in axes)
        for key, axes in labels.items()
    }


def mixed(labels: Labels) -> Labels:
    """Labels of a value whose elements depend on all elements."""
    return map_axes(labels, {})


def flow(eqn: Any, labels: Sequence[Labels]) -> list[Labels]:
    """Labels of the outputs of an equation that is evaluated as it stands."""
    if not any(labels):
        return [{} for _ in eqn.outvars]
    call = _jax.call_jaxpr(eqn)
    if call is not None:
        return _through(call[1], labels)
    out = join(_rule(eqn, i, part) for i, part in enumerate(labels) if part)
    return [out for _ in eqn.outvars]


def _through(jaxpr: Any, labels: Sequence[Labels]) -> list[Labels]:
    inner, _ = _jax.inner_jaxpr(jaxpr)
    env: dict[Any, Labels] = {v: {} for v in inner.constvars}
    env.update(zip(inner.invars, labels, strict=True))

    def read(atom):
        return {} if isinstance(atom, _jax.Literal) else env[atom]

    for eqn in inner.eqns:
        env.update(zip(eqn.outvars, flow(eqn, [read(a) for a in eqn.invars]), strict=True))
    return [read(a) for a in inner.outvars]


def _rule(eqn: Any, i: int, labels: Labels) -> Labels:
    """What input `i` contributes."""
    name, p = eqn.primitive.name, eqn.params
    shape = eqn.invars[i].aval.shape
    out_shape = eqn.outvars[0].aval.shape
    rank = len(shape)
    same = {a: a for a in range(rank)}
    where: dict[int, int] = {}
    if name in _ELEMENTWISE:
        where = same if rank == len(out_shape) else {}
    elif name in _REDUCE:
        kept = [a for a in range(rank) if a not in p["axes"]]
        where = {a: j for j, a in enumerate(kept)}
    elif name in _ALONG:
        where = {a: a for a in same if a != p["axis"]}
    elif name == "broadcast_in_dim":
        if i == 0:
            dims = p["broadcast_dimensions"]
            where = {a: dims[a] for a in same if shape[a] == out_shape[dims[a]]}
    elif name == "transpose":
        where = {old: new for new, old in enumerate(p["permutation"])}
    elif name == "squeeze":
        kept = [a for a in range(rank) if a not in {d % rank for d in p["dimensions"]}]
        where = {a: j for j, a in enumerate(kept)}
    elif name == "reshape":
        where = _reshaped(shape, out_shape)
    elif name == "concatenate":
        where = {a: a for a in same if a != p["dimension"]}
    elif name == "stack":
        where = {a: a + (a >= p["axis"]) for a in same}
    elif name == "unstack":
        where = {a: a - (a > p["axis"]) for a in same if a != p["axis"]}
    elif name == "split":
        where = {a: a for a in same if a != p["axis"]}
    elif name == "rev":
        where = {a: a for a in same if a not in p["dimensions"]}
    elif name == "sort":
        where = {a: a for a in same if a != p["dimension"]}
    elif name == "pad":
        where = {a: a for a in same if tuple(p["padding_config"][a]) == (0, 0, 0)} if i == 0 else {}
    elif name == "slice":
        where = {
            a: a
            for a in same
            if out_shape[a] == shape[a]  # whole axes
        }
    elif name == "dynamic_slice":
        where = {a: a for a in same if p["slice_sizes"][a] == shape[a]} if i == 0 else {}
    elif name == "dynamic_update_slice":
        if i <= 1:
            update = eqn.invars[1].aval.shape
            where = {a: a for a in same if update[a] == out_shape[a]}
    elif name == "gather":
        where = _gathered(eqn, i)
    elif name == "dot_general":
        where = _contracted(eqn, i)
    elif name == "top_k":
        where = {a: a for a in range(rank - 1)}
    elif name in _MATRIX:
        where = {a: a for a in range(rank - 2)}
    return map_axes(labels, where)


def _reshaped(old: Sequence[int], new: Sequence[int]) -> dict[int, int]:
    """Axes that a reshape keeps: equal in size and in the number of elements before them."""
    where = {}
    before_old = 1
    for a, n in enumerate(old):
        before_new = 1
        for b, m in enumerate(new):
            if n > 1 and n == m and before_old == before_new:
                where[a] = b
                break
            before_new *= m
        before_old *= n
    return where


def _gathered(eqn: Any, i: int) -> dict[int, int]:
    d = eqn.params["dimension_numbers"]
    out_rank = len(eqn.outvars[0].aval.shape)
    operand, indices = (v.aval.shape for v in eqn.invars[:2])
    batch = [a for a in range(out_rank) if a not in d.offset_dims]
    operand_batch = getattr(d, "operand_batching_dims", ())
    indices_batch = getattr(d, "start_indices_batching_dims", ())
    if i == 1:
        return {a: batch[a] for a in range(len(indices) - 1)}
    window = [a for a in range(len(operand)) if a not in (*d.collapsed_slice_dims, *operand_batch)]
    sizes = eqn.params["slice_sizes"]
    where = {
        a: out
        for a, out in zip(window, sorted(d.offset_dims), strict=True)
        if sizes[a] == operand[a]
    }
    where |= {a: batch[b] for a, b in zip(operand_batch, indices_batch, strict=True)}
    return where


def _contracted(eqn: Any, i: int) -> dict[int, int]:
    (left, right), (left_batch, right_batch) = eqn.params["dimension_numbers"]
    ranks = [len(v.aval.shape) for v in eqn.invars]
    batch = (left_batch, right_batch)[i]
    where = {a: j for j, a in enumerate(batch)}
    free_left = [a for a in range(ranks[0]) if a not in (*left, *left_batch)]
    free_right = [a for a in range(ranks[1]) if a not in (*right, *right_batch)]
    start = len(left_batch) + (0 if i == 0 else len(free_left))
    where |= {a: start + j for j, a in enumerate((free_left, free_right)[i])}
    return where
