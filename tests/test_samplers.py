"Every sampler keeps its promises, on every schedule and grid; the rules for the ODE have the claimed orders."
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import pytest, scipy.integrate, torch
from torch.testing import assert_close

from fastdiff_edu import sample as sample_module, solvers
from fastdiff_edu.core import BadInput, randn_like, seeded
from fastdiff_edu.denoiser import Clipped, Counted, Denoiser
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.oracle import GaussianMixture
from fastdiff_edu.sample import ddim_step, ddpm_step, sample, sample_last
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.solvers import (deis_step, dpm_fast, dpm_solver_step, dpmpp_2m_step, euler_maruyama_step,
                                  euler_step, ggf_step, heun_step, measured_order, pndm_step, rk45_step)

SCHEDULES = {"linear": Schedule.linear, "cosine": Schedule.cosine, "cosine_iddpm": Schedule.cosine_iddpm,
             "vp": Schedule.vp, "vp of DDGAN": lambda: Schedule.vp(t_min=1e-3)}
SCHEDULES = {name: make() for name, make in SCHEDULES.items()}
SMALL_TABLES = {**SCHEDULES, "linear": Schedule.linear(50, 2e-3, 0.4),
                "cosine_iddpm": Schedule.cosine_iddpm(50)}
VP = SCHEDULES["vp"]


class Sampler(NamedTuple):
    "A step rule, and what is claimed of it."
    make: Callable|None         # () -> step; None: `dpm_fast`, which brings its own grid
    nfe: Callable|None          # n -> evaluations on a uniform grid of n steps from 1 to 0; None: it adapts
    order: float|None = None    # None: a random rule
    multistep: bool = False


def evaluations(each:int, start:int=0, steps:int=0) -> Callable:
    "`each` per step, `start` more in each of the first `steps`; one alone in the last step, into sigma = 0."
    return lambda n: each * (n - 1) + start * min(steps, n - 1) + 1


SAMPLERS = {
    "ddpm small": Sampler(ddpm_step, evaluations(1)),
    "ddpm large": Sampler(lambda: ddpm_step("large"), evaluations(1)),
    "ddim": Sampler(ddim_step, evaluations(1), 1),
    "ddim 0.5": Sampler(lambda: ddim_step(0.5), evaluations(1)),
    "ddim 1": Sampler(lambda: ddim_step(1.), evaluations(1)),
    "euler": Sampler(euler_step, evaluations(1), 1),
    "euler_maruyama": Sampler(euler_maruyama_step, evaluations(1)),
    "heun": Sampler(heun_step, evaluations(2), 2),
    "heun churn": Sampler(lambda: heun_step(0.3), evaluations(2)),
    "pndm 4": Sampler(lambda: pndm_step(4), evaluations(1, 3, 3), 2, True),
    "pndm 4 heun": Sampler(lambda: pndm_step(4, "heun"), evaluations(1, 1, 1), 2, True),
    "pndm 4 euler": Sampler(lambda: pndm_step(4, "euler"), evaluations(1), 2, True),
    "pndm 2 heun": Sampler(lambda: pndm_step(2, "heun"), evaluations(1, 1, 1), 2, True),
    "deis 1": Sampler(lambda: deis_step(1), evaluations(1), 1, True),
    "deis 2": Sampler(lambda: deis_step(2), evaluations(1), 2, True),
    "deis 3": Sampler(lambda: deis_step(3), evaluations(1), 2, True),
    "deis 4": Sampler(lambda: deis_step(4), evaluations(1), 2, True),
    "deis 2 start": Sampler(lambda: deis_step(2, dpm_solver_step(3)), evaluations(1, 2, 1), 2, True),
    "deis 3 start": Sampler(lambda: deis_step(3, dpm_solver_step(3)), evaluations(1, 2, 2), 3, True),
    "deis 4 start": Sampler(lambda: deis_step(4, dpm_solver_step(3)), evaluations(1, 2, 3), 4, True),
    "dpm_solver 1": Sampler(lambda: dpm_solver_step(1), evaluations(1), 1),
    "dpm_solver 2": Sampler(lambda: dpm_solver_step(2), evaluations(2), 2),
    "dpm_solver 3": Sampler(lambda: dpm_solver_step(3), evaluations(3), 3),
    "dpm_fast": Sampler(None, lambda n: n, 3),
    "dpmpp_2m": Sampler(dpmpp_2m_step, evaluations(1), 2, True),
    "rk45": Sampler(lambda: rk45_step(1e-4, 1e-4), None, 5),   # coarse, these two, and so quick
    "ggf": Sampler(lambda: ggf_step(0.5, 0.2), None),
}
RANDOM = [name for name, s in SAMPLERS.items() if s.order is None]
ODE = [name for name, s in SAMPLERS.items() if s.order]
MULTISTEP = [name for name, s in SAMPLERS.items() if s.multistep]
ADAPTIVE = [name for name, s in SAMPLERS.items() if s.nfe is None]
FREE = [name for name in ODE if name not in ("dpm_fast", "rk45")]   # fixed rules, between any two times
DIFFERENT = [name for name in FREE if name not in ("deis 1", "dpm_solver 1")]   # which are ddim: tested below
FIRST_ORDER_END = [name for name in SAMPLERS
                   if name not in ("euler", "euler_maruyama", "dpm_fast", *ADAPTIVE)]


