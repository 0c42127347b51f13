"Steps that choose: exact generators make exact chains, and the game's formulae hold on other players."
import math

import pytest, torch
import torch.nn.functional as F
from torch.testing import assert_close

from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.ddgan import (DDGANConfig, GeneratorModel, d_loss, d_turn, ddgan_pair, draw_steps, falling,
                                g_loss, g_turn, r1_penalty, random_step, reverse_density, train_ddgan)
from fastdiff_edu.denoiser import Clipped, Counted, from_x0
from fastdiff_edu.forward import posterior
from fastdiff_edu.metrics import energy_distance, mode_coverage
from fastdiff_edu.nets.discriminator import Discriminator, DiscriminatorConfig
from fastdiff_edu.nets.mlp import PointConfig, PointDiscriminator, PointGenerator
from fastdiff_edu.oracle import GaussianMixture, gaussians_25
from fastdiff_edu.sample import ddpm_step, sample_last
from fastdiff_edu.schedule import Schedule

VP = Schedule.vp(t_min=1e-3)
MIX = GaussianMixture([[-1.5, 0.5], [0.3, -1.], [1.6, 1.2]], std=[0.1, 0.5, 0.25], weights=[0.5, 0.2, 0.3])
SCHEDULES = {"vp": VP, "linear": Schedule.linear(), "cosine": Schedule.cosine()}
randn = lambda *shape, seed=0: torch.randn(*shape, generator=seeded(seed, "test"), dtype=torch.float64)


class Exact:
    "x_0 from the true posterior."
    random = True

    def __init__(self, schedule): self.schedule = schedule

    def __call__(self, x, t, generator=None):
        return from_x0(x, MIX.sample_x0(x, t, self.schedule, generator), t, self.schedule)


def near(x, truth, sigmas=5.):
    "Is the mean of the rows of `x` what it should be, within so many standard errors?"
    gap, error = (x.double().mean(0) - truth).abs(), x.double().std(0) / len(x)**0.5
    assert (gap < sigmas * error + 1e-12).all(), (gap / error).max()


# --- exactness

@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_an_exact_generator_makes_an_exact_chain(n, schedule):
    "In any number of steps, on any schedule: the share, mean and covariance of every mode."
    start = MIX.at(1., schedule).sample(40_000, seeded(n, "start")).double()
    x = sample_last(ddpm_step("small"), Exact(schedule), start, schedule.grid(n), seeded(n, "walk"))
    mode = torch.cdist(x, MIX.means.double()).argmin(1)
    truth = MIX.sample(400_000, seeded(0, "truth")).double()
    true_mode = torch.cdist(truth, MIX.means.double()).argmin(1)
    for k in range(3):
        near((mode == k).double()[:, None], (true_mode == k).double().mean())
        near(x[mode == k], truth[true_mode == k].mean(0))
        near(x[mode == k]**2, (truth[true_mode == k]**2).mean(0))


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("t, u", [(1., 0.), (0.7, 0.2), (0.3, 0.29), (0.05, 0.)])
def test_reverse_densities_add_up(t, u, schedule):
    "Averaged over x_t they are the marginal at u: the law of total probability, at ten places."
    xt = MIX.at(t, schedule).sample(3000, seeded(1, t)).double()
    place = MIX.at(u, schedule).sample(10, seeded(2, u)).double()
    found = torch.stack([reverse_density(MIX, x, t, u, schedule).log_prob(place).exp() for x in xt])
    near(found, MIX.at(u, schedule).log_prob(place).exp(), 6.)


def test_a_step_to_the_same_time_stays():
    "And a reverse density of hardly any length lies where it began."
    xt = randn(2)
    d = reverse_density(MIX, xt, 0.5, 0.5 - 1e-9, VP)
    assert_close(d.mean.double(), xt, atol=1e-6, rtol=0)


@pytest.mark.parametrize("u", [0., 0.25])
def test_random_step_is_the_ancestral_step(u):
    "From the same numbers, at one time for all rows; the way down to 0 ends on the guess."
    model, x = GeneratorModel(lambda x, z, t, y=None: z, VP, 2), randn(50, 2)
    one = random_step(model, x, 0.5, u, seeded(0))
    walk = sample_last(ddpm_step("small"), model, x, torch.tensor([0.5, u]), seeded(0))
    assert_close(one, walk, atol=1e-12, rtol=1e-12)
    if u == 0: assert_close(one, model(x, 0.5, generator=seeded(0)).x0, atol=1e-12, rtol=0)
    rows = random_step(model, x, torch.full((50,), 0.5).double(), torch.full((50,), u).double(), seeded(0))
    assert_close(rows, one, atol=1e-12, rtol=1e-12)


def test_a_fixed_latent_leaves_one_gaussian():
    z = randn(1, 3).expand(20_000, 3)
    model = GeneratorModel(lambda x, z, t, y=None: x[:, :1] * z[:, :2].tanh(), VP, 3)
    x = randn(1, 2, seed=1).expand(20_000, 2)
    mean, var = posterior(model(x, 0.5, z=z).x0, x, 0.5, 0.25, VP)
    out = random_step(model, x, 0.5, 0.25, seeded(3), z=z)
    for k, moment in enumerate((mean, mean**2 + var, mean**3 + 3*mean*var), 1): near(out**k, moment[0])


