"""Chains: what links do to a tiny model, what is drawn once, and which link is said to break the erasure."""

import json
import re
from dataclasses import replace

import pytest
import torch

from sfumato import cli
from sfumato.audit import Audit
from sfumato.audit.chain import Attach, By, Call, Cast, Chain, Chained, Export, FineTune, Given, Merge, Scheduler
from sfumato.audit.chain.base import titles
from sfumato.audit.drawing import Drawn
from sfumato.bench import Fates, erase
from sfumato.cells import Failed
from sfumato.commands.links import links_of
from sfumato.customize.prospect import ProSpect
from sfumato.distill.multistep_cm import MultistepCM
from sfumato.erase.esd import ESDx
from sfumato.erase.uce import UCE
from sfumato.errors import BadInput
from sfumato.metrics.bootstrap import wilson
from sfumato.pipeline import load_text2image, read_record
from sfumato.report.audit import AuditReport
from sfumato.report.composition import Composition, Stage
from sfumato.report.schema import PROTOCOL_KEYS, Interval
from sfumato.steer.faster_diffusion import FasterDiffusion
from sfumato.train.loop import Run
from test_audit import SMALL, Fixed, reddish
from test_bench import tiny_classifier

LOOKS = Fixed(reddish)


@pytest.fixture(scope="module")
def erased(tiny_sd):
    return UCE(concepts=("star",)).apply(tiny_sd)


def weights(pipe):
    return {f"{part}.{name}": x for part, m in pipe.parts().items() for name, x in m.named_parameters()}


def changed(one, other):
    ours, theirs = weights(one), weights(other)
    return {name for name in ours if not torch.equal(ours[name], theirs[name].to(ours[name]))}


def after(link, pipe, original, **given):
    return link.act(Chained(pipe), Given(original, ("star",), ("a circle", "a square"), **given))


def test_what_links_do_to_weights(tiny_sd, erased):
    assert not changed(after(Export(), erased, tiny_sd).pipe, erased)
    assert not changed(after(Call(lambda pipe: pipe), erased, tiny_sd).pipe, erased)
    half = after(Merge(model=tiny_sd, weight=0.5), erased, tiny_sd).pipe
    for name, x in weights(half).items():
        torch.testing.assert_close(x, (weights(erased)[name] + weights(tiny_sd)[name]) / 2)
    assert not changed(after(Merge(model=tiny_sd, weight=1), erased, tiny_sd).pipe, tiny_sd)
    lora = after(Export(format="lora", energy=1), erased, tiny_sd).pipe
    for name, x in weights(lora).items():
        torch.testing.assert_close(x, weights(erased)[name], atol=1e-6, rtol=1e-5)
    cast = after(Cast(dtype="bfloat16"), erased, tiny_sd).pipe
    assert cast.dtype == torch.bfloat16
    assert all(torch.equal(x, weights(erased)[name].bfloat16()) for name, x in weights(cast).items())


def test_fine_tuning_changes_the_asked_subset_only_and_goes_on_after_a_kill(tiny_sd, erased, tmp_path):
    link = FineTune(updates=2, n_images=2, batch=2, subset="xattn")
    made = after(link, erased, tiny_sd, folder=tmp_path / "a").pipe
    assert changed(made, erased) == {f"unet.{name}" for name in erased.parameters("xattn")}
    again = after(link, erased, tiny_sd, folder=tmp_path / "a").pipe  # finished: only what was kept is read
    assert not changed(again, made)
    assert not changed(after(FineTune(updates=0, n_images=1), erased, tiny_sd).pipe, erased)


