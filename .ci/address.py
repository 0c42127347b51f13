#!/usr/bin/env python3
"""Write the repository's address and the version wherever they appear, each from its one home.

    python .ci/address.py           write
    python .ci/address.py --check   write nothing, name the stale files, exit 1 when there are any

The address has its home in pyproject.toml ([project.urls]), the version in settings.ini. Notebooks are
changed as text: ids and outputs stay. Exported modules have the address from `nbdev-export`: run it next.
"""
import argparse, re, sys, tomllib
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
FILES = ["*.md", "*.cff", "*.yml", ".github/**/*.*", "nbs/*.yml", "nbs/**/*.ipynb", "results/*.md",
         "fastdiff_edu/__init__.py"]
MADE = ["README.md"]  # from nbs/index.ipynb


def read(name:str|Path) -> str:
    "A file's text with its line ends as they are."
    return (ROOT/name).read_bytes().decode()


def homes() -> SimpleNamespace:
    "The address in its parts, and the version."
    project = tomllib.loads(read("pyproject.toml"))
    repo, docs = (project["project"]["urls"][key].rstrip("/") for key in ("Repository", "Documentation"))
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read_string(read("settings.ini"))
    return SimpleNamespace(repo=repo, slug="/".join(repo.split("/")[-2:]), docs=docs,
                           branch=project["tool"]["nbdev"]["branch"], version=settings["DEFAULT"]["version"])


def last_written() -> SimpleNamespace:
    "The address that CITATION.cff has, and so the other files, unless they were edited since."
    field = lambda key: re.search(rf'^{key}: "(.+?)/?"$', read("CITATION.cff"), re.M)[1]
    return SimpleNamespace(repo=field("repository-code"), docs=field("url"))


def rules(path:Path, home:SimpleNamespace, last:SimpleNamespace) -> list[tuple[str, str]]:
    "Patterns for the file at `path`, each with what stands there when the file is fresh."
    end, name = r"(?![\w-])", path.as_posix()
    colab = f"{home.slug}/blob/{home.branch}/{name}"
    found = [
        (r"(?<=colab\.research\.google\.com/github/)[\w./-]+?\.ipynb", colab),
        (r"(?<=git\+)https://[\w./-]+", home.repo),
        (rf"https://github\.com/[\w-]+/fastdiff_edu{end}|{re.escape(last.repo)}{end}", home.repo),
        (rf"https://[\w-]+\.github\.io/fastdiff_edu{end}|{re.escape(last.docs)}{end}", home.docs),
    ]
    if name == "CITATION.cff": found.append((r"(?m)(?<=^version: ).*$", home.version))
    if name == "fastdiff_edu/__init__.py": found.append((r'(?<=__version__ = ").*(?=")', home.version))
    return found


def fresh(path:Path, home:SimpleNamespace, last:SimpleNamespace) -> str:
    "The file's text as it should be."
    text = read(path)
    for pattern, value in rules(path, home, last): text = re.sub(pattern, lambda _: value, text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the address and the version wherever they appear.")
    parser.add_argument("--check", action="store_true", help="name stale files instead of writing them")
    check, home, last = parser.parse_args().check, homes(), last_written()
    found = {p for pattern in FILES for p in ROOT.glob(pattern) if p.is_file() and not p.is_symlink()}
    found = {p for p in found if p.name not in MADE and ".ipynb_checkpoints" not in p.parts}
    paths = sorted(p.relative_to(ROOT) for p in found)
    stale = {path: text for path in paths if (text := fresh(path, home, last)) != read(path)}
    for path, text in stale.items():
        print("stale:" if check else "written:", path)
        if not check: (ROOT/path).write_bytes(text.encode())
    return int(check and bool(stale))


if __name__ == "__main__": sys.exit(main())
