"Denoising Diffusion GANs: FIR resampling, generator and discriminator, each against its formula."
import json, math, warnings
from dataclasses import asdict, replace

import pytest, safetensors.torch, torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from fastdiff_edu.core import BadInput
from fastdiff_edu.nets.discriminator import Discriminator, DiscriminatorConfig, batch_spread
from fastdiff_edu.nets.fir import FirConv, FirDown, FirUp
from fastdiff_edu.nets.ncsnpp import AdaGN, NCSNpp, NCSNppConfig, group_count

TINY = NCSNppConfig(8, 3, width=8, mult=(1, 2), blocks=1, attn=(4,), z_dim=5, z_width=6, z_layers=1,
                    n_labels=3)
SMALL = DiscriminatorConfig(8, 2, width=4, t_width=8, n_labels=3)
NETS = {
    "digits": (NCSNpp, NCSNppConfig.digits()),
    "tiny": (NCSNpp, TINY),
    "one level": (NCSNpp, replace(TINY, mult=(2,), attn=(8,), blocks=2, n_labels=0)),
    "three levels": (NCSNpp, replace(TINY, size=12, in_ch=1, mult=(1, 1, 2), blocks=2, attn=(6, 12))),
    "no more layers of z": (NCSNpp, replace(TINY, z_layers=0, z_dim=1, attn=())),
    "digits, D": (Discriminator, DiscriminatorConfig.digits()),
    "small D": (Discriminator, SMALL),
    "large D": (Discriminator, replace(SMALL, size=16, kind="large", n_labels=0)),
    "D of single rows": (Discriminator, replace(SMALL, size=32, in_ch=1, group=0)),
}
every = pytest.mark.parametrize("name", NETS)
generators = pytest.mark.parametrize("name", [name for name, (make, _) in NETS.items() if make is NCSNpp])
judges = pytest.mark.parametrize("name", [name for name, (make, _) in NETS.items() if make is Discriminator])


def build(name, seed=0):
    torch.manual_seed(seed)
    make, config = NETS[name]
    return make(config)


def awake(net):
    "The same network with numbers where it starts at 0 (and other biases), in float64."
    torch.manual_seed(1)
    for key, p in net.named_parameters():
        if not p.any() or key.endswith("bias"): nn.init.normal_(p, p.detach().mean().item(), 0.2)
    return net.eval().double()


def inputs(net, rows=4, seed=0, dtype=torch.float64):
    "A batch for `net`: images and latents, or two images; times; labels where it knows any."
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(rows, *shape, generator=g, dtype=dtype)
    second = draw(net.config.z_dim) if isinstance(net, NCSNpp) else draw(*net.shape)
    n, t = net.config.n_labels, 1 - torch.rand(rows, generator=g, dtype=dtype)
    return draw(*net.shape), second, t, torch.randint(-1, n, (rows,), generator=g) if n else None


def take(batch, rows): return [None if v is None else v[rows] for v in batch]


# --- FIR

def upfirdn(x, up=1, down=1, pad=(1, 1)):
    "By definition: spread by zeros, pad by zeros, filter, take every `down`-th; the gain is up^2."
    k = torch.tensor([1., 3., 3., 1.], dtype=x.dtype)
    wide = x.new_zeros(*x.shape[:2], up*x.shape[2], up*x.shape[3])
    wide[:, :, ::up, ::up] = x
    windows = F.pad(wide, (*pad, *pad)).unfold(2, 4, 1).unfold(3, 4, 1)
    return up**2*torch.einsum("bchwij,i,j->bchw", windows, k, k)[:, :, ::down, ::down]/64


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.integers(1, 3), ch=st.integers(1, 5), h=st.integers(1, 9), w=st.integers(1, 9))
def test_fir_is_its_definition(rows, ch, h, w):
    x = torch.randn(rows, ch, 2*h, 2*w, dtype=torch.float64)
    odd = x[:, :, :2*h - 1]
    for v in (x, x.to(memory_format=torch.channels_last)):
        assert_close(FirDown().double()(v), upfirdn(x, down=2))
        assert_close(FirUp().double()(v), upfirdn(x, up=2, pad=(2, 1)))
    assert_close(FirUp().double()(odd), upfirdn(odd, up=2, pad=(2, 1)))
    both = FirConv(ch, 3).double()
    assert_close(both(x), F.conv2d(upfirdn(x, pad=(2, 2)), both.conv.weight, both.conv.bias, stride=2))
    assert both(x).shape == (rows, 3, h, w)


