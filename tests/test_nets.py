"The networks: sizes, shapes, gradients, one graph when compiled, the papers' layouts as diffusers has them."
import copy, hashlib, json, shutil, warnings
from dataclasses import asdict, replace

import pytest, safetensors.torch, torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from fastdiff_edu.checkpoint import checkpoints, load_checkpoint, seal
from fastdiff_edu.core import BadInput
from fastdiff_edu.nets.embeddings import GuidanceEmbedding, LabelEmbedding
from fastdiff_edu.nets.mlp import MLP, MLPConfig
from fastdiff_edu.nets.unet import Down, ResBlock, UNet, UNetConfig
from fastdiff_edu.train import TrainConfig, fit

TINY = UNetConfig(size=8, width=8, mult=(1, 2), blocks=1, attn=(4,), dropout=0.1, n_labels=3)
ALL = dict(out_ch=6, heads=2, scale_shift=True, resample="block", w_waves=8)
NETS = {
    "digits": (UNet, UNetConfig.digits()),
    "tiny": (UNet, TINY),
    "one level": (UNet, replace(TINY, mult=(2,), attn=(8,), n_labels=0)),
    "twelve rows": (UNet, UNetConfig(12, 1, 2, width=4, mult=(1, 2, 1), blocks=2, attn=(12, 3))),
    "more channels out": (UNet, replace(TINY, out_ch=6)),
    "iddpm": (UNet, replace(TINY, out_ch=6, heads=4, scale_shift=True)),
    "pd": (UNet, replace(TINY, mult=(1, 1, 1), attn=(4, 8), scale_shift=True, resample="block", n_labels=0)),
    "every option": (UNet, replace(TINY, **ALL)),
    "points": (MLP, MLPConfig(n_labels=4)),
    "a line": (MLP, MLPConfig(dim=1, width=16, depth=1, waves=0, out=2)),
}
every = pytest.mark.parametrize("name", NETS)


def build(name, seed=0):
    torch.manual_seed(seed)
    make, config = NETS[name]
    return make(config)


def awake(net):
    "The same network with numbers where it starts at 0, so that everything has a say."
    torch.manual_seed(1)
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=0.1)
    return net.eval()


def inputs(net, rows=3, seed=0):
    "A batch for `net`: points or images, times, and labels where it knows any."
    g = torch.Generator().manual_seed(seed)
    shape = getattr(net, "shape", None) or (net.config.dim,)
    n = net.config.n_labels
    y = torch.randint(-1, n, (rows,), generator=g) if n else None
    return torch.randn(rows, *shape, generator=g), torch.rand(rows, generator=g), y


def count(config):
    with torch.device("meta"): return sum(p.numel() for p in UNet(config).parameters())


# --- sizes

@pytest.mark.parametrize("config, wanted", [
    (UNetConfig.ddpm_cifar10(), 35_746_307),
    (UNetConfig.ddpm_celebahq(), 113_673_219),
    (UNetConfig(size=64, mult=(1, 2, 2, 2, 4)), 78_700_803),
    (UNetConfig.iddpm_cifar10(), 52_546_438),
    (UNetConfig.pd_cifar10(), 60_004_099),
], ids=["DDPM CIFAR-10", "DDPM CelebA-HQ 256", "DDIM CelebA 64", "IDDPM CIFAR-10", "PD CIFAR-10"])
def test_networks_of_the_papers_have_their_size(config, wanted): assert count(config) == wanted


def test_settings_of_the_papers():
    "What the number of weights does not show."
    names = ("ddpm_cifar10", "ddpm_celebahq", "iddpm_cifar10", "pd_cifar10")
    all_ = [getattr(UNetConfig, name)() for name in names]
    assert [(c.size, c.heads) for c in all_] == [(32, 1), (256, 1), (32, 4), (32, 1)]
    assert [(c.out_ch, c.dropout) for c in all_] == [(None, 0.1), (None, 0.), (6, 0.3), (None, 0.2)]
    assert [set(c.attn) for c in all_] == [{16}, {16}, {16, 8}, {16, 8}]


def test_digits_network_is_small(): assert 300_000 < count(UNetConfig.digits()) < 500_000


