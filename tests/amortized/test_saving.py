"""Saved estimators: one from an older release, and damaged ones."""

import contextlib
import copy
import dataclasses
import hashlib
import json
import shutil
import signal
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import abduce as ab
import abduce.dist as dist
from abduce.amortized.saving import named_arrays
from abduce.errors import InvalidValue
from abduce.inference.persistence import LoadError, _document_checksum

GOLDEN = Path(__file__).parent / "golden" / "npe-1"
FILES = ("config.json", "weights.safetensors")


@ab.model
def coin():
    p = ab.sample("p", dist.Beta(2.0, 3.0))
    ab.sample("heads", dist.Binomial(10, probs=p))


# ---------------------------------------------------------------------- an older release

# What `golden/npe-1` was made by, on JAX 0.10.2 (a CPU), schema 1; it is never made again:
#
#     est = ab.npe(coin, observed=["heads"], head="mixture", width=8, context_dim=8, depth=1,
#                  num_components=2)
#     est = est.fit(jax.random.key(0), num_steps=200, learning_rate=3e-3)
#     est.save("tests/amortized/golden/npe-1")
#
# and what it said of p = 0.1, 0.4, 0.9 after so many heads (the exact posterior is a Beta), and
# its first five draws after 3 heads with jax.random.key(1). If the format changes, this folder has
# to load as before, and a folder of the new format joins it.
LOG_DENSITIES = {
    0: (1.696535, -1.377943, -9.992618),
    3: (-0.968090, 0.909232, -8.907221),
    10: (-11.106753, -2.941724, 1.326070),
}
DRAWS = (0.23186952, 0.26704937, 0.24459930, 0.16085386, 0.59693778)


def golden_densities():
    est = ab.load(GOLDEN).with_model(coin)
    p = jnp.array([0.1, 0.4, 0.9], jnp.float32)
    return {
        heads: jax.vmap(lambda x, n=heads: est.log_density({"p": x}, given={"heads": n}))(p)
        for heads in LOG_DENSITIES
    }


def test_a_folder_of_the_first_format_means_what_it_meant():
    for heads, found in golden_densities().items():
        np.testing.assert_allclose(found, LOG_DENSITIES[heads], atol=1e-4, rtol=0)
    post = ab.load(GOLDEN)(coin).posterior(jax.random.key(1), given={"heads": 3})
    np.testing.assert_allclose(post["p"][0, :5], DRAWS, atol=1e-4, rtol=0)


