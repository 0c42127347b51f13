"""Settings with which `jupyter nbconvert --config .ci/readme.py` makes README.md from nbs/index.ipynb.

Links in the notebook are relative to nbs/, those of the README to the root: each is carried over here.
"""
import re
from pathlib import PurePosixPath

from nbconvert.preprocessors import CoalesceStreamsPreprocessor, Preprocessor

NOTE = "<!-- Made from nbs/index.ipynb by `jupyter nbconvert --config .ci/readme.py`: edit that instead. -->"
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)\s]+)")  # the target of a Markdown link that is no full address


def from_root(link:re.Match) -> str:
    "A link from nbs/ as a link from the root."
    parts = []
    for part in PurePosixPath("nbs", link[1]).parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


class RootLinks(Preprocessor):
    "Rewrite the links of every Markdown cell, say on top where the file comes from, and mark code as Python."
    def preprocess(self, nb, resources):
        nb.metadata["language_info"] = {"name": "python"}
        for cell in nb.cells:
            if cell.cell_type == "markdown": cell.source = LINK.sub(from_root, cell.source)
        nb.cells[0].source = f"{NOTE}\n\n{nb.cells[0].source}"
        return nb, resources


c = get_config()  # noqa: F821  (traitlets hands it in)
c.NbConvertApp.notebooks = ["nbs/index.ipynb"]
c.NbConvertApp.export_format = "markdown"
c.NbConvertApp.output_base = "README"
c.FilesWriter.build_directory = "."
c.MarkdownExporter.preprocessors = [RootLinks, CoalesceStreamsPreprocessor]
