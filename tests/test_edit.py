"Holes, other labels, words: what chapter 15 cannot test beside its own figures."
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fastdiff_edu.captions import (DESCRIBED, DESCRIBED_ANEW, KINDS, LENGTH, NAMED, NAMED_ANEW, NAMES, PAIRS,
                                   PAIRS_ANEW, TRAINING, WORDS, Captioned, meant, sentences, tokens, words_of)
from fastdiff_edu.core import BadInput, seeded
from fastdiff_edu.data import digits, ring, to_uint8, two_gaussians
from fastdiff_edu.denoiser import Denoiser, diffusion_loss, from_x0
from fastdiff_edu.distill import DistillConfig, progressive_distillation
from fastdiff_edu.edit import (decode, encode, encoding_loss, encoding_target, inpaint_step, renoise,
                               steps_of, translate)
from fastdiff_edu.guidance import ClassifierFree
from fastdiff_edu.guided_distill import GuidedConfig, GuidedDenoiser, guided_student, stage_one
from fastdiff_edu.nets.embeddings import CaptionEmbedding
from fastdiff_edu.nets.mlp import MLP, MLPConfig
from fastdiff_edu.nets.unet import UNet, UNetConfig
from fastdiff_edu.sample import ddim_step, ddpm_step, sample, sample_last
from fastdiff_edu.schedule import Schedule
from fastdiff_edu.solvers import dpmpp_2m_step, heun_step
from fastdiff_edu.train import TrainConfig, fit, train

COSINE = Schedule.cosine()
HEARS = UNetConfig(8, 1, width=8, mult=(1, 2), blocks=1, attn=(), dropout=0., n_words=len(WORDS))
FEW = dict(batch=8, lr=1e-3, warmup=0, ema=0.5, bar=False, save_every=2)


class Says:
    "A model that always says the same."
    schedule = COSINE
    def __init__(self, x0): self.x0, self.asked = x0, []
    def __call__(self, x, t, **cond):
        self.asked.append(t)
        return from_x0(x, self.x0.expand_as(x), t, COSINE)


# --- inpainting

@pytest.mark.parametrize("rule", [ddim_step, ddpm_step, heun_step, dpmpp_2m_step, lambda: ddim_step(0.5)])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_known_pixels_survive(rule, n):
    images = digits("test")
    known, _ = images.batch(torch.arange(6))
    mask = torch.rand(6, 1, 8, 8, generator=seeded(0)) < 0.4
    x = torch.randn(6, 1, 8, 8, generator=seeded(1))
    for r in (1, 3):
        step = inpaint_step(rule(), known, mask, r)
        end = sample_last(step, Says(torch.tensor(0.3)), x, COSINE.grid(n), seeded(2))
        assert end[mask].equal(known[mask]) and not end[~mask].equal(known[~mask])
        assert to_uint8(end)[mask].equal(images.x[:6][mask])


def test_masks_are_broadcast():
    known, x = torch.rand(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    whole = torch.zeros(4, 3, 5, 5, dtype=torch.bool)
    whole[..., 2:] = True
    ends = []
    for mask in (whole, whole[:1], whole[:, :1], whole[0], whole[0, 0], whole[:1, :1, :1]):
        step = inpaint_step(ddim_step(), known, mask)
        ends.append(sample_last(step, Says(torch.tensor(0.)), x, COSINE.grid(3), seeded(0)))
    assert all(end.equal(ends[0]) for end in ends)


def test_a_step_is_repeated_and_only_the_model_is_asked_for_it():
    model, x = Says(torch.tensor(0.)), torch.randn(2, 1, dtype=torch.float64)
    nothing = torch.zeros(1, dtype=torch.bool)
    states = list(sample(inpaint_step(ddim_step(), x, nothing, 4), model, x, COSINE.grid(3), seeded(0)))
    assert model.asked == [t for t in COSINE.grid(3).tolist()[:-1] for _ in range(4)]
    assert len(states) == 4 and states[-1].dtype == torch.float64
    alone = sample_last(ddim_step(), model, x, COSINE.grid(3), seeded(0))
    once = sample_last(inpaint_step(ddim_step(), x, nothing), model, x, COSINE.grid(3), seeded(0))
    torch.testing.assert_close(once, alone, rtol=0, atol=0)      # with nothing known it is the step itself


@pytest.mark.parametrize("mask, words", [
    (torch.zeros(2, 1, 8, 7).bool(), "of their size"), (torch.zeros(3, 1, 8, 8).bool(), "of their size"),
    (torch.zeros(1, 1, 1, 8, 8).bool(), "of their size"), (torch.zeros(2, 1, 8, 8), "give bool"),
    (torch.zeros(2, 1, 8, 8).long(), "give bool")])
def test_wrong_masks_are_one_sentence(mask, words):
    with pytest.raises(BadInput, match=words): inpaint_step(ddim_step(), torch.zeros(2, 1, 8, 8), mask)


def test_pictures_are_floats_as_the_model_sees_them():
    levels, mask = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8), torch.ones(1, dtype=torch.bool)
    with pytest.raises(BadInput, match="give floats"): inpaint_step(ddim_step(), levels, mask)
    for resample in (0, 1.5, True):
        with pytest.raises(BadInput, match="at least once"):
            inpaint_step(ddim_step(), levels/255, mask, resample)
    known, x = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.randn(2, 1, 8, 8)
    step, model = inpaint_step(ddim_step(), known, mask, 2), Says(torch.tensor(0.))
    end = sample_last(step, model, x, COSINE.grid(3), seeded(0))
    assert end.dtype == torch.float32 and end.equal(known.float())


