"One step where two led: the target's identity on anything, and a chain that nothing can upset."
import copy, math
from dataclasses import replace

import pytest, torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.ddgan import GeneratorModel
from fastdiff_edu.denoiser import Clipped, Counted, Denoiser, denoising_errors, from_x0
from fastdiff_edu.distill import (DistillConfig, at_rest, distillation_loss, distillation_target, draw_halves,
                                  halving_loss, halvings, progressive_distillation, student_of, two_steps)
from fastdiff_edu.forward import q_sample
from fastdiff_edu.knowledge import identity, trajectory_end
from fastdiff_edu.nets.mlp import MLP, MLPConfig, PointConfig, PointGenerator
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.oracle import GaussianMixture, gaussians_25
from fastdiff_edu.sample import ddim_step
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import load_checkpoint, read_log

SCHEDULES = {"cosine": Schedule.cosine(), "linear": Schedule.linear(), "iddpm": Schedule.cosine_iddpm(),
             "vp": Schedule.vp(), "ddgan": Schedule.vp(t_min=1e-3),
             "short table": Schedule.linear(7, 0.05, 0.6)}
COSINE = SCHEDULES["cosine"]
POINTS = gaussians_25().sample(200, seeded(0, "points")).float()
CFG = DistillConfig(steps=8, late_steps=12, late=1, start=8, end=1, batch=16, lr=1e-2, log_every=2,
                    save_every=3, bar=False)
randn = lambda *shape, seed=0: torch.randn(*shape, generator=seeded(seed, "test"), dtype=torch.float64)


class Wild:
    "A model without any sense, that depends on point and time."
    def __init__(self, schedule): self.schedule = schedule

    def __call__(self, x, t):
        row = t.reshape(-1, *[1]*(x.ndim - 1)) if isinstance(t, torch.Tensor) and t.ndim else t
        return from_x0(x, (7*x + 5*row).sin(), t, self.schedule)


class Says:
    "A model that says one thing."
    def __init__(self, x0, schedule): self.x0, self.schedule = x0, schedule

    def __call__(self, x, t): return from_x0(x, self.x0, t, self.schedule)


def landing(schedule, x, t, mid, u) -> float:
    "How far the one step with the target ends from the two steps."
    x_u = two_steps(Wild(schedule), x, t, mid, u)
    target = distillation_target(x, x_u, t, u, schedule)
    return (ddim_step()(Says(target, schedule), x, t, u) - x_u).abs().max().item()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 4096])
def test_one_step_lands_where_two_did(schedule, n):
    x, i = randn(64, 3, 2), torch.randint(1, n + 1, (64,), generator=seeded(n, "i")).double()
    i[:2] = torch.tensor([1., n])                            # u = 0, and t = 1
    assert landing(schedule, x, i/n, (i - 0.5)/n, (i - 1)/n) < 1e-12
    for k in (1, n): assert landing(schedule, x, k/n, (k - 0.5)/n, (k - 1)/n) < 1e-12
    t, u = ((i - k) / n for k in (0, 1))          # times of single precision: the data's counts
    assert landing(schedule, x, t.float(), ((i - 0.5)/n).float(), u.float()) < 1e-12
    for t in torch.linspace(1, 0, 5)[:-1]: assert landing(schedule, x, t, t - 0.125, t - 0.25) < 1e-12


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(SCHEDULES)), st.floats(0, 0.99), st.floats(1e-3, 1), st.floats(0, 1),
       st.integers(1, 5))
def test_grids_need_not_be_even(name, u, length, share, d):
    t = min(u + length, 1.)
    assert landing(SCHEDULES[name], randn(4, d), t, u + share * (t - u), u) < 1e-12


