"Chains of students stop, go on, share a batch and are refused like any training; from commands to numbers."
import json, math, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest, torch
import torch.distributed as dist
from tiny import TINY, tiny_run
from torch.testing import assert_close

from fastdiff_edu.cli import main
from fastdiff_edu.core import seeded
from fastdiff_edu.denoiser import Denoiser, diffusion_loss
from fastdiff_edu.distill import at_rest, halving_loss
from fastdiff_edu.generate import SampleConfig, generate
from fastdiff_edu.models import load_model, open_model
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.recipes import RECIPES
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.students import chain_for
from fastdiff_edu.train import TrainConfig, fit, load_checkpoint, read_log

pytestmark = pytest.mark.usefixtures("in_a_folder")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
FEW = ("--from", "8", "--to", "1", "--batch", "8", "--steps", "12", "--late-steps", "16", "--lr", "1e-3",
       "--log-every", "1", "--save-every", "5", "--sheet-every", "0", "--no-bar")


@pytest.fixture
def teacher(in_a_folder) -> str: return tiny_run("teacher")


def command(*args, processes:int=1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
              "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if processes > 1 else []
    return [sys.executable, *launch, "-m", "fastdiff_edu", "distill", "teacher", *args]


def distilled(*args, processes:int=1) -> str:
    quiet = dict(env=ENV, capture_output=True, text=True, timeout=240)
    done = subprocess.run(command(*args, processes=processes), **quiet)
    assert done.returncode == 0, done.stderr
    return done.stdout


def state(folder) -> torch.Tensor:
    "Weights, average and memory of a student, as one vector."
    found = [load_checkpoint(folder).tensors(which) for which in ("net", "ema", "optimizer")]
    return torch.cat([tensors[k].flatten() for tensors in found for k in sorted(tensors)])


def log(folder) -> list[dict]:
    "The log without its timings."
    timings = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timings} for line in read_log(folder)]


def same(a, b, students=(4, 2, 1)):
    for n in students:
        one, other = Path(a)/f"student-{n}", Path(b)/f"student-{n}"
        assert state(one).equal(state(other)), f"student of {n}"
        assert log(one) == log(other) and len(log(one)) == load_checkpoint(one).manifest["step"]


def times(folder) -> dict: return {p: p.stat().st_mtime_ns for p in Path(folder).rglob("*.safetensors")}


# --- from a command to numbers