# --- up and down

@pytest.mark.parametrize("schedule", [COSINE, Schedule.linear(), Schedule.vp(), Schedule.cosine_iddpm()])
def test_encoding_target_lands_on_every_schedule(schedule):
    x_t, x_u = torch.randn(2, 32, 3, dtype=torch.float64, generator=seeded(0))
    for t, u in [(0, 1), (0., 0.01), (0.3, 0.8), (0.999, 1.), (torch.zeros(32), 0.05 + 0.9*torch.rand(32)),
                 (torch.linspace(0, 0.9, 32).double(), 1.), (torch.tensor(0.25), torch.tensor(0.5))]:
        eps = encoding_target(x_t, x_u, t, u, schedule)
        model = Denoiser(lambda x, t, e=eps: e, schedule, "eps")
        lands = ddim_step()(model, x_t, t, u)
        torch.testing.assert_close(lands, x_u, rtol=0, atol=1e-4 if torch.is_tensor(t) else 1e-9)


def test_encoding_goes_up():
    x = torch.zeros(2, 1)
    for t, u in [(0.5, 0.5), (0.5, 0.2), (torch.tensor([0.1, 0.5]), torch.tensor([0.2, 0.4]))]:
        with pytest.raises(BadInput, match="does not rise"): encoding_target(x, x, t, u, COSINE)


def test_decode_undoes_encode_in_the_limit():
    mix = ring()
    model, y = mix.denoiser(COSINE), torch.arange(4).repeat(16)
    x0 = torch.cat([mix.sample(64, seeded(0)).double()])
    gaps = [(decode(model, encode(model, x0, n, s, y=y), n, s, y=y) - x0).abs().max()
            for n, s in [(100, 0.7), (200, 0.7), (400, 0.7)]]
    assert gaps[1] < 0.7 * gaps[0] and gaps[2] < 0.7 * gaps[1] and gaps[2] < 0.1


def test_strength_is_a_part_of_the_grid():
    assert [steps_of(4, s) for s in (0.25, 0.5, 1., 1)] == [1, 2, 4, 4] and steps_of(10, 0.3) == 3
    for s in (0.3, 0., -0.25, 1.25, torch.nan):
        with pytest.raises(BadInput, match="multiple of 1/4"): steps_of(4, s)
    model, x, y = Says(torch.tensor(0.)), torch.rand(2, 1), torch.zeros(2).long()
    model.asked.clear()
    translate(model, x, 4, y, y, 0.5, encoder=mixed(model))
    assert model.asked == [0.5, 0.25]                      # a student is asked at times of its own grid alone


def mixed(model):
    "Another model of the same schedule, to walk up with."
    return two_gaussians().denoiser(model.schedule)


def test_w_is_for_the_way_down():
    heard = []
    class Hears(Says):
        def __call__(self, x, t, **cond): heard.append((t, cond)); return super().__call__(x, t)
    x, y = torch.rand(2, 1), torch.zeros(2).long()
    translate(Hears(torch.tensor(0.)), x, 4, y, y + 1, 0.5, encoder=mixed(Says(torch.tensor(0.))), w=2.)
    assert [t for t, _ in heard] == [0.5, 0.25]
    assert all(c["w"] == 2. and (c["y"] == 1).all() for _, c in heard)


def test_students_that_encode_are_taken_up_bit_for_bit(tmp_path):
    points, y = ring().sample_labelled(400, seeded(0))
    teacher = Denoiser(MLP(MLPConfig(width=16, depth=1, n_labels=4)), COSINE, "v")
    cfg = DistillConfig(steps=6, late_steps=6, start=8, end=2, **FEW)
    def climb(out, watch=lambda n, r: None):
        how = dict(out=out, lesson=encoding_loss, watch=watch)
        return list(progressive_distillation(teacher, cfg, (points, y), **how))
    whole = climb(tmp_path/"whole")
    def stop(n, record):
        if (n, record.step) == (2, 3): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): climb(tmp_path/"stopped", stop)
    again = climb(tmp_path/"stopped")
    for a, b in zip(whole, again):
        assert all(p.equal(q) for p, q in zip(a.model.net.parameters(), b.model.net.parameters()))
    for bad in (dict(kind="vv"), dict(weight="none")):
        with pytest.raises(BadInput): encoding_loss(teacher, 2, **bad)
    assert encoding_loss(teacher, 2).facts["encodes"]


