"""Every folded solution is right, and no blank is: chapters run once, each exercise tried blank, then solved.

A solution takes the place of the blank cell. What marks the exercise is run again after it: the rest of the
blank cell, from its first empty line on, or the cells that follow up to the one that marks. So a solution is
right by the reader's own check.
"""
import os, re

import nbformat
import pytest
from course import CHAPTERS, exercises, solutions
from nbclient import NotebookClient


def tried(cells:list, number:str, solution:str) -> dict:
    "The cells of one exercise, where they end, and the cells that try it again with the solution."
    blank = re.compile(rf"# exercise {re.escape(number)}\s*$", re.M)
    start = next(i for i, c in enumerate(cells) if blank.match(c.source))
    end = next(i for i in range(start, len(cells)) if f'mark("{number}"' in cells[i].source)
    rest = cells[start].source.partition("\n\n")[2]
    again = [rest] if start == end else [c.source for c in cells[start + 1:end + 1]]
    solved = [nbformat.v4.new_code_cell(s) for s in [solution, *again] if s.strip()]
    return dict(blank=cells[start:end + 1], end=end, solved=solved)


def printed(cells:list) -> str:
    "All that these cells wrote."
    return "".join(o.text for c in cells for o in c.outputs if o.output_type == "stream")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
def test_solutions(path, monkeypatch):
    nb, numbers, solved = nbformat.read(path, 4), exercises(path), solutions(path)
    assert numbers and set(solved) == set(numbers)
    nb.cells = [c for c in nb.cells if c.cell_type == "code"]
    for cell in nb.cells: cell.outputs = []
    tries = {number: tried(nb.cells, number, solved[number]) for number in numbers}
    for one in sorted(tries.values(), key=lambda one: one["end"], reverse=True):
        nb.cells[one["end"] + 1:one["end"] + 1] = one["solved"]

    monkeypatch.setitem(os.environ, "IN_TEST", "1")
    where = {"metadata": {"path": str(path.parent)}}
    NotebookClient(nb, timeout=300, kernel_name="python3", resources=where).execute()

    for number, one in tries.items():
        before, after = printed(one["blank"]), printed(one["solved"])
        assert f"Exercise {number}: not answered yet." in before, f"the blank cell says: {before!r}"
        verdicts = re.findall(rf"Exercise {re.escape(number)}: (.*)", after)
        assert verdicts and set(verdicts) == {"right."}, f"the solution of {number} is marked: {after!r}"
