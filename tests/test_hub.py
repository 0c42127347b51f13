"Weights of diffusers say the same here, ours say the same there, and what cannot be moved is one sentence."
import json, sys, types
from contextlib import chdir
from dataclasses import replace

import pytest, safetensors.torch, torch
from torch import nn
from torch.testing import assert_close

from fastdiff_edu import hub, layout
from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.denoiser import Clipped, Denoiser
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.run import TrainConfig
from fastdiff_edu.sample import ddim_step, ddpm_step, sample, sample_last
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.train import fit, load_checkpoint

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning")   # theirs, about numpy and themselves
              for kind in ("Deprecation", "User", "Future")]

SMALL = UNetConfig(size=8, width=16, mult=(1, 2), blocks=1, attn=(4,), dropout=0., groups=4)
CONFIGS = {
    "8x8": SMALL,
    "16x16, two blocks": UNetConfig(size=16, width=8, mult=(1, 1, 2), blocks=2, attn=(16, 4), groups=2),
    "no attention": UNetConfig(size=16, in_ch=1, width=8, mult=(1, 3), blocks=2, attn=(), groups=4),
    "one level": UNetConfig(size=8, width=8, mult=(1,), blocks=1, attn=(8,), groups=4),
    "heads": UNetConfig(size=16, width=8, mult=(1, 2, 2), blocks=1, attn=(8, 4), groups=4, heads=4),
    "scale and shift": replace(SMALL, scale_shift=True, out_ch=6),
    "resizing blocks": replace(SMALL, mult=(1, 2, 2), attn=(8, 2), resample="block"),
    "progressive distillation": UNetConfig(size=16, width=16, mult=(1, 1, 1), blocks=2, attn=(8, 4), groups=8,
                                           scale_shift=True, resample="block"),
    "labels": replace(SMALL, n_labels=3),
    "all of it": UNetConfig(size=16, out_ch=6, width=16, mult=(1, 2), blocks=1, attn=(8,), groups=4, heads=2,
                            scale_shift=True, resample="block", n_labels=5),
}
every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
DDPM = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000}
LABELS = (0, 17, 999)


def scheduler_of(config): return DDPM | (dict(variance_type="learned_range") if config.out_ch else {})


def awake(net, seed=0):
    "The same network with numbers where it starts at 0."
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=0.1, generator=seeded(seed))
    return net.eval().requires_grad_(False)


def ours(config=SMALL, schedule=None, kind="eps", **how):
    torch.manual_seed(0)
    return Denoiser(awake(UNet(config)), schedule or Schedule.linear(), kind, **how)


@pytest.fixture
def wide(monkeypatch):
    "Their time features in float64: what that module calls float32 is that here; no formula changes."
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    names = vars(torch) | {"float32": torch.float64}
    monkeypatch.setattr(embeddings, "torch", types.SimpleNamespace(**names))


def theirs(config=SMALL, **how):
    "A network of the library with random weights, by its own constructor."
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    block, attended = config.resample == "block", config.levels[-1][1]
    plain = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if block else ("DownBlock2D", "UpBlock2D")
    attn = [rows in config.attn for rows, _ in config.levels]
    shape = dict(
        sample_size=config.size, in_channels=config.in_ch, out_channels=config.out_ch or config.in_ch,
        layers_per_block=config.blocks, block_out_channels=[ch for _, ch in config.levels],
        down_block_types=["AttnDownBlock2D" if a else plain[0] for a in attn], norm_num_groups=config.groups,
        up_block_types=["AttnUpBlock2D" if a else plain[1] for a in reversed(attn)], norm_eps=1e-6,
        attention_head_dim=None if config.heads == 1 else attended // config.heads,
        resnet_time_scale_shift="scale_shift" if config.scale_shift else "default",
        attn_norm_num_groups=config.groups if config.scale_shift else None,
        downsample_type="resnet" if block else "conv", upsample_type="resnet" if block else "conv",
        num_class_embeds=config.n_labels or None,
        downsample_padding=0, flip_sin_to_cos=False, freq_shift=1, dropout=config.dropout)
    net = diffusers.UNet2DModel(**shape | how)
    for k, p in net.named_parameters():
        if "norm" in k: nn.init.normal_(p, 1., 0.2)   # else they are all alike
    return net.eval().requires_grad_(False)


