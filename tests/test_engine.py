"The engine's options change how a step is computed, not what: parts, bfloat16, layout, compilation."
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from fastdiff_edu.checkpoint import load_checkpoint, seal
from fastdiff_edu.core import BadInput, write_json
from fastdiff_edu.denoiser import diffusion_loss
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import TrainConfig, fit, train

LOSS = diffusion_loss(Schedule.cosine(), "v", "snr_plus_1")


def net() -> UNet:
    torch.manual_seed(0)
    return UNet(UNetConfig(8, 1, width=8, mult=(1, 2), blocks=1, attn=(4,), dropout=0.1))


def data() -> torch.Tensor: return torch.rand(32, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


def config(steps=6, **kwargs):
    return TrainConfig(steps, batch=8, lr=0.01, warmup=0, bar=False, save_every=2, **kwargs)


def weights(trained:nn.Module) -> torch.Tensor: return torch.cat([p.flatten() for p in trained.parameters()])


def fixed(model, batch, generator):
    "A loss without randomness, the same for a batch and for the mean of its parts."
    return model(batch, torch.full((len(batch),), 0.5)).square().mean() + model.last[2].bias.sum()


def still() -> UNet: return net().eval()   # no dropout


def test_parts_of_a_batch_are_the_batch():
    whole, parts = (next(train(fixed, still(), data(), config(parts=k))) for k in (1, 4))
    assert_close(parts.loss, whole.loss, rtol=1e-5, atol=0)
    assert_close(parts.grad_norm, whole.grad_norm, rtol=1e-5, atol=0)


def test_layout_changes_only_roundings():
    last = fit(fixed, still(), data(), config(channels_last=True))
    assert last.first.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(weights(last), weights(fit(fixed, still(), data(), config())), rtol=1e-3, atol=1e-4)


def test_a_compiled_network_learns_the_same():
    plain, compiled = (weights(fit(fixed, still(), data(), config(3, compile=c))) for c in (False, True))
    assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


def test_bf16_is_near_and_its_weights_are_float32():
    records = {p: list(train(LOSS, net(), data(), config(precision=p))) for p in ("float32", "bf16")}
    a, b = (torch.stack([r.loss for r in records[p]]) for p in records)
    assert_close(b, a, rtol=0.05, atol=0.05)
    assert not b.equal(a) and all(p.dtype == torch.float32 for p in records["bf16"][-1].ema.parameters())


@pytest.mark.parametrize("option", [dict(parts=2), dict(precision="bf16"), dict(channels_last=True),
                                    dict(parts=4, precision="bf16", channels_last=True)], ids=str)
def test_resuming_changes_nothing(option, tmp_path):
    whole = fit(LOSS, net(), data(), config(**option), tmp_path/"whole")
    for steps in (3, 6): stopped = fit(LOSS, net(), data(), config(steps, **option), tmp_path/"stopped")
    assert weights(stopped).equal(weights(whole))


def test_a_run_keeps_its_options_and_an_older_one_had_the_usual(tmp_path):
    fit(LOSS, net(), data(), config(2), tmp_path)
    with pytest.raises(BadInput, match="config.precision is float32 there and bf16 here"):
        fit(LOSS, net(), data(), config(4, precision="bf16"), tmp_path)
    saved = load_checkpoint(tmp_path)
    for name in ("parts", "precision", "channels_last", "compile"): del saved.manifest["config"][name]
    write_json(saved.path/"manifest.json", {**saved.manifest, "seal": seal(saved.manifest)})
    fit(LOSS, net(), data(), config(4), tmp_path)
    assert load_checkpoint(tmp_path).manifest["step"] == 4


@pytest.mark.parametrize("bad, words", [
    (dict(parts=3), "make them equal"), (dict(parts=0), "at least 1"),
    (dict(precision="fp16"), "Unknown precision 'fp16'")], ids=str)
def test_bad_options(bad, words):
    with pytest.raises(BadInput, match=words): config(**bad)
