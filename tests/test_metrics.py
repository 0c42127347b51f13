"The metrics: against closed forms, other libraries and brute force, and on images spoilt on purpose."
import math

import numpy as np, pytest, torch
from scipy.linalg import sqrtm
from scipy.stats import energy_distance as scipy_energy   # the square root of ours, on a line

from fastdiff_edu import metrics
from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.data import GaussianMixture, digits, gaussians_25, to_unit
from fastdiff_edu.metrics import (ModeCoverage, digit_classifier, energy_distance, features, frechet_distance,
                                  frechet_from_features, mode_coverage, precision_recall, predicted, shake)

randn = lambda *shape, seed=0: torch.randn(*shape, generator=seeded(seed, "test"), dtype=torch.float64)


def covariance(D, rank, seed):
    a = randn(D, rank, seed=seed)
    return a @ a.T


# Frechet distance

def test_frechet_of_commuting_covariances():
    q, _ = torch.linalg.qr(randn(8, 8))
    s, r, mu = randn(8, seed=1).abs(), randn(8, seed=2).abs(), randn(8, seed=3)
    got = frechet_distance(mu, q @ (s**2).diag() @ q.T, torch.zeros(8), q @ (r**2).diag() @ q.T)
    assert got == pytest.approx((mu.square().sum() + (s - r).square().sum()).item(), abs=1e-10)


def test_frechet_against_scipys_matrix_root():
    for seed in range(5):
        c1, c2, mu = covariance(20, 30, 2*seed), covariance(20, 30, 2*seed + 1), randn(20, seed=seed)
        want = mu.square().sum() + c1.trace() + c2.trace() - 2*np.trace(sqrtm((c1 @ c2).numpy()).real)
        assert frechet_distance(mu, c1, torch.zeros(20), c2) == pytest.approx(want.item(), rel=1e-9)


def test_frechet_of_singular_covariances():
    c = covariance(64, 10, 0)   # rank 10 of 64
    zero = torch.zeros(64)
    assert frechet_distance(zero, c, zero, c) == pytest.approx(0, abs=1e-9)
    trace = c.trace().item()
    assert frechet_distance(zero, c, zero, 4*c) == pytest.approx(trace, rel=1e-12)   # (2 - 1)^2 times it
    assert frechet_distance(zero, c, zero, 0*c) == pytest.approx(trace, rel=1e-12)   # onto a point


def test_frechet_takes_means_and_covariances_with_n_minus_1():
    a, b = randn(5, 3, seed=1), randn(7, 3, seed=2)
    moments = [torch.from_numpy(v) for x in (a.numpy(), b.numpy()) for v in (x.mean(0), np.cov(x.T))]
    assert frechet_from_features(a, b) == pytest.approx(frechet_distance(*moments), rel=1e-12)


def test_frechet_is_symmetric_and_blind_to_rotations():
    a, b = randn(300, 5, seed=1), 2*randn(200, 5, seed=2) + 1
    q, _ = torch.linalg.qr(randn(5, 5, seed=3))
    d = frechet_from_features(a, b)
    assert frechet_from_features(b, a) == pytest.approx(d, rel=1e-12)
    assert frechet_from_features(a @ q + 3, b @ q + 3) == pytest.approx(d, rel=1e-9)
    assert frechet_from_features(a.float(), b.float()) == pytest.approx(d, rel=1e-5), "computed in float64"
    assert frechet_from_features(a[:, :1], b[:, :1]) > 0, "one dimension is allowed"


def test_frechet_is_biased_as_one_over_n():
    pairs = lambda n: ((randn(n, 4, seed=2*i), randn(n, 4, seed=2*i + 1)) for i in range(200))
    d = lambda n: np.mean([frechet_from_features(a, b) for a, b in pairs(n)])
    assert d(50) / d(200) == pytest.approx(4, rel=0.15)


# Energy distance

def test_energy_distance_of_normals_on_a_line():
    mean_abs = lambda mu, s: s*(2/math.pi)**0.5*math.exp(-mu**2/(2*s**2)) + mu*math.erf(mu/(s*2**0.5))
    want = 2*mean_abs(1., (1 + 4)**0.5) - mean_abs(0., 2**0.5) - mean_abs(0., 8**0.5)
    pairs = ((randn(30, 1, seed=2*i), 1 + 2*randn(40, 1, seed=2*i + 1)) for i in range(1000))
    draws = torch.tensor([energy_distance(a, b) for a, b in pairs])
    assert abs(draws.mean() - want) < 4.5*draws.std()/1000**0.5, "more than 4.5 standard errors off: biased"


