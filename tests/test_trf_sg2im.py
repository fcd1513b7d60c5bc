"""Scene graphs to layouts to pictures: the paper's equations, what graphs are refused, drawing."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import softmax

from sfumato import cli
from sfumato.data.graphs import (
    SPATIAL,
    SceneGraph,
    Vocabulary,
    cropped,
    drawn_relations,
    from_json,
    graph_of,
    open_graphs,
    read_graphs,
    require_drawable,
    spatial_relation,
)
from sfumato.data.sketch import sample_scene
from sfumato.errors import BadInput
from sfumato.ledger import core
from sfumato.ledger import trf_sg2im as entry
from sfumato.nets import ImageTransformer, SceneGraphTransformer
from sfumato.nets.graph_batch import GraphBatch
from sfumato.nets.layout import LayoutCode, _conventional, laplacian_positions, layout_tokens, place_tokens, places
from sfumato.nets.scene_graph import edge_attention
from sfumato.pipeline import GraphModel, Labels
from sfumato.pipeline.graphs import Sampling, kept, written
from sfumato.train.graph_stages import CodeTraining, code_loss
from sfumato.train.layouts import complete_iou, decayed, layout_loss, one_cycle
from sfumato.train.trf_sg2im import TrfSG2Im

PAIR = SceneGraph(("red star", "blue fish"), ((0, "left of", 1),))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small(**changes) -> TrfSG2Im:
    return TrfSG2Im(**{**TrfSG2Im.EXAMPLE, **changes})


@pytest.fixture(scope="module")
def model() -> GraphModel:
    torch.manual_seed(0)
    made = small().model(())
    with torch.no_grad():  # logits and boxes that differ from one another
        for weight in made.network.parameters():
            weight += 0.3 * torch.randn(weight.shape, generator=rng())
        made.layout.object.weight.normal_(std=3.0, generator=rng())
    for part in made.parts().values():
        part.requires_grad_(False).eval()
    return made


# The graph transformer


def test_attention_is_the_papers_sum_over_edges():
    n, edges, heads, d = 3, torch.tensor([[0, 1, 2, 0], [1, 2, 1, 2]]), 2, 4
    q, k, v = (torch.randn(n, heads, d, generator=rng(i), dtype=torch.float64) for i in range(3))
    e = 3 * torch.randn(4, heads, d, generator=rng(3), dtype=torch.float64)
    heard, score = edge_attention(q, k, v, e, *edges)
    for i in range(n):
        for h in range(heads):
            top, bottom = torch.zeros(d, dtype=torch.float64), 0.0
            for m, (j, to) in enumerate(edges.T.tolist()):
                if to == i:
                    s = k[j, h] * q[i, h] / math.sqrt(d) * e[m, h]
                    assert (score[m, h] - s).abs().max() < 1e-12
                    w = math.exp(min(5.0, max(-5.0, float(s.sum()))))
                    top, bottom = top + w * v[j, h], bottom + w
            assert (heard[i, h] - top / (bottom + 1e-6)).abs().max() < 1e-10
    assert (heard[0] == 0).all(), "a node with no incoming edge hears nothing"


def test_on_a_complete_graph_with_plain_edges_it_is_dense_attention():
    n, heads, d = 5, 2, 4
    q, k, v = (torch.randn(n, heads, d, generator=rng(i), dtype=torch.float64) for i in range(3))
    source, target = (x.flatten() for x in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    heard, _ = edge_attention(q, k, v, torch.ones(n * n, heads, d, dtype=torch.float64), source, target)
    scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(d)
    assert scores.abs().max() < 5
    torch.testing.assert_close(heard, torch.einsum("hij,jhd->ihd", softmax(scores, -1), v), rtol=0, atol=1e-5)


def graph_net(**changes) -> SceneGraphTransformer:
    torch.manual_seed(0)
    return SceneGraphTransformer(6, 4, **{"width": 8, "depth": 2, "heads": 2, "positions": 3, **changes}).double()


def batches() -> list[GraphBatch]:
    return [
        GraphBatch.of([1, 2, 3, 0], [(0, 1, 1), (1, 2, 2), (0, 0, 3), (1, 0, 3), (2, 0, 3)], 3),
        GraphBatch.of([4, 5, 0], [(1, 3, 0), (0, 0, 2), (1, 0, 2)], 3),
    ]


def call(net, b: GraphBatch):
    return net(b.labels, b.positions, b.source, b.target, b.relation)


def test_boxes_and_classes_move_with_their_nodes_and_do_not_see_other_graphs():
    net, graphs = graph_net().eval(), batches()
    alone = [call(net, g) for g in graphs]
    together = call(net, GraphBatch.cat(graphs))
    for a, both in zip(zip(*alone, strict=True), together, strict=True):
        torch.testing.assert_close(torch.cat(a), both, rtol=0, atol=1e-12)
    g, order = graphs[0], torch.tensor([2, 0, 3, 1])
    back = order.argsort()
    moved = GraphBatch(g.labels[order], g.positions[order], back[g.source], back[g.target], g.relation, g.counts)
    for a, b in zip(call(net, moved), alone[0], strict=True):
        torch.testing.assert_close(a, b[order], rtol=0, atol=1e-12)
    assert (call(graph_net(head="plain").eval(), g)[0] > 0).all()
    assert alone[0][1].min() > -0.1701, "the published logits end in a GELU"


def test_edges_are_alike_without_features_and_all_tell_something_with_them():
    g = batches()[0]
    other = GraphBatch(g.labels, g.positions, g.source, g.target, (g.relation + 1) % 4, g.counts)
    deaf, net = graph_net(edge_features=False).eval(), graph_net().eval()
    assert torch.equal(call(deaf, g)[0], call(deaf, other)[0])
    assert not torch.allclose(call(net, g)[0], call(net, other)[0])


def test_a_batch_without_two_edges_can_be_trained_on():
    net = graph_net().train()
    boxes, logits = call(net, GraphBatch.of([0], [], 3))
    assert boxes.shape == (1, 4) and logits.isfinite().all()


def test_both_ways_and_padding():
    g = GraphBatch.of([1, 2, 0], [(0, 3, 1), (0, 0, 2), (1, 0, 2)], 3, bidirectional=5, nodes=5)
    assert g.labels.tolist() == [1, 2, 0, 0, 0] and g.counts == (5,)
    assert g.source.tolist() == [0, 0, 1, 1, 2, 2] and g.target.tolist() == [1, 2, 2, 0, 0, 1]
    assert g.relation.tolist() == [3, 0, 0, 8, 5, 5]


# Positions


def test_positions_are_eigenvectors_by_rising_eigenvalue():
    source, target = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 0, 2])
    both = torch.cat([source, target]), torch.cat([target, source])
    a = np.zeros((4, 4))
    np.add.at(a, both, 1)
    root = np.diag(a.sum(0) ** -0.5)
    laplacian = torch.from_numpy(np.eye(4) - root @ a @ root)
    symmetric = laplacian_positions(source, target, 4, 5, directed=False)
    as_published = laplacian_positions(*both, 4, 5)  # edges both ways: nothing is complex
    for found in (symmetric, as_published):
        assert found.shape == (4, 5) and (found[:, 3:] == 0).all()
        values = (found.T @ laplacian @ found).diagonal()[:3]
        torch.testing.assert_close(laplacian @ found[:, :3], found[:, :3] * values, rtol=0, atol=1e-12)
        assert values.tolist() == sorted(values.tolist()) and values[0] > 0.1
    torch.testing.assert_close(symmetric.T @ symmetric, torch.diag(torch.tensor([1.0] * 3 + [0, 0]).double()))
    twice = laplacian_positions(torch.tensor([0, 0, 1]), torch.tensor([1, 1, 0]), 2, 1)  # A = [[0, 2], [1, 0]]
    assert twice.shape == (2, 1)
    expected = np.linalg.eig(np.array([[1.0, -math.sqrt(2)], [-math.sqrt(0.5), 1.0]]))
    assert abs(twice[:, 0].numpy() @ expected[1][:, expected[0].argmax()]) == pytest.approx(1)


def test_equal_eigenvalues_have_vectors_of_their_own_choice():
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    values, other = np.array([0.0, 1.0, 1.0, 1.0, 2.0]), q.copy()
    other[:, 1:4] = q[:, 1:4] @ turn
    other[:, 4] *= -1
    np.testing.assert_allclose(_conventional(values, q), _conventional(values, other), atol=1e-10)
    span = _conventional(values, q)[:, 1:4]
    np.testing.assert_allclose(span @ span.T, q[:, 1:4] @ q[:, 1:4].T, atol=1e-10)


# Tokens


def test_places_and_tokens():
    at = lambda x, y: int(place_tokens(torch.tensor(x), torch.tensor(y)))
    assert at(0.0, 0.0) == 0 and at(1.0, 1.0) == 8099 and at(-3.0, 7.0) == 89 * 90
    assert at(0.5 / 89, 1.5 / 89) == 2 * 90, "ties go to even"
    x, y = torch.rand(2, 1000, generator=rng(), dtype=torch.float64)
    for found, due in zip(places(place_tokens(x, y)), (x, y), strict=True):
        assert (found - due).abs().max() <= 1 / 178 + 1e-6
    boxes, labels = torch.rand(2, 3, 4, generator=rng()), torch.tensor([[5, 6, 7], [8, 9, 0]])
    tokens = layout_tokens(boxes, labels)
    assert tokens.shape == (2, 92) and (tokens[:, 9:90] == 8191).all() and tokens[0, -2:].tolist() == [0, 8099]
    assert tokens[:, 0:9:3].tolist() == labels.tolist()
    order = torch.tensor([2, 0, 1])
    shuffled = layout_tokens(boxes, labels, order=order)
    assert torch.equal(shuffled[:, :9].unflatten(1, (3, 3)), tokens[:, :9].unflatten(1, (3, 3))[:, order])
    with pytest.raises(BadInput, match="name fewer"):
        layout_tokens(boxes, labels, slots=2)


def test_separate_vocabularies_do_not_meet():
    code = LayoutCode(codes=16, objects=10, sections=8, slots=4, shared=False)
    boxes, labels = torch.rand(1, 3, 4, generator=rng()), torch.tensor([[1, 9, 0]])
    tokens = code(boxes, labels)[0]
    assert code.vocabulary == 16 + 10 + 64 + 1 and len(tokens) == code.length == 14
    classes, corners = tokens[0:9:3], torch.cat([tokens[1:9:3], tokens[2:9:3], tokens[-2:]])
    assert (classes - 16).tolist() == [1, 9, 0] and corners.min() >= 26 and corners.max() < 90
    assert (tokens[9:12] == 90).all() and (code.nothing()[0, :12] == 90).all()
    with pytest.raises(BadInput, match="too few"):
        LayoutCode(codes=64, sections=9)
    assert LayoutCode().vocabulary == 8192 and LayoutCode().length == 92


# Losses


def test_complete_iou():
    boxes = torch.rand(6, 4, generator=rng(), dtype=torch.float64).sort(dim=1).values[:, [0, 1, 2, 3]]
    assert complete_iou(boxes, boxes).abs().max() < 1e-5
    a, b = (torch.tensor(x, dtype=torch.float64) for x in ([0.0, 0.0, 0.4, 0.2], [0.2, 0.1, 0.4, 0.5]))
    both, union = 0.2 * 0.1, 0.08 + 0.08 - 0.02
    distance, diagonal = 0.1**2 + 0.2**2, 0.4**2 + 0.5**2
    v = 4 / math.pi**2 * (math.atan(0.2 / 0.4) - math.atan(0.4 / 0.2)) ** 2
    alpha = v / (1 - both / union + v)
    assert float(complete_iou(a, b)) == pytest.approx(1 - both / union + distance / diagonal + alpha * v, abs=1e-6)
    flat = torch.zeros(4, requires_grad=True)
    complete_iou(flat.clamp(0, 1), torch.tensor([0.1, 0.2, 0.3, 0.4])).backward()
    assert flat.grad.isfinite().all(), "a box without sides has a gradient"


def test_losses_of_both_stages():
    boxes = torch.tensor([[-0.5, 0.0, 0.5, 1.2]], requires_grad=True)
    due, logits, labels = torch.tensor([[0.0, 0.0, 0.5, 1.0]]), torch.zeros(1, 4), torch.tensor([2])
    first, parts = layout_loss(boxes, logits, due, labels)
    assert first.item() == pytest.approx(math.log(4), abs=1e-5) and set(parts) == {"box", "iou", "label"}
    _, parts = layout_loss(boxes, logits, due, labels, stage=2)
    assert parts["box"].item() == pytest.approx(10 * (0.5 + 0.2) / 4) and parts["iou"].item() > 0.1


@pytest.mark.parametrize("updates", [10, 57])
def test_one_cycle_is_torchs(updates):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-4, total_steps=updates)
    for i in range(updates):
        assert one_cycle(i, updates, 3e-4) == pytest.approx(torchs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        if i + 1 < updates:
            torchs.step()
    assert all(one_cycle(i, n, 1.0) > 0 for n in (1, 2, 3) for i in range(n))


def test_weight_decay_is_for_linear_layers():
    net = ImageTransformer(9, 5, 12, width=8, depth=1, heads=2)
    linear = {f"{name}.weight" for name, part in net.named_modules() if isinstance(part, torch.nn.Linear)}
    made = decayed(linear, net, 1e-4)(list(net.parameters()), lr=1.0)
    names = [name for name, _ in net.named_parameters()]
    spared = {name for name, group in zip(names, made.param_groups, strict=True) if not group["weight_decay"]}
    assert "head.weight" not in spared and {"token.weight", "place", "norm.weight", "blocks.0.mlp.0.bias"} <= spared
    assert all(name in spared for name in names if name.endswith("bias")) and len(names) - len(spared) == 7


# The image transformer


def test_no_token_hears_a_later_one_and_what_is_kept_changes_nothing():
    torch.manual_seed(0)
    net = ImageTransformer(9, 5, 12, width=8, depth=2, heads=2).double().eval()
    torch.nn.init.normal_(net.place)
    tokens = torch.randint(9, (2, 12), generator=rng())
    with torch.no_grad():
        logits = net(tokens)
        for i in range(1, 12):
            other = tokens.clone()
            other[:, i] = (other[:, i] + 1) % 9
            changed = (net(other) - logits).abs().amax((0, 2))
            assert (changed[:i] < 1e-12).all() and changed[i] > 1e-9
        parts, past = [], None
        for some in (tokens[:, :5], tokens[:, 5:8], *tokens[:, 8:].split(1, dim=1)):
            part, past = net.follow(some, past)
            parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), logits, rtol=0, atol=1e-12)


def test_the_published_size_and_the_loss_at_first():
    with torch.device("meta"):
        assert sum(p.numel() for p in ImageTransformer().parameters()) == 339_159_744
    torch.manual_seed(0)
    net = ImageTransformer(width=8, depth=1, heads=2, length=92 + 16).eval()
    codes = torch.randint(8192, (2, 16), generator=rng())
    with torch.no_grad():
        loss = code_loss(net, LayoutCode().nothing(2), codes)
        by_hand = net(torch.cat([LayoutCode().nothing(2), codes], 1)).log_softmax(-1)
    assert float(loss) == pytest.approx(math.log(8192), abs=0.05)
    due = torch.stack([by_hand[b, 91 + i, codes[b, i]] for b in range(2) for i in range(16)])
    assert float(loss) == pytest.approx(-float(due.mean()), abs=1e-5)


def test_what_is_kept_of_logits():
    logits = torch.tensor([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 5.0, 1.0]])
    assert (kept(logits, top_k=1) > -torch.inf).tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    assert torch.equal(kept(logits, top_k=100), logits) and torch.equal(kept(logits, None), logits)
    law = logits[:1].softmax(-1)[0]  # .64 .09 .24 .03
    for top_p, n in ((0.5, 1), (0.7, 2), (0.95, 3), (0.999, 4)):
        due = law >= law.sort(descending=True).values[n - 1]
        assert torch.equal(kept(logits[:1], None, top_p)[0] > -torch.inf, due)
    for cold in (0.0, 1e-300):  # the latter is 0 in float32
        with pytest.raises(BadInput, match="temperature must be at least"):
            Sampling(temperature=cold)
    assert (logits / Sampling(temperature=1e-6).temperature).softmax(-1).isfinite().all()


def test_the_likeliest_code_follows_where_only_one_is_kept(model):
    layout, n = model.code.nothing(2), model.sampling_steps
    found = written(model.network, layout, n, Sampling(top_k=1), [rng(1), rng(2)])
    tokens = layout
    for i in range(n):
        following = model.network(tokens)[:, -1].argmax(-1)
        assert torch.equal(found[:, i], following)
        tokens = torch.cat([tokens, following[:, None]], 1)


# Codes and gradients


def test_codes_are_codes_again_and_gradients_go_straight_through(model):
    codes = torch.arange(16).view(1, 1, 4, 4)
    embedded = model.vae.quantize.get_codebook_entry(codes.flatten(), (1, 4, 4, 4))
    assert torch.equal(model.vae.quantize(embedded)[2][2].view(1, 1, 4, 4), codes)
    z = torch.randn(1, 4, 4, 4, generator=rng(), requires_grad=True)
    weight = torch.randn(1, 4, 4, 4, generator=rng(1))
    (model.vae.quantize(z)[0] * weight).sum().backward()
    assert torch.equal(z.grad, weight)
    x = model.decode_latents(codes)
    assert x.shape == (1, 3, 8, 8) and model.encode_image(x).shape == (1, 1, 4, 4)


@pytest.mark.parametrize("padding", [True, False])
def test_codes_teach_the_image_transformer_alone(padding):
    recipe = small(padding=padding, relations="drawn", data="sketch-scenes")
    pictures = recipe.open()
    made = recipe.model((), pictures.vocabulary)
    made.vae.requires_grad_(False)
    told = (pictures.vocabulary, pictures, recipe.relations, recipe.padding, True, False)
    training = CodeTraining(recipe, made, torch.zeros(6, 4, 4, dtype=torch.long), *told)
    batch = training.batch(0, rng(2), 6)
    counts = {len(pictures.graph(i).objects) + 1 for i in batch["rows"].tolist()}
    assert len(counts) > 1 and set(batch["counts"]) == ({max(counts)} if padding else counts)
    layout, image = training.turns()
    loss, _ = layout.losses["loss"](batch, rng())
    loss.backward()
    assert all(p.grad is None for p in made.network.parameters()) and made.layout.object.weight.grad is not None
    made.layout.zero_grad(set_to_none=True)
    loss, _ = image.losses["loss"](batch, rng())
    loss.backward()
    parts = made.layout.parameters, made.vae.parameters
    assert all(p.grad is None for part in parts for p in part()) and made.network.head.weight.grad is not None
    tokens = training.tokens(batch["boxes"], batch["labels"], batch["counts"], rng())
    assert tokens.shape == (6, made.code.length)
    assert not torch.equal(tokens, training.tokens(batch["boxes"], batch["labels"], batch["counts"], rng(1)))


def test_a_share_of_layouts_is_not_told(model):
    recipe = small(label_dropout=0.5, true_layout=True)
    pictures = recipe.open()
    training = CodeTraining(recipe, model, torch.zeros(6, 4, 4, dtype=torch.long), pictures.vocabulary, pictures)
    seen = []
    handle = model.network.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    training.loss(training.batch(0, rng(), 200), rng())
    handle.remove()
    nothing = (seen[0][:, : model.code.length - 2] == model.code.vocabulary - 1).all(1)
    assert 0.35 < nothing.double().mean() < 0.65 and [turn.name for turn in training.turns()] == ["image"]


# Graphs


@pytest.mark.parametrize(
    ("subject", "other", "relation"),
    [
        ((0, 0, 0.2, 0.2), (0.5, 0, 0.7, 0.2), "left of"), ((0.5, 0, 0.7, 0.2), (0, 0, 0.2, 0.2), "right of"),
        ((0, 0, 0.2, 0.2), (0, 0.5, 0.2, 0.7), "above"), ((0, 0.5, 0.2, 0.7), (0, 0, 0.2, 0.2), "below"),
        ((0, 0, 1, 1), (0.2, 0.2, 0.5, 0.4), "surrounding"), ((0.2, 0.2, 0.5, 0.4), (0, 0, 1, 1), "inside"),
        ((0, 0, 0.2, 0.2), (0, 0, 0.2, 0.2), "right of"), ((0, 0, 0.25, 0.25), (0.25, 0.25, 0.5, 0.5), "left of"),
        ((0.25, 0.25, 0.5, 0.5), (0, 0, 0.25, 0.25), "below"), ((0.25, 0, 0.5, 0.25), (0, 0.25, 0.25, 0.5), "right of"),
        ((0, 0.25, 0.25, 0.5), (0.25, 0, 0.5, 0.25), "left of"),
    ],
)  # fmt: skip
def test_relations_are_those_of_boxes(subject, other, relation):
    assert spatial_relation([x / 4 for x in subject], [x / 4 for x in other]) == relation


def test_each_object_draws_a_partner_and_the_sketch_worlds_own_relations_agree():
    boxes = [(0.1, 0.1, 0.3, 0.3), (0.6, 0.1, 0.8, 0.3), (0.1, 0.6, 0.3, 0.8)]
    drawn = [drawn_relations(boxes, rng(i)) for i in range(40)]
    assert all(len(t) == 3 and all(i in (a, b) and a != b for i, (a, _, b) in enumerate(t)) for t in drawn)
    assert {(a, b) for t in drawn for a, _, b in t} == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert all(word == spatial_relation(boxes[a], boxes[b]) for t in drawn for a, word, b in t)
    assert drawn_relations(boxes[:1], rng()) == ()
    found = [graph_of(sample_scene(np.random.default_rng(i), 2)) for i in range(30)]
    agree = [spatial_relation(g.boxes[a], g.boxes[b]) == word for g in found for a, word, b in g.relationships]
    assert sum(agree) > 25
    centres = ((0.5, 0.1), (0.5, 0.9))
    assert spatial_relation(boxes[0], boxes[1], centres) == "above"


def test_graphs_are_read_from_json(tmp_path):
    file = tmp_path / "cow.json"
    published = {"objects": ["cow", "grass"], "relationships": [[0, "above", 1]]}
    file.write_text(json.dumps([published, {**published, "boxes": [[0, 0, 0.5, 0.5], [0, 0.5, 1, 1]]}]))
    first, second = read_graphs(file)
    assert first == SceneGraph(("cow", "grass"), ((0, "above", 1),)) and second.boxes[1] == (0, 0.5, 1, 1)
    labels, triples = Vocabulary.of(["cow", "grass"], ["above"]).encode(first)
    assert labels == [1, 2, 0] and triples == [(0, 1, 1), (0, 0, 2), (1, 0, 2)]


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        ([], "not an object"), ({"objects": "cow"}, "not a list"), ({"objects": [1]}, "are names"),
        ({"objects": ["a", "__image__"]}, "leave __image__ out"),
        ({"objects": ["a", "b"], "relationships": [[0, "on"]]}, "two places"),
        ({"objects": ["a", "b"], "relationships": [[0, "on", 2]]}, "names object 2 of 2"),
        ({"objects": ["a", "b"], "relationships": [[True, "on", 0]]}, "two places"),
        ({"objects": ["a", "b"], "relationships": [[-1, "on", 0]]}, "names object -1"),
        ({"objects": ["a", "b"], "relationships": [[1, "on", 1]]}, "itself"),
        ({"objects": ["a"], "boxes": []}, "0 boxes for 1"), ({"objects": ["a"], "boxes": [[0, 0, 1]]}, "four numbers"),
        ({"objects": ["a"], "boxes": [[0.5, 0, 0.2, 1]]}, "in that order"),
        ({"objects": ["a"], "boxes": [[0, 0, 10**400, 1]]}, "four numbers"),
    ],
)  # fmt: skip
def test_graphs_of_another_form_are_refused(data, wrong):
    with pytest.raises(BadInput, match=wrong):
        from_json(data, "a file")


@pytest.mark.parametrize(
    ("triples", "circle"),
    [
        ([(0, "left of", 1), (1, "left of", 0)], True), ([(0, "left of", 1), (0, "right of", 1)], True),
        ([(0, "inside", 1), (1, "inside", 2), (0, "surrounding", 2)], True), ([(0, "below", 1), (0, "above", 1)], True),
        ([(0, "left of", 1), (1, "right of", 0)], False), ([(0, "left of", 1), (1, "above", 0)], False),
        ([(0, "left of", 1), (1, "left of", 2), (0, "left of", 2), (3, "left of", 0)], False),
        ([(3, "left of", 2), (2, "left of", 1), (1, "left of", 3)], True), ([(0, "near", 1), (1, "near", 0)], False),
    ],
)  # fmt: skip
def test_only_relations_that_no_picture_can_show_are_circles(triples, circle):
    graph = SceneGraph(("a", "b", "c", "d"), tuple(triples))
    if circle:
        with pytest.raises(BadInput, match="circle: "):
            require_drawable(graph)
    else:
        require_drawable(graph)


def test_a_folder_of_pictures_with_graphs(tmp_path):
    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    with pytest.raises(BadInput, match="has no graph beside it"):
        open_graphs(str(tmp_path), 8)
    graph = {"objects": ["cow", "sky"], "relationships": [[0, "below", 1], [1, "behind", 0]]}
    (tmp_path / "a.json").write_text(json.dumps(graph))
    with pytest.raises(BadInput, match="add boxes"):
        open_graphs(str(tmp_path), 8)
    (tmp_path / "a.json").write_text(json.dumps({**graph, "boxes": [[0.25, 0, 0.5, 1], [0, 0, 1, 0.5]]}))
    pictures = open_graphs(str(tmp_path), 8)
    assert pictures.graph(0).boxes == ((0, 0, 0.5, 1), (0, 0, 1, 0.5)) and pictures.most == 2
    assert pictures.vocabulary.objects[1:] == ("cow", "sky") and pictures.vocabulary.relations[-1] == "behind"
    with pytest.raises(BadInput, match="slots must be at least 3"):
        small(data=str(tmp_path), slots=2).open()
    outside = SceneGraph(("a", "b"), ((0, "left of", 1),), ((0, 0, 0.2, 1), (0.3, 0, 0.6, 1)))
    inside = cropped(outside, (40, 20))
    assert (
        inside.objects == ("b",) and inside.relationships == () and inside.boxes[0] == pytest.approx((0.1, 0, 0.7, 1))
    )


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"size": 9}, "size must be a multiple of 2"), ({"width": 15}, "width must be a multiple of heads"),
        ({"graph_width": 15}, "graph_width must be"), ({"shared": True}, "at most 4 sections"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be(change, wrong):
    with pytest.raises(BadInput, match=wrong):
        small(**change)


# Drawing


def test_a_picture_depends_on_its_graph_and_seed_alone(model):
    other = SceneGraph(("red star",))
    drawn = model.draw([PAIR, other, PAIR], [1, 1, 2])
    same = lambda one, two: torch.allclose(one, two, rtol=0, atol=1e-5)
    assert same(model.draw([PAIR], [2]), drawn[2:]) and same(model.draw(other, 1), drawn[1:2])
    assert not same(drawn[0], drawn[2]) and not same(drawn[0], drawn[1])
    plain = {"objects": ["red star", "blue fish"], "relationships": [[0, "left of", 1]]}
    assert same(model.draw([plain, plain], [1, 2]), drawn[[0, 2]])
    assert model.draw(None, [1, 2]).shape == (2, 3, 8, 8)
    assert same(model.draw(None, [1, 2], cond=model.told([PAIR, PAIR])), drawn[[0, 2]])


def test_layouts_are_predicted_or_fixed(model):
    first, again, other = model.layouts([PAIR] * 3, [1, 1, 3])
    assert first == again and len(first.boxes) == 2 and all(0 <= x <= 1 for box in first.boxes for x in box)
    assert {model.layouts(PAIR, s)[0] for s in range(6)} != {first}, "signs are drawn"
    boxes = ((0.0, 0.25, 0.5, 0.75), (0.5, 0.25, 1.0, 0.75))
    fixed = SceneGraph(PAIR.objects, PAIR.relationships, boxes)
    found = model.layouts(fixed, 1)[0]
    assert found.objects == PAIR.objects and found.boxes == boxes and other.boxes
    uneven = ((0.0, 0.1, 0.3, 0.7), (0.5, 0.2, 1.0, 0.9))  # which float32 rounds
    assert model.layouts(SceneGraph(PAIR.objects, (), uneven), 1)[0].boxes == uneven
    assert not torch.allclose(model.draw(fixed, [1]), model.draw(PAIR, [1]), atol=1e-3)


@pytest.mark.parametrize(
    ("graph", "wrong"),
    [
        (SceneGraph(()), "empty graph"), (SceneGraph(("red dragon",)), "unknown object"),
        (SceneGraph(PAIR.objects, ((0, "beside", 1),)), "unknown relation"),
        (SceneGraph(PAIR.objects, ((0, "__in_image__", 1),)), "unknown relation"),
        (SceneGraph(PAIR.objects, ((0, "above", 1), (1, "above", 0))), "circle: red star"),
        (SceneGraph(("red star",) * 4), "at most 3"), ("nowhere.json", "no JSON file"), ([], "at least one"),
        (Labels(torch.zeros(1, dtype=torch.long)), "not Labels"),
    ],
)  # fmt: skip
def test_graphs_that_cannot_be_drawn_are_refused(model, graph, wrong):
    with pytest.raises(BadInput, match=wrong):
        model.told(graph)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"cfg_scale": 2.0}, "cfg_scale"), ({"scheduler": "ddim"}, "scheduler"), ({"sampling_steps": 3}, "16 codes"),
        ({"size": 16}, "one size"), ({"top_k": 0}, "top_k"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused(model, options, wrong):
    with pytest.raises(BadInput, match=wrong):
        model.draw(PAIR, 1, **options)


def test_the_command_draws_layouts_and_pictures_and_takes_its_layouts_back(model, tmp_path, capsys):
    model.save(tmp_path / "model")
    scene = tmp_path / "scene.json"
    scene.write_text(json.dumps({"objects": ["red star", "blue fish"], "relationships": [[0, "left of", 1]]}))
    run = lambda out, *rest: cli.main(
        ["graph", *map(str, rest), "--model", str(tmp_path / "model"), "--device", "cpu", "--out", str(tmp_path / out)]
    )
    assert run("one", scene, "--seeds", "1,2") == 0 and "2 pictures" in capsys.readouterr().out
    one = tmp_path / "one"
    assert {"000-graph0-seed1.png", "sheet.png", "layouts.png", "graph.json"} <= {f.name for f in one.iterdir()}
    layouts = json.loads((one / "layouts.json").read_text())
    assert [tuple(map(tuple, g["boxes"])) for g in layouts] == [x.boxes for x in model.layouts([PAIR] * 2, [1, 2])]
    assert run("two", one / "layouts.json", "--layouts-only") == 0
    again = json.loads((tmp_path / "two" / "layouts.json").read_text())
    assert [g["boxes"] for g in again] == [g["boxes"] for g in layouts] and not (tmp_path / "two/sheet.png").exists()
    scene.write_text(json.dumps({"objects": []}))
    assert run("three", scene) == 2 and "empty graph" in capsys.readouterr().err
    assert not (tmp_path / "three").exists() and run("four") == 2


def test_sample_takes_a_file_for_a_prompt(model, tmp_path):
    model.save(tmp_path / "model")
    (tmp_path / "scene.json").write_text(json.dumps({"objects": ["red star"]}))
    asked = ["sample", str(tmp_path / "scene.json"), "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert cli.main([*asked, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "sheet.png").exists()


@pytest.mark.parametrize("bidirectional", [True, False])
def test_both_objects_of_a_pair_hear_their_relation_in_the_small_preset(bidirectional):
    """With edges one way only, the first object's box is the same on either side."""
    told = TrfSG2Im.presets["small-sketch"]
    assert told["bidirectional"]
    recipe = TrfSG2Im(**{**told, "bidirectional": bidirectional})
    vocabulary = Vocabulary.of(["star", "fish"], SPATIAL)
    torch.manual_seed(0)
    net, more = recipe.graph_network(vocabulary).eval(), len(vocabulary.relations) * bidirectional

    def boxes(word: str) -> torch.Tensor:
        graph = SceneGraph(("star", "fish"), ((0, word, 1),))
        b = GraphBatch.of(*vocabulary.encode(graph), recipe.positions, recipe.directed, more)
        return net(b.labels, b.positions, b.source, b.target, b.relation)[0]

    apart = (boxes("left of") - boxes("right of")).abs().amax(1)
    assert (apart[:2] > 0).tolist() == [bidirectional, True]