def test_a_row_is_what_it_is_alone():
    x, x_u = randn(5, 2), randn(5, 2, seed=1)
    t, u = torch.tensor([1., 0.5, 0.2, 0.9, 0.03]).double(), torch.tensor([0., 0.25, 0., 0.89, 0.02]).double()
    alone = [distillation_target(x[[k]], x_u[[k]], t[k].item(), u[k].item(), COSINE) for k in range(5)]
    assert_close(distillation_target(x, x_u, t, u, COSINE), torch.cat(alone), atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("n, bound", [(1, 1e-6), (64, 1e-4), (4096, 5e-3)])
def test_float32_loses_digits_as_steps_get_short(n, bound):
    x, model = randn(256, 2), gaussians_25().denoiser(COSINE)
    t, mid, u = draw_halves(x, n, seeded(0, "halves"))
    exact = distillation_target(x, two_steps(model, x, t, mid, u), t, u, COSINE)
    t, mid, u = t.float(), mid.float(), u.float()
    rough = distillation_target(x.float(), two_steps(model, x.float(), t, mid, u), t, u, COSINE)
    assert rough.dtype == torch.float32 and (rough - exact).abs().max() < bound


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_times_that_change_places_are_noticed(schedule):
    x, wild = randn(64, 2), Wild(schedule)
    right = two_steps(wild, x, 0.8, 0.7, 0.6)
    for wrong in (two_steps(wild, x, 0.8, 0.6, 0.7), ddim_step()(wild, x, 0.8, 0.6)):
        step = ddim_step()(Says(distillation_target(x, wrong, 0.8, 0.6, schedule), schedule), x, 0.8, 0.6)
        assert (step - right).abs().max() > 1e-2


def test_the_loss_is_the_plain_one_for_a_teacher_who_knows():
    x0, noise = randn(64, 2), randn(64, 2, seed=1)
    halves = draw_halves(x0, 8, seeded(0, "halves"))
    errors = denoising_errors(Wild(COSINE), x0, halves[0], noise)
    for weight, want in dict(x0=errors.x0, simple=errors.eps, snr_plus_1=errors.x0 + errors.eps).items():
        found = distillation_loss(Wild(COSINE), Says(x0, COSINE), x0, *halves, noise, weight)
        assert_close(found, want.mean(), rtol=1e-9, atol=1e-12)


def test_only_the_student_gets_a_gradient():
    torch.manual_seed(0)
    teacher, student = (Denoiser(MLP(MLPConfig(width=8)).double(), COSINE, "v") for _ in range(2))
    nn.init.normal_(teacher.net.last.weight)
    x0 = randn(16, 2)
    distillation_loss(student, teacher, x0, *draw_halves(x0, 4), randn(16, 2, seed=1)).backward()
    assert all(p.grad is None for p in teacher.net.parameters())
    assert any(p.grad.abs().sum() > 0 for p in student.net.parameters())


class Asked:
    "A model with labels that remembers what it was asked."
    schedule, asked = COSINE, None

    def __init__(self): self.asked = []

    def __call__(self, x, t, y=None):
        self.asked.append((torch.as_tensor(t).clone(), y))
        return from_x0(x, torch.zeros_like(x), t, COSINE)


def test_both_are_asked_with_the_same_labels_at_the_right_times():
    teacher, student = Asked(), Asked()
    x0, y = randn(6, 2), torch.arange(6)
    t, mid, u = draw_halves(x0, 4, seeded(0, "halves"))
    distillation_loss(student, teacher, x0, t, mid, u, randn(6, 2), y=y)
    times, labels = zip(*teacher.asked, *student.asked)
    for found, want in zip(times, (t, mid, t), strict=True): assert_close(found, want)
    assert all(label is y for label in labels)


def test_dropped_labels_are_dropped_for_both():
    teacher, mix = Asked(), MLPConfig(width=8, n_labels=10)
    halving_loss(teacher, 4, drop=0.5)(MLP(mix), (POINTS, torch.arange(200) % 10), seeded(0, "loss"))
    (_, first), (_, second) = teacher.asked
    assert torch.equal(first, second) and 0.4 < (first == -1).double().mean() < 0.6


@pytest.mark.parametrize("start, end, want", [
    (2, 1, [1]), (8, 1, [4, 2, 1]), (8, 4, [4]), (12, 3, [6, 3]), (1024, 8, [512, 256, 128, 64, 32, 16, 8])])
def test_halvings(start, end, want): assert halvings(start, end) == want


@pytest.mark.parametrize("start, end", [
    (1, 1), (8, 3), (1000, 3), (8, 0), (0, 1), (8, 8), (4, 8), (8, -1), (6, 2), (8., 1), ("8", 1), (8, True)])
def test_no_halvings(start, end):
    with pytest.raises(BadInput): halvings(start, end)


def network(seed:int=0, **config) -> MLP:
    torch.manual_seed(seed)
    net = MLP(MLPConfig(width=8, depth=1, **config))
    nn.init.normal_(net.last.weight, std=0.3)
    return net


def teacher(kind:str="v", **config) -> Denoiser: return Denoiser(network(**config), COSINE, kind)
def weights(net) -> torch.Tensor: return torch.cat([p.detach().flatten() for p in net.parameters()])


def chain(cfg=CFG, model=None, data=POINTS, student=None, out=None, watch=lambda n, record: None) -> dict:
    stages = progressive_distillation(model or teacher(), cfg, data, student, out, watch)
    return {stage.steps: stage for stage in stages}


def test_a_chain_is_stages_of_its_settings():
    seen = {4: [], 2: [], 1: []}
    stages = chain(watch=lambda n, record: seen[n].append((record.step, record.lr)))
    assert list(stages) == [4, 2, 1] and [len(seen[n]) for n in (4, 2, 1)] == [8, 8, 12]
    for n, records in seen.items():              # the rate begins anew, and falls to 0 after the last update
        steps = len(records)
        assert_close([lr for _, lr in records], [CFG.lr * (steps - s) / steps for s in range(steps)])
    for stage in stages.values(): assert_close(weights(stage.record.net), weights(stage.model.net))   # no EMA


def test_stages_learn_from_different_noise():
    seeds = {}
    for stage in (seen := chain()).values(): seeds[stage.steps] = weights(stage.model.net)
    same = chain()
    assert all(torch.equal(seeds[n], weights(same[n].model.net)) for n in seen), "the same again"
    other = chain(replace(CFG, seed=1))
    assert not any(torch.equal(seeds[n], weights(other[n].model.net)) for n in seen)


def test_the_teacher_is_copied_and_stays_as_it_is():
    model = teacher()
    model.net.train()
    before = copy.deepcopy(model.net.state_dict())
    stages = progressive_distillation(model, CFG, POINTS)
    first = weights(next(stages).model.net)
    with torch.no_grad():
        for p in model.net.parameters(): assert p.requires_grad and p.grad is None
        assert all(torch.equal(before[k], v) for k, v in model.net.state_dict().items())
    assert model.net.training
    rest = [weights(stage.model.net) for stage in stages]
    with_others = progressive_distillation(model, CFG, POINTS)
    assert torch.equal(weights(next(with_others).model.net), first)
    for p in model.net.parameters(): p.data.zero_()      # what is done to it now, the chain does not see
    assert all(torch.equal(a, weights(stage.model.net)) for a, stage in zip(rest, with_others, strict=True))


def test_averages_are_students_if_asked_for():
    stages = chain(replace(CFG, ema=0.9))
    for stage in stages.values(): assert not torch.equal(weights(stage.record.net), weights(stage.model.net))
    plain = chain()
    assert torch.equal(weights(plain[4].record.net), weights(stages[4].record.net)), "the same first training"
    assert not torch.equal(weights(plain[2].record.net), weights(stages[2].record.net)), "of another teacher"


STATES = ("net", "ema", "optimizer")


def saved(out, n:int) -> list:
    "All that a stage left behind, but its timings."
    found = load_checkpoint(out/f"student-{n}")
    keys = "step", "loss", "lr", "grad_norm"
    lines = [{k: line[k] for k in keys} for line in read_log(out/f"student-{n}")]
    return [{which: found.tensors(which) for which in STATES}, found.manifest["loss"], lines]


def same(a, b):
    (tensors, loss, log), (others, loss_2, log_2) = a, b
    assert loss == loss_2 and log == log_2
    for which in STATES: assert_close(tensors[which], others[which], rtol=0, atol=0)


@pytest.mark.parametrize("n, step", [(4, 1), (4, 8), (2, 4), (2, 8), (1, 3), (1, 11)])
def test_stopped_anywhere_it_goes_on_as_if_nothing_had_happened(tmp_path, n, step):
    class Stop(Exception): pass
    def stop(at, record):
        if (at, record.step) == (n, step): raise Stop
    chain(out=tmp_path/"whole")
    with pytest.raises(Stop): chain(out=tmp_path/"cut", watch=stop)
    seen = []
    chain(out=tmp_path/"cut", watch=lambda at, record: seen.append(at))
    assert not {4, 2, 1} - set(seen) and seen.count(4) <= 8
    for k in (4, 2, 1): same(saved(tmp_path/"whole", k), saved(tmp_path/"cut", k))


def test_a_finished_chain_is_read_not_run(tmp_path):
    first, updates = chain(out=tmp_path), []
    again = chain(out=tmp_path, watch=lambda n, record: updates.append(n))
    assert updates == [4, 2, 1], "one record for each, the last one"
    for n in first: assert_close(weights(first[n].model.net), weights(again[n].model.net), rtol=0, atol=0)
    longer = chain(replace(CFG, end=2), out=tmp_path/"b"), chain(CFG, out=tmp_path/"b")
    assert_close(weights(longer[1][1].model.net), weights(first[1].model.net), rtol=0, atol=0)


def test_another_teacher_is_refused(tmp_path):
    chain(out=tmp_path)
    with pytest.raises(BadInput, match="another run"): chain(model=teacher(seed=1), out=tmp_path)
    with pytest.raises(BadInput, match="another run"): chain(replace(CFG, lr=0.1), out=tmp_path)


def test_manifests_link_each_student_to_its_teacher(tmp_path):
    model = teacher()
    chain(model=model, out=tmp_path)
    above = identity(model)["sha256"]
    for n in (4, 2, 1):
        manifest = load_checkpoint(tmp_path/f"student-{n}").manifest
        assert manifest["loss"]["teacher"] == dict(model="MLP", kind="v", sha256=above, steps=2*n)
        assert manifest["loss"]["steps"] == n
        above = manifest["files"]["ema.safetensors"]["sha256"]


def test_any_model_teaches():
    mix = GaussianMixture([[-1., 0.], [1., 0.]], 0.1, labels=[0, 1])
    x, y = mix.sample_labelled(200, seeded(0, "labelled"))
    found = chain(model=mix.denoiser(COSINE), data=(x.float(), y), student=teacher(n_labels=2))
    assert found[1].model.kind == "v"
    for wrap in (Clipped, Counted): assert chain(model=wrap(teacher()))[1].steps == 1
    other = GaussianMixture([[-1., 0.], [2., 0.]], 0.1, labels=[0, 1])
    one, two, three = (identity(m.denoiser(COSINE)) for m in (mix, other, mix))
    assert one == three != two and one["model"] == two["model"] == "MixtureDenoiser"


def test_who_begins_as_whom():
    for kind, want in dict(eps="v", x0="x0", v="v").items():
        student = student_of(model := teacher(kind))
        assert student.kind == want and torch.equal(weights(student.net), weights(model.net))
        assert student.net is not model.net and all(p.requires_grad for p in student.net.parameters())
    assert student_of(teacher("eps"), "eps").kind == "eps"
    assert student_of(teacher("both", out=4)).kind == "both"
    learned = Denoiser(network(out=4), COSINE, "eps", True)
    assert student_of(learned).learned_var and chain(model=learned)[1].model.learned_var
    assert student_of(Clipped(teacher("eps"))).kind == "v"
    with pytest.raises(BadInput, match="give the student to begin with"):
        student_of(gaussians_25().denoiser(COSINE))


def test_what_is_done_to_a_yielded_student_the_chain_does_not_see():
    alone, seen = chain(), {}
    for stage in progressive_distillation(teacher(), CFG, POINTS):
        seen[stage.steps] = weights(stage.model.net)
        for p in stage.model.net.parameters(): p.data.zero_()
    assert all(torch.equal(seen[n], weights(alone[n].model.net)) for n in alone)


def test_two_schedules_are_refused():
    with pytest.raises(BadInput, match="give both the same"):
        chain(student=Denoiser(network(), Schedule.linear(), "v"))


def test_dice_teach_nothing():
    c = PointConfig(width=8)
    with pytest.raises(BadInput, match="draw"): at_rest(GeneratorModel(PointGenerator(c), COSINE, c.z_dim))


def test_a_resting_teacher_has_no_dropout_and_no_gradient():
    class Noisy(nn.Sequential):
        def forward(self, x, t): return super().forward(x)
    model = Denoiser(Noisy(nn.Linear(2, 2), nn.Dropout(0.5)), COSINE, "v")
    model.net.train()
    rest, x = at_rest(model), randn(8, 2).float()
    assert_close(rest(x, 0.5).x0, rest(x, 0.5).x0, rtol=0, atol=0)
    assert model.net.training and not any(p.requires_grad for p in rest.net.parameters())


def test_one_stage_learns_the_exact_map_of_one_gaussian():
    "One Gaussian: the flow is linear, and so is the best student; a short training comes near it."
    mix = GaussianMixture([[0.5, -0.5]], 0.4)
    model, x = mix.denoiser(COSINE), mix.sample(4000, seeded(0, "x")).float()
    cfg = DistillConfig(steps=400, late_steps=400, start=4, end=1, batch=128, lr=5e-3, bar=False)
    net = MLP(MLPConfig(width=32, depth=1, waves=0))
    stages = chain(cfg, model, x, Denoiser(net, COSINE, "v"))
    x_1 = randn(500, 2).float()
    want = trajectory_end(model, x_1, 4)
    off = lambda model, n: (trajectory_end(model, x_1, n) - want).square().mean().sqrt()
    assert max(off(stage.model, n) for n, stage in stages.items()) < 0.1 < 0.2 < off(model, 1)


def test_a_perfect_chain_loses_nothing():
    model = first = gaussians_25().denoiser(COSINE)
    for n in (8, 4, 2, 1): model = _Perfect(model, n)
    x = randn(32, 2)
    assert_close(trajectory_end(model, x, 1), trajectory_end(first, x, 16), rtol=0, atol=1e-10)


class _Perfect:
    "A student of n steps that learned all that its teacher could tell."
    def __init__(self, teacher, n): self.teacher, self.schedule, self.n = teacher, teacher.schedule, n

    def __call__(self, x, t):
        mid, u = t - 0.5/self.n, max(t - 1/self.n, 0.)
        x_u = two_steps(self.teacher, x, t, mid, u)
        return from_x0(x, distillation_target(x, x_u, t, u, self.schedule), t, self.schedule)


def test_gradient_of_the_loss_by_hand():
    "For a student that says x0 = c, weight 1: the slope is 2 (c - mean target), per coordinate."
    x0, noise = randn(64, 2), randn(64, 2, seed=1)
    halves, c = draw_halves(x0, 4, seeded(0, "halves")), torch.zeros(2).double().requires_grad_()
    model = gaussians_25().denoiser(COSINE)
    distillation_loss(Says(c.expand(64, 2), COSINE), model, x0, *halves, noise, "x0").backward()
    x_t = q_sample(x0, halves[0], noise, COSINE)
    target = distillation_target(x_t, two_steps(model, x_t, *halves), halves[0], halves[2], COSINE)
    assert_close(c.grad, -2 * target.mean(0) / 2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wrong", [
    dict(start=1000, end=3), dict(weight="snr"), dict(drop=-0.1), dict(late=-1), dict(late_steps=0),
    dict(end=0), dict(lr=math.nan), dict(late=1.5)])
