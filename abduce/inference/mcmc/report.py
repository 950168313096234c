"""What a run of HMC must tell its reader, each with a remedy (numpy only)."""

import numpy as np

from .settings import HMCConfig

__all__ = ["split_rhat", "warnings_of"]

_RHAT = 1.05  # split R-hat of a coordinate above which chains disagree
_MODES = 2.0  # above which they have hardly anything in common
_ENERGY = 0.3  # E-BFMI below which momentum refreshment is too weak (Betancourt, 1604.00695)


def split_rhat(values: np.ndarray) -> np.ndarray:
    """Split R-hat (Gelman et al., BDA3, section 11.4).

    Args:
        values: `(num_chains, num_draws, ...)`, at least 4 draws.

    Returns:
        One number per trailing element; infinite where chains are constant and differ.
    """
    half = values.shape[1] // 2
    parts = np.concatenate([values[:, :half], values[:, -half:]]).astype(np.float64)
    within = parts.var(1, ddof=1).mean(0)
    between = parts.mean(1).var(0, ddof=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.sqrt((half - 1) / half + between / within)
    return np.where(within > 0, ratio, np.where(between > 0, np.inf, 1.0))


def warnings_of(
    positions: np.ndarray, stats: dict[str, np.ndarray], config: HMCConfig
) -> list[str]:
    """Looks for trouble in the draws.

    Args:
        positions: `(num_chains, num_draws, dim)`.
        stats: As in `HMCRun`.
        config: The settings of the run.

    Returns:
        Messages; empty when all is well.
    """
    name = f"ab.{config.kind}"
    checks = [_divergences, _depth, _stuck_chains, _disagreement, _energy]
    return [m for check in checks if (m := check(name, positions, stats, config))]


def _divergences(name, positions, stats, config) -> str | None:
    count, total = int(stats["diverging"].sum()), stats["diverging"].size
    if not count:
        return None
    higher = min(0.99, 1 - (1 - config.target_accept_prob) / 4)
    return (
        f"{name}: {count} of {total} trajectories diverged: the draws may miss a region of high "
        f"curvature. Try target_accept_prob={higher:.3g}; if they remain, reparametrise, for "
        f"example a hierarchy to its non-centred form."
    )


def _depth(name, positions, stats, config) -> str | None:
    if config.kind != "nuts":
        return None
    share = float(np.mean((stats["tree_depth"] >= config.max_tree_depth) & ~stats["diverging"]))
    if share < 0.01:
        return None
    return (
        f"{name}: {share:.0%} of the trajectories reached max_tree_depth="
        f"{config.max_tree_depth} before a U-turn, so the draws are correlated. Try "
        f"max_tree_depth={config.max_tree_depth + 2}, or rescale or reparametrise the model."
    )


def _stuck_chains(name, positions, stats, config) -> str | None:
    if positions.shape[1] < 20:
        return None
    moved = np.mean(np.any(np.diff(positions, axis=1) != 0, -1), 1)
    stuck = np.flatnonzero(moved < 0.05)
    if not len(stuck):
        return None
    return (
        f"{name}: chain {_listed(stuck)} hardly moves: it accepts {moved[stuck].min():.1%} of its "
        f"trajectories. Try other starting points (init=) or a longer warm-up (num_warmup="
        f"{2 * max(config.num_warmup, 500)}); leave the chain out only if you know why."
    )


def _disagreement(name, positions, stats, config) -> str | None:
    num_chains, num_draws = positions.shape[:2]
    if num_draws < 20:
        return None
    rhat = split_rhat(positions)
    worst = float(np.max(rhat))
    if worst < _RHAT:
        return None
    if num_chains > 1 and worst > _MODES:
        coordinate = positions[..., int(np.argmax(rhat))]
        centre = np.median(coordinate.mean(1))
        apart = np.flatnonzero(
            np.abs(coordinate.mean(1) - centre) > 3 * np.median(coordinate.std(1))
        )
        which = f"chain {_listed(apart)} and the others" if len(apart) else "the chains"
        lp = ", ".join(f"{v:.1f}" for v in stats["lp"].mean(1))
        return (
            f"{name}: {which} are in different modes (split R-hat {worst:.1f}; mean log densities "
            f"by chain: {lp}), so the draws do not weight the modes. Remove the symmetry from the "
            f"model (for example by an ordered vector), or start all chains in one mode (init=)."
        )
    return (
        f"{name}: split R-hat is {worst:.2f}, so the chains have not mixed. Draw more "
        f"(num_samples={2 * config.num_samples}) after a longer warm-up (num_warmup="
        f"{2 * max(config.num_warmup, 500)}), or reparametrise the model."
    )


def _energy(name, positions, stats, config) -> str | None:
    energy = stats["energy"].astype(np.float64)
    if energy.shape[1] < 100:
        return None
    fraction = np.mean(np.diff(energy, axis=1) ** 2, 1) / np.maximum(energy.var(1), 1e-300)
    low = np.flatnonzero(fraction < _ENERGY)
    if not len(low):
        return None
    return (
        f"{name}: E-BFMI is {fraction.min():.2f} in chain {_listed(low)} (below {_ENERGY}): the "
        f"tails are too heavy for the momentum to cross them. Reparametrise the model, for "
        f"example a hierarchy to its non-centred form."
    )


def _listed(indices: np.ndarray) -> str:
    return ", ".join(str(int(i)) for i in indices)
