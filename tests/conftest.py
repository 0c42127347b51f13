"One thread for each test process: `pytest -n 2` then fills two cores, and numbers are those of any machine."
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; child processes inherit it
os.environ.setdefault("MPLBACKEND", "agg")