def same(net, other, tol, dtype=torch.float64, labels=LABELS):
    "Our network at t = i / 1000 says what theirs says at label i - 1."
    c = net.config
    x = torch.randn(len(labels), c.in_ch, c.size, c.size, generator=seeded(1), dtype=dtype)
    label = torch.tensor(labels)
    y = torch.arange(len(labels)) % c.n_labels if c.n_labels else None
    a, b = net.to(dtype)(x, (label + 1).to(dtype) / 1000, y), other.to(dtype)(x, label, y).sample
    assert b.std() > 0.01
    assert_close(a, b, rtol=0, atol=tol)
    return a


# --- from there to here

@every
def test_their_weights_say_the_same_here(config, tmp_path):
    net = theirs(config)
    net.save_pretrained(tmp_path)
    model = hub.load_unet(tmp_path, scheduler=scheduler_of(config))
    assert model.net.config == config and model.kind == "eps" and not model.net.training
    same(model.net, net, 1e-5, torch.float32)


@every
def test_they_say_the_same_in_float64(config, tmp_path, wide):
    "The weights that arrive are rounded to float32 once, after the rotation; the rest is exact."
    net = theirs(config)
    net.save_pretrained(tmp_path)
    same(hub.load_unet(tmp_path, scheduler=scheduler_of(config)).net, net, 3e-8)


def test_rotation_is_exact_without_rounding(wide):
    "In float64 throughout, at labels all over the table."
    net, other = UNet(SMALL), theirs().double()
    state, where = other.state_dict(), layout.places(SMALL)
    full = {k: torch.cat([state[name] for name in layout.their_keys(k, where)]) for k in net.state_dict()}
    net.double().load_state_dict(full | {"time.first.weight": layout.turned(full["time.first.weight"], 1)})
    same(net.eval(), other, 1e-11, labels=range(0, 1000, 27))


def test_cosines_first_is_unfolded(tmp_path):
    net = theirs(flip_sin_to_cos=True)
    net.save_pretrained(tmp_path)
    same(hub.load_unet(tmp_path, scheduler={}).net, net, 1e-5, torch.float32)


def saved_as(folder, net, name, rename=lambda k: k):
    "Their weights in a file of this name, under other keys, beside their configuration."
    net.save_config(folder)
    state = {rename(k): v for k, v in net.state_dict().items()}
    save = torch.save if name.endswith(".bin") else safetensors.torch.save_file
    save(state, folder/name)


def old_name(key):
    for now, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        key = key.replace(f".{now}.", f".{before}.")
    return key


@pytest.mark.parametrize("name", hub.WEIGHTS)
@pytest.mark.parametrize("rename", [old_name, lambda k: k], ids=["old names", "new names"])
def test_both_files_and_both_kinds_of_names(name, rename, tmp_path):
    net = theirs()
    saved_as(tmp_path, net, name, rename)
    same(hub.load_unet(tmp_path, scheduler={}).net, net, 1e-5, torch.float32)


def test_published_cifar10_configuration():
    published = dict(
        _class_name="UNet2DModel", _diffusers_version="0.0.4", act_fn="silu", attention_head_dim=None,
        block_out_channels=[128, 256, 256, 256], center_input_sample=False, downsample_padding=0,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        flip_sin_to_cos=False, freq_shift=1, in_channels=3, layers_per_block=2, mid_block_scale_factor=1,
        norm_eps=1e-6, norm_num_groups=32, out_channels=3, sample_size=32, time_embedding_type="positional",
        up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])
    config = layout.config_from(published)
    assert config == replace(UNetConfig.ddpm_cifar10(), dropout=0.)
    with torch.device("meta"): net = UNet(config)
    assert sum(p.numel() for p in net.parameters()) == 35_746_307
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"): other = diffusers.UNet2DModel.from_config(published)
    with torch.device("meta"): wanted = layout.to_theirs(net)
    assert {k: v.shape for k, v in wanted.items()} == {k: v.shape for k, v in other.state_dict().items()}