# --- shapes

@every
@pytest.mark.parametrize("rows", [1, 3])
def test_shape_and_start_at_zero(name, rows):
    net = build(name)
    x, t, y = inputs(net, rows)
    out = net(x, t, y)
    wanted = getattr(net.config, "out", None) or getattr(net.config, "out_ch", None) or x.shape[1]
    assert out.shape == (rows, wanted, *x.shape[2:]) and out.dtype == x.dtype and out.is_contiguous()
    assert not out.any()


@every
def test_rows_do_not_mix_and_order_in_memory_does_not_matter(name):
    net = awake(build(name)).double()
    x, t, y = inputs(net)
    x, out = x.double(), net(x.double(), t, y)
    assert out.any()
    for i in range(3):
        alone = net(x[i:i+1], t[i:i+1], None if y is None else y[i:i+1])
        assert_close(alone, out[i:i+1])
    if x.ndim == 4: assert_close(net(x.to(memory_format=torch.channels_last), t, y), out)


@pytest.mark.parametrize("name", ["digits", "tiny", "points"])
def test_no_label_is_minus_one(name):
    net = awake(build(name))
    x, t, y = inputs(net)
    assert_close(net(x, t), net(x, t, torch.full((3,), -1)), rtol=0, atol=0)
    assert not torch.allclose(net(x, t), net(x, t, torch.tensor([0, 1, 2])), atol=1e-4)


# --- the guidance weight

def test_guidance_weight_is_heard():
    net = awake(build("every option"))
    x, t, y = inputs(net, rows=1)
    rows = torch.tensor([0., 0.25, 1., 4., 14.])
    out = net(x.expand(5, -1, -1, -1), t.expand(5), y.expand(5), rows)
    assert torch.pdist(out.flatten(1)).min() > 1e-2
    for w, wanted in zip(rows, out): assert_close(net(x, t, y, w[None])[0], wanted)
    assert_close(net(x, t, y), net(x, t, y, torch.zeros(1)), rtol=0, atol=0)


def test_a_new_student_is_its_teacher_at_every_weight():
    teacher = awake(build("tiny"))
    student = UNet(replace(TINY, w_waves=8)).eval()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"guidance"}
    x, t, y = inputs(teacher)
    assert_close(student(x, t, y, torch.tensor([0., 1., 9.])), teacher(x, t, y), rtol=0, atol=0)


def test_layers_for_the_guidance_weight_are_drawn_last():
    torch.manual_seed(0)
    student = UNet(replace(TINY, w_waves=8)).state_dict()
    assert all(torch.equal(v, student[k]) for k, v in build("tiny").state_dict().items())


def test_neighbouring_weights_have_neighbouring_vectors():
    "From 0 to 10, nothing jumps between weights a hundredth apart; a tenth apart they can be told apart."
    torch.manual_seed(0)
    embed = GuidanceEmbedding(64, 32)
    nn.init.xavier_uniform_(embed.second.weight)
    out = embed(torch.linspace(0, 10, 1001))
    step, spread = (out[1:] - out[:-1]).norm(dim=1), (out - out.mean(0)).norm(dim=1).mean()
    assert step.max() < 0.1*spread and (out[10] - out[0]).norm() > 0.05*out.norm(dim=1).mean()


@pytest.mark.parametrize("w, words", [
    (torch.zeros(2), "as guidance weights for a batch of 3"), (1., "a float as guidance weights"),
    (torch.zeros(3, 1), "guidance weights for"), (torch.zeros(3, dtype=torch.long), "torch.int64 of shape"),
], ids=["two rows", "a float", "a column", "whole numbers"])
def test_bad_guidance_weight_is_one_sentence(w, words):
    net = UNet(replace(TINY, **ALL))
    with pytest.raises(BadInput, match=words): net(*inputs(net), w)
    with pytest.raises(BadInput, match=r"\(w_waves = 0\): leave w out"): UNet(TINY)(*inputs(net), w)


# --- labels and dropout

def test_no_label_gets_only_its_own_row():
    embed = LabelEmbedding(3, 4)
    embed(torch.tensor([-1, -1])).sum().backward()
    assert embed.table.weight.grad.any(1).tolist() == [True, False, False, False]


