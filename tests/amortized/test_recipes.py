"""Recipes: the commands `abduce pretrain`, `abduce check` and `abduce info`."""

import shutil
import signal
import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import abduce as ab
from abduce.amortized import training
from abduce.amortized.recipes import checkpoint_of, opened
from abduce.amortized.training import num_parameters
from abduce.cli import main
from abduce.errors import InvalidValue

# The model is imported from beside the recipe, so that all tests share its compiled programs. In
# Laplace's frame a single normal is the exact posterior, but for what these few steps change.
MODEL = '''
import abduce as ab
import abduce.dist as dist


@ab.model
def reading():
    mu = ab.sample("mu", dist.Normal(0.0, 1.0))
    ab.sample("y", dist.Normal(mu, 1.0))


@ab.model
def other():
    mu = ab.sample("mu", dist.Normal(0.0, 2.0))
    ab.sample("y", dist.Normal(mu, 1.0))
'''
RECIPE = '''
import abduce as ab
from model_of_test_recipes import reading

estimator = ab.npe(
    reading, observed=["y"], head="mixture", width=8, context_dim=8, depth=1, num_components=1,
    num_candidates=0, frame=True,
)
fit = {"num_steps": 12, "batch_size": 64, "learning_rate": 1e-3, "progress_bar": False}
seed = 3
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a recipe and its model."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "model_of_test_recipes.py").write_text(MODEL)
    (folder / "recipe.py").write_text(RECIPE)
    yield folder
    sys.modules.pop("model_of_test_recipes", None)


@pytest.fixture(scope="module")
def trained(place):
    assert main(["pretrain", str(place / "recipe.py"), "--out", str(place / "reading")]) == 0
    return place / "reading"


@pytest.fixture
def folder(trained, tmp_path):
    """A copy of what was trained."""
    return shutil.copytree(trained, tmp_path / "reading")


def arrays_of(est):
    return [np.asarray(x) for x in jax.tree.leaves(eqx.filter(est.network, eqx.is_array))]


def assert_same(a, b):
    for x, y in zip(arrays_of(a), arrays_of(b), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(a.history["loss"], b.history["loss"])


# ---------------------------------------------------------------------- pretrain


def test_the_command_trains_as_fit_does(place, trained):
    with opened(place / "recipe.py") as file:
        est = file.estimator.fit(jax.random.key(3), **file.fit)
    assert_same(ab.load(trained), est)
    assert sorted(p.name for p in trained.iterdir()) == ["config.json", "weights.safetensors"]
    assert not checkpoint_of(trained).exists()
    assert str(place) not in sys.path and "abduce_recipe" not in sys.modules


def test_an_interrupted_run_goes_on_to_the_same_end(place, trained, tmp_path, monkeypatch, capsys):
    recipe, out = str(place / "recipe.py"), tmp_path / "out"
    original = training._steps

    class Losses:
        """Comes when the weights have moved and the step's number has not, as Ctrl-C can."""

        def __init__(self, values):
            self.values = values

        def __array__(self, *args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            return np.asarray(self.values, *args)

    def stops(config, state, key, first, count, *rest):
        state, losses = original(config, state, key, first, jnp.minimum(count, 1), *rest)
        return state, Losses(losses) if int(first) == 5 else losses

    def single(self, count):
        return one(self, min(count, 1))

    one = training._Run._advance
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    with monkeypatch.context() as patch:
        patch.setattr(training, "_steps", stops)
        patch.setattr(training._Run, "_advance", single)
        assert main(["pretrain", recipe, "--out", str(out)]) == 130
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    printed = capsys.readouterr().out
    assert "interrupted at step 6: what there is was saved" in printed
    assert f"Go on: abduce pretrain {recipe} --out {out} --resume\n" in printed
    assert len(ab.load(out).history["loss"]) == 6
    assert main(["info", str(out)]) == 0
    assert "checkpoint at step 6 in" in capsys.readouterr().out

    assert main(["pretrain", recipe, "--out", str(out)]) == 1
    assert "did not end. Go on there with --resume" in capsys.readouterr().err
    changed = place / "changed.py"
    changed.write_text(RECIPE.replace("seed = 3", "seed = 3  # the same"))
    assert main(["pretrain", str(changed), "--out", str(out), "--resume"]) == 1
    assert "changed.py has changed since the run in" in capsys.readouterr().err

    assert main(["pretrain", recipe, "--out", str(out), "--resume"]) == 0
    assert "from step 6" in capsys.readouterr().out
    assert_same(ab.load(out), ab.load(trained))
    assert not checkpoint_of(out).exists()


def test_an_interrupt_raised_by_hand_counts_too(place, tmp_path, monkeypatch):
    def stops(self, count):
        raise KeyboardInterrupt

    monkeypatch.setattr(training._Run, "_advance", stops)
    out = tmp_path / "out"
    assert main(["pretrain", str(place / "recipe.py"), "--out", str(out), "--steps", "7"]) == 130
    assert (checkpoint_of(out) / "checkpoint").is_dir()


def test_folders_that_would_be_overwritten_are_refused_before_training(place, tmp_path, capsys):
    def says(out, message, *options):
        assert main(["pretrain", str(place / "recipe.py"), "--out", str(out), *options]) == 1
        text = capsys.readouterr().err
        assert message in text and text.count("\n") == 1, text

    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file.write_text("mine")
    says(full, "it is not empty (notes.txt). Choose another folder")
    says(full, "there is no checkpoint", "--resume")
    says(file, "is a file. Name a folder that does not exist")
    (checkpoint_of(full) / "checkpoint").mkdir(parents=True)
    says(full, "holds notes.txt, which abduce did not write", "--resume")
    says(file / "below", str(file))  # the disk's own message
    assert (full / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "the recipe defines no `estimator`. Write estimator = ab.npe("),
        ("estimator = 5\n", "`estimator` is of type int; it has to be what ab.npe, ab.fmpe"),
        ("import abduce as ab\nestimator = ab.npe\n", "`estimator` is of type function"),
        ("x = 1\ny = = 2\n", "bad.py, line 2: invalid syntax: y = = 2"),
        ("x = 1\n\ny = nothing\n", "bad.py, line 3: NameError: name 'nothing' is not defined"),
        ("import nowhere_at_all\n", "bad.py, line 1: ModuleNotFoundError"),
        ("def f():\n    raise ValueError('no')\nf()\n", "bad.py, line 2: ValueError: no"),
        ("raise SystemExit(0)\n", "bad.py, line 1: SystemExit: 0"),
        (RECIPE.replace('"y"', '"z"'), "line 5: UnknownAddress: ab.npe: observed='z' matches no"),
        (RECIPE + "fit = 5\n", "`fit` has to be a dict of keyword arguments"),
        (RECIPE + "fit['num_step'] = 5\n", 'no argument of ab.npe(...).fit; there are num_steps'),
        (RECIPE + "fit['num_step'] = 5\n", 'Did you mean "num_steps"?'),
        (RECIPE + "fit['checkpoint_dir'] = 'x'\n", "set by `abduce pretrain` itself, from --out"),
        (RECIPE + "seed = 1.5\n", "`seed` has to be an int from 0 to 2**32 - 1, got 1.5"),
        (RECIPE + "fit['batch_size'] = 0\n", "fit: batch_size must be an int >= 1, got 0"),
    ],
)
def test_a_recipe_that_fails_is_explained_in_a_line(text, message, place, tmp_path, capsys):
    bad = place / "bad.py"
    bad.write_text(text)
    assert main(["pretrain", str(bad), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.startswith("abduce pretrain: ") and said.count("\n") == 1
    assert message in said
    assert not list(tmp_path.iterdir())


def test_other_wrong_calls(place, tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    assert main(["pretrain", str(place / "missing.py"), *out]) == 1
    assert "missing.py: there is no such recipe." in capsys.readouterr().err
    assert main(["pretrain", str(place), *out]) == 1
    assert "the recipe cannot be read" in capsys.readouterr().err
    for steps in ("0", "-3", "many"):
        with pytest.raises(SystemExit) as exit:
            main(["pretrain", str(place / "recipe.py"), *out, "--steps", steps])
        assert exit.value.code == 2
        assert "is not a whole number above 0" in capsys.readouterr().err


def test_a_fitted_estimator_is_no_recipe(place, trained):
    bad = place / "bad.py"
    bad.write_text(f"import abduce as ab\nestimator = ab.load({str(trained)!r})\n")
    with pytest.raises(InvalidValue, match="is fitted already"), opened(bad):
        pass


# ---------------------------------------------------------------------- check and info


def test_checks_pass_and_are_kept(place, folder, capsys):
    before = ab.load(folder)
    recipe = str(place / "recipe.py")
    # Fixed key and all 400 data sets (the budget is never spent): the same result in every run.
    assert main(["check", str(folder), "--recipe", recipe, "--budget", "600"]) == 0
    said = capsys.readouterr().out
    assert "passed (false alarms: at most 0.01 over all checks)" in said
    after = ab.load(folder)
    assert after.report["passed"] is True
    assert_same(before, after)
    assert main(["info", str(folder)]) == 0
    assert "checks           passed (false alarms: 0.01)" in capsys.readouterr().out

    off = eqx.tree_at(lambda e: e.network.head.out.bias, after, replace_fn=lambda x: x + 1.0)
    off.save(folder)
    assert main(["check", str(folder), "--recipe", recipe, "--budget", "600"]) == 1
    assert "sbc                    FAILED" in capsys.readouterr().out
    assert ab.load(folder).report["passed"] is False
    assert main(["info", str(folder)]) == 0
    assert "checks           FAILED: sbc; " in capsys.readouterr().out


@pytest.mark.slow
def test_a_learned_likelihood_is_checked_with_its_sampler(place, tmp_path, capsys):
    recipe, out = place / "likelihood.py", tmp_path / "out"
    recipe.write_text(LIKELIHOOD)
    assert main(["pretrain", str(recipe), "--out", str(out)]) == 0
    code = main(["check", str(out), "--recipe", str(recipe), "--budget", "600"])
    assert code == 0, capsys.readouterr().out
    assert ab.load(out).report["passed"] is True


def test_a_check_needs_the_model_of_training(place, folder, capsys):
    wrong = place / "wrong.py"
    wrong.write_text(RECIPE.replace("import reading", "import other as reading"))
    assert main(["check", str(folder), "--recipe", str(wrong)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("abduce check: ab.npe: site 'mu' of `other` has another density")
    wrong.write_text(PFN)
    assert main(["check", str(folder), "--recipe", str(wrong)]) == 1
    assert "holds an ab.pfn, which has no checks" in capsys.readouterr().err
    assert main(["check", str(place / "nowhere"), "--recipe", str(wrong)]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_info_is_read_off_the_folder(folder, monkeypatch, capsys):
    est = ab.load(folder)
    monkeypatch.delitem(sys.modules, "model_of_test_recipes", raising=False)
    assert main(["info", str(folder)]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = dict(line.split(None, 1) for line in printed if line[0] != " ")  # not what is wrapped
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert lines["kind"] == "npe" and lines["model"] == "reading"
    assert lines["sites"] == "mu (), y ()" and lines["observed"] == "y"
    assert lines["sizes"] == "fixed"
    assert lines["settings"].startswith("head mixture, width 8, depth 1, context_dim 8, ")
    assert lines["parameters"] == f"{num_parameters(est.network)}"
    assert lines["training"] == "steps   12"
    assert lines["validation"] == f"loss  {est.history['validation_loss'][-1]:.4g} nats"
    assert lines["checks"] == "not made"
    assert lines["written"] == f"by       abduce {ab.__version__}, schema 1"
    assert lines["size"] == f"{size:,} bytes"


def test_info_of_other_folders(trained, tmp_path, capsys):
    assert main(["info", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("abduce info: ")
    mine = ab.load(trained)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(trained.parent))
        from model_of_test_recipes import reading
    post = mine(reading).posterior(jax.random.key(0), given={"y": 0.3})
    post.save(tmp_path / "post")
    assert main(["info", str(tmp_path / "post")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("kind        posterior\narrays") and "schema 1" in out


# ---------------------------------------------------------------------- other kinds

PFN = '''
import abduce as ab
import abduce.dist as dist


