"""Detectors and alignment: what they match, refuse and record; pictures are prepared as transformers does."""

import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sfumato.data import oracle as oracles
from sfumato.data import sketch
from sfumato.errors import BadInput
from sfumato.metrics.alignment import ClipScore, named, oracle_alignment
from sfumato.metrics.detectors import ClassifierDetector, OracleDetector, ZeroShotDetector, kinds, make_detector
from sfumato.metrics.perceptual import oracle_distance
from sfumato.metrics.vision import Preparation

LABELS = ("tench, Tinca tinca", "garbage_truck", "church")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A folder with a tiny random image classifier of three labels."""
    from transformers import ViTConfig, ViTForImageClassification

    folder = tmp_path_factory.mktemp("classifier")
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        id2label=dict(enumerate(LABELS)), label2id={label: i for i, label in enumerate(LABELS)},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ViTForImageClassification(config).save_pretrained(folder)
    prepare = {"size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    return folder


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a tiny random CLIP."""
    from transformers import CLIPConfig, CLIPModel

    from conftest import clip_tokenizer, word_merges

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(folder / "tokenizer", word_merges(), 12)
    tower = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 12, "eos_token_id": len(tokenizer) - 1}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 8}, projection_dim=8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    prepare = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(prepare))
    return folder


def pictures(n=5, side=48):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_classifier_matches_labels_and_lists_them(classifier):
    detector = make_detector(str(classifier), ["church"])
    assert isinstance(detector, ClassifierDetector)
    known = ("Tench", "tinca tinca", "garbage truck", "CHURCH")
    assert [detector.indices(c) for c in known] == [[0], [0], [1], [2]]
    with pytest.raises(BadInput, match="garbage_truck"):
        detector.check("parachute")
    x = pictures()
    found = [detector(x, c) for c in ("tench", "garbage truck", "church")]
    assert (sum(f.present.long() for f in found) == 1).all()  # exactly one label is the first
    assert torch.allclose(sum(f.score for f in found), torch.ones(5), atol=1e-6)
    assert torch.equal(ClassifierDetector(classifier, top=3)(x, "church").present, torch.ones(5).bool())
    assert torch.equal(ClassifierDetector(classifier, batch=2)(x, "church").present, found[2].present)
    assert len(detector(pictures(0), "church").present) == 0
    told = detector.describe()
    assert told["threshold"] == "top-1" and len(told["hash"]) == 64 and "32x32" in detector.resize


def test_labels_of_one_name_are_one_concept(classifier):
    """ImageNet calls a bird and a machine "crane": a picture of either shows it."""
    detector = ClassifierDetector(classifier)
    detector.labels = ["crane", "dog", "crane"]
    found = detector.judged(torch.tensor([[0.1, 0.2, 0.7], [0.3, 0.5, 0.2], [0.6, 0.3, 0.1]]), "crane")
    assert found.present.tolist() == [True, False, True]
    assert torch.allclose(found.score, torch.tensor([0.8, 0.5, 0.7]))