def test_energy_distance_against_scipy():
    a, b = randn(400, 1, seed=1), randn(300, 1, seed=2) + 0.5
    v_statistic = scipy_energy(a[:, 0].numpy(), b[:, 0].numpy())**2
    own = lambda x: (x - x.T).abs().sum().item()
    as_v = energy_distance(a, b) + own(a)/(400*399) - own(a)/400**2 + own(b)/(300*299) - own(b)/300**2
    assert as_v == pytest.approx(v_statistic, rel=1e-9)


def test_energy_distance_in_chunks_is_the_same():
    a, b = randn(2500, 2, seed=1), randn(1100, 2, seed=2) + 0.3
    d = lambda x, y: torch.linalg.vector_norm(x[:, None] - y, dim=-1).sum().item()
    want = 2*d(a, b)/(2500*1100) - d(a, a)/(2500*2499) - d(b, b)/(1100*1099)
    assert energy_distance(a, b) == pytest.approx(want, rel=1e-10)
    p = torch.randperm(2500, generator=seeded(0))
    assert energy_distance(a[p], b) == pytest.approx(want, rel=1e-10)


# Modes

def test_mode_coverage_by_hand():
    mix = GaussianMixture([[0., 0.], [100., 0.], [0., 100.]], [1., 2., 0.5])
    x = torch.tensor([[3.9, 0.], [4.1, 0.],      # in mode 0, and just outside
                      [100., 7.9], [100., 8.1],  # mode 1 is twice as wide
                      [0., 97.9]])               # just outside mode 2
    assert mode_coverage(x, mix) == ModeCoverage(2, 3, 2/5)
    assert mode_coverage(x, mix, within=4.3) == ModeCoverage(3, 3, 1.0)
    assert mode_coverage(x[1:2], mix) == ModeCoverage(0, 3, 0.0)


def test_exact_samples_cover_all_modes():
    got = mode_coverage(gaussians_25().sample(20_000, seeded(0)), gaussians_25())
    p = 1 - math.exp(-8)
    assert got.covered == got.n_modes == 25 and abs(got.share - p) < 5*(p*(1 - p)/20_000)**0.5


# Precision and recall

def brute_force(real, fake, k):
    d = lambda x, y: np.linalg.norm(x[:, None] - y[None], axis=-1)
    real, fake = real.numpy(), fake.numpy()
    radius = lambda x: np.sort(d(x, x), axis=1)[:, k]
    inside = lambda x, y: (d(x, y) <= radius(y)[None]).any(1).mean()
    return inside(fake, real), inside(real, fake)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_recall_against_brute_force(k):
    real, fake = randn(1200, 3, seed=1), 0.7*randn(300, 3, seed=2) + 0.5
    assert precision_recall(real, fake, k) == pytest.approx(brute_force(real, fake, k), abs=1e-12)


def test_precision_recall_in_tiles_is_the_same(monkeypatch):
    real, fake = randn(230, 3, seed=1), 0.7*randn(170, 3, seed=2) + 0.5
    want = brute_force(real, fake, 3)
    for tile in (57, 100, 230):   # 2 points are left over in a last tile: fewer than neighbours wanted
        monkeypatch.setattr(metrics, "TILE", tile)
        assert precision_recall(real, fake, 3) == pytest.approx(want, abs=1e-12), tile


def test_points_far_from_zero_keep_their_distances():
    "Products of large numbers cancel: float64, and a floor under which a distance is none."
    real, fake = randn(300, 5, seed=1), 0.8*randn(200, 5, seed=2)
    want = brute_force(real, fake, 3)
    assert precision_recall((real + 100).float(), (fake + 100).float()) == pytest.approx(want, abs=0.01)
    far = (randn(300, 300, seed=3) + 1e4).float()
    copies = far[:50]
    assert metrics._squared(copies, copies).diagonal().eq(0).all()
    for i in range(20):
        assert precision_recall(far, far[i:i + 1].expand(50, -1)) == (1, 1/300), "copies of one of them"


def test_precision_recall_of_equal_and_far_sets():
    a = randn(1100, 8).float()
    assert precision_recall(a, a) == precision_recall(a, a.flip(0)) == (1, 1)
    assert precision_recall(a, a + 1000) == (0, 0)
    copies = a[:1].expand(50, -1)
    assert precision_recall(a, copies) == (1, 1/1100), "copies of one real image cover no other"


# Bad input

def zeros(*shape, value=0.): return torch.full(shape, value)