@ab.model
def line(n):
    w = ab.sample("w", dist.Normal(0, 1))
    x = ab.sample("x", dist.Uniform(-1, 1).expand([n]))
    ab.sample("y", dist.Normal(w * x, 0.1))


estimator = ab.pfn(line, 6, context=["x", "y"], query="y", width=8, num_layers=1, num_heads=2,
                   num_bars=10)
'''
LIKELIHOOD = '''
import jax
import jax.numpy as jnp

import abduce as ab
import abduce.dist as dist


@ab.model
def readings(n):
    a = ab.sample("a", dist.Normal(0.0, 1.0))
    f = lambda key, a: a + jax.random.normal(key)
    jax.vmap(lambda _: ab.sample("y", dist.Simulator(f, a)))(jnp.arange(n))


sampler = ab.nuts(num_chains=1, num_warmup=150, num_samples=200, progress_bar=False)
estimator = ab.nle(readings, 3, observed="y", head="mixture", num_components=2, width=32,
                   context_dim=16, depth=1, sampler=sampler)
fit = {"num_steps": 800, "learning_rate": 3e-3, "progress_bar": False}
'''
TRANSFORMER = '''
import abduce as ab
import abduce.dist as dist


@ab.model
def signal():
    v = ab.sample("v", dist.Normal(0.0, 1.0))
    ab.sample("z", dist.Normal(v, 1.0))


