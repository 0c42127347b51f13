"What stands around the code is true: metadata, front page, tree, address, site, sizes."
import ast, json, os, re, shutil, statistics, subprocess, sys, tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml
from course import CHAPTERS, MODULES, NBS, NOTEBOOKS, PACKAGE, ROOT, cells, exported, read, tree

import fastdiff_edu

SETTINGS = ConfigParser(delimiters=["="], interpolation=None)
SETTINGS.read(ROOT/"settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
PYPROJECT = tomllib.loads(read("pyproject.toml"))
URLS = {k: v.rstrip("/") for k, v in PYPROJECT["project"]["urls"].items()}
README = read("README.md")


def python(*args, cwd=ROOT, **env) -> subprocess.CompletedProcess:
    "Run this Python with these arguments."
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True)


def copied(to:Path) -> Path:
    "A copy of the tree in a new folder."
    for name in tree():
        (to/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT/name, to/name, follow_symlinks=False)
    return to


def normal(name:str) -> str: return re.sub(r"[-_.]+", "-", name).lower()


# --- metadata

def test_version_has_one_home():
    version = SETTINGS["version"]
    assert fastdiff_edu.__version__ == version, "run python .ci/address.py"
    assert yaml.safe_load(read("CITATION.cff"))["version"] == version, "run python .ci/address.py"
    assert re.search(r"^## (\S+)", read("CHANGELOG.md"), re.M)[1] == version
    assert "version" not in PYPROJECT["project"] and "version" in PYPROJECT["project"]["dynamic"]


def test_setup_reads_settings():
    said = python("setup.py", "-q", "--name", "--version", "--license", "--author").stdout.splitlines()
    assert said == ["fastdiff_edu", SETTINGS["version"], SETTINGS["license"], SETTINGS["author"]]


def requirements(*keys) -> dict[str, str]:
    "Package -> what is asked of its version."
    lines = [line.strip() for key in keys for line in SETTINGS[key].splitlines() if line.strip()]
    return {normal(m[1]): m[2] for line in lines if (m := re.fullmatch(r"([\w.-]+)(.*)", line))}


def test_constraints_pin_what_is_installed():
    "Exactly: no range, no index, no local version."
    lines = [line for line in read("constraints.txt").splitlines() if line and line[0] != "#"]
    exact = [re.fullmatch(r"([\w.-]+)==([\w.]+)", line) for line in lines]
    assert all(exact), lines
    pins = {normal(m[1]): m[2] for m in exact}
    asked = requirements("requirements", "course_requirements", "dev_requirements")
    assert set(asked) <= set(pins), sorted(set(asked) - set(pins))
    assert pins["torch"] == "2.13.0" and pins["fastprogress"] == "1.0.5"


# --- README

def test_readme_is_fresh(tmp_path):
    done = python("-m", "nbconvert", "--config", ".ci/readme.py", "--FilesWriter.build_directory", tmp_path)
    assert done.returncode == 0, done.stderr
    assert read(tmp_path/"README.md") == README, "run jupyter nbconvert --config .ci/readme.py"


def test_readme_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)\s]+)\)", README): assert (ROOT/target).exists(), target


def test_readme_names_every_chapter():
    rows = re.findall(r"^\| (\d\d) \| \[[^\]]+\]\(nbs/([^)]+)\)", README, re.M)
    assert rows == [(p.name[:2], p.name) for p in CHAPTERS]


