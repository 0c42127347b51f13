"One thread for each test process: `pytest -n 2` then fills two cores, and numbers are those of any machine."
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; child processes inherit it
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    "A folder of its own, and one thread, as the processes have it that a test starts."
    import torch   # not before the number of threads is set
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
