"Our rules and the schedulers of diffusers walk the same path, state by state; where they part, we know why."
import types
from functools import cache

import pytest, torch
from torch import nn
from torch.testing import assert_close

pytest.importorskip("diffusers")
from diffusers.schedulers import (scheduling_ddim, scheduling_ddim_inverse, scheduling_ddpm,
                                  scheduling_deis_multistep, scheduling_dpmsolver_multistep,
                                  scheduling_dpmsolver_singlestep, scheduling_heun_discrete, scheduling_pndm)

from fastdiff_edu.core import seeded
from fastdiff_edu.denoiser import Clipped, Counted, Denoiser
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.sample import ddim_step, ddpm_step, sample
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.solvers import (deis_step, dpm_solver_step, dpmpp_2m_step, heun_step, lambda_between,
                                  pndm_step, transfer)

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning")   # theirs, about numpy and themselves
              for kind in ("Deprecation", "User", "Future")]

OURS = Schedule.linear()   # t = i/1000, i = 1..1000, is their label i - 1
MODULES = [scheduling_ddim, scheduling_ddim_inverse, scheduling_ddpm, scheduling_deis_multistep,
           scheduling_dpmsolver_multistep, scheduling_dpmsolver_singlestep, scheduling_heun_discrete,
           scheduling_pndm]


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    "Their tables and sums in float64: what these modules call float32 is that here; no formula changes."
    for module in MODULES:
        for library, wide in (("torch", torch.float64), ("np", "float64")):
            if not hasattr(module, library): continue
            names = vars(getattr(module, library)) | {"float32": wide}
            monkeypatch.setattr(module, library, types.SimpleNamespace(**names))


@cache
def network() -> nn.Module:
    "A small UNet with random weights, none of them 0."
    torch.manual_seed(0)
    net = UNet(UNetConfig(size=8, width=8, mult=(1, 2), blocks=1, attn=(4,), dropout=0.))
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=0.1)
    return net.double().eval()


@torch.no_grad()
def said(x, label):
    "What the network says of x at their label, whole or not; near x itself, so that states stay near 1."
    return 0.9 * x + 0.3 * network()(x, torch.as_tensor(label, dtype=torch.float64).expand(len(x)) / 1000)


def model(kind="eps", schedule=OURS):
    "The same network at our times, counted."
    return Counted(Denoiser(lambda x, t: said(x, 1000 * t - 1), schedule, kind))


def start(): return torch.randn(2, 3, 8, 8, generator=seeded(0), dtype=torch.float64)


def ours(step, times, denoiser=None, generator=None) -> list:
    "The states at these times, the first included."
    grid = torch.tensor(times, dtype=torch.float64)
    return list(sample(step, denoiser or model(), start(), grid, generator))


def theirs(scheduler, x=None, **how) -> list:
    "The state before and after each evaluation."
    states = [start() if x is None else x]
    for label in scheduler.timesteps:
        x = states[-1]
        out = said(scheduler.scale_model_input(x, label), label)
        states.append(scheduler.step(out, label, x, **how).prev_sample)
    return states


def with_steps(make, n, **config):
    scheduler = make(**config)
    scheduler.set_timesteps(n)
    return scheduler


def times_of(scheduler, end=0.) -> list:
    "Our times for the labels of theirs, and where the last step goes."
    return [(label + 1) / 1000 for label in scheduler.timesteps.tolist()] + [end]


def apart(a, b) -> list[float]:
    "How far the states differ, time by time."
    return [(u - v).abs().max().item() for u, v in zip(a, b, strict=True)]


def same(a, b): assert max(apart(a, b)) < 1e-12


def same_but_the_last(a, b, at_least:float):
    same(a[:-1], b[:-1])
    assert apart(a, b)[-1] > at_least


