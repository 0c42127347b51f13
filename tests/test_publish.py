"A training becomes a folder that diffusers loads, with a card whose every number has its protocol."
import json

import pytest, torch

from fastdiff_edu.cli import main
from fastdiff_edu.hub import load_unet
from fastdiff_edu.models import load_model

TINY = ("train", "cifar10-ddpm", "--size", "tiny", "--net.groups", "8", "--steps", "4", "--sheet-every", "0")
EYE = "runs/cifar10-features-tiny/cifar10-features-tiny.pt"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A folder with a training, an eye, and an evaluation."
    place = tmp_path_factory.mktemp("publish")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        judge = ("evaluate", "runs/cifar10-ddpm-tiny", "--sampler", "ddim", "--steps", "3", "--n", "40",
                 "--metrics", "fid", "pr", "--features", EYE, "--out", "judged",
                 "--reference", "runs/cifar10-ddpm-tiny/data/train")
        other, eye = (*TINY, "--seed", "1", "--out", "other"), ("train", "cifar10-features", "--size", "tiny")
        for args in (TINY, other, eye, judge): assert main(list(args)) == 0
    return place


def test_export_by_command(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command = ["export", "runs/cifar10-ddpm-tiny", "published", "--evaluations", "judged/evaluation.json",
               "--licence", "apache-2.0"]
    assert main(command) == 0
    card = (place/"published/README.md").read_text()
    for words in ('license: "apache-2.0"', "CC BY 4.0", "Frechet distance (features: cifar10-features-tiny",
                  '"method": "ddim"', '"steps": 3', "recall"):
        assert words in card
    assert "fid" not in card.lower(), "nothing here was measured through Inception"
    model, theirs = load_model("runs/cifar10-ddpm-tiny"), load_unet("published")
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x, 0.3).eps, theirs(x, 0.3).eps, rtol=1e-4, atol=1e-5)
    assert main(command) == 2 and "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("args, words", [
    (("other", "p", "--evaluations", "judged/evaluation.json"), "measured other weights"),
    (("other", "p", "--evaluations", "judged/samples.json"), "is no evaluation"),
    (("nowhere", "p"), "There is no 'nowhere'"),
])
def test_what_cannot_be_published(place, args, words, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert main(["export", *args]) == 2 and words in capsys.readouterr().err
    assert not (place/"p").exists()


def test_diffusers_samples_from_it(place, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(place)
    assert main(["export", "other", "for-them"]) == 0
    pipeline = diffusers.DDIMPipeline.from_pretrained("for-them")
    images = pipeline(batch_size=2, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 16, 16, 3)
    assert json.loads((place/"for-them/unet/config.json").read_text())["norm_num_groups"] == 8