@ab.model
def priors():
    return {"v": dist.Normal(ab.sample("a", dist.Normal(0.0, 1.0)), 1.0)}


estimator = ab.distribution_transformer(
    signal, observed=["z"], priors=priors, width=8, num_layers=1, num_heads=2, hidden=8,
    num_components=2, num_fit_draws=16,
)
fit = {"batch_size": 8}
'''


def test_a_kind_without_a_default_number_of_steps_asks_for_one(tmp_path, capsys):
    (tmp_path / "line.py").write_text(PFN)
    assert main(["pretrain", str(tmp_path / "line.py"), "--out", str(tmp_path / "out")]) == 1
    assert "ab.pfn has no default number of steps. Write fit = " in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "kind", "described"),
    [
        (PFN, "pfn", ["model            line", "context          x, y", "query            y",
                      "sizes            0 to 5 points of context"]),
        (TRANSFORMER, "distribution_transformer",
         ["model            signal", "sites            v, given z and the prior of v"]),
    ],
)  # fmt: skip
def test_other_estimators_are_trained_and_described(text, kind, described, tmp_path, capsys):
    (tmp_path / "recipe.py").write_text(text)
    recipe, out = str(tmp_path / "recipe.py"), str(tmp_path / "out")
    assert main(["pretrain", recipe, "--out", out, "--steps", "2"]) == 0
    assert "abduce check" not in capsys.readouterr().out
    assert ab.load(out).name == kind
    assert main(["info", out]) == 0
    said = capsys.readouterr().out
    for line in (f"kind             {kind}", *described, "training steps   2"):
        assert f"{line}\n" in said
    assert "checks           none for this kind\n" in said
    assert main(["check", out, "--recipe", recipe]) == 1
    assert f"holds an ab.{kind}, which has no checks" in capsys.readouterr().err