@pytest.mark.filterwarnings("ignore:To copy construct:UserWarning")
def test_fir_is_that_of_diffusers():
    pytest.importorskip("diffusers")
    from diffusers.models.downsampling import FirDownsample2D, downsample_2d
    from diffusers.models.upsampling import upsample_2d
    x, taps = torch.randn(2, 3, 8, 6), torch.tensor([1., 3., 3., 1.])
    assert_close(FirDown()(x), downsample_2d(x, taps))
    assert_close(FirUp()(x), upsample_2d(x, taps))
    ours, theirs = FirConv(3, 5), FirDownsample2D(3, 5, use_conv=True)
    theirs.load_state_dict({f"Conv2d_0.{k}": torch.randn_like(v) for k, v in ours.conv.state_dict().items()})
    ours.conv.load_state_dict(theirs.Conv2d_0.state_dict())
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("make", [FirDown, FirUp, lambda: FirConv(2, 2)], ids=["down", "up", "conv"])
def test_fir_can_be_differentiated_twice_and_compiled(make):
    layer, x = make().double(), torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    cubed = lambda v: layer(v)**3
    assert torch.autograd.gradcheck(cubed, x) and torch.autograd.gradgradcheck(cubed, x)
    assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    assert "kernel" not in layer.state_dict() and layer.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


# --- sizes

@pytest.mark.parametrize("make, config, wanted", [
    (NCSNpp, NCSNppConfig.ddgan_cifar10(), 48_432_515),
    (NCSNpp, NCSNppConfig.ddgan_celebahq(), 39_726_979),
    (NCSNpp, NCSNppConfig.digits(), 448_385),
    (Discriminator, DiscriminatorConfig.ddgan_cifar10(), 12_741_633),
    (Discriminator, DiscriminatorConfig.ddgan_celebahq(), 27_737_217),
    (Discriminator, DiscriminatorConfig.digits(), 478_145),
], ids=["G CIFAR-10", "G CelebA-HQ", "G digits", "D CIFAR-10", "D CelebA-HQ", "D digits"])
def test_size_and_one_step_without_numbers(make, config, wanted):
    "The paper's count of weights; forward and backward on a device that has shapes only."
    with torch.device("meta"):
        net = make(config)
        assert sum(p.numel() for p in net.parameters()) == wanted
        x, t = torch.zeros(4, *net.shape), torch.zeros(4)
        out = net(x, torch.zeros(4, config.z_dim) if make is NCSNpp else x, t)
        assert out.shape == (x.shape if make is NCSNpp else (4,))
        out.sum().backward()
    assert all(p.grad is not None for name, p in net.named_parameters())


