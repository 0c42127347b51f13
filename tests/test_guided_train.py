"Guided distillation from commands to numbers and edited pictures: stopped, taken up, shared and refused."
import json, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest, torch
import torch.distributed as dist
from PIL import Image
from tiny import TINY
from torch.testing import assert_close

from fastdiff_edu.cli import main
from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.data import digits, to_uint8
from fastdiff_edu.denoiser import Clipped, Denoiser, diffusion_loss
from fastdiff_edu.distill import progressive_distillation
from fastdiff_edu.edit import encoding_loss
from fastdiff_edu.generate import SampleConfig, generate, start_noise
from fastdiff_edu.guidance import ClassifierFree, ClassifierGuided, Unlabelled, noisy_class_loss
from fastdiff_edu.guided_distill import GuidedDenoiser, stochastic_step
from fastdiff_edu.models import load_model, open_classifier, open_model
from fastdiff_edu.nets.encoder import Encoder
from fastdiff_edu.nets.unet import UNet
from fastdiff_edu.recipes import RECIPES
from fastdiff_edu.retouch import write_png
from fastdiff_edu.sample import ddim_step, sample_last
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.students import chain_for
from fastdiff_edu.train import TrainConfig, fit, load_checkpoint, read_log

pytestmark = pytest.mark.usefixtures("in_a_folder")
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
FEW = ("--guided", "--from", "4", "--to", "1", "--batch", "8", "--steps", "12", "--late-steps", "12", "--lr",
       "1e-3", "--first-steps", "16", "--first-warmup", "2", "--first-ema", "0.9", "--log-every", "1",
       "--save-every", "5", "--sheet-every", "0", "--no-bar")
STAGES = ("stage-one", "student-2", "student-1")


def teacher(out="teacher", drop=0.1, labels=10) -> str:
    "A few updates of a tiny network that learned with classes and without."
    torch.manual_seed(0)
    x, y = torch.rand(32, 1, 8, 8, generator=seeded(0, "data")) * 2 - 1, torch.arange(32) % 10
    net = UNet(TINY) if labels else UNet(type(TINY)(**{**vars(TINY), "n_labels": 0}))
    cfg = TrainConfig(12, batch=8, lr=0.01, warmup=0, bar=False)
    loss = diffusion_loss(Schedule.cosine(), "v", "snr_plus_1", drop=drop)
    fit(loss, net, (x, y) if labels else x, cfg, out)
    return out


def distill(*args) -> list[str]:
    return [sys.executable, "-m", "fastdiff_edu", "distill", "teacher", *FEW, *args]


def done(command:list[str]) -> str:
    ended = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=400)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def state(folder) -> torch.Tensor:
    found = [load_checkpoint(folder).tensors(which) for which in ("net", "ema", "optimizer")]
    return torch.cat([tensors[k].flatten() for tensors in found for k in sorted(tensors)])


def state_of(model) -> torch.Tensor:
    return torch.nn.utils.parameters_to_vector(model.net.parameters()).detach()


def log(folder) -> list[dict]:
    timings = ("seconds", "images_per_second")
    return [{k: v for k, v in line.items() if k not in timings} for line in read_log(folder)]


def picture(file="three.png") -> torch.Tensor:
    write_png(Path(file), digits("test").x[2].numpy())
    return digits("test").x[2]


