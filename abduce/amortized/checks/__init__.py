"""Checks of posteriors: of any algorithm, learned or not.

Each has a costly part, `run_*`, that infers, and a part of pure functions of arrays, `check_*`.
"""

from abduce.amortized.checks.attack import check_attack, run_attack
from abduce.amortized.checks.c2st import c2st
from abduce.amortized.checks.calibration import Calibration
from abduce.amortized.checks.coverage import check_coverage
from abduce.amortized.checks.lc2st import check_lc2st, run_lc2st
from abduce.amortized.checks.misspecification import check_misspecification, run_misspecification
from abduce.amortized.checks.predictive import check_predictive, run_predictive
from abduce.amortized.checks.report import Report, check_all, run_all
from abduce.amortized.checks.result import Check
from abduce.amortized.checks.runs import run_calibration
from abduce.amortized.checks.sbc import check_sbc, run_sbc, sbc
from abduce.amortized.checks.tarp import check_tarp, tarp_fractions

__all__ = [
    "Calibration",
    "Check",
    "Report",
    "c2st",
    "check_all",
    "check_attack",
    "check_coverage",
    "check_lc2st",
    "check_misspecification",
    "check_predictive",
    "check_sbc",
    "check_tarp",
    "run_all",
    "run_attack",
    "run_calibration",
    "run_lc2st",
    "run_misspecification",
    "run_predictive",
    "run_sbc",
    "sbc",
    "tarp_fractions",
]
