"""A model out of one file: recognised by its keys and shapes, strictly, without a network."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from warnings import warn

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from safetensors import safe_open
from torch import Tensor, nn

from sfumato.errors import BadInput
from sfumato.foreign import reading, shaped, shortened

from . import infer
from .facts import FOLDER, Facts, check_precision, facts_of, layout_of
from .names import SD2, Layout, Slot

Said = Literal["eps", "v"]
"""What a file's network predicts, where a user says it."""
CONFIGS, RECORD = "sfumato.configs", "sfumato.record"
"""Entries of the header of the files that `write` makes: what diffusers' folder would say beside its weights."""
MERGES = Path(__file__).parents[2] / "assets" / "clip" / "merges.txt.gz"
WORDS = 49408
_PREDICTIONS: Mapping[Said, str] = {"eps": "epsilon", "v": "v_prediction"}
_HEADER = {"epsilon": "eps", "eps": "eps", "v": "v", "v_prediction": "v", "v-prediction": "v"}
_CLASSES = {
    "unet": diffusers.UNet2DConditionModel,
    "vae": diffusers.AutoencoderKL,
    "text_encoder": transformers.CLIPTextModel,
    "text_encoder_2": transformers.CLIPTextModelWithProjection,
}
SCHEDULERS = (
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DDPMScheduler",
    "EulerAncestralDiscreteScheduler",
    "UniPCMultistepScheduler",
    "LMSDiscreteScheduler",
)
# What other tools keep in such files and no network of the pipeline has: averages of the weights, tables of the noise,
# marks, the last layer of OpenCLIP in 2.x, whose output is not read, and its head.
_SPARE = (
    "model_ema.",
    "model_ema_",
    "betas",
    "alphas_cumprod",
    "sqrt_",
    "log_one_minus_alphas_cumprod",
    "posterior_",
    "logvar",
    "lvlb_weights",
    "scale_factor",
    "global_step",
    "v_pred",
    "ztsnr",
    "first_stage_model.loss.",
    "denoiser.sigmas",
    "cond_stage_model.model.transformer.resblocks.23.",
    "cond_stage_model.model.text_projection",
)
_SPARE_ENDS = (".position_ids", ".logit_scale", ".attn_mask", ".text_projection", ".text_projection.weight")


def read(path: Path, dtype: torch.dtype | None, prediction: Said | None) -> DiffusionPipeline:
    """diffusers' pipeline of a file of the original layout of SD 1.x, 2.x or SDXL, on the CPU.

    Where a file has averaged weights (EMA) beside the plain ones, the plain ones are taken, as diffusers does.

    Args:
        dtype: of the weights; default float32.
        prediction: see `told_prediction`.

    Raises:
        BadInput: see `layout_of`; a weight is missing, unused or of a wrong shape; mixed precisions without ``dtype``.
    """
    facts = facts_of(path)
    layout = layout_of(facts)
    configs = _told_configs(facts)
    if configs is None or prediction is not None:
        predicted = _PREDICTIONS[told_prediction(facts, layout, prediction)]
        configs = configs or infer.configs(facts, layout, predicted)
        configs["scheduler"]["prediction_type"] = predicted
    with reading(path, layout.title):
        parts = {part: _empty(part, configs[part]) for part in layout.prefixes}
        slots = {part: _bare(facts, slots_of(layout, part, module)) for part, module in parts.items()}
        _check(facts, slots, parts, dtype is not None)
        with safe_open(path, "pt") as opened:
            for part, module in parts.items():
                for name, slot in slots[part].items():
                    _put(module, name, _take(opened, slot, module.get_parameter(name).shape).to(dtype or torch.float32))
                module.eval()
        _check_table(path, facts, configs["scheduler"])
        tokenizers = {
            part: _tokenizer(path, part, x, parts) for part, x in configs.items() if part.startswith("tokenizer")
        }
        return _assembled(layout, parts, tokenizers, configs["scheduler"])


