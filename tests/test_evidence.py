"""The evidence of an audit: whole, checkable without the package, and every change of it found."""

import json
import random
import shutil
import subprocess
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.attack import Recovery
from sfumato.audit import Audit
from sfumato.audit.evidence import Evidence, recorded, sums
from sfumato.audit.verify import Verify, checked_sums
from sfumato.commands.audit import Output, _check
from sfumato.commands.verify import main
from sfumato.erase.uce import UCE
from sfumato.errors import BadInput
from sfumato.files import read_png_metadata, save_png
from sfumato.pipeline import Text2Image, load_text2image
from test_audit import SMALL, Fixed, always


def save(tiny_sd, folder, key=None):
    audit = Audit(before=tiny_sd, after=tiny_sd, concepts=["star"], detector=Fixed(always), **SMALL)
    setup = audit.prepare()
    drawn = audit.draw(setup)
    report = audit.report(setup, drawn, {}, audit.judge(setup, drawn, {}))
    return Evidence(setup, drawn, {}, report, "sfumato audit ...", key).save(folder)


def make_key(path):
    pytest.importorskip("cryptography", reason="signatures need the library cryptography")
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public = path.with_suffix(".public")
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    return path, public


@pytest.fixture(scope="module")
def evidence(tiny_sd, tmp_path_factory):
    return save(tiny_sd, tmp_path_factory.mktemp("evidence") / "ev")


@pytest.fixture
def copied(evidence, tmp_path):
    return shutil.copytree(evidence, tmp_path / "ev")


def test_it_holds_every_picture_with_its_prompt_and_seed_and_is_sound(evidence, tiny_sd):
    manifest = json.loads((evidence / "manifest.json").read_text())
    told = {one["file"]: one for row in manifest["pictures"] for one in row["files"]}
    assert set(told) == {f"pictures/{f.name}" for f in (evidence / "pictures").iterdir()}
    name, one = next(iter(told.items()))
    about = read_png_metadata(evidence / name)
    assert (about["prompt"], int(about["seed"])) == (one["prompt"], one["seed"])
    found = Verify(redraw=3, before=tiny_sd, after=tiny_sd).run(evidence)
    assert found.sound and found.redrawn == 3 and found.furthest <= 3 and not found.signed
    zipped = Verify(redraw=0).run(evidence.with_name("ev.zip"))
    assert zipped.sound and zipped.files == found.files


def test_floor_and_ceiling_can_be_computed_again_from_the_pictures(evidence):
    """All of the page's distances: what the original draws once more, and with other seeds."""
    report = json.loads((evidence / "report" / "report.json").read_text())
    rows = json.loads((evidence / "manifest.json").read_text())["pictures"]
    drawn = {}
    for row in rows:
        files = [np.asarray(Image.open(evidence / one["file"]), dtype=float) / 255 for one in row["files"]]
        drawn[row["kind"], row["model"]] = np.stack(files)
    apart = lambda kind: float(((drawn["kept", "before"][: len(drawn[kind, "before"])] - drawn[kind, "before"]) ** 2)
                               .mean())  # fmt: skip
    assert apart("floor") == pytest.approx(report["integrity"]["floor"], abs=1e-9)
    assert apart("ceiling") == pytest.approx(report["integrity"]["ceiling_seeds"], rel=1e-5) and apart("ceiling") > 0


def test_evidence_of_earlier_versions_has_no_floor_and_says_so(copied):
    for kind in ("floor", "ceiling"):
        for picture in (copied / "pictures").glob(f"{kind}-*"):
            picture.unlink()
    edit(copied / "manifest.json", lambda m: m.update(pictures=[r for r in m["pictures"] if r["model"] == "after"
                                                                or r["kind"] in ("kept", "asked")]))  # fmt: skip
    (copied / "SHA256SUMS").write_text(sums(copied))
    found = Verify(redraw=0).run(copied)
    assert found.sound and "floor and ceiling are not there" in found.notes[0]


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_it_is_checked_without_the_package(evidence):
    subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=evidence, check=True, capture_output=True)


def test_what_the_ledger_knows_of_the_methods_is_there(tiny_sd, tmp_path):
    erased = UCE(concepts=("star",)).apply(tiny_sd)
    audit = Audit(
        before=tiny_sd, after=erased, concepts=["star"], detector=Fixed(always), edit=UCE(concepts=("star",)), **SMALL
    )
    setup = audit.prepare()
    drawn = audit.draw(setup)
    folder = Evidence(setup, drawn, {}, audit.report(setup, drawn, {}, audit.judge(setup, drawn, {}))).save(
        tmp_path / "ev"
    )
    assert json.loads((folder / "manifest.json").read_text())["ledger"] == {"uce": True}
    assert json.loads((folder / "ledger" / "uce.json").read_text())["name"] == "uce"
    assert recorded("esd-x").name == "esd.json"  # one entry for both


