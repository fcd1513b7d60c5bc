"""CPDM: tasks that come one by one, prototypes, projection, what replay is drawn like, and what has been forgotten."""

from __future__ import annotations

import json
import math

import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import sfumato as sf
from sfumato.data.base import Pictures
from sfumato.errors import BadInput
from sfumato.ledger import core
from sfumato.metrics.detectors import make_detector
from sfumato.noise import GaussianProcess, LinearBeta
from sfumato.pipeline import Labels, Prototyped, PrototypeModel
from sfumato.pipeline.prototypes import leading, load_prototypes, save_prototypes
from sfumato.sample import held_ddim
from sfumato.train import words_of_classes
from sfumato.train.continual import (
    Drawn,
    Joined,
    average_accuracy,
    forgetting,
    held_back,
    named_tasks,
    replay_parts,
    seen_cross_entropy,
    split_tasks,
    weighted_accuracy,
)
from sfumato.train.course import Course, Plateau, epoch_of
from sfumato.train.cpdm import CPDM
from sfumato.train.draw import Share
from sfumato.train.incremental import PrototypeTraining, TaskRun
from sfumato.train.loop import Run
from sfumato.train.projection import Projector, grown_basis, inputs_of, projected_update
from sfumato.train.prototypes import first_prototypes, nearest_old, neighbour_error, surest, updated_prototypes
from sfumato.train.schedule import Schedule
from sfumato.train.words_of_classes import class_words

LABELS = ("cat", "dog", "owl")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**changes) -> CPDM:
    return CPDM(**{**CPDM.EXAMPLE, "tasks": ("cat+dog", "owl"), **changes})


def stirred(recipe: CPDM) -> PrototypeModel:
    """A model with some prototypes."""
    torch.manual_seed(0)
    model = recipe.model(LABELS)
    with torch.no_grad():
        model.network.prototypes.normal_(generator=rng(1))
    model.network.eval().requires_grad_(False)
    return model


@pytest.fixture(scope="module")
def model() -> PrototypeModel:
    return stirred(small())


def noise_of(*labels: int, size: int = 8) -> Drawn:
    pixels = torch.randint(256, (len(labels), size, size, 3), generator=rng(), dtype=torch.uint8)
    return Drawn(pixels.numpy(), labels)


# Tasks and what is counted of them


def test_the_first_task_has_its_share_and_the_others_are_of_one_size():
    names = [str(i) for i in range(100)]
    tasks = split_tasks(names, 0.5, 5)
    assert [len(task) for task in tasks] == [50, 10, 10, 10, 10, 10] and sum(tasks, ()) == tuple(names)
    assert split_tasks(names[:6], 0, 3) == (("0", "1"), ("2", "3"), ("4", "5"))
    mixed = split_tasks(names, 0.5, 5, seed=1)
    assert mixed != tasks and sorted(sum(mixed, ())) == sorted(names) and mixed == split_tasks(names, 0.5, 5, seed=1)
    with pytest.raises(BadInput, match="cannot be cut into 4 tasks"):
        split_tasks(names[:10], 0.5, 4)


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ([["cat", "dog"], ["owl", "cat"]], "'cat' is in task 1 and in task 2: tasks share no classes"),
        ([["cat", "cat"], ["owl"]], "'cat' is named twice in task 1"),
        ([["cat"], []], "task 2 has no classes"),
        ([["cat", "dog"]], "no sequence"),
        ([["cat"], ["fox"]], "unknown class 'fox'"),
    ],
)
def test_tasks_that_cannot_be(tasks, told):
    with pytest.raises(BadInput, match=told):
        named_tasks(LABELS, tasks)


def test_tasks_that_share_classes_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BadInput, match="tasks share no classes"):
        CPDM(**{**CPDM.EXAMPLE, "tasks": ("circle+square", "star+circle")}).run(tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [{"threshold": 1.5}, {"validation": 0.0}, {"classifier_lr": ()},
                                    {"sampling_steps": 2000}, {"crossing": (5,)}])  # fmt: skip
def test_settings_that_cannot_be(change):
    with pytest.raises(BadInput, match=next(iter(change))):
        small(**change).network(2)


