"The training engine: what a kill, a bad disk, a bad number or another setting may not do to a run."
import errno, json, math, os, random, shutil, signal, subprocess, sys, threading, time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff_edu.core import BadInput, RunFailed, fold_seed, seeded
from fastdiff_edu.train import (TrainConfig, batches, data_order, ema_decay, fit, learning_rate,
                                load_checkpoint, randomness, read_log, save_checkpoint, train)


class Net(nn.Module):
    "Small, with what makes resuming hard: dropout, and buffers that change."
    def __init__(self, width=8):
        super().__init__()
        self.config = {"width": width}
        self.inner = nn.Sequential(nn.Linear(3, width, bias=False), nn.BatchNorm1d(width), nn.SiLU(),
                                   nn.Dropout(0.3))
        self.outer = nn.Linear(width, 2)

    def forward(self, x, t, y=None): return self.outer(self.inner(torch.cat([x, t[:, None]], 1)))


def new_net(width=8, seed=0):
    torch.manual_seed(seed)
    return Net(width)


def loss_fn(net, x0, generator):
    t = torch.rand(len(x0), generator=generator)
    eps = torch.randn(x0.shape, generator=generator)
    return (net(x0 + t[:, None]*eps, t) - eps).square().mean()


DATA = torch.randn(37, 2, generator=seeded(0, "test data"))
CFG = TrainConfig(steps=14, batch=8, lr=1e-2, warmup=5, ema=0.9, clip=0.5, log_every=3, save_every=4,
                  bar=False)


def log(out): return [(line["step"], line["loss"], line["lr"], line["grad_norm"]) for line in read_log(out)]
def saved(out): return sorted(p.name for p in out.iterdir() if p.name != "log.jsonl")


def everything(out) -> dict:
    "All that a run leaves behind, timings aside."
    newest, found = load_checkpoint(out), {"log": log(out)}
    for which in ("net", "ema", "optimizer"):
        found |= {f"{which}/{k}": v for k, v in newest.tensors(which).items()}
    return found | {k: newest.manifest[k] for k in ("step", "last", "seen", "data", "net")}


def assert_same(a:dict, b:dict):
    assert a.keys() == b.keys()
    for k, v in a.items(): assert v.equal(b[k]) if isinstance(v, torch.Tensor) else v == b[k], k


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed")
    losses = {r.step: r.loss.item() for r in train(loss_fn, new_net(), DATA, CFG, out)}
    return everything(out), losses


# --- stop and go on

@pytest.mark.parametrize("stops", [(1,), (4,), (14,), (5, 9), (3, 3, 11), tuple(range(1, 14))], ids=str)
def test_stopping_anywhere_changes_nothing(stops, tmp_path, undisturbed):
    net, losses = new_net(), {}
    for i, stop in enumerate((*stops, None)):
        for r in train(loss_fn, net, DATA, CFG, tmp_path):
            losses[r.step] = r.loss.item()
            torch.rand(3), r.net.eval()   # what a caller may do between two steps
            if r.step == stop: break
        net = new_net(seed=i + 1)         # forgotten: all comes from the folder
    assert_same(everything(tmp_path), undisturbed[0])
    assert losses == undisturbed[1]


def test_the_networks_of_the_last_record_are_the_saved_ones(tmp_path):
    net = new_net()
    ema = fit(loss_fn, net, DATA, CFG, tmp_path)
    assert not ema.training and not any(p.requires_grad for p in ema.parameters())
    for which, kept in (("net", net), ("ema", ema)):
        other = load_checkpoint(tmp_path).load_into(new_net(seed=5), which)
        assert all(a.equal(b) for a, b in zip(other.state_dict().values(), kept.state_dict().values()))


def test_a_finished_run_is_not_trained_again(tmp_path, undisturbed):
    fit(loss_fn, new_net(), DATA, CFG, tmp_path)
    def never(*_): raise AssertionError("trained")
    (r,) = train(never, new_net(seed=9), DATA, CFG, tmp_path)
    assert r.step == 14 and r.loss.item() == undisturbed[1][14] and r.lr == 1e-2 and not r.ema.training
    assert_same(everything(tmp_path), undisturbed[0])