def refused(capsys, *args) -> str:
    "What the command says to bad arguments, in one line."
    before = {*Path().rglob("*")}
    assert main([*args]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and {*Path().rglob("*")} == before
    return said.removeprefix("fastdiff: ").strip()


# --- from a command to numbers and pictures

def test_from_a_teacher_to_edited_pictures(tmp_path, capsys):
    "By the commands that a person types: a teacher, both stages, samples at a weight, numbers, two edits."
    for name in ("digits", "digits-guided-distill"): assert main(["train", name, "--size", "tiny"]) == 0
    chain = tmp_path/"runs/digits-guided-distill-tiny"
    names = {"stage-one", "student-4", "student-2", "student-1", "recipe.json", "chain.json", "stages.png",
             "w.png", "loss.png"}
    assert {p.name for p in chain.iterdir()} == names
    of = lambda where: json.loads((tmp_path/where/"samples.json").read_text())
    assert main(["sample", str(chain/"student-2"), "--w", "2", "--n", "6", "--out", "few"]) == 0
    made = of("few")
    assert (made["method"], made["steps"], made["evaluations"], made["w"]) == ("ddim", 2, 2, 2.)
    assert made["loss"]["w_range"] == [0., 4.] and made["loss"]["between"]
    dice = ("--method", "stochastic", "--w", "2", "--n", "6", "--out", "dice")
    assert main(["sample", str(chain/"student-2"), *dice]) == 0
    assert (of("dice")["steps"], of("dice")["evaluations"]) == (4, 4)
    pair = ("--w", "2", "--interval", "0.2", "0.8", "--steps", "5", "--n", "6", "--out", "pair")
    assert main(["sample", "runs/digits-tiny", *pair]) == 0
    assert of("pair")["evaluations"] == 5 + 4        # guided at 0.8, 0.6, 0.4 and 0.2
    assert of("pair")["interval"] == [0.2, 0.8]
    small = ("--n", "60", "--kid-size", "20", "--kid-subsets", "5", "--splits", "2", "--out", "numbers")
    assert main(["evaluate", str(chain/"student-4"), *small, "--w", "1"]) == 0
    fid = json.loads((tmp_path/"numbers/evaluation.json").read_text())["numbers"]["fid"]
    assert fid["protocol"]["made"]["w"] == 1. and fid["protocol"]["made"]["steps"] == 4
    x = picture()
    hole = ("--box", "2", "0", "3", "8", "--label", "3", "--w", "1", "--n", "4", "--resample", "2")
    assert main(["edit", "inpaint", str(chain/"student-4"), "three.png", *hole, "--out", "hole"]) == 0
    filled, known = np.load("hole/edited.npy"), json.loads(Path("hole/edit.json").read_text())
    assert filled.shape == (4, 1, 8, 8)
    assert (known["evaluations"], known["w"], known["labels"]) == (8, 1., [3])
    outside = np.delete(np.arange(8), slice(2, 5))
    assert (filled[:, :, outside] == x.numpy()[:, outside]).all(), "known pixels survive exactly"
    assert (filled[0, :, 2:5] != filled[1, :, 2:5]).any()
    assert (np.array(Image.open("hole/edited-2.png")) == filled[2, 0]).all()
    assert Path("hole/sheet.png").stat().st_size > 1000
    turn = ("--from-label", "3", "--to-label", "8", "--encoder", "runs/digits-tiny", "--w", "2")
    assert main(["edit", "translate", str(chain/"student-4"), "three.png", *turn, "--out", "turned"]) == 0
    known = json.loads(Path("turned/edit.json").read_text())
    assert known["evaluations"] == 4 + 20 and known["encoder"]["labels"] == [3] and known["labels"] == [8]
    assert known["encoder"]["weights"]["sha256"] == open_model("runs/digits-tiny").weights["sha256"]


def test_a_weight_of_zero_is_the_conditional_model():
    teacher()
    drawn = lambda w: generate(SampleConfig("teacher", steps=5, n=6, w=w), bar=False)
    plain, zero, two = map(drawn, (None, 0., 2.))
    assert plain[0].equal(zero[0]) and not plain[0].equal(two[0])
    assert (zero[1]["evaluations"], two[1]["evaluations"]) == (5, 10) and "w" not in plain[1]
    net = load_model("teacher")
    x, y, grid = start_noise((1, 8, 8), 0, range(6)), torch.arange(6), net.schedule.grid(5)
    by_hand = sample_last(ddim_step(), Clipped(ClassifierFree(net, 2.)), x, grid, y=y)
    assert_close(two[0], by_hand)


def test_students_are_sampled_as_they_learned():
    "The weight reaches the network, and the stochastic sampler takes twice the steps."
    teacher()
    assert main(["distill", "teacher", *FEW, "--out", "chain"]) == 0
    student = load_model("chain/student-2")
    assert isinstance(student, GuidedDenoiser) and student.w_range == (0., 4.)
    x, y = start_noise((1, 8, 8), 0, range(6)), torch.arange(6)
    one = generate(SampleConfig("chain/student-2", n=6, w=3.), bar=False)[0]
    assert_close(one, sample_last(ddim_step(), Clipped(student), x, student.schedule.grid(2), y=y, w=3.))
    dice = generate(SampleConfig("chain/student-2", "stochastic", n=6, w=3.), bar=False)[0]
    walk, grid = seeded(0, "walk", 0), student.schedule.grid(4)
    assert_close(dice, sample_last(stochastic_step(), Clipped(student), x, grid, walk, y=y, w=3.))
    first = generate(SampleConfig("chain/stage-one", "heun", steps=3, n=6, w=1.), bar=False)
    assert first[0].isfinite().all() and first[1]["evaluations"] == 5


def test_every_stage_names_its_teacher_and_its_range():
    teacher()
    assert main(["distill", "teacher", *FEW, "--w-min", "0.5", "--w-max", "2", "--out", "chain"]) == 0
    told, before = json.loads(Path("chain/chain.json").read_text()), open_model("teacher").weights["sha256"]
    assert told["teacher"]["sha256"] == told["teacher"]["named"] == before and told["teacher"]["steps"] == 4
    for name, n, link in zip(STAGES, (None, 2, 1), told["students"], strict=True):
        known = load_checkpoint(f"chain/{name}").manifest
        assert known["loss"]["teacher"]["sha256"] == before and known["loss"]["w_range"] == [0.5, 2.]
        assert known["loss"].get("steps") == n and known["net"]["config"]["w_waves"] == 64
        before = known["files"]["ema.safetensors"]["sha256"]
        assert (link["folder"], link["steps"], link["sha256"]) == (name, n, before)
    assert load_checkpoint("chain/stage-one").manifest["step"] == 16
    one, two = (load_checkpoint(f"chain/{name}").manifest for name in STAGES[:2])
    assert one["loss"]["drop"] == two["loss"]["drop"] == 0., "students are always told the class"
    assert (one["config"]["anneal"], two["config"]["anneal"]) == (False, True)
    again = ["distill", "chain/stage-one", "--from", "4", "--to", "2", "--steps", "12", "--late-steps", "12",
             "--batch", "8", "--lr", "1e-3", "--log-every", "1", "--sheet-every", "0", "--no-bar"]
    assert main([*again, "--between", "--out", "later"]) == 0
    one, other = (load_checkpoint(f"{out}/student-2").tensors("net") for out in ("chain", "later"))
    assert all(one[k].equal(other[k]) for k in one), "its halvings can be made later"


# --- stop and go on

@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
def test_signals_inside_both_stages_leave_no_trace():
    teacher()
    long = ("--first-steps", "60", "--steps", "60", "--late-steps", "60", "--to", "2", "--save-every", "20")
    done(distill(*long, "--out", "whole"))
    for name, sign, least in (("stage-one", signal.SIGTERM, 10), ("stage-one", signal.SIGKILL, 30),
                              ("student-2", signal.SIGKILL, 10), ("student-2", signal.SIGTERM, 30)):
        p = subprocess.Popen(distill(*long, "--out", "stopped"), env=ENV, stderr=subprocess.DEVNULL)
        while len(read_log(f"stopped/{name}")) < least and p.poll() is None: time.sleep(0.01)
        p.send_signal(sign)
        code, step = p.wait(60), load_checkpoint(f"stopped/{name}").manifest["step"]
        assert code == (128 + sign if sign == signal.SIGTERM else -sign) and step < 60
        assert sign == signal.SIGKILL or step >= least, "SIGTERM saves where it is"
    done(distill(*long, "--out", "stopped"))
    for part in STAGES[:2]:
        one, other = f"stopped/{part}", f"whole/{part}"
        assert state(one).equal(state(other)) and log(one) == log(other)
    assert Path("stopped/chain.json").read_bytes() == Path("whole/chain.json").read_bytes()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo")
def test_two_processes_are_one_in_two_parts():
    teacher()
    few = ("--first-steps", "6", "--steps", "4", "--late-steps", "4", "--to", "2")
    done(distill(*few, "--parts", "2", "--out", "one"))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend",
              "c10d", "--rdzv-endpoint", "localhost:0"]
    command = distill(*few, "--out", "two")
    assert done([command[0], *launch, *command[1:]]).count("10 steps") == 1       # one process speaks
    for part in STAGES[:2]: assert_close(state(f"two/{part}"), state(f"one/{part}"), rtol=1e-3, atol=1e-5)