def told_prediction(facts: Facts, layout: Layout, asked: Said | None) -> Said:
    """What the network predicts: as ``asked``; else as the file says; else as is usual in its layout.

    Files say it in their header (``modelspec.prediction_type``), or by a key ``v_pred``. Where they do not, the weights
    of 2.x at 768 pixels (v) and at 512 (eps) look alike: v is taken, with a warning. 1.x and XL are eps.

    Warns:
        UserWarning: it cannot be told; or the file says otherwise than asked.
    """
    header = _HEADER.get(facts.header.get("modelspec.prediction_type", "").lower())
    said = "v" if "v_pred" in facts else header
    if asked is not None:
        if said not in (None, asked):
            warn(f"{facts.path} says that it predicts {said}: it is read as {asked}, as asked", stacklevel=2)
        return asked
    if said is not None:
        return said  # type: ignore[return-value]
    if layout is not SD2:
        return "eps"
    warn(
        f"{facts.path} does not say whether it predicts v (2.x at 768 pixels) or eps (2.x base, at 512): v is taken; "
        "if its pictures are noise, say --prediction eps",
        stacklevel=2,
    )
    return "v"


def record_of(path: Path) -> dict[str, Any]:
    """What a file of ours says of its making, as `sfumato.json` does in a folder; empty for all others."""
    with suppress(BadInput, ValueError, OSError):
        found = json.loads(facts_of(path).header[RECORD]) if RECORD in facts_of(path).header else {}
        return found if isinstance(found, dict) else {}
    return {}


def slots_of(layout: Layout, part: str, module: nn.Module) -> dict[str, Slot]:
    """The slot of each parameter of a part, by its own name."""
    names = [name for name, _ in module.named_parameters()]
    levels = len(module.config.block_out_channels) if part == "vae" else 0
    by_plain = layout.slots(part, names, levels)
    return {name: by_plain[name.removeprefix("text_model.")] for name in names}


def _bare(facts: Facts, slots: dict[str, Slot]) -> dict[str, Slot]:
    """The slots as a file has them that leaves "text_model." out of CLIP's names, as some converters do."""
    bare = {name: replace(slot, key=slot.key.replace(".text_model.", ".")) for name, slot in slots.items()}
    there, without = (sum(x.key in facts for x in named.values()) for named in (slots, bare))
    return bare if without > there else slots


def _empty(part: str, config: Mapping[str, Any]) -> nn.Module:
    """A network without weights: its buffers, which no file need have, are there."""
    kind: Any = _CLASSES[part]
    with init_empty_weights(include_buffers=False):
        return kind.from_config(config) if hasattr(kind, "from_config") else kind(kind.config_class(**config))


def _check(facts: Facts, slots: Mapping[str, Mapping[str, Slot]], parts: Mapping[str, nn.Module], asked: bool) -> None:
    """Every weight is there in its shape, and every key stands for one, before anything is read."""
    used: set[str] = set()
    for part, named in slots.items():
        for name, slot in named.items():
            if slot.key not in facts:
                raise BadInput(
                    f"{facts.path} is incomplete or of a layout that is not known: it lacks {slot.key} ({name} of its "
                    f"{part}): fetch it again, or {FOLDER}"
                )
            wanted, found = slot.shape(parts[part].get_parameter(name).shape), facts.shapes[slot.key]
            if slot.form == "conv":
                wanted = wanted[: max(2, len(found))]
            if wanted != found:
                raise BadInput(
                    f"{facts.path} is of a layout that is not known: {slot.key} is {found}, where {wanted} is expected"
                    f": {FOLDER}"
                )
        keys = {slot.key for slot in named.values()}
        check_precision(facts, part, keys, asked)
        used |= keys
    odd = sorted(
        key for key in facts.shapes.keys() - used if not key.startswith(_SPARE) and not key.endswith(_SPARE_ENDS)
    )
    if odd:
        some = ", ".join(shortened(key, 70) for key in odd[:3])
        more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
        raise BadInput(f"{facts.path} holds what none of its networks uses: {some}{more}: {FOLDER}")