def test_more_steps_continue_as_if_asked_for_at_once(tmp_path):
    longer = replace(CFG, steps=23)
    for steps in (1, 7, 14, 23): fit(loss_fn, new_net(), DATA, replace(CFG, steps=steps), tmp_path/"a")
    fit(loss_fn, new_net(), DATA, longer, tmp_path/"b")
    assert_same(everything(tmp_path/"a"), everything(tmp_path/"b"))
    assert [line[0] for line in log(tmp_path/"a")] == [3, 6, 9, 12, 15, 18, 21, 23]


def test_the_log_is_cut_back(tmp_path, undisturbed):
    for r in train(loss_fn, new_net(), DATA, CFG, tmp_path):
        if r.step == 10: break   # saved at 8, logged at 9
    with open(tmp_path/"log.jsonl", "a") as f: f.write('{"step": 12, "loss": 0.')
    assert next(train(loss_fn, new_net(), DATA, CFG, tmp_path)).step == 8
    assert [line[0] for line in log(tmp_path)] == [3, 6] and "0.\n" not in (tmp_path/"log.jsonl").read_text()
    fit(loss_fn, new_net(), DATA, CFG, tmp_path)
    assert_same(everything(tmp_path), undisturbed[0])


def test_a_log_line_holds_means(tmp_path):
    records = list(train(loss_fn, new_net(), DATA, CFG, tmp_path))
    for line in read_log(tmp_path):
        since = records[(line["step"] - 1)//3*3:line["step"]]
        assert line["loss"] == pytest.approx(fmean(r.loss.item() for r in since), rel=1e-12)
        assert line["grad_norm"] == pytest.approx(fmean(r.grad_norm.item() for r in since), rel=1e-12)
        assert line["seconds"] > 0 and line["images_per_second"] > 0


def test_only_the_newest_checkpoints_stay(tmp_path):
    (tmp_path/".step_00000099.tmp").mkdir()           # left by a kill
    (tmp_path/".log.jsonl.123.tmp").touch()
    fit(loss_fn, new_net(), DATA, replace(CFG, save_every=3, keep=3), tmp_path)
    assert saved(tmp_path) == ["step_00000009", "step_00000012", "step_00000014"]


class Flipping:
    "Data that draws random numbers itself."
    def __len__(self): return len(DATA)
    def batch(self, rows, generator): return DATA[rows]*torch.rand(len(rows), 1, generator=generator)


def test_data_with_randomness_of_its_own(tmp_path):
    whole = fit(loss_fn, new_net(), Flipping(), CFG)
    for r in train(loss_fn, new_net(), Flipping(), CFG, tmp_path):
        if r.step == 6: break
    again = fit(loss_fn, new_net(), Flipping(), CFG, tmp_path)
    assert all(a.equal(b) for a, b in zip(whole.parameters(), again.parameters()))


# --- kill

KILLED = replace(CFG, steps=60, save_every=1)


def slow(*args):
    time.sleep(0.01)   # so that no machine gets through before it is killed
    return loss_fn(*args)


def in_a_fork(out:str, how:int, after:float|None) -> int:
    "Train in a process of its own, send it a signal after some seconds or never, and return how it ended."
    if (pid := os.fork()) == 0:
        try: fit(slow, new_net(), DATA, KILLED, out)
        except SystemExit as e: os._exit(e.code)
        os._exit(0)
    if after is not None: time.sleep(after); os.kill(pid, how)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_again_and_again(out:str, how:int):
    "Kill a run at random moments until it gets through; print how often it was killed."
    import torch._dynamo   # what the first optimizer loads: once, not in each fork
    draw, ends = random.Random(0), []
    while not ends or ends[-1] != 0:
        ends.append(in_a_fork(out, how, draw.uniform(0.01, 0.25) if len(ends) < 12 else None))
        if list(Path(out).glob("step_*")): load_checkpoint(out)   # whole, at any moment
    print(json.dumps(ends))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_kill_at_any_moment_leaves_no_trace(how, tmp_path):
    fit(loss_fn, new_net(), DATA, KILLED, tmp_path/"whole")
    command = [sys.executable, __file__, str(tmp_path/"killed"), str(int(how))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    *killed, last = json.loads(done.stdout)
    assert last == 0 and len(killed) >= 3, "the run was hardly killed at all"
    assert set(killed) <= ({-9} if how == signal.SIGKILL else {143, -15}), "-15: before the loop had begun"
    assert_same(everything(tmp_path/"killed"), everything(tmp_path/"whole"))
    assert not list((tmp_path/"killed").glob(".*")), "something half-written is left"


@pytest.fixture
def handler():
    "A SIGTERM handler that must be in place again at the end."
    def ours(*_): raise AssertionError("nobody took the signal")
    before = signal.signal(signal.SIGTERM, ours)
    yield
    now = signal.signal(signal.SIGTERM, before)
    assert now is ours


def terminate(): os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("where", ["in a step", "between steps"])
def test_sigterm_saves_and_exits(where, tmp_path, handler, undisturbed):
    calls = []
    def loss(net, x0, generator):
        calls.append(0)
        if where == "in a step" and len(calls) == 6: terminate()
        return loss_fn(net, x0, generator)
    with pytest.raises(SystemExit) as e:
        for r in train(loss, new_net(), DATA, CFG, tmp_path):
            if where == "between steps" and r.step == 6: terminate()
    assert e.value.code == 143 and load_checkpoint(tmp_path).manifest["step"] == 6
    fit(loss_fn, new_net(seed=3), DATA, CFG, tmp_path)
    assert_same(everything(tmp_path), undisturbed[0])


def test_handler_is_back_however_a_run_ends(tmp_path, handler):
    fit(loss_fn, new_net(), DATA, CFG, tmp_path/"whole")
    for r in train(loss_fn, new_net(), DATA, CFG, tmp_path/"left"): break
    with pytest.raises(ZeroDivisionError): fit(lambda *_: 1/0, new_net(), DATA, CFG, tmp_path/"broken")


def test_without_a_folder_signals_are_not_touched():
    before = signal.getsignal(signal.SIGTERM)
    for r in train(loss_fn, new_net(), DATA, CFG): assert signal.getsignal(signal.SIGTERM) is before


def test_a_thread_trains_without_signals(tmp_path, undisturbed):
    worker = threading.Thread(target=fit, args=(loss_fn, new_net(), DATA, CFG, tmp_path))
    worker.start(); worker.join()
    assert_same(everything(tmp_path), undisturbed[0])


# --- what may not be trusted

@pytest.fixture
def run(tmp_path):
    for r in train(loss_fn, new_net(), DATA, CFG, tmp_path):
        if r.step == 9: break
    return tmp_path   # checkpoints at 4 and 8


def cut(path): path.write_bytes(path.read_bytes()[:-4])
def empty(path): path.write_bytes(b"")
def flip(path): data = bytearray(path.read_bytes()); data[-1] ^= 1; path.write_bytes(data)
def other_step(path): path.write_text(path.read_text().replace('"step": 8', '"step": 7', 1))
def a_list(path): path.write_text("[1, 2]")


HARM = [(Path.unlink, "is missing"), (cut, ""), (empty, ""), (flip, "")]


FILES = ["net.safetensors", "ema.safetensors", "optimizer.safetensors", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm,words", HARM, ids=lambda v: getattr(v, "__name__", ""))
def test_a_damaged_checkpoint_is_named_and_not_passed_over(name, harm, words, run, undisturbed):
    newest = run/"step_00000008"
    harm(newest/name)
    for use in (lambda: load_checkpoint(run), lambda: load_checkpoint(newest),
                lambda: fit(loss_fn, new_net(), DATA, CFG, run)):
        with pytest.raises(BadInput) as e: use()
        assert str(newest/name) in str(e.value) and words in str(e.value) and "\n" not in str(e.value)
        assert "delete the folder 'step_00000008'" in str(e.value)
    shutil.rmtree(newest)   # as the sentence says
    assert next(train(loss_fn, new_net(), DATA, CFG, run)).step == 4
    fit(loss_fn, new_net(), DATA, CFG, run)
    assert_same(everything(run), undisturbed[0])


@pytest.mark.parametrize("harm", [other_step, a_list], ids=lambda f: f.__name__)
def test_an_edited_manifest_is_noticed(harm, run):
    harm(run/"step_00000008"/"manifest.json")
    with pytest.raises(BadInput, match="manifest.json' (was edited|is cut off)"): load_checkpoint(run)


OTHERS = [(dict(cfg=replace(CFG, batch=9)), "config.batch is 8 there and 9 here"),
          (dict(cfg=replace(CFG, lr=0.5)), "config.lr is 0.01 there and 0.5 here"),
          (dict(cfg=replace(CFG, seed=1)), "config.seed is 0 there and 1 here"),
          (dict(cfg=replace(CFG, clip=None)), "config.clip is 0.5 there and None here"),
          (dict(cfg=replace(CFG, log_every=4)), "config.log_every is 3 there and 4 here"),
          (dict(net=Net(9)), "net.config.width is 8 there and 9 here"),
          (dict(net=nn.Linear(3, 2)), "net.type is Net there and Linear here"),
          (dict(data=DATA[:-1]), "data.length is 37 there and 36 here"),
          (dict(cfg=replace(CFG, steps=7)), "step 8 already")]


@pytest.mark.parametrize("change,words", OTHERS, ids=[w for _, w in OTHERS])
def test_another_run_is_refused_in_this_folder(change, words, run):
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    asked = dict(loss_fn=loss_fn, net=new_net(), data=DATA, cfg=CFG, out=run) | change
    with pytest.raises(BadInput) as e: fit(**asked)
    assert words in str(e.value) and str(run) in str(e.value) and "\n" not in str(e.value)
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}, "and nothing is touched"


def test_what_changes_no_step_may_change(run, undisturbed):
    fit(loss_fn, new_net(), DATA, replace(CFG, save_every=2, keep=1, bar=True), run)
    assert_same(everything(run), undisturbed[0])
    assert saved(run) == ["step_00000014"]


def test_weights_of_another_network_are_refused(run):
    for net, words in ((Net(9), "net.config.width is 8 there and 9 here"), (nn.Linear(3, 2), "net.type")):
        with pytest.raises(BadInput, match=words): load_checkpoint(run).load_into(net)
    file = run/"step_00000008"/"ema.safetensors"
    with pytest.raises(BadInput, match=r"inner.0.weight is \(8, 3\) there and \(9, 3\) here"):
        load_checkpoint(file).load_into(Net(9))
    with pytest.raises(BadInput, match="is missing"): load_checkpoint(file).load_into(nn.Linear(3, 2))
    ema = load_checkpoint(file).load_into(Net())
    assert ema.outer.weight.equal(load_checkpoint(run).tensors("ema")["outer.weight"])


def test_single_files_and_what_is_none(tmp_path):
    with pytest.raises(BadInput, match="There is no '"): load_checkpoint(tmp_path/"nowhere")
    with pytest.raises(BadInput, match="There is no checkpoint in"): load_checkpoint(tmp_path)
    torch.save({"weight": torch.ones(2)}, tmp_path/"pickled.pt")
    with pytest.raises(BadInput, match="pickled.pt' is no whole"): load_checkpoint(tmp_path/"pickled.pt")
    strided = torch.ones(5).expand(4, 5).t()
    at = save_checkpoint(tmp_path, 3, {"generator": {"w": strided}})   # any name, any strides
    assert load_checkpoint(tmp_path).tensors("generator")["w"].shape == (5, 4)
    with pytest.raises(BadInput, match="has no 'ema': it has generator"): load_checkpoint(at).tensors()
    cut(at/"generator.safetensors")
    with pytest.raises(BadInput, match="no whole safetensors"): load_checkpoint(at/"generator.safetensors")


def test_a_checkpoint_may_be_written_twice(tmp_path):
    for v in (1., 2.): save_checkpoint(tmp_path, 3, {"net": {"w": torch.tensor(v)}})
    assert load_checkpoint(tmp_path).tensors("net")["w"] == 2 and saved(tmp_path) == ["step_00000003"]


# --- numbers that are none

@pytest.mark.parametrize("at,caught", [(1, 3), (2, 3), (5, 6), (7, 8), (14, 14)])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_run(what, at, caught, tmp_path):
    "At the next line of the log or the next save, whichever comes first."
    calls, seen = [], []
    def explodes(net, x0, generator):
        calls.append(0)
        loss = loss_fn(net, x0, generator)
        if len(calls) != at: return loss
        return loss*math.inf if what == "loss" else loss + (0*net.outer.weight.sum()).sqrt()   # 0 * (1/0)
    with pytest.raises(RunFailed) as e:
        for r in train(explodes, new_net(), DATA, CFG, tmp_path): seen.append(r.step)
    assert len(calls) == caught and seen == list(range(1, caught))
    good = f"step_{(at - 1)//4*4:08d}"
    assert str(e.value).startswith(f"Step {at} has the loss") and str(tmp_path/good) in str(e.value)
    assert "\n" not in str(e.value)
    newest = load_checkpoint(tmp_path)
    assert newest.path.name == good and all(v.isfinite().all() for v in newest.tensors("net").values())


def test_without_a_folder_there_is_no_good_checkpoint():
    with pytest.raises(RunFailed, match="no checkpoint was saved"):
        fit(lambda net, x, g: loss_fn(net, x, g)*math.nan, new_net(), DATA, CFG)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("pack", [lambda d: d, lambda d: (torch.arange(37), d), lambda d: (d, d[:, 0])])
def test_data_that_is_not_finite_is_refused_at_the_door(bad, pack, tmp_path):
    data = DATA.clone()
    data[11, 0] = bad
    with pytest.raises(BadInput, match="Row 11 of the data"):
        fit(loss_fn, new_net(), pack(data), CFG, tmp_path/"out")
    assert not (tmp_path/"out").exists(), "and nothing is left behind"


NO_DATA = [(DATA[:0], "no rows"), ((DATA, DATA[:3]), r"\[37, 3\] rows"), (DATA.tolist(), "type list"),
           ((), "type tuple"), (torch.tensor(1.), "type Tensor")]


@pytest.mark.parametrize("data,words", NO_DATA, ids=[w for _, w in NO_DATA])
def test_data_that_is_none(data, words):
    with pytest.raises(BadInput, match=words): fit(loss_fn, new_net(), data, CFG)


@pytest.mark.parametrize("field,value", [
    ("steps", 0), ("steps", 1e3), ("batch", 0), ("lr", 0.), ("lr", math.nan), ("warmup", -1), ("ema", 1.),
    ("ema", -0.1), ("ema", math.nan), ("clip", 0.), ("clip", math.nan), ("weight_decay", -1.),
    ("log_every", 0), ("save_every", 0), ("keep", 0)])
def test_settings_that_are_none(field, value):
    with pytest.raises(BadInput, match=f"Got {field} = {value}: give"): replace(CFG, **{field: value})


def test_losses_and_networks_that_are_none():
    per_row = lambda net, x, g: net(x, x[:, 0]).square().mean(1)
    with pytest.raises(BadInput, match=r"gave \(8,\) where a 0-d"): fit(per_row, new_net(), DATA, CFG)
    with pytest.raises(BadInput, match="gave float where"): fit(lambda *_: 1., new_net(), DATA, CFG)
    with pytest.raises(BadInput, match="no parameters"): fit(loss_fn, nn.Identity(), DATA, CFG)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/"file").touch()
    with pytest.raises(BadInput, match="Cannot write to"):
        fit(loss_fn, new_net(), DATA, CFG, tmp_path/"file"/"out")


def test_a_disk_that_fills_up(tmp_path, monkeypatch, undisturbed):
    def full(fd): raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(RunFailed) as e:
        for r in train(loss_fn, new_net(), DATA, CFG, tmp_path):
            if r.step == 7: monkeypatch.setattr(os, "fsync", full)
    assert "Step 8 could not be written" in str(e.value) and "No space left" in str(e.value)
    assert str(tmp_path/"step_00000004") in str(e.value)
    assert saved(tmp_path) == ["step_00000000", "step_00000004"]
    monkeypatch.undo()
    fit(loss_fn, new_net(), DATA, CFG, tmp_path)
    assert_same(everything(tmp_path), undisturbed[0])


# --- the arithmetic

def plain_loop(cfg, net):
    "The same run written out: one weight at a time, one step after the other, in torch's plainest Adam."
    opt = torch.optim.AdamW(net.parameters(), weight_decay=cfg.weight_decay, foreach=False, fused=False)
    epochs = [torch.randperm(len(DATA), generator=seeded(cfg.seed, "order", e)) for e in range(20)]
    order = torch.cat(epochs).tolist()
    averages = [p.detach().double().clone() for p in net.parameters()]
    for s in range(cfg.steps):
        x0 = torch.stack([DATA[i] for i in order[s*cfg.batch:(s + 1)*cfg.batch]])
        torch.manual_seed(fold_seed(cfg.seed, "step", s, "dropout"))
        loss = loss_fn(net, x0, seeded(cfg.seed, "step", s))
        opt.zero_grad(); loss.backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in net.parameters()))
        if cfg.clip and norm > cfg.clip:
            for p in net.parameters(): p.grad *= cfg.clip/norm
        opt.param_groups[0]["lr"] = cfg.lr*min(s + 1, cfg.warmup)/cfg.warmup
        opt.step()
        decay = min(cfg.ema, (1 + s)/(10 + s)) if cfg.ema_warmup else cfg.ema
        averages = [decay*a + (1 - decay)*p.detach().double() for a, p in zip(averages, net.parameters())]
        yield loss.item(), norm, averages