DDIM, INVERSE = scheduling_ddim.DDIMScheduler, scheduling_ddim_inverse.DDIMInverseScheduler
DDPM, PNDM, HEUN = (scheduling_ddpm.DDPMScheduler, scheduling_pndm.PNDMScheduler,
                    scheduling_heun_discrete.HeunDiscreteScheduler)
DEIS, MULTI, SINGLE = (scheduling_deis_multistep.DEISMultistepScheduler,
                       scheduling_dpmsolver_multistep.DPMSolverMultistepScheduler,
                       scheduling_dpmsolver_singlestep.DPMSolverSinglestepScheduler)
every_spacing = pytest.mark.parametrize("spacing", ["trailing", "leading"])
TENTHS = OURS.grid(10).tolist()


# --- tables and grids

def test_tables_are_the_same():
    "Their entry i is our time (i + 1) / 1000: our time 0, clean data, is not in their table."
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert_close(OURS.alpha_bar(t), DDIM().alphas_cumprod, rtol=0, atol=1e-14)
    cosine = DDIM(beta_schedule="squaredcos_cap_v2").alphas_cumprod
    assert_close(Schedule.cosine_iddpm().alpha_bar(t), cosine, rtol=0, atol=1e-14)


def test_trailing_is_our_uniform_grid_and_the_other_spacings_are_not():
    "'leading' leaves out pure noise and walks to label 0; 'linspace' takes in both ends, in longer steps."
    def labels(spacing): return with_steps(DDIM, 10, timestep_spacing=spacing).timesteps.tolist()
    assert times_of(with_steps(DDIM, 10, timestep_spacing="trailing")) == pytest.approx(TENTHS, abs=1e-15)
    assert labels("leading") == [*range(900, -1, -100)] and labels("linspace") == [*range(999, -1, -111)]


@pytest.mark.parametrize("option, spacing", [("use_karras_sigmas", "edm"), ("use_lu_lambdas", "log_snr")])
def test_their_sigmas_by_formula_are_the_rho_of_our_grids(option, spacing):
    "So a network that does not look at the time walks alike; another one is asked at rounded labels there."
    scheduler, grid = with_steps(MULTI, 10, **{option: True}), OURS.grid(10, spacing)
    rho = OURS.sigma(grid) / OURS.alpha(grid)
    assert_close(scheduler.sigmas, rho, rtol=1e-10, atol=0)
    assert 0.1 < (scheduler.timesteps - (1000 * grid[:-1] - 1)).abs().max() < 1.5
    assert max(apart(ours(dpmpp_2m_step(), grid.tolist()), theirs(scheduler))) > 1e-4
    blind, states = Denoiser(lambda x, t: said(x, 500), OURS), [start()]
    scheduler.set_timesteps(10)
    for label in scheduler.timesteps:
        states.append(scheduler.step(said(states[-1], 500), label, states[-1]).prev_sample)
    assert max(apart(ours(dpmpp_2m_step(), grid.tolist(), blind), states)) < 1e-9


# --- DDPM and DDIM

@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm_draw_by_draw(variance):
    "Where the walk ends at label 0, as 'leading' does, all states agree."
    scheduler = with_steps(DDPM, 10, clip_sample=False, variance_type=f"fixed_{variance}",
                           timestep_spacing="leading")
    states = ours(ddpm_step(variance), times_of(scheduler), generator=seeded(1))
    same(states, theirs(scheduler, generator=seeded(1)))


@pytest.mark.parametrize("variance, at_least", [("small", 1e-11), ("large", 0.1)])
def test_ddpm_adds_noise_in_the_last_step_unless_it_leaves_label_0(variance, at_least):
    "Theirs is silent at label 0 alone: a 'trailing' walk ends in noise (1e-10 of it if small), ours without."
    scheduler = with_steps(DDPM, 10, clip_sample=False, variance_type=f"fixed_{variance}",
                           timestep_spacing="trailing")
    states = ours(ddpm_step(variance), TENTHS, generator=seeded(1)), theirs(scheduler, generator=seeded(1))
    same_but_the_last(*states, at_least)


