"The course as the tests see it: its files, its notebooks, its numbered equations and exercises."
import ast, json, re, subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS, PACKAGE = ROOT/"nbs", ROOT/"fastdiff_edu"


def hidden(path:Path) -> bool: return any(part[0] in "._" for part in path.relative_to(ROOT).parts)
def read(path:Path) -> str: return (ROOT/path).read_text(encoding="utf-8")


CHAPTERS = sorted(NBS.glob("[0-9][0-9]_*.ipynb"))
NOTEBOOKS = sorted(p for p in NBS.rglob("*.ipynb") if not hidden(p))
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if not hidden(p))


@cache
def tree() -> list[Path]:
    "Every file that a clone would hold, relative to the root; without git, every file that is not hidden."
    ask = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    git = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True)
    names = filter(None, git.stdout.split("\0"))
    if git.returncode: names = [p.relative_to(ROOT) for p in ROOT.rglob("*") if not hidden(p)]
    return sorted(p for p in map(Path, names) if (ROOT/p).is_file())


@cache
def cells(path:Path) -> tuple[dict, ...]:
    "A notebook's cells, each source as one string."
    return tuple(c | {"source": "".join(c["source"])} for c in json.loads(read(path))["cells"])


def sources(path:Path, kind:str) -> list[str]:
    return [c["source"] for c in cells(path) if c["cell_type"] == kind]


def markdown(path:Path) -> list[str]: return sources(path, "markdown")
def code(path:Path) -> list[str]: return sources(path, "code")


def without_blocks(text:str) -> str:
    "Markdown without its code blocks."
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)


def prose(path:Path) -> str: return without_blocks("\n\n".join(markdown(path)))


def tags(path:Path) -> list[str]:
    "The numbers of a chapter's equations, in order."
    return re.findall(r"\\tag\{([^}]*)\}", prose(path))


CHECK = re.compile(r"(?:#\|.*\n)*# check \((.*?)\)")


def checks(path:Path) -> list[str]:
    "The numbers that a chapter's check cells name, in order."
    return [number.strip() for s in code(path) if (m := CHECK.match(s)) for number in m[1].split(",")]


def exported(cell:dict) -> bool:
    "Does this cell go into the package?"
    return cell["cell_type"] == "code" and bool(re.match(r"(?:#\|.*\n)*#\|\s*export[si]?\b", cell["source"]))


@cache
def kept_by() -> dict[str, list[str]]:
    "Number of an equation -> the functions and classes of the package whose docstring says 'Eq. NN.k'."
    found = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(read(path))):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)): continue
            for number in re.findall(r"\bEq\. (\d\d\.\d+)", ast.get_docstring(node) or ""):
                found.setdefault(number, []).append(f"{path.stem}.{node.name}")
    return found


def exercises(path:Path) -> list[str]:
    "The numbers of a chapter's blank cells, in order."
    return [m[1] for s in code(path) if (m := re.match(r"# exercise (\d\d\.\d+)\s*$", s, re.M))]


FOLDED = re.compile(r"<details>\s*<summary>Solution (\d\d\.\d+)</summary>\n\n(.*?)\n\s*</details>", re.S)


def solutions(path:Path) -> dict[str, str]:
    "Number of an exercise -> the Python of its folded solution."
    found = {}
    for number, text in FOLDED.findall("\n\n".join(markdown(path))):
        blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
        assert len(blocks) == 1, f"Solution {number} holds {len(blocks)} Python blocks, not one"
        assert number not in found, f"two solutions {number}"
        found[number] = blocks[0]
    return found