def test_what_no_lora_holds_is_said_by_the_link_that_leaves_it_out(tiny_sd, erased, tmp_path):
    assert after(Export(format="lora"), erased, tiny_sd).said == ""  # projections alone
    edited = tiny_sd.copy(own="xattn")
    with torch.no_grad():
        for name, x in edited.parameters("xattn").items():
            x.add_(0.01 if name.endswith((".to_out.0.bias", ".to_k.weight")) else 0.0)
    told = after(Export(format="lora"), edited, tiny_sd).said
    assert re.fullmatch(r"left out: \d+ parameters that no LoRA holds \(unet\..*to_out\.0\.bias.*\)", told)
    audit = Audit(before=tiny_sd, after=edited, concepts=["star"], detector=LOOKS, **SMALL)
    made = Chain(audit=audit, links=[Export(format="lora"), Cast(dtype="bfloat16")]).run()
    assert [stage.said for stage in made.stages] == ["", told, ""]
    folder = made.save(tmp_path / "out")
    kept = json.loads((folder / "composition.json").read_text())["stages"]
    assert [one.get("said") for one in kept] == [None, told, None]
    assert "that no LoRA holds (unet." in (folder / "index.html").read_text()


def test_an_eraser_that_trains_goes_on_after_a_kill(tiny_sd, erased, tmp_path, monkeypatch, killed_at):
    link = By(ESDx(concepts=("circle",), updates=3, sampling_steps=2, lr=1e-3, checkpoint_every=1))
    expected, step = after(link, erased, tiny_sd).pipe, Run.one_step
    with killed_at(2):
        after(link, erased, tiny_sd, folder=tmp_path)
    taken = []
    monkeypatch.setattr(Run, "one_step", lambda run: taken.append(run.step) or step(run))
    assert not changed(after(link, erased, tiny_sd, folder=tmp_path).pipe, expected)
    assert taken == [2]


def levels(one, other):
    """How far two 8-bit pictures are apart at most."""
    return int((one.int() - other.int()).abs().max())


def test_stages_are_audits_on_the_same_seeds_and_the_original_draws_once(tiny_sd, erased, monkeypatch, tmp_path):
    given, seen, by = [], [], Drawn.by

    def watched(setup, before=None):
        given.append(before)
        seen.append(by(setup, before))
        return seen[-1]

    monkeypatch.setattr(Drawn, "by", watched)
    audit = Audit(before=tiny_sd, after=erased, concepts=["star"], detector=LOOKS, **SMALL)
    links = [FasterDiffusion(**FasterDiffusion.NEUTRAL), Merge(model=tiny_sd, weight=1), Scheduler(scheduler="dpm++")]
    made = Chain(audit=audit, links=links).run()
    assert len(given) == 4 and given[0] is not None and all(original is given[0] for original in given)
    plain = Audit(before=tiny_sd, after=tiny_sd, concepts=["star"], detector=LOOKS, **SMALL).run()
    first, patched, merged, _other = (stage.report for stage in made.stages)
    alone = Audit(before=tiny_sd, after=erased, concepts=["star"], detector=LOOKS, **SMALL).run()
    assert first.erasure == alone.erasure and first.retention == alone.retention
    # Weights that lie elsewhere in memory may round otherwise: one level of 255 at most.
    assert patched.integrity.mean.value == pytest.approx(first.integrity.mean.value, rel=1e-4)  # it changes nothing
    assert merged.erasure == plain.erasure and merged.integrity.mean.value < 1 / 255**2  # the original is back
    dpm = Audit(before=tiny_sd, after=tiny_sd, concepts=["star"], detector=LOOKS, **{**SMALL, "scheduler": "dpm++"})
    drawn = dpm.draw(dpm.prepare()).asked.after
    assert levels(seen[3].asked.after, drawn) <= 1 < levels(seen[2].asked.after, drawn)  # drawn in the asked way
    other = made.stages[3].report
    assert other.protocol["scheduler"] == first.protocol["scheduler"] and other.protocol["after_scheduler"] == "dpm++"
    assert first.reproduce and not other.reproduce  # no plain audit repeats a stage
    folder = made.save(tmp_path / "out")
    told = json.loads((folder / "composition.json").read_text())
    assert [s["link"] for s in told["stages"]] == [s.title for s in made.stages]
    assert len(list(folder.glob("stages/*/index.html"))) == 4
    assert "merge 1 of a model in memory" in (folder / "index.html").read_text()


def stage(title, hits, n=100):
    low, high = wilson(hits, n)
    empty = {"concepts": ["star"], "retention": {}, "protocol": dict.fromkeys(PROTOCOL_KEYS)}
    return Stage(title, AuditReport(erasure={"star": Interval(hits / n, low, high, n)}, **empty), 0.0)