def test_readme_tree_is_true():
    shown, above = {}, []
    for line in re.search(r"```text\n(.*?)```", README, re.S)[1].splitlines():
        name, words = re.fullmatch(r"(\s*\S+)\s{2,}(\S.*)", line).groups()
        depth = (len(name) - len(name.lstrip())) // 2
        above = [*above[:depth], name.strip()]
        shown["".join(above)] = words
    for name in shown: assert (ROOT/name).exists(), f"the README's tree shows {name}, which does not exist"
    folders = {f"{p.parts[0]}/" for p in tree() if len(p.parts) > 1}
    modules = {p.relative_to(ROOT).as_posix() for p in MODULES if p.parent == PACKAGE}
    missing = (folders | modules) - set(shown)
    assert not missing, f"the README's tree leaves out {sorted(missing)}"
    for path in MODULES:
        if path.parent == PACKAGE: continue
        assert path.name in shown[f"fastdiff_edu/{path.parent.name}/"], f"the tree does not name {path.name}"
    for name in re.findall(r"[\w.]+\.py", shown[".ci/"]): assert (ROOT/".ci"/name).exists()


def test_readme_commands():
    "Each of the two starts from nothing and is one line; the second runs both kinds of tests."
    first, second = re.findall(r"```sh\n(python3 -m venv [^\n]*)\n```", README)
    start = "python3 -m venv .venv && . .venv/bin/activate && pip install -c constraints.txt "
    assert first.startswith(start) and second.startswith(start)
    assert first.endswith("fastdiff race") and "nbdev-test" in second and "pytest" in second
    assert (ROOT/".ci/run").stat().st_mode & 0o100


# --- the address