def each(names): return pytest.mark.parametrize("name", list(names))
def on(schedules): return pytest.mark.parametrize("schedule", schedules.values(), ids=schedules)


def plan(name, schedule, n, spacing="uniform") -> tuple:
    "A fresh step and its grid."
    if name == "dpm_fast": return dpm_fast(n, schedule)
    return SAMPLERS[name].make(), schedule.grid(n, spacing)


MIX = GaussianMixture(torch.tensor([[-1., 0.4, 0.2], [0.9, -0.6, 0.5], [0.1, 0.8, -0.9]]).double(),
                      torch.tensor([0.2, 0.35, 0.5]).double(), torch.tensor([0.5, 0.3, 0.2]).double())
LABELLED = GaussianMixture(MIX.means, MIX.std / 2, MIX.weights, torch.tensor([0, 1, 2]))


def noise(*shape, dtype=torch.float64): return torch.randn(*shape, generator=seeded(0), dtype=dtype)


# --- at n = 1, 2, a prime and T

GRIDS = [(1, "uniform"), (2, "uniform"), (7, "uniform"), (7, "quadratic"), (7, "log_snr"), (7, "edm")]


@on(SCHEDULES)
@each(SAMPLERS)
def test_few_steps(name, schedule):
    "Finite, of one shape and type; the same again from a used step, which kept nothing; no state is changed."
    model, used = MIX.denoiser(schedule), None
    for n, spacing in GRIDS:
        for dtype in (torch.float32, torch.float64):
            if dtype == torch.float32 and (spacing != "uniform" or name in ADAPTIVE and n == 7): continue
            if dtype == torch.float64 and name in ADAPTIVE and n < 7: continue   # they are slow
            step, grid = plan(name, schedule, n, spacing)
            used = step if used is None or name == "dpm_fast" else used
            x = noise(3, 3, dtype=dtype)
            kept, g = x.clone(), seeded(1)
            states = [s.clone() for s in sample(step, model, x, grid, g)]
            again = list(sample(used, model, x, grid, seeded(1)))
            assert torch.equal(x, kept) and len(states) == len(grid)
            for a, b in zip(states, again, strict=True):
                assert a.shape == x.shape and a.dtype == dtype and a.isfinite().all()
                assert torch.equal(a, b)
            if name in ODE: assert torch.equal(g.get_state(), seeded(1).get_state()), "no noise is drawn"
            elif n == 7: assert not torch.equal(states[-1], sample_last(used, model, x, grid, seeded(2)))


@pytest.mark.parametrize("table", SCHEDULES)
@each(SAMPLERS)
def test_as_many_steps_as_the_table_has(name, table):
    "T = 1000 where that is quick, else 50; float32, for which t = 1 of the cosine schedule is the hardest."
    quick = name not in ADAPTIVE and "deis" not in name and SAMPLERS[name].nfe(1000) <= 1009
    schedules, T = (SCHEDULES, 1000) if quick and table in ("linear", "cosine") else (SMALL_TABLES, 50)
    step, grid = plan(name, schedules[table], T)
    x = sample_last(step, MIX.denoiser(schedules[table]), noise(2, 3, dtype=torch.float32), grid, seeded(1))
    assert x.dtype == torch.float32 and x.isfinite().all()
    if name != "pndm 4" or "cosine" not in table: assert x.abs().max() < 10   # its start: see the last test


