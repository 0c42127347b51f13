"One network for both passes of a pair, at any weight; then its halvings; then noise between the steps."
import copy, math, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest, torch
from tiny import TINY
from torch import nn
from torch.testing import assert_close

from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.denoiser import Clipped, Denoiser, denoising_loss, from_x0
from fastdiff_edu.distill import DistillConfig, draw_halves, halving_loss, progressive_distillation
from fastdiff_edu.forward import q_sample
from fastdiff_edu.guidance import ClassifierFree
from fastdiff_edu.guided_distill import (GuidedConfig, GuidedDenoiser, guided_loss, guided_student,
                                         guided_target, stage_one, stage_two, stochastic_step)
from fastdiff_edu.knowledge import at_rest, identity, student_of, with_net
from fastdiff_edu.models import load_model, open_model
from fastdiff_edu.nets.mlp import MLP, MLPConfig
from fastdiff_edu.nets.unet import UNet
from fastdiff_edu.oracle import ring
from fastdiff_edu.sample import sample_last
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import load_checkpoint, read_log

COSINE, MIX = Schedule.cosine(), ring()
ORACLE = MIX.denoiser(COSINE)
X, Y = MIX.sample_labelled(200, seeded(0, "points"))
DATA = X.float(), Y
ONE = GuidedConfig(steps=12, batch=16, lr=1e-2, warmup=0, ema=0.9, w_waves=8, log_every=2, save_every=5,
                   bar=False)
TWO = DistillConfig(steps=8, late_steps=12, late=1, start=8, end=1, batch=16, lr=1e-2, between=True,
                    log_every=2, save_every=3, bar=False)
randn = lambda *shape, seed=0: torch.randn(*shape, generator=seeded(seed, "test"), dtype=torch.float64)


def network(seed:int=0, n_labels:int=4, **config) -> MLP:
    torch.manual_seed(seed)
    return stirred(MLP(MLPConfig(width=8, depth=1, n_labels=n_labels, **config)), 0.3)


def stirred(net:nn.Module, std:float) -> nn.Module:
    "A network none of whose layers is 0."
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=std)
    return net


def teacher(kind:str="v", **config) -> Denoiser: return Denoiser(network(**config), COSINE, kind)


def hears(seed:int=0, w_range=(0., 4.), **config) -> GuidedDenoiser:
    "A student whose answer depends on the weight, untrained."
    student = guided_student(teacher(seed=seed, **config), w_range, w_waves=8, seed=seed)
    nn.init.normal_(student.net.guidance.second.weight)
    return student


def picture_teacher(**config) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(stirred(UNet(replace(TINY, **config)), 0.2), COSINE, "v", learned_var="out_ch" in config)


def weights(net) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in net.parameters()])
def halved(first, cfg=TWO, data=DATA, **kwargs) -> dict:
    return {stage.steps: stage for stage in stage_two(first, cfg, data, **kwargs)}


# --- a model that takes a weight

def test_weights_come_as_numbers_and_as_tensors():
    student, x, y, t = hears(w_range=(0., 0.3)), X[:3].float(), Y[:3], 0.5
    for w in (0.3, torch.tensor(0.3), torch.full((3,), 0.3), torch.tensor(0.3, dtype=torch.float64)):
        assert student(x, t, y=y, w=w).x0.equal(student(x, t, y=y, w=0.3).x0)
    for w in (0, 0., torch.zeros(3), torch.zeros(3, dtype=torch.long)):
        assert student(x, t, y=y, w=w).x0.equal(student(x, t, y=y).x0), "said nothing, the weight is 0"
    rows = student(x, t, y=y, w=torch.tensor([0., 0.1, 0.3])).x0
    for k, w in enumerate((0., 0.1, 0.3)): assert_close(rows[[k]], student(x[[k]], t, y=y[[k]], w=w).x0)
    assert (rows - student(x, t, y=y, w=0.2).x0).abs().min() > 0


@pytest.mark.parametrize("w, words", [
    (4.1, "Got w = 4.1: this student was trained for w from 0 to 4"), (-1, "Got w = -1"),
    (torch.nan, "Got w = nan"),
    (torch.tensor([0., 9., 1.]), "Got w = 9"), (torch.tensor(5), "Got w = 5"), (torch.inf, "Got w = inf"),
    (torch.ones(2), r"Got \(2,\) weights for a batch of 3"), (torch.ones(3, 1), r"Got \(3, 1\) weights")])
