"`fastdiff sample`: from a checkpoint to an array, a sheet and the facts; what a checkpoint must say."
import json, subprocess, sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_run

from fastdiff_edu import hub
from fastdiff_edu.cli import main
from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.denoiser import Clipped, Counted, Denoiser, diffusion_loss
from fastdiff_edu.generate import (SampleConfig, generate, load_model, methods, prepared, sampler,
                                   start_noise)
from fastdiff_edu.hub import export_unet
from fastdiff_edu.hybrid import hybrid_loss
from fastdiff_edu.nets.mlp import MLP, MLPConfig
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.oracle import gaussians_25
from fastdiff_edu.sample import sample_last
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.sources import fingerprint
from fastdiff_edu.train import TrainConfig, fit


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A training's folder: a few steps of a tiny network with classes."
    return tiny_run(tmp_path_factory.mktemp("run"))


def sample(*args, cwd):
    command = [sys.executable, "-m", "fastdiff_edu", "sample", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_command_writes_an_array_a_sheet_and_the_facts(run, tmp_path):
    args = run, "--method", "ddim", "--steps", "5", "--n", "12", "--out"
    done = sample(*args, "one", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {p.name for p in (tmp_path/"one").iterdir()} == {"samples.npy", "samples.json", "sheet.png"}
    x = np.load(tmp_path/"one"/"samples.npy", allow_pickle=False)
    assert x.shape == (12, 1, 8, 8) and x.dtype == np.uint8 and x.std() > 0
    facts = json.loads((tmp_path/"one"/"samples.json").read_text())
    assert facts["evaluations"] == 5 and facts["loss"]["kind"] == "v" and facts["weights"]["which"] == "ema"
    assert Image.open(tmp_path/"one"/"sheet.png").size > (50, 50)
    assert sample(*args, "two", cwd=tmp_path).returncode == 0
    for name in ("samples.npy", "samples.json"):
        assert (tmp_path/"one"/name).read_bytes() == (tmp_path/"two"/name).read_bytes()


@pytest.mark.parametrize("args, words", [
    ((), "Missing"),
    (("nowhere",), "There is no 'nowhere'"),
    (("RUN", "--method", "dimm"), "did you mean 'ddim'"),
    (("RUN", "--steps", "0"), "want at least 1"),
    (("RUN", "--method", "heun", "--eta", "1"), "only 'ddim' has an eta"),
    (("RUN", "--eta", "-1"), "Got eta = -1.0"),
    (("RUN", "--spacing", "quadratik"), "did you mean 'quadratic'"),
    (("RUN", "--labels", "3", "12"), "knows 0 to 9"),
    (("RUN", "--out", "file/below"), "Cannot write to 'file/below'"),
])
def test_bad_arguments_are_one_sentence(args, words, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"file").write_text("")
    assert main(["sample", *(str(run) if a == "RUN" else a for a in args)]) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("fastdiff: ") and said.count("\n") == 1
    assert not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("method", [m for m in methods() if m != "ddpm-learned"])
def test_every_method_is_finite_and_the_same_again(method, run):
    cfg = SampleConfig(run, method, steps=6, n=4, seed=1)
    x, facts = generate(cfg, bar=False)
    assert x.shape == (4, 1, 8, 8) and x.isfinite().all() and facts["evaluations"] >= 6
    assert x.equal(generate(cfg, bar=False)[0])


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    "A training's folder: a tiny network that says its variances as well."
    out = tmp_path_factory.mktemp("learned")
    net = UNet(UNetConfig(8, 1, 2, width=8, mult=(1, 2), blocks=1, attn=(), dropout=0., groups=4))
    cfg = TrainConfig(12, batch=8, lr=0.01, warmup=0, bar=False)
    fit(hybrid_loss(Schedule.linear()), net, torch.rand(32, 1, 8, 8) * 2 - 1, cfg, out)
    return out


def test_ddpm_takes_the_variances_that_a_network_says(run, learned):
    def x(folder, method): return generate(SampleConfig(folder, method, steps=4, n=3), bar=False)
    usual, said = x(learned, "ddpm")
    assert said["method"] == "ddpm-learned" and usual.equal(x(learned, "ddpm-learned")[0])
    for other in ("ddpm-small", "ddpm-large"): assert not usual.equal(x(learned, other)[0])
    assert x(run, "ddpm")[1]["method"] == "ddpm" and x(run, "ddpm")[0].equal(x(run, "ddpm-small")[0])
    model = load_model(learned)
    assert model.learned_var and model(torch.zeros(2, 1, 8, 8), 0.5).var_frac.shape == (2, 1, 8, 8)
    with pytest.raises(BadInput, match="this one has no var_frac"): x(run, "ddpm-learned")


@pytest.mark.parametrize("which", ["run", "learned"])
def test_a_diffusers_folder_is_a_checkpoint(which, request, tmp_path):
    "Exported and read back, from the pipeline's folder and from the network's: the same samples."
    model = load_model(request.getfixturevalue("learned"))
    if which == "run":
        net = UNet(UNetConfig(8, 1, width=8, mult=(1, 2), blocks=1, attn=(), dropout=0., groups=4))
        model = Denoiser(net.eval(), Schedule.cosine_iddpm(), "v")
    export_unet(model, tmp_path/"theirs")
    file = tmp_path/"theirs"/"unet"/"diffusion_pytorch_model.safetensors"
    for folder in (tmp_path/"theirs", tmp_path/"theirs"/"unet"):
        x, facts = generate(SampleConfig(folder, "ddpm", steps=4, n=3), bar=False)
        assert facts["weights"] == dict(which="a folder of diffusers", file=file.name, **fingerprint(file))
        assert facts["loss"]["schedule"] == str(model.schedule) and facts["loss"]["kind"] == model.kind
        assert facts["method"] == ("ddpm" if which == "run" else "ddpm-learned")
        work = prepared(SampleConfig(folder, "ddpm", steps=4, n=3))
        direct = sample_last(work.step, Clipped(model), start_noise((1, 8, 8), 0, range(3)), work.grid,
                             seeded(0, "walk", 0))
        torch.testing.assert_close(x, direct, rtol=1e-4, atol=1e-4)


def test_a_name_on_the_hub_is_a_checkpoint(learned, tmp_path, monkeypatch):
    "What was fetched is a folder; the name and the checksum of the weights are recorded."
    export_unet(load_model(learned), tmp_path/"theirs")
    asked = []
    monkeypatch.setattr(hub, "fetched", lambda name, revision=None: asked.append(name) or tmp_path/"theirs")
    monkeypatch.chdir(tmp_path)
    _, facts = generate(SampleConfig("owner/name", steps=2, n=1), bar=False)
    assert set(asked) == {"owner/name"} and facts["weights"]["which"] == "owner/name"
    file = next((tmp_path/"theirs").rglob("*.safetensors"))
    assert facts["weights"]["sha256"] == fingerprint(file)["sha256"]
    for name in ("nowhere", "a/b/c", "theirs/nothing/here"):
        with pytest.raises(BadInput, match=f"There is no '{name}': give a run's folder"): load_model(name)
    assert len(asked) == 1


def test_what_samples_depend_on(run):
    def x(**kwargs): return generate(SampleConfig(run, steps=3, n=5, **kwargs), bar=False)[0]
    torch.testing.assert_close(x(), x(batch=2))
    torch.testing.assert_close(x(), x(labels=(0, 1, 2, 3, 4)))
    for other in (dict(seed=1), dict(labels=(7,)), dict(raw=True), dict(eta=1.0),
                  dict(spacing="quadratic")):
        assert (x() - x(**other)).abs().max() > 1e-6, other
    with pytest.raises(BadInput, match="never trained without labels"): x(labels=(-1,))


def test_a_run_is_not_taken_up_with_another_loss(tmp_path):
    data, cfg = gaussians_25().sample(64), TrainConfig(2, batch=8, bar=False)
    def train(loss): fit(loss, MLP(MLPConfig(width=16)), data, cfg, tmp_path)
    train(diffusion_loss(Schedule.linear()))
    train(diffusion_loss(Schedule.linear()))
    for loss, words in ((diffusion_loss(Schedule.cosine()), "loss.schedule is Schedule.linear"),
                        (diffusion_loss(Schedule.linear(), "v"), "loss.kind is eps there and v here")):
        with pytest.raises(BadInput, match=words): train(loss)
    assert load_model(tmp_path).kind == "eps"


def test_dpm_fast_takes_exactly_as_many_evaluations():
    model = gaussians_25().denoiser(Schedule.cosine())
    for n in range(1, 14):
        counted, (step, grid) = Counted(model), sampler("dpm-fast", n, model.schedule)
        sample_last(step, counted, torch.randn(3, 2), grid)
        assert counted.nfe == n