@each(n for n in FIRST_ORDER_END if n != "heun churn")   # which first goes up
def test_one_step_ends_at_the_guess(name):
    "The step into sigma = 0 is first order for every rule, so one step from 1 to 0 is the posterior's mean."
    for schedule in SCHEDULES.values():
        model, x = MIX.denoiser(schedule), noise(4, 3)
        end = SAMPLERS[name].make()(model, x, 0.3, 0., seeded(1))
        assert_close(end, model(x, 0.3).x0, rtol=0, atol=1e-12)
        end = sample_last(SAMPLERS[name].make(), model, x, schedule.grid(1), seeded(1))
        assert_close(end, model(x, 1.).x0, rtol=0, atol=1e-9)


@each(n for n in SAMPLERS if n != "heun churn")
def test_step_of_no_length_stays(name):
    "From t to t: nothing moves, also in the middle of a run, and what was kept is not spoilt."
    step, grid = plan(name, VP, 7)
    model, x, times = MIX.denoiser(VP), noise(4, 3), grid.tolist()
    for t, u in zip(times[:3], times[1:]):
        assert_close(step(model, x, t, t, seeded(1)), x, rtol=0, atol=1e-12)
        x = step(model, x, t, u, seeded(1))
        assert x.isfinite().all()
    if name in FREE and name != "euler": assert_close(step(model, x, 0., 0.), x, rtol=0, atol=1e-12)


# --- one row or many, points or images, with conditions, through wrappers

def share_noise(monkeypatch):
    "From now on every row of a batch gets the same noise."
    alike = lambda x, g=None: torch.randn(x.shape[1:], generator=g, dtype=x.dtype).expand(x.shape)
    for module in (sample_module, solvers): monkeypatch.setattr(module, "randn_like", alike)


@each(SAMPLERS)
def test_row_does_not_depend_on_its_batch(name, monkeypatch):
    "The first row of 64 ends where it ends alone; with scipy's steps, one for all rows, to their tolerance."
    share_noise(monkeypatch)
    for schedule in SCHEDULES.values():
        x, model = noise(64, 3), MIX.denoiser(schedule)
        def end(rows):
            step, grid = plan(name, schedule, 1 if name == "ggf" else 7)   # its rows stroll apart, then meet
            return sample_last(step, model, rows, grid, seeded(3))
        together, alone = end(x)[:1], end(x[:1])
        scale = 1 + alone.abs().max()
        assert_close(together / scale, alone / scale, rtol=0, atol=5e-3 if name == "rk45" else 1e-9)


@cache
def images(kind:str) -> Denoiser:
    "A small network with random weights and three labels."
    torch.manual_seed(0)
    net = UNet(UNetConfig(size=8, width=8, mult=(1,), blocks=1, attn=(), dropout=0., n_labels=3)).eval()
    for p in net.parameters():
        if not p.any(): torch.nn.init.normal_(p, std=0.1)
    return Denoiser(net, VP, kind)


@each(SAMPLERS)
def test_images_with_labels(name):
    "Any model goes, y reaches it, clipping holds to the end, wrappers may be stacked."
    model, x, y = images("v"), noise(2, 3, 8, 8, dtype=torch.float32), torch.tensor([0, 2])
    counted = Counted(Clipped(model))
    step, grid = plan(name, VP, 3)
    end = sample_last(step, model, x, grid, seeded(1), y=y)
    assert end.shape == x.shape and end.dtype == x.dtype and end.isfinite().all()
    other = sample_last(step, model, x, grid, seeded(1), y=y.flip(0))
    assert not torch.allclose(end, other, atol=1e-3)
    clipped = sample_last(step, counted, x, grid, seeded(1), y=y)
    assert counted.nfe >= 3 and clipped.isfinite().all() and not torch.equal(clipped, end)
    if name in FIRST_ORDER_END or name in ("rk45", "ggf"): assert clipped.abs().max() <= 1 + 1e-5