def test_defaults_are_theirs():
    "A setting that an old file leaves out has the default of the library."
    diffusers = pytest.importorskip("diffusers")
    config = diffusers.UNet2DModel(block_out_channels=(32, 64, 64, 64)).config
    assert {k: config[k] for k in layout.DEFAULTS} == layout.DEFAULTS
    scheduler = diffusers.DDPMScheduler().config
    assert {k: scheduler[k] for k in hub.SCHEDULE if k[0] != "_"} == \
           {k: v for k, v in hub.SCHEDULE.items() if k[0] != "_"}


@pytest.mark.parametrize("how", [
    {}, dict(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction"),
    dict(trained_betas=[0.001 + 0.00001 * i for i in range(1000)], prediction_type="sample"),
    dict(beta_start=0.001, beta_end=0.01, variance_type="fixed_large"),
], ids=["linear", "cosine", "a table", "other ends"])
def test_their_schedulers_tables(how, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(**how)
    diffusers.DDPMPipeline(theirs(), scheduler).save_pretrained(tmp_path)
    for folder in (tmp_path, tmp_path/"unet"):   # the pipeline's folder, or the network's in it
        model = hub.load_unet(folder)
        t = torch.arange(1, 1001, dtype=torch.float64) / 1000
        gap = model.schedule.log_snr(t) - torch.logit(scheduler.alphas_cumprod.double())
        assert gap.abs()[:-1].max() < 2e-3   # theirs is rounded to float32
        assert model.kind == {"sample": "x0", "v_prediction": "v"}.get(how.get("prediction_type"), "eps")


def test_learned_variances(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    net, scheduler = theirs(replace(SMALL, out_ch=6)), diffusers.DDPMScheduler(variance_type="learned_range")
    diffusers.DDPMPipeline(net, scheduler).save_pretrained(tmp_path)
    model = hub.load_unet(tmp_path)
    x = torch.randn(2, 3, 8, 8, generator=seeded(0))
    assert model.learned_var and model(x, 0.5).var_frac.shape == x.shape
    a = scheduler.step(net(x, 499).sample, 499, x, generator=seeded(2)).prev_sample
    b = ddpm_step("learned")(Clipped(model), x, 0.5, 0.499, seeded(2))
    assert_close(a, b, rtol=0, atol=1e-4)
    with pytest.raises(BadInput, match="6 channels of 3"): hub.load_unet(tmp_path/"unet", scheduler={})


def test_what_comes_back_samples(tmp_path):
    theirs().save_pretrained(tmp_path)
    model = hub.load_unet(tmp_path, scheduler={})
    x = torch.randn(2, 3, 8, 8, generator=seeded(0))
    assert sample_last(ddim_step(), model, x, model.schedule.grid(5)).isfinite().all()


# --- from here to there

@every
def test_ours_say_the_same_there(config, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = ours(config, learned_var=bool(config.out_ch))
    hub.export_unet(model, tmp_path/"pipeline")
    for kind in (diffusers.DDPMPipeline, diffusers.DDIMPipeline):
        pipeline = kind.from_pretrained(tmp_path/"pipeline")
        same(model.net, pipeline.unet, 1e-5, torch.float32)


@pytest.mark.parametrize("n", [1, 8, 20])
@pytest.mark.parametrize("schedule, kind", [
    (Schedule.linear(), "eps"), (Schedule.cosine_iddpm(), "v"), (Schedule.vp(), "x0")],
    ids=["eps", "v", "x0"])
def test_whole_ddim_walk(schedule, kind, n, tmp_path):
    "Their 'trailing' steps are our grid where n divides 1000: state by state, and the pipeline's picture."
    diffusers = pytest.importorskip("diffusers")
    model = ours(schedule=schedule, kind=kind)
    hub.export_unet(model, tmp_path/"pipeline")
    pipeline = diffusers.DDIMPipeline.from_pretrained(tmp_path/"pipeline")
    pipeline.set_progress_bar_config(disable=True)
    x = torch.randn(2, 3, 8, 8, generator=seeded(3))
    pipeline.scheduler.set_timesteps(n)
    grid = schedule.grid(n)
    assert_close((pipeline.scheduler.timesteps + 1) / 1000, grid[:-1].float())
    states, state = list(sample(ddim_step(), Clipped(model), x, grid)), x
    tol = 2e-5 / schedule.alpha(1.) if kind == "eps" else 1e-3   # the first guess of x0 is divided by alpha
    for label, wanted in zip(pipeline.scheduler.timesteps, states[1:], strict=True):
        out = pipeline.unet(state, label).sample
        state = pipeline.scheduler.step(out, label, state, use_clipped_model_output=True).prev_sample
        assert_close(state, wanted, rtol=0, atol=tol)
    drawn = pipeline(batch_size=2, generator=seeded(3), num_inference_steps=n, output_type="pt",
                     use_clipped_model_output=True).images
    assert_close(drawn, (states[-1] / 2 + 0.5).clamp(0, 1), rtol=0, atol=tol)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_there_and_back(kind, tmp_path):
    model = ours(schedule=Schedule.cosine(), kind=kind)
    again = hub.load_unet(hub.export_unet(model, tmp_path/"pipeline"))
    assert again.kind == kind and again.net.config == model.net.config
    for k, v in model.net.state_dict().items(): assert_close(again.net.state_dict()[k], v, rtol=0, atol=1e-6)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert_close(again.schedule.log_snr(t), model.schedule.log_snr(t), rtol=0, atol=1e-9)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_variance_and_version_are_written(variance, tmp_path):
    hub.export_unet(ours(), tmp_path/"pipeline", variance=variance)
    read = lambda name: json.loads((tmp_path/"pipeline"/name).read_text())
    assert read("scheduler/scheduler_config.json")["variance_type"] == f"fixed_{variance}"
    assert read("model_index.json")["_class_name"] == "DDPMPipeline"
    assert read("unet/config.json")["_diffusers_version"] == layout.VERSION


# --- the card

def test_card_says_what_is_known_and_no_more(tmp_path):
    folder = hub.export_unet(ours(), tmp_path/"plain")
    text = (folder/"README.md").read_text()
    assert text.startswith("---\nlibrary_name:") and text.count("not given") == 5 and "license" not in text
    card = hub.Card("Eights", data="digits", data_licence="CC BY 4.0", licence="mit", numbers=(
        dict(name="Frechet distance", value=1.5, protocol=dict(samples=50, seed=3)),))
    text = (hub.export_unet(ours(), tmp_path/"full", card)/"README.md").read_text()
    for words in ("# Eights", "Data: digits", "CC BY 4.0", 'license: "mit"', "Frechet distance: 1.5",
                  '"samples": 50', "Schedule.linear(1000", '"sha256"'): assert words in text, words
    assert text.count("not given") == 1   # the recipe


@pytest.mark.parametrize("number", [dict(name="FID", value=3.2), dict(name="FID", value=3.2, protocol={})])
def test_a_number_without_protocol_is_refused(number):
    with pytest.raises(BadInput, match="its protocol"): hub.Card(numbers=(number,))


def test_recipe_of_a_checkpoint(tmp_path):
    def loss_fn(net, x, generator=None): return net(x, torch.full((len(x),), 0.5)).square().mean()
    loss_fn.facts = dict(schedule=str(Schedule.linear()), kind="eps")
    cfg = TrainConfig(steps=2, batch=2, warmup=0, bar=False)
    fit(loss_fn, UNet(SMALL), torch.randn(4, 3, 8, 8), cfg, tmp_path/"run")
    ckpt = load_checkpoint(tmp_path/"run")
    recipe = hub.recipe_of(ckpt)
    assert recipe["step"] == 2 and recipe["config"]["lr"] == cfg.lr and recipe["loss"] == loss_fn.facts
    assert recipe["sha256"] == ckpt.manifest["files"]["ema.safetensors"]["sha256"]
    bare = load_checkpoint(ckpt.path/"ema.safetensors")
    with pytest.raises(BadInput, match="bare file"): hub.recipe_of(bare)


# --- what goes wrong

REFUSED = [
    dict(act_fn="relu"), dict(resnet_time_scale_shift="spatial"), dict(attention_head_dim=24),
    dict(mid_block_scale_factor=1.41), dict(center_input_sample=True), dict(class_embed_type="identity"),
    dict(class_embed_type="timestep"), dict(norm_eps=1e-5), dict(downsample_padding=1), dict(freq_shift=0),
    dict(time_embedding_type="fourier"), dict(time_embedding_dim=99), dict(add_attention=False),
    dict(mid_block_type=None), dict(upsample_type="resnet"),
    dict(down_block_types=["SkipDownBlock2D", "AttnDownBlock2D"]),
    dict(up_block_types=["AttnUpBlock2D", "ResnetUpsampleBlock2D"]), dict(attn_norm_num_groups=2),
    dict(up_block_types=["UpBlock2D", "UpBlock2D"]), dict(block_out_channels=[16, 24]),
    dict(attn_norm_num_groups=None, resnet_time_scale_shift="scale_shift"), dict(something_new=True),
]


@pytest.mark.parametrize("change", REFUSED, ids=lambda c: next(iter(c)))
def test_what_ours_cannot_be_is_named(change):
    with pytest.raises(BadInput, match=next(iter(change))) as error:
        layout.config_from(layout.config_to(SMALL) | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [
    dict(attention_head_dim=32), dict(time_embedding_dim=64), dict(attn_norm_num_groups=4),
    dict(something_new=None), dict(num_train_timesteps=1000), dict(flip_sin_to_cos=True),
    dict(mid_block_scale_factor=1.0), dict(attn_norm_num_groups=None), dict(downsample_type="conv")],
    ids=lambda c: next(iter(c)))
def test_the_same_in_other_words_is_taken(change):
    assert layout.config_from(layout.config_to(SMALL) | change) == SMALL


@pytest.mark.parametrize("change, words", [
    (dict(downsample_type="pool"), "_type = "), (dict(upsample_type="conv"), "upsample_type = conv"),
    (dict(downsample_type="conv"), "upsample_type = resnet"), (dict(num_class_embeds=3.5), "no sense"),
    (dict(attention_head_dim=5), "head_dim = 5"), (dict(attention_head_dim=64), "head_dim = 64"),
    (dict(down_block_types=["AttnDownBlock2D", "DownBlock2D"]), "down_block_types")])
def test_where_attention_halves_it_says_how(change, words):
    c = UNetConfig(size=8, width=16, mult=(1, 1), blocks=1, attn=(8, 4), heads=2, groups=4, resample="block")
    change = dict(down_block_types=["AttnDownBlock2D", "AttnDownBlock2D"]) | change
    with pytest.raises(BadInput, match=words): layout.config_from(layout.config_to(c) | change)


@pytest.mark.parametrize("types", [("conv", "conv"), ("resnet", "conv"), ("conv", "resnet")])
def test_blocks_that_say_it_by_name_need_no_type(types, tmp_path):
    "Theirs ignore both settings there, and the padding of convolutions that they do not have."
    config = replace(SMALL, attn=(), resample="block")
    net = theirs(config, downsample_type=types[0], upsample_type=types[1], downsample_padding=1)
    net.save_pretrained(tmp_path)
    model = hub.load_unet(tmp_path, scheduler={})
    assert model.net.config == config
    same(model.net, net, 1e-5, torch.float32)


def test_labels_keep_their_numbers_and_none_is_nothing(tmp_path):
    "Class k is label k; -1 has no counterpart, and adds nothing here."
    net = theirs(replace(SMALL, n_labels=3))
    net.save_pretrained(tmp_path)
    ours = hub.load_unet(tmp_path, scheduler={}).net
    x, label = torch.randn(3, 3, 8, 8, generator=seeded(1)), torch.tensor([5, 500, 999])
    for k in range(3):
        y = torch.full((3,), k)
        assert_close(ours(x, (label + 1) / 1000, y), net(x, label, y).sample, rtol=0, atol=1e-5)
    net.class_embedding.weight.zero_()
    assert_close(ours(x, (label + 1) / 1000), net(x, label, torch.zeros(3).long()).sample, rtol=0, atol=1e-5)


def test_labels_are_exported_and_their_card_says_how_to_ask(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    model = ours(replace(SMALL, n_labels=3))
    folder = hub.export_unet(model, tmp_path/"pipeline")
    text = (folder/"README.md").read_text()
    assert "3 class labels" in text and "unconditional" not in text and "DDPMPipeline" not in text
    net = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    same(model.net, net, 1e-5, torch.float32)
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    with pytest.raises(ValueError, match="class_labels"): pipeline(num_inference_steps=1)


@pytest.mark.parametrize("change, words", [
    (dict(_class_name="UNet2DConditionModel"), "Only a UNet2DModel"),
    (dict(_class_name=None), "Only a UNet2DModel"),
    (dict(sample_size=None), "no sense"), (dict(block_out_channels=[]), "no sense"),
    (dict(block_out_channels="wide"), "no sense"), (dict(down_block_types=None), "no sense"),
    (dict(norm_num_groups=5), "groups"), (dict(sample_size=9), "halved"),
])
def test_a_configuration_that_cannot_be(change, words):
    with pytest.raises(BadInput, match=words) as error: layout.config_from(layout.config_to(SMALL) | change)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, words", [
    (dict(num_train_timesteps=4000), "4000"), (dict(rescale_betas_zero_snr=True), "rescale_betas"),
    (dict(beta_schedule="scaled_linear"), "beta_schedule"),
    (dict(trained_betas=[0.5] * 999), "no 1000 numbers"), (dict(beta_end="much"), "no 1000 numbers"),
    (dict(trained_betas=[0.5] * 999 + [1.0]), "no 1000"), (dict(trained_betas=[0.1, 0.2]), "no 1000"),
    (dict(_class_name="ScoreSdeVeScheduler"), "scheduler"), (dict(prediction_type="flow"), "prediction_type"),
])
def test_a_scheduler_that_cannot_be(change, words, tmp_path):
    folder = hub.export_unet(ours(), tmp_path/"pipeline")
    with pytest.raises(BadInput, match=words): hub.load_unet(folder, scheduler=change)


class Trap:
    "What a pickle can hold: a program that runs when the file is read."
    def __reduce__(self): return (print, ("the trap has sprung",))


def spoil(file, how):
    if how == "gone": file.unlink()
    elif how == "empty": file.write_bytes(b"")
    elif how == "cut": file.write_bytes(file.read_bytes()[:-7])
    elif how == "a list": file.write_text("[1]")


@pytest.mark.parametrize("how", ["gone", "empty", "cut", "a list"])
@pytest.mark.parametrize("name", ["unet/config.json", "unet/diffusion_pytorch_model.safetensors",
                                  "unet/diffusion_pytorch_model.bin", "scheduler/scheduler_config.json"])
def test_damaged_files_are_one_sentence(name, how, tmp_path):
    with chdir(tmp_path):
        folder = hub.export_unet(ours(), "pipeline")
        if name.endswith(".bin"):
            weights = folder/"unet"/hub.WEIGHTS[0]
            torch.save(safetensors.torch.load_file(weights), folder/name)
            weights.unlink()
        spoil(folder/name, how)
        with pytest.raises(BadInput, match="pipeline") as error: hub.load_unet(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [
    Trap(), {"conv_in.weight": Trap()}, {"conv_in.weight": 3}, [torch.ones(1)]],
    ids=["a trap", "a trap inside", "no tensor", "no dict"])
def test_a_pickle_is_never_run(content, tmp_path, capsys):
    folder = hub.export_unet(ours(), tmp_path/"pipeline")
    (folder/"unet"/hub.WEIGHTS[0]).unlink()
    torch.save(content, folder/"unet"/hub.WEIGHTS[1])
    with pytest.raises(BadInput, match="no whole file of tensors"): hub.load_unet(folder)
    assert "trap" not in capsys.readouterr().out


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("mid_block.attentions.0.to_q.bias"), "to_q.bias is missing there"),
    (lambda s: s.update(extra=torch.ones(1)), "extra is .* there and missing here"),
    (lambda s: s.update({"conv_in.weight": torch.ones(2)}), r"conv_in.weight is \(2,\) there"),
])
def test_foreign_weights_are_named(change, words):
    net = UNet(SMALL)
    state = layout.to_theirs(net)
    change(state)
    with pytest.raises(BadInput, match=words): layout.to_ours(state, net)


