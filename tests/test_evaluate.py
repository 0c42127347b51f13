"The measures against brute force and closed forms; extractors, references and protocols, whole and damaged."
import hashlib, http.server, io, json, math, os, threading
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import numpy as np, pytest, torch
from scipy.linalg import sqrtm
from tiny import tiny_run

from fastdiff_edu import evaluate as ev, features as ft
from fastdiff_edu.core import BadInput, RunFailed, seeded
from fastdiff_edu.data import Images, digits, to_uint8
from fastdiff_edu.denoiser import Clipped, diffusion_loss
from fastdiff_edu.evaluate import EvaluateConfig, bits_per_dim, evaluate, report, table, title
from fastdiff_edu.features import (Extractor, inception_score, joined, kernel_distance, load_features,
                                   look_at, merged, moments, read_statistics, write_statistics)
from fastdiff_edu.forward import bin_nll, variational_bound
from fastdiff_edu.generate import SampleConfig, generate, load_model
from fastdiff_edu.hub import export_unet
from fastdiff_edu.hybrid import hybrid_loss, learned_bound
from fastdiff_edu.metrics import frechet_distance, precision_recall
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.sources import fingerprint
from fastdiff_edu.train import TrainConfig, fit, load_checkpoint, save_checkpoint

randn = lambda *shape, seed=0: torch.randn(*shape, generator=seeded(seed, "test"), dtype=torch.float64)
pictures = (255 * torch.rand(60, 3, 8, 8, generator=seeded(0))).to(torch.uint8)

NVIDIA = """
def forward(self, img, return_features: bool=False, use_fp16: bool=False, no_output_bias: bool=False):
    x = img.to(torch.float32) / 127.5 - 1
    h = torch.mean(torch.relu(torch.conv2d(x, self.w)), [2, 3])
    if return_features:
        return h
    bias = 0 if no_output_bias else 1
    return torch.softmax(torch.matmul(h, self.v) + bias * self.b, 1)
"""
VGG = """
def forward(self, img, resize_images: bool=True, return_features: bool=False):
    x = img.to(torch.float32) / 255
    return torch.mean(torch.relu(torch.conv2d(x, self.w)), [2, 3])
"""


def archive(path, source, width=24, seed=0):
    "A TorchScript archive with random weights and this forward."
    net = type("Net", (torch.nn.Module,), {})()   # a class of its own, which gets a forward below
    for name, shape in dict(w=(width, 3, 3, 3), v=(width, 10), b=(10,)).items():
        net.register_buffer(name, torch.randn(shape, generator=seeded(seed, name)))
    net = torch.jit.script(net)
    net.define(source)
    torch.jit.save(net, str(path))
    return path


class Conv(torch.nn.Module):
    "A plain extractor: features, and logits if wanted."
    def __init__(self, logits:bool, ch=1):
        super().__init__()
        self.logits = logits
        self.register_buffer("w", torch.randn(12, ch, 3, 3, generator=seeded(1)))

    def forward(self, x):
        h = torch.conv2d(x.float() / 255, self.w).relu().mean((2, 3))
        return (h, h[:, :5]) if self.logits else h


def traced(path, net, shape=(2, 1, 8, 8)):
    torch.jit.save(torch.jit.trace(net, torch.zeros(shape, dtype=torch.uint8)), str(path))
    return path


# Moments