@pytest.mark.parametrize("weight", ["simple", "snr_trunc", "snr_plus_1"])
@pytest.mark.parametrize("kind", ["v", "eps"])
def test_the_first_step_up_is_learned(kind, weight):
    "A student of one step is asked at t = 0 alone: a guess of x0, or an error in x0, would teach it nothing."
    slope, x0 = torch.tensor(0.3, requires_grad=True), two_gaussians().sample(64, seeded(0))
    loss = encoding_loss(two_gaussians().denoiser(COSINE), 1, kind, weight)
    loss(lambda x, t: slope * x, x0, seeded(1)).backward()
    assert slope.grad.abs() > 0.01
    for bad in ((kind, "x0"), ("x0", weight), ("both", weight)):
        with pytest.raises(BadInput, match="let it say v or eps"): encoding_loss(None, 1, *bad)


def test_the_lesson_asks_teacher_and_student_with_the_same_labels():
    asked = []
    class Teacher(Says):
        def __call__(self, x, t, y): asked.append(("teacher", t, y)); return super().__call__(x, t)
    def net(x, t, y): asked.append(("student", t, y)); return x
    x0, y, teacher = torch.rand(50, 1), torch.arange(50) % 7, Teacher(torch.tensor(0.2))
    loss = encoding_loss(teacher, 4, drop=0.5)
    loss(net, (x0, y), seeded(0))
    (_, t, first), (_, mid, second), (who, start, third) = asked
    assert who == "student" and start.equal(t) and first.equal(second) and first.equal(third)
    assert (first == -1).any() and (first == y).any() and ((first == -1) | (first == y)).all()
    torch.testing.assert_close(mid - t, torch.full((50,), 1 / 8))
    assert set(t.tolist()) == {0., 0.25, 0.5, 0.75}
    assert loss.facts["steps"] == 4 and loss.facts["teacher"]["steps"] == 8 and loss.facts["drop"] == 0.5


def test_noise_and_strength():
    x = torch.rand(50_000, 1, dtype=torch.float64)
    noise = (renoise(x, 0.4, COSINE, seeded(0)) - COSINE.alpha(0.4) * x) / COSINE.sigma(0.4)
    assert abs(noise.mean()) < 0.02 and abs(noise.var() - 1) < 0.03
    for s in (0., 1.1, -1.):
        with pytest.raises(BadInput, match="more than 0"): renoise(x, s, COSINE)


# --- words

def test_words_are_understood_or_refused():
    assert words_of("A handwritten Seven!") == ["a", "handwritten", "seven"]
    assert tokens("an odd number").shape == (1, LENGTH)
    assert tokens(["seven", "an odd number"])[0, 1:].eq(-1).all()
    wrong = {"a handwritten sevn": "did you mean 'seven'", "a zebra": "Unknown word 'zebra'",
             "": "give words", "a " * 9: "9 words: say it in 8"}
    for caption, words in wrong.items():
        with pytest.raises(BadInput, match=words): tokens(caption)
    with pytest.raises(BadInput): tokens([])


def test_words_mean_what_they_say():
    divisors = lambda k: [d for d in range(1, 10) if k and k % d == 0]
    say = dict(even=lambda k: k % 2 == 0, odd=lambda k: k % 2, small=lambda k: k < 5, large=lambda k: k > 4,
               prime=lambda k: len(divisors(k)) == 2)
    for word, is_so in say.items(): assert meant(f"some {word} number") == {k for k in range(10) if is_so(k)}
    assert [meant(f"a {name}") for name in NAMES] == [{k} for k in range(10)] and set(KINDS) == set(say)
    assert meant("a large even digit") == {6, 8} and meant("a digit") == set(range(10))
    assert meant("the odd two") == set()


def test_every_caption_is_true_and_each_digit_has_all_of_its_own():
    images = digits("train")
    data, table = Captioned(images), {tuple(row): s for row, s in zip(tokens(TRAINING).tolist(), TRAINING)}
    rows = torch.arange(len(images)).repeat(30)
    x, y = data.batch(rows, seeded(0))
    said = [table[tuple(row)] for row in y.tolist()]
    pairs = {(k, s) for k, s in zip(images.y[rows].tolist(), said)}
    assert pairs == {(k, s) for s in TRAINING for k in meant(s)}
    assert x.shape == (len(rows), 1, 8, 8) and len(data) == 1297 and data.facts["captions"] == len(TRAINING)
    again = data.batch(rows, seeded(0))[1]
    assert again.equal(y) and not data.batch(rows, seeded(1))[1].equal(y)


