"Packing images: from every kind of source, whole or not at all, the same bytes every time."
import contextlib, hashlib, io, json, os, random, signal, subprocess
import sys, tarfile, time, types, warnings
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from course import ROOT
from PIL import Image

from fastdiff_edu import packed
from fastdiff_edu.core import BadInput, RunFailed, seeded
from fastdiff_edu.data import digits
from fastdiff_edu.packed import IMAGES, LABELS, MANIFEST, on_device, open_packed, prepare, read_manifest
from fastdiff_edu.sources import BATCHES, BINARY, SETS, PrepareConfig, read_image, split_of

COUNTS = dict(train=100, test=20)   # of the small CIFAR-10 that the tests make


def encoded(levels, kind="PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(levels).save(file, kind, **options)
    return file.getvalue()


def levels(n:int, height:int=32, width:int=32, seed:int=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def config(name, source, out, **more): return PrepareConfig(name, str(source), Path(out), bar=False, **more)


@pytest.fixture
def small(monkeypatch):
    "CIFAR-10 has few images for the length of a test."
    monkeypatch.setitem(SETS, "cifar10", SETS["cifar10"]._replace(counts=COUNTS))


@pytest.fixture
def folder(tmp_path):
    "Five images of every kind and several sizes, and what is to be left out."
    x, mine = levels(5, 40, 50), tmp_path/"mine"
    (mine/"sub").mkdir(parents=True)
    for name, kind, k in [("b.png", "PNG", 0), ("sub/a.jpg", "JPEG", 1), ("c.JPEG", "JPEG", 2),
                          ("d.webp", "WEBP", 3), ("e.bmp", "BMP", 4)]:
        (mine/name).write_bytes(encoded(x[k], kind))
    (mine/"notes.txt").write_text("not an image")
    (mine/"._b.png").write_bytes(b"what a Mac leaves behind")
    return mine


def tables():
    return pytest.importorskip("pyarrow", reason="pyarrow reads parquet; it is not installed"), \
        pytest.importorskip("pyarrow.parquet")


def write_parquet(path:Path, images:list[bytes], labels=None, column="img") -> Path:
    pa, pq = tables()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {column: pa.array([dict(bytes=b, path=f"{k}.png") for k, b in enumerate(images)], kind)}
    if labels is not None: columns["label"] = pa.array(labels, pa.int64())
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=32)
    return path


def write_cifar(folder:Path) -> dict[str, np.ndarray]:
    "A small CIFAR-10 in parquet."
    x = {s: levels(n, seed=n) for s, n in COUNTS.items()}
    for s, v in x.items():
        labels = [k % 10 for k in range(len(v))]
        write_parquet(folder/f"{s}-00000-of-00001.parquet", list(map(encoded, v)), labels)
    return x


def write_tar(path:Path, x:dict[str, np.ndarray], cut:int=0, mode:str="w:gz") -> Path:
    "The same in the official archive's form, members out of order, and a link that is none of them."
    with tarfile.open(path, mode) as tar:
        link = tarfile.TarInfo("elsewhere/test_batch.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "../../secret"
        tar.addfile(link)
        for split in reversed(x):
            parts = np.array_split(np.arange(len(x[split])), len(BATCHES[split]))
            for name, index in reversed(list(zip(BATCHES[split], parts))):
                data = b"".join(bytes([k % 10]) + x[split][k].transpose(2, 0, 1).tobytes() for k in index)
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(data) - cut
                tar.addfile(member, io.BytesIO(data))
    return path


def content(path:Path) -> dict[str, str]:
    "Every file below a folder, by its sha256."
    files = (p for p in sorted(path.rglob("*")) if p.is_file())
    return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- every kind of source

def test_parquet_and_archive_give_the_same_levels(small, tmp_path):
    x = write_cifar(tmp_path/"hub"/"plain_text")
    archive = write_tar(tmp_path/"cifar-10-binary.tar.gz", x)
    for out, source in dict(a=tmp_path/"hub", b=archive).items():
        done = prepare(config("cifar10", source, tmp_path/out))
        assert [p.name for p in done] == ["train", "test"]
        for split, wanted in x.items():
            images = open_packed(tmp_path/out/split, verify=True)
            assert images.x.equal(torch.from_numpy(wanted).permute(0, 3, 1, 2))
            assert images.y.tolist() == [k % 10 for k in range(len(wanted))]
    a, b = (read_manifest(tmp_path/k/"train") for k in "ab")
    assert a["files"] == b["files"] and a["source"] != b["source"]
    assert (a["kinds"], b["kinds"], a["jpeg"]) == ({"PNG": 100}, {"raw": 100}, False)
    assert a["classes"][3] == "cat" and "Krizhevsky" in a["licence"] and a["filter"].startswith("none")


def test_archive_in_a_folder_and_official_members(small, tmp_path):
    x = {s: levels(n, seed=n) for s, n in COUNTS.items()}
    write_tar(tmp_path/"cifar-10-binary.tar.gz", x)
    assert len(prepare(config("cifar10", tmp_path, tmp_path/"out"))) == 2
    assert {p.name for p in tmp_path.iterdir()} == {BINARY, "out"}, "nothing is unpacked"


def test_one_file_and_no_labels(tmp_path):
    faces = list(map(encoded, levels(3, 300, 260)))
    file = write_parquet(tmp_path/"validation-00.parquet", faces, column="image")
    done, = prepare(config("celebahq256", file, tmp_path/"out"))
    images, known = open_packed(done, verify=True), read_manifest(done)
    assert done.name == "test" and images.x.shape == (3, 3, 256, 256) and images.y.tolist() == [-1]*3
    assert "LANCZOS" in known["filter"] and "non-commercial" in known["licence"]


@pytest.mark.parametrize("path, split", {
    "default/validation/0000.parquet": "test", "test-00000-of-00001.parquet": "test", "val/a.parquet": "test",
    "default/train/0000.parquet": "train", "data.parquet": "train", "latest.parquet": "train"}.items())
def test_a_part_of_the_path_names_the_split(path, split):
    assert split_of(path) == split


def test_a_folder_of_splits_is_no_folder_of_images(tmp_path):
    for split in ("train", "test"):
        (tmp_path/"mine"/split).mkdir(parents=True)
        (tmp_path/"mine"/split/"a.png").write_bytes(encoded(levels(1)[0]))
    wanted = config("folder", tmp_path/"mine", tmp_path/"out", size=16)
    with pytest.raises(BadInput, match="train"): prepare(wanted)
    assert not list((tmp_path/"out").rglob("*.u8"))


def test_folder(folder, tmp_path):
    done, = prepare(config("folder", folder, tmp_path/"out", size=16))
    images, known = open_packed(done, verify=True), read_manifest(done)
    assert known["kinds"] == {"BMP": 1, "JPEG": 2, "PNG": 1, "WEBP": 1} and known["jpeg"] is True
    for k, name in enumerate(["b.png", "c.JPEG", "d.webp", "e.bmp", "sub/a.jpg"]):
        with Image.open(folder/name) as im:
            im = im.convert("RGB").crop((5, 0, 45, 40)).resize((16, 16), Image.Resampling.LANCZOS)
        assert images.x[k].equal(torch.from_numpy(np.array(im)).permute(2, 0, 1)), name
    larger, = prepare(config("folder", folder, tmp_path/"larger", size=45))
    assert sum(n for k, n in read_manifest(larger)["kinds"].items() if "enlarged" in k) == 5


def test_celebahq_from_a_folder_of_images(tmp_path):
    (tmp_path/"faces").mkdir()
    for k, v in enumerate(levels(3, 280, 280)): (tmp_path/"faces"/f"{k}.jpg").write_bytes(encoded(v, "JPEG"))
    done, = prepare(config("celebahq256", tmp_path/"faces", tmp_path/"out"))
    assert open_packed(done).x.shape == (3, 3, 256, 256) and read_manifest(done)["kinds"] == {"JPEG": 3}


@pytest.mark.parametrize("size", [0, 8, 13])
def test_digits_need_no_source(size, tmp_path):
    done = prepare(PrepareConfig("digits", out=tmp_path/"out", size=size, bar=False))
    for folder, split, count in zip(done, ["train", "test"], [1297, 500], strict=True):
        images, gray = open_packed(folder, verify=True), digits(split)
        assert folder.name == split and images.y.equal(gray.y) and len(images) == count
        assert images.x.shape[1:] == (3, *[size or 32]*2)
        assert images.x.equal(images.x[:, :1].expand_as(images.x)), "gray"
        for k in (0, count - 1):
            im = Image.fromarray(gray.x[k, 0].numpy()).resize([size or 32]*2, Image.Resampling.LANCZOS)
            assert images.x[k, 0].equal(torch.from_numpy(np.array(im)))
        if size == 8: assert images.x[:, :1].equal(gray.x)
    known = read_manifest(done[0])
    assert known["pillow"] == PIL.__version__ and known["classes"] == list("0123456789")
    assert known["licence"].startswith("CC BY 4.0")
    assert known["kinds"] == {"raw": 1297} and known["source"]["digits"]["sha256"] == digits("train").sha256


@pytest.mark.parametrize("more, words", [
    (dict(size=7), "want at least 8"), (dict(size=-8), "want at least 8"),
    (dict(source="mine"), "scikit-learn has the digits, leave it out")])
def test_digits_that_cannot_be_had(more, words, tmp_path):
    with pytest.raises(BadInput, match=words): prepare(PrepareConfig("digits", out=tmp_path/"out", **more))
    assert not (tmp_path/"out").exists()


class Table(list):
    "What the tests use of datasets.Dataset."
    column_names = ["img", "label"]
    def cast_column(self, name, how):
        assert name == "img" and how == "not decoded"
        return self


def fake_hub(asked:list, answer):
    def load_dataset(name, revision=None):
        asked.append((name, revision))
        if isinstance(answer, Exception): raise answer
        return answer
    return types.SimpleNamespace(load_dataset=load_dataset, Image=lambda decode: "not decoded")


def test_hub(small, tmp_path, monkeypatch):
    asked, x = [], {s: levels(n, seed=n) for s, n in COUNTS.items()}
    answer = {s: Table(dict(img=dict(bytes=encoded(im), path=None), label=k % 10) for k, im in enumerate(v))
              for s, v in x.items()}
    monkeypatch.setitem(sys.modules, "datasets", fake_hub(asked, answer))
    prepare(config("cifar10", "", tmp_path/"out"))
    assert asked[0][0] == "uoft-cs/cifar10" and len(asked[0][1]) == 40, "pinned to a revision"
    assert open_packed(tmp_path/"out"/"test").x[7].equal(torch.from_numpy(x["test"][7]).permute(2, 0, 1))
    offline = fake_hub([], ConnectionError("Couldn't reach\nthe hub"))
    monkeypatch.setitem(sys.modules, "datasets", offline)
    with pytest.raises(BadInput, match="'someone/faces' cannot be read .Couldn't reach the hub"):
        prepare(config("celebahq256", "someone/faces", tmp_path/"no"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BadInput, match="pip install datasets"): prepare(config("cifar10", "", tmp_path/"no"))
    assert not (tmp_path/"no").exists()


class Short(Table):
    "A table that ends before its time."
    column_names = ["img"]
    def __len__(self): return 3


@pytest.mark.parametrize("rows, words", [(2, "has 2 images, not 3"), (4, "has 4 images, not 3")])
def test_a_count_that_is_not_kept(rows, words, tmp_path, monkeypatch):
    image = dict(bytes=encoded(levels(1)[0]), path=None)
    monkeypatch.setitem(sys.modules, "datasets", fake_hub([], dict(train=Short([dict(img=image)] * rows))))
    with pytest.raises(BadInput, match=words): prepare(config("celebahq256", "some/faces", tmp_path/"out"))
    assert not list((tmp_path/"out").iterdir())


def test_nothing_in_a_split(tmp_path):
    file = write_parquet(tmp_path/"train.parquet", [])
    with pytest.raises(BadInput, match="has 0 images in 'train'"):
        prepare(config("celebahq256", file, tmp_path/"out"))


def test_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path/"train.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match="pip install pyarrow"):
        prepare(config("cifar10", tmp_path, tmp_path/"out"))


def real() -> Path:
    "The JPEG copy of CIFAR-10."
    place = Path(os.environ.get("FASTDIFF_CIFAR10", ROOT.parent/"shared"/"data"/"cifar10"))
    if not (place/"test.parquet").is_file():
        pytest.skip("no CIFAR-10 at hand: FASTDIFF_CIFAR10 says where its parquet files are")
    return place


def test_the_jpeg_copy_of_cifar10(tmp_path):
    tables()
    done, = prepare(config("cifar10", real()/"test.parquet", tmp_path))
    images, known = open_packed(done, verify=True), read_manifest(done)
    assert images.x.shape == (10_000, 3, 32, 32) and known["jpeg"] and known["kinds"] == {"JPEG": 10_000}
    assert images.y.bincount().tolist() == [1000]*10
    assert 0.4 < images.x.float().mean() / 255 < 0.55   # photographs: neither black nor noise
    x, y = images.batch(torch.tensor([0, 9999]))
    assert x.abs().max() <= 1 and y.equal(images.y[[0, 9999]])


# --- one image

@pytest.mark.parametrize("mode, colour, wanted", [
    ("L", 100, [100]*3), ("1", 1, [255]*3), ("CMYK", (0, 0, 0, 0), [255]*3), ("RGBA", (9, 9, 9, 0), [255]*3),
    ("RGBA", (9, 8, 7, 255), [9, 8, 7]), ("P", 0, [0]*3), ("LA", (7, 255), [7]*3)])
def test_every_mode_becomes_rgb(mode, colour, wanted):
    file = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(file, "JPEG" if mode == "CMYK" else "PNG", quality=100)
    x, _ = read_image(file.getvalue(), 8)
    assert x.shape == (3, 8, 8) and x.dtype == np.uint8 and x[:, 4, 4].tolist() == wanted


def test_a_camera_held_sideways():
    v = np.zeros((32, 32, 3), np.uint8)
    v[:16] = 255   # the upper half is white
    exif = Image.Exif()
    exif[0x0112] = 6   # to be turned by a quarter, clockwise
    x, _ = read_image(encoded(v, "JPEG", exif=exif, quality=100), 32)
    assert x[:, :, 20:].min() > 250 and x[:, :, :12].max() < 5


def test_two_pictures_in_one_jpeg_file():
    "Some cameras add a second one; the first counts."
    x, file = levels(2), io.BytesIO()
    first, second = map(Image.fromarray, x)
    first.save(file, "MPO", save_all=True, append_images=[second], quality=100)
    one, kind = read_image(file.getvalue(), 32)
    alone, _ = read_image(encoded(x[0], "JPEG", quality=100), 32)
    assert kind == "JPEG" and np.array_equal(one, alone)


@pytest.mark.parametrize("height, width", [(37, 90), (90, 37), (64, 64), (5, 300)])
def test_the_middle_is_kept(height, width):
    v = levels(1, height, width)[0]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    x, _ = read_image(encoded(v), side)
    assert np.array_equal(x, v[top:top + side, left:left + side].transpose(2, 0, 1))


# --- whole or not there

def test_same_bytes_same_sha256(folder, tmp_path):
    for out in "ab": prepare(config("folder", folder, tmp_path/out, size=16))
    assert content(tmp_path/"a") == content(tmp_path/"b") and len(content(tmp_path/"a")) == 3
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"a").rglob("*")}
    prepare(config("folder", folder, tmp_path/"a", size=16))
    same = {p: p.stat().st_mtime_ns for p in before if p.name != "a"}
    assert all(before[p] == t for p, t in same.items()), "what is there is left as it is"


def test_another_set_is_not_overwritten(folder, tmp_path):
    prepare(config("folder", folder, tmp_path/"a", size=16))
    before = content(tmp_path/"a")
    with pytest.raises(BadInput, match="its shape differs"):
        prepare(config("folder", folder, tmp_path/"a", size=8))
    (folder/"b.png").write_bytes(encoded(levels(1)[0]))
    with pytest.raises(BadInput, match="its source differs"):
        prepare(config("folder", folder, tmp_path/"a", size=16))
    assert content(tmp_path/"a") == before


def test_the_source_is_never_touched(folder, tmp_path):
    "Whoever names the folder of their images as --out keeps them."
    folder.rename(tmp_path/"train")
    before = content(tmp_path)
    with pytest.raises(BadInput, match="is there, and is no packed set: choose another --out"):
        prepare(config("folder", tmp_path/"train", tmp_path, size=16))
    assert content(tmp_path) == before


@contextlib.contextmanager
def stopped(monkeypatch, at:str, error=OSError(28, "No space left on device")):
    "Rows are made safe by twos, and the row of the file `at` is not reached."
    asked = packed.decode_row
    def decode_row(cfg, where, *row):
        if at in where: raise error
        return asked(cfg, where, *row)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "EVERY", 2)
        patch.setattr(packed, "decode_row", decode_row)
        with pytest.raises(type(error) if isinstance(error, KeyboardInterrupt) else RunFailed) as e: yield e