def test_dropout_only_in_training():
    net = awake(UNet(TINY))
    x, t, y = inputs(net)
    assert_close(net(x, t, y), net(x, t, y), rtol=0, atol=0)
    net.train()
    assert not torch.allclose(net(x, t, y), net(x, t, y))


@pytest.mark.parametrize("name", ["digits", "every option"])
def test_bfloat16_and_autocast(name):
    net = awake(build(name))
    x, t, y = inputs(net)
    exact = net(x, t, y)
    with torch.autocast("cpu", torch.bfloat16): mixed = net(x, t, y)
    low = copy.deepcopy(net).bfloat16()(x.bfloat16(), t, y)
    for other in (mixed, low): assert (other.float() - exact).abs().max() < 0.1*exact.abs().max()


# --- bad input

BAD = [
    (lambda x, t, y: (x[:, :, 1:], t, y), r"takes \(B, 3, 8, 8\)"),
    (lambda x, t, y: (x[:0], t[:0], None), r"takes \(B, 3, 8, 8\)"),
    (lambda x, t, y: (x, 0.5, y), "a float as times"),
    (lambda x, t, y: (x, t[:1], y), "as times for a batch of 3"),
    (lambda x, t, y: (x, t, y + 3), "this network knows 0 to 2"),
    (lambda x, t, y: (x, t, y - 9), "this network knows 0 to 2"),
    (lambda x, t, y: (x, t, y.float()), "one whole number each"),
]


@pytest.mark.parametrize("bad, words", BAD, ids=[words for _, words in BAD])
def test_bad_input_is_one_sentence(bad, words):
    net = UNet(TINY)
    with pytest.raises(BadInput, match=words) as error: net(*bad(*inputs(net)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (dict(size=9), "a multiple of 2"), (dict(attn=(16,)), r"have \[8, 4\]"), (dict(mult=()), "start at 1"),
    (dict(blocks=0), "start at 1"), (dict(width=7), "an even one"), (dict(heads=3), r"a divisor of \[16\]"),
    (dict(heads=0), "a divisor of"), (dict(heads=16, mult=(2, 3), attn=(8,)), r"a divisor of \[16, 24\]"),
    (dict(resample="pool"), "known: conv"), (dict(w_waves=5), "in pairs"), (dict(w_waves=2), "or more"),
])
def test_bad_shape_is_one_sentence(change, words):
    with pytest.raises(BadInput, match=words): replace(TINY, **change)


def test_a_network_without_labels_refuses_them():
    net = build("one level")
    x, t, _ = inputs(net)
    with pytest.raises(BadInput, match="built without"): net(x, t, torch.zeros(3, dtype=torch.long))


def test_labels_are_read_on_the_host_only():
    "On a device nothing is read, as that would wait for it; here the device cannot even be read."
    with torch.device("meta"):
        net = UNet(TINY)
        out = net(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.full((2,), 99))
        more = UNet(replace(TINY, **ALL))(torch.zeros(2, 3, 8, 8), torch.zeros(2), None, torch.full((2,), 3.))
    assert out.shape == (2, 3, 8, 8) and more.shape == (2, 6, 8, 8)


# --- records and weights

SEEDED = "ae90d50927d2939ed30e6b57fb90e7ce44f1e9086d98271672b6a90ba9c6be79"


def test_networks_that_were_saved_are_still_the_same():
    "Options that came later leave names, shapes and seeded weights (uniform ones: the same on any CPU)."
    state = build("digits").state_dict()
    assert len(state) == 151 and list(state)[:2] == ["time.first.weight", "time.first.bias"]
    digest = hashlib.sha256()
    for name, v in state.items():
        digest.update(f"{name} {tuple(v.shape)}".encode())
        if name != "label.table.weight": digest.update(v.numpy().tobytes())
    assert digest.hexdigest() == SEEDED


def test_a_record_from_before_names_the_same_network():
    "The default of a younger field is what all networks were before it."
    younger = ("heads", "scale_shift", "resample", "w_waves")
    for config in (UNetConfig.digits(), UNetConfig.ddpm_cifar10(), TINY):
        old = {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in younger}
        assert UNetConfig(**old) == config


