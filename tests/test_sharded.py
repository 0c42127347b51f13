"Samples on disk survive a kill, and several processes draw and judge what one does."
import json, os, random, signal, subprocess, sys, time, tracemalloc

import numpy as np, pytest, torch
import torch.distributed as dist
from tiny import tiny_run

from fastdiff_edu import generate as gn
from fastdiff_edu.core import RunFailed
from fastdiff_edu.data import to_uint8
from fastdiff_edu.generate import Batch, SampleConfig, generate, generate_to, open_samples, prepared

gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A training's folder: a tiny network with classes."
    return tiny_run(tmp_path_factory.mktemp("run"), weight="simple")


@pytest.fixture(autouse=True)
def one_thread():
    "As in the processes: the number of threads is among the facts."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(program:str, *args, processes:int=1, **kwargs) -> subprocess.Popen:
    "Run a program in so many processes, in a group of their own."
    many = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if processes > 1 else []
    command = [sys.executable, *many, program, *map(str, args)]
    return subprocess.Popen(command, env=ENV, text=True, start_new_session=True, **kwargs)


def finish(program:str, *args, processes:int=1) -> str:
    "Run it to its end; what it printed."
    done = start(program, *args, processes=processes, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = done.communicate(timeout=240)
    assert done.returncode == 0, err
    return out


def files(folder) -> dict:
    "Name -> bytes of all that is in a folder; None for a folder in it."
    return {p.name: p.read_bytes() if p.is_file() else None for p in folder.iterdir()}


# On disk

SAMPLE = """
import sys
from fastdiff_edu.generate import SampleConfig, generate_to
from fastdiff_edu.ranks import joined
run, out, steps, n = *sys.argv[1:3], *map(int, sys.argv[3:])
with joined():
    generate_to(SampleConfig(run, "ddpm", steps, n=n, batch=3, seed=5), out)
"""
SETTINGS = 30, 32   # steps, samples: 11 batches


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    file = tmp_path_factory.mktemp("program")/"sample.py"
    file.write_text(SAMPLE)
    return str(file)


@pytest.fixture(scope="module")
def whole(run, program, tmp_path_factory):
    "What an undisturbed process writes."
    out = tmp_path_factory.mktemp("whole")/"out"
    assert finish(program, run, out, *SETTINGS) == ""
    return files(out)


def test_the_files_are_what_generate_draws(run, whole, tmp_path):
    cfg = SampleConfig(run, "ddpm", SETTINGS[0], n=SETTINGS[1], batch=3, seed=5)
    x, said = generate(cfg, bar=False)
    told = generate_to(cfg, tmp_path, bar=False)
    assert files(tmp_path) == whole and set(whole) == {"samples.npy", "samples.json"}
    assert json.loads(whole["samples.json"]) == told and {k: told[k] for k in said} == said
    assert open_samples(tmp_path).equal(to_uint8(x))
    np.save(tmp_path/"by numpy.npy", to_uint8(x).numpy())
    assert (tmp_path/"by numpy.npy").read_bytes() == whole["samples.npy"]


def batches(out) -> int: return len(list(out.glob(".samples.*/*.npz")))


def kill(program, run, out, when:int, after:float, processes:int=1):
    "Kill a run so many seconds after so many batches are there."
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    p = start(program, run, out, *SETTINGS, processes=processes, **quiet)
    while batches(out) < when and p.poll() is None: time.sleep(0.005)
    time.sleep(after)
    os.killpg(p.pid, signal.SIGKILL)
    p.wait()


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_kills_at_random_moments_change_nothing(run, program, whole, tmp_path):
    chance, found = random.Random(0), []
    for when in (1, 4, 7, 9):
        kill(program, run, tmp_path, when, chance.uniform(0, 0.2))
        found.append(batches(tmp_path))
    assert found[0] > 0 and ((tmp_path/"samples.json").exists() or found == sorted(found)), found
    finish(program, run, tmp_path, *SETTINGS)
    assert files(tmp_path) == whole


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@gloo
def test_one_process_goes_on_where_two_were_killed(run, program, whole, tmp_path):
    kill(program, run, tmp_path, 4, 0.05, processes=2)
    assert batches(tmp_path) >= 4 or (tmp_path/"samples.json").exists()
    finish(program, run, tmp_path, *SETTINGS)
    assert files(tmp_path) == whole


def part_done(run, out, batches:int, **kwargs) -> SampleConfig:
    "A run that was left after some batches, which are blackened to be known again."
    cfg = SampleConfig(run, steps=2, n=10, batch=3, **kwargs)
    work = prepared(cfg)
    part = gn.part_of(out, work.facts)
    part.mkdir(parents=True)
    for b in gn.drawn(work, work.firsts[:batches], bar=False):
        gn.save_batch(part, b._replace(x=-torch.ones_like(b.x)))
    return cfg


def test_only_missing_batches_are_drawn(run, tmp_path):
    cfg = part_done(run, tmp_path, 2)
    generate_to(cfg, tmp_path, bar=False)
    x = open_samples(tmp_path)
    assert x[:6].eq(0).all() and x[6:].equal(to_uint8(generate(cfg, bar=False)[0])[6:])
    assert set(files(tmp_path)) == {"samples.npy", "samples.json"}


@pytest.mark.parametrize("change", [
    dict(seed=1), dict(batch=5), dict(n=9), dict(raw=True), dict(labels=(1,))])
def test_another_request_begins_anew(change, run, tmp_path):
    "Where another one was finished, and begun once more."
    generate_to(SampleConfig(run, steps=2, n=10, batch=3), tmp_path, bar=False)
    part_done(run, tmp_path, 2)
    cfg = SampleConfig(run, **dict(steps=2, n=10, batch=3) | change)
    generate_to(cfg, tmp_path, bar=False)
    assert open_samples(tmp_path).equal(to_uint8(generate(cfg, bar=False)[0]))
    assert set(files(tmp_path)) == {"samples.npy", "samples.json"}


def test_a_damaged_batch_is_drawn_again(run, tmp_path):
    cfg = part_done(run, tmp_path, 2)
    file, = tmp_path.glob(".samples.*/3.npz")
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(RunFailed, match="3.npz' was damaged"): generate_to(cfg, tmp_path, bar=False)
    generate_to(cfg, tmp_path, bar=False)
    assert open_samples(tmp_path)[3:].equal(to_uint8(generate(cfg, bar=False)[0])[3:])


def test_a_full_disk_is_one_sentence_and_costs_one_batch(run, tmp_path, monkeypatch):
    cfg, save = SampleConfig(run, steps=2, n=10, batch=3), gn.save_batch
    def full(part, batch):
        if batch.first == 6: raise OSError(28, "No space left on device")
        save(part, batch)
    with monkeypatch.context() as m, pytest.raises(RunFailed, match="No space left on device.: make room"):
        m.setattr(gn, "save_batch", full)
        generate_to(cfg, tmp_path, bar=False)
    assert len(list(tmp_path.glob(".samples.*/*.npz"))) == 2 and not (tmp_path/"samples.npy").exists()
    generate_to(cfg, tmp_path, bar=False)
    assert open_samples(tmp_path).equal(to_uint8(generate(cfg, bar=False)[0]))


def test_memory_does_not_grow_with_the_samples(run, tmp_path, monkeypatch):
    "Sixteen megabytes of images in batches of one quarter: NumPy never holds more than a few batches."
    cfg, shape = SampleConfig(run, n=1024, batch=16), (1, 128, 128)
    fake = lambda work, firsts: (Batch(k, torch.zeros(16, *shape), 1) for k in firsts)
    work = prepared(cfg)._replace(shape=shape)
    monkeypatch.setattr(gn, "walks", fake)
    monkeypatch.setattr(gn, "prepared", lambda cfg: work)
    tracemalloc.start()
    try: generate_to(cfg, tmp_path, bar=False); peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert open_samples(tmp_path).shape == (1024, *shape) and peak < 3e6, peak


# Several processes

@gloo
def test_two_processes_write_what_one_does(run, program, whole, tmp_path):
    finish(program, run, tmp_path/"two", *SETTINGS, processes=2)
    assert files(tmp_path/"two") == whole


SHARES = """
import sys, torch
from fastdiff_edu.generate import SampleConfig, generate_to
from fastdiff_edu.ranks import alone, dealt, gathered, joined, rank, world
with joined():
    assert world() == 2
    for n, batch in ((10, 3), (9, 3), (1, 5), (7, 1), (12, 100)):
        every = torch.arange(n * 6.).reshape(n, 2, 3).double()
        back = gathered([part + 1 for part in dealt(every.split(batch))], n, batch)
        assert (back is None) if rank() else back.equal(every + 1), (n, batch)
    me = rank()
    with alone(): assert (rank(), world()) == (0, 1)
    assert (rank(), world()) == (me, 2)
    assert generate_to(SampleConfig(sys.argv[1], steps=2, n=2), sys.argv[2])["n"] == 2   # one batch for two
"""


@gloo
def test_shares_come_back_in_order(run, tmp_path):
    (tmp_path/"shares.py").write_text(SHARES)
    finish(str(tmp_path/"shares.py"), run, tmp_path/"out", processes=2)
    assert set(files(tmp_path/"out")) == {"samples.npy", "samples.json"}


EVALUATE = """
import sys
from functools import partial
from fastdiff_edu import features
from fastdiff_edu.evaluate import METRICS, EvaluateConfig, evaluate, report
from fastdiff_edu.ranks import joined, rank
run, out, eye, held_out, keep = sys.argv[1:]
features.digit_classifier = partial(features.digit_classifier, steps=20)
small = dict(steps=3, kid_size=20, kid_subsets=5, splits=2, bound_n=10, bound_steps=5, batch=7)
with joined():
    said = evaluate(EvaluateConfig(run, n=60, features=eye, held_out=held_out, out=out,
                                   metrics=METRICS if keep else ("fid",), **small))
    if said: print(report(said))
    assert bool(said) == (rank() == 0)
"""


class Eye(torch.nn.Module):
    "Features, and logits."
    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.randn(12, 1, 3, 3, generator=torch.Generator().manual_seed(1)))

    def forward(self, x):
        h = torch.conv2d(x.float() / 255, self.w).relu().mean((2, 3))
        return h, h[:, :5]


@gloo
@pytest.mark.parametrize("held_out, keep, own", [("digits:test", "", False), ("", "keep", True)])
def test_two_processes_measure_what_one_does(held_out, keep, own, run, tmp_path):
    "Without features, with another's network; and with features, through the classifier that rank 0 trains."
    (tmp_path/"evaluate.py").write_text(EVALUATE)
    torch.jit.save(torch.jit.trace(Eye(), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)), str(tmp_path/"eye.pt"))
    eye = "" if own else str(tmp_path/"eye.pt")
    program = str(tmp_path/"evaluate.py")
    said = [finish(program, run, tmp_path/str(n), eye, held_out, keep, processes=n) for n in (1, 2)]
    one, two = (json.loads((tmp_path/f"{n}"/"evaluation.json").read_text())["numbers"] for n in (1, 2))
    assert list(one) == list(two) and len(one) == (6 if keep else 1) and said[0] == said[1]
    for key in one:
        for field in ("value", "spread", "real"):
            a, b = one[key].pop(field), two[key].pop(field)
            assert a == b or b == pytest.approx(a, rel=1e-9), (key, field)
    assert one == two, "protocols"
    assert files(tmp_path/"1")["samples.npy"] == files(tmp_path/"2")["samples.npy"]
