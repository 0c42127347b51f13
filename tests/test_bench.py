"`fastdiff bench` measures what it says: waste is seen, resuming changes nothing, no number is invented."
import json, sys, time, types
from dataclasses import replace

import pytest, torch
from torch import nn

from fastdiff_edu import bench as module
from fastdiff_edu.bench import (BARS, FIGURES, BenchConfig, bench, device_figures, network, network_ratios,
                                peers, pytorch_sampling_ratio, table, their_network)
from fastdiff_edu.core import RunFailed
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.timing import Clock, matrix_rate, operations, pair_ratio, patched

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning")   # of other libraries
              for kind in ("Deprecation", "User", "Future")]

TINY = BenchConfig(width=16, batch=2, threads=1, steps=3, repeats=1)


def test_clock_sees_waste():
    clock = Clock(torch.device("cpu"))
    work = clock(lambda: time.sleep(0.05))
    assert clock.ratio(lambda: [work() for _ in range(3)]) < 1.1
    assert 1.8 < clock.ratio(lambda: [(work(), time.sleep(0.05)) for _ in range(3)]) < 2.2


def test_a_pair_is_timed_in_turn_and_its_ratio_is_ours_over_theirs():
    order, clock = [], Clock(torch.device("cpu"))
    def slow(): order.append("s"); time.sleep(0.06)
    def fast(): order.append("f"); time.sleep(0.02)
    assert 1.8 < pair_ratio(slow, fast, clock, 4) < 5 and 0.2 < pair_ratio(fast, slow, clock, 4) < 0.55
    assert "".join(order[:10]) == "sf" + "sffssffs"


def test_a_patch_is_taken_back_after_an_error():
    before = torch.Tensor.backward
    with pytest.raises(ZeroDivisionError), patched(torch.Tensor, "backward", lambda fn: None): 1 / 0
    assert torch.Tensor.backward is before


def test_operations_and_matrix_rate():
    "Twice the width is about four times the work, and the rate is one that a machine can have."
    small, wide = (operations(UNetConfig(width=w, mult=(1, 2), attn=())) for w in (32, 64))
    assert 3.5 < wide / small < 4 and operations(UNetConfig.ddpm_cifar10()) == 11_562_909_696
    assert 1e7 < matrix_rate(torch.device("cpu"), torch.float32, 128, 3) < 1e14


def test_bench_writes_its_figures(tmp_path):
    said = bench(replace(TINY, out=tmp_path))
    found = json.loads((tmp_path/"bench.json").read_text())
    assert found["resume"] == 0 and 1 <= found["sampling"] < 3 and 1 <= found["training"] < 5
    assert all(f" {bar:g}" in said for bar in BARS.values())
    assert list(found["peers"]) == ["diffusers", "denoising_diffusion_pytorch"]
    if not torch.cuda.is_available(): assert "images per second: not measured: no CUDA device" in said


def test_what_is_not_installed_gets_no_number(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    found = dict(peers=peers(network(TINY), TINY), sampling=1., ddim=1., multistep=1., training=1., resume=0.)
    *loops, forward, backward = table(found | dict(device="cpu"))[1:]
    assert all(line.count("not installed") == 2 for line in loops)
    assert all(line.count("not installed") == 1 and "." in line.split("not installed")[1]   # only the bar
               for line in (forward, backward))


def test_bars_of_the_network_are_those_of_the_device():
    installed = dict(diffusers=dict(network=0.5, forward=0.7), other="not installed")
    found = dict(peers=installed, sampling=1., ddim=1., multistep=1., training=1., resume=0.)
    for device, bar in (("cpu, 2 threads", "0.98"), ("NVIDIA H100", "0.9")):
        line, = [v for v in table(found | dict(device=device)) if v.startswith("network forward and")]
        assert line.split()[-4:-2] == ["0.5000", bar]


def test_device_figures_hang_together():
    "At a tiny size on the CPU: the shares are the rates times the operations; no memory is invented."
    net = UNet(UNetConfig(size=8, width=8, mult=(1,), blocks=1, attn=(), groups=4))
    found = device_figures(net, batch=4, steps=8, n=64)
    assert set(found) == set(FIGURES) and found["peak_mib"] is None
    work = operations(net.config, True) * found["training"]
    assert found["training_share"] == pytest.approx(work / found["matrix_rate"])
    assert found["sampling_share"] == pytest.approx(
        operations(net.config) * 50 * found["sampling"] / found["matrix_rate"])


# --- diffusers

def test_the_other_network_says_the_same_and_is_refused_where_not():
    pytest.importorskip("diffusers")
    net = network(TINY).eval()
    other = their_network(net)
    found = network_ratios(net, other, TINY)
    assert set(found) == {"network", "forward"} and all(0.05 < v < 20 for v in found.values())
    with torch.no_grad(): other.conv_out.weight.mul_(1.1)
    with pytest.raises(RunFailed, match="different things"): network_ratios(net, other, TINY)


def test_their_loops_beside_ours():
    pytest.importorskip("diffusers")
    net = network(TINY).eval()
    found = peers(net, TINY)["diffusers"]
    assert set(found) == {"network", "forward", "ddim", "training"}
    assert 1 < found["ddim"] < 5 and 1 < found["training"] < 5


# --- the other library, played by the test

def test_a_sampler_of_the_other_library(monkeypatch):
    class Unet(nn.Module):
        def __init__(self, dim, dim_mults):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))
        def forward(self, x, t): time.sleep(0.01); return x
    class GaussianDiffusion(nn.Module):
        def __init__(self, model, image_size, timesteps, sampling_timesteps):
            super().__init__()
            self.model, self.n, self.size = model, sampling_timesteps, image_size
        def sample(self, batch_size):
            x = torch.zeros(batch_size, 3, self.size, self.size)
            for _ in range(self.n): x = self.model(x, None); time.sleep(0.01)
    monkeypatch.setitem(sys.modules, "denoising_diffusion_pytorch",
                        types.SimpleNamespace(GaussianDiffusion=GaussianDiffusion, Unet=Unet))
    assert 1.5 < pytorch_sampling_ratio(TINY) < 3