@each(SAMPLERS)
def test_labels_choose_the_component(name):
    step, grid = plan(name, VP, 60)
    y = torch.arange(3).repeat(10)
    x = sample_last(step, LABELLED.denoiser(VP), noise(30, 3), grid, seeded(1), y=y)
    assert (torch.cdist(x, LABELLED.means).argmin(1) == y).float().mean() > 0.9


@each(["ddim", "ddim 0.5", "ddim 1"])
def test_every_row_its_own_times(name, monkeypatch):
    "Times of shape (B,) do what one call for each row does; sigma(u) = 0 takes no noise there either."
    share_noise(monkeypatch)
    x, t, u = noise(4, 3), *torch.tensor([[1., 0.7, 0.4, 0.2], [0.9, 0.7, 0.1, 0.]]).double()
    for schedule in SCHEDULES.values():
        model, step = MIX.denoiser(schedule), SAMPLERS[name].make()
        rows = [step(model, x[i:i+1], t[i].item(), u[i].item(), seeded(1)) for i in range(4)]
        assert_close(step(model, x, t, u, seeded(1)), torch.cat(rows), rtol=0, atol=1e-9)


# --- evaluations

@each(n for n, s in SAMPLERS.items() if s.nfe)
def test_evaluations(name):
    for n in (1, 2, 3, 4, 7, 12):
        model = Counted(MIX.denoiser(VP))
        step, grid = plan(name, VP, n)
        sample_last(step, model, noise(2, 3), grid, seeded(1))
        assert model.nfe == SAMPLERS[name].nfe(n), n


def test_evaluations_of_adaptive_rules(monkeypatch):
    "What scipy counts and the last step; two for each trial of a random step, and the last step."
    counts, solve = [], scipy.integrate.solve_ivp
    def counting(*args, **kwargs):
        end = solve(*args, **kwargs)
        counts.append(end.nfev)
        return end
    monkeypatch.setattr(scipy.integrate, "solve_ivp", counting)
    for n in (1, 2, 7):
        model = Counted(MIX.denoiser(VP))
        sample_last(rk45_step(), model, noise(2, 3), VP.grid(n))
        assert len(counts) == n and model.nfe == sum(counts) + 1
        counts.clear()
        draws, model = [], Counted(MIX.denoiser(VP))
        monkeypatch.setattr(solvers, "randn_like", lambda x, g: draws.append(1) or randn_like(x, g))
        sample_last(ggf_step(), model, noise(2, 3), VP.grid(n), seeded(1))
        assert model.nfe == 2 * len(draws) + 1


# --- orders

START, END = 0.9, 0.05   # inside (0, 1), where the field is smooth


@cache
def truth(schedule, start=START, end=END) -> tuple:
    "Points of the oracle at `start` and where the ODE takes them."
    x = MIX.at(start, schedule).sample(16, seeded(5)).double()
    exact = rk45_step(1e-12, 1e-12, method="DOP853")
    return x, sample_last(exact, MIX.denoiser(schedule), x, torch.tensor([start, end], dtype=torch.float64))


def distance(a, b) -> float: return (a - b).norm(dim=1).mean().item()


def order(name, schedule) -> float:
    "The measured one, over grids of 80 to 640 even steps."
    (x, end), steps = truth(schedule), [80, 160, 320, 640]
    grids = [schedule.grid(n, start=START, end=END) for n in steps]
    ends = [sample_last(SAMPLERS[name].make(), MIX.denoiser(schedule), x, grid) for grid in grids]
    return measured_order(steps, [distance(e, end) for e in ends])


@each(n for n in DIFFERENT if n not in ("deis 3", "deis 4"))
@on({name: SCHEDULES[name] for name in ("vp", "cosine")})
def test_order_is_as_claimed(name, schedule):
    assert order(name, schedule) == pytest.approx(SAMPLERS[name].order, abs=0.2)


@each(["deis 3", "deis 4"])
def test_order_of_deis_is_two_when_it_starts_with_lower_orders(name):
    "Its first step is first order, and that error stays; at these n the cosine schedule shows it."
    assert order(name, SCHEDULES["cosine"]) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("rest, wanted", [(1, 2), (2, 3)])