def test_new_phrases_are_understood_by_the_embedding_alone():
    "Trained to tell digits from captions, it knows what new sentences of old words leave."
    torch.manual_seed(0)
    net = nn.Sequential(CaptionEmbedding(len(WORDS), 64), nn.SiLU(), nn.Linear(64, 10))
    leaves = lambda s: torch.tensor([[float(k in meant(c)) / len(meant(c)) for k in range(10)] for c in s])
    words, goal, adam = tokens(TRAINING), leaves(TRAINING), torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(300):
        adam.zero_grad()
        cross_entropy(net(words), goal).backward()
        adam.step()
    for phrases, least in [(sentences(NAMED_ANEW, NAMES), 0.95), (sentences(DESCRIBED_ANEW, KINDS), 0.95),
                           (sentences(DESCRIBED, PAIRS), 0.9), (sentences(DESCRIBED, PAIRS_ANEW), 0.5)]:
        right = (net(tokens(phrases)).softmax(1) * (leaves(phrases) > 0)).sum(1).mean()
        assert right > least, f"'{phrases[0]}' ..: {right:.3f} on digits of which it is true"
    assert not {*sentences(NAMED_ANEW, NAMES)} & {*sentences(NAMED, NAMES)} and not {*PAIRS} & {*PAIRS_ANEW}


def test_captions_go_through_the_same_door():
    torch.manual_seed(0)
    net, data = UNet(HEARS), Captioned(digits("train"))
    for record in train(diffusion_loss(COSINE, "v", drop=0.5), net, data, TrainConfig(4, **FEW)): pass
    for p in net.parameters():
        if not p.any(): nn.init.normal_(p, std=0.1)
    model, x = Denoiser(net.eval(), COSINE, "v"), torch.randn(3, 1, 8, 8)
    y, none = tokens(["seven", "an odd number", "a picture of a two"]), torch.full((3, LENGTH), -1)
    with torch.no_grad():
        torch.testing.assert_close(model(x, 0.5, y=none).x0, model(x, 0.5).x0, rtol=0, atol=1e-6)
        guided = ClassifierFree(model, 2.)(x, 0.5, y=y).eps
        wanted = 3 * model(x, 0.5, y=y).eps - 2 * model(x, 0.5).eps
        torch.testing.assert_close(guided, wanted, rtol=0, atol=1e-5)
        student = guided_student(model)
        torch.testing.assert_close(student(x, 0.5, y=y, w=3.).x0, model(x, 0.5, y=y).x0, rtol=0, atol=0)
    stage = stage_one(model, GuidedConfig(2, **FEW), data)
    assert isinstance(stage.model, GuidedDenoiser) and stage.model.net.config.n_words == len(WORDS)
    for wrong, words in [(torch.zeros(3).long(), "a row of words for each"), (y[:2], "a row of words"),
                         (y.float(), "a row of words"), (y + len(WORDS), f"0 to {len(WORDS) - 1}")]:
        with pytest.raises(BadInput, match=words): net(x, torch.rand(3), wrong)
    with pytest.raises(BadInput, match="give one of them"): UNetConfig(n_labels=10, n_words=5)


def test_a_run_with_captions_is_taken_up_bit_for_bit(tmp_path):
    def run(steps, out):
        torch.manual_seed(0)
        loss, data = diffusion_loss(COSINE, "v", drop=0.1), Captioned(digits("train"))
        return fit(loss, UNet(HEARS), data, TrainConfig(steps, **FEW), out)
    whole = run(6, tmp_path/"whole")
    run(4, tmp_path/"stopped")
    again = run(6, tmp_path/"stopped")
    assert all(p.equal(q) for p, q in zip(whole.parameters(), again.parameters()))


def test_a_translation_shows_the_new_label():
    "With the exact model of the ring: a point of one class ends at a mode of the other."
    mix, y, y_new = ring(), torch.arange(4).repeat(64), (torch.arange(4).repeat(64) + 2) % 4
    mode = torch.stack([torch.multinomial((mix.labels == k).double(), 1, generator=seeded(0, int(k), i))[0]
                        for i, k in enumerate(y)])
    x0 = mix.means[mode] + mix.std[mode, None] * torch.randn(256, 2, dtype=torch.float64, generator=seeded(1))
    x = translate(mix.denoiser(COSINE), x0, 100, y, y_new)
    for end, label in ((x, y_new), (x0, y)):
        read = mix.labels[torch.cdist(end, mix.means).argmin(1)]
        assert (read == label).double().mean() > 0.85, "as many as the data themselves, nearly"
    turned = translate(mix.denoiser(COSINE), x0, 100, y, y)
    assert (turned - x0).abs().max() < 0.3 and (x - x0).norm(dim=1).min() > 0.5
