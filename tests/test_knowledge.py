"A sampler's student survives a kill, goes on bit for bit, and leaves its teacher as it was."
import copy, hashlib, json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest, torch
from torch import nn

from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.denoiser import Clipped, Counted, Denoiser
from fastdiff_edu.knowledge import (KnowledgeConfig, at_rest, identity, knowledge_distillation, settings_of,
                                  student_of, teacher_pairs, trajectory_end)
from fastdiff_edu.nets.mlp import MLP, MLPConfig
from fastdiff_edu.oracle import MixtureDenoiser, gaussians_25
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import TrainConfig, load_checkpoint

pytestmark = pytest.mark.usefixtures("in_a_folder")
SCHEDULE, ORACLE = Schedule.cosine(), MixtureDenoiser(gaussians_25(), Schedule.cosine())
NOISE = torch.randn(50, 2, generator=seeded(0, "noise"))
CFG = KnowledgeConfig(6, batch=16, lr=1e-2, warmup=0, ema=0.5, save_every=2, bar=False, teacher_steps=3,
                      rows=16)


def model(kind:str="x0", seed:int=0, learned_var:bool=False, schedule=SCHEDULE, **config) -> Denoiser:
    "A network whose last layer says something."
    torch.manual_seed(seed)
    net = MLP(MLPConfig(width=8, depth=1, out=4 if learned_var else None, **config))
    nn.init.normal_(net.last.weight)
    return Denoiser(net, schedule, kind, learned_var)


def flat(net:nn.Module) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in net.parameters()])
def files(out) -> dict: return {p.name: p.read_bytes() for p in sorted(Path(out).glob("*.safetensors"))}


# --- pairs

