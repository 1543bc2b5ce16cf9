"Protocols: golden numbers that fail for every wrong variant, sets found by name, archives that are not trusted"
import io
import json
import tarfile
import zipfile
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch
from PIL import Image

from srnb import protocols, rewards
from srnb.colour import Colour
from srnb.config import constants
from srnb.core import generator
from srnb.protocols import ASASR, CTMSR, DP2O, DREALSR_CROP, OSEDIFF, REALSET65, REALSR_CROP, REALSR_FULL, RESSHIFT
from srnb.protocols import SEESR, Layout, Measure, Protocol, TestSet, check_protocol, check_report, cut_both, cut_truth
from srnb.protocols import describe, drawn_pairs, find_pictures, mean_over_pictures, missing_measures, pictures_in
from srnb.protocols import pooled_psnr, resize_output, score_picture
from srnb.rewards import MetricUnavailable

PSNR, SSIM = OSEDIFF.measures[:2]
NIQE = next(m for m in OSEDIFF.measures if m.name == "niqe")
OURS = replace(OSEDIFF, measures=(PSNR, SSIM)) # what needs no file of weights


@dataclass(frozen=True)
class Liar(Measure):
    "Computes one thing under the name of another"
    said:str=""
    @property
    def variant(self): return self.said


def lie(measure, **changes): return Liar(**{**vars(measure), **changes}, said=measure.variant)

def said(table): return " ".join(check_report(table).split()) # on one line

def known_parts(set): return {k for o in (set.digests(), set.pixels()) for v in o.values() for k in v}

def named(function, name): # a channel under another's name
    def channel(images): return function(images)
    channel.__name__ = name
    return channel

def png(size=(16, 20), seed=0, mode="RGB"):
    x = torch.randint(0, 256, (*size, 3), generator=generator(seed), dtype=torch.uint8).numpy()
    im = Image.fromarray(x).convert(mode) if mode != "I;16" else Image.fromarray(x[..., 0].astype("uint16")*200)
    if mode == "RGBA": im.putalpha(128)
    f = io.BytesIO()
    im.save(f, "PNG")
    return f.getvalue()

def put(folder, **files): # "a__b__c" -> folder/a/b/c.png
    for k, v in files.items():
        path = folder.joinpath(*k.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".png").write_bytes(v)
    return folder

def small(**changes): # a protocol of a set that a test can draw
    one = TestSet("a", 2, (16, 20), 4, (Layout("a/lq", "a/gt"),), True, "drawn", "free")
    return replace(OURS, name="own", sets=(replace(one, **changes),), published=())

def pair(folder, name, seed, gt=None, **kw):
    return put(folder, **{f"a__lq__{name}": png(seed=seed, **kw), f"a__gt__{gt or name}": png((64, 80), seed=seed+100)})


# ---- golden numbers

@pytest.mark.parametrize("protocol", [OSEDIFF, SEESR, RESSHIFT, CTMSR, ASASR, DP2O], ids=lambda o: o.name)
def test_drawn_numbers_hold(protocol):
    t = check_protocol(replace(protocol, measures=tuple(m for m in protocol.measures if m.package == "srnb")))
    assert len(t) == len(drawn_pairs())*t.measure.nunique()
    assert (t["holds"] == True).all(), check_report(t) # noqa: E712 (the column holds None too)
    assert (t[t.measure == "psnr"].difference.abs() < 1e-6).all()

WRONG = {
    "border of PSNR": lie(PSNR, border=4), "border of SSIM": lie(SSIM, border=4),
    "PSNR on rounded Y": lie(PSNR, channel=SSIM.channel), "SSIM on unrounded Y": lie(SSIM, channel=PSNR.channel),
    "PSNR on another channel": lie(PSNR, channel=named(lambda x: x[:, 1:2].double()*255, "green")),
    "SSIM on another channel": lie(SSIM, channel=named(lambda x: (x[:, 1:2].double()*255).round(), "green")),
    "PSNR of RGB": lie(PSNR, channel=named(lambda x: x.double()*255, "rgb")),
    "full range": lie(PSNR, channel=named(lambda x: (PSNR.channel(x)-16)*255/219, "yiq")),
    "eps left out": lie(PSNR, options=(("eps", 0.),)), "eps of another size": lie(PSNR, options=(("eps", 1e-10),)),
}