def test_wrappers_stay_random():
    model = GeneratorModel(lambda x, z, t, y=None: 3 * z, VP, 2)
    for wrapped in (Counted(model), Clipped(model), Clipped(Counted(model))):
        a, b = (sample_last(ddpm_step(), wrapped, randn(9, 2), VP.grid(2), seeded(k)) for k in (0, 1))
        assert wrapped.random and not a.equal(b)


# --- the game

@pytest.mark.parametrize("T", [1, 2, 4, 8])
def test_steps_are_drawn_evenly_and_fit_together(T):
    t, u = draw_steps(torch.zeros(20_000, 1), T, seeded(T))
    assert_close(t - u, torch.full_like(t, 1/T))
    for i in range(1, T + 1): near((t == i/T).double()[:, None], 1/T)
    assert T > 1 or (t == 1).all() and (u == 0).all()


@pytest.mark.parametrize("t, u", [(0.25, 0.), (0.5, 0.25), (1., 0.5), (1., 0.)])
def test_pairs_have_the_posterior_of_chapter_02(t, u):
    "Regress x_u on x_0 and x_t: coefficients and residual are those of q(x_u | x_t, x_0)."
    x0 = randn(100_000, 1)
    x_u, x_t = ddgan_pair(x0, t, u, VP, seeded(0, "pair"))
    fit = torch.linalg.lstsq(torch.cat([x0, x_t], 1), x_u)
    one, zero = torch.ones(1), torch.zeros(1)
    want = torch.stack([posterior(one, zero, t, u, VP)[0], posterior(zero, one, t, u, VP)[0]]).double()
    assert_close(fit.solution, want, atol=0.02, rtol=0)
    left = (x_u - torch.cat([x0, x_t], 1) @ fit.solution).var()
    small = torch.as_tensor(posterior(one, zero, t, u, VP)[1]).double().reshape(())
    assert_close(left, small, atol=0.01, rtol=0.02)


def test_losses_by_probabilities():
    real, fake = randn(2, 40) * 5
    assert_close(d_loss(real, fake), d_loss(-fake, -real))                 # the two sides change places
    assert_close(g_loss(fake), d_loss(fake, torch.full_like(fake, -1e9)))  # the generator wants to be real
    assert_close(d_loss(real*0, fake*0), torch.tensor(2 * math.log(2)).double())
    lost = torch.tensor([-40.], dtype=torch.float64).requires_grad_()
    slope, = torch.autograd.grad(g_loss(lost), lost)
    assert_close(slope, -torch.ones(1).double())   # a slope of 1 where it fails altogether


@pytest.mark.parametrize("group", [0, 2])
def test_r1_of_a_convolutional_player(group, monkeypatch):
    "The penalty, and its gradient along ways through all weights, by differences: without kinks, in float64."
    monkeypatch.setattr(F, "leaky_relu", lambda x, *_: F.silu(x))
    torch.manual_seed(0)
    disc = Discriminator(DiscriminatorConfig(8, 1, width=4, t_width=8, group=group)).double()
    for p in disc.parameters(): torch.nn.init.normal_(p, std=0.3)
    x_u, x_t = randn(4, 1, 8, 8).requires_grad_(), randn(4, 1, 8, 8, seed=1)
    t = torch.full((4,), 0.5).double()
    value, h = r1_penalty(disc(x_u, x_t, t), x_u, 0.7), 1e-5
    with torch.no_grad():
        answer = lambda e: disc(x_u + e, x_t, t).sum()
        one = h * torch.eye(256).double().view(256, 4, 1, 8, 8)
        slopes = torch.stack([answer(e) - answer(-e) for e in one]) / (2*h)   # of the sum of all answers
    assert_close(value.detach(), 0.35 * (slopes**2).sum() / 4, rtol=1e-6, atol=0)
    weights = list(disc.parameters())
    grads = torch.autograd.grad(value, weights, allow_unused=True)   # biases may not matter to a slope
    for k in range(3):
        ways = [randn(*w.shape, seed=k) for w in weights]
        def moved(by):
            with torch.no_grad():
                for w, way in zip(weights, ways): w += by * way
            return r1_penalty(disc(x_u, x_t, t), x_u, 0.7).item()
        rate = (moved(h) - moved(-2*h)) / (2*h)
        moved(h)
        want = sum((g * way).sum().item() for g, way in zip(grads, ways) if g is not None)
        assert rate == pytest.approx(want, rel=1e-3)


def test_r1_counts_examples_and_not_batches():
    "Twice the same rows, the same penalty; rows do not add up."
    disc = lambda x: (x**2).sum(1)
    x = randn(6, 3).requires_grad_()
    twice = torch.cat([x.detach()]*2).requires_grad_()
    assert_close(r1_penalty(disc(x), x, 2.), r1_penalty(disc(twice), twice, 2.))
    assert_close(r1_penalty(disc(x), x, 2.), 4 * (x**2).sum(1).mean())


