"IDDPM's loss: each half of the network learns from its own term, in the paper's units, at its 4000 steps."
import math
from dataclasses import replace

import pytest, torch
from torch import nn
from torch.testing import assert_close

from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.denoiser import Clipped, Denoiser, diffusion_loss
from fastdiff_edu.forward import bin_nll, normal_nll, variational_bound
from fastdiff_edu.hybrid import hybrid_loss, hybrid_terms, learned_bound, steps_of
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.sample import Given
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import TrainConfig, fit, load_checkpoint

SMALL = UNetConfig(size=8, width=8, mult=(1, 2), blocks=1, attn=(4,), dropout=0., out_ch=6, n_labels=3)
COSINE = Schedule.cosine_iddpm(4000)


def network(config=SMALL, seed=0):
    "A network with random weights, none of them 0."
    torch.manual_seed(seed)
    net = UNet(config)
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=0.1)
    return net.eval()


def pixels(n=6, seed=0, dtype=torch.float32):
    return (torch.randint(0, 256, (n, 3, 8, 8), generator=seeded(seed)) / 127.5 - 1).to(dtype)


def test_each_half_learns_from_its_own_term():
    "What is said of the noise gets the gradient of the plain loss, to the bit; the rest only the bound's."
    net, x0 = network(replace(SMALL, n_labels=0)), pixels()
    head = net.last[2].weight
    def grad(loss): return torch.autograd.grad(loss, head)[0]
    plain = grad(diffusion_loss(COSINE, T=4000)(lambda x, t: net(x, t)[:, :3], x0, seeded(1)))
    both = grad(hybrid_loss(COSINE)(net, x0, seeded(1)))
    assert_close(both[:3], plain[:3], rtol=1e-5, atol=1e-8)
    assert not plain[3:].any() and both[3:].any()


def test_the_bounds_gradient_is_scaled_by_the_share_alone():
    net, x0 = network(), pixels()
    def loss(share, T=4000): return hybrid_loss(Schedule.cosine(), T=T, share=share)(net, x0, seeded(1))
    none, small, large = (loss(share) for share in (0., 0.001, 0.003))
    assert_close(large - none, 3 * (small - none), rtol=1e-3, atol=1e-5)


def test_units_are_bits_per_dimension_and_t_times_the_mean_is_the_sum():
    "All steps of a chain in one batch, against the bound of the whole chain."
    T, s = 50, Schedule.cosine_iddpm(50)
    net, x0, grid = network().double(), pixels(1, dtype=torch.float64), s.grid(50)
    model, g = Denoiser(net, s, learned_var=True), seeded(2)
    noise = torch.cat([torch.randn(x0.shape, generator=g, dtype=torch.float64) for _ in range(T)])
    rows = hybrid_terms(model, x0.expand(T, -1, -1, -1), grid[:-1], noise, steps_of(grid, s))
    whole = learned_bound(model, x0, grid, seeded(2))
    bits = (whole.total - whole.prior)[0] / (math.log(2) * 192)
    assert_close(T * rows.bound.mean(), bits, rtol=1e-9, atol=0)


def test_a_loss_is_right_on_average():
    "One random step a row, many rows: the mean loss is the plain error plus the share of the whole bound."
    T, s = 20, Schedule.linear(20, 1e-3, 0.3)
    net, x0 = network().double(), pixels(1, dtype=torch.float64)
    many, model = x0.expand(2000, -1, -1, -1), Denoiser(net, s, learned_var=True)
    with torch.no_grad():
        one, none = (hybrid_loss(s, T=T, share=share)(net, many, seeded(3)) for share in (1., 0.))
        walks = [learned_bound(model, x0, s.grid(T), seeded(4, k)) for k in range(20)]
    wanted = torch.stack([w.total - w.prior for w in walks]).mean() / (math.log(2) * 192)
    assert_close(one - none, wanted, rtol=0.05, atol=0)