@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_variant_drifts_on_drawn_pictures(wrong):
    t = check_protocol(replace(OURS, measures=(wrong,)))
    assert (t["holds"] == False).any() # noqa: E712
    text = said(t)
    assert max(map(len, check_report(t).splitlines())) <= 120
    assert text.startswith("DRIFTED")
    assert all(o in text for o in (wrong.name, "torch", "NumPy", "drawn/"))


def test_niqe_holds_and_drifts_on_drawn_pictures():
    assert not missing_measures([NIQE]) # its parameters ship
    t = check_protocol(replace(OURS, measures=(NIQE,)))
    assert len(t) > 4 and set(t.made_by) == {"pyiqa 0.1.16"}
    assert (t["holds"] == True).all(), check_report(t) # noqa: E712
    t = check_protocol(replace(OURS, measures=(lie(NIQE, border=4),)))
    assert (t["holds"] == False).any() and "DRIFTED niqe" in said(t) # noqa: E712

def test_drawn_pictures_are_those_whose_numbers_are_known(monkeypatch):
    assert not protocols._drawn_differs()
    other = {**drawn_pairs(), "soft": tuple(o ^ 1 for o in drawn_pairs()["soft"])}
    monkeypatch.setattr(protocols, "drawn_pairs", lambda: other)
    t = check_protocol(replace(OURS, measures=(PSNR,)))
    assert t.picture[(t["holds"] == False) & (t.measure == "drawn pictures")].tolist() == ["soft"] # noqa: E712
    assert "FAILED drawn pictures: soft: this machine draws another" in said(t)


def test_what_cannot_be_computed_is_unchecked_and_never_passed(monkeypatch):
    def gone(measure): raise MetricUnavailable("metric lpips cannot be had here")
    lpips = next(m for m in OSEDIFF.measures if m.name == "lpips")
    real = protocols.scorer_of
    monkeypatch.setattr(protocols, "scorer_of", lambda m: gone(m) if m.name.startswith("lpips") else real(m))
    p = replace(OURS, measures=(PSNR, lpips, replace(PSNR, name="other", border=7)))
    assert [*missing_measures(p.measures)] == ["lpips"]
    t = check_protocol(p)
    open = t[[o is None for o in t["holds"]]]
    assert sorted(open.measure) == ["lpips", "other"] and "cannot be had here" in " ".join(open.why)
    text = said(t)
    assert "unchecked lpips" in text and "unchecked other" in text and text.count("holds") == 1


def test_tolerance_decides_and_none_is_unchecked():
    off = lie(PSNR, options=(("eps", 1.1e-8),))
    assert not (check_protocol(replace(OURS, measures=(off,)))["holds"] == True).all() # noqa: E712
    assert (check_protocol(replace(OURS, measures=(replace(off, tolerance=5.),)))["holds"] == True).all() # noqa: E712
    t = check_protocol(replace(OURS, measures=(replace(PSNR, tolerance=None, left_open="nobody knows"),)))
    assert all(o is None for o in t["holds"]) and "nobody knows" in said(t) and t.found.notna().all()


@pytest.fixture(scope="module")
def bench(root): # pictures with logged numbers, beside the checkout
    folder = root.parent/"shared/bench"
    if not (folder/"osediff_half.tar").exists(): pytest.skip("OSEDiff's pictures are not at shared/bench beside this")
    return folder

@pytest.mark.slow
def test_logged_numbers_hold(bench):
    measures = (PSNR, SSIM, NIQE)
    t = check_protocol(replace(OSEDIFF, measures=measures), bench)
    logged = t[t["set"] != "drawn"]
    assert (t["holds"] == True).all(), check_report(t) # noqa: E712
    assert len(logged) == 97*len(measures) and set(logged.made_by) == {"pyiqa 0.1.10"}
    worst = logged.groupby("measure").difference.apply(lambda o: o.abs().max())
    assert worst.psnr < 1e-4 and worst.ssim < 1e-5 and worst.get("niqe", 0) < .02, worst

@pytest.mark.slow
@pytest.mark.parametrize("measure", [PSNR, SSIM], ids=["psnr", "ssim"])
def test_a_wrong_variant_drifts_on_logged_pictures(bench, measure):
    pictures = find_pictures(OSEDIFF, bench, ["drealsr"])[0]
    best = max(pictures, key=lambda p: DREALSR_CROP.logged()[p.id][PSNR.variant]) # the one that needs the eps
    sr, gt, said = best.read_answer()[None], best.read_gt(), DREALSR_CROP.logged()[best.id][measure.variant]
    def off(m): return abs(float(score_picture([m], sr, gt, True)[m.name]) - said)
    assert off(measure) < measure.tolerance
    for k, m in WRONG.items():
        if m.name == measure.name and k != "eps of another size": assert off(m) > measure.tolerance, k

