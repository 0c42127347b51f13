"The smallest training that leaves a run's folder."
import torch

from fastdiff_edu.denoiser import diffusion_loss
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import TrainConfig, fit

TINY = UNetConfig(8, 1, width=8, mult=(1, 2), blocks=1, attn=(), dropout=0., n_labels=10)


def tiny_run(out, schedule=None, weight="snr_plus_1", data=None, **settings):
    "A few steps of a tiny network with classes; its folder."
    torch.manual_seed(0)
    net = UNet(TINY)
    if data is None: data = torch.rand(32, 1, 8, 8) * 2 - 1, torch.arange(32) % 10
    cfg = TrainConfig(**dict(dict(steps=12, batch=8, lr=0.01, warmup=0, bar=False), **settings))
    fit(diffusion_loss(schedule or Schedule.cosine(), "v", weight), net, data, cfg, out)
    return out
