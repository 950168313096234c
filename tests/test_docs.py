"""Every Python block in the README and the documentation runs."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("**/*.md"))]


def _load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


execute = _load(ROOT / "docs" / "execute.py")


# Pages that train networks or run long filters: a minute or more of compiling each.
LONG = {"amortized", "distribution_transformer", "likelihoods", "particles", "pfn", "variational"}


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=[pytest.mark.slow] if p.stem in LONG else [],
                  id=p.relative_to(ROOT).as_posix()) for p in PAGES],
)  # fmt: skip
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # what a page writes is not left in the repository
    execute.run_page(page)


def test_a_failing_block_is_reported_with_its_page_and_line(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n```python\nx.missing\n```\n")
    with pytest.raises(RuntimeError, match=r"page\.md, line 7: AttributeError"):
        execute.run_page(page)


def test_an_announced_error_must_come(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python raises=KeyError\nx = 1\n```\n")
    with pytest.raises(RuntimeError, match="expected KeyError, but nothing was raised"):
        execute.run_page(page)
    page.write_text("```python raises=KeyError\n{}['a']\n```\n")
    (block,) = execute.run_page(page)
    assert block.output == "KeyError: 'a'"


def test_the_last_expression_is_shown_and_figures_are_kept(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nprint('one')\n1 + 1\n```\n"
    )
    (block,) = execute.run_page(page)
    assert block.output == "one\n2"
    assert len(block.figures) == 1 and block.figures[0].startswith(b"\x89PNG")


def test_links_between_pages_lead_somewhere():
    missing = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                missing.append(f"{page.relative_to(ROOT)} -> {target}")
    assert not missing


def test_every_page_is_in_the_sites_contents():
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = [p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").glob("**/*.md")]
    assert [p for p in pages if p not in nav] == []
