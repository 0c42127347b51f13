"Every recipe at its tiny size, by the command that a person types: killed, stopped, in two processes."
import ast, json, os, random, signal, subprocess, sys, time, types
from pathlib import Path

import pytest, torch
import torch.distributed as dist
from course import PACKAGE, read
from PIL import Image
from torch.testing import assert_close

from fastdiff_edu.cli import main
from fastdiff_edu.data import digits
from fastdiff_edu.generate import load_model
from fastdiff_edu.recipes import RECIPES
from fastdiff_edu.rehearsal import rehearse
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import load_checkpoint, read_log

pytestmark = pytest.mark.usefixtures("in_a_folder")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SHORT = ("--size", "tiny", "--no-bar", "--sheet-every", "0")


def command(*args, processes:int=1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
              "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if processes > 1 else []
    return [sys.executable, *launch, "-m", "fastdiff_edu", "train", *args]


def trained(folder, *args, processes:int=1):
    done = subprocess.run(command(*args, processes=processes), cwd=folder, env=ENV, capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def weights(out, which:str="net") -> torch.Tensor:
    tensors = load_checkpoint(out).tensors(which)
    return torch.cat([tensors[k].flatten() for k in sorted(tensors)])


@pytest.mark.parametrize("name", RECIPES)
def test_tiny_takes_the_whole_path(name, tmp_path, capsys):
    tiny, base = RECIPES[name]().tiny(), getattr(RECIPES[name], "base", name)
    if base != name: assert main(["train", base, "--size", "tiny", "--sheet-every", "0"]) == 0
    assert main(["train", name, "--size", "tiny"]) == 0
    out = tmp_path/"runs"/f"{name}-tiny"
    assert str(out.relative_to(tmp_path)) in capsys.readouterr().out
    assert json.loads((out/"recipe.json").read_text())["recipe"] == name
    assert (out/"loss.png").stat().st_size > 1000
    for part in tiny.stages.values() if base != name else [tiny]:
        steps = load_checkpoint(part.folder).manifest["step"]
        assert steps == part.steps == read_log(part.folder)[-1]["step"]
        if name == "cifar10-features": return
        assert len(list((part.folder/"sheets").glob("*.png"))) == 2
        model = load_model(part.folder)
        assert getattr(model, "kind", None) == getattr(RECIPES[base](), "kind", None)
        assert model.net.config == tiny.net
    assert (out/"stages.png").is_file() == (base != name)
    assert (out/"panels.png").is_file() == (name == "celebahq-pd")


def test_kills_at_random_moments_leave_no_trace(tmp_path):
    args = ("digits", *SHORT, "--steps", "60", "--save-every", "3", "--log-every", "1")
    trained(tmp_path, *args, "--out", "whole")
    rng = random.Random(0)
    for _ in range(3):
        p = subprocess.Popen(command(*args, "--out", "killed"), cwd=tmp_path, env=ENV, stderr=subprocess.PIPE)
        while p.poll() is None and not (tmp_path/"killed/log.jsonl").exists(): time.sleep(0.05)
        time.sleep(rng.uniform(0., 1.))
        p.kill(), p.wait(), p.stderr.close()
    trained(tmp_path, *args, "--out", "killed")
    for which in ("net", "ema"): assert weights("whole", which).equal(weights("killed", which))
    losses = [[line["loss"] for line in read_log(out)] for out in ("whole", "killed")]
    assert losses[0] == losses[1] and len(losses[0]) == 60


def test_sigterm_saves_and_exits(tmp_path):
    never = "100000"
    args = ("digits", *SHORT, "--steps", never, "--save-every", never, "--log-every", "1", "--out", "run")
    p = subprocess.Popen(command(*args), cwd=tmp_path, env=ENV)
    while len(read_log("run")) < 5: time.sleep(0.05); assert p.poll() is None
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 128 + signal.SIGTERM
    assert load_checkpoint("run").manifest["step"] >= 5


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_are_one_in_two_parts(tmp_path):
    args = ("digits", *SHORT, "--steps", "12")
    trained(tmp_path, *args, "--parts", "2", "--out", "one")
    said = trained(tmp_path, *args, "--out", "two", processes=2)
    assert said.count("12 steps") == 1                      # one process speaks
    trained(tmp_path, "digits", *SHORT, "--steps", "6", "--out", "halves", processes=2)
    trained(tmp_path, *args, "--out", "halves", processes=2)
    for which in ("net", "ema"):
        assert_close(weights("one", which), weights("two", which), rtol=1e-3, atol=1e-5)
        assert weights("two", which).equal(weights("halves", which))


def test_dry_run_says_and_writes_nothing(tmp_path, capsys):
    assert main(["train", "cifar10-ddpm", *SHORT, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "24 steps of 8 rows" in said and "s a step (the mean of" in said and "2 checkpoints of" in said
    assert list(tmp_path.iterdir()) == []
    slow = rehearse(RECIPES["cifar10-ddpm"]().tiny(), seconds=1e-9)
    assert "estimated from a step on one row" in slow


def test_sheets_do_not_disturb_the_training(capsys):
    for every in ("0", "5"): assert main(["train", "digits", *SHORT[:-1], every, "--out", every]) == 0
    assert weights("0").equal(weights("5"))
    assert len(os.listdir("5/sheets")) == 5 and not os.path.exists("0/sheets")


def test_tensorboard_gets_the_log(monkeypatch, capsys):
    told = []

    class Writer:
        def __init__(self, folder, purge_step): told.append((str(folder), purge_step))
        def add_scalar(self, key, value, step): told.append((key, value, step))
        def close(self): told.append("closed")

    stand_in = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    assert main(["train", "digits", *SHORT, "--steps", "8", "--out", "run"]) == 0
    assert told[0] == ("run/tensorboard", 4) and told[-1] == "closed"
    log = {line["step"]: line for line in read_log("run")}
    scalars = [v for v in told[1:-1]]
    assert {key for key, _, _ in scalars} == {"loss", "lr", "grad_norm", "images_per_second"}
    assert all(log[step][key] == value for key, value, step in scalars) and {s for *_, s in scalars} == {4, 8}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)      # not installed
    assert main(["train", "digits", *SHORT, "--steps", "8", "--out", "other"]) == 0


@pytest.fixture
def own(tmp_path):
    "A folder of someone's own images, of different sizes."
    (tmp_path/"own").mkdir()
    for k, levels in enumerate(digits("test").x[:12, 0].numpy()):
        Image.fromarray(levels).resize((20 + k, 30)).save(tmp_path/"own"/f"{k}.png")
    return "own"


def test_anyones_own_images(own, capsys):
    assert main(["train", "cifar10-ddpm", *SHORT, "--steps", "4", "--data", own]) == 0
    data = load_checkpoint("runs/cifar10-ddpm-tiny").manifest["data"]
    assert (data["length"], data["name"], data["flip"]) == (12, "folder", True)
    capsys.readouterr()
    for recipe, words in (("cifar10-cond", "There are images without a label in 'own'"),
                          ("digits", "images in 'own' are (3, 8, 8), the network takes (1, 8, 8)")):
        assert main(["train", recipe, *SHORT, "--data", own]) == 2
        assert words in capsys.readouterr().err
    assert main(["train", "cifar10-ddpm", *SHORT, "--data", "nowhere"]) == 2
    assert "no folder 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize("args, words", [
    (("cifar-ddpm",), "Unknown recipe 'cifar-ddpm': did you mean 'cifar10-ddpm'?"),
    (("cifar10-ddpm", "--stpes", "3"), "Unknown flag '--stpes': did you mean '--steps'?"),
    (("cifar10-ddpm", "--net.widht", "3"), "Unknown flag '--net.widht': did you mean '--net.width'?"),
    (("cifar10-ddpm", "--batch", "0"), "Got batch = 0"),
    (("cifar10-ddpm", "--schedule", "cosine"), "Got 'cosine' as a schedule"),
    (("cifar10-ddpm", "--size", "small"), "--size"),
    (("--size", "tiny"), "The recipe comes first"),
    (("--bogus", "cifar10-ddpm"), "The recipe comes first"),
    (("cifar10-ddpm", "--net.mult", "0"), "start at 1"),
    (("cifar10-ddpm", "--T", "0"), "Got T = 0"),
    (("cifar10-ddpm", "--drop", "2"), "Got drop = 2"),
    (("cifar10-ddpm", "--sheet-every", "-1"), "Got sheet_every = -1"),
    (("cifar10-ddpm", "--data", ""), "Got no data"),
    (("cifar10-features", "--size", "tiny", "--parts", "2"), "in one process, in one part"),
])
def test_bad_arguments_are_one_sentence(args, words, tmp_path, capsys):
    assert main(["train", *args]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_refused_run_leaves_the_recipe_that_is_there(capsys):
    args = ("digits", *SHORT, "--steps", "3", "--out", "r")
    assert main(["train", *args]) == 0
    before = Path("r/recipe.json").read_text()
    assert main(["train", *args, "--lr", "0.5"]) == 2 and "another run" in capsys.readouterr().err
    assert Path("r/recipe.json").read_text() == before


def test_pixels_that_were_changed_are_not_trained_on(capsys):
    assert main(["train", "cifar10-ddpm", *SHORT, "--steps", "2"]) == 0
    with open("runs/cifar10-ddpm-tiny/data/train/images.u8", "r+b") as f: f.seek(1000), f.write(b"x")
    data = ("--data", "runs/cifar10-ddpm-tiny/data/train", "--out", "other")
    assert main(["train", "cifar10-ddpm", *SHORT, *data]) == 2
    assert "was changed" in capsys.readouterr().err


def test_flags_win_over_the_size_and_help_shows_what_holds(capsys):
    changes = ("--steps", "3", "--batch", "5", "--net.width", "8", "--out", "r")
    assert main(["train", "digits", *SHORT, *changes]) == 0
    manifest = load_checkpoint("r").manifest
    assert manifest["config"]["batch"] == 5 and manifest["net"]["config"]["width"] == 8
    with pytest.raises(SystemExit): main(["train", "cifar10-ddpm", "--size", "tiny", "--help"])
    assert "default: 24" in capsys.readouterr().out
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in RECIPES) and "113,673,219" in said


def test_every_value_of_a_recipe_says_where_it_is_from():
    source = read(PACKAGE/"recipes.py") + read(PACKAGE/"students.py")
    lines, found = source.splitlines(), 0
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.ClassDef): continue
        for field in node.body:
            if not isinstance(field, ast.AnnAssign) or field.target.id in ("name", "base"): continue
            comment = lines[field.end_lineno - 1].partition("#")[2]
            origin = any(word in comment for word in ("(", "as in", "no digit", "as there", "digits, or"))
            assert origin, f"{node.name}.{field.target.id} does not say where it is from"
            found += 1
    assert found > 30


def test_the_authors_values_of_ddgan():
    "Xiao et al. 2022, README and train_ddgan.py: batch, rates, Adam, R1, average, schedule, updates."
    names = "T batch lr_g lr_d beta_1 beta_2 anneal lr_end gamma lazy ema flip".split()
    values = lambda name: tuple(getattr(RECIPES[name](), k) for k in names)
    adam = (0.5, 0.9, True, 1e-5)
    assert values("cifar10-ddgan") == (4, 256, 1.6e-4, 1.25e-4, *adam, 0.02, 15, 0.9999, True)
    assert values("celebahq-ddgan") == (2, 32, 2e-4, 1e-4, *adam, 2.0, 10, 0.9999, True)
    assert RECIPES["cifar10-ddgan"]().steps == 1800 * 50_000 // 256
    assert RECIPES["celebahq-ddgan"]().steps == 800 * 27_000 // 32
    for name in ("cifar10-ddgan", "celebahq-ddgan"):
        assert RECIPES[name]().schedule == str(Schedule.vp(0.1, 20.0, 1e-3))