def test_dry_run_counts_both_stages_and_needs_no_teacher(tmp_path, capsys):
    assert main(["train", "digits-guided-distill", "--size", "tiny", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "weights, 60 steps of 8 rows" in said and "8 checkpoints of" in said
    assert not list(tmp_path.iterdir())


# --- edits

def test_a_mask_says_what_is_filled():
    teacher()
    x, white = picture(), np.zeros((8, 8), np.uint8)
    white[1:4, 2:7] = 255
    Image.fromarray(white).save("mask.png")
    for out, hole in (("mask", ("--mask", "mask.png")), ("box", ("--box", "1", "2", "3", "5"))):
        args = ("--label", "3", "--n", "2", "--steps", "3", "--method", "ddpm", "--out", out)
        assert main(["edit", "inpaint", "teacher", "three.png", *hole, *args]) == 0
    one, other = np.load("mask/edited.npy"), np.load("box/edited.npy")
    assert (one == other).all() and (one == x.numpy()).reshape(2, 8, 8)[:, white == 0].all()
    assert (one != x.numpy()).reshape(2, 8, 8)[:, white > 0].any()


def test_students_that_encode_walk_up(capsys):
    "By commands: each encodes for a student of the same teacher, makes no samples, and learned the lesson."
    teacher()
    few = ("--from", "4", "--to", "2", "--batch", "8", "--steps", "4", "--late-steps", "4", "--no-bar")
    plain = ("--sheet-every", "0", "--compare", "--out", "down")
    assert main(["distill", "teacher", *few, *plain]) == main(["distill", "teacher", *few, "--up"]) == 0
    up = Path("runs/encode-teacher")
    names = {"student-2", "recipe.json", "chain.json", "encoded.png", "loss.png"}
    assert {p.name for p in up.iterdir()} == names
    picture()
    translate = ("edit", "translate", "down/student-2", "three.png", "--from-label", "3", "--to-label", "8")
    assert main([*translate, "--encoder", f"{up}/student-2", "--out", "turned"]) == 0
    assert json.loads(Path("turned/edit.json").read_text())["evaluations"] == 4
    half = ("--encoder", f"{up}/student-2", "--strength", "0.5", "--out", "half")
    assert main([*translate, *half]) == 0
    said = json.loads(Path("half/edit.json").read_text())
    assert (said["evaluations"], said["strength"]) == (2, 0.5)
    assert main(["sample", f"{up}/student-2"]) == 2 and main(["export", f"{up}/student-2", "p"]) == 2
    capsys.readouterr()
    both = refused(capsys, "distill", "teacher", "--up", "--guided")
    assert "make no samples: leave --guided, --compare and" in both
    assert "take its own teacher" in refused(capsys, "distill", f"{up}/student-2")
    assert "learned few big steps down" in refused(capsys, "distill", "down/student-2", "--up")
    chain = replace(chain_for("teacher", up=True), start=4, end=2, steps=4, late_steps=4, batch=8, bar=False)
    data, cfg = chain.rows(), chain.training
    *_, stage = progressive_distillation(load_model("teacher"), cfg, data, lesson=encoding_loss)
    assert_close(state_of(stage.model), state_of(load_model(up/"student-2")), rtol=0, atol=0)


def test_noise_is_added_up_to_the_strength():
    "A little noise keeps the picture; each seed is another variant."
    teacher()
    x, far = picture(), []
    for strength in ("0.02", "1"):
        args = ("--route", "noise", "--strength", strength, "--to-label", "3", "--n", "3", "--out", strength)
        assert main(["edit", "translate", "teacher", "three.png", *args]) == 0
        made = torch.from_numpy(np.load(f"{strength}/edited.npy")).float()
        far.append((made - x).abs().mean().item())
        assert not made[0].equal(made[1])
    assert far[0] < 10 < far[1]


# --- what is refused

def test_what_cannot_be_guided_is_refused_in_one_sentence(capsys):
    teacher(), teacher("always", drop=0.), teacher("unlabelled", labels=0)
    assert main(["distill", "teacher", *FEW, "--to", "2", "--out", "chain"]) == 0
    plain = ("--from", "4", "--to", "2", "--batch", "8", "--steps", "2", "--late-steps", "2")
    assert main(["distill", "teacher", *plain, "--sheet-every", "0", "--out", "plain"]) == 0
    capsys.readouterr()
    two, sampled = "chain/student-2", ("sample", "chain/student-2", "--out", "no")
    says = {
        (*sampled, "--w", "5"): "Got w = 5: this student was trained for w from 0 to 4.",
        ("sample", "runs/missing"): "There is no 'runs/missing'",
        (*sampled, "--labels", "-1"): "was never trained without labels (drop = 0)",
        (*sampled, "--guidance-scale", "2"): "give --w, which is 0 where a scale of guidance is 1",
        (*sampled, "--w", "-1"): "Got w = -1: this student was trained for w from 0 to 4.",
        (*sampled, "--w", "1", "--interval", "0", "0.5"): "only a guided pair has one",
        ("sample", "plain/student-2", "--method", "stochastic"): "was not asked halfway",
        (*sampled, "--method", "stochastic", "--steps", "3"): "give a divisor of 4",
        ("sample", "unlabelled", "--w", "1", "--out", "no"):
            "'unlabelled' is unconditional: without classes there is nothing to guide by.",
        ("sample", "always", "--w", "1", "--out", "no"):
            "'always' was never trained without labels (drop = 0.0): only a training with --drop 0.1, for "
            "instance, can be guided.",
        ("sample", "plain/student-2", "--w", "1"): "is a student of 2 steps that takes no guidance weight",
        ("sample", "teacher", "--w", "nan", "--out", "no"): "Got w = nan: give a",
        ("sample", "teacher", "--w", "2", "--labels", "-1", "--out", "no"): "Got w without a class",
        ("sample", "teacher", "--interval", "0.9", "0.1", "--out", "no"): "Got the interval 0.9 to 0.1",
        ("sample", "teacher", "--interval", "0.1", "0.9", "--out", "no"): "only a guided pair has one",
        ("sample", "teacher", "--prompt", "a seven", "--out", "no"): "a network that knows 0 words",
        ("evaluate", "teacher", "--w", "1", "--metrics", "bits", "--out", "no"): "a model's without guidance",
        ("distill", "unlabelled", "--guided"): "'unlabelled' is unconditional",
        ("distill", "always", "--guided"): "'always' was never trained without labels",
        ("distill", "plain/student-2", "--guided"): "takes no guidance weight",
        ("distill", "chain/stage-one", "--guided"): "takes the guidance weight already",
        ("distill", "teacher", *FEW, "--w-max", "-1"): "the smaller one first",
        ("distill", "teacher", *FEW, "--sheet-w", "7"): "Got sheet_w = 7",
        ("distill", "teacher", "--first-steps", "3"): "'--first-steps' is of stage one: give --guided",
        ("export", two, "p"): "A UNet2DModel hears no guidance weight, as here with w_waves = 64.",
    }
    for args, words in says.items(): assert words in refused(capsys, *args), args


def test_what_cannot_be_edited_is_refused_in_one_sentence(capsys):
    teacher(), teacher("always", drop=0.), picture()
    Image.new("L", (4, 8), 255).save("narrow.png"), Image.new("L", (8, 8), 0).save("black.png")
    Image.new("RGB", (8, 8)).save("colour.png")
    fill, box = ("edit", "inpaint", "teacher", "three.png"), ("--box", "0", "0", "4", "8")
    turn = ("edit", "translate", "teacher", "three.png")
    says = {
        (*fill, "--mask", "narrow.png"):
            "The mask 'narrow.png' has 4 x 8 pixels, the picture 8 x 8: make them equal.",
        (*fill, "--mask", "black.png"): "black everywhere",
        (*fill, "--mask", "none.png"): "'none.png' is missing or no .png",
        (*fill,): "Give the hole by --mask or by --box",
        (*fill, *box, "--mask", "black.png"): "Give the hole by --mask or by --box",
        (*fill, "--box", "6", "0", "4", "8"): "have to lie in 8 x 8 pixels",
        (*fill, *box, "--label", "12"): "knows 0 to 9",
        (*fill, *box, "--resample", "0"): "Got resample = 0",
        (*fill, *box, "--method", "rk45"): "Unknown method for an edit 'rk45'",
        ("edit", "inpaint", "teacher", "narrow.png", *box): "'narrow.png' has 4 x 8 pixels: this",
        ("edit", "inpaint", "teacher", "colour.png", *box): "'colour.png' has the colours RGB",
        ("edit", "inpaint", "always", "three.png", *box): "never trained without labels: say which class",
        (*turn, "--to-label", "3", "--strength", "1.5"): "Got a strength of 1.5",
        (*turn, "--to-label", "3", "--route", "noise", "--strength", "0"): "Got a strength of 0",
        (*turn, "--to-label", "3", "--route", "noise", "--n", "0"): "Got n = 0",
        ("edit", "inpaint", "teacher", "three.png", *box, "--w", "2"): "Got w without a class",
        (*turn, "--to-label", "3", "--n", "4"): "which has no dice",
        (*turn, "--route", "noise", "--strength", "1.5"): "Got a strength of 1.5",
        (*turn, "--route", "noise", "--from-label", "3"): "Got --from-label for the route noise",
        (*turn, "--route", "noise", "--encoder", "always"): "Got --encoder for the route noise",
        (*turn, "--from", "33"): "Got --from-label 33: 'teacher' knows 0 to 9, and -1 for none.",
        (*turn, "--to-label", "33"): "Got --to-label 33: 'teacher' knows 0 to 9",
        ("edit", "inpaint", "always", "three.png", *box, "--label", "-1"): "which class it is, by --label",
        ("edit", "inpiant", "teacher", "three.png"): "did you mean 'inpaint'",
        ("edit",): "say fastdiff edit inpaint or translate",
    }
    for args, words in says.items(): assert words in refused(capsys, *args), args


def test_a_noisy_classifier_makes_no_samples(capsys):
    x = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    cfg = TrainConfig(2, batch=8, bar=False)
    fit(noisy_class_loss(Schedule.cosine()), Encoder(TINY), x, cfg, "classifier")
    assert "tells classes of noisy images apart" in refused(capsys, "sample", "classifier")
    guide, noisy = open_classifier("classifier"), torch.randn(3, 1, 8, 8)
    model = ClassifierGuided(Unlabelled(load_model(teacher())), guide, 2.)
    assert model(noisy, 0.5, y=torch.tensor([0, 3, 9])).x0.isfinite().all()
    with pytest.raises(BadInput, match="is no classifier of noisy images"): open_classifier("teacher")


def test_words_are_a_prompt(capsys):
    assert main(["train", "digits-captions", "--size", "tiny"]) == 0
    run = "runs/digits-captions-tiny"
    assert main(["distill", run, "--guided", "--from", "2", "--to", "1", "--size", "tiny"]) == 0
    for ckpt, passes in ((run, 40), ("runs/guided-digits-captions-tiny/student-1", 1)):
        for w in ("0", "2"):
            asked = ["sample", ckpt, "--prompt", "an odd number", "--w", w, "--n", "4", "--out", f"odd-{w}"]
            assert main(asked) == 0
        said = json.loads(Path("odd-2/samples.json").read_bytes())
        assert said["prompt"] == "an odd number" and said["evaluations"] == passes
    assert "Unknown word 'zebra'" in refused(capsys, "sample", run, "--prompt", "an odd zebra")
    assert "give it a --prompt" in refused(capsys, "sample", run, "--w", "1")
    assert "true of no digit" in refused(capsys, "sample", run, "--prompt", "an odd even number")
    assert main(["sample", "runs/guided-digits-captions-tiny/student-1", "--n", "4", "--out", "silent"]) == 0
    picture()
    said = refused(capsys, "edit", "translate", run, "three.png", "--from-label", "7", "--prompt", "a one")
    assert "knows no classes: leave --from-label out" in said
    box = ("--box", "4", "0", "4", "8", "--prompt", "a handwritten three", "--out", "filled")
    assert main(["edit", "inpaint", run, "three.png", *box]) == 0
    assert main(["train", "digits-captions", "--size", "tiny", "--dry-run"]) == 0


def test_a_finished_chain_is_not_begun_anew(capsys):
    "Another length of stage one would leave its students with a teacher that is no longer theirs."
    teacher()
    command = ("distill", "teacher", *FEW, "--to", "2", "--out", "chain")
    assert main([*command]) == 0
    before = state("chain/stage-one")
    said = refused(capsys, *command, "--first-steps", "20")
    assert "students of a stage one of 16 updates, not of 20" in said
    assert main([*command]) == 0 and state("chain/stage-one").equal(before)


def test_a_student_of_one_weight_needs_none_given(capsys):
    teacher()
    for out, low, high in (("one", "2", "2"), ("far", "2", "3"), ("near", "0", "0.5")):
        weights = ("--w-min", low, "--w-max", high)
        assert main(["distill", "teacher", *FEW, "--to", "2", *weights, "--out", out]) == 0
    assert main(["sample", "one/student-2", "--n", "4", "--out", "drawn"]) == 0
    assert json.loads(Path("drawn/samples.json").read_bytes())["w"] == 2.
    assert "from 2 to 3: give it one, by --w" in refused(capsys, "sample", "far/student-2")
    assert main(["sample", "near/student-2", "--n", "4", "--out", "near-0"]) == 0
    assert json.loads(Path("near-0/samples.json").read_bytes())["w"] == 0.


def test_a_256_pixel_checkpoint_suggests_the_settings_of_its_kind():
    large = replace(TINY, size=256, mult=(1,) * 6, n_labels=2)
    model = Denoiser(UNet(large), Schedule.cosine_iddpm(1024), "v")
    loss = diffusion_loss(model.schedule, "v", "snr_plus_1", 1024, drop=0.1)
    x = torch.rand(2, large.in_ch, 256, 256) * 2 - 1, torch.arange(2)
    fit(loss, model.net, x, TrainConfig(1, batch=1, bar=False), "large")
    for guided in (False, True):
        chain = chain_for("large", guided)
        assert (chain.batch, chain.lr, chain.weight, chain.guided) == (3, 1.5e-5, "snr_plus_1", guided)
        assert chain.start == 1024 and not chain.raw and chain.data == "data/celebahq256/train"


def test_an_attribute_needs_labels(capsys):
    "A folder of images has none: said before anything is trained."
    Path("faces").mkdir()
    for k in range(4): Image.new("RGB", (8, 8), (k, k, k)).save(f"faces/{k}.png")
    args = ("train", "celebahq-cfg", "--size", "tiny", "--data", "faces", "--out", "run")
    assert main([*args]) == 2
    said = capsys.readouterr().err
    assert "There are images without a label in 'faces': this network learns classes" in said
    assert RECIPES["celebahq-cfg"]().net.n_labels == 2


# --- the papers' values

def test_the_authors_values():
    "Meng et al. 2023 where they are known; for the rest cifar_base.py and cifar_distill.py."
    values = lambda name, names: tuple(getattr(RECIPES[name](), k) for k in names.split())
    names = "batch lr warmup weight_decay ema clip kind weight T flip schedule drop"
    assert values("cifar10-cfg", names) == \
        (128, 2e-4, 1000, 0.001, 0.9999, 1., "v", "snr_trunc", None, True, str(Schedule.cosine()), 0.1)
    names = "start end late steps late_steps w_min w_max first_weight lr ema"
    assert values("cifar10-guided-distill", names) == \
        (1024, 1, 2, 50_000, 100_000, 0., 4., "snr_trunc", 5e-5, 0.)
    chain, base = RECIPES["cifar10-guided-distill"](), RECIPES["cifar10-cfg"]()
    assert chain.updates == 100_000 + 8*50_000 + 2*100_000 and chain.trainings == 11
    assert chain.net.w_waves == 64 and (base.net.dropout, chain.net.dropout) == (0.2, 0.)
