"What chapter 13 does not show: shapes, times and dtypes, wrappers in any order, no gradient that leaks."
import itertools
from dataclasses import replace

import pytest
import torch
from tiny import TINY
from torch import nn

from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.denoiser import Clipped, Counted, Denoiser, Prediction
from fastdiff_edu.digit_guided import digit_noisy_classifier, digit_noisy_classifier_config
from fastdiff_edu.guidance import (ClassifierFree, ClassifierGuided, NoisyClassifier, Unlabelled, cfg_mix,
                                   class_gradient, guided_ddpm_step, implied_gradient, noisy_class_loss,
                                   number, pair)
from fastdiff_edu.guided_distill import GuidedDenoiser
from fastdiff_edu.nets.encoder import Encoder
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.oracle import GaussianMixture, ring
from fastdiff_edu.sample import Given, ddim_step, ddpm_step, sample, sample_last
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import TrainConfig, fit, load_checkpoint, train

SCHEDULE, RING = Schedule.cosine(), ring()
ORACLE, EXACT = RING.denoiser(SCHEDULE), RING.classifier(SCHEDULE)
Y = torch.arange(6) % 4
NO_CLASS = torch.full((6,), -1)
close = torch.testing.assert_close


def points(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(6, 2, generator=seeded(0, "points")).to(dtype)


def images() -> torch.Tensor: return torch.randn(6, 1, 8, 8, generator=seeded(0, "images"))


def network(cls=UNet, seed:int=0) -> nn.Module:
    "A tiny network whose last layer says something."
    torch.manual_seed(seed)
    net = cls(TINY).eval()
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=0.3)
    return net


def denoiser() -> Denoiser: return Denoiser(network(), SCHEDULE, "v")
def guide() -> NoisyClassifier: return NoisyClassifier(network(Encoder))


def with_variances(x, t, y=None, **cond) -> Prediction:
    "A model with a variance in each place, another one where there are labels."
    said = ORACLE(x, t, y)
    return said._replace(var_frac=torch.full_like(x, 0.2 if y is None or (y < 0).all() else 0.7))


with_variances.schedule = SCHEDULE


# --- times and shapes

def all_guided() -> dict:
    return dict(free=ClassifierFree(ORACLE, 2.), by=ClassifierGuided(ORACLE, EXACT, 2.),
                alone=ClassifierGuided(Unlabelled(ORACLE), EXACT, 3.))