def rows_asked(monkeypatch, cfg) -> list[str]:
    "Prepare, and say which rows were decoded."
    seen, asked = [], packed.decode_row
    def decode_row(cfg, where, *row): seen.append(where); return asked(cfg, where, *row)
    with monkeypatch.context() as patch:
        patch.setattr(packed, "decode_row", decode_row)
        prepare(cfg)
    return sorted(Path(where.strip("'")).name for where in seen)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stop_keeps_the_rows_that_are_safe(error, folder, tmp_path, monkeypatch):
    wanted, cfg = tmp_path/"wanted", config("folder", folder, tmp_path/"out", size=16)
    prepare(config("folder", folder, wanted, size=16))
    with stopped(monkeypatch, "sub/a.jpg", error) as e: prepare(cfg)
    assert "No space left on device" in str(e.value) or error is e.value
    part = tmp_path/"out"/".train.part"
    assert json.loads((part/MANIFEST).read_text())["rows"] == 4 and not (tmp_path/"out"/"train").exists()
    for file in (IMAGES, LABELS):
        with open(part/file, "ab") as f: f.write(b"half")
    (part/f".{MANIFEST}.123.tmp").write_text("half a manifest")
    with pytest.raises(BadInput, match="no packed set in"): read_manifest(tmp_path/"out")
    assert rows_asked(monkeypatch, cfg) == ["a.jpg"]
    assert content(tmp_path/"out") == content(wanted)