def test_files_that_are_not_the_published_ones_are_not_checked(bench, tmp_path):
    with tarfile.open(bench/"osediff_half.tar") as tar:
        for part in ("lq", "gt", "osediff"):
            for n in ("Canon_001_LR4", "Canon_003_LR4"):
                path = tmp_path/"realsr"/part/f"{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(f"realsr/{part}/{n}.png").read())
    pictures, remarks = find_pictures(OURS, tmp_path)
    assert [p.id for p in pictures] == ["Canon_001_LR4", "Canon_003_LR4"]
    assert any("2 of 2 known pictures are the published files" in o for o in remarks)
    assert any("2 pictures, the published set has 100" in o for o in remarks)
    assert any(o.startswith("drealsr: not found") for o in remarks)
    path = tmp_path/"realsr/lq/Canon_003_LR4.png"
    Image.open(path).save(path, compress_level=1) # the same pixels in another file
    remarks = find_pictures(OURS, tmp_path)[1]
    assert any("2 of 2 known pictures have the published pixels, 1 of them in another file, for example Canon_003" in o
               for o in remarks)
    for part in ("gt", "osediff"):
        path = tmp_path/f"realsr/{part}/Canon_003_LR4.png"
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    remarks = find_pictures(OURS, tmp_path)[1]
    assert any("1 of 2 known files differ: these are not the published files, for example Canon_003_LR4 (gt)" in o
               for o in remarks)
    t = check_protocol(replace(OURS, measures=(PSNR,)), tmp_path)
    assert t.picture[t["set"] == "realsr"].tolist() == ["Canon_003_LR4", "Canon_001_LR4"]
    assert "gt and answer is not the published one" in said(t) and "1 of 2 known files differ" in said(t)


def test_sheets_hold_digests_and_numbers_and_are_small(root):
    for path in (root/"srnb/golden").glob("*.json"):
        assert path.stat().st_size < 60_000
        json.loads(path.read_text())
    assert (len(REALSR_CROP.digests()), len(DREALSR_CROP.digests())) == (50, 47)
    means = [np.mean([o[PSNR.variant] for o in s.logged().values()]) for s in (REALSR_CROP, DREALSR_CROP)]
    assert means == pytest.approx([24.7954, 28.2177], abs=5e-5)


# ---- fields: each changes what a test can see

def test_every_preset_is_found_by_name_and_says_what_is_open():
    assert {*constants(Protocol)} == {"osediff", "seesr", "resshift", "ctmsr", "asasr", "dp2o"}
    for p in constants(Protocol).values():
        assert p.left_open and p.sources and p.scale == 4
        assert {o.set for o in p.published} <= {s.name for s in p.sets}
        for o in p.published: assert {k for k, _ in o.values} <= {m.name for m in p.measures}, (p.name, o)
    assert [next(m.border for m in p.measures if m.name == "psnr") for p in (OSEDIFF, SEESR, CTMSR)] == [0, 4, 0]
    assert [next(m.id for m in p.measures if m.name == "maniqa") for p in (OSEDIFF, CTMSR, ASASR)] == [
        "maniqa-pipal", "maniqa", "maniqa"]
    for p in constants(Protocol).values(): assert max(map(len, str(p).splitlines())) <= 120
    assert "script cannot remake it" in " ".join(describe(RESSHIFT).split())
    assert REALSR_FULL.size is None and REALSR_CROP.size == (128, 128)

OTHER = dict(name="x", package="pyiqa", id="psnr", kind="nr", higher_better=False, border=1, channel=SSIM.channel,
             dtype="float32", options=(("eps", 1e-3),), logged="9.9", tolerance=.5, left_open="what")

