"Two players stop, go on, share a batch and are refused like one; their recipes go from training to numbers."
import json, math, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np, pytest, torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from fastdiff_edu.cli import main
from fastdiff_edu.core import BadInput, RunFailed, seeded
from fastdiff_edu.data import digits, gaussians_25
from fastdiff_edu.ddgan import DDGANConfig, GeneratorModel, d_turn, r1_penalty, train_ddgan
from fastdiff_edu.denoiser import diffusion_loss
from fastdiff_edu.experiment import build
from fastdiff_edu.generate import SampleConfig, generate
from fastdiff_edu.models import open_model
from fastdiff_edu.nets.discriminator import Discriminator, DiscriminatorConfig
from fastdiff_edu.nets.mlp import MLP, MLPConfig, PointConfig, PointDiscriminator, PointGenerator
from fastdiff_edu.nets.ncsnpp import NCSNpp, NCSNppConfig
from fastdiff_edu.recipes import RECIPES
from fastdiff_edu.rehearsal import rehearse
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import TrainConfig, fit, load_checkpoint, read_log

pytestmark = pytest.mark.usefixtures("in_a_folder")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
SCHEDULE = Schedule.vp(t_min=1e-3)
POINTS = gaussians_25().sample(100, seeded(0, "points")).float()
CFG = DDGANConfig(12, batch=16, lr_g=1e-3, lr_d=1e-3, lazy=3, ema=0.9, log_every=3, save_every=4, bar=False)
STATES = ("net", "ema", "optimizer", "disc", "disc_optimizer")


def points(seed:int=0, width:int=16) -> tuple[GeneratorModel, nn.Module]:
    torch.manual_seed(seed)
    c = PointConfig(width=width)
    return GeneratorModel(PointGenerator(c), SCHEDULE, c.z_dim), PointDiscriminator(c)


def images(group:int=4, labels:int=10, seed:int=0) -> tuple[GeneratorModel, nn.Module]:
    torch.manual_seed(seed)
    net = NCSNppConfig(8, 1, width=8, mult=(1, 2), blocks=1, attn=(4,), z_dim=3, z_width=8, n_labels=labels)
    disc = DiscriminatorConfig(8, 1, width=4, t_width=8, group=group, n_labels=labels)
    return GeneratorModel(NCSNpp(net), SCHEDULE, net.z_dim), Discriminator(disc)


def digit_rows(n:int=32) -> tuple[torch.Tensor, torch.Tensor]: return digits("train").batch(torch.arange(n))


def states(out) -> torch.Tensor:
    "Weights, average and both memories of both players, as one vector."
    found = [load_checkpoint(out).tensors(which) for which in STATES]
    return torch.cat([tensors[k].flatten() for tensors in found for k in sorted(tensors)])


def log(out) -> list[dict]:
    "The log without its timings."
    timings = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timings} for line in read_log(out)]


# --- stop and go on

@pytest.mark.parametrize("stops", [(1,), (4,), (12,), (3, 3, 7), tuple(range(1, 12))], ids=str)
def test_stopping_anywhere_changes_nothing(stops, tmp_path):
    for record in train_ddgan(*points(), POINTS, CFG, tmp_path/"whole"): pass
    for seed, stop in enumerate((*stops, None)):     # each time other weights: all comes from the folder
        for record in train_ddgan(*points(seed), POINTS, CFG, tmp_path/"parts"):
            torch.rand(3), record.net.eval(), record.disc.eval()
            if record.step == stop: break
    assert states("parts").equal(states("whole")) and log("parts") == log("whole") and len(log("whole")) == 4
    assert {"d_loss", "g_loss", "d_norm", "g_norm", "lr_d", "lr_g"} < log("whole")[0].keys()


OPTIONS = [dict(parts=2), dict(precision="bf16"), dict(channels_last=True),
           dict(parts=2, precision="bf16", channels_last=True)]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_stopping_changes_nothing_with_options(option, tmp_path):
    cfg = replace(CFG, steps=4, save_every=1, lazy=2, **option)
    for record in train_ddgan(*images(), digit_rows(), cfg, tmp_path/"whole"): pass
    for record in train_ddgan(*images(), digit_rows(), cfg, tmp_path/"parts"):
        if record.step == 2: break
    for record in train_ddgan(*images(seed=1), digit_rows(), cfg, tmp_path/"parts"): pass
    assert states("parts").equal(states("whole")) and log("parts") == log("whole")
    flat = torch.cat([p.flatten() for net in (record.net, record.disc, record.ema) for p in net.parameters()])
    assert flat.dtype == torch.float32 and flat.isfinite().all()