@pytest.mark.parametrize("name", all_guided())
@pytest.mark.parametrize("t", [0.05, 0.4, 1.])
def test_a_time_is_a_float_or_a_tensor(name, t):
    model, x = all_guided()[name], points()
    once = model(x, t, y=Y)
    for other in (torch.tensor(t, dtype=torch.float64), torch.full((6,), t, dtype=torch.float64)):
        for a, b in zip(model(x, other, y=Y)[:2], once[:2]): close(a, b, rtol=1e-9, atol=1e-9)
    mixed = torch.tensor([0.05, 0.4, 1., 0.2, 0.7, 0.9], dtype=torch.float64)
    for k in range(6):
        alone = model(x[k:k + 1], mixed[k].item(), y=Y[k:k + 1])
        close(model(x, mixed, y=Y).eps[k:k + 1], alone.eps, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", all_guided())
def test_clean_data_stay_as_they_are(name):
    for t in (0., torch.zeros(6, dtype=torch.float64)):
        close(all_guided()[name](points(), t, y=Y).x0, points(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype):
    x = points(dtype)
    for model in all_guided().values():
        for t in (0.5, torch.full((6,), 0.5)):
            assert {v.dtype for v in model(x, t, y=Y)[:2]} == {dtype}
    assert class_gradient(EXACT, x, 0.5, Y).dtype == dtype
    for w in (2., torch.full((6,), 2.), torch.full((6,), 2., dtype=torch.float64)):
        step = guided_ddpm_step(EXACT, w)
        assert step(Given(Unlabelled(ORACLE), y=Y), x, 0.5, 0.4, seeded(0)).dtype == dtype
        assert ClassifierFree(ORACLE, w)(x, 0.5, Y).eps.dtype == dtype


@pytest.mark.parametrize("way", ["free", "by"])
def test_images(way):
    model, x = denoiser(), images()
    guided = ClassifierFree(model, 1.5) if way == "free" else ClassifierGuided(model, guide(), 1.5)
    with torch.no_grad():
        out, plain = guided(x, 0.6, y=Y), model(x, 0.6, y=Y)
        assert out.x0.shape == out.eps.shape == x.shape
        assert (out.eps - plain.eps).abs().max() > 1e-3, "guidance does something"
        rows = [guided(x[k:k + 1], 0.6, y=Y[k:k + 1]).eps for k in range(6)]
        close(torch.cat(rows), out.eps, rtol=1e-4, atol=1e-4)


# --- gradients

@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_gradients_are_found_in_every_mode_and_stay_inside(mode):
    x, log_prob, t = images(), guide(), torch.linspace(0.1, 0.9, 6)
    wanted = class_gradient(log_prob, x, t, Y)
    with mode():
        here = x.clone(), t.clone(), Y.clone()   # in inference mode, tensors that autograd does not take
        grad = class_gradient(log_prob, *here)
        guided = ClassifierGuided(denoiser(), log_prob, 2.)(here[0], here[1], y=here[2])
    close(grad, wanted)
    assert not grad.requires_grad and not x.requires_grad
    assert all(p.grad is None for p in log_prob.net.parameters())
    assert guided.eps.requires_grad == (mode is torch.enable_grad), "of the denoiser's weights alone"


def test_a_gradient_starts_at_its_input():
    "What came before x is not differentiated, and what was asked for is not freed for others."
    scale = torch.tensor(2., dtype=torch.float64, requires_grad=True)
    x = scale * points()
    assert not class_gradient(EXACT, x, 0.5, Y).requires_grad
    x.sum().backward()
    assert scale.grad is not None


def test_gradient_by_differences():
    x, log_prob, h = images().double(), NoisyClassifier(network(Encoder).double()), 1e-5
    grad, move = class_gradient(log_prob, x, 0.4, Y), torch.randn_like(x)
    with torch.no_grad(): rise = log_prob(x + h*move, 0.4, Y) - log_prob(x - h*move, 0.4, Y)
    close((grad * move).flatten(1).sum(1), rise / (2*h), rtol=1e-5, atol=1e-7)


def test_sampling_leaves_no_gradient_behind():
    model, log_prob = denoiser(), guide()
    guided = Clipped(ClassifierGuided(model, log_prob, 1.))
    x = sample_last(ddim_step(), guided, images(), SCHEDULE.grid(3), y=Y)
    assert not x.requires_grad
    assert all(p.grad is None for net in (model.net, log_prob.net) for p in net.parameters())


# --- rows without a label

def test_rows_without_a_label_are_not_guided():
    y = torch.where(Y == 1, -1, Y)
    for model in all_guided().values():
        out = model(points(), 0.5, y=y)
        close(out.eps[y < 0], ORACLE(points(), 0.5).eps[y < 0], rtol=1e-9, atol=1e-9)
        close(out.eps[y >= 0], model(points(), 0.5, y=Y).eps[y >= 0], rtol=1e-9, atol=1e-9)


def test_a_network_is_silent_where_there_is_no_label():
    log_prob, x = guide(), images()
    y = torch.where(Y == 1, -1, Y)
    assert (log_prob(x, 0.5, y)[y < 0] == 0).all() and (log_prob(x, 0.5, y)[y >= 0] < 0).all()
    grad = class_gradient(log_prob, x, 0.5, y)
    assert not grad[y < 0].any() and grad[y >= 0].flatten(1).any(1).all()
    close(torch.stack([log_prob(x, 0.5, torch.full((6,), k)) for k in range(10)]).exp().sum(0), torch.ones(6))


def test_labels_that_are_unknown():
    with pytest.raises(BadInput, match="knows 0 to 9, and -1 for none"): guide()(images(), 0.5, Y - 2)
    for y in (Y[:2], Y[:1], Y.float(), Y[:, None]):
        with pytest.raises(BadInput, match="as labels for a batch of 6"): guide()(images(), 0.5, y)
    for y in (torch.full((6,), 10), torch.tensor([0, 1, 2, 3, 4, 99])):
        with pytest.raises(BadInput, match="knows 0 to 9"): guide()(images(), 0.5, y)
        with pytest.raises(BadInput, match="knows 0 to 9"): ClassifierFree(denoiser(), 1.)(images(), 0.5, y)
    plain = GaussianMixture([[0., 0.]], 1.)
    with pytest.raises(BadInput, match="has none"): plain.classifier(SCHEDULE)(points(), 0.5, Y)


# --- variances are handed on

def test_variances_are_those_of_the_labelled_answer():
    x = points()
    for model in (ClassifierFree(with_variances, 2.), ClassifierGuided(with_variances, EXACT, 2.)):
        assert (model(x, 0.5, y=Y).var_frac == 0.7).all()
    twin = torch.tensor([0.2, 0.7], dtype=torch.float64)
    half = lambda x, t, y: ORACLE(x, t, y)._replace(var_frac=twin[(y >= 0).long()][:, None].expand_as(x))
    half.schedule = SCHEDULE
    cond, uncond = pair(half, x, 0.5, Y)
    assert (cond.var_frac == 0.7).all() and (uncond.var_frac == 0.2).all()
    assert (cfg_mix(cond, uncond, 3.).var_frac == 0.7).all()
    assert pair(ORACLE, x, 0.5, Y)[0].var_frac is None


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_the_mean_moves_and_the_noise_does_not(variance):
    x = points()
    model, s = Given(with_variances, y=Y), (SCHEDULE, 0.6, 0.4)
    a, b = (step(model, x, 0.6, 0.4, seeded(0)) for step in
            (guided_ddpm_step(EXACT, 2., variance), ddpm_step(variance)))
    beta = SCHEDULE.beta(0.6, 0.4)
    small = beta * SCHEDULE.sigma(0.4)**2 / SCHEDULE.sigma(0.6)**2
    var = dict(small=small, large=beta, learned=small**0.3 * beta**0.7)[variance]
    close(a - b, 2 * var * class_gradient(EXACT, x, 0.6, Y))
    assert guided_ddpm_step(EXACT, 0., variance)(model, x, 0.6, 0.4, seeded(0)).equal(b)
    each = guided_ddpm_step(EXACT, torch.arange(6.), variance)(model, x, 0.6, 0.4, seeded(0))
    for k in range(6):
        one = guided_ddpm_step(EXACT, float(k), variance)(model, x, 0.6, 0.4, seeded(0))
        close(each[k], one[k], rtol=1e-12, atol=1e-12)


def test_the_last_step_is_the_guess():
    x = points()
    def nobody(x, t, y): raise AssertionError("the classifier was asked where it has no say")
    out = guided_ddpm_step(nobody, 5.)(Given(ORACLE, y=Y), x, 0.1, 0., None)
    assert out.equal(ddpm_step()(Given(ORACLE, y=Y), x, 0.1, 0., None)), "variance 0: no push, and no noise"


# --- inside samplers and other wrappers

def test_a_step_finds_the_label_through_wrappers():
    x, grid = points(), SCHEDULE.grid(7)
    runs = [sample_last(guided_ddpm_step(EXACT, 1.), model, x, grid, seeded(0), y=Y) for model in
            (Unlabelled(ORACLE), Counted(Unlabelled(ORACLE)), Unlabelled(Counted(ORACLE)))]
    assert runs[0].equal(runs[1]) and runs[0].equal(runs[2])
    other = sample_last(guided_ddpm_step(EXACT, 1.), Unlabelled(ORACLE), x, grid, seeded(0), y=Y.flip(0))
    assert not runs[0].equal(other)
    with pytest.raises(BadInput, match="needs labels"):
        guided_ddpm_step(EXACT, 1.)(ORACLE, x, 0.5, 0.4)


def test_the_whole_walk_repeats():
    for step, model in ((ddim_step(), ClassifierFree(denoiser(), 1.)),
                        (guided_ddpm_step(guide(), 1.), Unlabelled(denoiser()))):
        a, b = (list(sample(step, model, images(), SCHEDULE.grid(4), seeded(0), y=Y)) for _ in "ab")
        assert len(a) == 5 and all(u.equal(v) for u, v in zip(a, b))


@pytest.mark.parametrize("w, interval, wanted", [
    (2., (0., 1.), 20), (0., (0., 1.), 10), (2., (0.4, 0.7), 14), (2., (0.45, 0.45), 10),
    (2., (0.4, 0.4), 11), (2., (1., 1.), 11), (2., (0., 0.05), 10), (torch.zeros(6), (0., 1.), 10),
    (torch.tensor([0., 0., 0., 0., 0., 1.]), (0., 1.), 20), (2., (0.2, 0.6), 15)])
def test_evaluations(w, interval, wanted):
    free = ClassifierFree(ORACLE, w, interval)
    for model in (Counted(free), Counted(Clipped(free)), Counted(Counted(free))):
        sample_last(ddim_step(), model, points(), SCHEDULE.grid(10), y=Y)
        assert model.nfe == wanted


def test_counted_inside_counts_calls_of_the_network():
    inner = Counted(ORACLE)
    ClassifierFree(inner, 2.)(points(), 0.5, Y)
    assert inner.nfe == 1, "one pass, of a doubled batch"


def test_intervals():
    x, low, high = points(), 0.3, 0.6
    free, always = ClassifierFree(ORACLE, 2., (low, high)), ClassifierFree(ORACLE, 2.)
    for t in (0.2999, 0.3, 0.45, 0.6, 0.6001):
        wanted = always if low <= t <= high else ORACLE
        assert free(x, t, Y).eps.equal(wanted(x, t, y=Y).eps)
    t = torch.tensor([0.1, 0.3, 0.5, 0.6, 0.7, 1.], dtype=torch.float64)
    inside = (t >= low) & (t <= high)
    close(free(x, t, Y).eps, torch.where(inside[:, None], always(x, t, Y).eps, ORACLE(x, t, Y).eps))
    each = ClassifierFree(ORACLE, torch.arange(6.), (low, high))
    close(each.weight(t), torch.arange(6.) * inside)
    assert not each.weight(0.9).any() and each.weight(0.5).equal(torch.arange(6.))


@pytest.mark.parametrize("interval", [(0.5, 0.4), (-0.1, 0.5), (0.5, 1.1), (float("nan"), 1.)])
def test_intervals_that_are_none(interval):
    with pytest.raises(BadInput, match="Got the interval"): ClassifierFree(ORACLE, 1., interval)


@pytest.mark.parametrize("w", [float("nan"), float("inf"), -float("inf"), torch.tensor([1., float("nan")])])
def test_weights_that_are_no_numbers(w):
    calls = (lambda: ClassifierFree(ORACLE, w), lambda: ClassifierGuided(ORACLE, EXACT, w),
             lambda: guided_ddpm_step(EXACT, w), lambda: number(w))
    for call in calls:
        with pytest.raises(BadInput, match="finite"): call()


def test_weights_that_are_numbers():
    for w in (-1., 0., 3, torch.tensor(2.), torch.arange(4.)): assert number(w) is w


def test_facts():
    assert ClassifierFree(ORACLE, 2., (0.2, 0.4)).facts == dict(w=2., interval=(0.2, 0.4))
    assert ClassifierFree(ORACLE, torch.tensor([1., 2.])).facts["w"] == [1., 2.]


# --- the pair

def test_the_pair_doubles_what_belongs_to_rows():
    seen = {}
    def model(x, t, y, w, generator, name):
        seen.update(x=x, t=t, y=y, w=w, generator=generator, name=name)
        return Prediction(x, x)
    model.schedule, g = SCHEDULE, seeded(0)
    t, w = torch.rand(6), torch.rand(6)
    pair(model, points(), t, Y, w=w, generator=g, name="digits")
    for key, v in dict(x=points(), t=t, w=w).items(): assert seen[key].equal(torch.cat([v, v]))
    assert seen["y"].tolist() == [*Y.tolist(), *NO_CLASS.tolist()]
    assert seen["generator"] is g and seen["name"] == "digits"
    pair(model, points(), 0.5, Y, w=torch.tensor(2.), generator=None, name="")
    assert seen["t"] == 0.5 and seen["w"].ndim == 0


def test_captions_lose_all_their_words():
    seen = []
    def model(x, t, y): return seen.append(y) or Prediction(x, x)
    words = torch.arange(18).reshape(6, 3)
    pair(model, points(), 0.5, words)
    assert seen[0].equal(torch.cat([words, torch.full((6, 3), -1)]))


def test_the_implied_gradient_of_a_time_for_each_row():
    t = torch.linspace(0.1, 1, 6, dtype=torch.float64)
    both = implied_gradient(*pair(ORACLE, points(), t, Y), t, SCHEDULE)
    close(both, class_gradient(EXACT, points(), t, Y), rtol=1e-8, atol=1e-8)


def test_mixing_is_exact_at_the_ends():
    a, b = torch.randn(2, 6, 2, generator=seeded(0))
    assert cfg_mix(a, b, 0.).equal(a) and cfg_mix(a, b, -1.).equal(b)
    close(cfg_mix(a, b, torch.arange(6.)), a + torch.arange(6.)[:, None] * (a - b))
    assert cfg_mix(a, a, 3.).allclose(a)


# --- training the classifier

CFG = TrainConfig(6, batch=16, lr=1e-2, warmup=0, ema=0.5, save_every=2, bar=False)
DATA = torch.randn(64, 1, 8, 8, generator=seeded(0, "data")).clamp(-1, 1), torch.arange(64) % 10


def trained(out=None, steps:int=6) -> Encoder:
    torch.manual_seed(0)
    cfg = TrainConfig(**{**vars(CFG), "steps": steps})
    return fit(noisy_class_loss(SCHEDULE), Encoder(TINY), DATA, cfg, out)


def flat(net:nn.Module) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.usefixtures("in_a_folder")
def test_training_goes_on_bit_for_bit():
    whole = flat(trained("whole"))
    torch.manual_seed(0)
    run = train(noisy_class_loss(SCHEDULE), Encoder(TINY), DATA, CFG, "cut")
    for record in itertools.islice(run, 4): pass
    assert record.step == 4
    assert flat(trained("cut")).equal(whole)
    assert load_checkpoint("whole").manifest["loss"]["says"] == "class"


@pytest.mark.usefixtures("in_a_folder")
def test_the_digits_classifier_is_taken_up():
    cfg = replace(digit_noisy_classifier_config(), steps=3, bar=False)
    torch.manual_seed(5)
    a = digit_noisy_classifier(cfg, "one").net
    torch.manual_seed(6)
    b = digit_noisy_classifier(cfg).net
    assert flat(a).equal(flat(b)), "its first weights are its own"
    assert flat(digit_noisy_classifier(cfg, "one").net).equal(flat(a))
    assert not flat(digit_noisy_classifier(replace(cfg, seed=1)).net).equal(flat(a))


def test_the_loss_falls_and_repeats():
    loss = noisy_class_loss(SCHEDULE, T=8)
    net = network(Encoder)
    a, b = (loss(net, DATA, seeded(0)) for _ in "ab")
    assert a.equal(b) and a.ndim == 0 and a.requires_grad
    assert not loss(net, DATA, seeded(1)).equal(a)
    assert loss.facts == dict(schedule=str(SCHEDULE), T=8, says="class")


# --- its network

def test_an_encoder_is_rebuilt_from_its_config():
    net, x = network(Encoder), images()
    again = Encoder(net.config).eval()
    again.load_state_dict(net.state_dict())
    t = torch.rand(6)
    assert again.config == TINY and again(x, t).equal(net(x, t))
    with pytest.raises(BadInput, match="at least 2"): Encoder(type(TINY)(n_labels=1))


def awake(config):
    "A network whose zero layers say something."
    torch.manual_seed(0)
    net = UNet(config).eval().requires_grad_(False)
    for p in net.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.1)
    return Denoiser(net, SCHEDULE, "v")


@pytest.mark.parametrize("B", [1, 2, 3, 8])
def test_no_weight_is_the_conditional_network_to_the_last_bit(B):
    model, x, y = awake(UNetConfig.digits()), torch.randn(B, 1, 8, 8, generator=seeded(B)), torch.arange(B)
    for t in (0.4, torch.tensor(0.4), torch.full((B,), 0.4), 1., torch.rand(B, generator=seeded(1))):
        wanted = model(x, t, y=y)
        for w in (0., 0, torch.tensor(0.), torch.zeros(B)):
            for free in (ClassifierFree(model, w), ClassifierFree(model, w, (0.2, 0.3))):
                said = free(x, t, y=y)
                assert said.x0.equal(wanted.x0) and said.eps.equal(wanted.eps)
        pushed = ClassifierGuided(model, lambda x, t, y: -x.square().flatten(1).sum(1), 0.)(x, t, y=y)
        assert pushed.x0.equal(wanted.x0) and pushed.eps.equal(wanted.eps)


def test_an_unconditional_network_is_named_as_one():
    model, log_prob = awake(replace(UNetConfig.digits(), n_labels=0)), lambda x, t, y: x.flatten(1).sum(1)
    for wrapped in (model, Clipped(model), Counted(Clipped(model))):
        with pytest.raises(BadInput, match="is unconditional"): ClassifierFree(wrapped, 1.)
        with pytest.raises(BadInput, match="Unlabelled"): ClassifierGuided(wrapped, log_prob, 1.)
        x = torch.randn(2, 1, 8, 8)
        ClassifierGuided(Unlabelled(wrapped), log_prob, 1.)(x, 0.5, y=torch.zeros(2).long())


def test_a_classifier_may_have_its_label_in_it():
    log_prob, x, y = EXACT, points(), torch.full((6,), 2)
    fixed = lambda x, t: log_prob(x, t, torch.full((len(x),), 2))
    for t in (0.3, torch.linspace(0.1, 1, 6, dtype=x.dtype)):
        given = ClassifierGuided(Unlabelled(ORACLE), log_prob, 2.)(x, t, y=y)
        inside = ClassifierGuided(ORACLE, fixed, 2.)(x, t)
        torch.testing.assert_close(inside.eps, given.eps, rtol=0, atol=0)
    a = guided_ddpm_step(fixed, 2.)(ORACLE, x, 0.6, 0.5, seeded(0))
    b = guided_ddpm_step(log_prob, 2.)(Given(Unlabelled(ORACLE), y=y), x, 0.6, 0.5, seeded(0))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_both_guesses_of_a_pushed_model_agree_and_match_the_pair():
    x, log_prob = points().float(), EXACT
    for t in (1., 0.999, 0.5, 0.01):
        pushed = ClassifierGuided(ORACLE, log_prob, 2.)(x, t, y=Y)
        free = ClassifierFree(ORACLE, 2.)(x, t, y=Y)
        mixed = SCHEDULE.alpha(t) * pushed.x0 + SCHEDULE.sigma(t) * pushed.eps
        torch.testing.assert_close(mixed, x, rtol=0, atol=1e-5)
        torch.testing.assert_close(pushed.eps, free.eps, rtol=0, atol=1e-4)


def test_nothing_is_guided_twice():
    for model in (ClassifierFree(ORACLE, 1.), Counted(Clipped(ClassifierFree(ORACLE, 1.))),
                  GuidedDenoiser(network(), SCHEDULE), Clipped(GuidedDenoiser(network(), SCHEDULE))):
        with pytest.raises(BadInput, match="is guided already"): ClassifierFree(model, 1.)
    for model in (Unlabelled(ORACLE), Counted(Unlabelled(denoiser()))):
        with pytest.raises(BadInput, match="is told no label"): ClassifierFree(model, 1.)
    ClassifierFree(Counted(Clipped(denoiser())), 1.)


def test_weights_that_are_no_numbers():
    for w in (None, "2", [1., 2.]):
        for guided in (lambda: ClassifierFree(ORACLE, w), lambda: ClassifierGuided(ORACLE, EXACT, w),
                       lambda: guided_ddpm_step(EXACT, w)):
            with pytest.raises(BadInput, match="give a number"): guided()
    for interval in (0.2, (0.2,), (0.5, 0.1), (0., 0.5, 1.), None):
        with pytest.raises(BadInput, match="give two times"): ClassifierFree(ORACLE, 1., interval)


def test_a_weight_of_each_row_is_exact_in_double_precision():
    x, t, w = points(), torch.rand(6, generator=seeded(1)).double(), torch.full((6,), 0.3)
    one = ClassifierGuided(ORACLE, EXACT, w.double())(x, t, y=Y)
    close(ClassifierGuided(ORACLE, EXACT, w)(x, t, y=Y).eps, one.eps, rtol=0, atol=1e-14)


def test_more_bad_input():
    x, log_prob = points(), EXACT
    with pytest.raises(BadInput, match="needs labels"): ClassifierFree(ORACLE, 1.)(x, 0.5, y=torch.tensor(1))
    with pytest.raises(BadInput, match="Unknown variance 'smal'"): guided_ddpm_step(EXACT, 1., "smal")
    with pytest.raises(BadInput, match="must be the same"): cfg_mix(x, x[:1], 1.)
    with pytest.raises(BadInput, match="which a classifier needs"):
        noisy_class_loss(SCHEDULE)(network(Encoder), images())
    with pytest.raises(BadInput, match="needs labels"): pair(ORACLE, x, 0.5, 1)
    with pytest.raises(BadInput, match="must be the same"):
        cfg_mix(ORACLE(x, 0.5, y=Y), ORACLE(x[:1], 0.5, y=Y[:1]), 1.)
    with pytest.raises(BadInput, match="one time for all rows"):
        guided_ddpm_step(log_prob, 1.)(Given(ORACLE, y=Y), x, torch.full((6,), 0.5), torch.full((6,), 0.4))
    with pytest.raises(BadInput, match="give t > 0"):
        implied_gradient(ORACLE(x, 0., y=Y), ORACLE(x, 0.), 0., SCHEDULE)