def _take(opened: Any, slot: Slot, shape: torch.Size) -> Tensor:
    if slot.form == "third":
        rows = shape[0]
        return opened.get_slice(slot.key)[slot.third * rows : (slot.third + 1) * rows]
    x = opened.get_tensor(slot.key)
    if slot.form == "transposed":
        return x.T.contiguous()
    return x.reshape(shape) if slot.form == "conv" else x


def _put(module: nn.Module, name: str, x: Tensor) -> None:
    owner, _, last = name.rpartition(".")
    module.get_submodule(owner)._parameters[last] = nn.Parameter(x.contiguous(), requires_grad=False)


def _told_configs(facts: Facts) -> dict[str, Any] | None:
    """The configurations in the header of a file of ours."""
    if CONFIGS not in facts.header:
        return None
    with reading(facts.path):
        told = json.loads(facts.header[CONFIGS])
        return shaped(
            told, {"unet": dict, "vae": dict, "text_encoder": dict, "scheduler": dict, "tokenizer": dict}, facts.path
        )


def _check_table(path: Path, facts: Facts, config: Mapping[str, Any]) -> None:
    """Refuse a file that was trained under another noise than it would be read with."""
    if facts.shapes.get("alphas_cumprod") != (config.get("num_train_timesteps", 1000),) or "ztsnr" in facts:
        return
    with safe_open(path, "pt") as opened:
        stored = opened.get_tensor("alphas_cumprod").double()
    ours = getattr(_scheduler(config), "alphas_cumprod", None)
    if ours is not None and (stored - ours.double()).abs().max() > 1e-3:
        raise BadInput(f"{path} was trained under another noise schedule than its layout's (alphas_cumprod): {FOLDER}")


def _scheduler(config: Mapping[str, Any]) -> Any:
    if config.get("_class_name") not in SCHEDULERS:
        raise BadInput(f"the scheduler {shortened(str(config.get('_class_name')), 60)!r} is not known: {FOLDER}")
    return getattr(diffusers, config["_class_name"]).from_config(dict(config))


def _tokenizer(path: Path, part: str, config: Mapping[str, Any], parts: Mapping[str, nn.Module]) -> Any:
    """CLIP's tokenizer; with words of its own only where our own header tells them."""
    encoder = part.replace("tokenizer", "text_encoder")
    if "vocab" not in config and (known := parts[encoder].config.vocab_size) != WORDS:
        raise BadInput(f"the {encoder} of {path} knows {known} tokens, and CLIP's tokenizer has {WORDS}: {FOLDER}")
    return read_tokenizer(**config)


def read_tokenizer(
    pad_token: str, model_max_length: int = 77, vocab: Any = None, merges: Any = None, added: list[str] | None = None
) -> Any:
    """CLIP's tokenizer with this padding: its end token in OpenAI's CLIP, "!" in OpenCLIP; or one of other words.

    Args:
        added: words beside the vocabulary, whose numbers come after its own.
    """
    merges = merges or gzip.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    made = clip_tokenizer(merges, vocab, pad_token, model_max_length)
    made.add_tokens(list(added or ()))
    return made


def clip_tokenizer(merges: list[str], vocab: Mapping[str, int] | None, pad: str, length: int) -> Any:
    """A CLIPTokenizer from its merges, by files that every version of transformers reads."""
    if vocab is None:
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
        letters = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
        words = [*letters, *(c + "</w>" for c in letters), *("".join(m.split()) for m in merges)]
        vocab = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "pad_token": pad,
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return transformers.CLIPTokenizer.from_pretrained(folder)


def _assembled(
    layout: Layout, parts: Mapping[str, nn.Module], tokenizers: Mapping[str, Any], scheduler: Mapping[str, Any]
) -> DiffusionPipeline:
    kind: Any = getattr(diffusers, layout.pipeline)
    given = {**parts, **tokenizers, "scheduler": _scheduler(scheduler)}
    if layout.pipeline == "StableDiffusionXLPipeline":
        return kind(**given, force_zeros_for_empty_prompt=True, add_watermarker=False)
    return kind(**given, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
