"Our own eye for images: what the loss draws, the counts, the file, and a training that goes on."
import copy, itertools, subprocess, sys, warnings, zipfile

import pytest
import torch
import torch.nn.functional as F

from fastdiff_edu.classifier import (Classifier, ClassifierConfig, accuracy, classification_loss,
                                     feature_scale, moved, write_eye)
from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.data import Images, digits, to_unit
from fastdiff_edu.features import load_features, look_at
from fastdiff_edu.train import TrainConfig, fit, train

SMALL = ClassifierConfig(8, 1, width=4)


def small(seed:int=0, config:ClassifierConfig=SMALL) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(config)


def settings(steps:int, **more) -> TrainConfig:
    return TrainConfig(steps, batch=64, lr=3e-3, warmup=5, ema=0.9, bar=False, **more)


# --- the network

@pytest.mark.parametrize("size, ch, labels", [(8, 1, 10), (11, 2, 3), (32, 3, 10), (64, 3, 2)])
def test_shapes(size, ch, labels):
    net, x = small(config=ClassifierConfig(size, ch, 8, labels)).eval(), torch.randn(3, ch, size, size)
    assert net.features(x).shape == (3, 32) and net(x).shape == (3, labels)
    assert net(x).equal(net.head(net.features(x))), "the logits come from the features"
    assert net.features(x).equal(net.body(x).mean((2, 3)))
    last = 2*size//16 if size % 8 == 0 else 1
    assert net.body(x).shape[-1] == last and net.body(x).min() >= 0