def test_weights_that_no_student_was_trained_for(w, words):
    with pytest.raises(BadInput, match=words): hears()(X[:3].float(), 0.5, y=Y[:3], w=w)


NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("bad", [(4., 0.), (0., INF), (-INF, 1.), (NAN, 1.), (0., NAN)])
def test_ranges_that_are_none(bad):
    with pytest.raises(BadInput, match="the smaller one first"): GuidedDenoiser(None, COSINE, w_range=bad)
    with pytest.raises(BadInput): GuidedConfig(10, w_min=bad[0], w_max=bad[1])
    with pytest.raises(BadInput): guided_student(teacher(), bad)


def test_in_double_precision():
    student = hears()
    student.net.double()
    pred = student(X[:3].double(), torch.rand(3).double(), y=Y[:3], w=torch.tensor([0., 1., 4.]))
    assert pred.x0.dtype == pred.eps.dtype == torch.float64
    assert student.draw(X.double())["w"].dtype == torch.float64


def test_draws_are_uniform_and_repeatable():
    student, many = hears(w_range=(1., 3.)), torch.zeros(20_000, 2)
    w = student.draw(many, seeded(0, "w"))["w"]
    assert w.shape == (20_000,) and w.equal(student.draw(many, seeded(0, "w"))["w"])
    assert 1 <= w.min() < 1.01 and 2.99 < w.max() <= 3
    assert abs(w.mean() - 2) < 4.5 * (1/3 / 20_000)**0.5 and abs(w.var() - 1/3) < 0.01
    assert hears(w_range=(2., 2.)).draw(many)["w"].eq(2).all()


def test_other_networks_keep_the_class():
    student = hears(w_range=(1., 2.))
    others = with_net(student, student.net), at_rest(student), student_of(student)
    for other in (*others, student_of(Clipped(student))):
        assert type(other) is GuidedDenoiser and other.own_facts == dict(w_range=[1., 2.])


# --- where a student begins

@pytest.mark.parametrize("model", [
    lambda: teacher(), lambda: teacher("x0"), lambda: picture_teacher(), lambda: picture_teacher(out_ch=2)],
    ids=["v", "x0", "unet", "learned variances"])
def test_a_student_begins_as_the_conditional_teacher(model):
    model = model()
    student, shape = guided_student(model), (1, 8, 8) if isinstance(model.net, UNet) else (2,)
    x, y, t = randn(4, *shape).float(), torch.tensor([0, 3, -1, 1]), torch.tensor([1., 0.5, 0.2, 0.01])
    for w in (0., 1.7, torch.tensor([0., 1., 2., 4.])):
        for a, b in zip(model(x, t, y=y), student(x, t, y=y, w=w)): assert a is b is None or a.equal(b)
    new = {k for k in student.net.state_dict() if k not in model.net.state_dict()}
    assert new and all(k.startswith("guidance.") for k in new) and student.learned_var == model.learned_var
    assert all(student.net.state_dict()[k].equal(v) for k, v in model.net.state_dict().items())
    assert student.net is not model.net and all(p.requires_grad for p in student.net.parameters())


def test_new_layers_have_a_seed_of_their_own():
    model = teacher()
    state = torch.get_rng_state()
    one, two, other = (guided_student(model, seed=seed).net.guidance.first.weight for seed in (0, 0, 1))
    assert one.equal(two) and not one.equal(other)
    assert torch.get_rng_state().equal(state), "the global generator is left as it was"


def test_a_student_is_in_the_mode_of_its_teacher():
    model = teacher()
    for mode in (True, False):
        assert guided_student(with_net(model, model.net.train(mode))).net.training == mode


def test_who_cannot_be_guided():
    with pytest.raises(BadInput, match="knows no labels"): guided_student(teacher(n_labels=0))
    with pytest.raises(BadInput, match="give the student to begin with"): guided_student(ORACLE)


# --- stage one

class Exact:
    "The exact pair as a teacher that takes a weight; it notes what it is asked."
    schedule, own_facts = COSINE, dict(w_range=[0., 4.])

    def __init__(self): self.asked = []
    def draw(self, x0, generator=None): return hears().draw(x0, generator)
    def __call__(self, x, t, y, w): self.asked.append((t, y, w)); return guided_target(ORACLE, x, t, y, w)