def command(*args, processes:int=1) -> list[str]:
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
              "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"] if processes > 1 else []
    return [sys.executable, *launch, "-m", "fastdiff_edu", "train", *args]


def trained(*args, processes:int=1) -> str:
    quiet = dict(env=ENV, capture_output=True, text=True, timeout=240)
    done = subprocess.run(command(*args, processes=processes), **quiet)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_sigterm_and_sigkill_leave_no_trace():
    args = ("gaussians-ddgan", "--size", "tiny", "--sheet-every", "0", "--steps", "400", "--save-every", "40",
            "--log-every", "1", "--lazy", "3")
    trained(*args, "--out", "whole")
    for sign, least in ((signal.SIGTERM, 30), (signal.SIGKILL, 120)):
        p = subprocess.Popen(command(*args, "--out", "stopped"), env=ENV, stderr=subprocess.DEVNULL)
        while len(read_log("stopped")) < least and p.poll() is None: time.sleep(0.01)
        p.send_signal(sign)
        code, step = p.wait(60), load_checkpoint("stopped").manifest["step"]
        assert code == (128 + sign if sign == signal.SIGTERM else -sign) and step < 400
        assert sign == signal.SIGKILL or step >= least, "SIGTERM saves where it is"
    trained(*args, "--out", "stopped")
    assert states("stopped").equal(states("whole")) and log("stopped") == log("whole")
    modes = [json.loads(Path(out, "modes.json").read_text()) for out in ("whole", "stopped")]
    assert all(m.pop("seconds") > 0 for m in modes) and modes[0] == modes[1]


# --- what ends or refuses a run

class Poisoned(PointDiscriminator):
    "A discriminator whose answers are not finite from a call on."
    calls, last_good = 0, 3*5                            # an update asks three times: real, fake, fake

    def forward(self, *args, **kwargs):
        self.calls += 1
        return super().forward(*args, **kwargs)/(self.calls <= self.last_good)


def test_a_number_that_is_not_finite_names_its_step(tmp_path):
    gen, _ = points()
    with pytest.raises(RunFailed, match="Step 6 has the d loss .* the g loss .* last good .*step_00000004"):
        for record in train_ddgan(gen, Poisoned(PointConfig(width=16)), POINTS, CFG, tmp_path): pass


def test_a_folder_of_another_kind_is_refused(tmp_path):
    alone = (diffusion_loss(SCHEDULE), MLP(MLPConfig(width=8)), POINTS, TrainConfig(3, batch=16, bar=False))
    fit(*alone, tmp_path/"one")
    for record in train_ddgan(*points(), POINTS, CFG, tmp_path/"two"): pass
    with pytest.raises(BadInput, match="'.*one' holds another run .*: give another folder"):
        next(train_ddgan(*points(), POINTS, CFG, tmp_path/"one"))
    with pytest.raises(BadInput, match="'.*two' holds another run .*: give another folder"):
        fit(*alone, tmp_path/"two")
    other = PointDiscriminator(PointConfig(width=8))
    with pytest.raises(BadInput, match="disc.config.width is 16 there and 8 here"):
        next(train_ddgan(points()[0], other, POINTS, CFG, tmp_path/"two"))


