"The command line as a person meets it: help, exit codes, one sentence for what is wrong."
import subprocess
import sys

import pytest

from fastdiff_edu.cli import COMMANDS, main


def run(*args, cwd=None):
    command = [sys.executable, "-m", "fastdiff_edu", *args]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("args, words", [
    (("race", "--quikc"), "Unknown flag '--quikc': did you mean '--quick'?"),
    (("rcae",), "Unknown command 'rcae': did you mean 'race'?"),
    (("race", "--seed", "one"), "--seed"),
    (("race", "--methods", "ddmp-100"), "Unknown method 'ddmp-100': did you mean 'ddpm-100'?"),
    (("race", "--out", "file/below"), "Cannot write to 'file/below'"),
    (("bench", "--batch"), "--batch"),
])
def test_bad_arguments_are_one_sentence(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"file").write_text("")
    assert main(list(args)) == 2
    said = capsys.readouterr().err
    assert words in said and said.startswith("fastdiff: ") and said.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_failed_run_is_1_and_debug_shows_where(monkeypatch, capsys):
    def broken(cfg): raise ZeroDivisionError("division by zero")
    monkeypatch.setitem(COMMANDS, "race", (COMMANDS["race"][0], broken))
    assert main(["race"]) == 1 and "Traceback" not in capsys.readouterr().err
    assert main(["race", "--debug"]) == 1 and "Traceback" in capsys.readouterr().err


def test_help_teaches(tmp_path):
    top = run("--help", cwd=tmp_path)
    assert top.returncode == 0 and all(name in top.stdout for name in COMMANDS)
    for name in COMMANDS:
        said = run(name, "--help", cwd=tmp_path)
        assert said.returncode == 0 and "--" in said.stdout and said.stderr == ""
    assert run(cwd=tmp_path).returncode == 0


def test_exit_codes_of_the_process(tmp_path):
    wrong = run("race", "--quikc", cwd=tmp_path)
    assert wrong.returncode == 2 and wrong.stdout == "" and wrong.stderr.count("\n") == 1