@pytest.mark.parametrize("sizes", [[300], [1]*300, [299, 1], [100]*3, [3, 250, 47]])
def test_moments_of_parts_in_any_order(sizes):
    a = 1e5 + randn(300, 6) @ randn(6, 6, seed=1)
    parts = [moments(p) for p in a[torch.randperm(300, generator=seeded(0))].split(sizes)]
    for order in (parts, parts[::-1]):
        total = reduce(merged, order)
        assert total.n == 300
        torch.testing.assert_close(total.mean, a.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(total.cov, torch.from_numpy(np.cov(a.numpy().T)), rtol=1e-9, atol=1e-9)


def test_merging_is_associative_and_sharded_sets_are_the_set():
    a, b, c = (moments(randn(n, 4, seed=n) + n) for n in (5, 50, 500))
    left, right = merged(merged(a, b), c), merged(a, merged(b, c))
    torch.testing.assert_close(left.scatter, right.scatter, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(left.mean, right.mean, rtol=1e-13, atol=0)


def test_frechet_from_merged_moments_against_closed_form_and_scipy():
    a, b = randn(400, 7, seed=1) @ randn(7, 7, seed=2), randn(300, 7, seed=3) @ randn(7, 7, seed=4) + 1
    x, y = (reduce(merged, map(moments, v.split(64))) for v in (a, b))
    got = frechet_distance(x.mean, x.cov, y.mean, y.cov)
    root = torch.from_numpy(sqrtm((a.T.cov() @ b.T.cov()).numpy()).real)
    want = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov() - 2*root).trace()
    assert got == pytest.approx(want.item(), rel=1e-9)
    s, r = torch.tensor([1., 2., 3.]), torch.tensor([2., 2., 5.])   # N(0, s^2) and N(1, r^2), drawn often
    x, y = moments(randn(200_000, 3, seed=5) * s), moments(randn(200_000, 3, seed=6) * r + 1)
    assert frechet_distance(x.mean, x.cov, y.mean, y.cov) == pytest.approx(3 + 1 + 4, rel=0.01)


# Inception Score and KID

def test_inception_score_at_its_two_ends():
    for K in (2, 7):
        assert inception_score(torch.full((100, K), 1/K)).value == pytest.approx(1, abs=1e-12)
        assert inception_score(torch.eye(K).repeat(100, 1), 1) == pytest.approx((K, 0), abs=1e-12)


def test_inception_score_against_a_loop():
    p = randn(103, 4).softmax(1)
    scores = []
    for i in range(10):
        part = p[i*103//10:(i + 1)*103//10].numpy()
        mean = part.mean(0)
        kl = [sum(row[k] * math.log(row[k] / mean[k]) for k in range(4)) for row in part]
        scores.append(math.exp(np.mean(kl)))
    assert inception_score(p) == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-12)


def test_kid_against_a_double_loop():
    x, y = randn(15, 4, seed=1), 2*randn(15, 4, seed=2) + 1
    k = lambda a, b: (float(a @ b) / 4 + 1)**3
    pairs = [(i, j) for i in range(15) for j in range(15)]
    own = lambda v: sum(k(v[i], v[j]) for i, j in pairs if i != j) / (15*14)
    want = own(x) + own(y) - 2*sum(k(x[i], y[j]) for i, j in pairs) / 15**2
    assert kernel_distance(x, y, 1, 15).value == pytest.approx(want, rel=1e-9)


def test_kid_is_unbiased_and_follows_its_seed():
    pairs = ((randn(12, 5, seed=2*i), randn(12, 5, seed=2*i + 1)) for i in range(1500))
    draws = torch.tensor([kernel_distance(a, b, 1, 12).value for a, b in pairs])
    assert abs(draws.mean()) < 4.5 * draws.std() / 1500**0.5
    a, b = randn(200, 5, seed=1), randn(150, 5, seed=2)
    assert kernel_distance(a, b, 10, 50) == kernel_distance(a, b, 10, 50)
    assert kernel_distance(a, b, 10, 50) != kernel_distance(a, b, 10, 50, seed=1)
    a, b = a.float(), b.float()
    assert kernel_distance(a, b, 10, 50) == kernel_distance(a.double(), b.double(), 10, 50), "in float64"


# Extractors

def test_nvidias_interface(tmp_path):
    file = archive(tmp_path/"inception-2015-12-05.pt", NVIDIA)
    eye = load_features(file)
    assert eye.nvidia and eye.sha256 == hashlib.sha256(file.read_bytes()).hexdigest() and not eye.net.training
    f, p = eye(pictures, probs=True)
    h = torch.nn.functional.conv2d(pictures.float()/127.5 - 1, eye.net.w).relu().mean((2, 3))
    torch.testing.assert_close(f, h)
    torch.testing.assert_close(p, (h @ eye.net.v).softmax(1))   # without the bias
    vgg = load_features(archive(tmp_path/"vgg16.pt", VGG))
    assert vgg.nvidia and vgg(pictures)[0].shape == (60, 24)
    with pytest.raises(BadInput, match="tells no classes"): vgg(pictures, probs=True)


def test_plain_interface(tmp_path):
    eye = load_features(traced(tmp_path/"a.pt", Conv(True)))
    gray = pictures[:, :1]
    f, p = eye(gray, probs=True)
    torch.testing.assert_close(p, f[:, :5].softmax(1))
    alone = load_features(traced(tmp_path/"b.pt", Conv(False)))
    torch.testing.assert_close(alone(gray)[0], f)
    with pytest.raises(BadInput, match="tells no classes"): alone(gray, probs=True)
    with pytest.raises(BadInput, match=r"'b.pt' cannot look at images \(3, 8, 8\)"): alone(pictures)


def test_checksum_is_compared_before_the_archive_is_opened(tmp_path, monkeypatch):
    file = archive(tmp_path/"a.pt", NVIDIA)
    right = hashlib.sha256(file.read_bytes()).hexdigest()
    assert load_features(file, right[:12].upper()).sha256 == right
    def opened(*_, **__): raise AssertionError("it was opened")
    monkeypatch.setattr(torch.jit, "load", opened)
    with pytest.raises(BadInput, match="not used"): load_features(file, "0123")


@pytest.mark.parametrize("spoil", [lambda b: b[:-60], lambda b: b[:300], lambda b: b"", lambda b: b"404"])
def test_damaged_archives_are_one_sentence(spoil, tmp_path):
    file = archive(tmp_path/"a.pt", NVIDIA)
    file.write_bytes(spoil(file.read_bytes()))
    with pytest.raises(BadInput, match="no whole TorchScript archive") as e: load_features(file)
    assert "\n" not in str(e.value)


def test_a_flipped_byte_is_noticed_wherever_it_changes_a_weight(tmp_path):
    "torch.jit.load alone compares no checksums: about half of these bytes would change a weight unseen."
    file = archive(tmp_path/"a.pt", NVIDIA)
    good, whole = load_features(file).net.state_dict(), file.read_bytes()
    for i in range(0, len(whole), 97):
        file.write_bytes(whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1:])
        try: state = load_features(file).net.state_dict()
        except BadInput: continue
        assert all(state[k].equal(good[k]) for k in good), i