def test_from_a_base_to_numbers(tmp_path, capsys):
    "By the commands that a person types: a base, its chain, samples of a student, numbers."
    for name in ("digits", "digits-pd"): assert main(["train", name, "--size", "tiny"]) == 0
    chain = tmp_path/"runs/digits-pd-tiny"
    names = {"student-4", "student-2", "student-1", "recipe.json", "chain.json", "stages.png", "loss.png"}
    assert {p.name for p in chain.iterdir()} == names
    assert main(["sample", str(chain/"student-2"), "--n", "20", "--labels", "3", "7", "--out", "few"]) == 0
    made = json.loads((tmp_path/"few/samples.json").read_text())
    assert (made["method"], made["steps"], made["evaluations"], made["labels"]) == ("ddim", 2, 2, [3, 7])
    assert made["loss"]["teacher"]["sha256"] == open_model(chain/"student-4").weights["sha256"]
    small = ("--n", "60", "--kid-size", "20", "--kid-subsets", "5", "--splits", "2", "--out", "numbers")
    assert main(["evaluate", str(chain/"student-4"), *small]) == 0
    fid = json.loads((tmp_path/"numbers/evaluation.json").read_text())["numbers"]["fid"]
    assert fid["protocol"]["made"]["steps"] == 4 and fid["value"] > fid["real"]
    assert main(["sample", str(chain/"student-4"), "--n", "4", "--steps", "2", "--out", "every-second"]) == 0
    capsys.readouterr()
    one = str(chain/"student-4")
    for args, words in ((("evaluate", one, "--metrics", "bits", "--out", "refused"), "leave 'bits' out"),
                        (("sample", one, "--steps", "3", "--out", "refused"), "for a student of 4"),
                        (("sample", one, "--steps", "8", "--out", "refused"), "for a student of 4"),
                        (("sample", one, "--method", "ddpm", "--out", "refused"), "Got 'ddpm'"),
                        (("sample", one, "--eta", "1", "--out", "refused"), "eta = 1"),
                        (("sample", one, "--spacing", "edm", "--out", "refused"), "spacing 'edm'"),
                        (("sample", str(chain), "--out", "refused"), "holds a chain of students"),
                        (("export", str(chain), "refused"), "holds a chain of students")):
        assert main([*args]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and not (tmp_path/"refused").exists()


def test_every_student_names_its_teacher(teacher):
    assert main(["distill", teacher, *FEW, "--out", "chain"]) == 0
    told, before = json.loads(Path("chain/chain.json").read_text()), open_model(teacher).weights["sha256"]
    assert told["teacher"]["sha256"] == before and told["teacher"]["steps"] == 8
    for n, link in zip((4, 2, 1), told["students"], strict=True):
        known = load_checkpoint(f"chain/student-{n}").manifest
        loss, after = known["loss"], known["files"]["ema.safetensors"]["sha256"]
        assert loss["steps"] == n and loss["teacher"]["steps"] == 2*n and loss["teacher"]["sha256"] == before
        assert (link["steps"], link["sha256"], link["teacher"]) == (n, after, before)
        assert known["files"]["net.safetensors"]["sha256"] == after, "no average: the last weights"
        assert known["net"] == load_checkpoint(teacher).manifest["net"]
        assert (known["config"]["steps"], known["step"]) == ((16, 16) if n <= 2 else (12, 12))
        before = after


def test_stages_can_be_laid_side_by_side(teacher):
    "The sheets of all students start from the same noise."
    seen = {}
    chain = replace(chain_for(teacher).tiny(), start=4, bar=False, out=Path("chain"))
    student, first = chain.ready((UNet(chain.net),))
    for stage in chain.stages.values(): seen[stage.end] = stage.samples(first, 9)
    assert seen[2].shape == (9, 1, 8, 8) and not seen[2].equal(seen[1])
    assert chain.samples(first, 9).equal(seen[1]), "a chain's samples are its last student's"
    again = replace(chain, end=2).stages[2].samples(first, 9)
    assert again.equal(seen[2]), "whatever the chain it stands in"


def test_a_student_begins_as_its_teacher(teacher):
    "Its first checkpoint holds the average that taught it; with --raw, the last weights."
    for flag, which in ((), "ema"), (("--raw",), "net"):
        assert main(["distill", teacher, *FEW, "--to", "4", "--save-every", "50", *flag, "--out", which]) == 0
        begins = load_checkpoint(f"{which}/student-4/step_00000000").tensors("net")
        taught = load_checkpoint(teacher).tensors(which)
        assert begins.keys() == taught.keys() and all(begins[k].equal(taught[k]) for k in taught)


# --- stop and go on

@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_signals_inside_the_second_stage_leave_no_trace(teacher):
    args = (*FEW, "--steps", "20", "--late-steps", "150", "--save-every", "20")
    distilled(*args, "--out", "whole")
    for sign, least in ((signal.SIGTERM, 15), (signal.SIGKILL, 70)):
        p = subprocess.Popen(command(*args, "--out", "stopped"), env=ENV, stderr=subprocess.DEVNULL)
        while len(read_log("stopped/student-2")) < least and p.poll() is None: time.sleep(0.01)
        p.send_signal(sign)
        code, step = p.wait(60), load_checkpoint("stopped/student-2").manifest["step"]
        assert code == (128 + sign if sign == signal.SIGTERM else -sign) and step < 150
        assert sign == signal.SIGKILL or step >= least, "SIGTERM saves where it is"
        assert not Path("stopped/student-1").exists() and not Path("stopped/chain.json").exists()
    distilled(*args, "--out", "stopped")
    same("stopped", "whole")
    assert Path("stopped/chain.json").read_bytes() == Path("whole/chain.json").read_bytes()


def test_a_finished_chain_does_nothing_and_a_longer_one_goes_on(teacher, capsys):
    assert main(["distill", teacher, *FEW, "--out", "whole"]) == 0
    assert main(["distill", teacher, *FEW, "--to", "4", "--out", "parts"]) == 0
    first, told = times("parts"), Path("parts/chain.json").read_bytes()
    assert main(["distill", teacher, *FEW, "--to", "4", "--out", "parts"]) == 0
    assert times("parts") == first and Path("parts/chain.json").read_bytes() == told
    for end in ("2", "1"): assert main(["distill", teacher, *FEW, "--to", end, "--out", "parts"]) == 0
    assert first.items() <= times("parts").items(), "students that were there are as they were"
    same("parts", "whole")
    assert Path("parts/chain.json").read_bytes() == Path("whole/chain.json").read_bytes()


def test_another_teacher_or_other_settings_are_another_chain(teacher, capsys):
    assert main(["distill", teacher, *FEW, "--to", "4", "--out", "chain"]) == 0
    before = Path("chain/recipe.json").read_bytes(), times("chain")
    tiny_run("other", steps=13)
    for args, words in ((("other", *FEW), "loss.teacher.sha256 is"),
                        ((teacher, *FEW, "--raw"), "loss.teacher.sha256 is"),
                        ((teacher, *FEW, "--from", "16", "--to", "8"), "holds a chain from 8 steps, not"),
                        ((teacher, *FEW, "--steps", "20"), "a falling rate depends on where it ends"),
                        ((teacher, *FEW, "--weight", "x0"), "loss.weight is snr_trunc there and x0 here"),
                        ((teacher, *FEW, "--kind", "x0"), "loss.kind is v there and x0 here")):
        assert main(["distill", *args, "--out", "chain"]) == 2
        assert words in capsys.readouterr().err
        assert before == (Path("chain/recipe.json").read_bytes(), times("chain"))
    assert main(["distill", teacher, *FEW, "--out", teacher]) == 2
    assert f"'{teacher}' holds a training: give the chain another --out" in capsys.readouterr().err


# --- several processes

@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_are_one_in_two_parts(teacher):
    args = (*FEW, "--from", "4", "--steps", "6", "--late-steps", "6")
    distilled(*args, "--parts", "2", "--out", "one")
    assert distilled(*args, "--out", "two", processes=2).count("12 steps") == 1     # one process speaks
    for n in (2, 1):
        one, two = f"one/student-{n}", f"two/student-{n}"
        assert_close(state(two), state(one), rtol=1e-3, atol=1e-5)
        for a, b in zip(log(one), log(two), strict=True): assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


# --- teachers of all kinds

def test_a_folder_of_diffusers_teaches():
    "The same network, published: the same student but for the rotation of its clock."
    linear = ("train", "digits", "--size", "tiny", "--sheet-every", "0", "--schedule", "Schedule.linear()")
    assert main([*linear]) == 0 and main(["export", "runs/digits-tiny", "published"]) == 0
    for source, out in (("runs/digits-tiny", "ours"), ("published", "theirs")):
        assert main(["distill", source, *FEW, "--to", "2", "--drop", "0", "--out", out]) == 0
    ours, theirs = load_model("ours/student-2"), load_model("theirs/student-2")
    x, y = torch.randn(4, 1, 8, 8, generator=seeded(0, "x")), torch.tensor([0, 3, 5, 9])
    assert ours.kind == theirs.kind == "v"
    assert_close(ours(x, 1., y=y).x0, theirs(x, 1., y=y).x0, rtol=0.05, atol=0.05)
    told = json.loads(Path("theirs/chain.json").read_text())["teacher"]
    assert told["file"].endswith(".safetensors") and told["given"] == "published"
    assert told["named"] == json.loads(Path("theirs/chain.json").read_text())["students"][0]["teacher"]


def test_a_schedule_without_a_name_is_refused_at_the_door(capsys):
    "A published cosine comes back as a table of betas."
    assert main(["train", "digits", "--size", "tiny", "--steps", "2", "--sheet-every", "0"]) == 0
    assert main(["export", "runs/digits-tiny", "published"]) == 0
    assert main(["distill", "published", *FEW, "--out", "refused"]) == 2
    assert "a table of betas, which no manifest" in capsys.readouterr().err and not Path("refused").exists()


def test_learned_variances_and_eps():
    "A teacher with both gets students that say v, and carry the variances along untrained."
    assert main(["train", "cifar10-iddpm", "--size", "tiny", "--steps", "4", "--sheet-every", "0"]) == 0
    assert main(["distill", "runs/cifar10-iddpm-tiny", *FEW, "--to", "4", "--data", "digits"]) == 0
    found = open_model("runs/distill-cifar10-iddpm-tiny/student-4")
    assert (found.model.kind, found.model.learned_var, found.loss["steps"]) == ("v", True, 4)
    assert found.model.net.config.dropout == 0 and found.model.net.config.out_ch == 6
    x, made = generate(SampleConfig("runs/distill-cifar10-iddpm-tiny/student-4", n=2), bar=False)
    assert x.isfinite().all() and (made["method"], made["evaluations"]) == ("ddim", 4)


def test_a_teacher_drops_nothing():
    "A network with dropout gives the same target twice, and the student that its command makes has none."
    config = UNetConfig(8, 1, width=8, mult=(1, 2), blocks=1, attn=(), dropout=0.5)
    torch.manual_seed(0)
    net, student = UNet(config), UNet(replace(config, dropout=0.))
    for p in net.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.2)
    student.load_state_dict(net.state_dict())
    teacher, x = Denoiser(net.train(), Schedule.cosine(), "v"), torch.rand(8, 1, 8, 8)*2 - 1
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)       # of dropout's own numbers
        losses.append(halving_loss(at_rest(teacher), 4, "v")(student, x, seeded(0, "loss")).item())
    assert losses[0] == losses[1] > 0
    names = "cifar10-pd-base", "cifar10-pd"
    assert [RECIPES[name]().net.dropout for name in names] == [0.2, 0.]
    for name in names: assert main(["train", name, "--size", "tiny", "--sheet-every", "0"]) == 0
    dropouts = [load_checkpoint(f"runs/{place}").manifest["net"]["config"]["dropout"]
                for place in ("cifar10-pd-base-tiny", "cifar10-pd-tiny/student-4")]
    assert dropouts == [0.2, 0.]