SLOW = """
import sys, torch
from pathlib import Path
from fastdiff_edu.core import seeded, writable_folder
from fastdiff_edu.knowledge import KnowledgeConfig, teacher_pairs
from fastdiff_edu.oracle import gaussians_25
from fastdiff_edu.schedule import Schedule
torch.set_num_threads(1)
noise = torch.randn(400, 2, generator=seeded(0, "noise"))
teacher_pairs(gaussians_25().denoiser(Schedule.cosine()), noise,
              KnowledgeConfig(1, teacher_steps=100, rows=4), None, writable_folder(Path(sys.argv[1])))
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_a_kill_among_the_pairs_leaves_no_trace():
    run, quiet = [sys.executable, "-c", SLOW], dict(stderr=subprocess.DEVNULL, timeout=240)
    subprocess.run([*run, "whole"], check=True, **quiet)
    whole = files("whole")
    assert len(whole) == 100
    for least in (1, 30):
        p = subprocess.Popen([*run, "killed"])
        while len(files("killed")) < least and p.poll() is None: time.sleep(0.002)
        p.send_signal(signal.SIGKILL)
        assert p.wait(60) == -signal.SIGKILL, "it was still walking"
        found = files("killed")
        assert least <= len(found) < 100 and found.items() <= whole.items(), "each file is whole or absent"
    subprocess.run([*run, "killed"], check=True, **quiet)
    assert files("killed") == whole


def test_pairs_are_walked_once_and_in_rows(tmp_path):
    counted = Counted(ORACLE)
    ends = teacher_pairs(counted, NOISE, CFG, None, tmp_path)
    assert counted.nfe == 3*4 and len(files(tmp_path)) == 4 and ends.equal(teacher_pairs(ORACLE, NOISE, CFG))
    torch.testing.assert_close(ends, trajectory_end(ORACLE, NOISE, 3))
    (tmp_path/"00000016.safetensors").unlink()
    assert teacher_pairs(counted, NOISE, CFG, None, tmp_path).equal(ends) and counted.nfe == 3*5
    torch.manual_seed(5)
    before = torch.get_rng_state()
    teacher_pairs(ORACLE, NOISE, CFG)
    assert torch.get_rng_state().equal(before), "without a random number"


def test_damaged_pairs_are_named(tmp_path):
    teacher_pairs(ORACLE, NOISE, CFG, None, tmp_path)
    file = tmp_path/"00000032.safetensors"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(BadInput, match="00000032.safetensors' is no whole safetensors file"):
        teacher_pairs(ORACLE, NOISE, CFG, None, tmp_path)


OTHERS = {"teacher_steps is 3 there and 4 here": dict(cfg=replace(CFG, teacher_steps=4)),
          "rows is 16 there and 8 here": dict(cfg=replace(CFG, rows=8)), "noise is": dict(x_1=NOISE + 1),
          "teacher.model is MLP there and MixtureDenoiser here": dict(teacher=ORACLE),
          "teacher.sha256 is": dict(teacher=model(seed=1)),
          "schedule is Schedule.cosine.. there": dict(teacher=model(schedule=Schedule.linear()))}


@pytest.mark.parametrize("words", OTHERS)
def test_pairs_of_something_else_are_refused(words, tmp_path):
    usual = dict(teacher=model(), x_1=NOISE, cfg=CFG)
    teacher_pairs(**usual, out=tmp_path)
    other = usual | OTHERS[words]
    with pytest.raises(BadInput, match=f"holds other pairs \\({words}.*\\): give another folder"):
        teacher_pairs(**other, out=tmp_path)
    with pytest.raises(BadInput, match="holds other pairs .noise is"):
        teacher_pairs(**usual, y=torch.zeros(50).long(), out=tmp_path)


# --- the training

@pytest.mark.parametrize("stop", [1, 2, 5, 6])
def test_stopping_anywhere_changes_nothing(stop, tmp_path):
    class Stop(Exception): pass
    def stopped(steps, record):
        assert steps == 1
        if record.step == stop: raise Stop
    whole = knowledge_distillation(ORACLE, CFG, NOISE, student=model(), out=tmp_path/"whole")
    with pytest.raises(Stop):
        knowledge_distillation(ORACLE, CFG, NOISE, student=model(), out=tmp_path/"parts", watch=stopped)
    steps = []
    again = knowledge_distillation(ORACLE, CFG, NOISE, student=model(seed=1), out=tmp_path/"parts",
                                   watch=lambda n, record: steps.append(record.step))
    assert flat(again.model.net).equal(flat(whole.model.net)) and steps[-1] == again.record.step == 6
    last = [load_checkpoint(tmp_path/name) for name in ("whole", "parts")]
    for which in ("net", "ema", "optimizer"):
        a, b = (c.tensors(which) for c in last)
        assert a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


def test_the_average_comes_back_or_without_one_the_last_weights():
    averaged = knowledge_distillation(ORACLE, CFG, NOISE, student=model())
    moved = flat(averaged.record.net)
    assert averaged.model.net is averaged.record.ema and not flat(averaged.model.net).equal(moved)
    last = knowledge_distillation(ORACLE, replace(CFG, ema=0.), NOISE, student=model())
    assert flat(last.model.net).equal(flat(last.record.net)) and flat(last.record.net).equal(moved)
    assert last.steps == 1 and last.record.step == 6


def test_a_student_learns_each_row_of_its_label():
    "Four points, four labels, one noise: without labels the student could only say their mean."
    mix = gaussians_25()
    y, x_1 = torch.tensor([0, 4, 20, 24]).repeat(16), torch.zeros(64, 2)
    cfg = replace(CFG, steps=400, batch=64, ema=0., anneal=True, teacher_steps=5)
    student = knowledge_distillation(mix.denoiser(SCHEDULE), cfg, x_1, y, model(n_labels=25)).model
    with torch.no_grad(): said = student(x_1, 1., y=y).x0
    assert (said - mix.means[y].float()).abs().max() < 0.1
    assert teacher_pairs(ORACLE, x_1, replace(cfg, rows=7), y).equal(teacher_pairs(ORACLE, x_1, cfg, y))


# --- the teacher

class Dropping(MLP):
    def forward(self, *args): return nn.functional.dropout(super().forward(*args), 0.5, self.training)


def dropping() -> Denoiser:
    teacher = model("v")
    teacher.net.__class__ = Dropping
    return teacher


WRAPS = dict(plain=lambda model: model, clipped=Clipped, both=lambda model: Counted(Clipped(model)))


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_the_teacher_is_left_as_it_was(wrap):
    teacher = dropping()
    teacher.net.train()
    calm = copy.deepcopy(teacher)
    calm.net.eval()
    resting, before = at_rest(wrap(teacher)), flat(teacher.net).clone()
    assert resting(NOISE, 0.5).x0.equal(wrap(calm)(NOISE, 0.5).x0), "dropout is off"
    assert not resting(NOISE, 0.5).x0.requires_grad and teacher.net.training
    stage = knowledge_distillation(wrap(teacher), CFG, NOISE)            # the student begins as the teacher
    assert flat(teacher.net).equal(before) and all(p.requires_grad for p in teacher.net.parameters())
    assert not flat(stage.record.net).equal(before) and stage.record.net is not teacher.net
    knowledge_distillation(wrap(teacher), CFG, NOISE, student=teacher)   # or is it: then it learns
    assert not flat(teacher.net).equal(before)


def test_a_student_begins_as_its_teacher():
    for kind, says in (("eps", "v"), ("v", "v"), ("x0", "x0")):
        teacher = model(kind)
        student = student_of(teacher)
        assert student.kind == says and student.net is not teacher.net
        assert flat(student.net).equal(flat(teacher.net))
        assert student.schedule is teacher.schedule and student_of(teacher, "x0").kind == "x0"
    frozen = at_rest(model())
    assert not any(p.requires_grad for p in frozen.net.parameters())
    assert all(p.requires_grad for p in student_of(Clipped(frozen)).net.parameters())
    assert at_rest(ORACLE) is ORACLE
    with pytest.raises(BadInput, match="a MixtureDenoiser without a network: give the student"):
        student_of(Counted(ORACLE))


def test_learned_variances_are_handed_on(tmp_path):
    teacher = model("eps", learned_var=True)
    stage = knowledge_distillation(teacher, CFG, NOISE, out=tmp_path)
    assert load_checkpoint(tmp_path).manifest["loss"]["learned_var"] is True
    assert stage.model.learned_var and stage.model(NOISE, 1.).var_frac.shape == NOISE.shape
    last = stage.record.net.last.weight - teacher.net.last.weight
    assert last[:2].abs().min() > 0 and last[2:].abs().max() == 0, "the variances are not trained"


def test_the_manifest_links_student_and_teacher(tmp_path):
    first = knowledge_distillation(ORACLE, CFG, NOISE, student=model("v"), out=tmp_path/"first")
    second = knowledge_distillation(first.model, CFG, NOISE, out=tmp_path/"second")
    loss = [load_checkpoint(tmp_path/name).manifest["loss"] for name in ("first", "second")]
    common = dict(kind="v", learned_var=False, steps=1)
    weights = load_checkpoint(tmp_path/"first").path/"ema.safetensors"
    sha = hashlib.sha256(weights.read_bytes()).hexdigest()
    exact = identity(ORACLE)
    assert exact["model"] == "MixtureDenoiser" and len(exact["sha256"]) == 64
    assert loss[0] == common | dict(schedule=str(SCHEDULE), teacher=exact | dict(steps=3))
    assert loss[1] == loss[0] | dict(teacher=dict(model="MLP", kind="v", sha256=sha, steps=3))
    inside = dict(model="MLP", kind="v", sha256=sha)
    clipped = Clipped(first.model)
    assert identity(clipped) == dict(inside="Clipped", model=inside)
    assert identity(Counted(clipped)) == dict(inside="Counted", model=identity(clipped))
    pairs = json.loads((tmp_path/"second"/"pairs"/"pairs.json").read_text())
    assert pairs["teacher"]["sha256"] == sha and second.steps == 1
    assert settings_of(CFG, steps=9) == TrainConfig(9, 16, 1e-2, 0, ema=0.5, save_every=2, bar=False)
    with pytest.raises(BadInput, match="holds another run"):
        knowledge_distillation(first.model, replace(CFG, lr=1e-3), NOISE, out=tmp_path/"second")
    (tmp_path/"second"/"pairs"/"pairs.json").write_text("{")
    with pytest.raises(BadInput, match="pairs.json is damaged"):
        knowledge_distillation(first.model, CFG, NOISE, out=tmp_path/"second")