def test_it_means_the_same_in_64_bits(x64):
    for heads, found in golden_densities().items():
        np.testing.assert_allclose(found, LOG_DENSITIES[heads], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """What this release writes."""
    return ab.load(GOLDEN).save(tmp_path_factory.mktemp("sound") / "est")


SECONDS = 10.0  # that a load may take, on a busy machine; a sound one takes well under one
VALUES = (
    None, True, False, 0, -1, 1, 2, 3, 7, 64, 5000, 2**31, 2**40, 10**18, 10**400, 0.5, -1.5,
    1e308, "", "x", "npe", "spline", "coupling", "flow matching", "score", "bfloat16", "set",
    "sequence", "image", "vector", "classes:0:3", "classes:x", "p", "heads", [], {}, [0], [-1], [3],
    [2**40], [2**20, 2**20], [[1, 2]], ["p"], [None], {"a": 1}, {"$tuple": []}, {"$tuple": [3]},
    {"$float": "nan"}, {"$float": "one"}, {"$array": "config/history/loss"}, {"$array": "nowhere"},
    {"$dict": [[1, 2]]}, {"$dict": [1]}, {"$key": 1},
)  # fmt: skip


def damage_file(rng, folder):
    """Files as disks and transfers damage them; the checksums are left as they were."""
    path, other = (folder / FILES[i] for i in rng.permutation(2))
    data = bytearray(path.read_bytes())
    kind = ("cut", "flip", "insert", "overwrite", "empty", "delete", "rename", "swap", "copy",
            "folder", "double")[rng.integers(11)]  # fmt: skip
    at = int(rng.integers(len(data)))
    if kind == "cut":
        path.write_bytes(data[:at])
    elif kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    elif kind == "insert":
        data[at:at] = rng.bytes(5)
        path.write_bytes(data)
    elif kind == "overwrite":
        at = min(at, len(data) - 64)
        data[at : at + 64] = rng.bytes(64)
        path.write_bytes(data)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "double":
        path.write_bytes(data + data)
    elif kind == "delete":
        path.unlink()
    elif kind == "rename":
        path.rename(folder / "else")
    elif kind == "copy":
        path.write_bytes(other.read_bytes())
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    else:
        path.unlink()
        path.mkdir()
    return f"{kind} {path.name} at {at}"


def places(tree, path=()):
    """Every place in a JSON value, as a path of keys."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def parent_of(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


def damage_json(rng, folder):
    """An edited config.json whose checksum is right again, as by a hand or another program."""
    document = json.loads((folder / "config.json").read_text())
    part = ("config", "config", "config", "arrays", None)[rng.integers(5)]
    found = [p for p in places(document) if part is None or (p[0] == part and len(p) > 1)]
    path = found[rng.integers(len(found))]
    holder, key = parent_of(document, path), path[-1]
    kind = ("set", "set", "set", "set", "delete", "add", "deep", "move", "scale")[rng.integers(9)]
    what = ""
    if kind == "delete":
        del holder[key]
    elif kind == "add" and isinstance(holder, dict):
        holder[f"{key}x"] = holder[key]
    elif kind == "deep":
        for _ in range(int(rng.integers(1, 400))):
            holder[key] = [holder[key]]
    elif kind == "move":
        other = found[rng.integers(len(found))]
        holder[key] = copy.deepcopy(parent_of(document, other)[other[-1]])
        what = other
    elif kind == "scale" and type(holder[key]) is int:
        holder[key] *= 10 ** int(rng.integers(1, 8))
    else:
        holder[key] = what = VALUES[rng.integers(len(VALUES))]
    seal(folder, document)
    return f"{kind} {path} {what!r}"


def damage_arrays(rng, folder):
    """Other arrays than the settings ask for, in files that fit together."""
    document = json.loads((folder / "config.json").read_text())
    arrays = safetensors.numpy.load((folder / "weights.safetensors").read_bytes())
    names = sorted(arrays)
    name, other = (names[i] for i in rng.choice(len(names), 2, replace=False))
    x = arrays[name]
    kind = ("drop", "rename", "extra", "cast", "shape", "crop", "grow", "nan", "swap", "empty",
            "turn", "key")[rng.integers(12)]  # fmt: skip
    if kind == "drop":
        del arrays[name]
    elif kind == "rename":
        arrays[f"{name}x"] = arrays.pop(name)
    elif kind == "extra":
        arrays[f"{name}['x']"] = x
    elif kind == "cast":
        dtype = (np.float64, np.float16, np.int32, np.uint8, np.bool_)[rng.integers(5)]
        arrays[name] = x.astype(dtype)
    elif kind == "shape":
        arrays[name] = x.reshape((1, *x.shape))
    elif kind == "crop":
        arrays[name] = x.reshape(-1)[: x.size // 2].copy()
    elif kind == "grow":
        arrays[name] = np.zeros((*x.shape, 300), x.dtype)
    elif kind == "nan":
        arrays[name] = np.full(x.shape, np.nan, x.dtype)
    elif kind == "swap":
        arrays[name], arrays[other] = arrays[other], x
    elif kind == "empty":
        arrays[name] = x.reshape(-1)[:0].copy()
    elif kind == "key":
        arrays[name] = np.zeros((*x.shape, 2), np.uint32)
    else:
        arrays[name] = np.ascontiguousarray(x.T)
    document["arrays"] = {
        n: {"dtype": v.dtype.name, "shape": list(v.shape)} for n, v in arrays.items()
    }
    if kind == "key":
        document["arrays"][name] = {
            "dtype": "key", "impl": "threefry2x32", "shape": list(x.shape),
        }  # fmt: skip
    seal(folder, document, safetensors.numpy.save(arrays))
    return f"{kind} {name}"


def seal(folder, document, weights=None):
    """Writes a folder with right checksums; texts that are no JSON documents keep the old ones."""
    if weights is not None:
        (folder / "weights.safetensors").write_bytes(weights)
        sums = {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()}
        document["weights"] |= sums
    with contextlib.suppress(ValueError, RecursionError):
        document["sha256"] = _document_checksum(document)
    (folder / "config.json").write_text(json.dumps(document))


class Late(BaseException):
    """Loading takes too long; no `except Exception` hides it."""


def load_in_time(folder):
    """`ab.load`, or `Late`."""

    def late(*_):
        raise Late(f"loading takes more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return ab.load(folder)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("damage", "num"),
    [
        pytest.param(damage, num, marks=[pytest.mark.slow] if num > 50 else [])
        for damage in (damage_file, damage_json, damage_arrays)
        for num in (40, 334)
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_damaged_folders_load_or_say_why(damage, num, sound, tmp_path):
    """Always an error that names the folder, or an estimator: no other error, and no long wait."""
    folder, before = tmp_path / "est", weights_of(ab.load(sound))
    for seed in range(num):
        shutil.copytree(sound, folder)
        what = f"seed {seed}, {damage(np.random.default_rng(seed), folder)}"
        try:
            found = weights_of(load_in_time(folder))
        except (LoadError, InvalidValue) as error:
            assert str(folder) in str(error), what
        except (Exception, Late) as error:
            raise AssertionError(f"{what}: {error!r}") from error
        else:
            if damage is damage_file:  # nothing but white space may differ
                assert all(np.array_equal(found[n], x) for n, x in before.items()), what
        shutil.rmtree(folder)


def weights_of(est):
    return named_arrays((est.network, est.scales), "")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("settings", "depth"), 10**6, "ask for depth 1000000"),
        (("settings", "width"), 10**9, "ask for width 1000000000"),
        (("settings", "num_components"), 10**9, "ask for num_components"),
        (("settings", "num_networks"), 10**9, "the settings ask for"),
        (("settings", "width"), 8.0, "garbles settings/width, which is '8.0'"),
        (("settings", "head"), "forest", "head='forest' is not one of"),
        (("settings", "wings"), 2, "the settings wings are unknown to this release"),
        (("layout", "latents", "$tuple", 0, "stop"), 2**40, "has shape"),
        (("layout", "latents", "$tuple", 0, "stop"), "p", "garbles layout/latents/0/stop"),
        (("layout", "groups", "$tuple", 0), "image", "garbles layout/groups/0"),
        (("layout", "groups", "$tuple", 0, "kind"), "image", "describes no network"),
        (("features",), [[2**40]], "shapes .* of features"),
        (("shapes",), [["x"]], "garbles shapes/0/0"),
        (("num_samples",), -1, "num_samples -1"),
        (("history",), 5, "garbles history"),
        (("estimator",), None, "garbles estimator, which is 'None'"),
    ],
)
def test_what_no_save_writes_is_named(path, value, message, sound, tmp_path):
    folder = tmp_path / "est"
    shutil.copytree(sound, folder)
    document = json.loads((folder / "config.json").read_text())
    parent_of(document["config"], path)[path[-1]] = value
    seal(folder, document)
    with pytest.raises(LoadError, match=message):
        load_in_time(folder)


def test_discrete_latents_without_networks_are_refused(sound, tmp_path):
    folder = tmp_path / "est"
    shutil.copytree(sound, folder)
    document = json.loads((folder / "config.json").read_text())
    latent = {"address": "z", "shape": [2**30], "low": 0, "num_values": 3}
    document["config"]["layout"]["discrete"] = [latent]
    seal(folder, document)
    with pytest.raises(LoadError, match=r"no networks for 1073741824 discrete latents"):
        load_in_time(folder)


def test_weights_that_are_not_finite_come_back_as_they_were(tmp_path):
    """Training never ends with such weights; whoever saved them meant to, perhaps to look."""
    est = ab.load(GOLDEN)
    odd = eqx.tree_at(lambda e: e.network.head.out.bias, est, replace_fn=lambda x: x * jnp.nan)
    again = ab.load(odd.save(tmp_path / "est"))
    assert np.isnan(again.network.head.out.bias).all()
    np.testing.assert_array_equal(again.network.head.out.weight, est.network.head.out.weight)


def test_an_estimator_with_its_checks_is_still_a_pytree_of_arrays(tmp_path):
    class Report:
        def as_dict(self):
            return {"passed": False, "checks": [{"name": "sbc", "p_value": None}]}

    est = ab.load(ab.load(GOLDEN).save(tmp_path / "est", checks=Report()))
    assert est.report == Report().as_dict()
    double = jax.jit(lambda e: e.network.head.out.bias * 2)
    np.testing.assert_array_equal(double(est), 2 * np.asarray(est.network.head.out.bias))
    again = ab.load(est.save(tmp_path / "again"))  # the report stays with it
    assert again.report == est.report and hash(again.report) == hash(est.report)


def test_settings_that_were_numpy_numbers(tmp_path):
    est = ab.load(GOLDEN)
    settings = dataclasses.replace(est.settings, width=np.int64(8))
    again = ab.load(dataclasses.replace(est, settings=settings).save(tmp_path / "est"))
    assert again.settings == est.settings and type(again.settings.width) is int