def test_both_passes_are_asked_with_their_labels():
    seen = []
    class Asked:
        schedule = COSINE
        def __call__(self, x, t, y=None): seen.append((x, t, y)); return ORACLE(x, t, y=y)
    x, t, y, w = randn(5, 2), torch.rand(5).double(), torch.tensor([0, 1, 2, 3, -1]), torch.rand(5).double()
    found = guided_target(Asked(), x, t, y, w)
    (x_2, t_2, y_2), = seen                                      # one pass of a doubled batch
    assert x_2.equal(torch.cat([x, x])) and t_2.equal(torch.cat([t, t])) and y_2.tolist() == [*y, *[-1]*5]
    cond, free = ORACLE(x, t, y=y), ORACLE(x, t)
    assert_close(found.x0, cond.x0 + w[:, None] * (cond.x0 - free.x0))
    assert_close(found.x0[4], free.x0[4])                   # without a label there is nothing to guide by


def test_every_row_has_its_own_weight_and_time():
    seen, data = {}, (X, Y)
    def net(x, t, y, w):
        seen.update(t=t, y=y, w=w)
        pred = guided_target(ORACLE, x, t, y, w)
        return COSINE.alpha(t)[:, None] * pred.eps - COSINE.sigma(t)[:, None] * pred.x0      # v
    loss = guided_loss(ORACLE, GuidedDenoiser(None, COSINE, w_range=(1., 3.)))(net, data, seeded(0, "loss"))
    assert loss < 1e-12, "no loss for the pair's own answer at the row's own weight and time"
    assert seen["w"].unique().numel() == seen["t"].unique().numel() == 200
    assert 1 <= seen["w"].min() < 1.1 and 2.9 < seen["w"].max() <= 3 and seen["y"].equal(Y)
    wrong = lambda x, t, y, w: net(x, t, y, w.flip(0))
    assert guided_loss(ORACLE, GuidedDenoiser(None, COSINE))(wrong, data, seeded(0, "loss")) > 1e-3


def test_dropped_labels_are_dropped_for_both_and_a_table_of_times():
    seen = {}
    def net(x, t, y, w): seen.update(t=t, y=y); return torch.zeros_like(x)
    guided_loss(ORACLE, hears(), T=4, drop=0.5)(net, (X, Y), seeded(0, "loss"))
    assert 0.35 < (seen["y"] == -1).double().mean() < 0.65
    assert set((4 * seen["t"]).tolist()) == {1., 2., 3., 4.}


def test_without_guidance_it_is_a_plain_loss_against_the_teacher():
    "Of a teacher that knows x0, at any weight: standard training."
    x0, seen = randn(64, 2), {}
    class Knows:
        schedule = COSINE
        def __call__(self, x, t, y=None): return from_x0(x, torch.cat([x0, x0]), t, COSINE)
    def net(x, t, y, w): seen.update(t=t, x=x); return (3 * x).sin()
    found = guided_loss(Knows(), hears(), "snr_plus_1")(net, (x0, torch.zeros(64).long()), seeded(0, "loss"))
    noise = (seen["x"] - COSINE.alpha(seen["t"])[:, None] * x0) / COSINE.sigma(seen["t"])[:, None]
    plain = Denoiser(lambda x, t: (3 * x).sin(), COSINE, "v")
    assert_close(found, denoising_loss(plain, x0, seen["t"], noise, "snr_plus_1"), rtol=1e-4, atol=1e-6)


def test_only_the_student_gets_a_gradient_and_only_the_generator_is_asked():
    model, student, seen = teacher(), hears(), []
    def net(x, t, **cond): seen.append(x); return student.net(x, t, **cond)
    loss_fn, losses = guided_loss(model, student), []
    for _ in range(2): losses.append(loss_fn(net, DATA, seeded(0, "loss")))
    assert losses[0].equal(losses[1]) and seen[0].equal(seen[1])
    losses[0].backward()
    assert all(p.grad is None for p in model.net.parameters())
    assert any(p.grad is not None and p.grad.any() for p in student.net.parameters())


def test_noise_is_of_its_time():
    "What is asked at time t has the variance of x_t."
    seen, x0 = {}, torch.full((20_000, 2), 0.5)
    def net(x, t, y, w): seen.update(x=x, t=t); return torch.zeros_like(x)
    guided_loss(ORACLE, hears())(net, (x0, torch.zeros(20_000).long()), seeded(0, "loss"))
    noise = (seen["x"] - COSINE.alpha(seen["t"])[:, None] * x0) / COSINE.sigma(seen["t"])[:, None]
    assert abs(noise.var() - 1) < 0.05 and abs(noise.mean()) < 0.03


