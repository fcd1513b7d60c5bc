"""Tiny pipelines of the genuine classes, with random weights, for tests that need a text-to-image model."""

from __future__ import annotations

import gzip
import json
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes side by side have one thread each, and so has what they start; read when torch is first imported.
    os.environ.update(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"))
settings.register_profile("tests", deadline=None, max_examples=25)
settings.load_profile("tests")

WORDS = ("a", "photo", "of", "red", "blue", "star", "circle", "square", "an", "art")
LENGTH = 12  # context length of the tiny models, start and end tokens included


def shared_data() -> Path:
    """The folder of shared test data: ``../shared/data`` beside the repository, or $SFUMATO_SHARED/data."""
    root = os.environ.get("SFUMATO_SHARED") or Path(__file__).resolve().parents[2] / "shared"
    return Path(root) / "data"


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE, in GPT-2's order: printable ones first."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def clip_tokenizer(folder: Path, merges: list[str], length: int):
    """A genuine CLIPTokenizer with these merges, built in ``folder`` from files that every version reads."""
    from transformers import CLIPTokenizer

    letters = byte_letters()
    entries = [*letters, *(c + "</w>" for c in letters), *("".join(m.split()) for m in merges)]
    vocab = {w: i for i, w in enumerate([*entries, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "pad_token": "<|endoftext|>",
        **special,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def word_merges(words=WORDS) -> list[str]:
    """Merges that make each word one token, letter by letter from the left."""
    merges: dict[str, None] = {}
    for word in words:
        left = word[0]
        for i, letter in enumerate(word[1:], start=1):
            right = letter + "</w>" if i == len(word) - 1 else letter
            merges[f"{left} {right}"] = None
            left += right
    return list(merges)


def tiny_text_encoder(tokenizer, projection: bool = False, width: int = 16):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_factor=5.0,  # random text encoders hardly tell words apart otherwise
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_tokenizer(words=WORDS):
    """A genuine T5 tokenizer that knows these words, single letters and two sentinels (T5 has a hundred)."""
    from string import ascii_lowercase

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), *((f"▁{w}", -1.0) for w in words)]
    letters = [(c, -4.0) for c in ascii_lowercase]
    vocab = [*pieces, *letters, ("<extra_id_1>", 0.0), ("<extra_id_0>", 0.0)]
    made, word = Tokenizer(models.Unigram(vocab, unk_id=2)), {"replacement": "▁", "prepend_scheme": "always"}
    spaces = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(**word)]
    made.pre_tokenizer, made.decoder = pre_tokenizers.Sequence(spaces), decoders.Metaspace(**word)
    ends = {"single": ["$A", "</s>"], "pair": ["$A", "</s>", "$B", "</s>"], "special_tokens": [("</s>", 1)]}
    made.post_processor = processors.TemplateProcessing(**ends)
    # Made by hand, since transformers 4 and 5 make it in different ways from a vocabulary.
    return T5TokenizerFast(tokenizer_object=made, extra_ids=2, model_max_length=512)


def tiny_t5(tokenizer, width: int = 16):
    """A T5 encoder whose table has spare rows, as that of every released one."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer) + 5,
        d_model=width,
        d_kv=8,
        d_ff=2 * width,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


def tiny_scheduler(prediction_type: str):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def tiny_vae(channels: int = 4, **config):
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        sample_size=16,
        **config,
    ).eval()


def make_tiny_sd(tmp_path_factory, prediction_type: str = "v_prediction", seed: int = 0):
    """A StableDiffusionPipeline of about 100,000 parameters: 16x16 pictures, 4x8x8 latents, 12 tokens."""
    import torch
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(tmp_path_factory.mktemp("tokenizer"), word_merges(), LENGTH)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=2,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()
        return StableDiffusionPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=tiny_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def make_tiny_sdxl(tmp_path_factory, prediction_type: str = "epsilon", seed: int = 0):
    """A StableDiffusionXLPipeline of that size: two text encoders, pooled embeddings, size conditioning."""
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(tmp_path_factory.mktemp("tokenizer"), word_merges(), LENGTH)
        tokenizer_2 = clip_tokenizer(tmp_path_factory.mktemp("tokenizer_2"), word_merges(), LENGTH)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=40,
            attention_head_dim=(2, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24 + 6 * 8,
        ).eval()
        return StableDiffusionXLPipeline(
            vae=tiny_vae(),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            unet=unet,
            text_encoder_2=tiny_text_encoder(tokenizer_2, projection=True, width=24),
            tokenizer_2=tokenizer_2,
            scheduler=tiny_scheduler(prediction_type),
            add_watermarker=False,
        )


def make_tiny_pixart(seed: int = 0):
    """A PixArtSigmaPipeline: T5, cross-attention in a transformer, eps-prediction with a learned variance."""
    import torch
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer()
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            caption_channels=24,
            norm_num_groups=4,
            use_additional_conditions=False,
        ).eval()
        torch.nn.init.normal_(transformer.scale_shift_table)  # a small one hides the text from the output
        text = tiny_t5(tokenizer, width=24)  # as in released ones, keys and values read another width
        return PixArtSigmaPipeline(tokenizer, text, tiny_vae(), transformer, tiny_scheduler("epsilon"))


def make_tiny_sd3(tmp_path_factory, seed: int = 0, dual: tuple[int, ...] = (), t5: bool = True):
    """A StableDiffusion3Pipeline: two CLIPs and T5, joint attention, flow prediction; ``dual`` blocks as in 3.5."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(tmp_path_factory.mktemp("tokenizer"), word_merges(), LENGTH)
        tokenizer_2 = clip_tokenizer(tmp_path_factory.mktemp("tokenizer_2"), word_merges(), LENGTH)
        tokenizer_3 = t5_tokenizer()
        transformer = SD3Transformer2DModel(
            sample_size=8,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=40,
            pos_embed_max_size=8,
            dual_attention_layers=dual,
            qk_norm="rms_norm" if dual else None,
        ).eval()
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(16, scaling_factor=1.5, shift_factor=0.06),
            text_encoder=tiny_text_encoder(tokenizer, projection=True),
            tokenizer=tokenizer,
            text_encoder_2=tiny_text_encoder(tokenizer_2, projection=True, width=24),
            tokenizer_2=tokenizer_2,
            text_encoder_3=tiny_t5(tokenizer_3, width=48) if t5 else None,
            tokenizer_3=tokenizer_3 if t5 else None,
        )


