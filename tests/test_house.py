"""The rules of the house: what may import what, how long a file is, what is documented."""

import ast
import inspect
from pathlib import Path

import pytest

import abduce as ab

PACKAGE = Path(ab.__file__).parent
ROOT = PACKAGE.parent
SOURCES = sorted(PACKAGE.rglob("*.py"))

# What each part of the package may import from the others. A part may always import itself.
MAY_IMPORT = {
    "errors": set(),
    "dist": {"errors"},
    "kernels": {"errors"},
    "ppl": {"errors", "dist"},
    "models": {"errors", "dist", "ppl"},
    "inference": {"errors", "dist", "kernels", "ppl"},
    "amortized": {"errors", "dist", "kernels", "ppl", "inference", "models"},
    "loading": {"errors", "inference", "amortized"},
    "demo": {"", "errors", "dist", "ppl", "inference", "models"},
    "cli": {"errors", "amortized", "demo"},
    "__main__": {"cli"},
}
# Where a part looks up instead: `Model.posterior` and `Model.prior` hand over when they are called.
LOOKS_UP = {"abduce/ppl/model.py": {"inference"}}
JAX_INTERNALS = ("jax._src", "jax.extend", "jax.interpreters", "jaxlib")
JAX_INTERNALS_HOME = PACKAGE / "ppl" / "_jax.py"
LONGEST_FILE = 500


def relative(path):
    return path.relative_to(ROOT).as_posix()


def part_of(path):
    """The part of the package a file belongs to: "ppl", "errors", ..."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_modules(path):
    """Every module a file imports, anywhere in it, as `(line, dotted name)`."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base] if base else up)
            # `from abduce import dist` names a module; the name decides what is imported
            if base in ("abduce", "jax"):
                found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, base))
    return found


def imported_parts(path):
    """The parts of the package a file imports; "" stands for `import abduce` itself."""
    return [
        (line, f"{name}.".split(".")[1])
        for line, name in imported_modules(path)
        if name.split(".")[0] == "abduce"
    ]


def test_every_part_has_an_import_rule():
    assert {part_of(p) for p in SOURCES} - {"__init__"} <= set(MAY_IMPORT)


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_imports_point_one_way(path):
    part = part_of(path)
    if part == "__init__":
        return  # the front door shows every part
    wrong = [
        f"{relative(path)}:{line} imports abduce.{other}"
        for line, other in imported_parts(path)
        if other not in {part, *MAY_IMPORT[part], *LOOKS_UP.get(relative(path), ())}
    ]
    assert not wrong


@pytest.mark.parametrize("name", sorted(LOOKS_UP))
def test_looking_up_happens_at_call_time_only(name):
    top_level = ast.parse((ROOT / name).read_text()).body
    imports = {n.module for n in top_level if isinstance(n, ast.ImportFrom)}
    assert not {m for m in imports for up in LOOKS_UP[name] if m.startswith(f"abduce.{up}")}


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_one_module_touches_the_internals_of_jax(path):
    if path == JAX_INTERNALS_HOME:
        return
    wrong = [
        f"{relative(path)}:{line} imports {name}"
        for line, name in imported_modules(path)
        if name.startswith(JAX_INTERNALS)
    ]
    source = path.read_text()
    wrong += [f"{relative(path)} uses {name}" for name in JAX_INTERNALS if f"{name}." in source]
    assert not wrong


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_keys_are_typed(path):
    names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert "PRNGKey" not in names


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_user_input_is_never_checked_with_assert(path):
    """Asserts may only tell the type checker what a type is: `assert x is not None`."""
    asserts = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Assert)]
    assert [n.lineno for n in asserts if not ast.unparse(n.test).endswith("is not None")] == []


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_file_has_one_reason_to_exist(path):
    length = len(path.read_text().splitlines())
    assert length <= LONGEST_FILE, f"{relative(path)} has {length} lines: look for a second reason"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_a_module_says_what_it_is(path):
    if path.read_text().strip():
        assert ast.get_docstring(ast.parse(path.read_text())), f"{relative(path)}: no docstring"


def is_ours(thing):
    return (getattr(thing, "__module__", None) or "").startswith("abduce")


def test_public_names_exist_and_are_documented():
    undocumented = []
    for name in ab.__all__:
        thing = getattr(ab, name)
        doc = inspect.getdoc(thing)
        if is_ours(thing) and (not doc or len(doc) < 15 or doc == inspect.getdoc(type(thing))):
            undocumented.append(name)
    assert not undocumented


def test_public_methods_are_documented():
    undocumented = []
    for name in ab.__all__:
        thing = getattr(ab, name)
        for method, value in vars(thing).items() if inspect.isclass(thing) else ():
            is_function = inspect.isfunction(value) or isinstance(value, property)
            is_public = is_ours(value) or isinstance(value, property)
            if method.startswith(("_", "tree_")) or not (is_function and is_public):
                continue
            if not inspect.getdoc(getattr(thing, method)):
                undocumented.append(f"{name}.{method}")
    assert not undocumented


def test_errors_can_be_caught_as_ours_and_as_the_built_in():
    for name, error in vars(ab.errors).items():
        is_ours = inspect.isclass(error) and issubclass(error, ab.AbduceError)
        if is_ours and error is not ab.AbduceError:
            builtins = {c for c in error.__mro__ if c.__module__ == "builtins"}
            assert builtins - {Exception, BaseException, object}, name