@pytest.mark.parametrize("change", [
    {}, dict(ema_warmup=True), dict(clip=None), dict(clip=1e-3), dict(weight_decay=0.3), dict(batch=50),
    dict(seed=1), dict(warmup=1)], ids=str)
def test_against_a_plain_loop(change):
    cfg, a, b = replace(CFG, **change), new_net(), new_net()
    for r, (loss, norm, averages) in zip(train(loss_fn, a, DATA, cfg), plain_loop(cfg, b), strict=True):
        close = lambda x, y: torch.testing.assert_close(x, y, rtol=1e-4, atol=2e-6)
        close(r.loss, torch.tensor(loss)); close(r.grad_norm, torch.tensor(norm, dtype=torch.float32))
        for p, q, m, avg in zip(r.net.parameters(), b.parameters(), r.ema.parameters(), averages):
            close(p, q); close(m.double(), avg)
        for p, q in zip(r.ema.buffers(), b.buffers()): close(p, q)


def test_warm_up():
    rates = [r.lr for r in train(loss_fn, new_net(), DATA, CFG)]
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008] + [0.01]*10)
    ddpm = [learning_rate(TrainConfig(1), s) for s in (0, 2499, 4999, 800_000)]
    assert ddpm == pytest.approx([4e-8, 1e-4, 2e-4, 2e-4])
    before = [p.detach().clone() for p in new_net().parameters()]
    first = next(train(loss_fn, new_net(), DATA, CFG))
    moved = max((a - b).abs().max().item() for a, b in zip(before, first.net.parameters()))
    assert moved == pytest.approx(0.002, rel=1e-3), "Adam's first step is the rate itself"