def test_order_of_dpm_fast(rest, wanted):
    "Third-order steps and one of order `rest`, whose own error h^(rest + 1) is what remains."
    x, counts = MIX.at(1., VP).sample(16, seeded(5)).double(), [60 + rest, 120 + rest, 240 + rest, 480 + rest]
    plans = [dpm_fast(nfe, VP, t_min=END) for nfe in counts]
    end = sample_last(rk45_step(1e-12, 1e-12, method="DOP853"), MIX.denoiser(VP), x, plans[0][1][[0, -1]])
    errors = [distance(sample_last(step, MIX.denoiser(VP), x, grid), end) for step, grid in plans]
    assert measured_order(counts, errors) == pytest.approx(wanted, abs=0.2)


def test_tolerance_of_the_adaptive_ode_solver():
    "A hundred times less error is allowed: about a hundred times less is made, for more evaluations."
    x, end = truth(VP)
    errors, nfe = [], []
    for tol in (1e-3, 1e-5, 1e-7):
        model = Counted(MIX.denoiser(VP))
        errors.append(distance(sample_last(rk45_step(tol, tol), model, x, torch.tensor([START, END])), end))
        nfe.append(model.nfe)
    assert errors[0] > 20 * errors[1] > 400 * errors[2] and nfe == sorted(nfe) and errors[1] < 1e-3


@each(["deis 1", "dpm_solver 1"])
def test_first_orders_are_ddim(name):
    x = noise(4, 3)
    for schedule in SCHEDULES.values():
        for grid in (schedule.grid(7), schedule.grid(7, "edm"), torch.tensor([0.1, 0.5, 0.9])):
            ends = [list(sample(SAMPLERS[n].make(), MIX.denoiser(schedule), x, grid)) for n in (name, "ddim")]
            assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-9)


def test_ddim_with_eta_1_is_ancestral_sampling():
    "With the small variance, draw by draw."
    x = noise(4, 3)
    for schedule in SCHEDULES.values():
        ends = [list(sample(SAMPLERS[n].make(), MIX.denoiser(schedule), x, schedule.grid(7), seeded(1)))
                for n in ("ddim 1", "ddpm small")]
        assert_close(ends[0], ends[1], rtol=0, atol=1e-9)


# --- upwards

@each(RANDOM)
def test_random_rules_refuse_to_go_up(name):
    for t, u in ((0.5, 0.6), (0., 1.), (0.5, 0.5 + 1e-9)):
        with pytest.raises(BadInput, match="goes up|t = 0"):
            SAMPLERS[name].make()(MIX.denoiser(VP), noise(2, 3), t, u, seeded(1))


