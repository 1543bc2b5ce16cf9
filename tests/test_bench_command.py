"The command srnb bench on drawn pictures: what is wrong is told at once, what is done is kept, numbers are paired"
import json
import re
import shutil
import sys
import tarfile
import zipfile
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import t as student

from srnb import judge, protocols
from srnb.baselines import bicubic_x4
from srnb.command import main
from srnb.core import bicubic, generator, quantize, read_image, read_run, write_image
from srnb.downstream import OCR
from srnb.judge import Unfit, bench, summarised, text_table
from srnb.protocols import OSEDIFF, cut_truth
from srnb.rewards import PSNR_Y, psnr_y, rgb
from srnb.sources import Command, Folder, Model

OWN = """
from srnb.colour import Colour
from srnb.protocols import OSEDIFF, Layout, Protocol, Published, TestSet, mean_over_pictures
def one(name): return TestSet(name, 5, (16, 24), 4, (Layout(f"{name}/lq", f"{name}/gt"),), True, "drawn", "CC0")
def rows(name):
    return Published("theirs", name, 5, (("psnr", 30.5),), "nobody"), Published("old", name, 9, (), "nobody")
psnr, ssim = (next(m for m in OSEDIFF.measures if m.name == n) for n in ("psnr", "ssim"))
deep = tuple(m for m in OSEDIFF.measures if m.name == "musiq")
TOY = Protocol("toy", "drawn pictures", ("this test",), (one("a"), one("b")), Colour("none"), True, None, (psnr, ssim),
               mean_over_pictures, "name", (*rows("a"), *rows("b")))
ONE = Protocol("one", "drawn pictures", ("this test",), (one("a"),), Colour("none"), True, None, (psnr, *deep),
               mean_over_pictures, "name")
"""


def drawn(i): # lq (3,16,24), gt (3,64,96)
    gt = bicubic(quantize(torch.rand(1, 3, 8, 12, generator=generator(i))), (64, 96))
    return bicubic(gt, (16, 24))[0], gt[0]


@pytest.fixture
def box(tmp_path, monkeypatch): # data of two sets, good outputs of both, a protocol; the working folder
    monkeypatch.chdir(tmp_path)
    (tmp_path/"own.py").write_text(OWN)
    for k, s in enumerate("ab"):
        for i in range(5):
            lq, gt = drawn(10*k+i)
            write_image(f"data/{s}/lq/p{i}.png", lq)
            write_image(f"data/{s}/gt/p{i}.png", gt)
            write_image(f"good/{s}/p{i}.png", quantize((gt+bicubic_x4(lq[None])[0])/2))
    return tmp_path


@pytest.fixture
def toy(box):
    from srnb.config import from_file
    return from_file("own.py:TOY", "protocol")