def test_a_student_teaches_on(teacher):
    assert main(["distill", teacher, *FEW, "--to", "4", "--out", "first"]) == 0
    assert main(["distill", "first/student-4", *FEW[2:], "--out", "second"]) == 0      # from 4 by itself
    told = json.loads(Path("second/chain.json").read_text())
    assert [s["steps"] for s in told["students"]] == [2, 1]
    assert told["teacher"]["sha256"] == open_model("first/student-4").weights["sha256"]


def test_published_students_keep_their_steps(capsys):
    assert main(["train", "digits", "--size", "tiny", "--steps", "4", "--sheet-every", "0"]) == 0
    assert main(["distill", "runs/digits-tiny", *FEW, "--to", "4", "--out", "chain"]) == 0
    assert main(["export", "chain/student-4", "published"]) == 0
    card = Path("published/README.md").read_text()
    assert "num_inference_steps=4" in card and "DDPMPipeline" not in card
    ours, theirs = (generate(SampleConfig(path, n=3), bar=False) for path in ("chain/student-4", "published"))
    assert theirs[1]["evaluations"] == theirs[1]["steps"] == 4
    assert_close(ours[0], theirs[0], rtol=1e-3, atol=1e-3)
    assert main(["distill", "runs/digits-tiny", *FEW, "--from", "32", "--to", "16", "--out", "long"]) == 0
    capsys.readouterr()
    assert main(["export", "long/student-16", "p"]) == 2 and "have to divide" in capsys.readouterr().err
    assert not Path("p").exists()


