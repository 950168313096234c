"""Errors of abduce.

Each derives from `AbduceError` and from the built-in error a caller would expect, so both
`except ab.AbduceError` and `except KeyError` work. A message names the address, what came, what
was expected, and the remedy as code.
"""

import difflib
from collections.abc import Iterable

__all__ = [
    "AbduceError",
    "AbduceWarning",
    "Degenerate",
    "DiscreteLatent",
    "DuplicateAddress",
    "InitializationError",
    "InvalidAlgorithm",
    "InvalidModel",
    "InvalidValue",
    "MissingData",
    "MissingKey",
    "NoDensity",
    "NotFitted",
    "OutsideModel",
    "UnknownAddress",
    "suggest",
]


class AbduceError(Exception):
    """Base of every error that abduce raises on purpose."""

    def __str__(self):  # KeyError would show the repr of the message, with escaped newlines
        return "\n".join(str(a) for a in self.args)


class AbduceWarning(UserWarning):
    """A result that can be used, with something its reader must know."""


class UnknownAddress(AbduceError, KeyError):
    """An address or selection matches no site of the model."""


class DuplicateAddress(AbduceError, ValueError):
    """Two sites that can both be active have the same address."""


class MissingData(AbduceError, ValueError):
    """A value that is needed is absent, or is NaN."""


class InvalidValue(AbduceError, ValueError):
    """A value has the wrong shape or dtype, or lies outside the support."""


class InvalidModel(AbduceError, ValueError):
    """A model does something that has no meaning as a program with densities."""


class InvalidAlgorithm(AbduceError, ValueError):
    """An algorithm cannot run with these settings, or not on this model."""


class DiscreteLatent(AbduceError, TypeError):
    """A gradient method met a discrete latent site."""


class NoDensity(AbduceError, ValueError):
    """A density was asked of a site that has none."""


class NotFitted(AbduceError, RuntimeError):
    """An estimator was used before `fit`."""


class Degenerate(AbduceError, RuntimeError):
    """All particles, or all starting points, have weight zero."""


class InitializationError(Degenerate):
    """No starting point with finite log density was found."""


class MissingKey(AbduceError, TypeError):
    """A random key is missing, or is not a key."""


class OutsideModel(AbduceError, RuntimeError):
    """`ab.sample` (or a sibling) ran where no model is being interpreted."""


def suggest(name: str, options: Iterable[str]) -> str:
    """Returns ' Did you mean "x"?' for the closest option, or an empty string."""
    close = difflib.get_close_matches(name, list(options), n=1, cutoff=0.6)
    return f' Did you mean "{close[0]}"?' if close else ""