def test_a_run_does_not_go_on_with_other_names(tmp_path):
    """Names are numbered in their order: another one in the place of one would be taken for it."""
    data, graph = tmp_path / "data", {"objects": ["cow", "sky"], "boxes": [[0, 0, 0.5, 1], [0.5, 0, 1, 1]]}
    data.mkdir()
    for name in "ab":
        Image.new("RGB", (8, 8)).save(data / f"{name}.png")
        (data / f"{name}.json").write_text(json.dumps(graph))
    recipe = small(data=str(data), updates=1, layout_updates=1, grid_every=0)
    recipe.run(tmp_path / "run", progress=False)
    shutil.rmtree(tmp_path / "run" / "model")  # as if it had been killed before
    for name in "ab":
        (data / f"{name}.json").write_text(json.dumps({**graph, "objects": ["sky", "ant"]}))
    with pytest.raises(BadInput, match=r"holds a run with rows=.* another folder to start anew"):
        recipe.run(tmp_path / "run", progress=False)


def test_another_models_autoencoder_and_graph_transformer_are_taken_over(model, tmp_path):
    model.save(tmp_path / "model")
    recipe = small(autoencoder=str(tmp_path / "model"), layout_updates=0, updates=1, true_layout=True, grid_every=0)
    recipe.run(tmp_path / "run", progress=False)
    from sfumato.pipeline import load

    made = load(tmp_path / "run", "cpu")
    for part in ("vae", "layout"):
        ours, theirs = (m.parts()[part].state_dict() for m in (made, model))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(BadInput, match="give those"):
        small(autoencoder=str(tmp_path / "model"), codes=32).run(tmp_path / "other", progress=False)


# The ledger's entry


def test_the_ledgers_pairs_stand_as_their_graphs_say_and_a_bag_has_no_relations():
    world, bag = entry.World(3, 12), entry.World(3, 12, bag=True)
    for i in range(12):
        graph = world.graph(i)
        assert entry.right(graph, graph.boxes) and len(set(graph.objects)) == 2
        assert bag.graph(i) == SceneGraph(graph.objects, (), graph.boxes)
    assert set(world.graph(0).objects) <= set(world.vocabulary.objects)


@pytest.mark.slow
def test_the_ledgers_entry_measures():
    few = {"pictures": 8, "updates": 1, "code_updates": 1, "layout_updates": 1, "batch": 2, "code_batch": 2}
    found = core.load("trf-sg2im").measure(1, n=3, **few)
    for claim in core.load("trf-sg2im").claims:
        assert [len(side) for side in found[claim]] == [3, 3]
    assert set(found["pictures as read"]["relations right"]) == {"graphs", "bag", "real, encoded"}