@pytest.mark.parametrize("change", [
    lambda part, folder: (folder/"b.png").write_bytes(encoded(levels(1, seed=9)[0])),   # another plan
    lambda part, folder: (part/MANIFEST).unlink(), lambda part, folder: (part/MANIFEST).write_bytes(b"{"),
    lambda part, folder: (part/MANIFEST).write_text("{}"),
    lambda part, folder: (part/MANIFEST).write_text("[]"),
    lambda part, folder: edit(part, rows="4"), lambda part, folder: edit(part, pillow="1.0"),
    lambda part, folder: edit(part, rows=-1), lambda part, folder: edit(part, kinds=3),
    lambda part, folder: (part/LABELS).write_bytes(b""), lambda part, folder: (part/IMAGES).unlink()])
def test_a_part_that_cannot_be_used_begins_anew(change, folder, tmp_path, monkeypatch):
    cfg = config("folder", folder, tmp_path/"out", size=16)
    with stopped(monkeypatch, "sub/a.jpg"): prepare(cfg)
    change(tmp_path/"out"/".train.part", folder)
    prepare(config("folder", folder, tmp_path/"wanted", size=16))
    assert rows_asked(monkeypatch, cfg) == ["a.jpg", "b.png", "c.JPEG", "d.webp", "e.bmp"]
    assert content(tmp_path/"out") == content(tmp_path/"wanted")