def test_pickles_are_not_opened(tmp_path):
    torch.save({"weights": torch.ones(3)}, tmp_path/"a.pt")
    for name in ("a.pt", "nowhere.pt", "."):
        with pytest.raises(BadInput): load_features(tmp_path/name)


class Server(http.server.SimpleHTTPRequestHandler):
    "Serves whole.pt; cut.pt breaks off, and anything else is not there."
    data = b""
    def log_message(self, *_): pass

    def do_GET(self):
        if self.path[1:] not in ("whole.pt", "cut.pt"): return self.send_error(404, "not here")
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.data)))
        self.end_headers()
        self.wfile.write(self.data if self.path == "/whole.pt" else self.data[:-100])


@pytest.fixture
def server(tmp_path, monkeypatch):
    "A server in place of NVIDIA's, and an empty folder for what is fetched."
    Server.data = archive(tmp_path/"source.pt", NVIDIA).read_bytes()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path/"cache"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as s:
        threading.Thread(target=s.serve_forever, daemon=True).start()
        def serves(**names):
            for name, file in names.items():
                monkeypatch.setitem(ft.ADDRESSES, name, f"http://127.0.0.1:{s.server_port}/{file}")
        yield serves
        s.shutdown()


def test_archives_are_fetched_once(server, tmp_path):
    server(inception="whole.pt")
    file = ft.fetch_features("inception", bar=False)
    assert file == tmp_path/"cache"/"checkpoints"/"whole.pt" and file.read_bytes() == Server.data
    server(inception="gone.pt")   # from here on, nothing more comes
    file.rename(file.with_name("gone.pt"))
    eye = ft.open_features("inception")
    assert eye.sha256 == hashlib.sha256(Server.data).hexdigest() and eye.nvidia
    with pytest.raises(BadInput, match="not used"): ft.open_features("inception", "00")
    with pytest.raises(BadInput, match="did you mean 'vgg16'"): ft.fetch_features("vgg19")
    assert ft.open_features(tmp_path/"source.pt").sha256 == eye.sha256, "a path is a path"