def test_every_field_of_a_measure_counts():
    assert {*OTHER} == {f.name for f in fields(Measure)}
    sr, gt = (o.float().div(255) for o in drawn_pairs()["soft"])
    before = float(score_picture([PSNR], sr[None], gt, True)["psnr"])
    for k in ("border", "channel", "dtype", "options"):
        other = replace(PSNR, **{k: OTHER[k]})
        assert float(score_picture([other], sr[None], gt, True)["psnr"]) != before, k
        assert other.variant != PSNR.variant and other.metric().name == other.variant, k
    for k in ("kind", "higher_better"): assert getattr(replace(PSNR, **{k: OTHER[k]}).metric(), k) == OTHER[k]
    for k in ("name", "kind", "higher_better", "border", "dtype", "options", "logged", "tolerance", "left_open"):
        p = replace(OURS, measures=(replace(PSNR, **{k: OTHER[k]}),))
        if k != "kind": assert describe(p) != describe(replace(OURS, measures=(PSNR,))), k
    variants = {m.variant for p in constants(Protocol).values() for m in p.measures}
    assert len({m.metric() for p in constants(Protocol).values() for m in p.measures}) == len(variants)
    assert replace(PSNR, package="pyiqa", channel=None, dtype="float32").variant != PSNR.variant
    with pytest.raises(ValueError, match="package must be"): replace(PSNR, package="piq")
    with pytest.raises(ValueError, match="choose their channel themselves"): replace(PSNR, package="pyiqa")
    with pytest.raises(ValueError, match="dtype must be float32 or float64"): replace(PSNR, dtype="float16")
    for wrong in (dict(id="psnt"), dict(channel=None), dict(options=(("epsilon", 1e-8),))):
        with pytest.raises(ValueError, match="no function 'psnt'|cannot be called like this"): replace(PSNR, **wrong)
    for o in (-1, True, 4.): # a number of pixels
        with pytest.raises(ValueError, match="border must be"): replace(PSNR, border=o)

def test_dtype_of_a_pyiqa_metric_is_its_autocast(monkeypatch):
    seen = []
    def build(): return lambda sr, gt: seen.append(torch.is_autocast_enabled("cpu")) or torch.zeros(len(sr))
    fake = protocols.Metric("fake", "nr", True, build)
    for dtype in ("float32", "float16"):
        m = replace(NIQE, dtype=dtype)
        protocols._cropped_scorer(m, fake)(torch.zeros(1, 3, 8, 8), None)
    assert seen == [False, True]

def test_the_border_is_cut_before_pyiqas_metrics():
    sizes = []
    fake = protocols.Metric("fake", "nr", True, lambda: lambda sr, gt: sizes.append(tuple(sr.shape)) or torch.zeros(1))
    protocols._cropped_scorer(replace(NIQE, border=3), fake)(torch.zeros(1, 3, 16, 20), None)
    assert sizes == [(1, 3, 10, 14)]
    with pytest.raises(ValueError, match="leaves nothing"):
        protocols._cropped_scorer(replace(NIQE, border=8), fake)(torch.zeros(1, 3, 16, 20), None)

def test_every_field_of_a_set_counts(tmp_path):
    pair(pair(tmp_path, "x", 0), "y", 1)
    find_pictures(small(), tmp_path)
    remarks = " ".join(find_pictures(small(n=3), tmp_path)[1])
    assert "2 pictures, the published set has 3" in remarks and "no digests" in remarks
    assert find_pictures(small(name="b"), tmp_path)[0][0].set == "b"
    assert known_parts(REALSR_CROP) == {"lq", "gt", "answer"}
    for wrong, match in ((dict(size=(8, 8)), r"16×20 pixels, this set has 8×8"), (dict(scale=2), "need 32×40"),
                         (dict(layouts=(Layout("b/lq", "b/gt"),)), "no set of own is there"),
                         (dict(layouts=(Layout("a/lq", "a/none"),)), "no ground truth")):
        with pytest.raises(ValueError, match=match): find_pictures(small(**wrong), tmp_path)
    lone = find_pictures(small(paired=False), tmp_path)[0][0]
    assert small(paired=False).measures_of(small(paired=False).sets[0]) == ()
    assert lone.gt is not None and small().measures_of(small().sets[0]) == (PSNR, SSIM)
    known = small(sheet="osediff", name="realsr")
    assert "none of these names is known here, 50 are" in " ".join(find_pictures(known, tmp_path)[1])
    for k in ("source", "licence", "left_open"): assert "qqq" in describe(small(**{k: "qqq"}))