def run(capsys, *argv): # exit code, stdout, lines of stderr
    code = main(["bench", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, [o for o in err.splitlines() if not o.startswith("srnb bench: loading")]


def srnb(capsys, *argv, data="data", out="out"): return run(capsys, "own.py:TOY", *argv, "--data", data, "-o", out)


def scored(monkeypatch, die=None): # grows with every picture that is scored; the call number `die` is interrupted
    calls = []

    def count(*a, **k):
        if len(calls) == die: raise KeyboardInterrupt
        calls.append(1)
        return protocols.score_picture(*a, **k)
    monkeypatch.setattr(judge, "score_picture", count)
    return calls


def test_everything_wrong_is_told_at_once(box, capsys, monkeypatch):
    calls = scored(monkeypatch)
    shutil.copytree("good", "one")
    shutil.copytree("good", "two")
    (box/"one/a/p0.png").unlink()                                            # missing
    shutil.copy("good/a/p0.png", "one/a/zebra.png")                          # extra
    Image.open("good/a/p1.png").crop((0, 0, 90, 64)).save("one/a/p1.png")     # wrong size
    (box/"one/b/p2.png").write_bytes((box/"good/b/p2.png").read_bytes()[:99]) # damaged
    for mode, name in (("L", "p0"), ("RGBA", "p1"), ("P", "p2")):
        Image.open(f"good/b/{name}.png").convert(mode).save(f"two/b/{name}.png")
    Image.fromarray(np.zeros((64, 96), np.uint16)).save("two/b/p3.png")
    code, out, said = srnb(capsys, "one", "two")
    assert code == 1 and not out and not calls and not (box/"out").exists()
    for o in ("one, a: missing (1 of 5): p0", "one, b: damaged (1 of 5): p2.png",
              "one, a: wrong size (1 of 5; an output must have 4 times the size of its input): p1.png has 90×64",
              "one, a: extra (1), of no picture of a, left out: zebra.png",
              "two, b: not 8-bit RGB (4 of 5): p0.png (grey), p1.png (alpha), p2.png (palette), p3.png (more than 8"):
        assert any(o in line for line in said), (o, said)
    assert not any(o.startswith("two, a") for o in said)


def test_common_pictures(box, capsys, monkeypatch):
    shutil.copytree("good", "less")
    (box/"less/a/p0.png").unlink()
    (box/"less/b/p3.png").write_bytes(b"\x89PNG no")
    assert srnb(capsys, "less", "good")[0] == 1
    code, out, said = srnb(capsys, "less", "good", "--common")
    assert code == 0 and out.count("n = 4") == 2
    assert "a: 4 of 5 pictures are compared, which all sources have" in said
    assert "published numbers (theirs) are not comparable: they are means over 5 pictures, these are 4" in out
    t = read_run("out")[1]
    assert set(t[t.set == "a"].image) == {"p1", "p2", "p3", "p4"} and set(t.variant) == {"bicubic", "less", "good"}
    Image.open("good/a/p1.png").crop((0, 0, 90, 64)).save("less/a/p1.png")
    assert srnb(capsys, "less", "--common")[0] == 1 # a wrong size is not missing


@pytest.mark.parametrize("source, said", [
    ("data/{set}/gt", "the ground truth itself"), ("data/{set}/lq", "the inputs themselves"),
    ("same", "5 inputs have one and the same output"), ("none", "none of its files carries the name"),
    ("flat", "it has no folder b"), ("twice", "several files for one picture (1 of 5)")])
def test_folders_that_are_something_else(box, capsys, source, said):
    for s in "ab":
        for i in range(5):
            write_image(f"same/{s}/p{i}.png", torch.full((3, 64, 96), .5))
            write_image(f"none/{s}/q{i}.png", drawn(i)[1])
    shutil.copytree("good/a", "flat/a")
    shutil.copytree("good", "twice")
    Image.open("good/a/p0.png").save("twice/a/p0.webp", lossless=True)
    code, _, lines = srnb(capsys, f"x={source}")
    assert code == 1 and any(said in o for o in lines), lines
    assert not (box/"out").exists()


def test_archives_are_folders(box, capsys):
    assert srnb(capsys, "x=good")[0] == 0
    with tarfile.open("good.tar", "w") as f: f.add("good", ".")
    with zipfile.ZipFile("good.zip", "w") as f:
        for p in sorted(box.glob("good/*/*.png")): f.write(p, f"deep/{p.relative_to(box/'good')}")
    for i, o in enumerate(("good.tar", "good.zip/deep", "good.zip/deep/{set}")):
        assert srnb(capsys, f"x={o}", out=f"out{i}")[0] == 0
        assert read_run(f"out{i}")[1].equals(read_run("out")[1])
    code, _, said = srnb(capsys, "x=good.zip/other", out="out9")
    assert code == 1 and any("it has no folder a" in o for o in said)


def test_killed_and_resumed(box, capsys, monkeypatch):
    assert srnb(capsys, "x=good", out="whole")[0] == 0
    scored(monkeypatch, die=7)
    code, out, said = srnb(capsys, "x=good")
    assert code == 130 and not out and "interrupted" in said[-1]
    assert len(files := sorted(box.glob("out/pictures/*/*.parquet"))) == 7 and not list(box.rglob(".part-*"))
    assert all(len(pd.read_parquet(o)) == 2 for o in files) and not (box/"out/metrics.parquet").exists()
    calls = scored(monkeypatch)
    assert srnb(capsys, "x=good")[0] == 0 and len(calls) == 20-7
    for name in ("metrics.parquet", "table.csv", "table.md", "crops.html"):
        assert (box/"out"/name).read_bytes() == (box/"whole"/name).read_bytes()
    assert srnb(capsys, "x=good")[0] == 0 and len(calls) == 13


def test_what_has_changed_is_done_anew(box, capsys, monkeypatch):
    assert srnb(capsys, "x=good")[0] == 0
    calls, first = scored(monkeypatch), read_run("out")[1]
    shutil.copytree("good", "elsewhere")
    assert srnb(capsys, "other=elsewhere")[0] == 0 and not calls # the same pictures under another name and path
    write_image("good/a/p3.png", quantize(read_image("good/a/p3.png")*.9))
    assert srnb(capsys, "x=good")[0] == 0 and len(calls) == 1
    now = read_run("out")[1]
    moved = now[now.value != first.value]
    assert {*zip(moved.set, moved.image, moved.variant, strict=True)} == {("a", "p3", "x")}
    write_image("data/b/gt/p1.png", quantize(drawn(11)[1]*.9)) # the truth counts too
    assert srnb(capsys, "x=good")[0] == 0 and len(calls) == 3
    assert srnb(capsys, "x=good", "--measures", "psnr")[0] == 0 and len(calls) == 23
    code, _, said = run(capsys, "own.py:ONE", "x=good", "--data", "data", "-o", "out", "--measures", "psnr")
    assert code == 1 and "holds a run with other parameters" in said[-1]


def test_rules_that_have_changed_are_done_anew(toy, capsys):
    def means(protocol, out="out"):
        return bench(protocol, dict(good=Folder("good")), out, "data", ["a"], show=lambda o: None).groupby(
            ["metric", "variant"]).value.mean()

    def corner(side):
        def crop(sr, gt): return sr[..., :side, :side], gt[..., :side, :side]
        return crop
    first, (one, two) = means(toy), toy.measures
    turned = means(replace(toy, measures=(replace(one, name="ssim"), replace(two, name="psnr"))))
    assert turned["ssim", "good"] == first["psnr", "good"] and turned["psnr", "good"] == first["ssim", "good"]
    large, small = (means(replace(toy, crop=corner(side)), "cut") for side in (64, 32))
    assert large["psnr", "good"] != small["psnr", "good"]


def test_an_own_file_that_has_changed_is_done_anew(box, capsys):
    def mean(plus):
        (box/"mine.py").write_text("from srnb.rewards import Metric\nMEAN = Metric('mean', 'nr', True, lambda: "
                                   f"lambda sr, gt: sr.double().mean((1, 2, 3))+{plus})\n")
        assert srnb(capsys, "good", "--sets", "a", "--also", "mine.py:MEAN")[0] == 0
        t = read_run("out")[1]
        return t[t.metric == "mean"].value.mean()
    assert mean(7) == pytest.approx(mean(0)+7)


def test_the_version_of_own_functions_counts(toy, monkeypatch, capsys):
    def told():
        entry = judge.entered(toy, {}, "out", "data", ["a"])
        return [j.file.name for j in judge.jobs_of(entry, [0])]
    before = told()
    monkeypatch.setattr(judge, "versions", lambda: dict(srnb="99"))
    assert not {*before} & {*told()}


ENLARGE = """
import sys
from pathlib import Path
from PIL import Image
for f in Path(sys.argv[1]).iterdir():
    im = Image.open(f)
    for folder in sys.argv[2:]:
        Path(folder).mkdir(exist_ok=True)
        im.resize((im.width*4, im.height*4), 0).save(Path(folder, f.name))
"""


def test_outputs_of_a_command_belong_to_its_inputs(box, capsys):
    (box/"up.py").write_text(ENLARGE)
    line = f"x=cmd:{sys.executable} up.py {{lq}} {{sr}}", "--sets", "a"
    assert srnb(capsys, *line)[0] == 0
    kept, = box.glob("out/outputs/x-*/a/p0.png")
    stamp = kept.stat().st_mtime_ns
    for i in range(1, 5):
        for part, image in zip(("lq", "gt"), drawn(100+i), strict=True): write_image(f"data/a/{part}/p{i}.png", image)
    assert srnb(capsys, *line)[0] == 0 and srnb(capsys, *line, out="fresh")[0] == 0
    assert read_run("out")[1].equals(read_run("fresh")[1]) and kept.stat().st_mtime_ns == stamp
    code, _, said = srnb(capsys, f"x=cmd:{sys.executable} up.py {{lq}} {{sr}} {{sr}}/seen", "--sets", "a")
    assert code == 1 and "several files for one picture (5), such as p0.png, seen/p0.png" in said[-1]


def test_outputs_of_another_set_are_not_taken(box, capsys):
    shutil.rmtree("good/b")
    code, out, said = srnb(capsys, "good", "--sets", "b")
    assert code == 1 and not out and any("folders of other sets (a): it has no folder b" in o for o in said)
    for i in range(5): shutil.copy(f"good/a/p{i}.png", f"good/p{i}.png") # two folders, and those at the top are meant
    code, _, said = srnb(capsys, "good", "--sets", "b")
    assert code == 0 and any("left out, in folders of other sets (5): a/p0.png" in o for o in said)


@pytest.mark.parametrize("more, said", [
    (("--check", "--measures", "psnr", "--seed", "3"), "alone; leave out --seed"),
    (("--sets", "a"), "there are no sources; leave out --sets"),
    (("good", "--steps", "3", "--color-fix", "none"), "no source is a policy, and --steps, --color-fix changes"),
    (("good", "--sets", "a,a"), "name each once"), (("good", "--measures", ""), "name each once, and one at least")])
def test_what_changes_nothing_is_refused(box, capsys, more, said):
    place = ("--data", "data", "-o", "out") if more[0] == "good" else ()
    code, out, err = run(capsys, "own.py:TOY", *more, *place)
    assert code == 2 and not out and any(said in o for o in err) and not (box/"out").exists(), err


def test_a_device_that_is_not_here(box, capsys):
    code, out, said = srnb(capsys, "good", "--device", "gpu")
    assert code == 1 and "device 'gpu' cannot be used here" in said[-1] and not (box/"out").exists()


def test_interval_by_hand(toy, capsys):
    def noisy(lq, seed): # two seeds: each its own shift
        return quantize(bicubic_x4(lq)*(.97-.02*seed))
    sources = dict(drawn=Model(noisy, "noisy", True), half=Folder("good"))
    t = bench(toy, sources, "out", "data", sets=["a"], measures=["psnr"], seeds=(0, 1), show=lambda o: None)
    assert len(t) == 5*(1+2+1) # bicubic and the folder have one value a picture
    by = {v: t[t.variant == v].groupby("image").value.mean() for v in sources} # seeds first
    base = t[t.variant == "bicubic"].set_index("image").value
    rows = pd.read_csv("out/table.csv").set_index("variant")
    for v in sources:
        d = (by[v]-base).to_numpy()
        half = student.ppf(.975, 4)*d.std(ddof=1)/5**.5
        want = [by[v].mean(), d.mean(), d.mean()-half, d.mean()+half]
        got = rows.loc[v, ["mean", "difference", "difference_low", "difference_high"]].astype(float)
        assert np.allclose(got, want, rtol=0, atol=1e-9)
        assert rows.loc[v, "n"] == 5
    assert rows.seeds.to_dict() == dict(bicubic=1, drawn=2, half=1)
    assert np.isnan(rows.loc["bicubic", "difference"])


def test_sets_are_never_pooled_and_pairs_are_complete():
    rows = [dict(set=s, image="p", seed=0, metric="psnr", variant=v, value=x)
            for s, v, x in (("a", "bicubic", 1.), ("a", "x", 2.), ("b", "bicubic", 5.), ("b", "x", 9.))]
    t = summarised(pd.DataFrame(rows), "bicubic").set_index(["set", "variant"])
    assert t.loc[("a", "x"), "difference"] == 1 and t.loc[("b", "x"), "difference"] == 4
    assert t.low.isna().all() and t.difference_low.isna().all() and (t.n == 1).all() # one picture: no interval
    more = [dict(o, image="q") for o in rows[:3]]
    with pytest.raises(ValueError, match="b/q has no psnr of x: values are paired by picture"):
        summarised(pd.DataFrame([*rows, *more]), "bicubic")


def test_sources_that_do_not_read_their_input(toy, box, capsys):
    blind = dict(blind=lambda lq: torch.zeros(1, 3, *(4*n for n in lq.shape[2:])), small=lambda lq: lq,
                 broken=lambda lq: lq.no_such_thing())
    with pytest.raises(Unfit) as e: bench(toy, blind, "out", "data")
    text = str(e.value)
    assert "blind makes the same of two images: it does not read its input" in text
    assert "small makes 32×32 of 32×32, must enlarge 4 times" in text and "broken fails: AttributeError" in text
    (box/"grey.py").write_text("import sys\nfrom pathlib import Path\nfrom PIL import Image\n"
                               "for p in Path(sys.argv[1]).iterdir(): "
                               "Image.new('RGB', (96, 64)).save(Path(sys.argv[2])/p.name)")
    code, _, said = srnb(capsys, f"cmd:{sys.executable} grey.py {{lq}} {{sr}}")
    assert code == 1 and any("grey, a: 5 inputs have one and the same output" in o for o in said)


SCRIPT = """
import sys
from pathlib import Path
from PIL import Image
for n, p in enumerate(sorted(Path(sys.argv[1]).iterdir())):
    if n == 2 and "--die" in sys.argv:
        Path(sys.argv[2], p.name).write_bytes(b"half a picture")
        print("card is on fire")
        sys.exit(7)
    with Image.open(p) as im: im.resize((4*im.width, 4*im.height), Image.BICUBIC).save(Path(sys.argv[2])/p.name)
    Path("log").open("a").write(p.name + " ")
"""


def test_a_command_that_fails_half_way(box, capsys, monkeypatch):
    (box/"my up.py").write_text(SCRIPT)
    line = f"cmd:{sys.executable} 'my up.py' {{lq}} {{sr}}"
    calls = scored(monkeypatch)
    code, _, said = srnb(capsys, f"{line} --die")
    assert code == 1 and not calls
    told = "exit code 7 and said 'card is on fire'; 3 of 5 outputs are missing: p2, p3, p4"
    assert any(f"my up, a: the command ended with {told}" in o for o in said), said
    code, _, said = srnb(capsys, f"{line} --die") # the same call goes on, two at a time
    assert any("1 of 5 outputs are missing: p4" in o for o in said)
    assert srnb(capsys, f"{line} --die")[0] == 0 and len(calls) == 20
    assert sorted((box/"log").read_text().split()) == sorted([f"p{i}.png" for i in range(5)]*2)
    table = read_run("out")[1]
    assert table[table.variant == "my up"].value.notna().all()
    assert srnb(capsys, f"{line} --die")[0] == 0 and len(calls) == 20
    (box/"my up.py").write_text(SCRIPT.replace("BICUBIC", "NEAREST").replace("n == 2", "n == 9"))
    assert srnb(capsys, f"{line} --die")[0] == 0 and len(calls) == 30 # the same line, another program
    code, _, said = srnb(capsys, "cmd:no-such-program {lq} {sr}")
    assert code == 1 and any("there is no program 'no-such-program' here" in o for o in said)


@pytest.mark.parametrize("line, said", [
    ("oseddif x --data data -o out", "did you mean 'osediff'"), ("nothing", "there is osediff, seesr"),
    ("own.py:NONE", "has no 'NONE'"), ("own.py:psnr", "a Measure, and no Protocol"),
    ("osediff good", "srnb bench osediff says what it should look like"), ("osediff good --data data", "by -o"),
    ("osediff --data data", "needs sources, or --check"), ("osediff good --data nowhere -o out", "no such folder"),
    ("osediff good a/good --data data -o out", "two sources are called 'good'"),
    ("osediff x=cmd:up --data data -o out", "needs {lq}"), ("--check", "--check needs a protocol"),
    ("osediff good --check", "--check takes no sources"), ("osediff x= --data data -o out", "no source behind the ="),
    ("own.py:TOY good --data data -o out --seed 1,1", "names a seed twice"),
    ("own.py:TOY nowhere --data data -o out", "there is no such folder"),
    ("own.py:TOY w.pth --data data -o out", "w.pth")])
def test_wrong_usage(box, capsys, line, said):
    (box/"w.pth").write_bytes(b"no weights")
    code, out, lines = run(capsys, *line.split())
    assert code == 2 and not out and said in " ".join(lines), lines
    assert not (box/"out").exists()


@pytest.mark.parametrize("more, said", [
    (("--measures", "psnrr"), "did you mean 'psnr'"), (("--sets", "c"), "has no set 'c'"),
    (("--baseline", "godd"), "did you mean 'good'"),
    (("--by", "ssim", "--measures", "psnr"), "no measure 'ssim' to choose"),
    (("bicubic=good",), "bicubic is the name of bicubic interpolation")])
def test_names_that_are_not_there(box, capsys, more, said):
    code, _, lines = srnb(capsys, "good", *more)
    assert code == 1 and said in lines[-1] and not (box/"out").exists()


def test_measures_that_cannot_be_had(box, capsys, offline):
    call = "own.py:ONE", "good", "--data", "data", "-o", "out"
    code, _, said = run(capsys, *call)
    line = next(o for o in said if o.startswith("measure musiq"))
    assert code == 1 and re.match(r"measure musiq cannot be computed here: \S.*; --available leaves it out$", line)
    assert not (box/"out").exists()
    code, out, said = run(capsys, *call, "--available")
    assert code == 0 and any(re.match("measure musiq cannot .* it is left out$", o) for o in said)
    assert set(read_run("out")[1].metric) == {"psnr"}


def test_tables(toy, box, capsys):
    code, out, said = srnb(capsys, "a long name for a source of a table=good", "bicubic")
    lines = out.splitlines()
    assert code == 0 and max(map(len, lines)) <= 120
    assert "a, n = 5, published, not computed here:" in out and re.search(r"theirs +30\.5", out)
    assert "published numbers (old) are not comparable: they are means over 9 pictures, these are 5" in out
    assert (box/"out/table.md").read_text().count("| psnr ↑ | ssim ↑ |") == 2
    wide = pd.read_csv("out/table.csv")
    assert set(wide.set) == {"a", "b"} and list(wide.columns)[:5] == ["set", "metric", "variant", "n", "seeds"]
    assert list(read_run("out")[1]) == ["set", "image", "seed", "metric", "variant", "value"]
    config = read_run("out")[0]
    about = config["params"]["protocol"]["measures"][0]
    assert about["border"] == 0 and about["channel"].startswith("luma") and config["versions"]["torch"]
    assert len(config["params"]["pictures"]) == 10 and str(box) not in json.dumps(config)
    rows = [dict(set="a", metric=m.name, variant=v, n=5, seeds=1, mean=12345.678, low=0, high=1, difference=-1234.5,
                 difference_low=-1300.1, difference_high=-1168.9) for m in OSEDIFF.measures for v in ("bicubic", "x")]
    text = text_table(pd.DataFrame(rows), OSEDIFF.measures, "bicubic")
    assert max(map(len, text.splitlines())) <= 120 and all(m.name in text for m in OSEDIFF.measures)


def test_published_rows_need_the_published_files(toy, monkeypatch):
    from srnb.protocols import find_pictures
    a, pictures = toy.set("a"), [p for p in find_pictures(toy, "data")[0] if p.set == "a"]
    assert "published, not computed here" in judge.published_lines(toy, a, pictures, toy.measures)[0]
    assert any("cannot be told" in o for o in judge.published_lines(toy, a, pictures, toy.measures))

    def known(files, pixels):
        monkeypatch.setattr(type(a), "digests", lambda self: files)
        monkeypatch.setattr(type(a), "pixels", lambda self: pixels)
        return judge.published_lines(toy, a, pictures, toy.measures)
    same = {k: pictures[0].pixels(k) for k in ("lq", "gt")}
    for files, pixels in ((dict(pictures[0].sha256), same), (dict.fromkeys(("lq", "gt"), "0"*64), same)):
        said = known({"p0": files}, {"p0": pixels}) # written again, the pixels stay
        assert "published, not computed here" in said[0] and not any("cannot be told" in o for o in said)
    said = known({"p0": dict(pictures[0].sha256, gt="0"*64)}, {"p0": dict(same, gt="0"*16)})
    assert len(said) == 2 and all("1 of these files are not the published ones, such as p0" in o for o in said)
    said = known({"q0": pictures[0].sha256}, {"q0": same}) # as many pictures under other names are another set
    assert len(said) == 2 and "1 of the known pictures are not here, such as q0" in said[0]


class Images(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []
    def handle_starttag(self, tag, attrs):
        if tag == "img": self.found.append(dict(attrs))


def test_crops(toy, box):
    sources = {"<b>&x": Folder("good"), **{f"s{i}": Model(lambda lq, seed: bicubic_x4(lq), f"s{i}") for i in range(6)}}
    t = bench(toy, sources, "out", "data", by="ssim", show=lambda o: None)
    page = (box/"out/crops.html").read_text()
    parser = Images()
    parser.feed(page)
    assert len(page) <= 2_000_000 and len(parser.found) == 2*3*(1+1+7+1) and "<b>&x" not in page
    assert all(o["src"].startswith("data:image/jpeg") and o["alt"] for o in parser.found)
    ours = t[(t.set == "a") & (t.metric == "ssim") & (t.variant == "<b>&x")].set_index("image").value.sort_values()
    heads = re.findall(r"<h3>(\w+): (\w+)</h3>", page)
    assert heads[:3] == [("best", ours.index[4]), ("median", ours.index[2]), ("worst", ours.index[0])]
    assert f"ssim {ours.iloc[0]:.4f}" in page


def test_a_policy_draws_what_srnb_upscale_writes(box, capsys, tiny):
    for s in "ab":
        assert main(["upscale", f"data/{s}/lq", "-o", f"ours/{s}", "--model", str(tiny), "--seed", "3", "--dtype",
                     "float32", "--color-fix", "none", "--steps", "2"]) == 0
    code, out, said = srnb(capsys, f"net={tiny}", "files=ours", "--seed", "3,4", "--dtype", "float32", "--steps", "2")
    assert code == 0 and "net (2 seeds)" in out
    t = read_run("out")[1]
    drawn = t[(t.variant == "net") & (t.seed == 3)].value.to_numpy()
    assert np.array_equal(drawn, t[t.variant == "files"].value.to_numpy())
    assert not np.array_equal(drawn, t[(t.variant == "net") & (t.seed == 4)].value.to_numpy())
    assert len(list(box.glob("out/outputs/net-*/a/*.png"))) == 10 # kept for people


def test_an_adapter_names_its_base(box, capsys, tiny):
    from srnb.policies import from_pretrained, save_adapter
    for name in (str(tiny), None):
        policy = from_pretrained(tiny)
        policy.name = name
        policy.add_lora(2)
        with torch.no_grad():
            for p in policy.net.parameters():
                if p.requires_grad: p.add_(.3)
        save_adapter(policy, f"run{name is None}/adapter")
    call = f"base={tiny}", f"tuned={tiny}+runFalse", "--dtype", "float32", "--sets", "a", "--steps", "1"
    code, _, said = srnb(capsys, *call, "run=runTrue")
    assert code == 2 and "does not say on which base it was trained; write BASE+runTrue" in said[-1]
    assert srnb(capsys, *call, "run=runFalse")[0] == 0
    t = read_run("out")[1].pivot_table(index=["image", "metric"], columns="variant", values="value")
    assert (t.run == t.tuned).all() and (t.base != t.tuned).all()
    call = [o.replace("base=", "other=") for o in call[:1]] + ["run=runFalse", *call[2:]] # results of other names
    assert srnb(capsys, *call, "--strength", "0")[0] == 0
    t = read_run("out")[1].pivot_table(index=["image", "metric"], columns="variant", values="value")
    assert (t.run == t.other).all()
    code, _, said = srnb(capsys, f"base={tiny}", "--sets", "a", "--strength", "1")
    assert code == 2 and "--strength is that of an adapter, and no source has one" in said[-1]
    code, _, said = srnb(capsys, *call, "--strength", "2.5")
    assert code == 2 and "--strength must lie in [0, 2], got 2.5" in said[-1]


def test_speed(toy, box, capsys, monkeypatch):
    monkeypatch.setattr(judge, "FORMS", judge.FORMS[:1])
    net = torch.nn.Conv2d(3, 48, 3, padding=1).requires_grad_(False)
    conv = Model(lambda lq, seed: torch.pixel_shuffle(net(lq), 4).sigmoid(), "conv")
    said = []
    bench(toy, dict(conv=conv, files=Folder("good")), "out", "data", speed=True, show=said.append)
    cost = pd.read_parquet("out/cost.parquet").set_index("source")
    assert cost.loc["conv", "flops"] == 2*27*48*64*64 and cost.loc["conv", "parameters"] == 27*48+48
    assert cost.loc["files"].drop("form").isna().all() and cost.loc["files", "form"] == "made elsewhere"
    assert cost.loc["bicubic", "cpu_s_per_mp"] > 0 and np.isnan(cost.loc["bicubic", "flops"])
    assert re.search(r"files +made elsewhere +–( +–)+$", said[-1], re.M)
    assert max(map(len, said[-1].splitlines()[:5])) <= 120


def test_a_rule_for_sizes_is_used_and_said(toy, box, capsys):
    from dataclasses import replace
    shutil.copytree("good", "cut")
    Image.open("good/a/p1.png").crop((0, 0, 92, 60)).save("cut/a/p1.png")
    said = []
    cutting = replace(toy, crop=cut_truth)
    t = bench(cutting, dict(cut=Folder("cut")), "out", "data", say=said.append, show=lambda o: None)
    assert any("wrong size (1 of 5" in o and "the protocol has a rule for that, cut_truth" in o for o in said)
    assert t.value.notna().all()


def test_check_says_what_drifted(box, capsys, monkeypatch):
    table = pd.DataFrame(dict(measure=["psnr", "ssim", "musiq"], holds=[True, True, None]))
    monkeypatch.setattr(protocols, "check_report", lambda t: f"{len(t)} numbers")
    for holds, code in (([True, True, None], 0), ([True, False, None], 1), ([None]*3, 1)):
        monkeypatch.setattr(protocols, "check_protocol", lambda p, data, holds=holds: table.assign(
            holds=pd.Series(holds, dtype=object)))
        found = run(capsys, "--check", "osediff")
        assert found[0] == code and found[1] == "3 numbers\n"


def test_what_there_is(box, capsys):
    code, out, _ = run(capsys)
    assert code == 0 and "osediff" in out
    code, out, _ = run(capsys, "own.py:TOY")
    assert code == 0 and "a/lq + a/gt" in out and "border 0" in out


def test_names_of_sources(box):
    from srnb.command import split_sources
    (box/"x=1").mkdir()
    assert split_sources(["x=1", "a/b.tar/{set}/in", "n=x=1", "owner/net@v1"]) == {
        "x=1": "x=1", "in": "a/b.tar/{set}/in", "n": "x=1", "net@v1": "owner/net@v1"}
    with pytest.raises(ValueError, match="has no {sr}"): Command("up {lq}")


def test_any_metric_stands_beside_the_protocol(box, capsys):
    own = "lambda: lambda sr, gt: sr.double().mean((1, 2, 3))"
    (box/"mine.py").write_text("from srnb.rewards import Metric\n"
                               f"MEAN = Metric('mean', 'nr', True, {own})\n")
    code, out, said = srnb(capsys, "good", "--measures", "psnr", "--also", "psnr_y,mine.py:MEAN")
    assert code == 0, said
    _, table = read_run("out")
    wide = table[table.variant == "good"].pivot(index=["set", "image"], columns="metric", values="value")
    assert [*wide] == ["mean", "psnr", "psnr_y"]
    sr, gt = read_image("good/a/p2.png"), read_image("data/a/gt/p2.png")
    assert wide.loc[("a", "p2"), "mean"] == pytest.approx(sr.mean().item(), abs=1e-6)
    assert wide.loc[("a", "p2"), "psnr_y"] == pytest.approx(psnr_y(sr[None], gt, 4).item(), abs=1e-9) # its own border
    assert "mean ↑" in out
    for wrong, about in (("piq", "did you mean 'piqe'"), ("mine.py:NONE", "has no 'NONE'")):
        code, _, said = srnb(capsys, "good", "--also", wrong, out="no")
        assert code != 0 and about in " ".join(said) and not (box/"no").exists()


def test_a_metric_as_a_measure():
    m = protocols.measure_of(PSNR_Y)
    assert (m.package, m.id, m.kind, m.higher_better, m.border) == ("metric", "psnr_y", "fr", True, 0)
    assert protocols.measure_of(OCR).id == "ocr_ppocrv6" and "rapidocr" in protocols.measure_of(OCR).metric().version
    for change, about in ((dict(higher_better=False), "psnr_y is"), (dict(channel=rgb), "own channel"),
                          (dict(id="psnr_x"), "psnr_y")):
        with pytest.raises(ValueError, match=about): replace(m, **change)
    with pytest.raises(ValueError, match="no name that a record could give"):
        protocols.measure_of(replace(PSNR_Y, name="of a session"))


NEAREST = """import os, sys
from PIL import Image
lq, sr = sys.argv[1:3]
for n in os.listdir(lq):
    im = Image.open(os.path.join(lq, n))
    im.resize((4*im.width, 4*im.height), 0).save(os.path.join(sr, n))
"""


def psnr_of(out, variant): return read_run(out)[1].query("metric == 'psnr' and variant == @variant").value.tolist()


def test_other_inputs_make_other_outputs(box, capsys): # of a program, too
    (box/"up.py").write_text(NEAREST)
    line = f"x=cmd:{sys.executable} up.py {{lq}} {{sr}}"
    assert srnb(capsys, line, "--sets", "a")[0] == 0
    for i in range(4): # all but the last
        write_image(f"data/a/lq/p{i}.png", drawn(i+50)[0])
        write_image(f"data/a/gt/p{i}.png", drawn(i+50)[1])
    kept = next(box.glob("out/outputs/x-*/a/p4.png")).stat().st_mtime_ns
    assert srnb(capsys, line, "--sets", "a")[0] == 0 and srnb(capsys, line, "--sets", "a", out="new")[0] == 0
    assert psnr_of("out", "x") == psnr_of("new", "x")
    assert next(box.glob("out/outputs/x-*/a/p4.png")).stat().st_mtime_ns == kept


def test_crops_show_what_was_scored(toy, box): # after other inputs of the same names, and back
    def call(): bench(toy, {"x": Model(lambda lq, seed: bicubic_x4(lq), "x")}, "out", "data", ["a"], say=str, show=str)
    call()
    page = (box/"out/crops.html").read_text()
    shutil.copytree("data", "first")
    for i in range(5): write_image(f"data/a/lq/p{i}.png", drawn(i+50)[0])
    call()
    shutil.rmtree("data")
    shutil.copytree("first", "data")
    call()
    assert (box/"out/crops.html").read_text() == page


def test_a_program_writes_one_file_a_picture(box, capsys):
    (box/"up.py").write_text(NEAREST + "    os.makedirs(sr + '/grid', exist_ok=True)\n    im.resize((4*im.width, "
                             "4*im.height), 3).save(os.path.join(sr, 'grid', n))\n")
    code, out, said = srnb(capsys, f"x=cmd:{sys.executable} up.py {{lq}} {{sr}}", "--sets", "a")
    assert code == 1 and not out
    assert any("picture (5), such as grid/p0.png, p0.png; a command writes one of each" in o for o in said), said


METRIC = """from srnb.rewards import Metric
MINE = Metric("mine", "nr", True, lambda: lambda sr, gt: sr.mean((1, 2, 3)).double() + PLUS)
"""
PROTOCOL = """from dataclasses import replace
from srnb.protocols import OSEDIFF, Layout, Protocol, TestSet, mean_over_pictures
from srnb.rewards import luma_studio, rgb
def channel(x): return CHANNEL(x)
def cut(sr, gt): return sr[..., CUT:], gt[..., CUT:]
SETS = TestSet("a", 5, None, 4, (Layout("a/lq", "a/gt"),), True, "drawn", "CC0"),
OWN = replace(OSEDIFF, name="own", sets=SETS, crop=cut, measures=(replace(OSEDIFF.measures[0], channel=channel),),
              published=())
"""


def test_an_own_file_that_has_changed_is_another(box, capsys):
    for i, plus in enumerate(("0", "5")):
        (box/"mine.py").write_text(METRIC.replace("PLUS", plus))
        assert srnb(capsys, "x=good", "--also", "mine.py:MINE")[0] == 0
        mine = read_run("out")[1].query("metric == 'mine'")
        assert (mine.value > 5).all() == bool(i)
    for i, (channel, cut) in enumerate((("luma_studio", "0"), ("rgb", "0"), ("rgb", "40"))):
        (box/"proto.py").write_text(PROTOCOL.replace("CHANNEL", channel).replace("CUT", cut))
        for out in ("one", f"new{i}"):
            assert run(capsys, "proto.py:OWN", "x=good/a", "--data", "data", "-o", out)[0] == 0
        assert psnr_of("one", "x") == psnr_of(f"new{i}", "x")
    assert psnr_of("new0", "x") != psnr_of("new1", "x") != psnr_of("new2", "x")


def test_a_number_belongs_to_a_version_of_srnb(box, capsys, monkeypatch):
    assert srnb(capsys, "x=good")[0] == 0
    calls = scored(monkeypatch)
    assert srnb(capsys, "x=good")[0] == 0 and not calls
    monkeypatch.setattr(judge, "versions", lambda: dict(srnb="99.0"))
    assert srnb(capsys, "x=good")[0] == 0 and len(calls) == 20


@pytest.mark.parametrize("more", [("--sets", "a,a"), ("--measures", "psnr,psnr"), ("--also", "piqe,piqe")])
def test_a_name_stands_once(box, capsys, more):
    code, out, said = srnb(capsys, "x=good", *more)
    assert code in (1, 2) and not out and any("once" in o or "has one name" in o for o in said), said


def test_published_rows_need_the_sets_names_and_pixels(toy, monkeypatch):
    from srnb.protocols import Published, find_pictures
    a, pictures = toy.set("a"), [p for p in find_pictures(toy, "data")[0] if p.set == "a"]
    def said(): return judge.published_lines(toy, a, pictures, toy.measures)
    assert any("no digests of its files are known" in o for o in said())
    same = {p.id: dict(p.sha256) for p in pictures}
    pixels = {p.id: {k: p.pixels(k) for k in ("lq", "gt")} for p in pictures}
    monkeypatch.setattr(type(a), "pixels", lambda self: pixels)
    monkeypatch.setattr(type(a), "digests", lambda self: {f"other{k}": v for k, v in same.items()})
    lost = "(theirs) are not comparable: 5 of the known pictures are not here, such as otherp0"
    assert any(lost in o for o in said())
    monkeypatch.setattr(type(a), "digests", lambda self: {k: dict(v, gt="0"*64) for k, v in same.items()})
    assert "published, not computed here" in said()[0] # written again, with the same pixels
    row = Published("edge", "a", 5, (("psnr", 1.),), "nobody", "border of 4")
    object.__setattr__(toy, "published", (*toy.published, row))
    assert "  theirs: nobody" in said() and "  edge: nobody; border of 4" in said()
    object.__setattr__(toy, "published", toy.published[:-1])


def test_crops_show_every_source_and_say_where_there_are_none(box, capsys):
    text = OWN.replace('(Layout(f"{name}/lq", f"{name}/gt"),), True', '(Layout(f"{name}/lq"),), False')
    mine = "Measure('bright', 'metric', 'mine.py:MINE', 'nr', True, 0, None, 'float32')"
    text = text.replace("(psnr, *deep)", f"(psnr, {mine})").replace("OSEDIFF, Layout", "OSEDIFF, Layout, Measure")
    (box/"blind.py").write_text(text)
    (box/"mine.py").write_text(METRIC.replace("PLUS", "0"))
    assert srnb(capsys, "truth=good", "input=good", "x=good")[0] == 0
    page = (box/"out/crops.html").read_text()
    assert page.count("<img") == 2*3*(1+4+1)
    def call(out, *more): return run(capsys, "blind.py:ONE", "x=good/a", "--data", "data", "-o", out, *more)
    code, _, said = call("one")
    assert code == 0 and (box/"one/crops.html").read_text().count("<img") == 3*3
    assert any("a has no ground truth: psnr is left out" in o for o in said), said
    code, _, said = call("two", "--by", "psnr")
    assert code == 1 and any("psnr cannot choose crops" in o for o in said), said


def test_long_names_stay_apart(box, capsys):
    names = [f"an_experiment_of_many_words_lr1e-4_{o}" for o in "abb"] + ["an_experiment_of_many_words_lr1e-4_b2"]
    out = srnb(capsys, *(f"{o}=good" for o in dict.fromkeys(names)))[1]
    rows = [o.split()[0] for o in out.splitlines() if o.startswith("an_")]
    assert len({*rows}) == 3 and len(rows) == 6 and max(map(len, rows)) <= 28


def test_what_cannot_be_scored_is_named(box, capsys): # with its picture
    (box/"mine.py").write_text("from srnb.rewards import Metric\ndef fails(sr, gt): raise RuntimeError('sized 0')\n"
                               "MINE = Metric('mine', 'nr', True, lambda: fails)\n")
    code, out, said = srnb(capsys, "x=good", "--also", "mine.py:MINE")
    assert code == 1 and any("bicubic, a/p0: mine" in o and "sized 0" in o and "--measures" in o for o in said), said


def test_files_that_lose_are_told(box, capsys):
    for o in sorted(box.glob("good/a/*.png")): Image.open(o).save(o.with_suffix(".JPG"), quality=80, format="JPEG")
    for o in sorted(box.glob("good/a/*.png")): o.unlink()
    code, _, said = srnb(capsys, "x=good")
    assert code == 0 and any("x, a: JPEG (5 of 5)" in o and "PNG" in o for o in said), said
    assert not any("x, b: JPEG" in o for o in said)


def test_eight_bits_beside_floats_are_told(box, capsys):
    (box/"float.py").write_text(OWN.replace("True, None, (psnr, ssim)", "False, None, (psnr, ssim)"))
    said = run(capsys, "float.py:TOY", "x=good", "y=bicubic", "--data", "data", "-o", "out")[2]
    assert [o for o in said if "8 bits" in o] and "x: " in next(o for o in said if "8 bits" in o)
    assert not [o for o in srnb(capsys, "x=good", out="other")[2] if "8 bits" in o]


def test_a_further_column_has_a_name_of_its_own(box, capsys):
    (box/"mine.py").write_text(METRIC.replace("PLUS", "0").replace('"mine"', '"psnr"'))
    code, out, said = srnb(capsys, "x=good", "--also", "mine.py:MINE")
    assert code == 1 and any("toy has a measure 'psnr' already" in o for o in said), said


def test_a_program_is_told_by_every_file_that_its_line_names(box):
    from srnb.sources import command_identity
    for line in ("up w.bin {lq} {sr}", "up --weights=w.bin {lq} {sr}"):
        (box/"w.bin").write_bytes(b"1")
        first = command_identity(Command(line))
        (box/"w.bin").write_bytes(b"2")
        assert command_identity(Command(line)) != first