def test_what_cannot_be_exported(tmp_path):
    for model, words in [(ours(replace(SMALL, w_waves=8)), "w_waves = 8"), (ours(kind="both"), "both"),
                         (ours(replace(SMALL, attn=(8, 4), heads=2)), r"attention has \[16, 32\]"),
                         (ours(replace(SMALL, mult=(2, 1))), "first level"),
                         (ours(replace(SMALL, width=8, groups=32)), "one number"),
                         (lambda x, t: x, "Only a Denoiser")]:
        with pytest.raises(BadInput, match=words): hub.export_unet(model, tmp_path/"pipeline")
    with pytest.raises(BadInput, match="small"): hub.export_unet(ours(), tmp_path/"pipeline", variance="tiny")
    assert not any(tmp_path.iterdir())


def test_an_export_is_whole_or_absent(tmp_path, monkeypatch):
    def broken(*args): raise KeyboardInterrupt
    monkeypatch.setattr(hub, "card_text", broken)   # when all but the card is written
    with pytest.raises(KeyboardInterrupt): hub.export_unet(ours(), tmp_path/"pipeline")
    assert not any(tmp_path.iterdir())
    monkeypatch.undo()
    (tmp_path/".pipeline.tmp/unet").mkdir(parents=True)   # what a killed export leaves is no obstacle
    hub.export_unet(ours(), tmp_path/"pipeline")
    assert [p.name for p in tmp_path.iterdir()] == ["pipeline"]
    with pytest.raises(BadInput, match="there already"): hub.export_unet(ours(), tmp_path/"pipeline")
    (tmp_path/"file").write_text("")
    with pytest.raises(BadInput, match="file"): hub.export_unet(ours(), tmp_path/"file")
    with pytest.raises(BadInput, match="Cannot write"): hub.export_unet(ours(), tmp_path/"file"/"below")
    (tmp_path/"here").mkdir()
    with chdir(tmp_path/"here"), pytest.raises(BadInput, match="Cannot write"): hub.export_unet(ours(), ".")


