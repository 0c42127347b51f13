"The main job: reuse, kill and resume, what it writes; a tiny race takes the same path as the real one."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fastdiff_edu.checkpoint import checkpoints
from fastdiff_edu.core import BadInput
from fastdiff_edu.race import REAL, RaceConfig, chosen, methods, race, table

TINY = """
import sys
from dataclasses import replace
from pathlib import Path
from fastdiff_edu import metrics, race as r
judge, teacher, gan = metrics.digit_classifier, r.teacher_config, r.digit_gan_config
metrics.digit_classifier = lambda out, seed: judge(out, seed, steps=30)
r.teacher_config = lambda quick: replace(teacher(quick), steps=30, save_every=5)
r.digit_gan_config = lambda T, seed=0: replace(gan(T, seed), steps=60, batch=32, save_every=5)
r.images_per_method = lambda cfg: 40
methods = "ddpm-20", "ddpm-10", "ddpm-4", "ddgan-2"
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
    assert sheets == {"ddpm-20", "ddpm-10", "ddpm-4", "ddgan-2", "real-digits-held-out"}
    rows = scoreboard(out)
    assert [row["method"] for row in rows] == [REAL, "ddpm-20", "ddpm-10", "ddpm-4", "ddgan-2"]
    assert [row["evaluations"] for row in rows] == [0, 20, 10, 4, 2]
    assert all(0 <= row[k] <= 1 for row in rows for k in ("coverage", "label_agreement"))
    for name in ("judge", "teacher", "ddgan-2"): assert f"{name}: training, kept in {out/name}" in said
    protocol = json.loads((out/"scoreboard.json").read_text())["protocol"]
    assert protocol["images"] == 40 and protocol["ddgan"]["train"]["steps"] == 60


def test_second_run_reuses(undisturbed):
    out, _ = undisturbed
    before = (out/"scoreboard.json").read_text()
    said = finish(tiny(out))
    assert said.count("reused") == 3 and "training," not in said
    assert (out/"scoreboard.json").read_text() == before


def test_a_generator_is_trained_once(undisturbed, tmp_path):
    out = tmp_path/"copy"
    shutil.copytree(undisturbed[0], out)
    for file in (out/"rows").glob("dd*"): file.unlink()
    assert f"ddgan-2: trained before, reused from {out/'ddgan-2'}" in finish(tiny(out))
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


def test_killed_while_a_generator_trains_it_ends_the_same(undisturbed, tmp_path):
    out, until = tmp_path/"killed", time.time() + 120
    process = tiny(out)
    while len(checkpoints(out/"ddgan-2")) < 2 and time.time() < until: time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (out/"ddgan-2"/"done.json").exists(), "it was not killed in the middle"
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
    gans = {"ddgan-4", "ddgan-2", "ddgan-1"}
    assert gans <= set(chosen(RaceConfig())) and not gans & set(chosen(RaceConfig(quick=True)))


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