def test_settings_that_no_chain_can_have(wrong):
    with pytest.raises(BadInput): DistillConfig(**wrong)


def test_what_is_not_said_is_the_authors():
    "Salimans and Ho 2022, cifar_distill.py: no average, no warm-up, a rate that falls to 0, 8192 steps to 1."
    c = DistillConfig()
    assert (c.start, c.end, c.steps, c.late_steps, c.late, c.batch) == (8192, 1, 50_000, 100_000, 2, 128)
    assert (c.lr, c.warmup, c.anneal, c.ema, c.clip, c.weight_decay) == (5e-5, 0, True, 0., 1., 0.)
    assert (c.weight, c.drop) == ("snr_trunc", 0.) and DistillConfig(late=0, late_steps=1).late == 0
    facts = halving_loss(gaussians_25().denoiser(COSINE), 4).facts
    want = dict(kind="v", weight="snr_trunc", drop=0., learned_var=False)
    assert {k: facts[k] for k in want} == want


@pytest.mark.parametrize("how", [
    dict(compile=True), dict(channels_last=True), dict(precision="bf16"), dict(parts=2)])
def test_other_ways_to_compute_the_same(how):
    "Compiled, laid out, rounded or dealt otherwise, a chain stays near the plain one."
    short = replace(CFG, start=4, steps=2, late_steps=2)
    torch.manual_seed(0)
    config = UNetConfig(8, 1, width=8, mult=(1, 2), blocks=1, attn=(), dropout=0., n_labels=10)
    model, data = Denoiser(UNet(config), COSINE, "v"), (randn(32, 1, 8, 8).float(), torch.arange(32) % 10)
    if how == dict(precision="bf16"): bound = 2 * short.lr     # Adam's first steps are as long as the rate
    else: bound = 1e-3 if "parts" not in how else math.inf     # parts have noise of their own
    plain, other = chain(short, model, data), chain(replace(short, **how), model, data)
    for n in (2, 1):
        assert (weights(plain[n].model.net) - weights(other[n].model.net)).abs().max() <= 2 * bound
    rough = weights(other[1].model.net)
    assert rough.dtype == torch.float32 and rough.isfinite().all()