def test_stopped_at_the_last_moment(folder, tmp_path, monkeypatch):
    "Whole, but not yet in its place: no row is decoded again."
    cfg = config("folder", folder, tmp_path/"out", size=16)
    wanted = content(prepare(cfg)[0])
    (tmp_path/"out"/"train").rename(tmp_path/"out"/".train.part")
    assert rows_asked(monkeypatch, cfg) == [] and content(tmp_path/"out"/"train") == wanted


def test_rows_are_on_the_disk_before_they_are_counted(folder, tmp_path, monkeypatch):
    said = []
    asked = os.fsync
    monkeypatch.setattr(packed, "EVERY", 2)
    monkeypatch.setattr(packed.os, "fsync", lambda f: said.append(os.fstat(f).st_size) or asked(f))
    monkeypatch.setattr(packed, "write_json", lambda path, v: said.append(v.get("rows")))
    with contextlib.suppress(OSError, RunFailed): prepare(config("folder", folder, tmp_path/"out", size=16))
    wanted = [x for rows in (2, 4, 5) for x in (rows*768, rows*8, rows)]
    assert [x for x in said if x != 0][:9] == wanted, "levels, labels, and then the number of rows"


KILLED = """
import sys
from pathlib import Path
from fastdiff_edu import packed
asked, packed.EVERY = packed.decode_row, 20
def decode_row(cfg, where, *row):
    print(where + "\\n", end="", flush=True)   # at once: several threads do
    return asked(cfg, where, *row)
packed.decode_row = decode_row
packed.prepare(packed.PrepareConfig("folder", "many", Path(sys.argv[1]), size=48, bar=False))
"""