@pytest.mark.parametrize("file, why", [("none.pt", "404"), ("cut.pt", "bytes came")])
def test_what_cannot_be_fetched_is_one_sentence_and_leaves_nothing(file, why, server, tmp_path):
    server(inception=file)
    with pytest.raises(BadInput) as e: ft.fetch_features("inception", bar=False)
    said = str(e.value)
    assert file in said and why in said and "the path of a copy" in said and "\n" not in said
    assert not list((tmp_path/"cache"/"checkpoints").iterdir())


def test_a_server_that_is_not_there_is_one_sentence(server, tmp_path, monkeypatch):
    monkeypatch.setitem(ft.ADDRESSES, "vgg16", "http://127.0.0.1:9/vgg16.pt")
    with pytest.raises(BadInput, match="127.0.0.1:9/vgg16.pt' was not fetched .*the path of a copy"):
        ft.fetch_features("vgg16", bar=False)


def test_the_names_are_those_of_the_files_that_define_fid():
    assert [a.rpartition("/")[2] for a in ft.ADDRESSES.values()] == [ev.INCEPTION, "vgg16.pt"]


def test_evaluation_by_names(server, run, tmp_path):
    server(inception="whole.pt")
    cfg = config(run, "inception", tmp_path/"e", metrics=("fid", "pr"), n=20)
    got = evaluate(cfg, bar=False)["numbers"]
    sha = hashlib.sha256(Server.data).hexdigest()
    for key in ("fid", "precision"):
        assert got[key]["protocol"]["measured"]["extractor"]["sha256"] == sha
    assert "whole.pt" in got["fid"]["name"], "another file is no FID"