def test_the_first_link_below_both_intervals_breaks_it():
    assert Composition([stage("erased", 98), stage("a", 95), stage("b", 60), stage("c", 10)]).broken_by == 2
    assert Composition([stage("erased", 98), stage("a", 99), stage("b", 94)]).broken_by is None
    assert "Broken by link 1, a" in Composition([stage("erased", 98), stage("a", 10)]).verdict


def test_links_that_cannot_be_say_which_and_why(tiny_sd, erased, tmp_path, tiny_sdxl):
    def run(*links):
        Chain(audit=Audit(before=tiny_sd, after=erased, concepts=["star"], detector=LOOKS, **SMALL), links=links).run()

    with pytest.raises(BadInput, match=r"link 1 .merge 0.5 of a model in memory.: .* no such model"):
        run(Merge(model=tiny_sdxl))
    with pytest.raises(BadInput, match=r"link 2 .distill multistep-cm.: a student draws in its own way"):
        run(Scheduler(scheduler="ddim"), MultistepCM(sampling_steps=1, updates=1))
    with pytest.raises(BadInput, match=r"link 1 .finetune, 1 update.: .*no folder of pictures"):
        run(FineTune(updates=1, images=tmp_path / "none"))
    with pytest.raises(BadInput, match=r"link 1 .adapter x.safetensors"):
        run(Attach(files=(tmp_path / "x.safetensors",)))
    with pytest.raises(BadInput, match="a chain needs links"):
        run()
    with pytest.raises(BadInput, match="not a int"):
        run(3)


def test_what_can_be_seen_not_to_be_possible_is_refused_before_drawing(tiny_sd, erased, tmp_path, monkeypatch):
    monkeypatch.setattr(Audit, "original", lambda *_: pytest.fail("drawn"))
    cached = FasterDiffusion()
    for links, said, more in (
        ((Cast(), Merge(model="nowhere")), r"link 2 .merge 0.5 of nowhere.: there is no model 'nowhere'", {}),
        ((cached, Cast(), cached), r"link 3 .steer faster-diffusion .2..: it acts on the pipeline already", {}),
        ((Cast(), FineTune(updates=1)), r"link 2 .finetune, 1 update.: .*retain some concept", {"retain": ()}),
        ((MultistepCM(updates=1),), r"link 1 .distill multistep-cm.: .*sketch world.* --data", {}),
        ((MultistepCM(updates=1, data=str(tmp_path)), Scheduler()), r"link 2 .scheduler dpm.*own way", {}),
        ((By(ProSpect(), tmp_path / "none"),), "there is no folder of pictures", {}),
    ):  # fmt: skip
        audit = Audit(before=tiny_sd, after=erased, concepts=["star"], detector=LOOKS, **SMALL | more)
        with pytest.raises(BadInput, match=said):
            Chain(audit=audit, links=links).run()


def test_a_chain_that_ends_early_keeps_what_was_measured(tiny_sd, erased, tmp_path):
    def refuses(pipe):
        raise BadInput("it is too heavy")

    audit = Audit(before=tiny_sd, after=erased, concepts=["star"], detector=LOOKS, **SMALL)
    made = Chain(audit=audit, links=[Merge(model=tiny_sd, weight=1), refuses, Cast()]).run()
    assert [s.title for s in made.stages] == ["erased", "merge 1 of a model in memory"]
    assert made.refused == {"refuses": "it is too heavy"}
    assert "The link refuses could not be, so that nothing was measured from there on" in made.verdict
    folder = made.save(tmp_path / "chain")
    assert "it is too heavy" in (folder / "index.html").read_text()


