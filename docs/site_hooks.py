"""MkDocs hooks: every page shows what its code printed when the site was built."""

import contextlib
import sys
import tempfile
from pathlib import Path

import matplotlib
from mkdocs.structure.files import File

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).parent))

from execute import run_page


def on_page_markdown(markdown, page, config, files):
    """Runs the page and puts each block's output and figures under it."""
    pieces, at = [], 0
    path = Path(page.file.abs_src_path)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        blocks = run_page(path, markdown)  # what a page writes does not stay
    for index, block in enumerate(blocks):
        start, end = block.span
        pieces += [markdown[at:start], f"```python\n{block.code}```\n"]
        if block.output:
            pieces.append(f"\n```text\n{block.output}\n```\n")
        for number, image in enumerate(block.figures):
            name = f"figures/{page.file.name}-{index}-{number}.png"
            files.append(File.generated(config, name, content=image))
            pieces.append(f"\n![]({name})\n")
        at = end
    return "".join([*pieces, markdown[at:]])