def test_looking_in_batches_is_the_same(tmp_path):
    eye = load_features(archive(tmp_path/"a.pt", NVIDIA))
    whole, small = look_at(eye, pictures, probs=True), look_at(eye, pictures, 7, probs=True)
    shards = joined(*(look_at(eye, pictures, probs=True, rows=r) for r in torch.arange(60).split([11, 49])))
    for other in (small, shards):
        torch.testing.assert_close(other.features, whole.features, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other.probs, whole.probs, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(other.moments.cov, whole.moments.cov, rtol=1e-4, atol=1e-8)
    lean = look_at(eye, pictures, 7, keep=False)
    assert lean.features is None and lean.probs is None and lean.moments.cov.equal(small.moments.cov)


def test_features_that_are_not_finite_are_refused():
    class Broken(torch.nn.Module):
        def forward(self, x): return x.float().flatten(1) / 0
    with pytest.raises(BadInput, match="not finite"): look_at(Extractor(Broken(), "b", "", False), pictures)


def test_tf32_is_off_while_looking_and_put_back():
    seen, cudnn = [], torch.backends.cudnn
    class Spy(torch.nn.Module):
        def forward(self, x): seen.append(cudnn.allow_tf32); return x.float().flatten(1)
    before = cudnn.allow_tf32
    try:
        cudnn.allow_tf32 = True
        look_at(Extractor(Spy(), "spy", "", False), pictures)
        assert seen == [False] and cudnn.allow_tf32
    finally: cudnn.allow_tf32 = before


@pytest.mark.parametrize("key", ev.TITLES)
def test_only_inception_gives_a_papers_name(key):
    inception = Extractor(None, ev.INCEPTION, "ab"*32, nvidia=True)
    papers = {"fid": "FID", "is": "Inception Score", "kid": "KID"}
    if key in papers: assert title(key, inception, 2048) == papers[key]
    for eye, width in ((inception, 24), (replace(inception, nvidia=False), 2048),
                       (replace(inception, name="cifar10-features.pt"), 2048)):
        said = title(key, eye, width)
        assert not {"FID", "KID", "Inception Score"} & {said} and f"features: {eye.name}, sha256 abab" in said


# References

def test_statistics_there_and_back(tmp_path):
    m = moments(randn(50, 4))
    file = write_statistics(tmp_path/"a.npz", m)
    back = read_statistics(file)
    assert back.mean.equal(m.mean) and back.cov.equal(m.cov)
    with np.load(file, allow_pickle=False) as z: assert sorted(z) == ["mu", "sigma"]


def npz(**arrays) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


GOOD = npz(mu=np.arange(40.), sigma=np.eye(40))


@pytest.mark.parametrize("data, words", [
    (GOOD[:-40], "no whole .npz"), (GOOD[:90] + b"\xff\xff\xff" + GOOD[93:], "no whole .npz"),
    (b"", "no whole .npz"), (npz(mean=np.zeros(2)), "no whole .npz"),
    (npz(mu=np.array([len], object), sigma=np.eye(1)), "no whole .npz"),
    (npz(mu=np.array(["a"]), sigma=np.eye(1)), "no whole .npz"),
    (npz(mu=np.zeros(3), sigma=np.eye(2)), "want (D,)"), (npz(mu=np.zeros(0), sigma=np.eye(0)), "want (D,)"),
    (npz(mu=np.full(2, np.nan), sigma=np.eye(2)), "not finite"),
    (npz(mu=np.zeros(2), sigma=np.triu(np.ones((2, 2)))), "not symmetric")])
def test_damaged_statistics_are_one_sentence(data, words, tmp_path):
    (tmp_path/"a.npz").write_bytes(data)
    with pytest.raises(BadInput) as e: read_statistics(tmp_path/"a.npz")
    assert words in str(e.value) and "\n" not in str(e.value)


# Bits per dimension

@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A training's folder: a few steps of a tiny network with classes."
    out = tmp_path_factory.mktemp("run")
    return tiny_run(out, Schedule.linear(), data=digits(), steps=30, batch=64, lr=0.003)


def test_a_denoiser_that_knows_nothing_pays_eight_bits():
    "Levels drawn evenly, one long step, a decoder cut at the open ends of [-1, 1]: known by hand."
    class Blind:
        schedule = Schedule.cosine()
        def __call__(self, x, t): return type("P", (), dict(x0=torch.zeros_like(x)))
    x = torch.arange(256, dtype=torch.uint8).reshape(256, 1, 1, 1)
    images = Images(x, torch.zeros(256, dtype=torch.long))
    bound = partial(ev.PIXEL_BOUND, decoder_var=0.25)
    got = bits_per_dim(Blind(), images, torch.tensor([1., 0.]), bound=bound)
    edges = torch.tensor([-math.inf, *((2*k - 256)/255 for k in range(1, 256)), math.inf])
    mass = torch.special.ndtr(edges.double() / 0.5).diff()
    alpha, sigma = Blind.schedule.alpha(1.), Blind.schedule.sigma(1.)
    prior = ((alpha * (x.double()/127.5 - 1))**2 + sigma**2 - 1 - math.log(sigma**2)).mean() / 2
    assert got.value == pytest.approx((-mass.log().mean() + prior).item() / math.log(2), rel=1e-5)


def test_bits_are_the_bound_averaged(run):
    model, data = Clipped(load_model(run)), digits("test")
    images, grid = Images(data.x[:30], data.y[:30]), model.schedule.grid(20)
    got = bits_per_dim(model, images, grid, seed=3, batch=30)
    x0 = images.batch(torch.arange(30))[0]
    bound = variational_bound(model, x0, grid, seeded(3, "bound", 0), nll=bin_nll)
    bits = bound.total.double() / 64 / math.log(2)
    assert got == pytest.approx((bits.mean().item(), bits.std().item() / 30**0.5), rel=1e-6)
    assert 0 < got.spread < got.value < 30
    other = bits_per_dim(model, images, grid, seed=3, batch=7)
    assert abs(other.value - got.value) < 4.5 * got.spread
    assert bits_per_dim(model, images, grid, seed=3, batch=30, labels=True).value != got.value


def test_networks_that_say_their_variances_are_judged_with_them(eye, tmp_path):
    "Ours, and in the form of diffusers."
    net = UNet(UNetConfig(8, 1, 2, width=8, mult=(1, 2), blocks=1, attn=(), dropout=0., groups=4))
    cfg = TrainConfig(5, batch=8, lr=0.01, warmup=0, bar=False)
    fit(hybrid_loss(Schedule.linear()), net, digits().batch(torch.arange(32))[0], cfg, tmp_path/"run")
    model, held = load_model(tmp_path/"run"), digits("test")
    export_unet(model, tmp_path/"theirs")
    rows = torch.randperm(500, generator=seeded(0, "bound"))[:10]
    x0 = Images(held.x[rows], held.y[rows]).batch(torch.arange(10))[0]
    found = learned_bound(Clipped(model), x0, model.schedule.grid(5), seeded(0, "bound", 0)).total
    bits = found / math.log(2) / 64
    for name in ("run", "theirs"):
        cfg = config(tmp_path/name, eye, tmp_path/"e", held_out="digits:test", metrics=("bits", "fid"))
        got = evaluate(cfg, bar=False)["numbers"]
        assert got["bits"]["protocol"]["measured"]["variance"] == "learned"
        assert got["bits"]["value"] == pytest.approx(bits.mean().item(), rel=1e-3)
        which = got["fid"]["protocol"]["made"]["weights"]["which"]
        assert which == ("ema" if name == "run" else "a folder of diffusers")


# The whole

@pytest.fixture(scope="module")
def eye(tmp_path_factory): return traced(tmp_path_factory.mktemp("eye")/"net.pt", Conv(True))


def config(run, eye, out, **kwargs):
    small = dict(n=60, steps=3, features=eye, kid_size=20, kid_subsets=5, splits=2, bound_n=10, bound_steps=5)
    return EvaluateConfig(run, out=out, **small | kwargs)


def test_evaluation_is_what_its_parts_give(run, eye, tmp_path):
    cfg = config(run, eye, tmp_path/"e", metrics=ev.METRICS)
    got = evaluate(cfg, bar=False)
    assert json.loads((tmp_path/"e"/"evaluation.json").read_text()) == got
    assert {p.name for p in (tmp_path/"e").iterdir()} == {"evaluation.json", "samples.npy", "samples.json"}
    value = {k: e["value"] for k, e in got["numbers"].items()}
    assert list(value) == ["fid", "is", "kid", "precision", "recall", "bits"]
    x, made = generate(SampleConfig(run, steps=3, n=60), bar=False)
    seen = Extractor(Conv(True), "", "", False)
    (f, p), (g, _) = seen(to_uint8(x), True), seen(digits().x, True)
    a, b = moments(g), moments(f)
    assert value["fid"] == pytest.approx(frechet_distance(a.mean, a.cov, b.mean, b.cov), rel=1e-4)
    assert value["is"] == pytest.approx(inception_score(p, 2).value, rel=1e-5)
    assert value["kid"] == pytest.approx(kernel_distance(g, f, 5, 20, 0).value, rel=1e-3)
    assert (value["precision"], value["recall"]) == pytest.approx(precision_recall(g, f), abs=0.02)
    told = got["numbers"]["fid"]["protocol"]["made"]
    assert {k: told[k] for k in made} == made and told["file"] == fingerprint(tmp_path/"e"/"samples.npy")


def test_every_number_has_its_protocol_and_what_real_images_get(run, eye, tmp_path):
    got = evaluate(config(run, eye, tmp_path), bar=False)
    sha = hashlib.sha256(eye.read_bytes()).hexdigest()
    for key, e in got["numbers"].items():
        made, measured = e["protocol"]["made"], e["protocol"]["measured"]
        assert {"weights", "seed", "method", "steps", "spacing", "n"} <= set(made), key
        assert measured["extractor"] == dict(name="net.pt", sha256=sha, call="plain")
        assert measured["reference"]["sha256"] == digits().sha256 and measured["samples"] == 60
        assert {"resize", "quantisation"} <= set(measured)
        assert "FID" not in e["name"] and sha[:12] in e["name"]
        assert e["real_how"] == "two halves of the reference, 649 and 648 images" and e["real"] is not None
    number = got["numbers"]
    assert number["fid"]["real"] < number["fid"]["value"] and number["recall"]["real"] > 0.8
    said = report(got)
    for e in number.values(): assert f"{e['name']}: {e['value']:.5g}" in said
    assert said.count("made: ") == 1 and sha in said


def test_held_out_images_stand_in_for_samples(run, eye, tmp_path):
    cfg = config(run, eye, tmp_path, held_out="digits:test", metrics=("fid",))
    got = evaluate(cfg, bar=False)["numbers"]["fid"]
    assert got["real_how"] == "60 images of digits:test, as if samples"
    rows = torch.randperm(500, generator=seeded(0, "real"))[:60]
    look = partial(look_at, load_features(eye))
    a, b = look(digits().x).moments, look(digits("test").x[rows]).moments
    assert got["real"] == pytest.approx(frechet_distance(a.mean, a.cov, b.mean, b.cov), rel=1e-6)
    assert 0 < got["real"] < got["value"]


def test_published_statistics_give_the_frechet_distance_alone(run, eye, tmp_path):
    seen = look_at(load_features(eye), digits().x)
    file = write_statistics(tmp_path/"ref.npz", seen.moments)
    whole = evaluate(config(run, eye, tmp_path, metrics=("fid",)), bar=False)["numbers"]["fid"]
    cfg = config(run, eye, tmp_path, metrics=("fid", "is"), reference=str(file))
    got = evaluate(cfg, bar=False)["numbers"]
    assert got["fid"]["value"] == pytest.approx(whole["value"], rel=1e-6)
    assert got["fid"]["real"] is None and "--held-out" in got["fid"]["real_how"]
    for metric in ("kid", "pr"):
        with pytest.raises(BadInput, match="leave out the metrics 'kid' and 'pr'"):
            config(run, eye, tmp_path, metrics=(metric,), reference=str(file))


@pytest.mark.parametrize("metrics, n", [(("fid",), 1), (("is",), 9), (("pr",), 3)])
def test_too_few_samples_are_refused_before_any_is_drawn(metrics, n):
    with pytest.raises(BadInput, match="these metrics take at least"):
        EvaluateConfig(Path("run"), metrics=metrics, n=n)
    EvaluateConfig(Path("run"), metrics=metrics, n=n + 1)


def test_statistics_with_negative_variances_are_refused(tmp_path):
    np.savez(tmp_path/"bad.npz", mu=np.zeros(3), sigma=-np.eye(3))
    with pytest.raises(BadInput, match="negative variances"): read_statistics(tmp_path/"bad.npz")


def test_another_extractor_for_precision_and_recall(run, eye, tmp_path):
    vgg = archive(tmp_path/"vgg16.pt", VGG)
    got = evaluate(config(run, eye, tmp_path, metrics=("fid", "pr"), pr_features=vgg), bar=False)["numbers"]
    assert "vgg16.pt" in got["recall"]["name"] and "net.pt" in got["fid"]["name"]


def test_too_few_images_for_the_floor_are_said(run, eye, tmp_path):
    cfg = config(run, eye, tmp_path, metrics=("kid",), n=700, kid_size=700, kid_subsets=1)
    got = evaluate(cfg, bar=False)["numbers"]["kid"]
    assert got["real"] is None and got["real_how"].startswith("not measured: Got 649 and 648 images")


def test_numbers_of_two_protocols_are_not_put_in_one_table(run, eye, tmp_path):
    small = partial(config, run, eye, tmp_path)
    a, b = (evaluate(small(metrics=("fid", "is"), steps=n), bar=False) for n in (2, 4))
    assert table({"two steps": a, "four": b}).count("\n") == 2, "another sampler is what one compares"
    others = dict(samples=dict(n=50), reference=dict(reference="digits:test"), splits=dict(splits=3),
                  extractor=dict(features=traced(tmp_path/"b.pt", Conv(True))))
    for field, change in others.items():
        with pytest.raises(BadInput, match="do not share a table") as e:
            table({"a": a, "b": evaluate(small(metrics=("fid", "is"), steps=2, **change), bar=False)})
        assert field in str(e.value)
    bits = evaluate(small(metrics=("bits",)), bar=False)
    assert "not measured" in table({"a": a, "bits": bits})


def test_packed_folders_are_references(run, eye, tmp_path):
    packed = pytest.importorskip("fastdiff_edu.packed")
    from PIL import Image
    (tmp_path/"in").mkdir()
    for i, im in enumerate(pictures[:40]):
        Image.fromarray(im.permute(1, 2, 0).numpy()).save(tmp_path/f"in/{i:02}.png")
    folder, *_ = packed.prepare(packed.PrepareConfig("folder", str(tmp_path/"in"), tmp_path/"out", size=8))
    assert ft.open_images(folder).x.equal(pictures[:40])
    known = ft.reference_facts(folder)
    assert known["images"] == 40 and known["filter"] and known["jpeg"] is False
    data = bytearray((folder/"images.u8").read_bytes())
    data[7] ^= 1
    (folder/"images.u8").write_bytes(data)
    with pytest.raises(BadInput, match="sha256 differs"): ft.reference_facts(folder)
    with pytest.raises(BadInput, match="does not fit"):
        evaluate(config(run, eye, tmp_path/"e", reference=str(folder)), bar=False)


def test_samples_are_drawn_once(run, eye, tmp_path, monkeypatch):
    "Other metrics look at the samples that are there; other samples, and damaged ones, are drawn."
    drawn = []
    walks = generate.__globals__["walks"]
    seen = lambda work, firsts: drawn.append(1) or walks(work, firsts)
    monkeypatch.setitem(generate.__globals__, "walks", seen)
    def fid(**kwargs): return evaluate(config(run, eye, tmp_path, **kwargs), bar=False)["numbers"].get("fid")
    first = fid(metrics=("fid", "is"))
    assert len(drawn) == 1 and fid(metrics=("fid", "kid"), kid_size=10) == first and len(drawn) == 1
    assert fid(seed=1) != first and len(drawn) == 2
    fid(metrics=("bits",))
    assert len(drawn) == 2, "bits need no samples"
    data = bytearray((tmp_path/"samples.npy").read_bytes())
    data[-1] ^= 1
    (tmp_path/"samples.npy").write_bytes(data)
    fid(seed=1)
    assert len(drawn) == 3


def test_samples_that_are_not_finite_are_no_evaluation(eye, tmp_path):
    net = UNet(UNetConfig(8, 1, width=8, mult=(1, 2), blocks=1, attn=(), dropout=0.))
    loss, cfg = diffusion_loss(Schedule.cosine(), "v"), TrainConfig(1, bar=False)
    fit(loss, net, torch.rand(16, 1, 8, 8), cfg, tmp_path/"run")
    for p in net.parameters(): torch.nn.init.constant_(p, math.nan)
    known, state = load_checkpoint(tmp_path/"run").manifest, net.state_dict()
    (tmp_path/"nan").mkdir()
    save_checkpoint(tmp_path/"nan", 1, dict(net=state, ema=state), {k: known[k] for k in ("net", "loss")})
    with pytest.raises(RunFailed, match="not finite"):
        evaluate(config(tmp_path/"nan", eye, tmp_path/"e", n=9, batch=4, metrics=("fid",)), bar=False)
    assert not {p.name for p in (tmp_path/"e").iterdir()} & {"evaluation.json", "samples.npy"}


@pytest.mark.parametrize("change, words", [
    (dict(metrics=("fdi",)), "did you mean 'fid'"), (dict(metrics=()), "choose from"),
    (dict(n=0), "at least 1"),
    (dict(kid_subsets=0), "at least 1"), (dict(features="nowhere.pt"), "There is no file"),
    (dict(features_sha256="00"), "not used"), (dict(reference="nowhere"), "There is no folder"),
    (dict(reference="nowhere.npz", metrics=("fid",)), "no whole .npz"),
    (dict(held_out="digits:tset"), "did you mean 'test'"),
    (dict(kid_size=61), "smaller --kid-size"), (dict(splits=61), "these metrics take at least 61"),
    (dict(method="dimm"), "did you mean")])
def test_bad_arguments_are_one_sentence(change, words, run, eye, tmp_path):
    with pytest.raises(BadInput) as e: evaluate(config(run, eye, tmp_path/"e", **change), bar=False)
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path/"e"/"evaluation.json").exists()


def test_without_a_file_digits_are_seen_by_the_courses_classifier(run, tmp_path, monkeypatch):
    monkeypatch.setattr(ft, "digit_classifier", partial(ft.digit_classifier, steps=20))
    cfg = config(run, None, tmp_path, metrics=("fid", "is"))
    got = evaluate(cfg, bar=False)["numbers"]
    assert got["fid"]["name"].startswith("Frechet distance (features: digit classifier, sha256 ")
    assert evaluate(cfg, bar=False)["numbers"] == got, "read back from its folder, the same judge"


class Bomb:
    "Unpickling it makes a folder."
    def __init__(self, folder): self.folder = folder
    def __reduce__(self): return os.mkdir, (str(self.folder),)


def test_nothing_in_an_npz_runs(tmp_path):
    (tmp_path/"a.npz").write_bytes(npz(mu=np.array([Bomb(tmp_path/"ran")], object), sigma=np.eye(1)))
    with pytest.raises(BadInput, match="no whole .npz"): read_statistics(tmp_path/"a.npz")
    assert not (tmp_path/"ran").exists()
