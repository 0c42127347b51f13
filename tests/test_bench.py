"`fastdiff bench` measures what it says: a loop that wastes time is seen, and resuming changes no weight."
import json
import time

import torch

from fastdiff_edu.bench import BARS, BenchConfig, Clock, bench


def test_clock_sees_waste():
    clock = Clock(torch.device("cpu"))
    work = clock(lambda: time.sleep(0.05))
    assert clock.ratio(lambda: [work() for _ in range(3)]) < 1.1
    assert 1.8 < clock.ratio(lambda: [(work(), time.sleep(0.05)) for _ in range(3)]) < 2.2


def test_bench_writes_its_figures(tmp_path):
    said = bench(BenchConfig(width=16, batch=2, threads=1, steps=3, repeats=1, out=tmp_path))
    found = json.loads((tmp_path/"bench.json").read_text())
    assert found["resume"] == 0 and all(f"bar {bar:g}" in said for bar in BARS.values())
    assert 1 <= found["sampling"] < 3 and 1 <= found["training"] < 5