def test_rows_do_not_see_each_other_when_judged():
    net, x = small().eval(), torch.randn(6, 1, 8, 8, generator=seeded(0))
    for v in net.modules():
        if isinstance(v, torch.nn.BatchNorm2d): v.running_mean.normal_(); v.running_var.uniform_(0.5, 2)
    torch.testing.assert_close(net(x)[2:3], net(x[2:3]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [
    lambda: ClassifierConfig(7), lambda: ClassifierConfig(in_ch=0), lambda: ClassifierConfig(width=0),
    lambda: ClassifierConfig(n_labels=0), lambda: small()(torch.zeros(1, 3, 8, 8)),
    lambda: small()(torch.zeros(1, 1, 9, 9)), lambda: classification_loss(smoothing=1.),
    lambda: classification_loss(smoothing=-0.1), lambda: classification_loss(pad=-1),
    lambda: moved(torch.zeros(2, 1, 8, 9), 8, seeded(0)), lambda: feature_scale(dead(), digits("test"))])
def test_bad_input_is_one_sentence(make):
    with pytest.raises(BadInput) as e: make()
    assert str(e.value).endswith(".") and "\n" not in str(e.value)


def dead() -> Classifier:
    "All features are 0."
    net = small()
    torch.nn.init.constant_(net.body[-2].bias, -100.)
    return net


# --- the loss

@pytest.mark.parametrize("height, width", [(8, 8), (6, 9)])
def test_moved_images_are_windows_of_mirrored_ones(height, width):
    x, pad = torch.randn(50, 2, height, width, generator=seeded(0)), 3
    y, larger, places = moved(x, pad, seeded(1)), F.pad(x, [pad]*4, mode="reflect"), set()
    for a, whole in zip(y, larger):
        found = [(i, j) for i, j in itertools.product(range(2*pad + 1), repeat=2)
                 if whole[:, i:i + height, j:j + width].equal(a)]
        assert len(found) == 1
        places |= set(found)
    assert len(places) > 25 and {i for i, _ in places} == {j for _, j in places} == set(range(7))
    assert moved(x, pad, seeded(1)).equal(y) and not moved(x, pad, seeded(2)).equal(y)


def test_the_loss_draws_only_from_the_generator_given():
    loss_fn, net = classification_loss(), small().eval()
    before, batch = torch.get_rng_state(), digits("test").batch(torch.arange(20))
    a, b, c = (loss_fn(net, batch, seeded(k)) for k in (0, 0, 1))
    assert a.equal(b) and not a.equal(c) and torch.get_rng_state().equal(before)
    assert a.shape == () and loss_fn.facts == {"smoothing": 0.1, "pad": 4}


def test_softened_targets_are_the_formula():
    net, (x, y) = small().eval(), digits("test").batch(torch.arange(20))
    for smoothing in (0., 0.3):
        target = (1 - smoothing) * F.one_hot(y, 10) + smoothing / 10
        by_hand = -(target * net(x).log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(classification_loss(smoothing, 0)(net, (x, y), seeded(0)), by_hand)


# --- training by the engine

def test_it_learns_and_goes_on_bit_for_bit(tmp_path):
    "Statistics of the norms included; accuracy far beyond chance."
    data, loss_fn = digits("train"), classification_loss(pad=1)
    whole = fit(loss_fn, small(), data, settings(60, save_every=20))
    for record in train(loss_fn, small(), data, settings(60, save_every=20), tmp_path/"run"):
        if record.step == 30: break
    again = fit(loss_fn, small(seed=5), data, settings(60, save_every=20), tmp_path/"run")
    for name, v in whole.state_dict().items(): assert again.state_dict()[name].equal(v), name
    assert accuracy(whole, digits("test")) > 0.3, "chance is 0.1"
    assert whole.body[-2].running_mean.abs().max() > 0.01


def test_accuracy_counts_every_image_once():
    net, images = small(), digits("test")
    right = net.eval()(to_unit(images.x)).argmax(1) == images.y
    net.train()
    flipping = Images(images.x, images.y, flip=True)
    for batch in (1000, 500, 77, 1):
        assert accuracy(net, flipping, batch) == pytest.approx(right.double().mean().item(), abs=1e-12)
    assert net.training, "the network is left in the mode it was in"
    assert net.body[-2].running_mean.equal(torch.zeros(16)), "judging teaches nothing"


# --- the file

@pytest.fixture(scope="module")
def trained() -> Classifier:
    return fit(classification_loss(pad=1), small(), digits("train"), settings(40))


def test_the_file_says_what_the_network_says(trained, tmp_path):
    sha256, x = write_eye(trained, tmp_path/"eye.pt", digits("train")), digits("test").x
    eye = load_features(tmp_path/"eye.pt", sha256)
    assert not eye.nvidia and eye.sha256 == sha256 and not eye.net.training
    scale = feature_scale(trained, digits("train"))
    for n in (1, 2, 3, 499):
        f, p = eye(x[:n], probs=True)
        with torch.no_grad():
            torch.testing.assert_close(f, trained.features(to_unit(x[:n])) * scale, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(p, trained(to_unit(x[:n])).softmax(1), rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput): eye(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))


def test_features_have_a_mean_variance_of_one(trained, tmp_path):
    write_eye(trained, tmp_path/"eye.pt", digits("train"))
    seen = look_at(load_features(tmp_path/"eye.pt"), digits("train").x)
    by_hand = seen.features.double().var(0).mean().item()
    assert by_hand == pytest.approx(1, abs=1e-5)


def test_the_file_names_no_device(trained, tmp_path):
    "Else what was written on a CPU would not run on a GPU."
    write_eye(trained, tmp_path/"eye.pt", digits("train"))
    net = torch.jit.load(tmp_path/"eye.pt")
    kinds = {v.type().kind() for node in net.inlined_graph.nodes() for v in node.outputs()}
    assert "TensorType" in kinds and "DeviceObjType" not in kinds
    assert not any(p.requires_grad for p in net.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_file_runs_on_a_gpu(trained, tmp_path):
    write_eye(copy.deepcopy(trained).cuda(), tmp_path/"eye.pt", digits("train"))
    x = digits("test").x
    f, p = load_features(tmp_path/"eye.pt")(x, probs=True)
    assert f.device.type == "cuda"
    torch.testing.assert_close(p.cpu(), trained(to_unit(x)).softmax(1), rtol=1e-3, atol=1e-3)


def test_writing_changes_no_network_and_warns_of_nothing(tmp_path):
    net = small().train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_eye(net, tmp_path/"eye.pt", digits("train"))
    assert net.training and all(p.requires_grad for p in net.parameters())
    for name, v in small().state_dict().items(): assert net.state_dict()[name].equal(v), name
    assert [p.name for p in tmp_path.iterdir()] == ["eye.pt"]
    f, _ = load_features(tmp_path/"eye.pt")(digits("test").x)
    wanted = net.eval().features(to_unit(digits("test").x)) * feature_scale(net, digits("train"))
    torch.testing.assert_close(f, wanted.detach(), rtol=1e-4, atol=1e-4)
    assert zipfile.ZipFile(tmp_path/"eye.pt").testzip() is None


def test_the_file_needs_no_package_of_ours(trained, tmp_path):
    write_eye(trained, tmp_path/"eye.pt", digits("train"))
    program = ("import sys, torch; net = torch.jit.load('eye.pt')\n"
               "f, logits = net(torch.zeros(5, 1, 8, 8, dtype=torch.uint8))\n"
               "print(*f.shape, *logits.shape, any(m.split('.')[0] == 'fastdiff_edu' for m in sys.modules))")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True,
                          text=True)
    assert done.stdout.split() == ["5", "16", "5", "10", "False"], done.stderr