@every
def test_config_survives_json_and_rebuilds_the_network(name):
    net = build(name)
    config = type(net.config)(**json.loads(json.dumps(asdict(net.config))))
    assert config == net.config and hash(config) == hash(net.config)
    again = type(net)(config)
    again.load_state_dict(net.state_dict())
    x, t, y = inputs(net)
    assert_close(awake(again)(x, t, y), awake(net)(x, t, y), rtol=0, atol=0)


@every
def test_weights_can_be_stored_as_they_are(name):
    net = awake(build(name))
    stored = safetensors.torch.load(safetensors.torch.save(net.state_dict()))
    assert stored.keys() == net.state_dict().keys()
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in stored.items())


@every
def test_gradients_reach_every_weight(name):
    "A layer that starts at 0 hides what stands before it; after a few steps nothing is hidden."
    net = build(name)
    x, t, y = inputs(net, rows=8)
    opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(4):
        opt.zero_grad()
        (net(x, t, y) - 1).square().mean().backward()
        opt.step()
    unmoved = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert not unmoved


@pytest.mark.parametrize("name", ["tiny", "points"])
def test_it_learns_one_batch(name):
    net = build(name).eval()
    x, t, y = inputs(net, rows=8)
    opt = torch.optim.Adam(net.parameters(), lr=5e-3)
    wanted = inputs(net, rows=8, seed=1)[0]
    for _ in range(60):
        loss = F.mse_loss(net(x, t, y), wanted)
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss < 0.3*wanted.square().mean()


# --- one graph

@pytest.mark.parametrize("name, backend", [
    ("tiny", "aot_eager"), ("every option", "aot_eager"), ("points", "inductor")])
