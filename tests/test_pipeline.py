"The commands that chapters 17 and 18 print: the tiny pipeline runs as it stands, and no other line is stale."
import hashlib, json, math, re, shlex, subprocess, sys
from pathlib import Path

import numpy as np, pytest
from course import NBS, markdown

from fastdiff_edu import cli
from fastdiff_edu.guided import guided_cifar10
from fastdiff_edu.nets.unet import UNetConfig

CIFAR10, CELEBAHQ = NBS/"17_cifar10.ipynb", NBS/"18_celebahq.ipynb"
PIPELINE = "## The pipeline on any machine"


def commands(text:str) -> list[list[str]]:
    "The lines of the bash blocks in a text, split into words, without their comments."
    lines = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def pipeline() -> list[list[str]]:
    text, = (t for t in markdown(CIFAR10) if t.startswith(PIPELINE))
    return commands(text)


def run_all(lines:list[list[str]], folder:Path):
    "Run the lines as they stand, one after the other; the command is the module's."
    for first, *args in lines:
        assert first == "fastdiff"
        command = [sys.executable, "-m", "fastdiff_edu", *args]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and done.stderr == "", f"{args}: {done.stderr}"


def sha256(path:Path) -> str: return hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_pipeline_runs_as_printed(tmp_path):
    lines, runs = pipeline(), tmp_path/"runs"
    assert [words[1] for words in lines] == ["data", "train", "train", "sample", "evaluate"]
    run_all(lines, tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"data", "runs"}, "it writes where it says, and only there"

    packed = json.loads((tmp_path/"data/digits/train/manifest.json").read_text())
    assert packed["shape"] == [1297, 3, 16, 16] and (tmp_path/"data/digits/test/images.u8").is_file()

    run = runs/"cifar10-ddpm-tiny"
    log = [json.loads(line) for line in (run/"log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 24 and all(math.isfinite(line["loss"]) for line in log)
    assert len(list((run/"sheets").glob("*.png"))) == 2 and (run/"loss.png").is_file()
    trained = sha256(run/"step_00000024/ema.safetensors")

    x, made = np.load(runs/"samples/samples.npy"), json.loads((runs/"samples/samples.json").read_text())
    assert x.shape == (36, 3, 16, 16) and x.dtype == np.uint8 and x.std() > 0
    assert (runs/"samples/sheet.png").is_file() and made["weights"]["sha256"] == trained

    eye = sha256(runs/"cifar10-features-tiny/cifar10-features-tiny.pt")
    numbers = json.loads((runs/"evaluation/evaluation.json").read_text())["numbers"]
    assert set(numbers) == {"fid", "kid", "precision", "recall"}
    for e in numbers.values():
        assert math.isfinite(e["value"]) and math.isfinite(e["real"]) and "FID" not in e["name"]
        made, measured = e["protocol"]["made"], e["protocol"]["measured"]
        assert made["weights"]["sha256"] == trained and measured["samples"] == 100
        assert measured["extractor"]["sha256"] == eye
        assert measured["reference"]["sha256"] == packed["files"]["images.u8"]["sha256"]
    assert numbers["fid"]["value"] > numbers["fid"]["real"], "samples of 24 updates are worse than digits"


@pytest.mark.parametrize("path", [CIFAR10, CELEBAHQ], ids=lambda p: p.stem)
def test_every_printed_command_is_understood(path, monkeypatch, capsys):
    "Nothing is run: the command line has to accept each line."
    lines = commands("\n".join(markdown(path)))
    assert len(lines) > 5
    seen = []
    listen = {name: (config, seen.append) for name, (config, _) in cli.COMMANDS.items()}
    monkeypatch.setattr(cli, "COMMANDS", listen)
    def chain_for(ckpt, guided=False, up=False):   # no checkpoint is there
        net = guided_cifar10() if guided else UNetConfig.pd_cifar10()
        return cli.Distill(teacher=ckpt, guided=guided, up=up, net=net)
    monkeypatch.setattr(cli, "chain_for", chain_for)
    for words in lines:
        assert words[0] == "fastdiff" or words[:1] + words[3:5] == ["torchrun", "-m", "fastdiff_edu"], words
        args = words[1:] if words[0] == "fastdiff" else words[5:]
        assert cli.main(args) == 0, f"{args}: {capsys.readouterr().err}"
    assert len(seen) == len(lines)
