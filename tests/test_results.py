"What results/ holds is whole, and says where it comes from."
import hashlib, json, os
from pathlib import Path

import pytest, torch
from course import ROOT

from fastdiff_edu.features import load_features

RESULTS = ROOT/"results"
JPEG_COPY = Path(os.environ.get("FASTDIFF_CIFAR10", ROOT.parent/"shared"/"data"/"cifar10"))


def test_every_file_says_where_it_comes_from():
    for file in RESULTS.glob("*.json"):
        told = json.loads(file.read_text())
        said = told.get("provenance", {})
        assert {"recipe", "commit", "machine", "minutes", "date"} <= set(said), file.name


def test_the_stored_extractor_is_the_one_that_was_measured():
    told = json.loads((RESULTS/"cifar10-features.json").read_text())
    data = (RESULTS/told["file"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == told["sha256"]
    eye = load_features(RESULTS/told["file"], told["sha256"])
    features, probs = eye(torch.zeros(3, 3, 32, 32, dtype=torch.uint8), probs=True)
    assert features.shape == (3, 192) and probs.shape == (3, 10)


def test_its_accuracy_is_what_is_stored(tmp_path):
    if not JPEG_COPY.exists(): pytest.skip("CIFAR-10's JPEG copy is not here")
    pytest.importorskip("pyarrow")
    from fastdiff_edu.packed import PrepareConfig, open_packed, prepare
    (tmp_path/"in").mkdir()
    (tmp_path/"in"/"test.parquet").symlink_to(JPEG_COPY/"test.parquet")
    prepare(PrepareConfig("cifar10", str(tmp_path/"in"), tmp_path/"out", bar=False))
    images = open_packed(tmp_path/"out"/"test")
    told = json.loads((RESULTS/"cifar10-features.json").read_text())
    eye = load_features(RESULTS/told["file"])
    hits = sum((eye(x, probs=True)[1].argmax(1).cpu() == y).sum().item()
               for x, y in zip(images.x.split(500), images.y.split(500)))
    assert hits / len(images) == pytest.approx(told["test_accuracy"], abs=1e-3)


def test_the_25_gaussians_are_all_there():
    "Three seeds of the short recipe, and one run of the paper's size."
    short, long = (json.loads((RESULTS/f"ddgan25{k}.json").read_text()) for k in ("", "-paper"))
    assert [run["protocol"]["seed"] for run in short["runs"]] == [0, 1, 2]
    assert long["run"]["protocol"]["step"] == 50_000
    for run in (*short["runs"], long["run"]): assert run["modes"] == run["of"] == 25 and run["share"] >= 0.7
    assert all(run["seconds"] < 600 for run in short["runs"])