def make_tiny_flux(tmp_path_factory, seed: int = 0, guidance: bool = True):
    """A FluxPipeline: CLIP pooled and T5, double and single blocks, dynamic shift; schnell without ``guidance``."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer, tokenizer_2 = (
            clip_tokenizer(tmp_path_factory.mktemp("tokenizer"), word_merges(), LENGTH),
            t5_tokenizer(),
        )
        transformer = FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            guidance_embeds=guidance,
            axes_dims_rope=(2, 2, 4),
        ).eval()
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=guidance, shift=3.0 if guidance else 1.0),
            vae=tiny_vae(16, scaling_factor=0.36, shift_factor=0.12),
            text_encoder=tiny_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=tiny_t5(tokenizer_2),
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )


def make_tiny_dit():
    """A DiTPipeline: a pipeline whose network is no UNet."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    network = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, num_embeds_ada_norm=4
    )
    return DiTPipeline(network, tiny_vae(), DDIMScheduler())


@pytest.fixture(scope="session")
def tiny_sd(tmp_path_factory):
    """A tiny SD pipeline behind the adapter (v-prediction). Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap

    return wrap(make_tiny_sd(tmp_path_factory))


@pytest.fixture(scope="session")
def tiny_sd_eps(tmp_path_factory):
    """The same with eps-prediction."""
    from sfumato.pipeline import wrap

    return wrap(make_tiny_sd(tmp_path_factory, prediction_type="epsilon"))


@pytest.fixture(scope="session")
def tiny_sdxl(tmp_path_factory):
    """A tiny SDXL pipeline behind the adapter (eps-prediction). Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap

    return wrap(make_tiny_sdxl(tmp_path_factory))