# --- the hub, played by the test

def played(monkeypatch, snapshot_download):
    library = types.SimpleNamespace(snapshot_download=snapshot_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)


@pytest.mark.parametrize("file", hub.WEIGHTS)
def test_a_name_is_fetched(file, tmp_path, monkeypatch):
    "Safetensors first; the .bin is asked for only when there are none."
    folder = hub.export_unet(ours(), tmp_path/"pipeline")
    kept = folder/"unet"/hub.WEIGHTS[0]
    state = safetensors.torch.load_file(kept)
    kept.unlink()
    asked = []
    def snapshot_download(name, revision, allow_patterns):
        asked.append((name, revision))
        if f"unet/{file}" in allow_patterns:
            save = torch.save if file.endswith(".bin") else safetensors.torch.save_file
            save(state, folder/"unet"/file)
        return str(folder)
    played(monkeypatch, snapshot_download)
    assert hub.load_unet("someone/something", revision="abc").net.config == SMALL
    assert asked == [("someone/something", "abc")] * (1 + hub.WEIGHTS.index(file))


def test_no_connection_and_no_library(monkeypatch):
    def offline(*args, **how): raise ConnectionError("a long story\nover many lines")
    played(monkeypatch, offline)
    with pytest.raises(BadInput, match="was not fetched .look at the name") as error: hub.load_unet("a/b")
    assert "\n" not in str(error.value)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match="needs huggingface_hub: pip install"): hub.load_unet("a/b")
    with pytest.raises(BadInput, match="There is no"): hub.load_unet("no/such/folder")
    with pytest.raises(BadInput, match="is a file"): hub.load_unet(__file__)