def test_every_field_of_a_protocol_counts():
    changed = dict(name="x", title="t", sources=("s",), sets=(REALSET65,), colour=Colour("wavelet"), eight_bit=False,
                   crop=cut_truth, measures=(SSIM,), aggregate=pooled_psnr, pairing="luck", published=(),
                   left_open=("l",))
    assert {*changed} == {f.name for f in fields(Protocol)}
    for k, v in changed.items(): assert str(replace(OSEDIFF, **{k: v})) != str(OSEDIFF), k
    with pytest.raises(ValueError, match="set missing"): replace(OSEDIFF, sets=())
    with pytest.raises(ValueError, match="measure psnr: each measure has one"): replace(OSEDIFF, measures=(PSNR, PSNR))
    other = replace(DREALSR_CROP, scale=2)
    with pytest.raises(ValueError, match="differ in scale"): replace(OSEDIFF, sets=(REALSR_CROP, other))
    with pytest.raises(ValueError, match="no set 'real'; there is realsr"): OSEDIFF.set("real")


# ---- scores

def test_eight_bit_rounds_the_outputs_first():
    gt = drawn_pairs()["soft"][1].float().div(255)
    sr = (gt + .3/255).clamp(0, 1)[None]
    a, b = (float(score_picture([PSNR], sr, gt, e)["psnr"]) for e in (True, False))
    assert a == pytest.approx(80) and b < 60

def test_sizes_agree_or_a_function_says_how():
    gt = drawn_pairs()["soft"][1].float().div(255)
    sr = gt[None, :, :-4, :-8]
    with pytest.raises(ValueError, match="outputs have 204×296 pixels, the ground truth 208×304"):
        score_picture([PSNR], sr, gt, True)
    for crop in (cut_truth, cut_both):
        assert float(score_picture([PSNR], sr, gt, True, crop)["psnr"]) == pytest.approx(80)
    assert 10 < float(score_picture([PSNR], sr, gt, True, resize_output)["psnr"]) < 79
    with pytest.raises(ValueError, match="larger than the ground truth"): cut_truth(gt[None], sr[0])
    assert cut_both(gt[None, :, :100], gt[:, :, :50])[0].shape == (1, 3, 100, 50)
    assert resize_output(gt[None], gt)[0] is not None and resize_output(sr, gt)[0].shape == (1, 3, 208, 304)

def test_no_measure_of_the_truth_without_a_truth():
    with pytest.raises(ValueError, match="compares with the ground truth"):
        score_picture([PSNR], torch.zeros(1, 3, 64, 64), None, True)

def test_a_mean_is_no_pooled_psnr():
    assert mean_over_pictures([20, 40]) == 30 and pooled_psnr([20, 40]) == pytest.approx(22.967, abs=1e-3)
    assert pooled_psnr([30, 30]) == pytest.approx(30)


# ---- sets

def test_pairs_go_by_name_and_not_by_order(tmp_path):
    pair(pair(tmp_path, "b", 0), "a", 1)
    put(tmp_path, a__lq__c=png(seed=2), a__gt__0=png((64, 80), seed=2)) # as many of each: in order they would be mixed
    with pytest.raises(ValueError, match="1 of 3 have no ground truth: c; partners carry the same name"):
        find_pictures(small(), tmp_path)

def test_realsrs_own_names_are_partners(tmp_path):
    for k, n in enumerate(("Canon_001", "Nikon_001")):
        folder = f"RealSR__{n[:5]}__Test__4__{n}"
        put(tmp_path, **{f"{folder}_LR4": png(seed=k), f"{folder}_HR": png((64, 80), seed=k), f"{folder}_LR2": png()})
    pictures, _ = find_pictures(replace(OURS, sets=(REALSR_FULL,)), tmp_path)
    assert [p.id for p in pictures] == ["Canon_001_LR4", "Nikon_001_LR4"]
    assert pictures[0].read_gt().shape == (3, 64, 80) and pictures[0].read_lq().shape == (3, 16, 20)
    assert [*pictures[0].sha256] == ["lq", "gt"] and pictures[0].sha256 != pictures[1].sha256

def test_a_set_without_truth_and_a_folder_that_is_the_set(tmp_path):
    put(tmp_path, RealSet65__a=png(), RealSet65__b=png((9, 11)))
    p = replace(RESSHIFT, sets=(REALSET65,))
    for data in (tmp_path, tmp_path/"RealSet65"):
        pictures, remarks = find_pictures(p, data)
        assert [o.id for o in pictures] == ["a", "b"] and pictures[0].gt is None
        assert any("2 pictures, the published set has 65" in o for o in remarks)
    with pytest.raises(ValueError, match="has no gt"): pictures[0].read_gt()