def test_compiles_to_one_graph(name, backend):
    "Forward and backward in one piece each; the small one through the compiler too."
    if backend == "inductor" and not shutil.which("g++"): pytest.skip("there is no compiler")
    net = awake(build(name))
    args = inputs(net)
    if getattr(net.config, "w_waves", 0): args += (torch.tensor([0., 1., 4.]),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.compile(net, fullgraph=True, backend=backend)(*args)
        grad, *_ = torch.autograd.grad(out.sum(), net.first.weight)
    assert_close(out, net(*args), rtol=1e-4, atol=1e-4)
    assert_close(grad, torch.autograd.grad(net(*args).sum(), net.first.weight)[0], rtol=1e-3, atol=1e-3)


# --- the papers' layouts, against another implementation

def renamed(net):
    "The weights of `net` under the names that diffusers' UNet2DModel gives them."
    names = {"first": "conv_in", "last.0": "conv_norm_out", "last.2": "conv_out",
             "time.first": "time_embedding.linear_1", "time.second": "time_embedding.linear_2"}
    blocks, n = net.config.blocks, len(net.config.mult)
    places = [(f"down.{i*(blocks + 1) + j}", f"down_blocks.{i}", j) for i in range(n) for j in range(blocks)]
    places += [(f"up.{i*(blocks + 1) + j}", f"up_blocks.{i}", j) for i in range(n) for j in range(blocks + 1)]
    places += [(f"middle.{j}", "mid_block", j) for j in range(2)]
    for ours, theirs, j in places:
        names |= {f"{ours}.block": f"{theirs}.resnets.{j}", f"{ours}.attention": f"{theirs}.attentions.{j}",
                  f"{ours}.up": f"{theirs}.upsamplers.0"}
    names |= {f"down.{i}": f"down_blocks.{i//(blocks + 1)}.downsamplers.0"
              for i, stage in enumerate(net.down) if isinstance(stage, (Down, ResBlock))}
    parts = {"emb": "time_emb_proj", "shortcut": "conv_shortcut", "norm": "group_norm", "out": "to_out.0"}
    state = {}
    for key, value in net.state_dict().items():
        prefix = max((p for p in names if key.startswith(p + ".")), key=len)
        *inner, last = key.removeprefix(prefix + ".").split(".")
        inner = [parts.get(part, part) for part in inner]
        pieces = [(".".join(inner), value)]
        if inner == ["qkv"]: pieces = zip(("to_q", "to_k", "to_v"), value.chunk(3))
        state |= {".".join(filter(None, (names[prefix], part, last))): v for part, v in pieces}
    return state


def theirs(config):
    "diffusers' network of the same shape."
    from diffusers import UNet2DModel
    attn = [rows in config.attn for rows, _ in config.levels]
    conv = config.resample == "conv"
    plain = ("DownBlock2D", "UpBlock2D") if conv else ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D")
    return UNet2DModel(
        sample_size=config.size, in_channels=config.in_ch, out_channels=config.out_ch or config.in_ch,
        layers_per_block=config.blocks,
        block_out_channels=[ch for _, ch in config.levels],
        down_block_types=["AttnDownBlock2D" if a else plain[0] for a in attn],
        up_block_types=["AttnUpBlock2D" if a else plain[1] for a in reversed(attn)],
        norm_eps=1e-6, norm_num_groups=config.groups, attn_norm_num_groups=config.groups,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1,
        attention_head_dim=None if config.heads == 1 else config.levels[-1][1]//config.heads,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        downsample_type="conv" if conv else "resnet", upsample_type="conv" if conv else "resnet")


@pytest.mark.parametrize("config", [
    UNetConfig(size=16, width=64, mult=(1, 2), blocks=1, attn=(8,), dropout=0.),
    UNetConfig(size=16, width=64, mult=(1, 1, 2), blocks=2, attn=(16, 4), dropout=0.),
    UNetConfig(size=16, width=64, mult=(1, 2, 2), blocks=1, attn=(8, 4), heads=4, scale_shift=True, out_ch=6),
    UNetConfig(size=16, width=64, mult=(1, 1, 1), blocks=2, attn=(8, 4), scale_shift=True, resample="block"),
], ids=["two levels", "three levels", "as IDDPM", "as progressive distillation"])
def test_same_weights_same_output_as_diffusers(config):
    pytest.importorskip("diffusers")
    net, other = awake(UNet(config)).double(), theirs(config).double().eval()
    other.load_state_dict(renamed(net))
    x, k = torch.randn(3, 3, config.size, config.size, dtype=torch.float64), torch.tensor([0, 17, 999])
    assert_close(net(x, k.double()/1000), other(x, k).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ddpm_cifar10", "ddpm_celebahq", "iddpm_cifar10", "pd_cifar10"])
def test_same_size_as_diffusers(name):
    pytest.importorskip("diffusers")
    config = getattr(UNetConfig, name)()
    with torch.device("meta"): other = theirs(config)
    assert sum(p.numel() for p in other.parameters()) == count(config)


def test_a_run_from_before_the_newer_options_loads_and_goes_on(tmp_path):
    "Its manifest does not know them: they are taken at their defaults; another value is another network."
    def loss_fn(net, x, generator): return net(x, torch.zeros(len(x)), None).square().mean()
    build = lambda **more: UNet(replace(TINY, dropout=0., n_labels=0, **more))
    cfg, data = TrainConfig(2, batch=2, warmup=0, bar=False), torch.randn(4, 3, 8, 8)
    fit(loss_fn, build(), data, cfg, tmp_path)
    for folder in checkpoints(tmp_path):
        manifest = json.loads((folder/"manifest.json").read_text())
        for name in ("heads", "scale_shift", "resample", "w_waves"): del manifest["net"]["config"][name]
        manifest["seal"] = seal({k: v for k, v in manifest.items() if k != "seal"})
        (folder/"manifest.json").write_text(json.dumps(manifest))
    load_checkpoint(tmp_path).load_into(build())
    with pytest.raises(BadInput, match="net.config.heads is 1 there and 2 here"):
        load_checkpoint(tmp_path).load_into(build(heads=2))
    with pytest.raises(BadInput, match="net.config.heads is 1 there and 2 here"):
        fit(loss_fn, build(heads=2), data, replace(cfg, steps=3), tmp_path)
    fit(loss_fn, build(), data, replace(cfg, steps=3), tmp_path)
    assert load_checkpoint(tmp_path).manifest["step"] == 3
