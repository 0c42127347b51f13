"Two processes train the network that one process trains in two parts; one that dies ends the run, no hang."
import os, subprocess, sys

import pytest, torch
import torch.distributed as dist
from torch.testing import assert_close

from fastdiff_edu.train import load_checkpoint, read_log

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")

PROGRAM = """
import os, sys
import torch
from fastdiff_edu.denoiser import diffusion_loss
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.ranks import joined, rank
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import TrainConfig, train

out, steps, parts, dies_at = sys.argv[1], *map(int, sys.argv[2:])
with joined():
    torch.manual_seed(rank())   # weights that differ: rank 0's are to be taken
    net = UNet(UNetConfig(8, 1, width=8, mult=(1, 2), blocks=1, attn=(4,), dropout=0.1))
    data = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    cfg = TrainConfig(steps, batch=8, lr=0.01, warmup=0, bar=False, save_every=3, log_every=1, parts=parts)
    for record in train(diffusion_loss(Schedule.cosine(), "v"), net, data, cfg, out):
        if rank() == 1 and record.step == dies_at: os._exit(7)
"""


def run(processes:int, out, steps:int=7, parts:int=2, dies_at:int=-1) -> subprocess.CompletedProcess:
    "Train in so many processes."
    program = out.parent/"program.py"
    program.write_text(PROGRAM)
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
             "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if processes > 1 else []
    command = [sys.executable, *start, str(program), *map(str, (out, steps, parts, dies_at))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)


def weights(out, which:str) -> torch.Tensor:
    tensors = load_checkpoint(out).tensors(which)
    return torch.cat([tensors[k].flatten() for k in sorted(tensors)])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")/"run"
    done = run(1, out)
    assert done.returncode == 0, done.stderr
    return out


def same_run(a, b):
    for which in ("net", "ema"): assert_close(weights(a, which), weights(b, which), rtol=1e-3, atol=1e-5)
    losses = [[line["loss"] for line in read_log(out)] for out in (a, b)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 7


def test_two_processes_are_one_in_two_parts(tmp_path, alone):
    done = run(2, tmp_path/"run")
    assert done.returncode == 0, done.stderr
    same_run(tmp_path/"run", alone)


def test_one_takes_up_what_two_began_and_the_other_way_round(tmp_path, alone):
    for name, first, then in (("two, one", 2, 1), ("one, two", 1, 2)):
        for processes, steps in ((first, 4), (then, 7)):
            done = run(processes, tmp_path/name, steps)
            assert done.returncode == 0, done.stderr
        same_run(tmp_path/name, alone)


def test_a_process_that_dies_ends_the_run_with_what_was_saved(tmp_path, alone):
    assert run(2, tmp_path/"run", dies_at=5).returncode != 0
    assert load_checkpoint(tmp_path/"run").manifest["step"] == 3
    assert run(2, tmp_path/"run").returncode == 0
    same_run(tmp_path/"run", alone)


def test_parts_must_be_dealt_evenly(tmp_path):
    done = run(2, tmp_path/"run", parts=1)
    assert done.returncode != 0 and "Got 2 processes for a batch in 1 parts" in done.stderr