def test_outputs_beside_a_set_are_not_its_inputs(tmp_path): # in a folder that is called as the set is
    put(tmp_path, RealSet65__lq__a=png(), results__RealSet65__a=png((64, 80)))
    pictures, _ = find_pictures(replace(RESSHIFT, sets=(REALSET65,)), tmp_path)
    assert [tuple(p.read_lq().shape) for p in pictures] == [(3, 16, 20)]

@pytest.mark.parametrize("folders", [("one__RealSet65", "two__RealSet65"), ("RealSet65", "results__RealSet65")])
def test_a_set_lies_in_one_folder(tmp_path, folders): # what lies in another is not mixed in
    put(tmp_path, **{f"{o}__p{i}": png(seed=i) for i, o in enumerate(folders)})
    with pytest.raises(ValueError, match="realset65: lq lies in 2 folders") as e:
        find_pictures(replace(RESSHIFT, sets=(REALSET65,)), tmp_path)
    assert all(o.replace("__", "/") in str(e.value) for o in folders)

def test_plain_folders_serve_a_set_that_is_named_alone(tmp_path):
    put(tmp_path, lq__x=png(), gt__x=png((64, 80)), lq__y=png(seed=1), gt__y=png((64, 80), seed=1))
    p = small()
    assert len(find_pictures(p, tmp_path, ["a"])[0]) == 2
    with pytest.raises(ValueError, match="no set of own is there. a: not found"): find_pictures(p, tmp_path)
    with pytest.raises(ValueError, match="only set that is named, lq and gt"): find_pictures(p, tmp_path/"lq", ["a"])

@pytest.mark.parametrize("mode, said", [("RGBA", "transparent"), ("I;16", "8 bits")])
def test_what_cannot_be_scored_is_named_before_anything_is_computed(tmp_path, mode, said):
    pair(pair(tmp_path, "x", 0), "y", 1)
    put(tmp_path, a__gt__x=png((64, 80), mode=mode))
    (tmp_path/"a/lq/y.png").write_bytes(png()[:90])
    with pytest.raises(ValueError, match=rf"2 files cannot be used: a/x \(gt\).*{said}.*a/y \(lq\).*truncated"):
        find_pictures(small(), tmp_path)

def test_grey_pictures_are_read(tmp_path):
    pair(pair(tmp_path, "x", 0), "y", 1, mode="L")
    assert find_pictures(small(), tmp_path)[0][1].read_lq().shape == (3, 16, 20)

def test_two_files_of_one_picture_are_refused(tmp_path):
    pair(pair(tmp_path, "x", 0), "y", 1)
    (tmp_path/"a/lq/x.jpg").write_bytes(png())
    with pytest.raises(ValueError, match="are one picture by name"): find_pictures(small(), tmp_path)


# ---- folders and archives

def tar_of(path, members, mode="w", **kinds): # name -> bytes, in order, as it is said
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for k, v in kinds.items(): setattr(info, k, v)
            tar.addfile(info, io.BytesIO(data))
    return path

def zip_of(path, members):
    with zipfile.ZipFile(path, "w") as z:
        for name, data in members: z.writestr(name, data)
    return path

MEMBERS = [("a/lq/x.png", png()), ("a/gt/x.png", png((64, 80))), ("a/lq/y.png", png(seed=1)),
           ("a/gt/y.png", png((64, 80), 1))]

@pytest.mark.parametrize("make, end", [(tar_of, "tar"), (zip_of, "zip")])
def test_an_archive_reads_as_its_folder(tmp_path, make, end):
    path, lines = make(tmp_path/f"s.{end}", [*MEMBERS, ("a/.hidden.png", b"x"), ("a/notes.txt", b"x"),
                                             ("__MACOSX/a/x.png", b"x")]), []
    found = pictures_in(path, lines.append)
    assert [*found] == sorted(k for k, _ in MEMBERS) and all(found[k]() == v for k, v in MEMBERS)
    assert len(lines) == 2 and "left out, hidden: 2 (" in lines[0] and "no pictures: 1 (a/notes.txt)" in lines[1]
    below = pictures_in(tmp_path, lines.append) # a folder that holds one
    assert [*below] == [f"s/{k}" for k in found]
    assert len(find_pictures(small(), path)[0]) == len(find_pictures(small(), tmp_path)[0]) == 2

