"The main job: reuse, kill and resume, what it writes; a tiny race takes the same path as the real one."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from fastdiff_edu.checkpoint import checkpoints, load_checkpoint
from fastdiff_edu.core import BadInput
from fastdiff_edu.denoiser import Clipped, Counted, Prediction
from fastdiff_edu.entrants import methods
from fastdiff_edu.guidance import ClassifierFree
from fastdiff_edu.knowledge import trajectory_end
from fastdiff_edu.oracle import gaussians_25
from fastdiff_edu.race import REAL, RaceConfig, chosen, race, table
from fastdiff_edu.sample import ddim_step, sample_last
from fastdiff_edu.schedule import Schedule

TINY = """
import sys
from dataclasses import replace
from pathlib import Path
from fastdiff_edu import entrants as e, metrics, race as r
judge, teacher, gan = metrics.digit_classifier, r.teacher_config, r.digit_gan_config
chain, knowledge, noisy = r.digit_chain_config, r.digit_knowledge_config, r.digit_noisy_classifier_config
one, two = r.digit_guided_config, r.digit_guided_chain_config
few = dict(save_every=5)
metrics.digit_classifier = lambda out, seed: judge(out, seed, steps=30)
r.teacher_config = lambda cfg: replace(teacher(cfg), steps=30, save_every=5)
e.digit_gan_config = r.digit_gan_config = lambda T, seed=0: replace(gan(T, seed), **few, steps=60, batch=32)
r.digit_chain_config = lambda seed: replace(chain(seed), steps=6, late_steps=9, batch=16, save_every=3)
short = lambda seed: replace(knowledge(seed), **few, steps=30, batch=16, teacher_steps=2)
e.digit_knowledge_config = r.digit_knowledge_config = short
push = lambda seed: replace(noisy(seed), **few, steps=30, batch=16)
e.digit_noisy_classifier_config = r.digit_noisy_classifier_config = push
r.digit_guided_config = lambda seed: replace(one(seed), **few, steps=20, batch=16)
last = dict(steps=6, late_steps=9, batch=16, start=16)
r.digit_guided_chain_config = lambda seed: replace(two(seed), **few, **last)
r.images_per_method = lambda cfg: 40
methods = "ddpm-20", "ddpm-4", "ddgan-2", "pd-16", "pd-1", "kd-1", "cfg-2", "classifier-1", "gd-8", "gd-1"
r.race(r.RaceConfig(out=Path(sys.argv[1]), methods=methods, seed=int(sys.argv[2])))
"""


def tiny(out, seed=0, **kwargs):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", TINY, str(out), str(seed)], env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kwargs)


def finish(process):
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return said


def scoreboard(out):
    "The rows without the timings."
    rows = json.loads((out/"scoreboard.json").read_text())["rows"]
    return [{k: v for k, v in row.items() if k != "ms_per_image"} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("race")/"whole"
    return out, finish(tiny(out))


def test_writes_what_it_promises(undisturbed):
    out, said = undisturbed
    there = {p.name for p in out.iterdir()}
    assert {"scoreboard.json", "scoreboard.md", "trilemma.png", "protocol.json"} <= there
    sheets = {p.stem for p in (out/"sheets").iterdir()}
    names = ["ddpm-20", "ddpm-4", "ddgan-2", "pd-16", "pd-1", "kd-1", "cfg-2", "classifier-1", "gd-8", "gd-1"]
    assert sheets == {*names, "real-digits-held-out"}
    rows = scoreboard(out)
    assert [row["method"] for row in rows] == [REAL, *names]
    assert [row["evaluations"] for row in rows] == [0, 20, 4, 2, 16, 1, 1, 40, 20, 8, 1]
    assert all(0 <= row[k] <= 1 for row in rows for k in ("coverage", "label_agreement"))
    for name in ("judge", "teacher", "ddgan-2", "pd", "kd", "noisy-classifier", "gd"):
        assert said.count(f"{name}: training, kept in {out/name}") == 1
    protocol = json.loads((out/"scoreboard.json").read_text())["protocol"]
    assert protocol["images"] == 40 and protocol["ddgan"]["train"]["steps"] == 60
    assert protocol["pd"]["late_steps"] == 9 and protocol["kd"]["teacher_steps"] == 2


def test_all_students_have_the_teacher_of_the_race(undisturbed):
    out, _ = undisturbed
    files = {name: load_checkpoint(out/name).manifest for name in ("teacher", "kd")}
    for n in (16, 8, 4, 2, 1): files[n] = load_checkpoint(out/"pd"/f"student-{n}").manifest
    weights = {name: manifest["files"]["ema.safetensors"]["sha256"] for name, manifest in files.items()}
    taught = {name: manifest["loss"]["teacher"] for name, manifest in files.items() if name != "teacher"}
    for name, above in {"kd": "teacher", 16: "teacher", 8: 16, 4: 8, 2: 4, 1: 2}.items():
        assert taught[name]["sha256"] == weights[above], f"{name} has another teacher than {above}"
    assert [taught[n]["steps"] for n in ("kd", 16, 1)] == [2, 32, 2]


def test_second_run_reuses(undisturbed):
    out, _ = undisturbed
    before = (out/"scoreboard.json").read_text()
    said = finish(tiny(out))
    assert said.count("reused") == 3 and "training," not in said
    assert (out/"scoreboard.json").read_text() == before


def test_a_network_is_trained_once(undisturbed, tmp_path):
    out = tmp_path/"copy"
    shutil.copytree(undisturbed[0], out)
    for file in (out/"rows").iterdir(): file.unlink()
    said = finish(tiny(out))
    for name in ("ddgan-2", "pd", "kd", "noisy-classifier", "gd"):
        assert said.count(f"{name}: trained before, reused from {out/name}") == 1
    assert scoreboard(out) == scoreboard(undisturbed[0])


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_any_moment_it_ends_the_same(undisturbed, tmp_path, seed):
    out, moments = tmp_path/"killed", random.Random(seed)
    for _ in range(3):
        process = tiny(out)
        time.sleep(moments.uniform(2, 9))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(tiny(out))
    assert scoreboard(out) == scoreboard(undisturbed[0])
    assert not [p for p in out.rglob("*.tmp")], "something half-written was left"


@pytest.mark.parametrize("trained", ["ddgan-2", "pd/student-4", "kd", "gd/stage-one",
                                     "gd/stage-two/student-2"])
def test_killed_while_a_network_trains_it_ends_the_same(undisturbed, tmp_path, trained):
    out, until = tmp_path/"killed", time.time() + 120
    process = tiny(out)
    while len(checkpoints(out/trained)) < 2 and time.time() < until: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out/trained.split("/")[0]/"done.json").exists(), "it was not killed in the middle"
    finish(tiny(out))
    assert scoreboard(out) == scoreboard(undisturbed[0])


