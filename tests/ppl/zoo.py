"""The zoo: small models that together meet every rule of the language, each with a reference.

An entry's reference computes the log density from the choice map by hand, with Python loops and
Python branches, so it shares nothing with the interpreter. Models of one distribution each are in
`families.py`.
"""

from .zoo_basic import BASIC
from .zoo_branches import BRANCHES
from .zoo_calls import CALLS
from .zoo_entry import Entry
from .zoo_loops import LOOPS

__all__ = ["ZOO", "Entry"]

ZOO: dict[str, Entry] = {**BASIC, **LOOPS, **BRANCHES, **CALLS}
