"""Ready models and the data they are best known with.

Models are imported by module, `from abduce.models import classics`; data too,
`from abduce.models import data`.
"""

from abduce.models import classics, data

__all__ = ["classics", "data"]
