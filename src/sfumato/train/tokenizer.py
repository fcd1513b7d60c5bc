"""Tokenizers learnt from captions, so that a small world needs a small vocabulary and no download."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import ascii_lowercase, digits

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast, T5TokenizerFast

START, END = "<|startoftext|>", "<|endoftext|>"
# How CLIP cuts text into words before it merges bytes (arXiv 2103.00020).
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""


def learn_tokenizer(captions: Iterable[str], context: int, vocabulary: int = 4096) -> CLIPTokenizer:
    """Byte-pair merges over ``captions``, as CLIP's: lower case, bytes, ``</w>`` at the end of a word.

    Args:
        captions: texts to learn from; the result does not depend on their order.
        context: the longest prompt in tokens, start and end token included.
        vocabulary: largest number of tokens; merging stops earlier when every word is one token.

    Returns:
        A genuine ``CLIPTokenizer``; words it never saw are spelt by smaller pieces.
    """
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
    )
    bpe.train_from_iterator(sorted(captions), trainer)
    learnt = json.loads(bpe.to_str())["model"]["merges"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in learnt]
    # CLIP's order: bytes, bytes at a word's end, merges, then the two special tokens.
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *(m.replace(" ", "") for m in merges), START, END]
    with tempfile.TemporaryDirectory() as folder:
        vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
        Path(folder, "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "".join(m + "\n" for m in merges), encoding="utf-8")
        settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(settings))
        return CLIPTokenizer.from_pretrained(folder)


def learn_pieces(captions: Iterable[str], context: int, vocabulary: int = 4096) -> T5TokenizerFast:
    """A T5 tokenizer with a piece for each word of ``captions``, the most frequent first, in lower case.

    Args:
        captions: texts to learn from; the result does not depend on their order.
        context: the longest prompt in tokens, the end token included.
        vocabulary: largest number of tokens; letters, digits and signs are always among them.

    Returns:
        A genuine ``T5TokenizerFast`` (a unigram model); words that it never saw are spelt by letters.
    """
    words: Counter[str] = Counter()
    for caption in captions:
        words.update(re.findall(r"\w+", caption.lower()))
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -12.0)]
    signs = [(c, -14.0) for c in sorted({*ascii_lowercase, *digits, *",.;:-'!?\"()"})]
    common = sorted(words, key=lambda word: (-words[word], word))[: max(0, vocabulary - len(special) - len(signs) - 1)]
    total = sum(words[word] for word in common)
    learnt = [(f"▁{word}", math.log(words[word] / total)) for word in common]
    pieces = [*special, *learnt, *signs, ("<extra_id_0>", 0.0)]
    return T5TokenizerFast(vocab=pieces, extra_ids=1, model_max_length=context)


def learn_spoken(
    texts: Iterable[str], signs: Sequence[str], context: int, vocabulary: int = 4096
) -> PreTrainedTokenizerFast:
    """Byte-pair merges over ``texts``, as of a language model that reads ``signs`` (turns of a talk, ends of pictures).

    Args:
        texts: to learn from; the result does not depend on their order.
        signs: texts that are one token each, wherever they stand.
        context: the longest text in tokens.
        vocabulary: largest number of tokens, bytes and signs included; merging stops when every word is one token.

    Returns:
        A tokenizer that begins every text with ``<s>``, the id 1, and pads with ``</s>``, the id 2, as Llama's.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", *signs]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, min_frequency=1, show_progress=False, initial_alphabet=alphabet, special_tokens=special
    )
    bpe.train_from_iterator(sorted(texts), trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    ends = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=context, **ends)