def test_settings_of_the_paper():
    "What the number of weights does not show."
    a, b = NCSNppConfig.ddgan_cifar10(), NCSNppConfig.ddgan_celebahq()
    assert [(c.size, c.attn, c.dropout, c.z_dim, c.z_layers) for c in (a, b)] == [
        (32, (16,), 0., 100, 4), (256, (16,), 0., 100, 3)]
    with torch.device("meta"): nets = NCSNpp(a), NCSNpp(b)
    for net in nets:
        for m in net.modules():
            if isinstance(m, nn.GroupNorm):
                assert (m.num_groups, m.eps) == (min(m.num_channels//4, 32), 1e-6)
            if isinstance(m, AdaGN): assert m.norm.weight is None
    judges = DiscriminatorConfig.ddgan_cifar10(), DiscriminatorConfig.ddgan_celebahq()
    assert [(c.size, c.kind, c.group) for c in judges] == [(32, "small", 4), (256, "large", 4)]


def test_groups_divide_the_channels():
    for ch in range(1, 200):
        n = group_count(ch, 32)
        assert ch % n == 0 and (n == 1 or ch//n >= 4 and n <= 32)
    assert [group_count(ch, 32) for ch in (64, 128, 192, 384, 24, 20, 2)] == [16, 32, 32, 32, 6, 5, 1]


# --- the first weights

@every
def test_starts_at_zero_and_the_same_for_a_seed(name):
    net, again = (build(name).double() for _ in range(2))
    assert all(torch.equal(v, again.state_dict()[key]) for key, v in net.state_dict().items())
    x = inputs(net)
    out = net(*x)
    assert out.shape == (x[0].shape if isinstance(net, NCSNpp) else (4,)) and out.dtype == torch.float64
    assert out.is_contiguous() and (name == "large D" or not out.any())
    if name == "large D": assert out.all()


@every
def test_last_layers_of_branches_start_at_zero(name):
    net = build(name)
    ends = ("conv2.weight", "attention.out.weight", "last.2.weight")
    if isinstance(net, Discriminator) and net.config.kind == "small": ends += ("last.weight",)
    weights = {key: p for key, p in net.named_parameters() if key.endswith(".weight") and p.ndim > 1}
    at_zero = {key for key, p in weights.items() if not p.any()}
    assert at_zero == {key for key in weights if key.endswith(ends)}


def test_attention_starts_with_a_tenth_of_the_variance():
    net = build("tiny")
    for stage in (net.middle[0], net.up[1]):
        weight = stage.attention.qkv.weight                      # 16 to 3 x 16, uniform
        assert 0.9*(0.3/16)**0.5 < weight.abs().max() <= (0.3/16)**0.5


def test_styles_start_at_one_and_zero():
    for m in build("digits").modules():
        if isinstance(m, AdaGN):
            gamma, beta = m.style.bias.chunk(2)
            assert (gamma == 1).all() and not beta.any() and m.style.weight.any()


# --- the whole networks, written out

def waves(t, dim):
    f = 10_000**(-torch.arange(dim//2, dtype=t.dtype)/(dim//2 - 1))
    return torch.cat([(1000*t[:, None]*f).sin(), (1000*t[:, None]*f).cos()], 1)


class ByHand:
    "Forward passes from the weights' names and the paper's description alone."
    def __init__(self, net): self.w, self.c = net.state_dict(), net.config

    def linear(self, name, v): return v @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def conv(self, name, h):
        weight = self.w[f"{name}.weight"]
        return F.conv2d(h, weight, self.w.get(f"{name}.bias"), padding=weight.shape[2]//2)

    def norm(self, h):
        rows = h.unflatten(1, (min(h.shape[1]//4, 32), -1)).flatten(2)
        rows = (rows - rows.mean(2, keepdim=True))/(rows.var(2, correction=0, keepdim=True) + 1e-6).sqrt()
        return rows.reshape(h.shape)

    def affine(self, name, h):
        weight, bias = (self.w[f"{name}.{part}"][None, :, None, None] for part in ("weight", "bias"))
        return self.norm(h)*weight + bias

    def ada(self, name, h, s):
        both = self.linear(f"{name}.style", s)[..., None, None]
        return self.norm(h)*both[:, :h.shape[1]] + both[:, h.shape[1]:]

    def block(self, name, h, emb, s, resize=lambda v: v):
        inner = self.conv(f"{name}.conv1", resize(F.silu(self.ada(f"{name}.norm1", h, s))))
        inner = inner + self.linear(f"{name}.emb", emb)[..., None, None]
        inner = self.conv(f"{name}.conv2", F.silu(self.ada(f"{name}.norm2", inner, s)))
        past = resize(h)
        if f"{name}.shortcut.weight" in self.w: past = self.conv(f"{name}.shortcut", past)
        return (past + inner)/math.sqrt(2)

    def attention(self, name, h):
        qkv = self.linear(f"{name}.qkv", self.affine(f"{name}.norm", h).flatten(2).mT)
        q, k, v = qkv.chunk(3, 2)
        looks = (q @ k.mT/math.sqrt(h.shape[1])).softmax(2)
        return (h + self.linear(f"{name}.out", looks @ v).mT.reshape(h.shape))/math.sqrt(2)

    def embed(self, width, t, y, act):
        emb = self.linear("time.second", act(self.linear("time.first", waves(t, width))))
        if self.c.n_labels: emb = emb + self.w["label.table.weight"][y + 1]
        return act(emb)

    def generator(self, x, z, t, y):
        c, s = self.c, z/(z.pow(2).mean(1, keepdim=True) + 1e-8).sqrt()
        for i in range(1 + c.z_layers): s = F.silu(self.linear(f"mapping.layers.{i}", s))
        emb, h, p, i = self.embed(c.width, t, y, F.silu), self.conv("first", x), x, 0
        kept, rows = [h], [c.size//2**k for k in range(len(c.mult))]
        for level in rows:
            for _ in range(c.blocks):
                h = self.block(f"down.{i}.block", h, emb, s)
                if level in c.attn: h = self.attention(f"down.{i}.attention", h)
                kept.append(h); i += 1
            if level == rows[-1]: break
            h = self.block(f"down.{i}.block", h, emb, s, lambda v: upfirdn(v, down=2))
            weight, bias = (self.w[f"down.{i}.pyramid.conv.{part}"] for part in ("weight", "bias"))
            p = h = (h + F.conv2d(upfirdn(p, pad=(2, 2)), weight, bias, stride=2))/math.sqrt(2)
            kept.append(h); i += 1
        h = self.attention("middle.0.attention", self.block("middle.0.block", h, emb, s))
        h, i = self.block("middle.1.block", h, emb, s), 0
        for level in reversed(rows):
            for _ in range(c.blocks + 1):
                h = self.block(f"up.{i}.block", torch.cat([h, kept.pop()], 1), emb, s); i += 1
            if level in c.attn: h = self.attention(f"up.{i - 1}.attention", h)
            if level < c.size:
                h = self.block(f"up.{i - 1}.up", h, emb, s, lambda v: upfirdn(v, up=2, pad=(2, 1)))
        return self.conv("last.2", F.silu(self.affine("last.0", h))).tanh()

    def discriminator(self, x_u, x_t, t, y):
        c, act = self.c, lambda v: torch.where(v > 0, v, 0.2*v)
        emb = self.embed(c.t_width, t, y, act)
        h, i = self.conv("first", torch.cat([x_u, x_t], 1)), 0
        while h.shape[2] > 4 or i == 0:
            half = (lambda v: v) if c.kind == "small" and i == 0 else lambda v: upfirdn(v, down=2)
            inner = self.linear(f"blocks.{i}.emb", emb)[..., None, None]
            inner = inner + self.conv(f"blocks.{i}.conv1", act(h))
            inner = self.conv(f"blocks.{i}.conv2", half(act(inner)))
            h, i = (self.conv(f"blocks.{i}.shortcut", half(h)) + inner)/math.sqrt(2), i + 1
        if c.group:
            n = len(h)//min(c.group, len(h))
            spread = [(h[r % n::n].var(0, correction=0) + 1e-8).sqrt().mean() for r in range(len(h))]
            h = torch.cat([h, torch.stack(spread)[:, None, None, None].expand_as(h[:, :1])], 1)
        return self.linear("score", act(self.conv("last", h)).sum((2, 3)))[:, 0]


@generators
def test_generator_written_out(name):
    net = awake(build(name))
    x = inputs(net)
    assert net(*x).std() > 0.01 and net(*x).abs().max() <= 1
    assert_close(net(*x), ByHand(net).generator(*x))


@judges
@pytest.mark.parametrize("rows", [1, 3, 4, 8])
def test_discriminator_written_out(name, rows):
    net = awake(build(name))
    x = inputs(net, rows)
    assert_close(net(*x), ByHand(net).discriminator(*x))


# --- rows, inputs

@generators
def test_rows_of_a_generator_do_not_mix(name):
    net = awake(build(name))
    batch = inputs(net)
    out = net(*batch)
    assert torch.equal(net(*batch), out)
    for i in range(4): assert_close(net(*take(batch, slice(i, i + 1))), out[i:i+1])
    assert_close(net(batch[0].to(memory_format=torch.channels_last), *batch[1:]), out)


@judges
def test_rows_of_a_discriminator_mix_in_their_group_only(name):
    net = awake(build(name))
    batch = inputs(net, rows=8)
    out = net(*batch)
    assert torch.equal(net(*batch), out)
    alone = torch.cat([net(*take(batch, slice(i, i + 1))) for i in range(8)])
    assert torch.allclose(alone, out) == (net.config.group == 0)
    for i in range(2): assert_close(net(*take(batch, slice(i, None, 2))), out[i::2])   # the groups of 8 rows
    wide = [v.to(memory_format=torch.channels_last) for v in batch[:2]]
    assert_close(net(*wide, *batch[2:]), out)


def test_spread_is_a_standard_deviation():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    assert_close(batch_spread(3*x + 1, 4), 3*batch_spread(x, 4), rtol=1e-6, atol=0)
    assert batch_spread(x.bfloat16(), 4).dtype == torch.bfloat16
    small = (x*1e-4).half()                                      # whose squares are 0 in half precision
    assert_close(batch_spread(small, 4).double(), batch_spread(small.double(), 4), rtol=0.01, atol=0)


@pytest.mark.parametrize("name", ["digits", "tiny", "digits, D", "small D"])
def test_every_input_is_heard_and_no_label_is_minus_one(name):
    net = awake(build(name))
    batch = inputs(net)
    for i, v in enumerate(batch):
        other = [*batch[:i], (v + 2) % 3 if i == 3 else v.flip(0), *batch[i + 1:]]
        assert (net(*other) - net(*batch)).abs().max() > 1e-3
    assert torch.equal(net(*batch[:3]), net(*batch[:3], torch.full((4,), -1)))


def test_dropout_only_in_training():
    net = awake(NCSNpp(replace(TINY, dropout=0.5)))
    batch = inputs(net)
    assert torch.equal(net(*batch), net(*batch))
    net.train()
    assert not torch.allclose(net(*batch), net(*batch))


# --- derivatives

@every
def test_gradients_reach_every_weight(name):
    "A layer that starts at 0 hides what stands before it; after a few steps nothing is hidden."
    net = build(name)
    batch = inputs(net, 8, dtype=torch.float32)
    opt = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(5):
        opt.zero_grad()
        (net(*batch) - 0.5).square().mean().backward()
        opt.step()
    assert not [key for key, p in net.named_parameters() if p.grad is None or not p.grad.any()]


@pytest.mark.parametrize("change", [dict(), dict(group=0), dict(size=16, kind="large")], ids=str)
def test_gradient_of_the_squared_gradient(change):
    """R1's slope along a random way through the weights and x_t, against finite differences.

    The squared gradient jumps where an activation crosses 0: few channels and a tiny step let none do so."""
    net = awake(Discriminator(replace(SMALL, width=1, **change)))
    x_u, x_t, t, y = inputs(net)
    weights, step = [*net.parameters(), x_t.requires_grad_()], 1e-8
    torch.manual_seed(2)
    way = [torch.randn_like(p) for p in weights]

    def penalty():
        x = x_u.clone().requires_grad_()
        return torch.autograd.grad(net(x, x_t, t, y).sum(), x, create_graph=True)[0].square().sum()

    def move(by):
        with torch.no_grad():
            for p, d in zip(weights, way): p += by*d

    slopes = torch.autograd.grad(penalty(), weights, allow_unused=True, materialize_grads=True)
    wanted = sum((s*d).sum() for s, d in zip(slopes, way))
    move(step); high = penalty()
    move(-2*step); low = penalty()
    assert_close((high - low)/(2*step), wanted, rtol=1e-5, atol=0)
    heard = {key for (key, _), s in zip(net.named_parameters(), slopes) if s.any()}
    assert {"score.weight", "last.weight", "first.weight", "blocks.0.conv2.weight"} <= heard


@pytest.mark.parametrize("name", ["tiny", "small D", "D of single rows"])
def test_compiles_to_one_graph(name):
    net = awake(build(name))
    batch = inputs(net)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = torch.compile(net, fullgraph=True, backend="aot_eager")(*batch)
        grad, = torch.autograd.grad(out.sum(), net.first.weight)
    assert_close(out, net(*batch))
    assert_close(grad, torch.autograd.grad(net(*batch).sum(), net.first.weight)[0])


@pytest.mark.parametrize("name", ["digits", "digits, D", "large D"])
def test_autocast(name):
    net = awake(build(name)).float()
    batch = inputs(net, dtype=torch.float32)
    exact = net(*batch)
    with torch.autocast("cpu", torch.bfloat16): mixed = net(*batch)
    assert (mixed.float() - exact).abs().max() < 0.15*exact.abs().max()


# --- records

@every
def test_config_survives_json_and_rebuilds_the_network(name):
    net = awake(build(name))
    config = type(net.config)(**json.loads(json.dumps(asdict(net.config))))
    assert config == net.config and hash(config) == hash(net.config)
    again = type(net)(config).double().eval()
    again.load_state_dict(safetensors.torch.load(safetensors.torch.save(net.state_dict())))
    assert torch.equal(again(*inputs(net)), net(*inputs(net)))


@pytest.mark.parametrize("change, words", [
    (dict(size=9), "a multiple of 2"), (dict(attn=(16,)), r"have \[8, 4\]"), (dict(mult=()), "start at 1"),
    (dict(blocks=0), "start at 1"), (dict(width=7), "an even one"), (dict(z_width=0), "z_width start at 1"),
    (dict(z_layers=-1), "at 0"),
])
def test_bad_generator_is_one_sentence(change, words):
    with pytest.raises(BadInput, match=words) as error: replace(TINY, **change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (dict(size=12), "use 8, 16"), (dict(size=4), "use 8, 16"), (dict(kind="medium"), "small, large"),
    (dict(width=0), "start at 1"), (dict(t_width=3), "in pairs"), (dict(group=1), "2 or more"),
    (dict(group=-4), "2 or more"), (dict(n_labels=-1), "n_labels at 0"),
])
def test_bad_discriminator_is_one_sentence(change, words):
    with pytest.raises(BadInput, match=words) as error: replace(SMALL, **change)
    assert "\n" not in str(error.value)


BAD = [
    ("tiny", lambda x, z, t, y: (x[:, :2], z, t, y), r"takes \(B, 3, 8, 8\)"),
    ("tiny", lambda x, z, t, y: (x, z[:, :4], t, y), r"of shape \(4, 5\)"),
    ("tiny", lambda x, z, t, y: (x, z[:2], t, y), "as z for a batch of 4"),
    ("tiny", lambda x, z, t, y: (x, t, z, y), "as times for a batch of 4"),
    ("tiny", lambda x, z, t, y: (x, z.long(), t, y), "int64"),
    ("tiny", lambda x, z, t, y: (x, 0.5, t, y), "a float as z"),
    ("tiny", lambda x, z, t, y: (x, z, 0.5, y), "a float as times"),
    ("tiny", lambda x, z, t, y: (x, z, t, y + 3), "0 to 2"),
    ("one level", lambda x, z, t, y: (x, z, t, torch.zeros(4, dtype=torch.long)), "built without"),
    ("small D", lambda a, b, t, y: (a, b[:, :1], t, y), r"takes \(B, 2, 8, 8\)"),
    ("small D", lambda a, b, t, y: (a[:1], b, t, y), "cleaner and noisier images have shapes"),
    ("small D", lambda a, b, t, y: (a, b, t[:1], y), "as times for a batch of 4"),
    ("small D", lambda a, b, t, y: (a, b, t, y + 3), "0 to 2"),
    ("small D", lambda *batch: [torch.cat([v, v[:2]]) for v in batch], "of 6 cannot be cut into groups of 4"),
]


@pytest.mark.parametrize("name, bad, words", BAD, ids=[f"{name}: {words}" for name, _, words in BAD])
def test_bad_input_is_one_sentence(name, bad, words):
    net = build(name).double()
    with pytest.raises(BadInput, match=words) as error: net(*bad(*inputs(net)))
    assert "\n" not in str(error.value)