@pytest.mark.parametrize("nll", [bin_nll, normal_nll])
@pytest.mark.parametrize("n", [2, 3, 10])
def test_one_fraction_everywhere_is_the_bound_of_chapter_02(n, nll):
    net, x0, s = network().double(), pixels(dtype=torch.float64), Schedule.linear()
    class Small:   # the small variance in every step, and before the data that of the step before
        schedule = s
        def __call__(self, x, t):
            pred = Denoiser(net, s, learned_var=True)(x, t)
            return pred._replace(var_frac=torch.zeros_like(x))
    with torch.no_grad():
        a = learned_bound(Small(), x0, s.grid(n), seeded(5), nll)
        b = variational_bound(Small(), x0, s.grid(n), seeded(5), nll=nll)
    for one, other in zip(a, b): assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_float32_is_enough_at_4000_steps():
    "The steps' numbers are made in float64; what is left is the rounding of states and sums."
    net, x0 = network(), pixels(8)
    i = torch.tensor([1, 2, 3, 10, 100, 1000, 3000, 4000])
    noise = torch.randn(x0.shape, generator=seeded(6))
    steps = steps_of(COSINE.grid(4000), COSINE)
    def terms(dtype):
        model = Denoiser(net.to(dtype), COSINE, learned_var=True)
        return hybrid_terms(model, x0.to(dtype), i.to(dtype) / 4000, noise.to(dtype), steps.on(dtype, "cpu"))
    low, high = terms(torch.float32), terms(torch.float64)
    for a, b in zip(low, high): assert_close(a.double(), b, rtol=2e-3, atol=1e-6)


def test_bfloat16_gives_finite_gradients():
    net, x0 = network(), pixels()
    with torch.autocast("cpu", torch.bfloat16): loss = hybrid_loss(COSINE)(net, x0, seeded(7))
    grads = torch.autograd.grad(loss, list(net.parameters()), allow_unused=True)
    assert loss.dtype == torch.float32 and all(g.isfinite().all() for g in grads if g is not None)


def test_labels_reach_the_network_and_are_dropped():
    net, x0, seen = network(), pixels(), []
    def spy(x, t, y): seen.append(y); return net(x, t, y)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    for drop in (0., 1.): hybrid_loss(COSINE, drop=drop)(spy, (x0, y), seeded(8))
    assert seen[0].equal(y) and (seen[1] == -1).all()


def test_wrapped_models_keep_their_variances():
    net, x0, s = network(), pixels(), Schedule.cosine()
    model = Denoiser(net, s, learned_var=True)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        clipped, plain = (learned_bound(m, x0, s.grid(5), seeded(9)).total for m in (Clipped(model), model))
        given = learned_bound(Given(Clipped(model), y=y), x0, s.grid(5), seeded(9)).total
    assert clipped.isfinite().all() and (clipped < plain).all() and not torch.allclose(clipped, given)


def test_a_run_goes_on_with_the_same_loss_only(tmp_path):
    cfg, s = TrainConfig(2, batch=2, warmup=0, save_every=1, bar=False), Schedule.cosine_iddpm(100)
    data = pixels(), torch.zeros(6, dtype=torch.long)
    def run(steps, **how):
        fit(hybrid_loss(s, T=100, **how), network(), data, replace(cfg, steps=steps), tmp_path)
    run(2)
    facts = load_checkpoint(tmp_path).manifest["loss"]
    assert facts["learned_var"] is True and facts["share"] == 0.001 and facts["T"] == 100
    assert facts == hybrid_loss(s, T=100).facts
    with pytest.raises(BadInput, match="share"): run(3, share=0.01)
    run(3)
    assert load_checkpoint(tmp_path).manifest["step"] == 3


@pytest.mark.parametrize("how, words", [
    (dict(kind="noise"), "kind of prediction"), (dict(T=1), "2 steps"), (dict(share=-0.1), "0 or more")])
def test_bad_settings_are_one_sentence(how, words):
    with pytest.raises(BadInput, match=words) as error: hybrid_loss(COSINE, **how)
    assert "\n" not in str(error.value)


def test_a_network_or_model_without_variances_is_refused():
    net, x0 = network(replace(SMALL, out_ch=None)), pixels()
    with pytest.raises(BadInput, match=r"'eps' takes \(6, 6, 8, 8\)"): hybrid_loss(COSINE)(net, x0)
    with pytest.raises(BadInput, match="predicts no variances"):
        learned_bound(Denoiser(net, COSINE), x0, COSINE.grid(4))
