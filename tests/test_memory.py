"""What no memory could hold is refused before the work, in a sentence."""

from __future__ import annotations

import pytest

from sfumato import cli, memory
from sfumato.data.cases import sketch_cases
from sfumato.errors import BadInput
from sfumato.memory import out_of_memory, require_memory, total_memory
from sfumato.train.schedule import Schedule


def test_the_machine_is_asked(monkeypatch):
    assert 10**8 < total_memory() < 2**63
    monkeypatch.setattr(memory, "total_memory", lambda: 10**9)
    require_memory(10**9, "pictures")
    with pytest.raises(BadInput, match="pictures would take 1 GB of memory at the least, and this machine has 1 GB"):
        require_memory(10**9 + 1, "pictures")


def test_the_ways_in_which_libraries_say_it():
    assert out_of_memory(MemoryError()) and out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not out_of_memory(RuntimeError("shapes do not match")) and not out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    "args",
    [
        "sample star --model sketch --size 800000 --out out",
        "sample star --model sketch --seeds 0-99999999999 --out out",
        "information --model sketch --n 1000000000 --out out",
        "information --model sketch --n 2 --points 100000000000 --out out",
        "attack concept-inversion --model sketch --original sketch --n-images 1000000000 --concept star --out out",
        "attack concept-inversion --model sketch --original sketch --n 1000000000 --concept star --out out",
        "attack recovery --model sketch --original sketch --n-images 1000000000 --concept star --n 2 --out out",
        "audit --before sketch --after sketch --concept star --n 1000000000 --out out",
        "compare --teacher sketch --n 1000000000 --out out",
        "compare --teacher sketch --n-real 1000000000 --out out",
        "train t2i --pictures 100000000000 --out out",
        "train t2i --size 8000000 --out out",
        "train t2i --batch 100000000000 --out out",
        "train t2i --channels 16000000 --out out",
        "distill multistep-cm --teacher sketch --steps 2 --batch 100000000000 --out out",
        "train sid2 --data digits --batch 1000000000 --size 8 --out out",
    ],
)
def test_sizes_beyond_reason_are_refused_before_the_work(args, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(args.split()) == 2
    err = capsys.readouterr().err
    assert "this machine has" in err or "more than 1,000,000 seeds" in err, err
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_the_optimiser_cannot_take_is_refused():
    with pytest.raises(BadInput, match=r"lr must be at most 1e\+06, got 1e\+38"):
        Schedule(updates=1, batch=1, lr=1e38)


def test_retained_words_that_all_show_what_was_erased_are_refused():
    both = {"red star": {"colour": "red", "object": "star"}}
    words = ("red", "star", "white", "flat")
    with pytest.raises(BadInput, match="whatever may be retained shows an erased concept"):
        sketch_cases(both, words, 1, 1, 0)
    cases = sketch_cases(both, (*words, "blue"), 2, 4, 0)
    assert all("red star" not in case.prompt for case in cases.retained)