def test_whose_weights_move():
    "The discriminator's turn leaves no gradient in the generator; every third turn has R1."
    torch.manual_seed(0)
    c = PointConfig(width=8)
    gen, disc = GeneratorModel(PointGenerator(c), VP, 4), PointDiscriminator(c)
    cfg, batch = DDGANConfig(10, batch=16, lazy=3), randn(16, 2).float()
    d_turn(gen, cfg, 0)(disc, batch, seeded(0)).backward()
    assert all(p.grad is None for p in gen.net.parameters()) and disc.body.last.weight.grad is not None
    plain, with_r1 = (d_turn(gen, cfg, s)(disc, batch, seeded(0)).item() for s in (1, 3))
    assert with_r1 > plain and with_r1 == d_turn(gen, cfg, 0)(disc, batch, seeded(0)).item()
    g_turn(disc, gen, cfg)(gen.net, batch, seeded(0)).backward()
    assert gen.net.body.last.weight.grad.abs().sum() > 0


def test_rates_fall_to_their_end():
    cfg = DDGANConfig(1000, lr_end=1e-5)
    rates = [falling(2e-4, s, cfg) for s in range(1000)]
    assert rates[0] == 2e-4 and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=1e-3)
    assert rates[500] == pytest.approx((2e-4 + 1e-5) / 2)


@pytest.mark.parametrize("change, words", [
    (dict(T=0), "T = 0"), (dict(batch=6, parts=4), "in 4 parts"), (dict(lazy=1.5), "lazy = 1.5"),
    (dict(lr_g=math.nan), "lr_g = nan"), (dict(beta_1=-0.1), "beta_1"), (dict(precision="fp8"), "precision"),
    (dict(gamma=math.inf), "gamma = inf"), (dict(ema=1.), "ema = 1"), (dict(gamma_end=0.), "gamma_end = 0"),
    (dict(lr_d=1e-6), "at most the smaller rate")])
def test_bad_settings_are_one_sentence(change, words):
    with pytest.raises(BadInput, match=words): DDGANConfig(**dict(dict(steps=10, batch=8), **change))


def test_shapes_are_said():
    with pytest.raises(BadInput, match="give one"): reverse_density(MIX, randn(3, 2), 0.5, 0.2, VP)
    with pytest.raises(BadInput, match="the same"): GeneratorModel(lambda x, z, t: z, VP, 3)(randn(5, 2), 0.5)


def test_it_learns():
    "A tenth of the chapter's training: nearer to the data than before, and most modes are found."
    torch.manual_seed(0)
    mix, start = gaussians_25(), torch.randn(2000, 2, generator=seeded(0, "start"))
    gen, disc = GeneratorModel(PointGenerator(PointConfig()), VP, 4), PointDiscriminator(PointConfig())
    def gap(model):
        x = sample_last(ddpm_step("small"), model, start, VP.grid(4), seeded(0, "walk"))
        return energy_distance(x, mix.sample(2000, seeded(0, "real"))), mode_coverage(x, mix)
    before = gap(gen)[0]
    cfg = DDGANConfig(400, batch=256, lr_g=1e-3, lr_d=1e-3, beta_1=0., beta_2=0.99, gamma=0.13, lazy=4,
                      gamma_end=0.0027, ema=0.99, ema_warmup=True, bar=False)
    for record in train_ddgan(gen, disc, mix.sample(20_000, seeded(0, "data")), cfg): pass
    after, cover = gap(GeneratorModel(record.ema, VP, 4))
    assert after < 0.5 * before and cover.covered >= 23 and cover.share > 0.25, (before, after, cover)


def test_what_is_frozen_stays_frozen():
    torch.manual_seed(0)
    c = PointConfig(width=8)
    gen, disc = GeneratorModel(PointGenerator(c), VP, 4), PointDiscriminator(c)
    first = disc.body.layers[0].requires_grad_(False)
    before, others = first.weight.clone(), disc.body.last.weight.clone()
    cfg = DDGANConfig(3, batch=16, lr_g=1e-2, lr_d=1e-2, bar=False)
    for _ in train_ddgan(gen, disc, randn(50, 2).float(), cfg): pass
    assert first.weight.equal(before) and not first.weight.requires_grad
    assert not disc.body.last.weight.equal(others) and disc.body.last.weight.requires_grad


def test_players_are_networks():
    gen = GeneratorModel(PointGenerator(PointConfig(width=8)), VP, 4)
    cfg, data = DDGANConfig(1, batch=4, bar=False), randn(8, 2).float()
    with pytest.raises(BadInput, match="The discriminator is no network"):
        next(train_ddgan(gen, lambda x_u, x_t, t: x_u[:, 0], data, cfg))
    with pytest.raises(BadInput, match="built without"):
        next(train_ddgan(gen, PointDiscriminator(PointConfig(width=8)), (data, torch.zeros(8).long()), cfg))
