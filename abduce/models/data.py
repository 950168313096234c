"""Small published data sets, as facts with their source.

Each function returns fresh NumPy arrays, so nobody can change another reader's copy.
"""

from typing import NamedTuple

import numpy as np

__all__ = ["EightSchools", "Nile", "eight_schools", "nile"]


class EightSchools(NamedTuple):
    """Estimated effects of coaching in eight schools.

    Attributes:
        school: Names of the schools, shape `(8,)`.
        effect: Estimated gain, in points of the SAT-V test, shape `(8,)`.
        standard_error: Standard error of each estimate, in the same points, shape `(8,)`.
    """

    school: tuple[str, ...]
    effect: np.ndarray
    standard_error: np.ndarray


class Nile(NamedTuple):
    """Annual flow of the Nile at Aswan.

    Attributes:
        year: 1871 to 1970, shape `(100,)`.
        flow: Volume in 1e8 cubic metres, shape `(100,)`.
    """

    year: np.ndarray
    flow: np.ndarray


def eight_schools() -> EightSchools:
    """Returns the coaching experiments of eight schools.

    D. B. Rubin, "Estimation in parallel randomized experiments", Journal of Educational Statistics
    6 (1981), 377-401; also A. Gelman et al., "Bayesian Data Analysis", third edition, section 5.5.

    Example:
        >>> eight_schools().effect[:3]
        array([28.,  8., -3.])
    """
    return EightSchools(
        school=tuple("ABCDEFGH"),
        effect=np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]),
        standard_error=np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]),
    )


def nile() -> Nile:
    """Returns the annual flow of the Nile at Aswan, 1871 to 1970.

    G. W. Cobb, "The problem of the Nile: conditional solution to a changepoint problem",
    Biometrika 65 (1978), 243-251.

    Example:
        >>> nile().flow[:3]
        array([1120., 1160.,  963.])
    """
    return Nile(year=np.arange(1871, 1971), flow=np.array(_NILE_FLOW, dtype=float))


# One row a decade; the first is 1871 to 1880.
_NILE_FLOW = (
    1120, 1160, 963, 1210, 1160, 1160, 813, 1230, 1370, 1140,
    995, 935, 1110, 994, 1020, 960, 1180, 799, 958, 1140,
    1100, 1210, 1150, 1250, 1260, 1220, 1030, 1100, 774, 840,
    874, 694, 940, 833, 701, 916, 692, 1020, 1050, 969,
    831, 726, 456, 824, 702, 1120, 1100, 832, 764, 821,
    768, 845, 864, 862, 698, 845, 744, 796, 1040, 759,
    781, 865, 845, 944, 984, 897, 822, 1010, 771, 676,
    649, 846, 812, 742, 801, 1040, 860, 874, 848, 890,
    744, 749, 838, 1050, 918, 986, 797, 923, 975, 815,
    1020, 906, 901, 1170, 912, 746, 919, 718, 714, 740,
)  # fmt: skip
