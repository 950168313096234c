"""The ArviZ object: groups, names, axes, and both versions' containers."""

import arviz as az
import ml_dtypes
import numpy as np
import pytest
import xarray as xr

from abduce.errors import InvalidValue
from abduce.inference import arviz as ours
from abduce.inference.arviz import to_arviz

SCHOOLS = ["a", "b", "c"]
is_old = int(az.__version__.split(".")[0]) < 1


def example():
    rng = np.random.default_rng(0)
    posterior = {
        "mu": rng.normal(size=(4, 50)),
        "group/tau": rng.normal(size=(4, 50)),
        "theta": rng.normal(size=(4, 50, 3)),
        "cov": rng.normal(size=(4, 50, 3, 3)),
        "w": rng.normal(size=(4, 50, 2)),
    }
    options = {
        "sample_stats": {
            "diverging": rng.random((4, 50)) < 0.1,
            "lp": rng.normal(size=(4, 50)),
            "n_steps": np.full((4, 50), 7),
            "step_size": np.arange(4.0),
            "tree_depth": np.array(3),
        },
        "log_likelihood": {"y": rng.normal(size=(4, 50, 3))},
        "posterior_predictive": {"y": rng.normal(size=(4, 50, 3))},
        "prior": {"mu": rng.normal(size=(1, 80))},
        "prior_predictive": {"y": rng.normal(size=(1, 80, 3))},
        "observed_data": {"y": np.arange(3.0)},
        "constant_data": {"sigma": np.ones(3), "name": np.array("x")},
        "dims": {"theta": ["school"], "cov": ["school", "school"], "y": ["school"]},
        "coords": {"school": SCHOOLS},
        "attrs": {"tuning_steps": 500},
    }
    return posterior, options


@pytest.fixture(params=[0, 1], ids=["InferenceData", "DataTree"])
def result(request, monkeypatch):
    """Both containers, whichever version is installed; the old one exists only in ArviZ 0.x."""
    if request.param == 0 and not is_old:
        pytest.skip("ArviZ 0.x is not installed")
    monkeypatch.setattr(ours, "_arviz_major", lambda: request.param)
    posterior, options = example()
    return to_arviz(posterior, **options), posterior, options


def test_the_installed_version_decides():
    expected = az.InferenceData if is_old else xr.DataTree
    assert isinstance(to_arviz({"mu": np.zeros((2, 5))}), expected)


def test_groups_and_values(result):
    tree, posterior, options = result
    groups = ["posterior", *(k for k in options if k not in ("dims", "coords", "attrs"))]
    assert all(hasattr(tree, group) or group in tree for group in groups)
    for site, value in posterior.items():
        np.testing.assert_array_equal(tree["posterior"][site.replace("/", ".")].values, value)
    np.testing.assert_array_equal(tree["observed_data"]["y"].values, np.arange(3.0))
    assert tree["constant_data"]["name"].item() == "x"
    assert tree["prior"]["mu"].shape == (1, 80)
    assert tree["posterior"].attrs["inference_library"] == "abduce"
    assert tree["posterior"].attrs["tuning_steps"] == 500


def test_axes_and_labels(result):
    tree, *_ = result
    posterior = tree["posterior"]
    assert posterior["theta"].dims == ("chain", "draw", "school")
    assert posterior["cov"].dims == ("chain", "draw", "school", "school_1")
    assert posterior["w"].dims == ("chain", "draw", "w_dim_0")
    assert list(posterior["school"].values) == SCHOOLS == list(posterior["school_1"].values)
    assert float(posterior["theta"].sel(school="b", chain=1, draw=3)) == float(
        posterior["theta"].values[1, 3, 1]
    )
    assert tree["log_likelihood"]["y"].dims == ("chain", "draw", "school")
    assert tree["observed_data"]["y"].dims == ("school",)


def test_statistics_a_chain_or_a_run_are_repeated(result):
    tree, *_ = result
    stats = tree["sample_stats"]
    assert stats["diverging"].dtype == bool and stats["step_size"].shape == (4, 50)
    np.testing.assert_array_equal(stats["step_size"].values[:, 7], np.arange(4.0))
    assert (stats["tree_depth"].values == 3).all()


def test_netcdf_round_trip(result, tmp_path):
    pytest.importorskip("h5netcdf")
    tree, posterior, _ = result
    path = tmp_path / "posterior.nc"
    tree.to_netcdf(str(path), engine="h5netcdf")
    with xr.open_dataset(path, group="posterior", engine="h5netcdf") as stored:
        np.testing.assert_array_equal(stored["group.tau"].values, posterior["group/tau"])


@pytest.mark.skipif(not is_old, reason="functions of ArviZ 0.x")
def test_arviz_can_use_it():
    posterior, options = example()
    data = to_arviz(posterior, **options)
    table = az.summary(data, var_names=["theta"])
    assert list(table.index) == ["theta[a]", "theta[b]", "theta[c]"]
    assert np.isfinite(az.loo(data).elpd_loo)


def test_arviz_base_can_use_the_tree(monkeypatch):
    base = pytest.importorskip("arviz_base")
    monkeypatch.setattr(ours, "_arviz_major", lambda: 1)
    posterior, options = example()
    tree = to_arviz(posterior, **options)
    assert base.extract(tree)["theta"].sizes["sample"] == 200


def test_one_name_for_two_lengths():
    tree = to_arviz(
        {"a": np.zeros((1, 5, 3)), "b": np.zeros((1, 5, 4))}, dims={"a": ["i"], "b": ["i"]}
    )
    assert tree["posterior"]["a"].dims[-1] == "i" and tree["posterior"]["b"].dims[-1] == "b_i"


def test_an_axis_named_like_a_site_or_like_chain():
    tree = to_arviz(
        {"x": np.zeros((1, 5, 3)), "y": np.zeros((1, 5, 2))}, dims={"x": ["x"], "y": ["chain"]}
    )
    assert tree["posterior"]["x"].dims == ("chain", "draw", "x_dim")
    assert tree["posterior"]["y"].dims == ("chain", "draw", "chain_dim")


def test_bfloat16_and_empty_groups():
    tree = to_arviz({"x": np.ones((1, 5), ml_dtypes.bfloat16)}, sample_stats={})
    assert tree["posterior"]["x"].dtype == np.float32
    to_arviz({})


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({"x": np.zeros(5)}, {}, r'posterior\["x"\].*got \(5,\)'),
        (
            {"x": np.zeros((1, 5)), "z": np.zeros((2, 5))},
            {},
            r'"z"\].*\(2, 5\).*"x"\] has \(1, 5\)',
        ),
        ({"x": np.zeros((1, 5, 2))}, {"dims": {"x": ["a", "b"]}}, "names 2 axes"),
        (
            {"x": np.zeros((1, 5, 2))},
            {"dims": {"x": ["a"]}, "coords": {"a": [1, 2, 3]}},
            r'coords\["a"\] has 3 labels.*length 2',
        ),
        ({"a/x": np.zeros((1, 5)), "a.x": np.zeros((1, 5))}, {}, 'both be called "a.x"'),
        ({"x": np.zeros((1, 5), object)}, {}, "has dtype object"),
    ],
)
def test_messages(values, options, message):
    with pytest.raises(InvalidValue, match=message):
        to_arviz(values, **options)


def test_without_arviz(monkeypatch):
    def missing(name):
        raise ours.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(ours.importlib.metadata, "version", missing)
    with pytest.raises(ImportError, match="pip install arviz"):
        to_arviz({"x": np.zeros((1, 5))})