def test_a_folder_reads_with_those_below_it(tmp_path, capsys):
    put(tmp_path, a__b__x=png(), y=png())
    (tmp_path/".hidden").mkdir()
    (tmp_path/"readme.md").write_text("x")
    assert [*pictures_in(tmp_path)] == ["a/b/x.png", "y.png"]
    assert "left out, no pictures: 1 (readme.md)" in capsys.readouterr().out

BAD = {
    "absolute": [("/etc/x.png", b"x")], "above": [("a/../../x.png", b"x")], "backslash": [("..\\x.png", b"x")],
    "drive": [("C:\\x.png", b"x")], "twice": [("a/x.png", b"x"), ("a/x.png", b"y")],
    "twice by path": [("a/x.png", b"x"), ("./a/x.png", b"y")],
}

@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("make, end", [(tar_of, "tar"), (zip_of, "zip")])
@pytest.mark.parametrize("members", BAD.values(), ids=BAD)
def test_a_member_that_cannot_be_trusted_is_refused(tmp_path, make, end, members):
    with pytest.raises(ValueError, match="leads out of the archive|which one counts cannot be known"):
        pictures_in(make(tmp_path/f"s.{end}", [*MEMBERS, *members]))

@pytest.mark.parametrize("make, end", [(tar_of, "tar"), (zip_of, "zip")])
def test_a_huge_member_is_refused(tmp_path, make, end, monkeypatch):
    path = make(tmp_path/f"s.{end}", [*MEMBERS, ("big.png", bytes(100_000))])
    pictures_in(path)
    monkeypatch.setattr(protocols, "MOST", 50_000)
    with pytest.raises(ValueError, match="'big.png' has 100,000 bytes, at most 50,000"): pictures_in(path)

@pytest.mark.parametrize("make, end", [(tar_of, "tar"), (zip_of, "zip")])
def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path, make, end):
    whole = make(tmp_path/f"s.{end}", MEMBERS).read_bytes()
    last = len(whole) if end == "zip" else whole.rstrip(b"\0").__len__()//512*512 + 512 # tar: up to its end mark
    for cut in (0, 100, 512, 1000, last//2//512*512, last//2, last-1, last - (last % 512 or 512)):
        path = tmp_path/f"cut.{end}"
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="damaged or truncated|truncated archive"): pictures_in(path)

def test_links_and_devices_of_a_tar_are_left_out(tmp_path):
    path = tar_of(tmp_path/"s.tar", MEMBERS)
    tar_of(path, [("a/lq/z.png", b"")], "a", type=tarfile.SYMTYPE, linkname="/etc/passwd")
    lines = []
    assert len(pictures_in(path, lines.append)) == 4 and "a/lq/z.png is no ordinary file" in lines[0]

def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    path = zip_of(tmp_path/"s.zip", MEMBERS)
    data = bytearray(path.read_bytes())
    data[data.index(b"a/lq/x.png") + 30] ^= 255
    path.write_bytes(data)
    with pytest.raises(ValueError, match="a/lq/x.png is damaged"): pictures_in(path)["a/lq/x.png"]()

def test_what_is_no_folder_is_said(tmp_path):
    (tmp_path/"s.tar.gz").write_bytes(b"x")
    with pytest.raises(ValueError, match="has to be unpacked first"): pictures_in(tmp_path/"s.tar.gz")
    with pytest.raises(FileNotFoundError, match="no folder or archive"): pictures_in(tmp_path/"none")

def test_a_folder_and_its_archive_side_by_side_are_refused(tmp_path):
    put(tmp_path, s__a__lq__x=png())
    zip_of(tmp_path/"s.zip", MEMBERS)
    with pytest.raises(ValueError, match="is there twice, in a folder and in an archive"): pictures_in(tmp_path)


def test_a_measure_that_fails_is_named_and_the_others_are_checked(monkeypatch):
    def broken(sr, gt, border, channel, eps): raise RuntimeError("out of order")
    with monkeypatch.context() as m:
        protocols._metric_of.cache_clear()
        m.setattr(rewards, "psnr", broken)
        table = protocols.check_protocol(replace(OSEDIFF, measures=OSEDIFF.measures[:2]))
    protocols._metric_of.cache_clear()
    said = protocols.check_report(table)
    assert "FAILED    psnr" in said and "out of order" in said and "holds     ssim" in said
    assert not any(table[table.measure == "psnr"].holds) and all(table[table.measure == "ssim"].holds)