@each([*DIFFERENT, "rk45"])
def test_up_and_down_again(name):
    "To the latent and back by the same step object: the error falls at the rule's order, or faster."
    x, steps, errors = MIX.sample(16, seeded(6)).double(), [60, 120, 240], []
    for n in steps:
        step = rk45_step(10.**-(n // 30), 10.**-(n // 30)) if name == "rk45" else SAMPLERS[name].make()
        grid = VP.grid(n, start=START, end=END)
        up = sample_last(step, MIX.denoiser(VP), x, grid.flip(0))
        assert distance(up, x) > 0.5
        errors.append(distance(sample_last(step, MIX.denoiser(VP), up, grid), x))
    if name == "rk45": assert errors[0] < 0.1 and errors[-1] < 1e-5
    else: assert measured_order(steps, errors) > SAMPLERS[name].order - 0.2, errors


def test_order_of_ddim_inversion():
    "First order, and exactly that: from data to latent and back."
    for schedule in (VP, SCHEDULES["cosine"]):
        x, steps = MIX.sample(64, seeded(6)).double(), [80, 160, 320, 640]
        grids = [schedule.grid(n, start=START, end=END) for n in steps]
        there = [sample_last(ddim_step(), MIX.denoiser(schedule), x, g.flip(0)) for g in grids]
        back = [sample_last(ddim_step(), MIX.denoiser(schedule), v, g) for v, g in zip(there, grids)]
        assert measured_order(steps, [distance(v, x) for v in back]) == pytest.approx(1, abs=0.2)


@each(n for n in DIFFERENT if n != "euler")
def test_from_data_itself_upwards(name):
    "t = 0 has no noise to guess: finite all the same, and to first order the latent of the ODE."
    for schedule in SCHEDULES.values():
        x = MIX.sample(8, seeded(6)).double()
        up = list(sample(SAMPLERS[name].make(), MIX.denoiser(schedule), x, schedule.grid(30).flip(0)))
        assert all(v.isfinite().all() for v in up) and up[-1].abs().max() < 6


# --- what multistep rules keep

def walk(step, times, x=None):
    x = noise(4, 3) if x is None else x
    return sample_last(step, MIX.denoiser(VP), x, torch.tensor(times, dtype=torch.float64))


@each(MULTISTEP)
def test_history_is_used_and_dropped(name):
    "Kept from step to step, also over two calls that meet; gone after a jump, a turn, an end, or half a run."
    make, run = SAMPLERS[name].make, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    fresh, used = walk(make(), run), make()
    assert torch.equal(walk(used, run), fresh)
    assert torch.equal(walk(used, run), fresh), "the run before ended elsewhere"
    assert torch.equal(walk(used, run[3:], walk(used, run[:4])), fresh), "two parts make one run"
    pieces = noise(4, 3)
    for pair in zip(run, run[1:]): pieces = walk(make(), pair, pieces)
    assert torch.equal(pieces, fresh) == (name == "deis 1"), "a rule of many steps remembers"
    for before in ([1., 0.95, 0.92], [0.9, 0.8], [0.5, 0.6, 0.7, 0.8, 0.9], [0.3, 0.2, 0.1, 0.],
                   [0., 0.4, 0.9], [0.9, 0.9], [0.3, 0.3, 0.5]):
        assert walk(used, before).isfinite().all()
        assert torch.equal(walk(used, run), fresh), before
    states = sample(used, MIX.denoiser(VP), noise(64, 3), VP.grid(7))
    for _ in range(3): next(states)
    assert torch.equal(walk(used, run), fresh), "an unfinished run of another batch"
    states.close()


@each(MULTISTEP)
def test_steps_of_no_length_change_nothing(name):
    make = SAMPLERS[name].make
    for run in ([0.9, 0.7, 0.5, 0.3], [0.3, 0.5, 0.7, 0.9]):
        halting = [run[0], *[run[1]] * 3, *[run[2]] * 2, run[3]]
        assert_close(walk(make(), halting), walk(make(), run), rtol=0, atol=1e-12)


@each(MULTISTEP)
def test_history_turns_round(name):
    "Up with a used step is up with a fresh one, where the run down ended."
    used, make = SAMPLERS[name].make(), SAMPLERS[name].make
    down, up = [0.9, 0.7, 0.5, 0.3], [0.3, 0.4, 0.6, 0.8]
    x = walk(used, down)
    assert torch.equal(walk(used, up, x), walk(make(), up, x))


# --- random rules, and PNDM's start

@each(RANDOM)
def test_random_rules_end_in_the_data(name):
    "Mean, spread and the weights of the components, within 4.5 standard errors and what 100 steps are off."
    n, grid = 3000, VP.grid(100)
    step = ggf_step() if name == "ggf" else SAMPLERS[name].make()
    x = sample_last(step, MIX.denoiser(VP), noise(n, 3), grid, seeded(1))
    real = MIX.sample(20 * n, seeded(2)).double()
    for f in (lambda v: v, lambda v: v**2, lambda v: v[:, :1] * v[:, 1:], lambda v: (v > 0.5).double()):
        a, b = f(x), f(real)
        assert ((a.mean(0) - b.mean(0)).abs() < 4.5 * b.std(0) / n**0.5 + 0.03).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_runge_kutta_start_on_the_cosine_schedule(dtype):
    "At t = 1 alpha is 5e-5, and an error in eps is 20,000 times as large in x0: huge, but finite."
    cosine, x = SCHEDULES["cosine"], noise(8, 3, dtype=dtype)
    def largest(step, **where):
        return max(s.abs().max() for s in sample(step, MIX.denoiser(cosine), x, cosine.grid(7, **where)))
    assert 1e6 < largest(pndm_step(4)) < float("inf")
    assert largest(pndm_step(4), start=0.9) < 10, "from a little later on"
    assert largest(pndm_step(4, "euler")) < 10, "with the start that goes along one eps at a time"