@pytest.mark.parametrize("call", [
    lambda: frechet_distance(zeros(3), torch.eye(3), zeros(2), torch.eye(2)),
    lambda: frechet_distance(zeros(3), torch.eye(3), zeros(3), zeros(3, 3, value=math.nan)),
    lambda: frechet_from_features(zeros(1, 3), zeros(5, 3)),
    lambda: frechet_from_features(zeros(5), zeros(5)),
    lambda: frechet_from_features(zeros(5, 3), zeros(5, 3, value=math.inf)),
    lambda: energy_distance(zeros(5, 2), zeros(5, 3)), lambda: energy_distance(zeros(1, 2), zeros(5, 2)),
    lambda: energy_distance(zeros(5, 2, value=math.nan), zeros(5, 2)),
    lambda: mode_coverage(zeros(0, 2), gaussians_25()), lambda: mode_coverage(zeros(5, 3), gaussians_25()),
    lambda: mode_coverage(zeros(5, 2, value=math.nan), gaussians_25()),
    lambda: precision_recall(zeros(3, 2), zeros(9, 2)), lambda: precision_recall(zeros(9, 2), zeros(9, 3)),
    lambda: precision_recall(zeros(9, 2), zeros(9, 2), 0)])
def test_bad_input_is_one_sentence(call):
    with pytest.raises(BadInput) as e: call()
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


# The classifier

@pytest.fixture(scope="module")
def net(): return digit_classifier(bar=False)


def test_classifier_knows_digits_it_has_not_seen(net):
    test = digits("test")
    right = (predicted(net, test.x) == test.y).double().mean()
    assert right > 0.97
    assert not net.training and features(net, test.x).shape == (500, 64)
    assert features(net, digits("train").x).var(0).sum().item() == pytest.approx(100, abs=1e-3)


def test_floats_are_read_in_eight_bits(net):
    x = digits("test").x[:20]
    assert features(net, to_unit(x)).equal(features(net, x))
    assert features(net, to_unit(x) + 0.003).equal(features(net, x)), "less than half a level changes nothing"
    assert not features(net, to_unit(x) + 0.005).equal(features(net, x))


def test_classifier_is_the_same_on_any_number_of_threads_and_leaves_no_trace():
    torch.rand(1)   # a state that no seed gives
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    try:
        nets = []
        for n in (1, 2):
            torch.set_num_threads(n)
            nets.append(digit_classifier(steps=20, bar=False))
            assert torch.get_num_threads() == n
    finally: torch.set_num_threads(threads)
    a, b = (n.state_dict() for n in nets)
    assert all(a[k].equal(b[k]) for k in a) and torch.get_rng_state().equal(before)
    other = digit_classifier(seed=1, steps=20, bar=False).state_dict()
    assert not other["head.1.weight"].equal(a["head.1.weight"])


def test_classifier_is_read_back_from_its_folder(tmp_path, monkeypatch):
    a = digit_classifier(tmp_path, steps=20, bar=False).state_dict()
    def trains(*_): raise AssertionError("it trains again")
    monkeypatch.setattr(metrics, "shake", trains)
    b = digit_classifier(tmp_path, steps=20, bar=False).state_dict()
    assert all(a[k].equal(b[k]) for k in a)


def test_shake_stays_in_range_and_follows_its_generator():
    x = to_unit(digits("test").x[:50])
    a, b = shake(x, seeded(0)), shake(x, seeded(0))
    assert a.equal(b) and not a.equal(shake(x, seeded(1))) and a.shape == x.shape
    assert a.min() >= -1 - 1e-6 and a.max() <= 1 + 1e-6
    empty = -torch.ones(3, 1, 8, 8)
    assert shake(empty, seeded(0)).equal(empty), "background moves to background"


def test_the_frechet_distance_grows_with_every_damage(net):
    train, test = digits("train"), digits("test")
    real, unit = features(net, train.x), to_unit(test.x)
    d = lambda x: frechet_from_features(real, features(net, x))
    noise = torch.randn(unit.shape, generator=seeded(0))
    series = {"noise": [unit + s*noise for s in (0., 0.1, 0.2, 0.4, 0.8)],
              "classes": [unit[test.y >= n] for n in (0, 1, 3, 5, 8)],
              "copies": [unit[torch.arange(500) % n] for n in (500, 300, 100, 10, 1)],
              "fade": [(unit + 1)*f - 1 for f in (1., 0.9, 0.7, 0.5, 0.)]}
    for name, sets in series.items():
        distances = [d(x) for x in sets]
        assert all(b > a for a, b in zip(distances, distances[1:])), (name, distances)
        assert distances[0] < 1.5 and distances[-1] > 10*distances[0], (name, distances)