def test_attacks_on_several_concepts_have_pictures_of_their_own(tiny_sd, tmp_path):
    few = {**SMALL, "retain": ("square",), "n": 2, "n_retain": 1, "n_attack": 1, "sampling_steps": 1}
    audit = Audit(
        before=tiny_sd, after=tiny_sd, concepts=["star", "circle"], detector=Fixed(always),
        **{**few, "attacks": (Recovery(updates=1, n_images=1, batch=1),)},
    )  # fmt: skip
    setup = audit.prepare()
    drawn, attacked = audit.draw(setup), audit.attack(setup)
    report = audit.report(setup, drawn, attacked, audit.judge(setup, drawn, attacked))
    folder = Evidence(setup, drawn, attacked, report).save(tmp_path / "ev")
    rows = [row for row in json.loads((folder / "manifest.json").read_text())["pictures"] if "attack" in row["kind"]]
    assert len(rows) == 6 and len({one["file"] for row in rows for one in row["files"]}) == 6
    assert {f"attack recovery, recovered, concept {k}" for k in (1, 2)} <= {row["kind"] for row in rows}
    for row in rows:
        assert all(("star" if row["kind"].endswith("1") else "circle") in one["prompt"] for one in row["files"])


def test_models_are_loaded_as_they_were_audited(tiny_sd, tmp_path):
    """In half precision a model has another hash; what an audit was told of a file is told again."""
    tiny_sd.save(tmp_path / "model")
    pipe = load_text2image(tmp_path / "model", "cpu", torch.bfloat16)
    audit = Audit(before=pipe, after=pipe, concepts=["star"], detector=Fixed(always), **{**SMALL, "sampling_steps": 1})
    setup = audit.prepare()
    drawn = audit.draw(setup)
    folder = Evidence(setup, drawn, {}, audit.report(setup, drawn, {}, audit.judge(setup, drawn, {}))).save(
        tmp_path / "ev"
    )
    where = str(tmp_path / "model")
    found = Verify(redraw=1, before=where, after=where, device="cpu").run(folder)
    assert found.sound and found.redrawn == 1


@pytest.mark.parametrize(("out", "evidence"), [("a", "a"), ("a", "a/ev"), ("a/report", "a")])
def test_evidence_and_report_do_not_lie_in_each_other(out, evidence, tmp_path):
    with pytest.raises(BadInput, match="folders of their own"):
        _check(Output(out=tmp_path / out, evidence=tmp_path / evidence))


def test_any_changed_byte_is_named(copied):
    files = [f for f in copied.rglob("*") if f.is_file() and f.name != "SHA256SUMS"]
    rng = random.Random(0)
    for file in files:
        before = file.read_bytes()
        at = rng.randrange(len(before))
        file.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
        assert checked_sums(copied)[1] == [f"{file.relative_to(copied).as_posix()} was changed"]
        file.write_bytes(before)
    assert not checked_sums(copied)[1]


def test_what_is_missing_or_was_added_is_named(copied):
    (copied / "extra.txt").write_text("x")
    picture = next((copied / "pictures").iterdir())
    picture.unlink()
    wrong = Verify(redraw=0).run(copied).wrong
    assert wrong == [f"pictures/{picture.name} is missing", "extra.txt was added"]


def test_a_picture_that_the_model_does_not_draw_is_found_though_its_hash_is_right(copied, tiny_sd):
    for picture in (copied / "pictures").iterdir():
        image = np.asarray(Image.open(picture)).copy()
        image[0, 0] = 255 - image[0, 0]
        save_png(picture, image, read_png_metadata(picture), overwrite=True)
    (copied / "SHA256SUMS").write_text(sums(copied))
    found = Verify(redraw=2, before=tiny_sd, after=tiny_sd).run(copied)
    assert len(found.wrong) == 2 and "drawn anew it differs" in found.wrong[0]