def test_facts_and_settings_reach_the_loss(tmp_path):
    learned = hears(out=4)
    learned.learned_var = True
    facts = guided_loss(teacher(), with_net(learned, learned.net, "x0"), "x0").facts
    assert (facts["kind"], facts["learned_var"], facts["weight"]) == ("x0", True, "x0")
    cfg = replace(ONE, steps=1, lr=1e-12, w_min=1., w_max=3., T=4, drop=0.5, weight="snr_plus_1")
    one, two = (stage_one(teacher(), replace(cfg, seed=k), DATA, out=tmp_path/str(k)).model for k in (0, 1))
    told = load_checkpoint(tmp_path/"0").manifest["loss"]
    assert [told[k] for k in ("T", "drop", "weight", "w_range")] == [4, 0.5, "snr_plus_1", [1., 3.]]
    assert one.w_range == (1., 3.) and not one.net.guidance.first.weight.equal(two.net.guidance.first.weight)


def test_stage_one_learns_and_leaves_the_teacher_alone():
    model = teacher()
    model.net.train()
    before, seen = copy.deepcopy(model.net.state_dict()), []
    stage = stage_one(model, replace(ONE, steps=60), DATA, watch=lambda record: seen.append(record.step))
    assert seen == list(range(1, 61)) and stage.steps is None and type(stage.model) is GuidedDenoiser
    assert all(before[k].equal(v) for k, v in model.net.state_dict().items()) and model.net.training
    assert all(p.requires_grad and p.grad is None for p in model.net.parameters())
    assert not weights(stage.record.net).equal(weights(stage.model.net)), "the average"
    assert weights(stage.model.net.guidance).abs().sum() > 0 and stage.model.net.guidance.second.weight.any()


def test_stage_one_comes_near_an_exact_pair():
    "A short training removes most of what a conditional start is off."
    torch.manual_seed(0)
    net = MLP(MLPConfig(width=32, depth=1, waves=2, n_labels=4))
    student = guided_student(Denoiser(net, COSINE, "v"), w_waves=16)
    x, y = MIX.sample_labelled(4000, seeded(0, "near"))
    x_t = q_sample(x.float(), 0.6, randn(4000, 2).float(), COSINE)
    want = guided_target(ORACLE, x_t, 0.6, y, 2.).x0
    apart = (ORACLE(x_t, 0.6, y=y).x0 - want).square().mean().sqrt()
    cfg = replace(ONE, steps=250, batch=64, lr=5e-3, anneal=True)
    found = stage_one(ORACLE, cfg, (x.float(), y), student).model(x_t, 0.6, y=y, w=2.).x0
    assert (found - want).square().mean().sqrt() < 0.35 * apart


def test_students_that_do_not_fit():
    for student, words in ((teacher(), "weights in None"),
                           (hears(w_range=(0., 2.)), r"\(0.0, 2.0\), wanted is \(0.0, 4.0\)"),
                           (GuidedDenoiser(network(w_waves=8), Schedule.linear()), "give both the same")):
        with pytest.raises(BadInput, match=words): stage_one(ORACLE, ONE, DATA, student)
        with pytest.raises(BadInput, match=words): next(stage_two(hears(), TWO, DATA, student))
    with pytest.raises(BadInput, match="data without labels"): stage_one(teacher(), ONE, DATA[0])


@pytest.mark.parametrize("wrong", [
    dict(weight="snr"), dict(drop=-0.1), dict(drop=1.1), dict(w_min=5.), dict(lr=0.)])
def test_settings_that_no_stage_can_have(wrong):
    with pytest.raises(BadInput): replace(ONE, **wrong)


def test_what_is_not_said_is_the_papers():
    "Meng et al. 2023 for models of pixels: weights in [0, 4], truncated SNR, all times."
    c = GuidedConfig(10)
    assert (c.w_min, c.w_max, c.weight, c.T, c.drop) == (0., 4., "snr_trunc", None, 0.)


# --- stage two

