"The course keeps its promises: equations have checks and code that names them, pages all their parts."
import re

import pytest
from course import (CHAPTERS, CHECK, NBS, NOTEBOOKS, cells, checks, code, exercises, exported, kept_by,
                    markdown, prose, solutions, tags, without_blocks)

chapter = pytest.mark.parametrize("path", CHAPTERS, ids=lambda p: p.stem)
notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix()[:-6])


# --- equations

@chapter
def test_equations_are_numbered_in_order(path):
    number = path.name[:2]
    assert tags(path) == [f"{number}.{k + 1}" for k in range(len(tags(path)))]


@chapter
def test_every_equation_has_a_check_and_every_check_an_equation(path):
    alone = sorted(set(tags(path)) ^ set(checks(path)))
    assert not alone, f"equations without a check, or checks of no equation: {alone}"


COMPARES = re.compile(r"\b(agree\w*|assert\w*|refuses)\b")


def comparers(path) -> list[str]:
    "The functions of a chapter that compare on behalf of its check cells."
    bodies = re.findall(r"^def (\w+)(\(.*?)(?=^\S|\Z)", "\n".join(code(path)), re.S | re.M)
    return [name for name, body in bodies if COMPARES.search(body)]


@chapter
def test_a_check_compares(path):
    helped = re.compile(rf"\b({'|'.join([*comparers(path), 'nothing else'])})\(")
    for source in filter(CHECK.match, code(path)):
        assert COMPARES.search(source) or helped.search(source), f"this cell compares nothing:\n{source}"


def test_the_package_names_only_equations_that_exist():
    known = {t for path in CHAPTERS for t in tags(path)}
    assert not {number: names for number, names in kept_by().items() if number not in known}


@chapter
def test_code_names_its_equations(path):
    "Where exported code follows equations, a docstring names one of them; over a chapter, most are named."
    page = cells(path)
    if not any(exported(c) for c in page): return
    for text, after in zip(page, page[1:]):
        here = re.findall(r"\\tag\{([^}]*)\}", text["source"]) if text["cell_type"] == "markdown" else []
        if here and exported(after): assert set(here) & set(kept_by()), f"no docstring names any of {here}"
    left = set(tags(path)) - set(kept_by())
    assert 2 * len(left) <= len(tags(path)), f"no docstring of the package names {sorted(left)}"


@chapter
def test_references_point_at_equations(path):
    known = {t for other in CHAPTERS for t in tags(other)}
    mentioned = set(re.findall(r"(?:\(|\bEqs?\. |\band |, )(\d\d\.\d{1,2})(?=[),. ;:])", prose(path)))
    written = {p.name[:2] for p in CHAPTERS}
    unknown = {m for m in mentioned - known if m[:2] in written and m not in exercises(path)}
    assert not unknown, sorted(unknown)


# --- the parts of a page

@notebook
def test_front_matter(path):
    "nbdev makes the page's title and description of the first cell, and drops whatever else is in it."
    first = markdown(path)[0].strip()
    alone = re.fullmatch(r"# \S[^\n]*\n\n> \S[^\n]*", first)
    assert alone, f"not '# Title', an empty line, '> claim', in a cell of their own:\n{first}"
    titles = re.findall(r"^# .*", prose(path), re.M)
    assert len(titles) == 1, f"one title a page, not {titles}"


@chapter
def test_opening(path):
    first, second, *_ = *markdown(path), ""
    assert first.startswith(f"# {path.name[:2]} "), "the title begins with the chapter's number"
    badge = rf"\[!\[Open in Colab\]\(\S+\)\]\(\S+/nbs/{re.escape(path.name)}\)(\n\n|$)"
    assert re.match(badge, second), "the badge opens the second cell"
    *head, last = code(path)[0].splitlines()
    assert head == ["import sys", 'if "google.colab" in sys.modules:'], "first, install on Colab"
    assert re.fullmatch(r'    %pip install -q "fastdiff_edu @ git\+https://\S+"', last)
    assert any(pictures(c) for c in cells(path)[:9]), "the finished picture stands near the top"
    opening = "\n\n".join(markdown(path)[:4])
    bullets = [len(re.findall(r"^- ", block, re.M)) for block in re.split(r"\n\n+", opening)]
    assert any(3 <= n <= 5 for n in bullets), "the opening lists three to five things to build"
    assert "?" in opening, "the opening asks the reader a question"


