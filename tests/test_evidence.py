"""The evidence of an audit: whole, checkable without the package, and every change of it found."""

import json
import random
import shutil
import subprocess
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
from sfumato.erase.uce import UCE
from sfumato.errors import BadInput
from sfumato.files import read_png_metadata
from sfumato.pipeline import load_text2image
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
        Image.fromarray(image).save(picture)
    (copied / "SHA256SUMS").write_text(sums(copied))
    found = Verify(redraw=2, before=tiny_sd, after=tiny_sd).run(copied)
    assert len(found.wrong) == 2 and "drawn anew it differs" in found.wrong[0]


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