@pytest.mark.parametrize("args, words", [
    (("cifar10-ddgan", "--batch", "6"), "Got 6 rows in each part of a batch, for a discriminator that"),
    (("cifar10-ddgan", "--batch", "12", "--parts", "2"), "Got 6 rows in each part"),
    (("digits-ddgan", "--net.n-labels", "0"), "Got net.n_labels = 0 and disc.n_labels = 10: make them equal"),
    (("cifar10-ddgan", "--net.size", "32"), "Got net.size = 32 and disc.size = 16"),
    (("cifar10-ddgan", "--T", "0"), "Got T = 0"),
    (("cifar10-ddgan", "--lazy", "0"), "Got lazy = 0"),
    (("cifar10-ddgan", "--gamma", "-1"), "Got gamma = -1.0"),
    (("cifar10-ddgan", "--lr-d", "0"), "Got lr_d = 0.0"),
    (("cifar10-ddgan", "--lr", "1"), "Unknown flag '--lr': did you mean '--"),
    (("cifar10-ddgan", "--compile",), "Unknown flag '--compile'"),
    (("cifar10-ddgan", "--schedule", "vp"), "Got 'vp' as a schedule"),
    (("gaussians-ddgan", "--sheet-every", "-1"), "Got sheet_every = -1"),
    (("gaussians-ddgan", "--data", "digits"), "Unknown flag '--data'"),
])
def test_bad_arguments_are_one_sentence_and_leave_nothing(args, words, tmp_path, capsys):
    assert main(["train", args[0], "--size", "tiny", *args[1:]]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == []


# --- the discriminator's gradient penalty

@pytest.mark.parametrize("group", [0, 4])
def test_r1_is_the_slope_and_has_a_gradient(group):
    "Against finite differences along one direction, in float64; without comparing rows as well as with it."
    _, disc = images(group, labels=0)
    disc = disc.double()
    for p in disc.parameters(): p.data = torch.randn(p.shape, dtype=p.dtype, generator=seeded(1, len(p))) / 4
    x_u, x_t, way = torch.randn(3, 4, 1, 8, 8, dtype=torch.double, generator=seeded(2, "x"))
    t, h = torch.full((4,), 0.5, dtype=torch.double), 1e-5
    x_u.requires_grad_()
    penalty = r1_penalty(disc(x_u, x_t, t), x_u, 2.0)
    slope, = torch.autograd.grad(disc(x_u, x_t, t).sum(), x_u)
    along = (disc(x_u + h*way, x_t, t) - disc(x_u - h*way, x_t, t)).sum() / (2*h)
    assert_close((slope*way).sum(), along, rtol=1e-6, atol=1e-9)
    assert_close(penalty, slope.square().sum() / 4, rtol=1e-9, atol=0)
    weight = disc.first.weight
    found, = torch.autograd.grad(penalty, weight, allow_unused=False)
    away = torch.randn(weight.shape, dtype=weight.dtype, generator=seeded(3, "w"))
    ends = []
    for sign in (1, -1):
        weight.data += sign*h*away
        ends.append(r1_penalty(disc(x_u, x_t, t), x_u, 2.0).item())
        weight.data -= sign*h*away
    assert (found*away).sum().item() == pytest.approx((ends[0] - ends[1]) / (2*h), rel=1e-5)


@pytest.mark.parametrize("group", [0, 4])
def test_r1_is_added_in_its_turn_alone(group):
    (gen, disc), batch = images(group), digit_rows(8)
    disc.last.weight.data.normal_(generator=seeded(0, "last"))   # at its start D is flat
    losses = {}
    for s in (0, 1, 15):
        for gamma in (0., 5.):
            turn = d_turn(gen, DDGANConfig(30, batch=8, gamma=gamma, lazy=15), s)
            losses[s, gamma] = turn(disc, batch, seeded(0, "turn"))
    assert losses[1, 5.] == losses[1, 0.] and losses[0, 5.] == losses[15, 5.] > losses[0, 0.] == losses[1, 0.]
    losses[0, 5.].backward()
    assert all(p.grad is not None for p in disc.parameters()), "no weight is left out"


# --- several processes

@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.parametrize("group", [0, 4])
def test_two_processes_are_one_in_two_parts(group):
    "The spread over a batch is one over each part: parts are the same rows whoever has them."
    args = ("digits-ddgan", "--size", "tiny", "--sheet-every", "0", "--steps", "8", "--lazy", "3",
            "--disc.group", str(group))
    trained(*args, "--parts", "2", "--out", "one")
    assert trained(*args, "--out", "two", processes=2).count("8 steps") == 1     # one process speaks
    assert_close(states("two"), states("one"), rtol=1e-3, atol=1e-5)
    for a, b in zip(log("one"), log("two"), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


# --- recipes

def test_from_training_to_numbers(tmp_path, capsys):
    "Digits with classes, by the commands that a person types."
    assert main(["train", "digits-ddgan", "--size", "tiny"]) == 0
    run = tmp_path/"runs/digits-ddgan-tiny"
    assert len(list((run/"sheets").glob("*.png"))) == 2 and (run/"loss.png").stat().st_size > 1000
    assert log(run)[-1]["step"] == 24 and all(math.isfinite(v) for line in log(run) for v in line.values())
    assert main(["sample", str(run), "--n", "20", "--labels", "3", "7", "--out", "few"]) == 0
    made = json.loads((tmp_path/"few/samples.json").read_text())
    assert (made["method"], made["steps"], made["evaluations"], made["labels"]) == ("ddpm", 4, 4, [3, 7])
    assert np.load("few/samples.npy").shape == (20, 1, 8, 8) and (tmp_path/"few/sheet.png").is_file()
    small = ("--n", "60", "--kid-size", "20", "--kid-subsets", "5", "--splits", "2", "--out", "numbers")
    assert main(["evaluate", str(run), *small]) == 0
    numbers = json.loads((tmp_path/"numbers/evaluation.json").read_text())["numbers"]
    assert set(numbers) == {"fid", "is", "kid", "precision", "recall"}
    fid = numbers["fid"]
    assert fid["protocol"]["made"]["steps"] == 4 and fid["value"] > fid["real"]
    capsys.readouterr()
    no_bits = "evaluate", str(run), "--metrics", "bits", "--out", "refused"
    for args, words in ((no_bits, "leave 'bits' out"),
                        (("export", str(run), "published"), "holds a generator"),
                        (("sample", str(run), "--method", "ddim"), "leave --method and --spacing out"),
                        (("sample", str(run), "--steps", "8"), "was trained for 4"),
                        (("sample", str(run), "--labels", "11"), "knows 0 to 9")):
        assert main([*args]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1
    assert not (tmp_path/"published").exists() and not (tmp_path/"refused").exists()


@pytest.mark.parametrize("T", [1, 2, 8])
def test_steps_are_a_flag(T):
    few = ("--size", "tiny", "--steps", "3", "--sheet-every", "1")
    assert main(["train", "digits-ddgan", *few, "--T", str(T)]) == 0
    x, made = generate(SampleConfig("runs/digits-ddgan-tiny", n=10), bar=False)
    assert made["evaluations"] == made["steps"] == made["loss"]["steps"] == T and x.isfinite().all()


def test_labels_reach_both_players():
    "Each player answers differently to another class, and its table of classes learns."
    assert main(["train", "digits-ddgan", "--size", "tiny", "--steps", "8"]) == 0
    found, x = load_checkpoint("runs/digits-ddgan-tiny"), torch.randn(4, 1, 8, 8)
    tiny, t = RECIPES["digits-ddgan"]().tiny(), torch.ones(4)
    for which, net in zip(("net", "disc"), build(tiny, torch.device("cpu"))):
        tables = found.tensors(which)["label.table.weight"], net.state_dict()["label.table.weight"]
        learned = (tables[0] != tables[1]).any(1)
        assert not learned[0] and learned.sum() > 6, f"{which}: classes that were seen, not the row for none"
    model = open_model("runs/digits-ddgan-tiny", "net").model
    a, b = (model(x, t, z=torch.ones(4, 8), y=torch.full((4,), y)).x0 for y in (1, 2))
    assert not a.equal(b)


def test_batches_do_not_matter_where_that_is_promised():
    "Starts are the same for every batch size; latents are drawn batch by batch, as a random rule's noise is."
    for record in train_ddgan(*points(), POINTS, replace(CFG, T=1), "run"): pass
    x = {(n, b): generate(SampleConfig("run", n=n, batch=b), bar=False)[0] for n in (4, 6) for b in (4, 6)}
    assert x[6, 4][:4].equal(x[4, 4]) and not x[6, 6].equal(x[6, 4])
    assert x[6, 4].equal(generate(SampleConfig("run", n=6, batch=4), bar=False)[0])


def test_dry_run_counts_both_and_writes_nothing(tmp_path, capsys):
    assert main(["train", "cifar10-ddgan", "--size", "tiny", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "weights, 24 steps of 8 rows" in said and "(the mean of 15 steps)" in said and ", sheets" in said
    assert list(tmp_path.iterdir()) == []
    both, nets = rehearse(RECIPES["gaussians-ddgan-paper"]().tiny(), seconds=1e-9), points(width=512)
    n = [sum(p.numel() for p in net.parameters()) for net in (nets[0].net, nets[1])]
    assert f"{n[0]:,} and {n[1]:,} weights" in both and "estimated from a step on one row" in both
    assert f"2 checkpoints of {4e-6*(3*sum(n) + n[0]):,.0f} MB" in both