def test_accuracy_and_forgetting_of_a_matrix_by_hand():
    a = torch.tensor([[0.9, 0.0, 0.0], [0.6, 0.8, 0.0], [0.3, 0.7, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(average_accuracy(a), torch.tensor([0.9, 0.7, 2 / 3], dtype=torch.float64))
    torch.testing.assert_close(forgetting(a), torch.tensor([0.0, 0.15, 0.7 / 3], dtype=torch.float64))
    weighted = torch.tensor([0.9, (1.2 + 0.8) / 3, (0.6 + 0.7 + 1.0) / 4], dtype=torch.float64)
    torch.testing.assert_close(weighted_accuracy(a, [2, 1, 1]), weighted)
    torch.testing.assert_close(weighted_accuracy(a, [3, 3, 3]), average_accuracy(a))


def test_the_loss_does_not_see_classes_that_have_not_come():
    logits = torch.randn(4, 6, generator=rng()).double().requires_grad_()
    labels = torch.tensor([5, 0, 2, 0])
    loss = seen_cross_entropy(logits, labels, [5, 0, 2])
    some = logits[:, [0, 2, 5]]
    expected = some.logsumexp(1) - some.gather(1, torch.tensor([[2], [0], [1], [0]]))[:, 0]
    torch.testing.assert_close(loss, expected)
    loss.sum().backward()
    assert (logits.grad[:, [1, 3, 4]] == 0).all() and (logits.grad[:, [0, 2, 5]] != 0).all()


def test_replay_is_cut_by_class_and_the_rest_of_each_class_held_back():
    drawn = noise_of(*[0] * 5, *[1] * 5)
    train, choose = replay_parts(drawn)
    assert train.labels == [0] * 4 + [1] * 4 and choose.labels == [0, 1]
    assert (choose.pixels == drawn.pixels[[4, 9]]).all()
    labels = [0, 1] * 10 + [2]
    one, other = held_back(labels, 0.2, 0)
    assert sorted(one + other) == list(range(21)) and [labels[i] for i in other].count(0) == 2 and 20 in one


def test_an_epoch_is_as_long_as_the_longer_source_or_as_the_shorter():
    assert epoch_of([800, 5000], 256, "longest") == 20 and epoch_of([800, 5000], 256, "shortest") == 4


def test_a_plateau_cuts_the_rate_once_and_then_ends():
    plateau = Plateau(2, 4)
    told = [plateau.told(x) for x in (0.5, 0.6, 0.6, 0.5)]
    assert told == [True, True, False, False] and float(plateau.share) == pytest.approx(0.1) and not plateau.over
    assert plateau.told(0.7) and float(plateau.share) == pytest.approx(0.1)
    for _ in range(4):
        plateau.told(0.1)
    assert plateau.over and float(plateau.best) == 0.7


def test_a_step_of_the_classifier_has_a_batch_of_each_and_the_best_weights_are_kept():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(192, 3)

        def forward(self, x):
            return self.head(x.flatten(1))

    real, drawn = noise_of(2, 2, 2, 2), noise_of(0, 1, 0)
    torch.manual_seed(0)
    course = Course(Flat(), real, drawn, [real, drawn], [0, 1, 2], 2, 0.05, 0.9, 5e-4, Plateau(5, 10))
    x, y = course.batch(0, rng(), 2)
    assert x.shape == (4, 3, 8, 8) and (y[:2] == 2).all() and (y[2:] < 2).all()
    run = Run(course, Schedule(updates=12, batch=2, lr=0.05, warmup=0, decay="constant", ema=0.0, clip_norm=0.0))
    run.fit(progress=False)
    right = (course.best(torch.cat([_all(real), _all(drawn)])).argmax(1) == torch.tensor([2] * 4 + [0, 1, 0])).double()
    assert course.plateau.best == right.mean() > 0.5 and course.plateau.real == right[:4].mean()


def _all(source: Pictures) -> torch.Tensor:
    return sf.data.pictures.to_tensor([source.picture(i) for i in range(len(source))])


# Prototypes and neighbours


def test_the_first_prototype_is_the_surest_picture_of_the_class_among_the_classes_seen():
    source = noise_of(0, 0, 1, 1, 1, 0)
    labels = torch.tensor(source.labels)
    # The third class has not come: its large logits must not matter.
    logits = torch.tensor([[1, 0, 0], [3, 0, 99], [0, 2, 0], [9, 1, 0], [0, 1, 0], [2, 0, 0.0]])
    sure = lambda least: surest(logits, labels, [1, 0], [0, 1], least)
    assert sure(False).tolist() == [2, 1] and sure(True).tolist() == [3, 0]
    first = lambda choice: first_prototypes(choice, source, [1, 0], sure, rng())
    x = _all(source)
    assert torch.equal(first("confident"), x[[2, 1]]) and torch.equal(first("unsure"), x[[3, 0]])
    torch.testing.assert_close(first("mean"), torch.stack([x[2:5].mean(0), x[[0, 1, 5]].mean(0)]))
    assert torch.equal(first("noise"), torch.randn(2, 3, 8, 8, generator=rng())) and not first("none").any()


def test_prototypes_are_updated_by_the_equation_and_only_where_the_batch_has_some():
    p, g, p0 = torch.randn(3, 3, 4, 4, 4, generator=rng()).double().unbind()
    n = torch.tensor([2, 0, 5])
    literal = updated_prototypes(p, g, n, 0.1, 0.01)
    for y, count in enumerate(n.tolist()):
        torch.testing.assert_close(literal[y], 0.99 * p[y] - 0.1 * g[y] / count if count else p[y])
    torch.testing.assert_close(updated_prototypes(p, g, n, 0.1, 0.01, p0)[2], literal[2] + 0.01 * p0[2])
    assert torch.equal(updated_prototypes(p, g, n, 0.0, 0.0, p0), p)


def test_the_nearest_old_class_is_by_the_angle_or_by_the_distance_of_its_text():
    words = torch.tensor([[1.0, 0.0], [0.0, 10.0], [0.1, 1.0], [3.0, 0.1]])[:, None]
    assert nearest_old(words, [2, 3], [0, 1], "cosine").tolist() == [1, 0]
    assert nearest_old(words, [2, 3], [1, 0], "euclidean").tolist() == [0, 0]


def test_the_neighbours_term_weighs_by_the_timestep_and_its_gradient_takes_one_branch():
    a, b = (torch.randn(2, 3, 4, 4, generator=rng(i)).double().requires_grad_() for i in range(2))
    steps = torch.tensor([0, 500])
    error = neighbour_error(a, b, steps)
    assert error[0] == 0
    torch.testing.assert_close(error[1], 500 * ((a[1] - b[1]) ** 2).sum() / 48)
    assert (neighbour_error(a, a, steps) == 0).all()
    error.sum().backward()
    assert b.grad is None and a.grad[1].abs().min() > 0


def test_a_table_of_prototypes_comes_back(tmp_path):
    table = {"a cat": torch.randn(3, 4, 4), "dog": torch.randn(3, 4, 4)}
    save_prototypes(tmp_path / "p.safetensors", table)
    back = load_prototypes(tmp_path / "p.safetensors")
    assert back.keys() == table.keys() and all(torch.equal(back[k], table[k]) for k in table)
    save_prototypes(tmp_path / "q.safetensors", {"cat": torch.zeros(3, 4, 4), "dog": torch.zeros(3, 5, 5)})
    with pytest.raises(BadInput, match="no table of prototypes"):
        load_prototypes(tmp_path / "q.safetensors")


def test_a_names_vectors_are_its_own_and_a_text_encoder_gives_the_end_of_the_name(tiny_sd, monkeypatch):
    assert torch.equal(class_words("random", ["cat", "dog"], 2, 5)[1], class_words("random", ["dog"], 2, 5)[0])
    monkeypatch.setattr(words_of_classes, "load_text2image", lambda model, device: {"tiny": tiny_sd}[model])
    cond = tiny_sd.encode(["star", "red circle"])
    ends = (cond.roles == 2).int().argmax(1)
    words = class_words("tiny", ["star", "red circle"], 1, 5)
    torch.testing.assert_close(words[:, 0], cond.tokens[torch.arange(2), ends])
    torch.testing.assert_close(class_words("tiny", ["star", "red circle"], 4, 5), cond.tokens[:, :4])
    with pytest.raises(BadInput, match="at most as many tokens"):
        class_words("tiny", ["star"], 1000, 5)


# Projection


def test_a_basis_grows_to_the_threshold_and_no_further():
    directions = torch.linalg.qr(torch.randn(6, 6, generator=rng()).double())[0]
    first = directions[:, :3] * torch.tensor([3.0, 2.0, 1.0])  # energies 9, 4, 1 of 14
    assert [grown_basis(torch.zeros(6, 0), first, h).shape[1] for h in (0.5, 9 / 14, 0.9, 0.95, 1.0)] == [1, 1, 2, 3, 3]
    u = grown_basis(torch.zeros(6, 0), first, 0.9)
    torch.testing.assert_close(u @ u.mT, directions[:, :2] @ directions[:, :2].mT)
    # Half of the energy of what comes next lies in the basis already.
    later = torch.stack([directions[:, 0] * 2, directions[:, 4] * 2], dim=1)
    assert grown_basis(u, later, 0.5).shape[1] == 2
    more = grown_basis(u, later, 0.6)
    assert more.shape[1] == 3 and (more @ (more.mT @ u) - u).abs().max() < 1e-12
    full = grown_basis(more, torch.randn(6, 40, generator=rng(1)).double(), 1.0)
    assert full.shape == (6, 6) and (full.mT @ full - torch.eye(6)).abs().max() < 1e-12
    assert grown_basis(full, later).shape == (6, 6) and torch.equal(grown_basis(u, torch.zeros(6, 3)), u)
    with pytest.raises(BadInput, match="threshold"):
        grown_basis(u, later, 0.0)


def test_an_update_without_a_basis_is_kept_and_with_the_whole_space_is_none():
    update = torch.randn(5, 4, generator=rng())
    assert torch.equal(projected_update(update, torch.zeros(4, 2)), update)
    assert projected_update(update, torch.eye(4)).abs().max() == 0
    u = torch.linalg.qr(torch.randn(4, 2, generator=rng(1)))[0]
    assert (projected_update(update, u) @ u).abs().max() < 1e-6


@pytest.mark.parametrize("bias", [False, True])
def test_old_inputs_are_answered_as_before_whatever_the_optimiser_and_new_ones_are_learned(bias):
    torch.manual_seed(0)
    layer = nn.Linear(10, 6, bias=bias)
    old, new = torch.randn(3, 10, generator=rng()), torch.randn(3, 10, generator=rng(1))
    projector = Projector({"layer": layer})
    projector.grow({"layer": old})
    projector.begin()
    before, start = layer(old).detach(), layer(new).detach()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(50):
        optimizer.zero_grad()
        layer(torch.cat([old, new])).square().mean().backward()
        optimizer.step()
        projector.project()
    with torch.no_grad():
        assert (layer(old) - before).abs().max() < 1e-5 and (layer(new) - start).abs().max() > 0.1


def test_nothing_shown_changes_no_bit_and_everything_shown_moves_nothing():
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    projector = Projector({"layer": layer})
    projector.begin()
    moved = {n: p + torch.randn_like(p) for n, p in layer.state_dict().items()}
    start = {n: p.clone() for n, p in layer.state_dict().items()}
    layer.load_state_dict(moved)
    projector.project()
    assert all(torch.equal(p, moved[n]) for n, p in layer.state_dict().items())
    projector.grow({"layer": torch.randn(30, 4, generator=rng())})
    projector.project()
    for n, p in layer.state_dict().items():
        torch.testing.assert_close(p, start[n], atol=1e-7, rtol=0)


# The network and the model


def gradients(model: PrototypeModel) -> dict[str, float]:
    """The largest gradient of each kind of cross-attention's maps under a plain loss."""
    net = model.network.requires_grad_(True)
    z = torch.randn(2, 3, 8, 8, generator=rng())
    with sdpa_kernel(SDPBackend.MATH):  # the quick one subtracts two sums that are equal but for rounding
        model.denoiser(z, 0.5, model.told([0, 2])).square().sum().backward()
    kinds = ("q", "k", "v", "text_proj")
    return {kind: max(x.weight.grad.abs().max().item() for x in net.layers(kind).values()) for kind in kinds}


def test_with_one_text_vector_queries_and_keys_learn_nothing_with_two_they_do():
    one, two = gradients(stirred(small())), gradients(stirred(small(tokens=2)))
    assert one["q"] == one["k"] == 0 and min(one["v"], one["text_proj"]) > 0
    assert min(two.values()) > 0


def test_the_network_has_the_published_shape():
    with torch.device("meta"):
        net = CPDM().network(100)
    unet = net.unet
    crosses = [hasattr(block, "attentions") for block in (*unet.down_blocks, *unet.up_blocks)]
    assert crosses == [i in (4, 7) for i in range(12)] and hasattr(unet.mid_block, "attentions")
    assert unet.conv_in.in_channels == 6 and unet.conv_out.out_channels == 3
    assert isinstance(unet.encoder_hid_proj, nn.Linear) and unet.encoder_hid_proj.bias is not None
    assert len(net.layers("k")) == 6 and set(net.layers("text_proj")) == {"encoder_hid_proj"}
    assert {x.in_features for x in net.layers("k", "v", "text_proj").values()} == {768}
    assert small(prototype="none").network(2).unet.conv_in.in_channels == 3


@pytest.mark.parametrize("preset", CPDM.presets)
def test_presets_make_networks_that_cross_where_they_say(preset):
    recipe = CPDM(**CPDM.presets[preset])
    with torch.device("meta"):
        net = recipe.network(10)
    assert len(net.layers("v")) == 1 + len(recipe.crossing) * (2 * recipe.layers + 1)


def test_the_classifiers_pictures_are_mirrored_where_the_published_code_mirrors_them():
    mirrored = lambda **settings: (CPDM(**settings).flip, CPDM(**settings).judge().flip)
    assert mirrored() == (True, False) and mirrored(**CPDM.presets["imagenet"]) == (True, True)
    assert mirrored(**CPDM.presets["small-cifar10"]) == (True, False)
    assert mirrored(**CPDM.presets["small-digits"]) == (False, False)


def test_without_weights_for_it_the_prototype_says_nothing():
    model = stirred(small())
    z, cond = torch.randn(2, 3, 8, 8, generator=rng()), model.told(["cat", "owl"])
    other = cond.replace(prototype=-cond.prototype)
    assert (model.denoiser(z, 0.5, cond) - model.denoiser(z, 0.5, other)).abs().max() > 1e-4
    model.network.unet.conv_in.weight[:, :3] = 0
    assert torch.equal(model.denoiser(z, 0.5, cond), model.denoiser(z, 0.5, other))


def test_guidance_is_on_the_text_and_keeps_the_prototype(model):
    cond = model.told(["cat", "owl"])
    silent = cond.drop(torch.tensor([True, False]), model.unconditional(2))
    assert torch.equal(silent.prototype, cond.prototype) and torch.equal(silent.words[1], cond.words[1])
    assert not silent.words[0].any()
    z = torch.randn(2, 3, 8, 8, generator=rng())
    nothing = cond.replace(words=torch.zeros_like(cond.words))
    with_text, without = model.denoiser(z, 0.5, cond), model.denoiser(z, 0.5, nothing)
    for scale in (0.0, 1.0, 4.0):
        due = scale * with_text - (scale - 1) * without  # (1 + w) eps - w eps0 with scale = 1 + w
        torch.testing.assert_close(model.guided(cond, scale, n=2)(z, 0.5), due, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.guided(nothing, 7.0, n=2)(z, 0.5), without)


def test_what_the_model_is_told(model):
    cond = model.told(["owl", "cat"])
    assert isinstance(cond, Prototyped) and torch.equal(cond.prototype, model.network.prototypes[[2, 0]])
    assert torch.equal(model.told(Labels(torch.tensor([2, 0]))).words, cond.words) and model.told(cond) is cond
    none = model.told(Labels(torch.tensor([3, 0])))
    assert not none.words[0].any() and not none.prototype[0].any() and torch.equal(none.words[1], cond.words[1])
    with pytest.raises(BadInput, match="unknown class 'fox'"):
        model.told("fox")
    with pytest.raises(BadInput, match="told classes"):
        model.told(sf.pipeline.Frames(torch.zeros(1, 1, 3, 8, 8)))
    drawn = model.sample(["owl", "cat"], 2, seed=5)
    torch.testing.assert_close(drawn, model.draw(["owl", "owl", "cat", "cat"], [5, 6, 7, 8]))


def test_replay_is_drawn_as_diffusers_scheduler_draws_that_clips(model):
    scheduler = DDIMScheduler(1000, beta_schedule="linear", clip_sample=True, set_alpha_to_one=True)
    scheduler.set_timesteps(8)
    process = GaussianProcess(LinearBeta().discrete())
    times = leading(8)
    assert (times[:-1] * 1000 - 1).round().long().tolist() == scheduler.timesteps.tolist() and times[-1] == 0

    class Told:
        prediction = "eps"

        def __init__(self):
            self.process = process

        def __call__(self, z, t, cond=None):
            return 1.3 * z + 0.3 * torch.sin(5 * z) * float(t)

    z = start = torch.randn(2, 3, 4, 4, generator=rng()).double()
    for step in scheduler.timesteps:
        z = scheduler.step(Told()(z, (step + 1) / 1000), step, z).prev_sample
    torch.testing.assert_close(held_ddim(Told(), start, times), z, atol=1e-5, rtol=1e-5)
    assert model.walk(8).equal(times)
    with pytest.raises(BadInput, match="sampling_steps"):
        leading(1001)


# Training


def train(recipe: CPDM, model: PrototypeModel, new: list[int], old: list[int], projector: Projector, updates: int = 3):
    model.network.requires_grad_(True).train()
    model.network.prototypes.requires_grad_(recipe.learns_prototypes)
    projector.begin()
    pictures = Joined(noise_of(*new * 3), *([noise_of(*old * 2)] if old else []))
    training = PrototypeTraining(recipe, model, pictures, new, old, projector)
    schedule = Schedule(updates=updates, batch=8, lr=1e-2, warmup=0, ema=0.0, weight_decay=0.1, precision="no")
    Run(training, schedule).fit(progress=False)


def test_old_prototypes_keep_every_bit_and_new_ones_learn():
    recipe, model = small(prototype_lr=5.0), stirred(small())
    before = model.network.prototypes.clone()
    train(recipe, model, [1, 2], [0], Projector({}))
    after = model.network.prototypes
    assert torch.equal(after[0], before[0]) and (after[1:] != before[1:]).flatten(1).any(1).all()


@pytest.mark.parametrize("tokens", [1, 2])
def test_old_classes_text_reaches_cross_attention_as_before_when_it_is_protected(tokens):
    recipe = small(tokens=tokens, tau=0.0, prototype_lr=0.0, prototype_decay=0.0)
    z = torch.zeros(2, 3, 8, 8)

    def answers(model):
        layers = model.network.layers("k", "v")
        cond = model.told(["cat", "dog"])
        with torch.no_grad(), inputs_of(layers) as heard:
            model.denoiser(z, 0.5, cond)
        return {name: layer(torch.cat(heard[name])).detach() for name, layer in layers.items()}

    drift = {}
    for kinds in ((), ("text_proj", "k", "v")):
        model = stirred(recipe)
        layers = model.network.layers(*kinds)
        projector = Projector(layers)
        with torch.no_grad(), inputs_of(layers) as heard:
            model.denoiser(z, 0.5, model.told(["cat", "dog"]))
        projector.grow({name: torch.cat(rows) for name, rows in heard.items()})
        before = answers(model)
        train(recipe, model, [2], [0, 1], projector)
        drift[kinds] = max((x - before[name]).abs().max().item() for name, x in answers(model).items())
    plain, protected = drift.values()
    assert protected < 1e-5 and plain > 1e-3


def test_protecting_keys_changes_nothing_where_there_is_one_text_vector():
    recipe, made = small(), []
    for kinds in ((), ("k",)):
        model = stirred(recipe)
        projector = Projector(model.network.layers(*kinds))
        projector.grow({name: torch.randn(3, 8, generator=rng()) for name in projector.layers})
        with sdpa_kernel(SDPBackend.MATH):
            train(recipe, model, [2], [0, 1], projector, 2)
        made.append(model.network.state_dict())
    # Weight decay moves keys, which say nothing; all else has the same bits.
    assert all(torch.equal(x, made[1][name]) for name, x in made[0].items() if "attn2.to_k" not in name)


def test_the_neighbours_term_is_none_for_the_same_text_and_in_the_first_task():
    recipe = small(tau=1.0)
    model = stirred(recipe)
    model.network.words[2] = model.network.words[0]
    training = PrototypeTraining(recipe, model, Joined(noise_of(2, 2, 1, 0)), [2], [0, 1], Projector({}))
    assert training.nearest[2] == 0
    batch = training.batch(0, rng(), 6)
    loss, figures = training.loss(batch, rng(1))
    assert figures["neighbour"] == 0 and loss == figures["noise"]
    training.nearest[2] = 1
    assert training.loss(batch, rng(1))[1]["neighbour"] > 0
    first = PrototypeTraining(recipe, model, Joined(noise_of(2, 2, 1, 0)), [0, 1, 2], [], Projector({}))
    assert first.loss(first.batch(0, rng(), 6), rng(1))[1] == {}


def test_shares_of_a_batch_add_up_to_the_whole():
    recipe = small(tau=1.0)
    training = PrototypeTraining(
        recipe, stirred(recipe), Joined(noise_of(2, 2, 1, 0, 1)), [2], [0, 1], Projector({})
    )  # fmt: skip

    def told(*shares: range):
        total, counts = 0.0, []
        for rows in shares:
            batch = training.batch(0, Share((0, 0), rows, 6), len(rows))
            loss, _ = training.loss(batch, Share((0, 1), rows, 6))
            counts.append(batch["counts"].tolist())
            total += loss.item() * len(rows) / 6
        assert all(found == counts[0] for found in counts)
        return total, counts[0]

    whole, parts = told(range(6)), told(range(2), range(2, 6))
    assert whole[1] == parts[1] and sum(whole[1]) == 6 and whole[0] == pytest.approx(parts[0], rel=1e-5)


# A whole run


def test_a_run_writes_its_matrix_its_classifiers_and_its_prototypes(tmp_path):
    method = CPDM(**{**CPDM.EXAMPLE, "protect": ("v", "q", "out"), "classifier_lr": (1e-2, 1e-3), "grid_every": 0})
    method.run(tmp_path / "run", progress=False)
    found = json.loads((tmp_path / "run" / "accuracy.json").read_text())
    assert [len(row) for row in found["matrix"]] == [1, 2]
    assert found["tasks"] == [["circle", "square"], ["star", "heart"]]
    a, b = found["matrix"][1]
    assert found["average_accuracy"][1] == pytest.approx((a + b) / 2)
    assert found["forgetting"] == pytest.approx([0, (found["matrix"][0][0] - a) / 2])
    model = sf.load(tmp_path / "run", "cpu")
    table = load_prototypes(tmp_path / "run" / "prototypes.safetensors")
    assert table.keys() == set(model.labels) and all(torch.equal(x, model.prototypes()[n]) for n, x in table.items())
    judge = make_detector(f"classifier:{tmp_path / 'run' / 'classifiers' / '2'}", ["star"])
    assert judge(model.draw("star", [0]), "star").score.isfinite().all()
    assert (tmp_path / "run" / "replay" / "before-task-2.png").is_file()


def test_classes_in_no_task_may_have_one_picture_and_a_name_may_have_a_plus(tmp_path):
    for name, n in (("a+b", 2), ("c", 2), ("alone", 1)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (8, 8), (90 * i, 0, 0)).save(tmp_path / "data" / name / f"{i}.png")
    method = CPDM(**{**CPDM.EXAMPLE, "data": str(tmp_path / "data"), "tasks": ("a+b", "c"), "grid_every": 0})
    tasks = TaskRun(method, tmp_path / "run", False)
    assert tasks.labels == ("a+b", "c") and tasks.tasks == [[0], [1]] and len(tasks.real) == len(tasks.test) == 2
    with pytest.raises(BadInput, match=r"'alone' of .* has one picture at most"):
        CPDM(**{**CPDM.EXAMPLE, "data": str(tmp_path / "data"), "tasks": ("c", "alone")}).run(tmp_path / "no", False)


@pytest.mark.slow
def test_the_entry_runs_in_miniature():
    pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
    experiment = core.load("cpdm")
    found = experiment.found({arm: experiment.measure(9, arm, updates=2, n=3, epochs=1) for arm in experiment.arms})
    for method, baseline in (found[name] for name in experiment.claims):
        assert len(method) == len(baseline) > 2 and all(map(math.isfinite, [*method, *baseline]))
