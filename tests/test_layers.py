"Modules import downward only: who reads the package from the top of this table never meets an unknown name."
import ast, subprocess, sys

import pytest
from course import MODULES, PACKAGE, ROOT, read

LAYERS = [  # within a layer, what stands left may be imported by what stands right of it
    ["core", "check"],
    ["schedule", "data", "captions", "sources", "packed", "nets", "checkpoint", "ranks", "run", "train",
     "sliders", "viz"],
    ["forward", "metrics", "features", "classifier"],
    ["denoiser"],
    ["oracle", "sample", "solvers", "guidance"],
    ["hybrid", "ddgan", "digit_gan", "knowledge", "distill", "digit_students", "variants"],
    ["guided_distill", "edit", "digit_guided"],
    ["layout", "hub", "models", "samplers", "generate", "retouch", "rows", "experiment", "chain", "guided",
     "upward", "students", "rehearsal", "recipes", "evaluate", "publish"],
    ["entrants", "race", "timing", "bench"],
    ["cli"],
]
NETS = ["embeddings", "mlp", "unet", "encoder", "fir", "ncsnpp", "discriminator"]
PLACE = {name: (layer, column) for layer, names in enumerate(LAYERS) for column, name in enumerate(names)}
HEAVY = {"matplotlib", "sklearn", "datasets", "diffusers", "huggingface_hub", "tyro", "torchvision",
         "ipywidgets", "sympy", "nbdev"}


def dotted(path) -> str:
    "nets/mlp.py -> nets.mlp"
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def place(module:str) -> tuple:
    "Where a module stands, as something that can be compared."
    top, _, rest = module.partition(".")
    assert top in PLACE and (not rest or rest in NETS), f"{module} has no place in the table"
    return (*PLACE[top], NETS.index(rest) if rest else -1)


def exists(module:str) -> bool: return (ROOT/(module.replace(".", "/") + ".py")).exists()


def imported(path) -> set[str]:
    "The modules of the package that the file at `path` imports, anywhere in it."
    here, found = dotted(path).split("."), set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import): found |= {a.name for a in node.names}
        if not isinstance(node, ast.ImportFrom): continue
        up = ["fastdiff_edu", *here[:len(here) - node.level]] if node.level else []
        base = ".".join([*up, *filter(None, [node.module])])
        inside = {f"{base}.{a.name}" for a in node.names}  # `from fastdiff_edu import viz` names a module
        found |= {name for name in inside if exists(name)} or {base}
    return {name.removeprefix("fastdiff_edu.") for name in found if name.startswith("fastdiff_edu.")}


def outside(path) -> set[str]:
    "The top-level names of everything else that it imports."
    names = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import): names |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and not node.level: names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=dotted)
def test_module_has_a_place_and_imports_downward(path):
    module = dotted(path)
    here = place(module)
    for other in imported(path): assert place(other) < here, f"{module} imports {other}: not downward"


def test_only_race_and_cli_import_viz():
    users = {dotted(p) for p in MODULES if "viz" in imported(p)}
    assert users <= {"race", "cli"}


def test_nothing_uses_torchvision():
    for path in [*MODULES, *ROOT.glob("tests/*.py")]: assert "torchvision" not in outside(path), path
    for name in ("settings.ini", "constraints.txt"): assert "torchvision" not in read(name)


def loaded(program:str) -> set[str]:
    "The top-level modules that a fresh process has loaded at the end of `program`."
    program += "\nimport sys\nprint(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


LIGHT = [m for m in map(dotted, MODULES) if m not in ("viz", "race", "bench", "cli")]


@pytest.mark.parametrize("modules", [["schedule"], LIGHT], ids=["schedule", "all that draws nothing"])
def test_importing_is_light(modules):
    brought = loaded("import torch, fastprogress")  # what the requirements load by themselves
    assert not (HEAVY & loaded(f"for m in {modules!r}: __import__('fastdiff_edu.' + m)")) - brought