@pytest.fixture(scope="session")
def tiny_pixart():
    """A tiny PixArt-Sigma pipeline behind the adapter. Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap

    return wrap(make_tiny_pixart())


@pytest.fixture(scope="session")
def tiny_sana():
    """A tiny Sana pipeline behind the adapter, for 32x32 pictures. Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap
    from tiny_families import make_tiny_sana

    return wrap(make_tiny_sana())


@pytest.fixture(scope="session")
def tiny_qwen():
    """A tiny Qwen-Image pipeline behind the adapter, for 16x16 pictures. Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap
    from tiny_families import make_tiny_qwen

    return wrap(make_tiny_qwen(), {"size": 16})


@pytest.fixture(scope="session")
def tiny_zimage():
    """A tiny Z-Image pipeline behind the adapter, for 16x16 pictures. Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap
    from tiny_families import make_tiny_zimage

    return wrap(make_tiny_zimage(), {"size": 16})


@pytest.fixture(scope="session")
def tiny_omnigen():
    """A tiny OmniGen pipeline behind the adapter, for 32x32 pictures. Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap
    from tiny_families import make_tiny_omnigen

    return wrap(make_tiny_omnigen(), {"size": 32})


@pytest.fixture(scope="session")
def tiny_flux2():
    """A tiny Flux.2 Klein pipeline behind the adapter, for 16x16 pictures. Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap
    from tiny_families import make_tiny_flux2

    return wrap(make_tiny_flux2(), {"size": 16})


@pytest.fixture(scope="session")
def tiny_sd3(tmp_path_factory):
    """A tiny SD3 pipeline behind the adapter. Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap

    return wrap(make_tiny_sd3(tmp_path_factory))


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory):
    """A tiny Flux.1 dev pipeline behind the adapter, for 16x16 pictures. Shared by all tests: change copies only."""
    from sfumato.pipeline import wrap

    return wrap(make_tiny_flux(tmp_path_factory), {"size": 16})


@pytest.fixture(scope="session")
def real_clip_tokenizer(tmp_path_factory):
    """The CLIP tokenizer of released checkpoints (49,408 entries), from its published merges; else a skip."""
    file = shared_data() / "clip_bpe" / "bpe_simple_vocab_16e6.txt.gz"
    if not file.exists():
        pytest.skip("the published CLIP merges are not at hand (shared/data/clip_bpe)")
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    return clip_tokenizer(tmp_path_factory.mktemp("clip"), lines[1 : 49152 - 256 - 2 + 1], 77)


def noise_behind(cond):
    """A conditioning with large noise in the rows of padding, another for other words."""
    import torch

    noise = 100 * torch.randn(cond.tokens.shape, generator=torch.Generator().manual_seed(int(cond.ids.sum())))
    return cond.replace(tokens=torch.where(cond.mask[..., None], cond.tokens, noise))


@pytest.fixture
def noisy_padding(tiny_pixart, monkeypatch):
    """Called, it makes the tiny PixArt's encoder say something else in every row that the network does not look at."""
    encode = type(tiny_pixart).encode
    noisy = lambda pipe, *args, **more: noise_behind(encode(pipe, *args, **more))
    return lambda: monkeypatch.setattr(type(tiny_pixart), "encode", noisy)


@pytest.fixture
def killed_at(monkeypatch):
    """``with killed_at(3):`` a training that is begun there is killed when it has made three updates."""
    from sfumato.train.loop import Run

    one_step = Run.one_step

    @contextmanager
    def killed(step):
        def stopped(run):
            if run.step == step:
                raise KeyboardInterrupt
            return one_step(run)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Run, "one_step", stopped)
            yield

    return killed
