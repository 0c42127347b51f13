"The toy densities and the digits: against independent implementations, and what a notebook cannot check."
import hashlib, math, subprocess, sys, types

import numpy as np, pytest, torch
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from fastdiff_edu import data
from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.data import (DIGITS_SPLITS, GaussianMixture, Images, digits, gaussians_25, ring, swiss_roll,
                               to_uint8, to_unit, two_gaussians)

SHA256 = {"train": "4189fbc3441e8c9a532a382481461b170840506d04781e2e75e6e8dac5920022",
          "test": "9873e50fb6900ffefa79c947f8548ae275b4ba573e31cb33ff6dc6eaa3af8b10",
          "all": "ac2213023a1dd19f8222ec82825f32c3504d17957813b2fdf14736bb5f12f150"}
MIXTURES = {"25": gaussians_25(), "two": two_gaussians(), "ring": ring(),
            "5-D": GaussianMixture(torch.arange(15.).reshape(3, 5) / 7, [0.5, 1.0, 2.0], [0.2, 0.3, 0.5])}


@pytest.mark.parametrize("name", MIXTURES)
def test_density_against_torch_distributions(name):
    mix = MIXTURES[name]
    K, D = mix.means.shape
    x = 2*torch.randn(500, D, generator=seeded(0), dtype=torch.float64)
    components = Independent(Normal(mix.means, mix.std[:, None].expand(K, D)), 1)
    reference = MixtureSameFamily(Categorical(mix.weights), components)
    torch.testing.assert_close(mix.log_prob(x), reference.log_prob(x), rtol=0, atol=1e-9)
    joint = mix.weights.log() + components.log_prob(x[:, None])
    torch.testing.assert_close(mix.component_log_prob(x), joint, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MIXTURES)
def test_samples_have_the_exact_moments(name):
    mix, n = MIXTURES[name], 50_000
    d = mix.sample(n, seeded(1)).double() - mix.mean
    error = (mix.cov.diagonal() / n).sqrt()
    assert (d.mean(0).abs() < 5*error).all(), "a mean is more than 5 standard errors off"
    products = d[:, :, None] * d[:, None, :]
    off = (products.mean(0) - mix.cov).abs() / (products.std(0) / n**0.5)
    assert (off < 5).all(), "a covariance is more than 5 standard errors off"


def test_sample_frequencies_and_labels():
    mix, n = GaussianMixture([[-100.], [0.], [100.]], 1., [0.1, 0.2, 0.7], [5, 3, 5]), 50_000
    x, y = mix.sample_labelled(n, seeded(2))
    k = (x[:, 0] / 100).round().long() + 1
    share = k.bincount(minlength=3) / n
    assert ((share - mix.weights).abs() < 5*(mix.weights*(1 - mix.weights) / n).sqrt()).all()
    assert (y == mix.labels[k]).all() and y.dtype == torch.long
    assert x.dtype == torch.float32 and mix.sample(n, seeded(2)).equal(x), "labels change no point"