def test_another_protocol_is_refused(undisturbed):
    process = tiny(undisturbed[0], seed=1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "holds another race (seed is 0 there and 1 here)" in said


def test_methods_are_chosen():
    assert list(chosen(RaceConfig(methods=("ddpm-4", "ddpm-10", "ddpm-4")))) == ["ddpm-4", "ddpm-10"]
    assert set(chosen(RaceConfig(all=True))) == set(methods())
    assert set(chosen(RaceConfig(quick=True))) < set(chosen(RaceConfig())) < set(methods())
    with pytest.raises(BadInput, match="Unknown method 'ddmp-4': did you mean 'ddpm-4'"):
        chosen(RaceConfig(methods=("ddmp-4",)))
    with pytest.raises(BadInput, match="Unknown method 'ddgan4': did you mean 'ddgan-4'"):
        chosen(RaceConfig(methods=("ddgan4",)))
    own = {"ddgan-4", "ddgan-2", "ddgan-1", "pd-16", "pd-8", "pd-4", "pd-2", "pd-1", "kd-1",
           "cfg-0.5", "cfg-1", "cfg-2", "cfg-4", "classifier-1", "gd-8", "gd-4", "gd-2", "gd-1"}
    assert own <= set(chosen(RaceConfig())) and not own & set(chosen(RaceConfig(quick=True)))


def test_a_student_takes_the_steps_that_it_was_made_for():
    schedule, points = Schedule.cosine(), torch.zeros(3, 2, dtype=torch.float64)
    teacher = gaussians_25().denoiser(schedule)
    students = {n: Counted(teacher) for n in (16, 8, 4, 2, 1)}
    for n, student in students.items():
        entry = methods()[f"pd-{n}"].prepare(SimpleNamespace(teacher=teacher, students=students))
        assert entry.model is student
        end = entry.sample(student, points, None, None)
        assert student.nfe == n == methods()[f"pd-{n}"].evaluations
        torch.testing.assert_close(end, trajectory_end(teacher, points, n), rtol=0, atol=0)


def test_guided_rows_are_what_they_are_called():
    schedule, y = Schedule.cosine(), torch.tensor([0, 7, 24])
    points = torch.randn(3, 2, dtype=torch.float64)
    race = SimpleNamespace(teacher=gaussians_25().denoiser(schedule))
    for w in (0.5, 1., 2., 4.):
        entry = methods()[f"cfg-{w:g}"].prepare(race)
        counted = Counted(entry.model)
        end = entry.sample(counted, points, y, None)
        pair = Clipped(ClassifierFree(race.teacher, w))
        wanted = sample_last(ddim_step(), pair, points, schedule.grid(20), y=y)
        torch.testing.assert_close(end, wanted, rtol=0, atol=0)
        assert counted.nfe == 40 == methods()[f"cfg-{w:g}"].evaluations


def test_a_guided_student_is_told_the_weight_of_the_race():
    asked = []
    class Student:
        schedule = Schedule.cosine()
        def __call__(self, x, t, y, w): asked.append((t, w)); return Prediction(x, x)
    for n in (8, 4, 2, 1):
        asked.clear()
        race = SimpleNamespace(teacher=Student(), guided_students={n: Student()})
        entry = methods()[f"gd-{n}"].prepare(race)
        entry.sample(entry.model, torch.zeros(2, 1), torch.zeros(2).long(), None)
        assert asked == [(t, 1.) for t in Student.schedule.grid(n).tolist()[:-1]]


def test_bad_input_leaves_nothing(tmp_path):
    (tmp_path/"file").write_text("")
    wrong = [dict(out=tmp_path/"new", methods=("nonsense",)), dict(out=tmp_path/"file"/"below")]
    for settings in wrong:
        with pytest.raises(BadInput): race(RaceConfig(**settings))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_table_is_markdown():
    row = dict(method="a", evaluations=4, ms_per_image=1.5, quality=2.0, coverage=0.5, label_agreement=1.0)
    lines = table([row]).splitlines()
    assert len(lines) == 3 and len({len(line) for line in lines}) == 1
    assert all(line.count("|") == 7 for line in lines)
