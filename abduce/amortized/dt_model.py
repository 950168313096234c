"""A Distribution Transformer as a Model `q(given, *args)`: proposal, guide, or starting point."""

from __future__ import annotations

from typing import Any

from abduce.amortized.dt_coordinates import emit_mixture
from abduce.ppl.model import Model
from abduce.ppl.operations import outside_scopes

__all__ = ["TransformerModel"]


class TransformerModel(Model):
    """What `DistributionTransformer.as_model` returns."""

    estimator: Any
    model: Model
    algorithm: Any = None

    @property
    def name(self) -> str:
        return f"{self.estimator.name} of {self.model.name}"

    def emit(self, given: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Samples every target address."""
        plan = self.estimator.plan
        with outside_scopes():
            seen = {a: given[a] for a in plan.layout.observed if a in given}
            q = self.estimator.mixture(self.model, *args, given=seen, **kwargs)
        return emit_mixture(q, plan.target)