def test_the_command_writes_what_was_measured_of_a_chain_that_ends_early_and_fails(
    tiny_sd, erased, tiny_sdxl, tmp_path, capsys
):
    tiny_classifier(tmp_path / "classifier", ("star", "circle"))
    models = [str(pipe.save(tmp_path / name)) for name, pipe in (("a", tiny_sd), ("b", erased), ("c", tiny_sdxl))]
    asked = ["--before", models[0], "--after", models[1], "--concept", "star", "--retain", "circle", "--n", "1",
             "--n-retain", "1", "--steps", "1", "--distance", "mse", "--detector", str(tmp_path / "classifier"),
             "--device", "cpu", "--compose", f"cast bfloat16,merge {models[2]},export diffusers"]  # fmt: skip
    assert cli.main(["audit", *asked, "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert "no such model" in told.out and "start the same command again" in told.err
    read = json.loads((tmp_path / "out" / "composition.json").read_text())
    assert [stage["link"] for stage in read["stages"]] == ["erased", "cast to bfloat16"]


def test_the_command_keeps_the_last_links_model_with_what_was_done_to_it(tiny_sd, erased, tmp_path):
    tiny_classifier(tmp_path / "classifier", ("star", "circle"))
    tiny_sd.save(tmp_path / "a"), erased.save(tmp_path / "b", provenance={"method": "uce"})
    asked = ["audit", "--before", str(tmp_path / "a"), "--after", str(tmp_path / "b"), "--concept", "star", "--retain",
             "circle", "--n", "1", "--n-retain", "1", "--steps", "1", "--distance", "mse", "--detector",
             str(tmp_path / "classifier"), "--device", "cpu", "--out", str(tmp_path / "out")]  # fmt: skip
    kept = ["--save-model", str(tmp_path / "last")]
    assert cli.main([*asked, *kept]) == 2  # there is no chain
    links = ["--compose", f"merge {tmp_path / 'a'} --weight 0.5,cast bfloat16"]
    assert cli.main([*asked, *links, *kept]) == 0
    merged = after(Merge(model=tiny_sd), erased, tiny_sd).pipe
    assert not changed(load_text2image(tmp_path / "last", "cpu"), after(Cast(dtype="bfloat16"), merged, tiny_sd).pipe)
    made = read_record(tmp_path / "last")["provenance"]
    assert made["method"] == "uce" and made["afterwards"][1] == "cast to bfloat16"
    assert cli.main([*asked, *links, *kept, "--overwrite"]) == 0


def test_the_heading_claims_no_more_than_the_intervals():
    whole = Composition([stage("erased", 98), stage("a", 97)])
    assert whole.heading == "no link is seen to break the erasure" and "beyond the intervals" in whole.verdict
    both = Composition([stage("erased", 98), stage("a", 10), stage("b", 20)], apart=True)
    assert both.heading == "broken by a, b" and replace(both, apart=False).heading == "broken by a"
    assert whole.rows()[0][-1] == ""


def test_apart_every_link_meets_the_edit_itself_and_what_does_not_fit_is_told(tiny_sd, erased, tiny_sdxl):
    audit = Audit(before=tiny_sd, after=erased, concepts=["star"], detector=LOOKS, **SMALL)
    links = [Merge(model=tiny_sd, weight=1), Merge(model=tiny_sdxl), Export()]
    made = Chain(audit=audit, links=links, apart=True).run()
    first, merged, exported = made.stages
    assert merged.moved.value == 0 and exported.moved == first.moved  # nothing of the merge is left
    (refused,) = made.refused.items()
    assert refused[0] == "merge 0.5 of a model in memory" and "no such model" in refused[1]


def test_words_become_links():
    asked = "distill:multistep-cm --updates 7 --steps 2,cast:bfloat16", "merge other/ --weight 0.25"
    student, cast, merge = links_of(asked, "sketch")
    assert isinstance(student, By) and (student.method.updates, student.method.sampling_steps) == (7, 2)
    assert cast == Cast(dtype="bfloat16") and merge == Merge(model="other/", weight=0.25)
    assert links_of(["finetune"], "sketch") == [FineTune(**FineTune.presets["sketch"])]
    assert links_of(["erase:uce --concept fish,steer:faster-diffusion"], "sketch")[0].method.concepts == ("fish",)
    for words, match in (
        ("melt", "unknown link"), ("distill", "needs a method"), ("distill:melt", "unknown distill method"),
        ("cast:float8", "float8"), ("merge:a --weight 2", "weight"), ("erase:uce 'x", "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=match):
            links_of([words], "sketch")


def test_the_bench_keeps_cells_and_tells_what_every_link_left(monkeypatch, tmp_path):
    done = []

    def finished(cells, measure, **rest):
        for cell in cells:
            done.append(cell)
            if cell.method == "esd-x":
                yield cell, Failed("it does not fit", refused=True)
            else:
                report = Composition(
                    [stage("erased", 98), stage("cast to float16", 40)], refused={"merge": "no"}
                ).to_json()
                yield cell, {"report": report, "page": "<p>pictures</p>", "seconds": 1.0, "settings": {}}

    monkeypatch.setattr(erase, "finished", finished)
    bench = Fates(concepts=("fish",), methods=("uce", "esd-x"), seeds=(1, 2), n=2, links=(Cast(), Merge()))
    report = bench.run(tmp_path / "bench")
    assert len(done) == 4 and list(report.rows) == ["uce", "esd-x"]
    plain, cast, _ = report.rows["uce"]
    assert plain.erased.value == pytest.approx(0.98) and cast.erased.value == pytest.approx(0.4) and cast.broken == 2
    assert report.rows["esd-x"][0].why == "it does not fit"
    page = (tmp_path / "bench" / "index.html").read_text()
    assert "broken in 2 of 2" in page and "refused" in page and len(re.findall('href="cells/uce-', page)) == 2
    replace(bench, methods=("uce",), seeds=(1, 2, 3)).run(tmp_path / "bench")
    assert len(done) == 5  # the new seed's cell alone
    with pytest.raises(BadInput, match="other settings"):
        replace(bench, links=(Cast(),)).run(tmp_path / "bench")
    with pytest.raises(BadInput, match="named twice"):
        Fates(links=(Cast(), Cast()))
    one = replace(bench, methods=("uce",), seeds=(1,)).run(tmp_path / "one")
    assert one.rows["uce"][1].erased == Interval(0.4, *wilson(40, 100), 100), "of a single cell over its pictures"
    (gone,) = (tmp_path / "one" / "cells").glob("uce-*/index.html")
    gone.unlink()
    replace(bench, methods=("uce",), seeds=(1,)).run(tmp_path / "one")
    assert "href=\"cells" not in (tmp_path / "one" / "index.html").read_text()


def test_links_of_one_method_are_told_apart_by_the_settings_in_which_they_differ():
    steps = [By(MultistepCM(teacher="sketch", sampling_steps=k, updates=10)) for k in (1, 2)]
    name = "distill multistep-cm"
    assert titles(steps) == [f"{name}, sampling_steps 1", f"{name}, sampling_steps 2"]
    assert titles([steps[0], Merge(model="sketch")]) == [name, "merge 0.5 of sketch"]
    assert titles([FineTune(updates=3), FineTune(updates=3, seed=1), FineTune(updates=4)]) == [
        "finetune, 3 updates, seed 0", "finetune, 3 updates, seed 1", "finetune, 4 updates",
    ]
    erasers = [By(UCE(concepts=concepts)) for concepts in (("fish",), ("star", "tree"))]
    assert titles(erasers) == ["erase uce, concepts fish", "erase uce, concepts star tree"]
    # A chain may do the same twice, one after the other.
    assert titles([Cast(), Cast(), Cast()]) == ["cast to float16", "cast to float16 (2)", "cast to float16 (3)"]
    Fates(concepts=("fish",), links=tuple(steps))


def test_few_steps_are_among_the_usual_links_where_the_models_world_is_known(tiny_sd, tmp_path):
    links = Fates(model=str(tiny_sd.save(tmp_path / "sd")), device="cpu").afterwards
    assert "distill multistep-cm" in {link.title for link in Fates().afterwards} - {link.title for link in links}


def test_the_usual_links_are_those_of_the_model_and_all_differ():
    links = Fates().afterwards
    assert FineTune(**FineTune.presets["sketch"]) in links
    assert len({link.title for link in links}) == len(links) >= 7