def test_clipping_bounds_the_gradient():
    net = nn.Linear(3, 2)
    def loss(net, x0, generator): return 100*net(torch.cat([x0, x0[:, :1]], 1)).square().mean()
    for r in train(loss, net, DATA, CFG):
        used = torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item()
        assert r.grad_norm > 10 and used == pytest.approx(0.5, rel=1e-4)


def test_average_warms_up():
    cfg = TrainConfig(1, ema=0.999, ema_warmup=True)
    assert [ema_decay(cfg, s) for s in (0, 1, 90)] == pytest.approx([1/10, 2/11, 91/100])
    assert ema_decay(cfg, 10**6) == 0.999 == ema_decay(replace(cfg, ema_warmup=False), 0)


@pytest.mark.parametrize("n,batch", [(37, 8), (8, 8), (5, 8), (3, 50), (1, 4)])
def test_every_row_once_an_epoch(n, batch):
    rows = torch.cat([data_order(n, batch, 0)(s) for s in range(24)])
    epochs = rows[:len(rows)//n*n].reshape(-1, n)
    assert (epochs.sort().values == torch.arange(n)).all()
    assert n < 8 or len(set(map(tuple, epochs.tolist()))) == len(epochs), "each epoch has an order of its own"


def test_a_batch_may_exceed_the_data(tmp_path):
    cfg = replace(CFG, batch=100)
    whole = fit(loss_fn, new_net(), DATA, cfg)
    for r in train(loss_fn, new_net(), DATA, cfg, tmp_path):
        if r.step == 6: break
    again = fit(loss_fn, new_net(), DATA, cfg, tmp_path)
    assert all(a.equal(b) for a, b in zip(whole.parameters(), again.parameters()))


def test_tuples_stay_together():
    x, y = batches((DATA, DATA[:, 0]), CFG, torch.device("cpu"))(5, None)
    assert x[:, 0].equal(y) and len(x) == 8


def test_the_callers_random_numbers_are_his():
    net = new_net()
    torch.manual_seed(7)
    wanted = torch.rand(14)
    torch.manual_seed(7)
    assert torch.cat([torch.rand(1) for r in train(loss_fn, net, DATA, CFG)]).equal(wanted)


def test_dropout_is_not_made_of_the_noise():
    with randomness(0, 3, torch.device("cpu")) as generator:
        assert not torch.rand(8).equal(torch.rand(8, generator=generator))


class Waits(TorchDispatchMode):
    "Counts what would make the host wait for the device."
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_the_host_waits_only_to_log_and_to_save(tmp_path):
    net, seen = nn.Linear(2, 2), {}
    def loss(net, x0, generator): return net(x0).square().mean()
    with Waits() as waits:
        for r in train(loss, net, DATA, CFG, tmp_path): seen[r.step], waits.n = waits.n, 0
    assert {s for s in seen if s > 1 and seen[s]} <= {3, 4, 6, 8, 9, 12, 14}, seen   # 1: the data


# --- the bar

def test_the_bar_shows_the_loss_and_goes(monkeypatch, capsys):
    monkeypatch.delenv("IN_TEST", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fit(loss_fn, new_net(), DATA, replace(CFG, bar=True))
    shown = capsys.readouterr().out
    assert "[14/14 " in shown and "loss " in shown and shown.rpartition("\r")[2] == ""
    assert shown.split("\r")[-2].strip() == "", "wiped in the end"
    for r in train(loss_fn, new_net(), DATA, replace(CFG, bar=True)):
        if r.step == 5: break
    del r
    assert capsys.readouterr().out.split("\r")[-2].strip() == "", "also after a break"


@pytest.mark.parametrize("why", ["bar", "IN_TEST", "no terminal"])
def test_the_bar_is_quiet(why, monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: why != "no terminal")
    monkeypatch.setenv("IN_TEST", "1") if why == "IN_TEST" else monkeypatch.delenv("IN_TEST", raising=False)
    fit(loss_fn, new_net(), DATA, replace(CFG, bar=why != "bar"))
    assert capsys.readouterr().out == ""


if __name__ == "__main__": kill_again_and_again(sys.argv[1], int(sys.argv[2]))
