"""What the law of a site depends on: the operands of its distribution, element by element."""

from __future__ import annotations

from typing import Any

from abduce.ppl.interpreter import broadcast_operand
from abduce.ppl.operations import run_program
from abduce.ppl.program import Arguments, Program, SiteInfo
from abduce.ppl.replay import Replay

__all__ = ["OperandReplay", "elements", "operands_of"]


class OperandReplay(Replay):
    """Records the operands of every sample site as 'operand 0', 'operand 1', ..."""

    def site(self, site, operands, given, key, acc):
        values, acc, record = super().site(site, operands, given, key, acc)
        if site.kind == "sample":
            leaves = [i for i, role in enumerate(site.roles) if role == "leaf"]
            for n, i in enumerate(leaves):
                record[f"operand {n}"] = broadcast_operand(site, operands[i], i)
        return values, acc, record


def operands_of(record: dict[str, Any]) -> list[Any]:
    """The operands in a record."""
    count = sum(name.startswith("operand ") for name in record)
    return [record[f"operand {n}"] for n in range(count)]


def elements(
    program: Program, arguments: Arguments, key: Any, given: Any, addresses: tuple[str, ...]
) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Runs a program; values and operands of some sites, one row per element.

    Args:
        program: The model.
        arguments: Its arguments.
        key: Random key for what is not given.
        given: By address, `Given`.
        addresses: Which sites.

    Returns:
        By address, the values `(elements, *element shape)` and each operand likewise. Elements are
        those of `vmap` and `scan`.
    """
    replay = OperandReplay(record=frozenset({"value"}), score=False)
    records = run_program(replay, program, arguments, key, given)["records"]
    out = {}
    for a in addresses:
        info: SiteInfo = program.sites[a]
        n = info.lead_ndim
        rows = [x.reshape((-1, *x.shape[n:])) for x in (
            records[a]["value"], *operands_of(records[a])
        )]  # fmt: skip
        out[a] = (rows[0], tuple(rows[1:]))
    return out