@every_spacing
@pytest.mark.parametrize("n", [1, 10, 100])
def test_ddim_is_the_same(n, spacing):
    scheduler = with_steps(DDIM, n, clip_sample=False, timestep_spacing=spacing)
    same(ours(ddim_step(), times_of(scheduler)), theirs(scheduler))


@every_spacing
@pytest.mark.parametrize("eta", [0.3, 1.])
def test_ddim_with_noise_is_the_same(eta, spacing):
    "Also when the noise is handed over: their last draw counts for nothing, ours is not made."
    scheduler = with_steps(DDIM, 10, clip_sample=False, timestep_spacing=spacing)
    states = ours(ddim_step(eta), times_of(scheduler), generator=seeded(1))
    same(states, theirs(scheduler, eta=eta, generator=seeded(1)))
    x, g = start(), seeded(1)
    for label, wanted in zip(scheduler.timesteps, states[1:]):
        noise = torch.randn(x.shape, generator=g, dtype=x.dtype)
        x = scheduler.step(said(x, label), label, x, eta=eta, variance_noise=noise).prev_sample
        assert (x - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("kind, called", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")])
def test_ddim_is_the_same_whatever_the_network_says(kind, called):
    scheduler = with_steps(DDIM, 10, clip_sample=False, timestep_spacing="trailing", prediction_type=called)
    same(ours(ddim_step(), TENTHS, model(kind)), theirs(scheduler))


def test_ddim_without_alpha_one_ends_at_the_table_s_first_entry():
    "set_alpha_to_one=False: the last step goes to label 0, our t = 1/1000, and not to clean data."
    scheduler = with_steps(DDIM, 10, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=False)
    same(ours(ddim_step(), [*TENTHS[:-1], 1e-3]), theirs(scheduler))
    same_but_the_last(ours(ddim_step(), TENTHS), theirs(scheduler), 0.01)


def test_clipping_keeps_eps_unless_told_otherwise():
    "Ours makes eps agree with the clipped x0; theirs does so with use_clipped_model_output=True alone."
    scheduler = with_steps(DDIM, 10, timestep_spacing="trailing")
    states = ours(ddim_step(), TENTHS, Clipped(model()))
    same(states, theirs(scheduler, use_clipped_model_output=True))
    assert max(apart(states, theirs(scheduler))) > 0.1


@pytest.mark.parametrize("n, spacing", [(10, "linspace"), (7, "trailing")])
def test_ddim_takes_steps_of_one_length_even_if_its_labels_do_not(n, spacing):
    """Their step always goes 1000 // n labels down. Where the list's next label is another, the network is
    asked at a time at which the state is not; ours has the grid's times on both sides."""
    scheduler = with_steps(DDIM, n, clip_sample=False, timestep_spacing=spacing)
    walked, x = theirs(scheduler), start()
    for label, state in zip(scheduler.timesteps.tolist(), walked[1:]):
        t, u = (label + 1) / 1000, max(label + 1 - 1000 // n, 0) / 1000
        x = transfer(x, said(x, label), t, u, OURS)
        assert (x - state).abs().max() < 1e-12
    assert apart(ours(ddim_step(), times_of(scheduler)), walked)[-1] > 0.01


def test_ddim_inversion_asks_the_network_at_the_other_end():
    "From t to u > t their walk takes eps at the label of u, ours at that of t; with that eps they agree."
    scheduler = with_steps(INVERSE, 10, clip_sample=False, timestep_spacing="trailing")
    walked, x, up = theirs(scheduler), start(), TENTHS[::-1]
    for t, u, state in zip(up, up[1:], walked[1:]):
        x = transfer(x, said(x, 1000 * u - 1), t, u, OURS)
        assert (x - state).abs().max() < 1e-12
    assert apart(ours(ddim_step(), up), walked)[-1] > 0.01


# --- PNDM

PNDM_STARTS = pytest.mark.parametrize("skip, name", [(False, "runge_kutta"), (True, "heun")])


def pndm(n, skip, **config) -> list:
    "Their states at the times of the grid, without those inside the first steps."
    scheduler = with_steps(PNDM, n, skip_prk_steps=skip, timestep_spacing="trailing", **config)
    states = theirs(scheduler)
    return [states[0], *states[2:]] if skip else [*states[:13:4], *states[13:]]


@PNDM_STARTS
@pytest.mark.parametrize("n", [4, 10, 20])
def test_pndm_is_the_same(n, skip, name):
    "By default they end at label 0; both ask the network equally often."
    counted, times = model(), [*OURS.grid(n).tolist()[:-1], 1e-3]
    same(ours(pndm_step(4, name), times, counted), pndm(n, skip))
    assert counted.nfe == len(with_steps(PNDM, n, skip_prk_steps=skip).timesteps) == n + (1 if skip else 9)


@PNDM_STARTS
def test_pndm_into_clean_data_is_first_order_here_and_extrapolated_there(skip, name):
    "set_alpha_to_one=True: theirs takes Adams-Bashforth into sigma = 0 as well, ours the plain step to x0."
    states, walked = ours(pndm_step(4, name), TENTHS), pndm(10, skip, set_alpha_to_one=True)
    same_but_the_last(states, walked, 0.1)
    eps = [said(x, 1000 * t - 1) for x, t in list(zip(states, TENTHS))[6:10]]
    eps = (55 * eps[3] - 59 * eps[2] + 37 * eps[1] - 9 * eps[0]) / 24
    assert (transfer(states[-2], eps, 0.1, 0., OURS) - walked[-1]).abs().max() < 1e-12


def test_pndm_s_half_step_is_a_whole_label_there():
    "Of 8 steps, half of one is 62.5 labels: theirs takes 62, ours 62.5; without Runge-Kutta none is halved."
    times = [*OURS.grid(8).tolist()[:-1], 1e-3]
    assert max(apart(ours(pndm_step(4), times), pndm(8, False))) > 1e-3
    same(ours(pndm_step(4, "heun"), times), pndm(8, True))


# --- DPM-Solver

@pytest.mark.parametrize("n", [1, 2, 10, 20])
def test_dpmpp_2m_is_the_same(n):
    scheduler = with_steps(MULTI, n)
    same(ours(dpmpp_2m_step(), times_of(scheduler)), theirs(scheduler))
    scheduler.set_timesteps(timesteps=[round(1000 * t) - 1 for t in OURS.grid(n).tolist()[:-1]])
    same(ours(dpmpp_2m_step(), OURS.grid(n).tolist()), theirs(scheduler))


def test_dpmpp_2m_has_a_linspace_of_its_own():
    "It spreads n + 1 labels from 999 to 0 and drops the last: times near the uniform grid's, not the same."
    scheduler = with_steps(MULTI, 10)
    assert [scheduler.timesteps[i] for i in (0, 1, -2, -1)] == [999, 899, 200, 100]
    assert max(apart(ours(dpmpp_2m_step(), TENTHS), theirs(scheduler))) > 1e-3


def test_dpmpp_2m_has_a_first_order_end_above_sigma_0_when_steps_are_few():
    "lower_order_final makes the last of fewer than 15 steps first order; ours does so into sigma = 0 alone."
    for n, config in ((10, dict(lower_order_final=False)), (20, {})):
        scheduler = with_steps(MULTI, n, final_sigmas_type="sigma_min", **config)
        same(ours(dpmpp_2m_step(), times_of(scheduler, 1e-3)), theirs(scheduler))
    scheduler = with_steps(MULTI, 10, final_sigmas_type="sigma_min")
    same_but_the_last(ours(dpmpp_2m_step(), times_of(scheduler, 1e-3)), theirs(scheduler), 0.01)


def singlestep(order, kinds) -> list:
    "Their DPM-Solver made to stop at our inner times, at `kinds` of its updates; the states where steps end."
    times = [0.9, 0.6, 0.3, 0.1]
    inner = [lambda_between(t, u, r / order, OURS) for t, u in zip(times, times[1:]) for r in range(order)]
    scheduler = with_steps(SINGLE, 3 * order, algorithm_type="dpmsolver", solver_order=order,
                           final_sigmas_type="sigma_min", lower_order_final=False)
    stops = torch.tensor([*inner, times[-1]], dtype=torch.float64)
    scheduler.sigmas = OURS.sigma(stops) / OURS.alpha(stops)
    states = [start()]
    for i, t in enumerate(inner):
        scheduler.register_to_config(solver_type=kinds[i % order])
        scheduler.set_begin_index(0)
        states.append(scheduler.step(said(states[-1], 1000 * t - 1), None, states[-1]).prev_sample)
    return states[::order]


def test_dpm_solver_2_and_3_are_the_same_at_the_same_inner_times():
    """Their inner times are labels of the list, ours lie between two times of the grid, evenly in log-SNR.
    The paper's third order is their 'heun' for the inner value, 'midpoint' for the last; they never mix."""
    times, m, h = [0.9, 0.6, 0.3, 0.1], "midpoint", "heun"
    same(ours(dpm_solver_step(2), times), singlestep(2, [m, m]))
    same(ours(dpm_solver_step(3), times), singlestep(3, [m, h, m]))
    for kinds in ([m, m, m], [h, h, h]):
        assert min(apart(ours(dpm_solver_step(3), times), singlestep(3, kinds))[1:]) > 1e-5


# --- DEIS and Heun

@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_the_same_where_time_runs_evenly_in_log_rho(order):
    "Theirs extrapolates eps in log rho, ours in t: a table whose log rho is a line in t makes them one."
    slope, low = 9.6, -4.6
    def log_alpha_bar(t):
        log_rho = low + slope * (torch.as_tensor(t, dtype=torch.float64) - 1e-3)
        value = -torch.nn.functional.softplus(2 * log_rho)
        return value if isinstance(t, torch.Tensor) else value.item()
    def inverse(L): return (0.5 * torch.log(torch.expm1(-L)) - low) / slope + 1e-3
    schedule = Schedule(log_alpha_bar, inverse, "even")
    bar = schedule.alpha_bar(torch.arange(1, 1001, dtype=torch.float64) / 1000)
    betas = 1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])
    scheduler = with_steps(DEIS, 10, solver_order=order, trained_betas=betas, timestep_spacing="trailing",
                           lower_order_final=False)
    states = ours(deis_step(order), [*TENTHS[:-1], 1e-3], model(schedule=schedule))
    assert max(apart(states, theirs(scheduler))) < 1e-9


def test_deis_differs_from_order_2_on_in_what_it_extrapolates():
    "On the linear table the first step, DDIM, agrees, the second not; lower_order_final is theirs alone."
    for order in (1, 2, 3):
        scheduler = with_steps(DEIS, 10, solver_order=order, timestep_spacing="trailing",
                               lower_order_final=False)
        gaps = apart(ours(deis_step(order), times_of(scheduler, 1e-3)), theirs(scheduler))
        assert max(gaps[:2]) < 1e-12 and (max(gaps) < 1e-12 if order == 1 else min(gaps[2:]) > 1e-3)


def test_heun_is_the_same():
    "Theirs carries x / alpha and ends, like ours, in one first-order step into sigma = 0."
    scheduler = HEUN(beta_start=1e-4, beta_end=0.02)
    scheduler.set_timesteps(timesteps=[round(1000 * t) - 1 for t in TENTHS[:-1]])
    *walked, end = theirs(scheduler, start() / OURS.alpha(1.))
    scaled = [x * OURS.alpha(t) for x, t in zip([*walked[::2], end], TENTHS, strict=True)]
    same(ours(heun_step(), TENTHS), scaled)