@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("between", [False, True])
def test_one_weight_from_end_to_end(n, between):
    "Both steps of the teacher, and the student, at the times of one step and with the weight of the row."
    exact, seen = Exact(), {}
    def net(x, t, y, w): seen.update(t=t, y=y, w=w); return torch.zeros_like(x)
    halving_loss(exact, n, between=between)(net, (X, Y), seeded(0, "loss"))
    (t, y_1, w_1), (mid, y_2, w_2) = exact.asked
    assert w_1.equal(w_2) and w_1.equal(seen["w"]) and w_1.unique().numel() == 200
    assert y_1.equal(Y) and y_2.equal(Y) and seen["y"].equal(Y) and seen["t"].equal(t)
    assert_close(mid, t - 0.5/n)
    parts = n * (1 + between)
    assert set((t * parts).round().long().tolist()) == set(range(1, parts + 1))
    assert_close(t * parts, (t * parts).round(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3])
def test_between_the_steps(n):
    "Steps of the same length begin at twice as many times; the one that has no room ends at 0."
    many = torch.zeros(2000).double()
    drawn = torch.stack(draw_halves(many, n, seeded(0, "halves"), True), 1).unique(dim=0)
    i = torch.arange(1, 2*n + 1).double() / 2
    assert_close(drawn, torch.stack([i, i - 0.5, (i - 1).clamp(min=0)], 1) / n)
    plain = torch.stack(draw_halves(many, n, seeded(0, "halves")), 1).unique(dim=0)
    assert_close(plain, drawn[1::2])


def test_the_chain_teaches_weights():
    first = hears()
    stages = halved(first)
    assert list(stages) == [4, 2, 1]
    x, y = X[:20].float(), Y[:20]
    for stage in stages.values():
        assert type(stage.model) is GuidedDenoiser and stage.model.w_range == (0., 4.)
        apart = stage.model(x, 0.5, y=y, w=0.).x0 - stage.model(x, 0.5, y=y, w=4.).x0
        assert apart.abs().max() > 1e-3, "what it says depends on the weight"
        with pytest.raises(BadInput, match="trained for w"): stage.model(x, 0.5, y=y, w=4.1)


def test_a_chain_of_pictures_with_learned_variances():
    data, cfg = (torch.rand(32, 1, 8, 8) * 2 - 1, torch.arange(32) % 10), dict(batch=8, steps=2)
    one = stage_one(picture_teacher(out_ch=2), replace(ONE, **cfg), data).model
    assert one.learned_var and one.net.config.w_waves == 8
    for stage in stage_two(one, replace(TWO, start=2, late_steps=2, **cfg), data):
        noise, cond = torch.randn(2, 1, 8, 8), dict(y=torch.tensor([3, -1]), w=2.)
        x = sample_last(stochastic_step(), stage.model, noise, COSINE.grid(2), **cond)
        assert x.isfinite().all() and stage.model.learned_var


def test_no_stage_learns_without_labels():
    for begin in (lambda: stage_one(teacher(), ONE, DATA[0]), lambda: [*stage_two(hears(), TWO, DATA[0])]):
        with pytest.raises(BadInput, match="without labels, which guidance needs"): begin()
    with pytest.raises(BadInput, match="Got T = 0"): replace(ONE, T=0)


def test_a_teacher_without_weights_begins_no_stage_two():
    for model in (teacher(), ORACLE, ClassifierFree(teacher(), 2.)):
        with pytest.raises(BadInput, match="takes no guidance weight: begin with stage_one"):
            next(stage_two(model, TWO, DATA))
    assert halved(Clipped(hears()), replace(TWO, start=2))[1].steps == 1, "wrapped is fine"


def test_one_weight_for_all_needs_no_dial():
    "Chapter 12's chain takes a guided pair as its teacher; its students hear no weight."
    cfg = replace(TWO, between=False)
    for stage in progressive_distillation(ClassifierFree(teacher(), 2.), cfg, DATA): pass
    assert type(stage.model) is Denoiser and stage.model.net.config.w_waves == 0
    told = halving_loss(ClassifierFree(teacher(), 2.), 4).facts["teacher"]
    assert told["inside"] == "ClassifierFree" and told["w"] == 2. and told["model"] == identity(teacher())


# --- files

STATES = ("net", "ema", "optimizer")


def saved(folder) -> list:
    "All that a training left behind, but its timings."
    found, keys = load_checkpoint(folder), ("step", "loss", "lr", "grad_norm")
    lines = [{k: line[k] for k in keys} for line in read_log(folder)]
    return [found.tensors(which) for which in STATES] + [lines, found.manifest["loss"]]


