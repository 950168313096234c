"""Reading a chain out of an unmodified model: its scan, and the kernel of the state inside it.

A step of the scan is a kernel from the carry to the value of one latent site, the *state*, followed
by whatever the body makes of it: observations, and the next carry. `Chain` finds these parts in the
staged program; `Body` evaluates them.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from abduce.errors import InvalidModel, InvalidValue, UnknownAddress, suggest
from abduce.inference.smc.proposals import tree_of
from abduce.ppl import _jax
from abduce.ppl.interpreter import State, _equation, addresses, walk
from abduce.ppl.operations import outside_scopes, prepare_given, to_physical
from abduce.ppl.program import stage
from abduce.ppl.replay import Replay, Sums
from abduce.ppl.site import has_sites, site_p
from abduce.ppl.slots import argument_names

__all__ = ["Body", "Chain", "Visit", "float_part", "without_path"]


class Found(Exception):
    """Ends a walk where what was sought stands."""


class Visit:
    """A handler that replays a program, with rules of its own for some sites and for one scan.

    Args:
        rules: By address, `(site, operands, state) -> value`.
        scan: `(address, rule)`: the scan that holds the address is run by
            `rule(eqn, vals, state)`.
    """

    def __init__(self, rules: Mapping[str, Callable[..., Any]], scan: Any = None):
        self.rules = rules
        self.scan = scan
        self.replay = Replay()

    def site(self, site, operands, given, key, acc):
        return self.replay.site(site, operands, given, key, acc)

    def equation(self, eqn: Any, vals: list[Any], state: State) -> list[Any]:
        """One equation; what depends on an input that is None is None."""
        if eqn.primitive is site_p:
            site = eqn.params["site"]
            if site.address in self.rules:
                return [self.rules[site.address](site, vals, state)]
            if any(v is None for v in vals):
                return [None] * len(eqn.outvars)
            given = state.inputs.get(site.address)
            outs, state.acc, record = self.site(site, vals, given, state.key, state.acc)
            if record is not None:
                state.records[site.address] = record
            return outs
        if (
            self.scan is not None
            and eqn.primitive is _jax.scan_p
            and self.scan[0] in addresses(eqn.params["jaxpr"])
        ):
            return self.scan[1](eqn, vals, state)
        call = _jax.call_jaxpr(eqn)
        if call is not None and has_sites(call[1]):
            return walk(self, call[1], vals, state)
        if any(v is None for v in vals):
            return [None] * len(eqn.outvars)
        return _equation(self.replay, eqn, vals, state)


class Sources:
    """A handler for walks over sets: what each value depends on.

    Args:
        given: Addresses that are known.
        stop: At this site (or at the scan that holds it) the walk ends; `Found` has the operands'.
    """

    def __init__(self, given: Any, stop: str):
        self.given, self.stop = given, stop

    def site(self, site, operands, given, key, acc):
        raise AssertionError("sites are handled by `equation`")

    def equation(self, eqn: Any, vals: list[Any], state: Any) -> list[Any]:
        sets = [v if isinstance(v, frozenset) else frozenset() for v in vals]
        union = frozenset().union(*sets)
        out = [union] * len(eqn.outvars)
        if eqn.primitive is site_p:
            site = eqn.params["site"]
            if site.address == self.stop:
                raise Found(sets)
            known = site.address in self.given or ("obs" in site.roles and "mask" not in site.roles)
            if site.kind == "sample":
                return [frozenset() if known else union | {site.address}]
            return [frozenset()] if site.kind == "param" else out
        if eqn.primitive is _jax.scan_p and self.stop in addresses(eqn.params["jaxpr"]):
            raise Found(sets, eqn)
        call = _jax.call_jaxpr(eqn)
        if call is not None and has_sites(call[1]):
            return walk(self, call[1], sets, state)
        inside = {a for sub in _jax.subjaxprs(eqn) for a in addresses(sub)} - set(self.given)
        return [union | inside] * len(eqn.outvars)


def float_part(leaves: Sequence[Any]) -> tuple[Any, Callable[[Any], list[Any]]]:
    """The floating-point leaves as one vector, and the way back (other leaves stay)."""
    leaves = [jnp.asarray(x) for x in leaves]
    chosen = [jnp.issubdtype(x.dtype, jnp.floating) for x in leaves]
    vector, unravel = ravel_pytree([x for x, c in zip(leaves, chosen, strict=True) if c])

    def back(vector):
        it = iter(unravel(vector))
        return [next(it) if c else x for x, c in zip(leaves, chosen, strict=True)]

    return vector, back


_PART = re.compile(r"\[(?P<index>\d+)\]|\[(?P<key>'[^']*'|\"[^\"]*\")\]|\.(?P<attr>\w+)")


def _root(name: str | None) -> str:
    return re.split(r"[.\[]", name or "", maxsplit=1)[0]


def _follow(tree: Any, path: str) -> Any:
    """The leaf of a tree at a path such as `['x'][0]`."""
    while path:
        match = _PART.match(path)
        if match is None:
            raise InvalidModel(f"cannot find {path!r} in the carry of a scan.")
        if match["index"] is not None:
            tree = tree[int(match["index"])]
        else:
            tree = tree[match["key"][1:-1]] if match["key"] else getattr(tree, match["attr"])
        path = path[match.end() :]
    return tree


@dataclasses.dataclass(frozen=True)
class Body:
    """The body of a scan, seen as a kernel of the state; static.

    Attributes:
        jaxpr: With the sites in it.
        state: Address of the state.
        num_consts, num_carry: How its inputs are split.
        names: The user's names of the inputs, such as "carry['x']".
        needs: Which constants the law of the state depends on.
    """

    jaxpr: Any
    state: str
    num_consts: int
    num_carry: int
    names: tuple[str, ...]
    needs: tuple[bool, ...]

    def _carry_name(self) -> str:
        return _root(self.names[self.num_consts]) if self.num_carry else ""

    def in_carry(self, i: int) -> bool:
        """Whether constant `i` is a part of the user's carry that no step changes."""
        return bool(self.num_carry) and _root(self.names[i]) == self._carry_name() != ""

    def inputs(self, consts: Sequence[Any], carry: Any, x: Any) -> list[Any]:
        """The body's inputs, from the user's carry and x and the constants that are needed."""
        here = self._carry_name()
        end = self.num_consts + self.num_carry
        x_name = _root(self.names[end]) if len(self.names) > end else None
        values = []
        for i, name in enumerate(self.names):
            root = _root(name)
            if here and root == here:
                values.append(_follow(carry, name[len(root) :]))
            elif i < self.num_consts:
                values.append(consts[i])
            else:
                values.append(_follow(x, name[len(str(x_name)) :]))
        return values

    def carry_tree(self, inputs: Sequence[Any]) -> Any:
        """The carry in the user's structure."""
        here = self._carry_name()
        leaves = {
            n[len(here) :]: v for n, v in zip(self.names, inputs, strict=True) if _root(n) == here
        }
        return tree_of(leaves)

    def run(self, inputs: Sequence[Any], value: Any, given: Any, key: Any) -> tuple[Any, ...]:
        """Runs a step with this value of the state.

        Returns:
            The carry's leaves, the other outputs, and the log likelihood of what is observed.
        """
        state = State(key, given, Sums.zero(log_density=False, weight=True))
        outs = walk(Visit({self.state: lambda *_: value}), self.jaxpr, inputs, state)
        return outs[: self.num_carry], outs[self.num_carry :], state.acc.weight

    def law(self, inputs: Sequence[Any], given: Any = None) -> tuple[Any, list[Any]]:
        """The site of the state and its operands."""

        def stop(site, operands, state):
            raise Found(site, operands)

        key = jax.random.key(0)  # of latents that the state does not depend on
        state = State(key, given or {}, Sums.zero(log_density=False, weight=True))
        try:
            walk(Visit({self.state: stop}), self.jaxpr, inputs, state)
        except Found as found:
            return found.args[0], list(found.args[1])
        raise AssertionError("the body has the site")


