"""What an entry of the zoo of test models is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Entry", "collect"]


@dataclass(frozen=True)
class Entry:
    """A small model with an independent reference.

    Attributes:
        program: The model's function, not yet wrapped by `ab.model`.
        reference: `(choices, *args) -> log density` in nats, by hand; loops are Python loops.
        shapes: Every latent address with the shape of its value.
        args: Arguments of the model.
        active: For sites under a conditional: `(choices, *args) -> {address: bool array}`; an
            address that is missing is always active.
        smooth: Latents with respect to which the density is differentiable. Empty means all
            floating ones.
        values: Choices for a model that cannot be simulated (improper density).
        params: Non-default `params=` for the operations.
        retval: `(choices, *args) -> return value`, where the tests should check it.
    """

    program: Callable
    reference: Callable[..., Any]
    shapes: Mapping[str, tuple[int, ...]]
    args: tuple = ()
    active: Callable[..., dict] | None = None
    smooth: tuple[str, ...] = ()
    values: Mapping[str, Any] | None = None
    params: Mapping[str, Any] | None = None
    retval: Callable | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def collect(
    into: dict[str, Entry], reference: Callable, shapes: Mapping, **options: Any
) -> Callable:
    """Decorator: files a program in the zoo under its own name."""

    def file(program: Callable) -> Callable:
        if program.__name__ in into:
            raise ValueError(f"the zoo has two models named {program.__name__}")
        into[program.__name__] = Entry(program, reference, dict(shapes), **options)
        return program

    return file
