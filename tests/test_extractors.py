"""Feature extractors: the FID's network, resize rules against PIL and closed forms, encoders, refusals."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from sfumato.errors import BadInput
from sfumato.metrics.extractors import CallableFeatures, EncoderFeatures, RandomFeatures, make_extractor, move
from sfumato.metrics.inception import CONVERT, Inception, Mixed, load_inception
from sfumato.metrics.perceptual import LPIPS
from sfumato.metrics.resize import RULES, resize, to_bytes


def pictures(n=3, height=48, width=None, seed=0):
    shape = (n, 3, height, width or height)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("height, width", [(32, 32), (299, 299), (400, 400), (64, 200)])
def test_clean_is_pil_per_channel_in_floats(height, width):
    x = pictures(1, height, width)
    channels = [Image.fromarray(c.numpy().astype(np.float32)) for c in x[0]]
    expected = np.stack([np.asarray(c.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels])
    assert np.abs(resize(x, 299, "clean")[0].numpy() - expected).max() < 1e-4  # of 255 levels


@pytest.mark.parametrize("side, target", [(8, 20), (20, 8), (16, 16)])
def test_bilinear_rules_on_a_ramp_have_a_closed_form(side, target):
    """A bilinear rule reproduces a ramp wherever it samples inside the picture, so it shows where it samples."""
    ramp = (torch.arange(side) * 10).to(torch.uint8).expand(1, 3, side, side)
    at = {
        "tf1-legacy": torch.arange(target) * side / target,
        "torch-bilinear": (torch.arange(target) + 0.5) * side / target - 0.5,
    }
    for rule, places in at.items():
        expected = 10 * places.clamp(0, side - 1)
        for x in (ramp, ramp.mT):
            found = resize(x, target, rule)[0, 1]
            assert torch.allclose(found[3] if x is ramp else found[:, 3], expected, atol=1e-4), rule


def test_an_antialiased_rule_averages_what_the_others_skip():
    stripes = (255 * (torch.arange(64) % 2)).to(torch.uint8).expand(1, 3, 64, 64)
    spread = {rule: float(resize(stripes, 16, rule).std()) for rule in RULES}
    assert max(spread["clean"], spread["torch-antialias"]) < 5
    assert resize(stripes, 16, "tf1-legacy").max() == 0  # every fourth column, all of them black
    with pytest.raises(BadInput, match="did you mean clean"):
        resize(stripes, 16, "cleen")


def test_floats_are_rounded_to_the_nearest_level():
    x = torch.tensor([0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 1 + 0.4999 / 255, -0.4999 / 255])
    assert to_bytes(x).tolist() == [0, 0, 1, 255, 255, 0]
    assert to_bytes(pictures()) is not None and to_bytes(pictures()).dtype == torch.uint8


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.tensor([100]), "not int64: convert them"),
        (torch.tensor([True]), "not bool"),
        (torch.tensor([0.0, 255.0]), "not from 0 to 255: bring them there"),
        (torch.tensor([-1.0, 1.0]), "not from -1 to 1"),
        (torch.tensor([0.0, 1 + 0.6 / 255]), r"values in \[0, 1\]"),
        (torch.tensor([[0.0], [float("nan")]]), "not finite"),
    ],
)
def test_what_is_no_picture_is_refused(x, told):
    with pytest.raises(BadInput, match=told):
        to_bytes(x)


class Tiny(LPIPS):
    """LPIPS with a network of one weight."""

    name, hash, resize = "tiny", "", ""

    def __init__(self):
        self.network = nn.PReLU(1)


def test_the_device_that_is_named_reaches_lpips():
    judge = Tiny()
    move(judge, "meta")
    assert next(judge.network.parameters()).device.type == "meta"
    judge.network.forward = lambda a, b: (a - b).mean((1, 2, 3))
    found = judge(torch.zeros(2, 3, 64, 64), torch.zeros(2, 3, 32, 32).double())
    assert found.device.type == "meta" and found.shape == (2,)


def test_lpips_sees_no_side_below_its_own_and_the_aspect_as_it_is():
    judge, seen = Tiny(), []
    judge.network.forward = lambda a, b: (seen.append((a, b)), a.mean((1, 2, 3)))[1]
    for shape, expected in (
        ((32, 128), (64, 256)), ((128, 32), (256, 64)), ((20, 30), (64, 96)), ((32, 32), (64, 64)),
        ((64, 100), (64, 100)), ((100, 64), (100, 64)),
    ):  # fmt: skip
        judge(torch.rand(2, 3, *shape), torch.rand(2, 3, *shape))
        assert all(x.shape == (2, 3, *expected) for x in seen.pop())
    a, b = (torch.rand(2, 3, 32, 128) for _ in range(2))
    upright = judge(a.mT, b.mT)
    torch.testing.assert_close(judge(a, b), upright)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Inception().eval()


def test_the_network_has_the_published_shape(network):
    assert sum(p.numel() for p in network.parameters()) == 23_850_960
    # as the files in circulation name them
    state = network.state_dict()
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3), "Mixed_5d.branch_pool.bn.running_var": (64,),
        "Mixed_6c.branch7x7dbl_3.conv.weight": (160, 160, 1, 7), "Mixed_7a.branch7x7x3_4.conv.weight": (192, 192, 3, 3),
        "Mixed_7b.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1), "fc.weight": (1008, 2048), "fc.bias": (1008,),
    }  # fmt: skip
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    with torch.no_grad():
        features = network(resize(pictures(2), 299))
    assert features.shape == (2, 2048) and (features >= 0).all()
    assert torch.allclose(network.logits(features), features @ network.fc.weight.T)


def test_averages_do_not_count_the_padding_and_the_last_pool_is_a_maximum(network):
    def pooled(kind):
        block = Mixed(1, [[("branch1x1", 1, 1)]], kind, 1).eval()
        torch.nn.init.ones_(block.branch_pool.conv.weight)
        x = torch.arange(25.0).reshape(1, 1, 5, 5)
        return block(x)[0, 1].detach() * (1 + 0.001) ** 0.5

    assert pooled("average")[0, 0] == pytest.approx((0 + 1 + 5 + 6) / 4)
    assert pooled("maximum")[0, 0] == pytest.approx(6)
    assert network.Mixed_7b.pool == "average" and network.Mixed_7c.pool == "maximum"


def test_weights_that_do_not_fit_are_refused(network, tmp_path):
    state = {k: v for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "good.safetensors")
    assert torch.equal(load_inception(tmp_path / "good.safetensors").fc.bias, state["fc.bias"])
    save_file({**state, "fc.weight": torch.zeros(1000, 2048)}, tmp_path / "torchvision.safetensors")
    with pytest.raises(BadInput, match=r"fc.weight is \(1000, 2048\) and not \(1008, 2048\)"):
        load_inception(tmp_path / "torchvision.safetensors")
    save_file({"fc.weight": state["fc.weight"]}, tmp_path / "part.safetensors")
    with pytest.raises(BadInput, match=r"Conv2d_1a_3x3.conv.weight is missing"):
        load_inception(tmp_path / "part.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="cannot be read as safetensors"):
        load_inception(tmp_path / "broken.safetensors")
    with pytest.raises(BadInput, match="there are no Inception weights at"):
        load_inception(tmp_path / "absent.safetensors")


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path, monkeypatch):
    file = tmp_path / "weights.pth"
    torch.save({"a": torch.ones(2, 3).mT, "n": torch.tensor(1)}, file)
    with pytest.raises(BadInput, match="is a pickle") as refused:
        load_inception(file)
    assert CONVERT in str(refused.value)
    monkeypatch.setattr("sys.argv", ["-c", str(file), str(tmp_path / "weights.safetensors")])
    exec(CONVERT)
    from safetensors.torch import load_file

    assert torch.equal(load_file(tmp_path / "weights.safetensors")["a"], torch.ones(3, 2))


def folder_of(model, folder, prepare):
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    return str(folder)


def test_an_encoder_gives_its_class_token_of_the_whole_picture(tmp_path):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    model = Dinov2Model(config).eval()
    prepare = {"size": {"shortest_edge": 36}, "crop_size": {"height": 28, "width": 28}, "do_center_crop": True,
               "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}  # fmt: skip
    extractor = make_extractor(folder_of(model, tmp_path, prepare))
    assert "28x28" in extractor.resize and "crop" not in extractor.resize and "class token" in extractor.name
    x = pictures(2, 28)
    with torch.no_grad():
        # the last hidden state of DINOv2 comes after its final normalisation
        expected = model(pixel_values=(x.float() / 255 - 0.5) / 0.25).last_hidden_state[:, 0]
    assert torch.allclose(extractor(x), expected, atol=1e-5)
    assert extractor(pictures(2, 60)).shape == (2, 8) and len(extractor.hash) == 64


def test_a_convolutional_encoder_gives_the_average_of_its_last_maps(tmp_path):
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    sizes = {"embedding_size": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    model = ResNetForImageClassification(ResNetConfig(**sizes)).eval()  # a classifier's folder serves as well
    prepare = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    extractor = make_extractor(folder_of(model, tmp_path, prepare))
    x = pictures(3, 32)
    with torch.no_grad():
        expected = model.resnet(pixel_values=x.float() / 127.5 - 1).pooler_output.flatten(1)
    assert torch.allclose(extractor(x), expected, atol=1e-5) and "last feature maps" in extractor.name


def test_clip_gives_its_projected_embedding(tmp_path):
    from transformers import CLIPConfig, CLIPModel

    from conftest import clip_tokenizer, word_merges

    torch.manual_seed(0)
    tokenizer = clip_tokenizer(tmp_path / "tokenizer", word_merges(), 12)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": len(tokenizer) - 1}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=6)
    model = CLIPModel(config).eval()
    tokenizer.save_pretrained(tmp_path)
    prepare = {"size": {"shortest_edge": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    extractor = EncoderFeatures(folder_of(model, tmp_path, prepare))
    x = pictures(2, 32)
    with torch.no_grad():
        state = model.vision_model(pixel_values=x.float() / 127.5 - 1).pooler_output
        expected = model.visual_projection(state)
    assert torch.allclose(extractor(x), expected, atol=1e-5) and "image embedding" in extractor.name
    # what `sfumato score --metrics clip --convention ...` makes of it
    from sfumato.metrics.alignment import ClipScore, clip_direction

    images, prompts = x.float() / 255, ["a red star", "a blue circle"]
    plain, hessel = ClipScore(str(tmp_path)), ClipScore(str(tmp_path), "hessel")
    cosines = (plain.clip.images(images) * plain.clip.texts(prompts)).sum(1)
    assert torch.allclose(plain(images, prompts), 100 * cosines)
    prefixed = [f"A photo depicts {p}" for p in prompts]
    assert torch.allclose(hessel(images, prompts), plain(images, prefixed).clamp(min=0) / 40)
    with pytest.raises(BadInput, match="did you mean hessel"):
        ClipScore(str(tmp_path), "hessell")
    there = clip_direction(plain.clip, images, images.flip(0), prompts, prompts[::-1])
    back = clip_direction(plain.clip, images, images.flip(0), prompts[::-1], prompts)
    assert torch.allclose(there, -back) and (there.abs() <= 1 + 1e-6).all()


def test_the_random_network_is_drawn_from_its_seed():
    x = pictures(4, 40)
    first, again, other = RandomFeatures(1), RandomFeatures(1), RandomFeatures(2)
    assert torch.equal(first(x), again(x)) and first.hash == again.hash
    assert not torch.equal(first(x), other(x)) and first.hash != other.hash
    assert first(x).shape == (4, 256) and "seed 1" in first.name


def test_names():
    assert make_extractor("pixels")(pictures(2, 16)).shape == (2, 768)
    assert torch.equal(make_extractor("pixels")(pictures(2, 16)), pictures(2, 16).flatten(1).float() / 255)
    oracle = make_extractor("oracle")
    assert oracle.logits(oracle(pictures(2, 64))).shape == (2, len(oracle.network.words("object")))
    with pytest.raises(BadInput, match="did you mean inception"):
        make_extractor("inceptoin")
    with pytest.raises(BadInput, match="name a safetensors file with --weights"):
        make_extractor("inception")
    with pytest.raises(BadInput, match="pixels does not take any"):
        make_extractor("pixels", weights="some.safetensors")
    with pytest.raises(BadInput, match="cannot be read as a model of transformers"):
        make_extractor(str(__file__).rsplit("/", 1)[0])
    own = CallableFeatures(torch.nn.Flatten(), "flat")
    assert own(pictures(2, 4)).shape == (2, 48) and len(own.hash) == 64