def test_no_network_is_given_an_empty_batch(clip, tmp_path):
    """Vision transformers refuse one, and an audit that retains nothing has no other pictures."""
    from transformers import ViTConfig, ViTForImageClassification

    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    labels = {"id2label": {0: "star", 1: "circle"}, "label2id": {"star": 0, "circle": 1}}
    ViTForImageClassification(ViTConfig(**shape, image_size=16, patch_size=8, **labels)).save_pretrained(tmp_path)
    told = {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    for detector in (ClassifierDetector(tmp_path), ZeroShotDetector(clip, ["star", "circle"])):
        found = detector(pictures(0), "star")
        assert found.present.shape == found.score.shape == (0,)


def test_zero_shot_is_a_softmax_over_texts(clip):
    detector = make_detector(str(clip), ["star", "circle"])
    assert isinstance(detector, ZeroShotDetector)
    x = pictures()
    star, circle = detector(x, "star"), detector(x, "circle")
    neutral = 1 - star.score - circle.score
    assert ((neutral > 0) & (neutral < 1)).all()
    assert not (star.present & circle.present).any()
    assert torch.equal(star.present, (star.score > circle.score) & (star.score > neutral))
    detector.check("star")
    with pytest.raises(BadInput, match="other concepts"):
        ZeroShotDetector(clip, ["star"]).check("star")


def test_clip_score_is_the_scaled_cosine(clip):
    score = ClipScore(str(clip))
    x, texts = pictures(2), ["a red star", "a circle"]
    network, prepared = score.clip.vision.network, score.clip.vision.prepare(x)
    inputs = score.clip.vision.tokenizer(texts, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out = network(pixel_values=prepared, **inputs)
    assert torch.allclose(score(x, texts), 100 * (out.image_embeds * out.text_embeds).sum(-1), atol=1e-4)


@pytest.mark.parametrize("side", [48, 20])
def test_pictures_are_prepared_as_transformers_does(side):
    from transformers import CLIPImageProcessor

    config = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    # Away from black and white, where PIL also clips what overshoots between its two passes.
    x = ((0.25 + 0.5 * pictures(1, side)) * 255).round() / 255
    array = (x[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    theirs = CLIPImageProcessor(**config)(array, return_tensors="pt")["pixel_values"]
    ours = Preparation.from_config(config)(x)
    # PIL rounds to 8 bits after each pass: half a level, enlarged by at most 1.3 (the bicubic weights'
    # absolute sum) in the second, and half a level; then the division by the standard deviation.
    assert float((theirs - ours).abs().max()) < 1.15 / 255 / 0.26
    assert Preparation.from_config({"size": 24, "do_normalize": False})(x).amax() <= 1


def test_oracle_reads_words_and_combinations(monkeypatch):
    detector = OracleDetector(oracles.Oracle().eval())
    assert detector.attributes("a red star") == {"colour": "red", "object": "star"}
    assert detector.attributes("chalk style") == {"style": "chalk"}
    with pytest.raises(BadInput, match="did you mean star"):
        detector.check("starr")
    with pytest.raises(BadInput, match="names nothing"):
        detector.check("a picture")
    sure = {a: torch.zeros(2, len(w)) for a, w in oracles.WORDS.items()}
    sure["object"][:, oracles.WORDS["object"].index("star")] = 9.0
    for row, colour in enumerate(("red", "blue")):
        sure["colour"][row, oracles.WORDS["colour"].index(colour)] = 9.0
    monkeypatch.setattr(detector, "oracle", lambda x: sure)
    detector.oracle.words = oracles.Oracle.words
    assert detector(pictures(2), "star").present.tolist() == [True, True]
    assert detector(pictures(2), "red star").present.tolist() == [True, False]
    share = oracle_alignment(sure, oracles.WORDS, ["a red star", "a red star"])
    assert share.tolist() == [1.0, 0.5]
    assert named("a starry sky background", {"object": ("star",), "background": ("sky",)}) == {"background": "sky"}
    assert oracle_alignment(sure, oracles.WORDS, ["", "a star"]).isnan().tolist() == [True, False]


def test_the_shipped_oracle_sees_what_was_drawn():
    rng = np.random.default_rng(0)
    scenes = [sketch.sample_scene(rng, object=w) for w in ("star", "circle", "house") for _ in range(8)]
    x = torch.from_numpy(np.stack([sketch.render(s) for s in scenes])).permute(0, 3, 1, 2).float() / 255
    detector = OracleDetector()
    assert detector(x, "star").present.tolist() == [s.objects[0].object == "star" for s in scenes]
    distance = oracle_distance(detector.oracle)
    with torch.no_grad():
        assert float(distance(x, x).abs().max()) == 0
        near, far = distance(x, (x + 0.02).clamp(0, 1)), distance(x, x.roll(8, 0))
    assert (near < far).all() and (far <= 2).all()  # features are non-negative: unit vectors at most 90 degrees


def test_a_bad_name_lists_what_would_do(classifier):
    with pytest.raises(BadInput, match="cannot be read as a model of transformers"):
        make_detector("./nothing-here", [])
    with pytest.raises(BadInput, match="not a CLIP-style model"):
        ClipScore(str(classifier))
    assert isinstance(make_detector("oracle", []), OracleDetector)
    assert isinstance(OracleDetector().oracle, nn.Module)
    assert isinstance(make_detector(f"classifier:{classifier}", []), ClassifierDetector)
    for spec, told in (
        ("oracle:folder", "reads no other model"),
        ("classifier", "classifier:FOLDER"),
        ("zero-shot:", "zero-shot:FOLDER"),
    ):
        with pytest.raises(BadInput, match=told):
            make_detector(spec, [])


NEW_KIND = '''
from sfumato.metrics.detectors.base import Detection, Detector

class Bright(Detector):
    key, name, hash, threshold, resize = "bright", "bright", "none", 0.5, "none"

    @classmethod
    def reads(cls, model):
        return "classifier" in model

    @classmethod
    def make(cls, model, concepts):
        return cls()

    def check(self, concept):
        pass

    def __call__(self, images, concept):
        score = images.mean((1, 2, 3))
        return Detection(score >= 0.5, score)
'''


def test_a_new_kind_is_one_file_in_the_folder(classifier, tmp_path, monkeypatch):
    from sfumato.metrics import detectors

    (tmp_path / "bright.py").write_text(NEW_KIND)
    monkeypatch.setattr(detectors, "__path__", [*detectors.__path__, str(tmp_path)])
    kinds.cache_clear()
    try:
        assert set(kinds()) == {
            "bright", "classifier", "imagenet", "nudenet", "onnx", "oracle", "scenes", "trained", "world", "zero-shot",
        }
        assert make_detector("bright", ["star"])(torch.ones(1, 3, 4, 4), "star").present.all()
        # Two kinds that read the same folder: one has to say which is meant.
        with pytest.raises(BadInput, match=f"several kinds .* bright:{classifier}"):
            make_detector(str(classifier), [])
        assert isinstance(make_detector(f"classifier:{classifier}", []), ClassifierDetector)
    finally:
        kinds.cache_clear()


CONFIG, PREPARE, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def drop(file, name):
    tensors = load_file(file)
    tensors.pop(name)
    save_file(tensors, file, metadata={"format": "pt"})


BROKEN = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "truncated or corrupt"),
    "pointer": (lambda f: (f / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "a weight is missing": (lambda f: drop(f / WEIGHTS, "classifier.weight"), "classifier.weight of"),
    "another width": (lambda f: edit(f / CONFIG, hidden_size=16), "cannot be read as a model of pictures"),
    "no json": (lambda f: (f / CONFIG).write_text("{"), "cannot be read as a model of transformers"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "cannot be read as a model of transformers"),
    "no such type": (lambda f: edit(f / CONFIG, model_type="none"), "cannot be read as a model of transformers"),
    "quantised": (lambda f: edit(f / CONFIG, quantization_config={"quant_method": "x"}), "cannot be read|quantised"),
    "label": (lambda f: edit(f / CONFIG, id2label={"0": None, "1": "a", "2": "b"}), "labels .* no text|cannot be read"),
    "side": (lambda f: edit(f / PREPARE, size={"height": "wide", "width": 3}), "its size is not one or two"),
    "sides": (lambda f: edit(f / PREPARE, size={"longest": 3}), "it lacks 'shortest_edge'"),
    "mean": (lambda f: edit(f / PREPARE, image_mean=[0.5]), "its image_mean is not three numbers"),
    "no spread": (lambda f: edit(f / PREPARE, image_std=[0, 1, 1]), "its image_std is zero"),
    "resample": (lambda f: edit(f / PREPARE, resample="best"), "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_classifier_is_refused_in_a_sentence(name, classifier, tmp_path):
    damage, told = BROKEN[name]
    folder = shutil.copytree(classifier, tmp_path / "judge")
    damage(folder)
    with pytest.raises(BadInput, match=told) as caught:
        make_detector(str(folder), ["church"])
    assert "judge" in str(caught.value) and "\n" not in str(caught.value) and "NoneType" not in str(caught.value)


def test_a_damaged_tokenizer_is_refused_in_a_sentence(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "judge")
    for file in folder.glob("token*.json"):
        file.write_text("{")
    with pytest.raises(BadInput, match="judge cannot be read as a model of pictures"):
        ClipScore(str(folder))


def test_a_prompt_longer_than_the_context_is_cut_with_a_warning(clip):
    score, x = ClipScore(str(clip)), pictures(1)
    long = "a red star " * 10
    with pytest.warns(UserWarning, match="tokens, and .* reads 12: the rest is cut"):
        cut = score(x, [long])
    assert torch.isfinite(cut).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(score(x, ["a red star " * 3 + "a"]), cut)