def same(a, b):
    for one, two in zip(saved(a)[:3], saved(b)[:3], strict=True):
        assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)
    assert saved(a)[3:] == saved(b)[3:]


class Stop(Exception): pass


@pytest.mark.parametrize("step", [1, 5, 11])
def test_stage_one_goes_on_as_if_nothing_had_happened(tmp_path, step):
    def stop(record):
        if record.step == step: raise Stop
    whole, seen = stage_one(teacher(), ONE, DATA, out=tmp_path/"whole"), []
    with pytest.raises(Stop): stage_one(teacher(), ONE, DATA, out=tmp_path/"cut", watch=stop)
    again = stage_one(teacher(), ONE, DATA, out=tmp_path/"cut", watch=lambda record: seen.append(record.step))
    same(tmp_path/"whole", tmp_path/"cut")
    assert weights(whole.model.net).equal(weights(again.model.net)) and len(seen) < 13
    for seed, cfg in ((1, ONE), (0, replace(ONE, w_max=3.)), (0, replace(ONE, T=4))):
        with pytest.raises(BadInput, match="another run"):
            stage_one(teacher(seed=seed), cfg, DATA, out=tmp_path/"cut")


@pytest.mark.parametrize("n, step", [(4, 4), (2, 8), (1, 3)])
def test_stage_two_goes_on_as_if_nothing_had_happened(tmp_path, n, step):
    def stop(at, record):
        if (at, record.step) == (n, step): raise Stop
    halved(hears(), out=tmp_path/"whole")
    with pytest.raises(Stop): halved(hears(), out=tmp_path/"cut", watch=stop)
    halved(hears(), out=tmp_path/"cut")
    for k in (4, 2, 1): same(tmp_path/f"whole/student-{k}", tmp_path/f"cut/student-{k}")
    with pytest.raises(BadInput, match="another run"):
        halved(hears(), replace(TWO, between=False), out=tmp_path/"cut")


def test_manifests_name_weights_and_teachers(tmp_path):
    model = teacher()
    first = stage_one(model, replace(ONE, w_max=3.), DATA, out=tmp_path/"one").model
    told = load_checkpoint(tmp_path/"one").manifest
    assert told["loss"]["w_range"] == [0., 3.] and told["loss"]["teacher"] == identity(model)
    assert told["net"]["config"]["w_waves"] == 8 and "steps" not in told["loss"]
    above = told["files"]["ema.safetensors"]["sha256"]
    halved(first, out=tmp_path/"two")
    for n in (4, 2, 1):
        told = load_checkpoint(tmp_path/f"two/student-{n}").manifest
        loss = told["loss"]
        assert (loss["steps"], loss["between"], loss["w_range"]) == (n, True, [0., 3.])
        assert (loss["teacher"]["sha256"], loss["teacher"]["steps"]) == (above, 2*n)
        above = told["files"]["ema.safetensors"]["sha256"]
    halved(first, replace(TWO, between=False), out=tmp_path/"plain")
    assert "between" not in load_checkpoint(tmp_path/"plain/student-1").manifest["loss"]


def test_saved_students_open_with_their_range(tmp_path):
    first = stage_one(teacher(), replace(ONE, w_max=3.), DATA, out=tmp_path/"one").model
    last = halved(first, out=tmp_path/"two")[1].model
    x, y = X[:4].float(), Y[:4]
    for folder, model in ((tmp_path/"one", first), (tmp_path/"two/student-1", last)):
        found = load_model(folder)
        assert type(found) is GuidedDenoiser and found.w_range == (0., 3.)
        assert found(x, 1., y=y, w=2.).x0.equal(model(x, 1., y=y, w=2.).x0)
        with pytest.raises(BadInput, match="from 0 to 3"): found(x, 1., y=y, w=4.)
    assert open_model(tmp_path/"two/student-1").loss["steps"] == 1


TRAINS = """
import sys
from test_guided_distill import *
torch.set_num_threads(1)
often = dict(steps=90, save_every=20, log_every=1)
one, two = replace(ONE, **often), replace(TWO, start=4, late_steps=10, **often)
first = stage_one(teacher(), one, DATA, out=sys.argv[1] + "/one").model
halved(first, two, out=sys.argv[1] + "/two")
"""