@chapter
def test_exercises(path):
    assert any(re.match(r"## Exercises\b", text) for text in markdown(path))
    numbers = exercises(path)
    assert 3 <= len(numbers) <= 6
    assert numbers == [f"{path.name[:2]}.{k + 1}" for k in range(len(numbers))]
    assert list(solutions(path)) == numbers, "every exercise has a folded solution, in the same order"
    unmarked = [n for n in numbers if not any(f'mark("{n}"' in source for source in code(path))]
    assert not unmarked, f"nothing marks {unmarked}"


@chapter
def test_folded_text_is_whole(path):
    text = "\n".join(markdown(path))
    assert len({text.count(mark) for mark in ("<details>", "</details>", "<summary>", "</summary>")}) == 1
    for body in re.findall(r"</summary>(.*?)</details>", text, re.S):
        assert body.startswith("\n\n") and body.endswith("\n\n"), "Markdown needs empty lines around it"


@notebook
def test_markup_renders_everywhere(path):
    "Only what JupyterLab, Colab, GitHub and Quarto all render."
    only_quarto = r"^:::|\{#(eq|fig|sec|tbl)-|(?<![\w`/.])@(eq|fig|sec|tbl)-"
    assert not re.search(only_quarto, prose(path), re.M)
    for cell in markdown(path):
        around = without_blocks(cell).split("$$")
        assert len(around) % 2, f"a display is not closed:\n{cell}"
        for before, formula, after in zip(around[::2], around[1::2], around[2::2]):
            assert formula.count(r"\tag{") <= 1, f"two tags in one display: {formula}"
            alone = not before.rpartition("\n")[2].strip() and not after.partition("\n")[0].strip()
            assert alone, f"a display stands on lines of its own: {formula}"


# --- outputs

def pictures(cell:dict) -> list[str]:
    "What a cell drew, as it is stored."
    data = [(kind, "".join(v)) for o in cell.get("outputs", []) for kind, v in o.get("data", {}).items()]
    return [v for kind, v in data if kind.startswith("image/") or kind == "text/html" and len(v) > 1000]


def prints(cell:dict) -> bool:
    "Must this cell have left words on the page?"
    says = re.search(r"^(agree\w*|refuses|mark|print)\(", cell["source"], re.M)
    return bool(says) and not exported(cell) and "#| eval: false" not in cell["source"]


def draws(cell:dict) -> bool:
    "Must it have left a picture?"
    last = cell["source"].strip().rpartition("\n")[2]
    shows = "plt.show()" in cell["source"] or re.fullmatch(r"fig|viz\.(?!use_style)\w+\(.*\)", last)
    return bool(shows) and not exported(cell)


@notebook
def test_outputs_are_stored_and_clean(path):
    for cell in cells(path):
        if cell["cell_type"] != "code": continue
        source, outputs = cell["source"], cell["outputs"]
        assert cell["execution_count"] is None, "run nbdev-clean"
        assert not any("widget" in kind for out in outputs for kind in out.get("data", {})), "a dead widget"
        assert outputs or not prints(cell), f"no output is stored, run the notebook:\n{source}"
        assert pictures(cell) or not draws(cell), f"no picture is stored, run the notebook:\n{source}"
        assert all(len(p) > 1000 for p in pictures(cell)), f"an empty picture is stored:\n{source}"
        assert not any(o["output_type"] == "error" for o in outputs), f"an error is stored:\n{source}"
        complaints = "".join(t for o in outputs if o.get("name") == "stderr" for t in o["text"])
        assert not re.search("Warning|Traceback", complaints), f"a warning is stored:\n{complaints}"


@notebook
def test_size(path):
    assert path.stat().st_size < 400_000
    for s in code(path): assert len(s.splitlines()) <= 30, f"a cell of {len(s.splitlines())} lines:\n{s}"
    ids = [c["id"] for c in cells(path)]
    assert len(ids) == len(set(ids))