def test_nobody_knows_beforehand_which_pictures_are_drawn_anew_and_the_choice_can_be_repeated(
    evidence, tiny_sd, monkeypatch, capsys
):
    drawn = []

    def watched(pipe, prompts, seeds, **settings):
        drawn.append((*prompts, *seeds))
        return Text2Image.draw(pipe, prompts, seeds, **settings)

    monkeypatch.setattr(type(tiny_sd), "draw", watched)

    def looked_at(seed=None):
        drawn.clear()
        return Verify(redraw=4, seed=seed, before=tiny_sd, after=tiny_sd).run(evidence), list(drawn)

    found = [looked_at() for _ in range(5)]
    assert len({checked.seed for checked, _ in found}) == 5 and len({str(which) for _, which in found}) > 1
    checked, which = found[0]
    assert looked_at(checked.seed) == (checked, which)
    monkeypatch.setattr(Verify, "_model", lambda self, whose, told: tiny_sd)
    main([str(evidence), "--redraw", "1"])
    assert "--seed " in capsys.readouterr().out
    main([str(evidence), "--redraw", "1", "--seed", "3"])
    assert "--seed 3\n" in capsys.readouterr().out
    main([str(evidence), "--redraw", "0"])
    assert "--seed" not in capsys.readouterr().out


def edit(path, change):
    """Change a JSON file of the evidence."""
    told = json.loads(path.read_text(encoding="utf-8"))
    change(told)
    path.write_text(json.dumps(told), encoding="utf-8")


def of_kind(manifest, kind):
    return next(row for row in manifest["pictures"] if row["kind"] == kind)


def swap(one, other):
    one.rename(one.with_suffix(".tmp"))
    other.rename(one)
    one.with_suffix(".tmp").rename(other)


def renamed(folder):
    (folder / "pictures" / "kept-after-00000.png").rename(folder / "pictures" / "other.png")


