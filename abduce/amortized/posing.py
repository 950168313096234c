"""Models as sources of training data: staged on arguments, and drawn from."""

from __future__ import annotations

from typing import Any

import jax

from abduce.errors import InvalidAlgorithm, NotFitted, UnknownAddress, suggest
from abduce.inference.problem import Problem, accepts, make_problem
from abduce.ppl.model import Model
from abduce.ppl.operations import outside_scopes, run_program
from abduce.ppl.program import Arguments, pack, stage_packed
from abduce.ppl.replay import Replay

__all__ = [
    "arguments_of",
    "as_arguments",
    "check_observed",
    "design",
    "draw_values",
    "pose",
    "require_model",
]


def design(arguments: Arguments, designs: Arguments, key: Any) -> Arguments:
    """The model's arguments drawn from a Model of designs."""
    with outside_scopes():
        program = stage_packed(designs)
        replay = Replay(record=frozenset(), score=False)
        out = run_program(replay, program, designs, key, {})["retval"]
    model, _, _ = arguments.unpack()
    args, kwargs = as_arguments(out)
    return pack(model, args, kwargs)


def draw_values(data: Any, key: Any) -> tuple[dict[str, Any], Arguments]:
    """Values of all sample sites by address, and the arguments they were drawn under.

    Args:
        data: `{"arguments": Arguments, "designs": Arguments or None}`.
        key: Random key.
    """
    k1, k2 = jax.random.split(key)
    arguments = data["arguments"]
    if data["designs"] is not None:
        arguments = design(arguments, data["designs"], k1)
    with outside_scopes():
        program = stage_packed(arguments)
        replay = Replay(record=frozenset({"value"}), score=False)
        records = run_program(replay, program, arguments, k2, {})["records"]
    values = {a: r["value"] for a, r in records.items() if program.sites[a].kind == "sample"}
    return values, arguments


def as_arguments(retval: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a Model of designs returns: a tuple of arguments, a dict by name, or one argument."""
    if isinstance(retval, dict):
        return (), retval
    return (retval if isinstance(retval, tuple) else (retval,)), {}


def pose(
    name: str, model: Model, args: Any, kwargs: Any, designs: Model | None, key: Any
) -> tuple[Problem, Arguments | None]:
    """The model staged on its arguments, or on a draw of them, and what draws them.

    Raises:
        InvalidAlgorithm: `designs=` is no Model, or comes with arguments; a keyword is neither a
            setting nor an argument of the model.
    """
    for keyword in kwargs:
        if not accepts(model, keyword, or_any=True):
            raise InvalidAlgorithm(
                f"ab.{name} has no setting {keyword!r}, and `{model.name}` no such argument."
            )
    drawn = None
    if designs is not None:
        if not isinstance(designs, Model):
            raise InvalidAlgorithm(
                f"ab.{name}: designs= takes a Model that draws the arguments and returns them as a "
                f"tuple or dict, got {type(designs).__name__}."
            )
        if args or kwargs:
            raise InvalidAlgorithm(
                f"ab.{name}: the arguments come from designs=, so none can be given; got "
                f"{len(args) + len(kwargs)}."
            )
        _, drawn = designs._stage((), {})
        args, kwargs = as_arguments(designs.simulate(key).retval)
    return make_problem(model, args, None, kwargs, None), drawn


def arguments_of(simulation: Any) -> tuple[Model | None, tuple[Any, ...], dict[str, Any]]:
    """The Model of designs, or the arguments, that an estimator simulates with."""
    if simulation["designs"] is not None:
        return simulation["designs"].unpack()[0], (), {}
    _, args, kwargs = simulation["arguments"].unpack()
    return None, args, kwargs


def require_model(est: Any, remedy: str, model: Any = None) -> Any:
    """The model given, or that of an estimator.

    Raises:
        NotFitted: There is neither: it was loaded from disk.
    """
    model = est.model if model is None else model
    if model is None:
        raise NotFitted(
            f"ab.{est.name}: an estimator loaded from disk does not know its model. {remedy}"
        )
    return model


def check_observed(name: str, problem: Problem, observed: Any) -> tuple[str, ...]:
    """Addresses of what will be observed, in the order of the program.

    Raises:
        UnknownAddress, InvalidAlgorithm: See the messages.
    """
    program = problem.program
    wanted = (observed,) if isinstance(observed, str) else tuple(observed or ())
    known = [a for a, s in program.sites.items() if s.kind == "sample"]
    for a in wanted:
        if a not in known:
            raise UnknownAddress(
                f"ab.{name}: observed={a!r} matches no site of `{program.name}` "
                f"({', '.join(known)}).{suggest(a, known)}"
            )
    if not wanted:
        raise InvalidAlgorithm(
            f"ab.{name}: say what will be observed, as in observed=[{known[-1]!r}]; the sites are "
            f"{', '.join(known)}."
        )
    fixed = [a for a in known if program.sites[a].observed]
    if fixed:
        raise InvalidAlgorithm(
            f"ab.{name}: site {fixed[0]!r} is observed inside the model (obs= or ab.condition), so "
            f"no data can be simulated for it. Drop obs= there and list it in observed=."
        )
    conditional = [a for a in wanted if program.sites[a].conditional]
    if conditional:
        raise InvalidAlgorithm(
            f"ab.{name}: observed site {conditional[0]!r} is in a branch, so it is not always "
            f"there. Observe a site outside the branch that is a function of it."
        )
    if len(wanted) == len(known):
        raise InvalidAlgorithm(
            f"ab.{name}: every site of `{program.name}` is observed, so there is nothing to infer."
        )
    return tuple(a for a in known if a in wanted)
