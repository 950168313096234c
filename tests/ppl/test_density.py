"""`log_density` and `simulate` against references written by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab

from .cases import DRAWS, SIMULATED, case, close, keys_of, row, total
from .families import FAMILIES, LENGTH
from .zoo import ZOO


@pytest.mark.parametrize("name", sorted(ZOO))
def test_log_density_is_the_reference(name):
    """Alone, and under jit and vmap."""
    c = case(name)
    close(c.log_density(c.choices(0)), c.expected[0])
    close(jax.jit(jax.vmap(c.log_density))(c.draws), c.expected)


@pytest.mark.parametrize("name", SIMULATED)
def test_simulate_agrees_with_log_density(name):
    """Each row of a batch of traces is a trace of its own."""
    c = case(name)
    for i in range(DRAWS):
        trace, choices = row(c.traces, i), c.choices(i)
        close(trace.log_density, c.expected[i])
        assert set(trace.choices) == set(c.entry.shapes)
        assert {a: np.shape(v) for a, v in choices.items()} == dict(c.entry.shapes)
        if np.isfinite(c.expected[i]):
            close(total(trace.scores), c.expected[i])
            close(trace.project("*"), c.expected[i])
        if c.entry.retval is not None:
            jax.tree.map(close, trace.retval, c.entry.retval(choices, *c.entry.args))


@pytest.mark.parametrize("name", ["vmap_schools", "scan_of_vmap", "vmap_of_switch"])
def test_fields_of_a_batch_of_traces(name):
    """What `vmap` gives is a trace whose numbers are stacked."""
    c = case(name)
    close(c.traces.log_density, c.expected)
    sums = jax.vmap(lambda t: sum(jnp.sum(x) for x in t.scores.values()))(c.traces)
    close(sums, c.expected)


def _spoil(value, flag):
    """NaN where the flag is false."""
    value, flag = np.asarray(value), np.asarray(flag)
    flag = flag.reshape(flag.shape + (1,) * (value.ndim - flag.ndim))
    other = np.nan if np.issubdtype(value.dtype, np.floating) else 0
    return jnp.asarray(np.where(flag, value, other))


BRANCHING = [name for name in SIMULATED if ZOO[name].active is not None]


@pytest.mark.parametrize("name", SIMULATED)
def test_active_flags(name):
    c = case(name)
    for i in range(DRAWS):
        expected = {a: np.asarray(True) for a in c.entry.shapes}
        if c.entry.active is not None:
            expected.update(c.entry.active(c.choices(i), *c.entry.args))
        active = row(c.traces, i).active
        for a, flag in expected.items():
            got, flag = np.broadcast_arrays(np.asarray(active.get(a, True)), np.asarray(flag))
            assert np.array_equal(got, flag), a


@pytest.mark.parametrize("name", BRANCHING)
def test_inactive_values_do_not_count(name):
    """A dead branch contributes nothing, whatever value stands at its sites."""
    c = case(name)
    density = jax.jit(c.log_density)
    seen = []
    for i in range(DRAWS):
        choices = c.choices(i)
        flags = c.entry.active(choices, *c.entry.args)
        seen += [np.asarray(f).ravel() for f in flags.values()]
        spoilt = {**choices, **{a: _spoil(choices[a], f) for a, f in flags.items()}}
        close(density(spoilt), c.expected[i])
    seen = np.concatenate(seen)
    assert seen.any() and not seen.all()  # otherwise nothing was tried


@pytest.mark.parametrize(
    "name",
    ["vmap_schools", "vmap_nested_axes", "vmap_of_scan", "scan_vmap_scan", "cond_one_branch",
     "vmap_scan_cond", "jit_everywhere", "bounded_while", "correlation_cholesky"],
)  # fmt: skip
def test_batching_the_keys_does_not_change_the_draws(name):
    c = case(name)
    trace = c.simulate(keys_of(name)[2])
    for a in c.entry.shapes:
        close(c.choices(2)[a], trace.choices[a])
    close(trace.log_density, c.expected[2])


@pytest.mark.parametrize("name", sorted(ZOO))
def test_gradient_is_the_gradient_of_the_reference(name):
    c = case(name)
    ((_, choices),) = c.finite(1)
    smooth = c.smooth(choices)
    got = jax.jit(jax.grad(lambda s: c.log_density({**choices, **s})))(smooth)
    expected = c.reference_gradient(choices, smooth)
    for a in smooth:
        close(got[a], expected[a])


@pytest.mark.parametrize(
    "name", ["vmap_of_cond", "scan_carry_and_xs", "vmap_scan_cond", "checkpointed"]
)
def test_gradient_against_finite_differences(name):
    """The references could share an error with autodiff; differences of values cannot."""
    c = case(name)
    choices, step = c.choices(1), 1e-6
    smooth = c.smooth(choices)
    direction = {
        a: jax.random.normal(jax.random.key(i), v.shape) for i, (a, v) in enumerate(smooth.items())
    }
    grad = jax.grad(lambda s: c.log_density({**choices, **s}))(smooth)
    slope = sum(float(jnp.vdot(grad[a], direction[a])) for a in smooth)
    at = [
        float(c.log_density({**choices, **{a: smooth[a] + h * direction[a] for a in smooth}}))
        for h in (step, -step)
    ]
    close(slope, (at[0] - at[1]) / (2 * step), 1e-5)


def _narrow(x):
    """As float32 or int32."""
    x = np.asarray(x)
    return x.astype({"float64": "float32", "int64": "int32"}.get(x.dtype.name, x.dtype.name))


@pytest.mark.parametrize("name", SIMULATED)
def test_float32(name):
    """Within rounding of the terms that are summed, at values that float32 represents.

    A term is a few operations on numbers of its own size (a square, a logarithm), and errors of
    earlier values pass through later ones; 200 units of rounding of the absolute sum leaves room
    for both and still sees a lost digit.
    """
    c = case(name)
    ((_, choices),) = c.finite(1)
    choices = {a: _narrow(v) for a, v in choices.items()}
    # Copies: JAX remembers a NumPy constant by identity, with the dtype of its first use.
    args = jax.tree.map(lambda x: _narrow(x) if isinstance(x, np.ndarray) else x, c.entry.args)
    with jax.enable_x64(False):
        trace, _ = c.model.generate(jax.random.key(0), choices, *args, **c.options)
        assert trace.log_density.dtype == jnp.float32
        got = float(trace.log_density)
        size = sum(float(np.abs(x).sum()) for x in jax.tree.leaves(trace.scores))
    wide = {
        a: jnp.asarray(v.astype("float64" if v.dtype == np.float32 else "int64"))
        for a, v in choices.items()
    }
    expected = float(c.reference(wide))
    assert abs(got - expected) < 200 * np.finfo(np.float32).eps * (1 + size)


@pytest.mark.parametrize("name", ["vmap_schools", "vmap_scan_cond", "scalar_chain"])
def test_float32_simulation(name):
    c = case(name)
    args = jax.tree.map(_narrow, c.entry.args)
    with jax.enable_x64(False):
        trace = c.model.simulate(jax.random.key(3), *args)
        assert all(v.dtype.itemsize == 4 for v in trace.choices.values())
        again = c.model.log_density(trace.choices, *args)
        assert trace.log_density.dtype == again.dtype == jnp.float32
        np.testing.assert_allclose(trace.log_density, again, rtol=1e-5)


# -- one model for each family ---------------------------------------------------------------


def _everywhere(family):
    def program(params):
        ab.sample("plain", family.element(0))
        jax.vmap(lambda *p: ab.sample("mapped", family.make(*p)))(*params)
        jax.lax.scan(lambda c, p: (c, ab.sample("scanned", family.make(*p))), 0, params)
        if family.batchable:
            ab.sample("batched", family.make(*params))

    return program


def _scores(family, values):
    """Log densities of the three elements, by NumPyro, each alone."""

    @jax.jit
    def scores(values):
        return [jnp.sum(family.element(i).log_prob(values[i])) for i in range(LENGTH)]

    return scores(values)


# Their samplers take long to compile; drawn among the slow tests.
HEAVY = {
    "CirculantNormal", "GaussianCopula", "GaussianStateSpace", "InverseWishart",
    "InverseWishartCholesky", "LKJ", "LKJCholesky/cvine", "LeftTruncatedGamma",
    "RightTruncatedGamma", "SineBivariateVonMises", "SineSkewed", "TwoSidedTruncatedGamma",
    "WishartCholesky", "DirichletMultinomial", "HurdleGamma",
}  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in HEAVY else n for n in sorted(FAMILIES)]
)
def test_family(name):
    """Drawn under `vmap`; scored alone, under `vmap`, under `scan` and with a batch shape."""
    family = FAMILIES[name]
    params = jax.tree.map(jnp.asarray, family.params)
    if family.has_sampler:
        mapped = ab.model(lambda ps: jax.vmap(lambda *p: ab.sample("mapped", family.make(*p)))(*ps))
        trace = mapped.simulate(jax.random.key(2), params)
        values = trace.choices["mapped"]
        d = family.element(0)
        assert values.shape == (LENGTH, *d.batch_shape, *d.event_shape)
        close(trace.log_density, sum(_scores(family, values)))
        if np.issubdtype(values.dtype, np.floating) and not name.startswith(("Hurdle", "Unit")):
            assert not np.array_equal(values[0], values[1])
    else:
        values = jnp.asarray(family.value)
    names = ["mapped", "scanned"] + ["batched"] * family.batchable
    choices = {"plain": values[0], **dict.fromkeys(names, values)}
    scores = _scores(family, values)
    expected = scores[0] + len(names) * sum(scores)
    close(ab.model(_everywhere(family)).log_density(choices, params), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(n for n, f in FAMILIES.items() if f.has_sampler))
def test_family_drawn_everywhere(name):
    family = FAMILIES[name]
    params = jax.tree.map(jnp.asarray, family.params)
    trace = ab.model(_everywhere(family)).simulate(jax.random.key(2), params)
    choices = dict(trace.choices)
    expected = jnp.sum(family.element(0).log_prob(choices.pop("plain")))
    expected += sum(sum(_scores(family, v)) for v in choices.values())
    close(trace.log_density, expected)


def test_families_cover_numpyro():
    """No class of `numpyro.distributions` is forgotten."""
    import inspect

    import numpyro.distributions as nd

    built = {c.__name__ for f in FAMILIES.values() for c in _classes(f.element(0))}
    built |= {name for f in FAMILIES.values() for name in f.covers}
    classes = {n for n, c in vars(nd).items() if inspect.isclass(c)}
    classes = {n for n in classes if issubclass(getattr(nd, n), nd.Distribution)}
    assert classes - built - {"Distribution"} == set()


def _classes(d):
    yield type(d)
    inner = getattr(d, "base_dist", None)
    if inner is not None:
        yield from _classes(inner)


def test_log_density_does_not_depend_on_the_key():
    c = case("vmap_of_scan")
    one = c.model.log_density(c.choices(0), *c.entry.args, key=jax.random.key(1))
    two = c.model.log_density(c.choices(0), *c.entry.args, key=jax.random.key(2))
    assert float(one) == float(two) == float(c.log_density(c.choices(0)))


def test_hessian_through_scan():
    c = case("scan_carry_and_xs")
    choices = c.choices(0)

    def density(z):
        return c.log_density({**choices, "z": z})

    got = jax.hessian(density)(choices["z"])
    expected = jax.hessian(lambda z: c.reference({**choices, "z": z}))(choices["z"])
    close(got, expected)


def test_dead_branch_gives_finite_gradients():
    """sqrt(x) of a negative x in the dead branch: 0 * nan must not reach the gradient."""
    c = case("vmap_of_cond")
    flags = [np.asarray(c.choices(i)["x"]) > 0 for i in range(DRAWS)]
    assert np.concatenate(flags).any() and not np.concatenate(flags).all()
    for i in range(DRAWS):
        choices = c.choices(i)
        grad = jax.grad(lambda s: c.log_density({**choices, **s}))(c.smooth(choices))  # noqa: B023
        assert all(np.isfinite(g).all() for g in grad.values())
        assert np.all(np.asarray(grad["v"])[~flags[i]] == 0.0)


def test_batched_draws_differ_between_elements_and_addresses():
    """Elements of a vmap, steps of a scan, and equal programs at two addresses: no shared draws."""
    c = case("axis_orders_of_one_jit")
    scale = 1 + np.arange(4.0)
    t = {"vvs": 2, "vsv": 1, "svv": 0}
    z = {}
    for prefix, axis in t.items():
        x = np.moveaxis(np.asarray(c.choices(0)[f"{prefix}/x"]), axis, -1)
        loc = 10 * np.arange(2.0)[:, None] + np.arange(3.0)
        z[prefix] = ((x - loc[..., None]) / scale).ravel()
    every = np.concatenate([*z.values()])
    assert len(np.unique(np.round(every, 9))) == every.size