def test_address_is_fresh():
    done = python(".ci/address.py", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_address_moves_everywhere(tmp_path):
    "Change it in its home and run the script: only what other commands make has the old one; outputs stay."
    copied(tmp_path)
    old_slug, old_docs = URLS["Repository"].split("/", 3)[3], URLS["Documentation"]
    text = read("pyproject.toml")
    text = text.replace(URLS["Repository"], "https://github.com/someone/else")
    text = text.replace(old_docs, "https://someone.github.io/else")
    (tmp_path/"pyproject.toml").write_text(text, encoding="utf-8")
    assert python(".ci/address.py", "--check", cwd=tmp_path).returncode == 1
    assert python(".ci/address.py", cwd=tmp_path).returncode == 0
    assert python(".ci/address.py", "--check", cwd=tmp_path).returncode == 0
    made = ("fastdiff_edu/", "README.md", "tests/", ".ci/address.py")
    for name in tree():
        if name.as_posix().startswith(made) or name.suffix in (".png", ".npz", ".pt"): continue
        text = read(tmp_path/name)
        assert old_slug not in text and old_docs not in text, f"{name} has the old address"
    for path in NOTEBOOKS:
        moved = json.loads(read(tmp_path/path.relative_to(ROOT)))["cells"]
        for a, b in zip(cells(path), moved, strict=True):
            assert a["id"] == b["id"] and a.get("outputs") == b.get("outputs")


def test_no_registry_and_no_machine_is_named():
    hosts = ["py" + "pi.org", "python" + "hosted", "download.py" + "torch", "registry.npm" + "js"]
    machine = re.compile(r"(?<![\w.:/])/(?:work|root|home|opt|Users|tmp)/\w")
    for name in tree():
        if name.suffix in (".png", ".npz", ".pt", ".json"): continue
        text = read(name)
        for host in hosts: assert host not in text, f"{name} names {host}"
        found = machine.search(text)
        assert not found, f"{name} names a path of some machine: {text[found.start():found.end() + 30]!r}"


# --- the docs site

def listed(item) -> list[str]:
    "Every page under a part of the sidebar: a page, a pattern, a link, a section, or a list of them."
    if isinstance(item, list): return [page for part in item for page in listed(part)]
    if isinstance(item, dict): return listed(item.get("contents") or item["href"])
    return [p.relative_to(NBS).as_posix() for p in NBS.glob(item)] if "*" in item else [item]


def test_site_lists_every_notebook():
    site = yaml.safe_load(read("_quarto.yml"))
    pages = listed(site["website"]["sidebar"]["contents"])
    assert sorted(pages) == sorted(p.relative_to(NBS).as_posix() for p in NOTEBOOKS), "each notebook once"
    needed = [site["format"]["html"]["css"], *site["metadata-files"], site["website"]["navbar"]["left"]]
    for name in listed(needed): assert (NBS/name).exists(), name


@pytest.mark.skipif(os.name == "nt", reason="Windows checks links out as text")
def test_site_has_one_configuration():
    link = NBS/"_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"


def test_site_has_the_address():
    made = yaml.safe_load(read("nbs/nbdev.yml"))
    assert made["website"]["repo-url"] == URLS["Repository"]
    assert made["website"]["site-url"] == URLS["Documentation"]
    assert made["project"]["output-dir"] == "_docs"


def test_workflows_parse():
    for path in (ROOT/".github/workflows").glob("*.yml"):
        flow = yaml.safe_load(read(path))
        assert flow["jobs"] and True in flow, path  # YAML reads the key `on` as true
    assert "bash .ci/run" in read(".github/workflows/test.yml")


def test_site_can_be_built(tmp_path):
    "nbdev's half of `nbdev-docs`: every page gets through, and keeps its title, badge and shown code."
    copied(tmp_path)
    program = "from nbdev.serve import proc_nbs; print(proc_nbs('nbs', n_workers=0, force=True))"
    done = python("-c", program, cwd=tmp_path, PYTHONPATH=str(tmp_path), IN_TEST="1")
    assert done.returncode == 0, done.stderr[-3000:]
    for path in NOTEBOOKS:
        page = json.loads(read(tmp_path/"_proc"/path.relative_to(NBS)))["cells"]
        page = "\n".join("".join(c["source"]) for c in page)
        assert re.search(r"^title: \S", page, re.M) and re.search(r"^description: \S", page, re.M)
        if path in CHAPTERS: assert f"/nbs/{path.name})" in page, "the Colab badge is lost"
        for cell in cells(path):
            if path in CHAPTERS and exported(cell) and cell["source"].startswith("#| exports"):
                assert cell["source"].splitlines()[-1] in page, f"the site lacks this code:\n{cell['source']}"


# --- sizes

def functions(path:Path) -> list[tuple[int, str, bool]]:
    "Of every function in a module: its lines, its name, and whether it builds a network."
    nodes = [n for n in ast.walk(ast.parse(read(path))) if isinstance(n, ast.FunctionDef)]
    builds = lambda n: n.name == "__init__" and path.parent.name == "nets"
    return [(n.end_lineno - n.lineno + 1, f"{path.stem}.{n.name}", builds(n)) for n in nodes]


def test_functions_are_small():
    found = [f for path in MODULES for f in functions(path)]
    lengths = sorted(lines for lines, *_ in found)
    assert not [f for f in found if f[0] > 40 and not f[2]]
    assert statistics.median(lengths) <= 8
    assert lengths[int(0.9 * len(lengths))] <= 20


def own_lines(path:Path) -> dict[int, str]:
    "The lines of a module, without what nbdev puts on top and between the cells."
    text, from_nbdev = read(path), ("# %%", "# AUTOGENERATED")
    made = [n for n in ast.parse(text).body[:2] if isinstance(n, ast.Expr) or "__all__" in ast.unparse(n)]
    skip = {i for n in made for i in range(n.lineno, n.end_lineno + 1)} if path in MODULES else set()
    lines = enumerate(text.splitlines(), 1)
    return {i: line for i, line in lines if i not in skip and not line.startswith(from_nbdev)}


SOURCES = [*MODULES, *sorted(ROOT.glob("tests/*.py")), *sorted(ROOT.glob(".ci/*.py")), ROOT/"setup.py"]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.stem)
def test_lines_are_short(path):
    long = [f"{i} has {len(line)}" for i, line in own_lines(path).items() if len(line) > 110]
    assert not long, f"{path.name}, at most 110 columns: {long}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_modules_are_short(path):
    most = 320 if path.stem == "viz" else 260   # viz is a catalogue of drawings
    assert sum(map(bool, map(str.strip, own_lines(path).values()))) <= most, "a module has about 200 lines"