# --- what is refused

@pytest.mark.parametrize("args, words", [
    (("teacher", "--from", "1000", "--to", "3"), "No halvings lead from 1000 steps to 3"),
    (("teacher", "--from", "4", "--to", "4"), "No halvings lead from 4 steps to 4"),
    (("teacher", "--from=4", "--to=8"), "No halvings lead from 4 steps to 8"),
    (("teacher", "--form", "8"), "Unknown flag '--form': did you mean '--from'?"),
    (("teacher", "--kind", "esp"), "did you mean 'eps'?"),
    (("teacher", "--weight", "snr"), "Unknown weight 'snr'"),
    (("teacher", "--drop", "2"), "Got drop = 2"),
    (("teacher", "--late", "-1"), "Got late = -1"),
    (("teacher", "--compare", "3"), "Got compare = (3,)"),
    (("teacher", "--sheet-every", "-1"), "Got sheet_every = -1"),
    (("teacher", "--net.width", "16"), "net.width is 8 there and 16 here"),
    (("--from", "8", "teacher"), "The checkpoint comes first"),
    (("nowhere",), "There is no 'nowhere'"),
])
def test_bad_arguments_are_one_sentence_and_leave_nothing(teacher, args, words, tmp_path, capsys):
    assert main(["distill", *args]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["teacher"]


def test_what_cannot_teach_is_refused(capsys):
    refused = lambda *args: (main([*args]), capsys.readouterr().err)
    for name in ("digits-ddgan", "gaussians-ddgan", "digits"):
        assert main(["train", name, "--size", "tiny", "--steps", "2", "--sheet-every", "0"]) == 0
    capsys.readouterr()
    for args, words in ((("distill", "runs/digits-ddgan-tiny"), "holds a NCSNpp"),
                        (("distill", "runs/gaussians-ddgan-tiny"), "holds a PointGenerator"),
                        (("train", "digits-pd", "--teacher", "runs/digits-ddgan-tiny"), "holds a generator"),
                        (("train", "digits-pd", "--teacher", "runs/digits-tiny"), "net.groups is 8 there"),
                        (("train", "digits-pd"), "'fastdiff train digits' makes it"),
                        (("train", "cifar10-pd", "--size", "tiny"), "cifar10-pd-base --size tiny' makes")):
        code, said = refused(*args)
        assert code == 2 and words in said and said.count("\n") == 1
    names = {p.name for p in Path("runs").iterdir()}
    assert names == {"digits-ddgan-tiny", "gaussians-ddgan-tiny", "digits-tiny"}


def test_dry_run_counts_all_students_and_needs_no_teacher(tmp_path, capsys):
    assert main(["train", "digits-pd", "--size", "tiny", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "weights, 44 steps of 8 rows" in said and "6 checkpoints of" in said
    assert list(tmp_path.iterdir()) == []
    step, whole = (float(said.split(a)[1].split()[0]) for a in ("cpu: ", "in all: "))
    assert math.isclose(whole, 44*step, abs_tol=1), "all updates of the chain"


# --- the papers' values

def test_the_authors_values():
    "Salimans and Ho 2022, cifar_base.py and cifar_distill.py; Hramchenko, celeba_u.py and its script."
    values = lambda name, names: tuple(getattr(RECIPES[name](), k) for k in names.split())
    assert values("cifar10-pd-base", "batch lr warmup weight_decay ema clip kind weight T flip schedule") == \
        (128, 2e-4, 1000, 0.001, 0.9999, 1., "x0", "snr_trunc", None, True, str(Schedule.cosine()))
    shared = "batch lr warmup anneal ema clip weight start end late steps late_steps weight_decay flip"
    assert values("cifar10-pd", shared) == \
        (128, 5e-5, 0, True, 0., 1., "snr_trunc", 8192, 1, 2, 50_000, 100_000, 0., True)
    assert values("celebahq-pd-base", "steps batch lr warmup ema clip kind weight T schedule") == \
        (150_000, 3, 5e-5, 0, 0.999, 1., "v", "snr_plus_1", 1024, "Schedule.cosine_iddpm(1024)")
    assert values("celebahq-pd", shared) == \
        (3, 1.5e-5, 0, True, 0.999, None, "snr_plus_1", 1024, 8, 32, 5000, 10_000, 0.01, True)
    assert RECIPES["cifar10-pd"]().updates == 750_000 and RECIPES["celebahq-pd"]().updates == 50_000
    net = RECIPES["celebahq-pd"]().net
    with torch.device("meta"): assert sum(p.numel() for p in UNet(net).parameters()) == 92_701_171
    assert (net.affine, net.even_pad, net.full_root, net.heads, net.groups) == (False, True, True, 4, 28)


def test_a_chain_begins_where_its_teacher_was_trained():
    "Of a table of 20 times no more than 16 steps are halved, of all times as many as the recipe has."
    data = torch.rand(32, 1, 8, 8) * 2 - 1, torch.arange(32) % 10
    for T, start in ((20, 16), (None, 64)):
        loss = diffusion_loss(Schedule.linear(20), "v", "snr_plus_1", T)
        fit(loss, UNet(TINY), data, TrainConfig(2, batch=8, bar=False), f"table-{T}")
        assert chain_for(f"table-{T}").start == start


def test_a_damaged_account_is_named(capsys):
    assert main(["train", "digits", "--size", "tiny", "--steps", "2", "--sheet-every", "0"]) == 0
    command = ["distill", "runs/digits-tiny", *FEW, "--to", "4"]
    assert main(command) == 0
    for name in ("recipe.json", "chain.json"):
        file = Path("runs/distill-digits-tiny")/name
        file.write_text("{")
        assert main(command) == 2 and f"{name}' is damaged: delete it" in capsys.readouterr().err
        file.unlink()
        assert main(command) == 0 and file.is_file()
