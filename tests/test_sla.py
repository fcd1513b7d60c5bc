"""SLA: identities of its losses and of the ways to answer, families of copies, heads and folders."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sfumato.classify.parts.backbone import Backbone
from sfumato.classify.parts.copies import (
    aggregated,
    augmentation_loss,
    distillation_loss,
    expanded,
    family,
    joint_labels,
    joint_loss,
    multitask_loss,
    prototype_logits,
    single,
)  # fmt: skip
from sfumato.classify.sla import SLA, Augmented
from sfumato.errors import BadInput
from sfumato.nets.cifar_resnet import CifarResNet

rng = torch.Generator().manual_seed(0)
N, M = 5, 4
Y = torch.tensor([1, 4, 0])


def normal(*shape):
    return torch.randn(shape, generator=rng, dtype=torch.float64)


def test_one_head_for_all_copies_is_augmentation_and_a_sum_of_heads_is_two_tasks():
    f, u, v = normal(3 * M, 7).requires_grad_(), normal(N, 7), normal(M, 7)
    joint = u.repeat_interleave(M, 0)
    losses = joint_loss(f @ joint.mT, Y, M), augmentation_loss(f @ u.mT, Y, M)
    assert losses[0].item() == pytest.approx(losses[1].item() + math.log(M), abs=1e-12)
    a, b = (torch.autograd.grad(loss, f)[0] for loss in losses)
    torch.testing.assert_close(a, b)
    both = joint_loss(f @ (u[:, None] + v).flatten(0, 1).mT, Y, M)
    assert both.item() == pytest.approx(multitask_loss(f @ u.mT, f @ v.mT, Y).item(), abs=1e-12)
    assert joint_loss(f @ joint.mT, Y, M, total=True) == M * losses[0]


def test_one_transformation_is_plain_cross_entropy():
    z = normal(3, N)
    assert joint_loss(z, Y, 1) == cross_entropy(z, Y)
    assert torch.equal(single(z, 1), z) and torch.equal(aggregated(z, 1), z)


def test_labels_and_slices_by_hand():
    z = normal(3 * M, N * M)
    assert joint_labels(Y, M).tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 0, 1, 2, 3]
    mean = [[sum(z[b * M + j, i * M + j] for j in range(M)) / M for i in range(N)] for b in range(3)]
    torch.testing.assert_close(aggregated(z, M), torch.tensor(mean, dtype=torch.float64))
    w = normal(N * M, 7)
    f = normal(3, 7)
    torch.testing.assert_close(single(f @ w.mT, M), f @ w[[i * M for i in range(N)]].mT)


def test_the_aggregate_of_a_turned_picture_is_that_of_turned_slices():
    f, w = nn.Flatten(), normal(N, M, 48)
    x, turns = normal(2, 3, 4, 4), family("rotation")
    answer = lambda x, w: aggregated(f(expanded(x, turns)) @ w.flatten(0, 1).mT, M)
    for k in range(M):  # copy j of t_k(x) is copy j + k of x
        torch.testing.assert_close(answer(turns[k](x), w), answer(x, w.roll(k, 1)))


def test_distillation():
    teacher, student = normal(3, N).requires_grad_(), normal(3, N).requires_grad_()
    same = distillation_loss(teacher, teacher, Y, temperature=3.0, weight=0.0)
    assert abs(same.item()) < 1e-14
    loss = distillation_loss(student, teacher, Y, temperature=2.0, weight=0.5)
    p, q = (torch.softmax(z / 2, 1) for z in (teacher, student))
    by_hand = 4 * (p * (p / q).log()).sum(1).mean() + 0.5 * cross_entropy(student, Y)
    assert loss.item() == pytest.approx(by_hand.item(), abs=1e-12)
    assert torch.autograd.grad(loss, teacher, allow_unused=True)[0] is None


@pytest.mark.parametrize(
    ("name", "many"),
    [("rotation", 4), ("rotation2", 2), ("colour", 6), ("colour3", 3), ("rotation2-colour3", 6),
     ("rotation-colour3", 12), ("rotation-colour", 24)],
)  # fmt: skip
def test_families(name, many):
    x = normal(2, 3, 4, 4)
    copies = expanded(x, family(name)).unflatten(0, (2, -1))
    assert copies.shape[1] == many == len({tuple(c.flatten().tolist()) for c in copies[0]})
    assert torch.equal(copies[:, 0], x)
    colours = {"colour": 6, "colour3": 3}.get(name.rpartition("-")[2], 1)
    turns = (0, 2) if name.startswith("rotation2") else range(many // colours)
    orders = list(itertools.permutations(range(3))) if colours == 6 else [(0, 1, 2), (1, 2, 0), (2, 0, 1)][:colours]
    by_hand = [torch.rot90(x, k, (2, 3))[:, list(order)] for k in turns for order in orders]
    assert torch.equal(copies, torch.stack(by_hand, 1))


def test_what_cannot_be_turned_or_told_is_refused():
    with pytest.raises(BadInput, match="square"):
        expanded(torch.zeros(1, 3, 4, 6), family("rotation"))
    assert expanded(torch.zeros(1, 3, 4, 6), family("rotation2-colour3")).shape == (6, 3, 4, 6)
    with pytest.raises(BadInput, match="identity"):
        Augmented(nn.Flatten(), 27, 2, family("rotation")[1:])
    with pytest.raises(BadInput, match="no distilled head"):
        SLA(objective="da", mode="distilled")
    with pytest.raises(BadInput, match="family of transformations"):
        family("shear")


def test_prototypes_of_pairs():
    support, y, query = normal(4 * 2, 6), torch.tensor([0, 1, 1, 0]), normal(3 * 2, 6)
    z = prototype_logits(support, y, query, 2, 2)
    of = lambda i, j: support[[b * 2 + j for b in range(4) if y[b] == i]].mean(0)
    by_hand = [[-(q - of(i, j)).square().sum() for i in range(2) for j in range(2)] for q in query]
    torch.testing.assert_close(z, torch.tensor(by_hand, dtype=torch.float64))


def test_modes_ask_the_heads_that_they_name():
    torch.manual_seed(0)
    net = Augmented(nn.Flatten(), 27, N, family("rotation")).double()
    x = normal(2, 3, 3, 3)
    assert net.mode == "distilled"
    torch.testing.assert_close(net(x), net.labels(x.flatten(1)))
    net.mode = "single"
    torch.testing.assert_close(net(x), net.joint(x.flatten(1))[:, ::M])
    net.mode = "aggregate"
    torch.testing.assert_close(net(x), aggregated(net.joint(expanded(x, family("rotation")).flatten(1)), M))
    plain = Augmented(nn.Flatten(), 27, N, family("rotation"), "da", "aggregate").double()
    means = plain.labels(torch.stack([torch.rot90(x, k, (2, 3)).flatten(1) for k in range(4)])).mean(0)
    torch.testing.assert_close(plain(x), means)


@pytest.mark.parametrize("objective", ["sla+sd", "sla", "da", "mt", "plain"])
def test_losses_of_the_method_are_the_papers(objective):
    method = SLA(objective=objective, backbone="resnet", widths=(8, 16), size=8, temperature=2.0)
    torch.manual_seed(0)
    net = method.network(tuple("abcde")).eval()
    x = torch.randn(3, 3, 8, 8, generator=rng)
    loss, told = method.loss(net, x, Y, rng)
    with torch.no_grad():
        f, one = net.features(expanded(x, family("rotation"))), net.features(x)
        expected = {
            "plain": lambda: cross_entropy(net.labels(one), Y),
            "da": lambda: augmentation_loss(net.labels(f), Y, M),
            "mt": lambda: multitask_loss(net.labels(f), net.which(f), Y),
            "sla": lambda: joint_loss(net.joint(f), Y, M),
            "sla+sd": lambda: (
                joint_loss(net.joint(f), Y, M) + distillation_loss(net.labels(one), aggregated(net.joint(f), M), Y, 2.0)
            ),
        }[objective]()
    torch.testing.assert_close(loss.detach(), expected)
    net.zero_grad()
    loss.backward()
    assert [n for n, p in net.named_parameters() if p.grad is None] == [] and "right" in told


def test_backbones_end_before_the_last_layer():
    for name, width in (("resnet", 16), ("resnet8", 64)):
        torch.manual_seed(0)
        made = Backbone(name, 16, (8, 16))
        assert made.width == width and not any(isinstance(m, nn.Linear) for m in made.modules())


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (32, 464_154)])
def test_resnets_for_small_pictures(depth, parameters):
    with torch.device("meta"):
        net = CifarResNet(depth)
        assert sum(p.numel() for p in net.parameters()) == parameters
        assert net.blocks(torch.empty(1, 16, 32, 32)).shape == (1, 64, 8, 8)
    with pytest.raises(BadInput, match="multiple of 6"):
        CifarResNet(18)


def test_the_rate_falls_at_half_and_three_quarters():
    rate = SLA(updates=100).rate()
    assert [rate(i) for i in (0, 49, 50, 74, 75, 99)] == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert SLA(rate_falls=()).rate() is None


def test_a_folder_answers_by_every_mode_and_the_card_has_them_all(tmp_path):
    settings = {**SLA.EXAMPLE, "updates": 1, "backbone": "resnet8", "pictures": 100, "data": "sketch"}
    folder = SLA(**settings).run(tmp_path / "run", progress=False)
    card = json.loads((folder / "card.json").read_text())
    assert card["top1"] == card["distilled"] and {"single", "aggregate", "total"} <= card.keys()
    net, x = SLA.read(folder), torch.randn(2, 3, 16, 16, generator=rng)
    answers = []
    for mode in net.modes:
        net.mode = mode
        answers.append(net(x))
    assert len({tuple(z.flatten().tolist()) for z in answers}) == 3
