"""Stages of time: which word is said when, whichever scheduler draws."""

from __future__ import annotations

import pytest
import torch

from sfumato.errors import BadInput
from sfumato.pipeline.customization import Customization, attach
from sfumato.pipeline.stages import in_stage, stage_of


def test_stage_of_a_timestep():
    wanted = {0: 0, 99: 0, 100: 1, 899: 8, 900: 9, 999: 9}
    assert {i: stage_of((i + 1) / 1000, 10) for i in wanted} == wanted
    assert [stage_of((i + 1) / 1000, 7) for i in range(1000)] == [i * 7 // 1000 for i in range(1000)]
    for stages in (7, 10, 50, 100):  # times come in float32 too
        times = ((torch.arange(1000) + 1) / 1000).float().tolist()
        assert [stage_of(t, stages) for t in times] == [i * stages // 1000 for i in range(1000)]
    assert stage_of(0.0, 10) == 0 and stage_of(1.0, 10) == 9


def test_words_are_replaced_or_dropped():
    stages = {"<m>": ["late", "soon"], "<m:x>": ["", "x"]}
    assert in_stage("a <m> and a <m:x> here", stages, 0.1) == "a late and a here"
    assert in_stage("a <m> and a <m:x> here", stages, 0.9) == "a soon and a x here"


def staged(pipe, **changed):
    """A pipeline whose <m> has three stages; ``changed``: other rows, by stage."""
    rng = torch.Generator().manual_seed(0)
    words = {}
    for s in range(3):
        rows = []
        for _, encoder in pipe.text_parts():
            width = getattr(pipe.pipe, encoder).get_input_embeddings().weight.shape[1]
            rows.append(torch.randn(1, width, generator=rng) * changed.get(f"s{s}", 1.0))
        words[f"<m-{s}>"] = tuple(rows)
    return attach(pipe, [Customization(words, stages={"<m>": tuple(words)})])


@pytest.mark.parametrize("scheduler", ["ddim", "addim", "dpm++"])
def test_what_a_stage_says_changes_nothing_before_it(tiny_sd, scheduler):
    settings = {"sampling_steps": 6, "cfg_scale": 3.0, "scheduler": scheduler}
    one, other = (list(p.states("a <m>", 5, **settings)) for p in (staged(tiny_sd), staged(tiny_sd, s1=2.0)))
    at = [stage_of(t, 3) for _, t in one[:-1]]
    assert at == sorted(at, reverse=True) and set(at) == {0, 1, 2}
    first = at.index(1) + 1  # the state after the first step in stage 1
    same = [torch.equal(a, b) for (a, _), (b, _) in zip(one, other, strict=True)]
    assert all(same[:first]) and not any(same[first:])


def test_equal_stages_are_one_word(tiny_sdxl):
    one = staged(tiny_sdxl)
    same = attach(tiny_sdxl, [Customization({"<x>": _rows(one, "<m-0>")}, stages={"<m>": ("<x>",) * 3})])
    assert torch.equal(same.draw("a <m>", 1, sampling_steps=3), same.draw("a <x>", 1, sampling_steps=3))
    several = one.draw(["a <m>", "a star", "a <m>"], [1, 2, 1], sampling_steps=3)
    assert torch.equal(several[0], several[2]) and not torch.equal(several[0], several[1])


def _rows(pipe, word):
    parts = [(getattr(pipe.pipe, t), getattr(pipe.pipe, e)) for t, e in pipe.text_parts()]
    return tuple(e.get_input_embeddings().weight[[t.convert_tokens_to_ids(word)]] for t, e in parts)


def test_a_word_of_stages_has_no_one_encoding(tiny_sd):
    with pytest.raises(BadInput, match="every stage of time"):
        staged(tiny_sd).encode("a <m>")