def test_density_follows_the_dtype_of_x():
    x = torch.randn(50, 2, generator=seeded(0))
    low, high = gaussians_25().log_prob(x), gaussians_25().log_prob(x.double())
    assert (low.dtype, high.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(low.double(), high, rtol=1e-5, atol=1e-3)   # log densities reach -1e3 here


def test_density_far_away_and_weight_zero():
    mix = GaussianMixture([[0.], [1.]], [1., 0.1], [1., 0.])
    far = torch.tensor([[1e3]], dtype=torch.float64)
    assert mix.log_prob(far).item() == pytest.approx(-0.5e6 - 0.5*math.log(2*math.pi))
    assert mix.sample(1000, seeded(0)).std() > 0.8, "a component of weight 0 is never drawn"


def two(*args, **kwargs): return GaussianMixture([[1.], [2.]], *args, **kwargs)


NO_IMAGES = torch.zeros(0, 1, 8, 8, dtype=torch.uint8), torch.zeros(0).long()


@pytest.mark.parametrize("make", [
    lambda: GaussianMixture([1., 2.], 1.), lambda: GaussianMixture([[math.inf]], 1.), lambda: two(-1.),
    lambda: two(math.nan), lambda: two([1., 2., 3.]), lambda: two(1., [0.5, 0.4]),
    lambda: two(1., [1.5, -0.5]), lambda: two(1., [math.nan, 1.]), lambda: two(1., labels=[0]),
    lambda: two(1., labels=[0, -1]), lambda: two(1., labels=[0.5, 1.]), lambda: two(1.).sample(0),
    lambda: two(1.).log_prob(torch.zeros(2)), lambda: gaussians_25(std=0.), lambda: ring(3, 4),
    lambda: swiss_roll(0), lambda: digits("validation"), lambda: Images(*NO_IMAGES),
    lambda: to_unit(torch.zeros(3).long()), lambda: to_uint8(torch.zeros(3).long()),
    lambda: to_uint8(torch.tensor([math.inf]))])
def test_bad_input_is_one_sentence(make):
    with pytest.raises(BadInput) as e: make()
    assert str(e.value).endswith(".") or str(e.value).endswith("?")
    assert "\n" not in str(e.value)


def test_swiss_roll_is_a_spiral():
    x = swiss_roll(5000, seeded(0), std=0.).double()
    radius = x.norm(dim=1)
    turns = 7.5*radius   # the angle that belongs to this radius
    on_curve = torch.stack([turns.cos(), turns.sin()], 1) * radius[:, None]
    torch.testing.assert_close(x, on_curve, rtol=0, atol=1e-5)
    assert 0.62 < radius.min() < 0.66 and 1.86 < radius.max() < 1.89


def test_ring_has_equal_classes_of_neighbours():
    mix = ring(8, 4)
    assert mix.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    torch.testing.assert_close(mix.means.norm(dim=1), torch.full((8,), 1.5, dtype=torch.float64))
    steps = mix.means.roll(-1, 0) - mix.means
    chord = torch.full((8,), 3*math.sin(math.pi/8), dtype=torch.float64)
    torch.testing.assert_close(steps.norm(dim=1), chord)


@pytest.mark.parametrize("split", DIGITS_SPLITS)
def test_digits_are_the_published_bytes(split):
    images = digits(split)
    assert images.sha256 == SHA256[split]
    by_hand = repr(tuple(images.x.shape)).encode() + images.x.numpy().tobytes() + images.y.numpy().tobytes()
    assert hashlib.sha256(by_hand).hexdigest() == SHA256[split]


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits
    raw = load_digits()
    assert (digits("all").x[:, 0].numpy() == np.floor(raw.images*255/16 + 0.5)).all()
    assert (digits("all").y.numpy() == raw.target).all()


def test_split_is_stratified_disjoint_and_complete():
    train, test, everything = digits("train"), digits("test"), digits("all")
    assert test.y.bincount().tolist() == [50]*10 and len(train) + len(test) == len(everything)
    rows = lambda images: {r.tobytes() for r in images.x.numpy()}
    assert not rows(train) & rows(test) and rows(train) | rows(test) == rows(everything)


def test_split_depends_on_no_random_state():
    torch.manual_seed(1); np.random.seed(1)
    before = torch.get_rng_state()
    assert digits("test").sha256 == SHA256["test"] and torch.get_rng_state().equal(before)


def test_quantisation():
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_uint8(to_unit(levels)).equal(levels) and to_uint8(to_unit(levels).half()).equal(levels)
    edges = torch.arange(255, dtype=torch.float64) + 0.5   # half-way between two levels
    assert to_uint8((edges - 0.01)/127.5 - 1).equal(levels[:-1])
    assert to_uint8((edges + 0.01)/127.5 - 1).equal(levels[1:])


def test_batches_of_images():
    images = digits("train")
    x, y = images.batch(torch.tensor([5, 5, 0]))
    assert x.equal(to_unit(images.x[[5, 5, 0]])) and y.equal(images.y[[5, 5, 0]]) and x.dtype == torch.float32
    flipping = Images(images.x, images.y, flip=True)
    index = torch.arange(1297)
    (a, _), (b, _) = flipping.batch(index, seeded(3)), flipping.batch(index, seeded(3))
    assert a.equal(b)
    straight = (a == to_unit(images.x)).flatten(1).all(1)
    mirrored = (a == to_unit(images.x.flip(-1))).flatten(1).all(1)
    assert (straight | mirrored).all() and abs(straight.double().mean() - 0.5) < 5*0.5/1297**0.5
    assert flipping.to("cpu").flip


FLIPPED = "13d080dc941c770e0df0de29f6b7b1c3e7f98adf26da287513f5b3291033a017"


def test_batches_on_the_host_stay_what_they_were():
    images, index = digits("train"), torch.randperm(1297, generator=seeded(0))[:200]
    x, y = Images(images.x, images.y, flip=True).batch(index, seeded(1))   # some of them mirrored
    assert hashlib.sha256(x.numpy().tobytes() + y.numpy().tobytes()).hexdigest() == FLIPPED
    mirror = torch.rand(200, generator=seeded(1)) < 0.5
    by_hand = images.x[index]
    by_hand[mirror] = by_hand[mirror].flip(-1)
    assert x.equal(to_unit(by_hand)) and y.equal(images.y[index]) and images.device == torch.device("cpu")


def test_bytes_travel_and_floats_are_made_there(monkeypatch):
    "A generator elsewhere: what the host sends is uint8, and all the rest happens where it arrives."
    elsewhere, went = torch.device("meta"), []
    def sent(v, device): went.append((v.dtype, v.device.type, device)); return v.to(device)
    def rand(*size, generator, device): went.append(device); return torch.zeros(size, device=device)
    monkeypatch.setattr(data, "sent", sent)
    monkeypatch.setattr(torch, "rand", rand)
    images = Images(digits("test").x, digits("test").y, flip=True)
    x, y = images.batch(torch.arange(7), types.SimpleNamespace(device=elsewhere))
    assert went == [(torch.uint8, "cpu", elsewhere), (torch.long, "cpu", elsewhere), elsewhere]
    assert x.device == y.device == elsewhere and x.dtype == torch.float32 and x.shape == (7, 1, 8, 8)
    went.clear()
    there = images.to("meta")
    assert there.device == elsewhere and there.batch(torch.arange(7), seeded(0))[0].device == elsewhere
    assert went == [torch.device("cpu")], "images that are there already stay, wherever the flips are drawn"


def test_what_a_gpu_fetches_is_pinned(monkeypatch):
    calls = []
    class Bytes:
        def pin_memory(self): calls.append("pinned"); return self
        def to(self, device, non_blocking=False): calls.append((device.type, non_blocking)); return self
    for device in ("cuda", "cpu", "mps"): data.sent(Bytes(), torch.device(device))
    assert calls == ["pinned", ("cuda", True), ("cpu", False), ("mps", False)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nobody_waits_for_a_gpu():
    images, index = digits("train"), torch.arange(100)
    for home in ("cpu", "cuda"):
        there = Images(images.x, images.y, flip=True).to(home)
        draws, rows = seeded(0, device="cuda"), index.to(home)
        torch.cuda.set_sync_debug_mode("error")
        try: x, y = there.batch(rows, draws)
        finally: torch.cuda.set_sync_debug_mode("default")
        assert x.device.type == y.device.type == "cuda" and y.cpu().equal(images.y[index])
        levels, known = to_uint8(x.cpu()), images.x[index]
        straight, mirrored = ((levels == k).flatten(1).all(1) for k in (known, known.flip(-1)))
        assert (straight | mirrored).all() and not straight.all()


def test_importing_data_stays_light():
    code = ("import sys, fastdiff_edu.data\n"
            "print([m for m in ('sklearn', 'matplotlib', 'scipy', 'datasets') if m in sys.modules])")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"