@pytest.mark.skipif(os.name != "posix", reason="kills by signal")
@pytest.mark.usefixtures("in_a_folder")
def test_signals_inside_both_stages_leave_no_trace():
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = lambda out: [sys.executable, "-c", TRAINS, out]
    subprocess.run(command("whole"), env=env, check=True, timeout=240)
    for place in ("one", "two/student-2"):
        for sign, least in ((signal.SIGTERM, 10), (signal.SIGKILL, 50)):
            p = subprocess.Popen(command("stopped"), env=env, stderr=subprocess.DEVNULL)
            while len(read_log(f"stopped/{place}")) < least and p.poll() is None: time.sleep(0.01)
            p.send_signal(sign)
            code, step = p.wait(60), load_checkpoint(f"stopped/{place}").manifest["step"]
            assert code == (128 + sign if sign == signal.SIGTERM else -sign) and step < 90
            assert sign == signal.SIGKILL or step >= least, "SIGTERM saves where it is"
    subprocess.run(command("stopped"), env=env, check=True, timeout=240)
    for place in ("one", *(f"two/student-{n}" for n in (2, 1))): same(f"whole/{place}", f"stopped/{place}")


# --- noise between the steps

class Notes:
    "A model that notes when it is asked."
    schedule = COSINE

    def __init__(self): self.asked = []
    def __call__(self, x, t): self.asked.append(t); return ORACLE(x, t)


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_one_evaluation_a_step_and_none_at_the_end(n):
    notes = Notes()
    x = sample_last(stochastic_step(), notes, randn(3, 2), COSINE.grid(n), seeded(0, "noise"))
    assert notes.asked == COSINE.grid(n)[:-1].tolist() and x.isfinite().all()
    again = sample_last(stochastic_step(), notes, randn(3, 2), COSINE.grid(n), seeded(0, "noise"))
    other = sample_last(stochastic_step(), notes, randn(3, 2), COSINE.grid(n), seeded(1, "noise"))
    assert x.equal(again) and (n == 1 or not x.equal(other)), "one evaluation: no noise"


SCHEDULES = [COSINE, Schedule.linear(), Schedule.vp(), Schedule.linear(7, 0.05, 0.6)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("t, u", [(1., 0.9), (0.7, 0.4), (0.7, 0.2), (0.02, 0.01), (0.3, 0.)])
def test_a_student_that_knows_x0_ends_where_noising_would(schedule, t, u):
    "Down on x0's own line and up: x_u has mean alpha x0 and, given eps of x_t, the variance of the way up."
    x0, eps = randn(20_000, 2), randn(20_000, 2, seed=1)
    class Knows:
        def __call__(self, x, t): return from_x0(x, x0, t, schedule)
    model = Knows()
    model.schedule = schedule
    x_u = stochastic_step()(model, q_sample(x0, t, eps, schedule), t, u, seeded(0, "noise"))
    rest = x_u - schedule.alpha(u) * x0
    assert abs(rest.var() - schedule.sigma(u)**2) < 0.05 * schedule.sigma(u)**2 + 1e-12
    k = max(2*u - t, 0.)
    kept = schedule.alpha(u) / schedule.alpha(k) * schedule.sigma(k)
    assert_close(((rest * eps).mean()), torch.tensor(kept).double(), rtol=0, atol=0.02)


@pytest.mark.parametrize("t, u", [(0.5, 0.5), (0.5, 0.6), (0., 0.1)])
def test_stochastic_steps_go_down(t, u):
    with pytest.raises(BadInput, match="stochastic steps go down"):
        stochastic_step()(ORACLE, randn(2, 2), t, u)


def test_a_teacher_that_takes_w_is_for_stage_two():
    student = guided_student(teacher())
    with pytest.raises(BadInput, match="halve its steps by stage_two"): guided_student(student)
    with pytest.raises(BadInput, match="halve its steps by stage_two"): stage_one(student, ONE, DATA)
    class Bare(torch.nn.Module):
        def __init__(self): super().__init__(); self.last = torch.nn.Linear(1, 1)
        def forward(self, x, t, y=None): return self.last(x)
    with pytest.raises(BadInput, match="give the student to begin with"):
        guided_student(Denoiser(Bare(), COSINE, "v"))
    with pytest.raises(BadInput, match="one time for all rows"):
        stochastic_step()(student, torch.zeros(2, 2), torch.full((2,), 0.5), torch.full((2,), 0.4))