class Chain:
    """A model with data, opened at the scan that holds the state.

    Args:
        model: The model.
        state: Address of the state, in one scan.
        initial: Address of the latent outside of the scan that the first carry depends on; None
            for the only one there is.
        given: Observed values by address, in the layout users see; `ab.masked` for partly observed.
        args, kwargs: The model's arguments.

    Attributes:
        body, consts, xs, length, reverse: Of the scan; xs have time in front.
        observed: Values in the scan, time in front.
    """

    def __init__(self, model: Any, state: str, initial: str | None, given: Any, args: Any, kwargs):
        with outside_scopes():
            self.program, self.arguments = stage(model.with_algorithm(None), args, kwargs)
        sites = self.program.sites
        self.state = state
        info = sites.get(state)
        if info is None or not info.is_latent or state in given:
            latents = [a for a in self.program.latents if a not in given]
            raise UnknownAddress(
                f"ab.guided: the state is {state!r}, but that is no latent site of "
                f"`{self.program.name}` (there are {', '.join(latents) or 'none'})."
                f"{suggest(state, latents)} Name it in the auxiliary process: state=..."
            )
        if info.num_scans != 1:
            raise InvalidModel(
                f"ab.guided: site {state!r} is inside {info.num_scans} scans; the state must be "
                f"drawn once in each step of one jax.lax.scan."
            )
        self.info = info
        prepared = prepare_given(self.program, {a: given[a] for a in given if a in sites})
        self.given = {a: to_physical(sites[a], g) for a, g in prepared.items()}
        with outside_scopes():
            eqn, vals = self._open()
        sources, _ = _sources(self.program, self.arguments, self.given, state)
        p = eqn.params
        nc, nk = _jax.scan_split(eqn)
        names = argument_names(p["jaxpr"])
        if not names:
            raise InvalidModel(
                f"ab.guided: the body of the scan with {state!r} has no argument names. Define it "
                f"as a plain function `def step(carry, x)`."
            )
        self.body = Body(p["jaxpr"], state, nc, nk, names, self._needs(p["jaxpr"], nc, len(names)))
        fixed = [i for i in range(nc) if not self.body.in_carry(i)]
        bad = {a for i, s in enumerate(sources) if i in fixed or i >= nc + nk for a in s}
        if bad:
            raise InvalidModel(
                f"ab.guided: the steps of the scan depend on the latent "
                f"{', '.join(map(repr, sorted(bad)))} drawn outside of it, other than through the "
                f"carry, so there is no one message for all particles. Condition on it: "
                f"ab.condition(model, {{{sorted(bad)[0]!r}: ...}}), or ab.pmmh, which does."
            )
        outer = [
            a for a, s in self.program.latents.items() if s.num_scans == 0 and a not in self.given
        ]
        into_carry = [s for i, s in enumerate(sources) if i not in fixed and i < nc + nk]
        self.initial = self._initial(initial, outer, into_carry)
        self.length, self.reverse = p["length"], p["reverse"]
        self.consts, self.xs = list(vals[:nc]), list(vals[nc + nk :])
        inside = addresses(p["jaxpr"])
        self.observed = {a: g for a, g in self.given.items() if a in inside}
        self.key = jax.random.key(0)  # of entries that are hidden: any value will do

    def _initial(self, name, outer, sources) -> str | None:
        if name is not None:
            if name not in outer:
                raise UnknownAddress(
                    f"ab.guided: initial={name!r} is no latent outside of the scan (there are "
                    f"{', '.join(outer) or 'none'}).{suggest(name, outer)}"
                )
            return name
        used = [a for a in outer if any(a in s for s in sources)]
        if len(used) > 1:
            raise InvalidValue(
                f"ab.guided: the scan starts from several latents, {', '.join(map(repr, used))}. "
                f"Say which one is to be guided: initial={used[0]!r}; the others are drawn from "
                f"their prior."
            )
        return used[0] if used else None

    def _needs(self, jaxpr: Any, num_consts: int, num_inputs: int) -> tuple[bool, ...]:
        known = [frozenset({i}) for i in range(num_inputs)]
        try:
            walk(Sources(self.given, self.state), jaxpr, known, State(None, {}, ()))
        except Found as found:
            union = frozenset().union(*found.args[0])
        latents = [a for a in union if isinstance(a, str)]
        if latents:
            raise InvalidModel(
                f"ab.guided: in a step, the law of the state {self.state!r} depends on the latent "
                f"{', '.join(map(repr, latents))} of the same step. Draw them as one site, or name "
                f"the other one as the state."
            )
        return tuple(i in union for i in range(num_consts))

    def _outer(self, rules: Any, **options: Any) -> Any:
        state = State(jax.random.key(0), self.given, Sums.zero(log_density=False, weight=True))
        with outside_scopes():
            return walk(
                Visit(rules, **options), self.program.jaxpr, self.program.inputs(self.arguments),
                state,
            )  # fmt: skip

    def _open(self, value: Any = None) -> tuple[Any, list[Any]]:
        def stop(eqn, vals, state):
            raise Found(eqn, vals)

        rules = {} if value is None else {self.initial: lambda *_: value}
        try:
            self._outer(rules, scan=(self.state, stop))
        except Found as found:
            return found.args
        raise AssertionError("the program has the scan")

    def initial_law(self) -> tuple[Any, list[Any]]:
        """The site of the initial latent and its operands."""

        def stop(site, operands, state):
            raise Found(site, operands)

        try:
            self._outer({self.initial: stop})
        except Found as found:
            return found.args[0], list(found.args[1])
        raise AssertionError("the program has the site")

    def first_carry(self, value: Any = None) -> list[Any]:
        """The first carry's leaves, for a value of the initial latent."""
        _, vals = self._open(value)
        avals = [v.aval for v in _jax.inner_jaxpr(self.body.jaxpr)[0].invars]
        nc, nk = self.body.num_consts, self.body.num_carry
        return [
            jnp.asarray(x, a.dtype)
            for x, a in zip(vals[nc : nc + nk], avals[nc : nc + nk], strict=True)
        ]

    def at(self, carry: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
        """The body's inputs at a step."""
        return [*self.consts, *carry, *xs]

    def run(self, carry: Any, xs: Any, value: Any, given: Any) -> tuple[Any, Any]:
        """The next carry, and the log likelihood of a step's observations."""
        out, _, weight = self.body.run(self.at(carry, xs), value, given, self.key)
        return out, weight

    def law(self, carry: Any, xs: Any, given: Any) -> tuple[Any, list[Any]]:
        """The site of the state at a step, and its operands."""
        return self.body.law(self.at(carry, xs), given)

    def scan(self, step: Any, init: Any, inputs: Any = None) -> Any:
        """Runs `step(loop, (xs, observed, inputs))` over the steps, in the model's order."""
        return jax.lax.scan(
            step, init, (self.xs, self.observed, inputs), length=self.length, reverse=self.reverse
        )

    def map(self, fn: Any, *inputs: Any) -> Any:
        """Runs `fn(xs, observed, *inputs)` for all steps at once."""
        if not jax.tree.leaves((self.xs, self.observed, inputs)):
            inputs = (*inputs, jnp.arange(self.length))
            return jax.vmap(lambda xs, given, *rest: fn(xs, given, *rest[:-1]),
                            axis_size=self.length)(self.xs, self.observed, *inputs)  # fmt: skip
        return jax.vmap(fn)(self.xs, self.observed, *inputs)


def _sources(program: Any, arguments: Any, given: Any, state: str) -> tuple[Any, Any]:
    """For each input of the scan with the state, the latents it depends on; and the scan."""
    try:
        walk(
            Sources(given, state), program.jaxpr, program.inputs(arguments), State(None, {}, ())
        )  # fmt: skip
    except Found as found:
        return found.args
    raise AssertionError("the program has the site")


def without_path(model: Any, state: str, initial: str | None, given: Any, args: Any, kwargs: Any):
    """`given` without the current values of the state and of the initial latent, as in `ab.mh`.

    Where the state has no value in `given`, all of it is data and stays.
    """
    if state not in given:
        return given
    if initial is None:
        with outside_scopes():
            program, arguments = stage(model.with_algorithm(None), args, kwargs)
        sources, eqn = _sources(program, arguments, (), state)
        nc, nk = _jax.scan_split(eqn)
        fixed = frozenset().union(*sources[:nc], *sources[nc + nk :])
        starts = frozenset().union(*sources[nc : nc + nk]) - fixed
        initial = next(iter(starts)) if len(starts) == 1 else None
    return {a: v for a, v in given.items() if a not in (state, initial)}