def start(here:Path, out:str) -> subprocess.Popen:
    "A preparation at work: its first row is being decoded."
    process = subprocess.Popen([sys.executable, "-c", KILLED, out], cwd=here, text=True,
                               stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    process.first = process.stdout.readline()
    return process


def rows_safe(out:Path) -> int:
    "How many rows a killed preparation has left."
    try: return json.loads((out/".train.part"/MANIFEST).read_text())["rows"]
    except FileNotFoundError: return 0


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    "A folder with 300 images, and what an undisturbed preparation makes of them."
    here = tmp_path_factory.mktemp("here")
    (here/"many").mkdir()
    for k, v in enumerate(levels(300, 128, 128)): (here/"many"/f"{k:03d}.png").write_bytes(encoded(v))
    process = start(here, "whole")
    assert len(process.communicate()[0].splitlines()) == 299 and process.returncode == 0
    return here, content(here/"whole")


def test_kills_at_random_moments(many):
    here, wanted = many
    moments, safe = random.Random(0), [0]
    for _ in range(4):
        process = start(here, "killed")
        for _ in range(moments.randint(1, 100)): process.stdout.readline()   # a row each
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (here/"killed"/"train").exists(): break
        safe.append(rows_safe(here/"killed"))
    assert safe == sorted(safe) and max(safe) > 0, "a preparation goes on, none begins anew"
    process = start(here, "killed")
    asked = sorted((process.first + process.communicate()[0]).splitlines())
    if process.first: assert asked == [f"'many/{k:03d}.png'" for k in range(safe[-1], 300)]
    assert content(here/"killed") == wanted, "the same bytes, and nothing left of those that were killed"


def test_two_at_once(many):
    "The second says so and touches nothing; a kill of the first lets it go on at once."
    here, wanted = many
    first = start(here, "two")
    first.send_signal(signal.SIGSTOP)   # it stays in the middle
    with contextlib.chdir(here):
        cfg = config("folder", "many", "two", size=48)
        with pytest.raises(RunFailed, match="Another process prepares 'two': wait") as e: prepare(cfg)
        assert first.poll() is None and "\n" not in str(e.value)
        first.kill()
        first.communicate()
        assert Path("two/.lock").exists(), "what a kill leaves"
        prepare(cfg)
        assert content(Path("two")) == wanted


# --- bad input

def test_parquet_that_cannot_be_used(small, tmp_path):
    images, labels = list(map(encoded, levels(100))), [k % 10 for k in range(100)]
    good = write_parquet(tmp_path/"train.parquet", images, labels)
    whole = good.read_bytes()
    def refused(words):
        with pytest.raises(BadInput, match=words) as e: prepare(config("cifar10", good, tmp_path/"out"))
        assert "\n" not in str(e.value) and "train" in str(e.value)
        assert not (tmp_path/"out"/"train").exists() and not list(tmp_path.glob("out/.*"))
    for data in (b"", whole[:1000], whole[:-20], b"PAR1" + bytes(500)):
        good.write_bytes(data)
        refused("cannot be read")
    good.write_bytes(whole[:3000] + bytes(2000) + whole[5000:])
    refused("cannot be read|cannot be decoded|no image|lacks an image")
    for images_, labels_, words in [
            (images[:99], labels[:99], "has 99 images in 'train': want 100"),
            ([], [], "has 0 images"),
            (images, [0]*100, "images per label"), (images, [11] + labels[1:], "images per label"),
            (images, [None] + labels[1:], "row 1 lacks an image or a label"),
            (images[:-1] + [b""], labels, "row 100 lacks an image"),
            ([b"hello"] + images[1:], labels, "row 1 is no image"),
            (images[:50] + [images[50][:90]] + images[51:], labels, "row 51 cannot be decoded"),
            ([encoded(levels(1, 33, 32)[0])] + images[1:], labels, "row 1 is 32 x 33, not 32 x 32")]:
        write_parquet(good, images_, labels_)
        refused(f"^(?!.*cannot be read).*{words}")   # the sentence itself, not wrapped into another
    write_parquet(good, images, labels, column="picture")
    refused("row 1 lacks an image")


def test_archives_that_cannot_be_used(small, tmp_path):
    x = {s: levels(n, seed=n) for s, n in COUNTS.items()}
    file = write_tar(tmp_path/"cifar-10-binary.tar.gz", x)
    whole = file.read_bytes()
    def refused(words):
        with pytest.raises(BadInput, match=words) as e: prepare(config("cifar10", file, tmp_path/"out"))
        assert "\n" not in str(e.value) and file.name in str(e.value)
        assert not (tmp_path/"out"/"train").exists() and not list(tmp_path.glob("out/.*"))
    for data in (b"", b"hello", whole[:1000], whole[:len(whole) // 2]):
        file.write_bytes(data)
        refused("cannot be read|has no 'data_batch")
    write_tar(file, x, cut=1)
    refused("has 61459 bytes in 'data_batch_5.bin': want 61460")
    write_tar(file, dict(test=x["test"]))
    refused("has no 'data_batch_1.bin'")
    write_tar(file, x, mode="w")
    refused("cannot be read")


@pytest.mark.parametrize("data, words", [
    (b"", "is no image"), (b"hello", "is no image"), (encoded(levels(1)[0])[:300], "cannot be decoded"),
    (encoded(levels(1)[0], "JPEG")[:300], "cannot be decoded"),
    (encoded(levels(1)[0][:, :, 0].astype(np.uint16)), "more than eight bits"),
    (encoded(levels(1)[0], "GIF"), "is no image"), (encoded(levels(1)[0], "TIFF"), "is no image")])
def test_an_image_that_cannot_be_used_is_named(data, words, folder, tmp_path):
    (folder/"sub"/"odd.png").write_bytes(data)
    with pytest.raises(BadInput, match=words) as e: prepare(config("folder", folder, tmp_path/"out", size=16))
    assert "sub/odd.png'" in str(e.value) and "\n" not in str(e.value) and " at 0x" not in str(e.value)
    assert not list((tmp_path/"out").iterdir())


@pytest.mark.parametrize("name, source, words", [
    ("cifar10", "nowhere.parquet", "There is no 'nowhere.parquet'"),
    ("cifar10", "a/b/c", "There is no 'a/b/c'"), ("cifar10", "a/b.parquet", "There is no 'a/b.parquet'"),
    ("folder", "someone/images", "There is no"), ("celebahq256", "../faces", "There is no '../faces'"),
    ("celebahq256", "odd.tar.gz", "does not hold"), ("folder", "empty", "There is no image in 'empty'"),
    ("cifar10", "empty", "does not hold 'cifar10': want parquet or cifar-10-binary.tar.gz")])
def test_sources_that_are_not_there(name, source, words, tmp_path):
    with contextlib.chdir(tmp_path):
        Path("odd.tar.gz").write_bytes(b"hello")
        Path("empty").mkdir()
        cfg = config(name, source, "out", size=8 * (name == "folder"))
        with pytest.raises(BadInput, match=words): prepare(cfg)
        assert not Path("out").exists()


@pytest.fixture
def done(folder, tmp_path):
    return prepare(config("folder", folder, tmp_path/"out", size=16))[0]


def edit(folder:Path, **changes):
    (folder/MANIFEST).write_text(json.dumps(json.loads((folder/MANIFEST).read_text()) | changes))


@pytest.mark.parametrize("damage, words", [
    (lambda f: (f/MANIFEST).unlink(), "no packed set"),
    (lambda f: (f/IMAGES).unlink(), "There is no .*images.u8"),
    (lambda f: (f/LABELS).unlink(), "There is no .*labels.i64"),
    (lambda f: (f/IMAGES).write_bytes((f/IMAGES).read_bytes()[:-1]), "has 3839 bytes, not 3840"),
    (lambda f: (f/IMAGES).write_bytes(b""), "has 0 bytes, not 3840"),
    (lambda f: (f/LABELS).write_bytes((f/LABELS).read_bytes() + bytes(8)), "has 48 bytes, not 40"),
    (lambda f: (f/MANIFEST).write_bytes((f/MANIFEST).read_bytes()[:-30]), "cut off"),
    (lambda f: (f/MANIFEST).write_text("[1, 2]"), "no manifest"),
    (lambda f: (f/MANIFEST).write_text("{}"), "format"), (lambda f: edit(f, format=2), "format"),
    (lambda f: edit(f, shape=[6, 3, 16, 16]), "has 3840 bytes, not 4608"),
    (lambda f: edit(f, shape=None), "was edited"), (lambda f: edit(f, files={}), "was edited"),
    (lambda f: edit(f, shape=[5, 3, 256]), "Got images")])
def test_damaged_sets_are_refused(damage, words, done):
    damage(done)
    with pytest.raises(BadInput, match=words) as e: open_packed(done)
    assert "\n" not in str(e.value)


def test_a_changed_level_is_seen_on_request(done):
    data = bytearray((done/IMAGES).read_bytes())
    data[1234] ^= 1
    (done/IMAGES).write_bytes(data)
    assert len(open_packed(done)) == 5
    with pytest.raises(BadInput, match="its sha256 differs"): open_packed(done, verify=True)


# --- opening

def test_the_mapping_is_private_and_silent(done):
    before = content(done)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = open_packed(done, flip=True)
        images.batch(torch.arange(5), seeded(0))
        images.x[0] = 0
    assert images.flip and images.x[0].max() == 0 and content(done) == before


def test_on_the_device_when_it_fits(done, monkeypatch):
    images = open_packed(done)
    assert on_device(images, "cpu").x.device.type == "cpu"
    moved = []
    monkeypatch.setattr(packed.Images, "to", lambda self, device: moved.append(device) or self)
    for free, share, fits in [(7759, 0.5, False), (7760, 0.5, True), (3880, 1.0, True), (3879, 1.0, False)]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        moved.clear()
        on_device(images, "cuda", share)
        assert bool(moved) == fits