TAMPERED = {
    "a figure's protocol": (
        lambda f: edit(f / "report/report.json", lambda r: r["protocol"].update(guidance=99)),
        "report/report.json and manifest.json differ in the protocol's guidance",
    ),
    "concepts": (
        lambda f: edit(f / "report/report.json", lambda r: r.update(concepts=["other"])),
        "report/report.json and manifest.json differ in concepts",
    ),
    "the manifest's weights": (
        lambda f: edit(f / "manifest.json", lambda m: m["models"]["after"].update(hash="0" * 64)),
        "manifest.json tells two things of the model after the edit",
    ),
    "two pictures of one model": (
        lambda f: swap(f / "pictures/kept-after-00000.png", f / "pictures/kept-after-00001.png"),
        "pictures/kept-after-00000.png says another prompt, seed than manifest.json",
    ),
    "pictures of the same seed by both models": (
        lambda f: swap(f / "pictures/asked-after-00000.png", f / "pictures/asked-before-00000.png"),
        "pictures/asked-after-00000.png says another model than manifest.json",
    ),
    "a picture's name": (renamed, "pictures/kept-after-00000.png is listed in manifest.json and not there"),
    "a picture listed twice": (
        lambda f: edit(f / "manifest.json", lambda m: m["pictures"][0]["files"].append(m["pictures"][0]["files"][0])),
        "pictures/kept-before-00000.png is listed twice in manifest.json",
    ),
    "a picture left out of both": (
        lambda f: (
            edit(f / "manifest.json", lambda m: m["pictures"][0]["files"].pop()),
            (f / "pictures/kept-before-00005.png").unlink(),
        ),
        "manifest.json lists other pictures of the model before the edit than its protocol asks for",
    ),
    "a picture of the ceiling": (
        lambda f: (
            edit(f / "manifest.json", lambda m: of_kind(m, "ceiling")["files"].pop()),
            max((f / "pictures").glob("ceiling-*")).unlink(),
        ),
        "manifest.json lists other pictures of the ceiling than an audit draws",
    ),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_what_contradicts_itself_is_found_though_every_hash_is_right(name, copied):
    tamper, said = TAMPERED[name]
    edit(copied / "manifest.json", lambda m: m["models"]["before"].update(name="x", hash="1" * 64))
    edit(copied / "manifest.json", lambda m: m["protocol"]["before"].update(hash="1" * 64))
    edit(copied / "report/report.json", lambda r: r["protocol"]["before"].update(hash="1" * 64))
    for picture in (copied / "pictures").glob("*-before-*"):  # both models of the fixture are one: here they are not
        about = read_png_metadata(picture)
        about["model"] = json.dumps({**json.loads(about["model"]), "hash": "1" * 64}, sort_keys=True)
        save_png(picture, np.asarray(Image.open(picture)), about, overwrite=True)
    (copied / "SHA256SUMS").write_text(sums(copied))
    assert Verify(redraw=0).run(copied).sound
    tamper(copied)
    (copied / "SHA256SUMS").write_text(sums(copied))
    assert said in Verify(redraw=0).run(copied).wrong


@pytest.mark.parametrize("damage", [lambda m: m.pop("models"), lambda m: m["pictures"][0].pop("files"),
                                    lambda m: m["models"].clear(), lambda m: m.update(pictures=[3])])  # fmt: skip
def test_a_manifest_of_another_form_is_refused_in_a_sentence(damage, copied):
    edit(copied / "manifest.json", damage)
    (copied / "SHA256SUMS").write_text(sums(copied))
    with pytest.raises(BadInput, match=r"manifest\.json"):
        Verify().run(copied)


def test_what_was_taken_away_is_named_together_with_all_else(copied):
    (copied / "manifest.json").write_text("no JSON")
    (copied / "README.txt").unlink()
    assert Verify().run(copied).wrong == ["README.txt is missing", "manifest.json was changed"]


def test_links_are_named_whatever_they_lead_to(copied, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (copied / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (copied / "SHA256SUMS").rename(tmp_path / "sums")
    (copied / "SHA256SUMS").symlink_to(tmp_path / "sums")
    assert Verify().run(copied).wrong == ["SHA256SUMS is a link", "more was added"]


def test_what_lies_beside_the_folder_in_an_archive_or_twice_in_it_is_refused(evidence, tmp_path):
    archive = evidence.with_name("ev.zip")
    for name, said in (("extra.txt", "holds ev, extra.txt where"), ("ev/README.txt", "holds ev/README.txt twice")):
        more = shutil.copyfile(archive, tmp_path / "more.zip")
        with zipfile.ZipFile(more, "a") as opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the name that is there already
            opened.writestr(name, "x")
        with pytest.raises(BadInput, match=said):
            Verify(redraw=0).run(more)


def test_another_model_than_the_audited_is_found(evidence, tiny_sd):
    other = UCE(concepts=("star",)).apply(tiny_sd)
    wrong = Verify(redraw=20, before=other, after=tiny_sd).run(evidence).wrong
    assert len(wrong) == 1 and "weights of hash" in wrong[0]


def test_a_signature_is_of_this_content_by_this_key(tiny_sd, tmp_path):
    key, public = make_key(tmp_path / "key.pem")
    folder = save(tiny_sd, tmp_path / "ev", key)
    found = Verify(redraw=0).run(folder)
    assert found.sound and len(found.signed) == 64
    assert Verify(redraw=0, public_key=public).run(folder).signed == found.signed
    _, stranger = make_key(tmp_path / "other.pem")
    assert "no signature of SHA256SUMS by that key" in Verify(redraw=0, public_key=stranger).run(folder).wrong[0]
    signature, pem = (folder / "SHA256SUMS.sig").read_bytes(), (folder / "public.pem").read_bytes()
    (folder / "SHA256SUMS.sig").unlink()
    assert Verify(redraw=0).run(folder).wrong == ["SHA256SUMS.sig is missing, though public.pem is there"]
    (folder / "SHA256SUMS.sig").write_bytes(signature)
    (folder / "public.pem").unlink()
    assert "public.pem is missing, though SHA256SUMS.sig is there" in Verify(redraw=0).run(folder).wrong
    (folder / "public.pem").write_bytes(pem)
    (folder / "README.txt").write_text("other")
    (folder / "SHA256SUMS").write_text(sums(folder))  # the hashes are made to fit: the signature no longer does
    assert "no signature" in Verify(redraw=0).run(folder).wrong[0]
    (folder / "SHA256SUMS.sig").unlink()
    assert "it is not signed" in Verify(redraw=0, public_key=public).run(folder).wrong[0]


def test_what_is_no_evidence_is_refused(tmp_path, evidence):
    (tmp_path / "empty").mkdir()
    bad = tmp_path / "bad.zip"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("../out.txt", "x")
    (tmp_path / "text.zip").write_text("no archive")
    for path, match in (
        (tmp_path / "empty", "no evidence"), (tmp_path / "text.zip", "give the folder or the ZIP"),
        (bad, "leads out of it"), (tmp_path / "none", "give the folder"),
    ):  # fmt: skip
        with pytest.raises(BadInput, match=match):
            Verify().run(path)
    assert not (tmp_path.parent / "out.txt").exists()
    with pytest.raises(BadInput, match="--redraw 0"):
        Verify().run(evidence)  # the models were in memory
