"Distillation: what does not fit is refused before a folder is claimed, and crops are kept no longer than needed"
import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from srnb import distil
from srnb.config import fill
from srnb.core import generator, quantize, write_image
from srnb.data import PatchPool, find_photos
from srnb.degrade import RESSHIFT_TRAIN
from srnb.distil import Crops, DistilRun, Pull, TaughtPool, damaged_as, train_distil
from srnb.nets import OneStepConfig, OneStepUNet, RRDBConfig, RRDBNet
from srnb.paths import Shift
from srnb.policies import PixelCodec, Policy, save_pretrained
from srnb.training import Loop

OWN = """
import torch
from srnb.core import bicubic
def by(scale): return lambda lq: bicubic(lq, [scale*n for n in lq.shape[-2:]]).clamp(0, 1)
same, triple, larger = by(1), by(3), by(4)
def broken(lq): raise RuntimeError("no\\nluck")
def unknown(lq): return larger(lq)*(float("nan") if len(lq[0, 0, 0]) != 24 else 1)
"""
SMALL = {"crops.side": 48, "crops.first": 2, "crops.fresh": 2, "crops.every": 1, "crops.most": 4}
TRUTH = dict(to_teacher=Pull(0., 0.), to_truth=Pull(1., 0.))


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    "Students of four scales, functions, photographs of 96x112 pixels, ready pairs"
    top = tmp_path_factory.mktemp("distil")
    (top/"mine.py").write_text(OWN)
    for scale in (1, 2, 3, 4):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = RRDBNet(RRDBConfig(8, 4, 1, 8, scale))
        save_pretrained(Policy(net, Shift(), Shift(), PixelCodec(factor=scale)), top/f"x{scale}")
    for k in range(2):
        gt = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 14, generator=generator(k)), (96, 112))[0]
        for folder in ("photos", "pairs/gt"): write_image(top/folder/f"{k}.png", quantize(gt))
        write_image(top/f"pairs/lq/{k}.png", quantize(gt[:, ::4, ::4]))
    return top


def run_in(top, out, scale=4, **changes):
    plain = dict(photos=(str(top/"photos"),), teacher=f"{top}/mine.py:larger", init=str(top/f"x{scale}"), patch=32,
                 window=32, margin=0, batch=2, precision="no", to_teacher=Pull(1., 0.),
                 loop=Loop(steps=2, lr=1e-3, warmup=0, save_every=1, log_every=1))
    return fill(DistilRun(str(out), **plain | {k: v for k, v in changes.items() if "." not in k}),
                SMALL | {k: v for k, v in changes.items() if "." in k})


def pool_in(top, folder, teacher=None, scale=4, **more):
    crops = Crops(**dict(side=48, first=2, fresh=2, every=1, most=4, flat=0.) | more.pop("crops", {}))
    photos = PatchPool(find_photos(top/"photos"), damaged_as(crops, RESSHIFT_TRAIN), 0, None, scale, [])
    return TaughtPool(photos, teacher or (lambda lq: lq.repeat_interleave(scale, 2).repeat_interleave(scale, 3)), crops,
                      folder, 0, **more)


@pytest.mark.parametrize("scale, changes, error", [
    (2, {}, "DistilRun.teacher: .*:larger enlarges 4 times, and the student 2 times"),
    (2, dict(teacher="real_esrgan"), "DistilRun.teacher: real_esrgan enlarges 4 times, and the student 2 times"),
    (4, dict(teacher="TOP/mine.py:broken"), "DistilRun.teacher: .*mine.py:broken fails on .*: RuntimeError: no luck"),
    (4, dict(teacher="TOP/mine.py:nothing"), "^DistilRun.teacher: .* has no 'nothing'$"),
    (1, dict(teacher="TOP/mine.py:same", to_teacher=Pull(0., 0., 1.)), "DistilRun.to_teacher.lattice .* scale 1"),
    (1, TRUTH | dict(teacher="real_esrgan", to_truth=Pull(1., 0., 1.)), "DistilRun.to_truth.lattice .* scale 1"),
    (4, {"crops.side": 128}, "DistilRun.crops.side = 128: photograph '0' has 96×112"),
    (4, dict(patch=8, margin=3), "patch - 2.margin .* 4, got 2")])
def test_what_does_not_fit_is_refused_before_the_folder_is_claimed(scale, changes, error, there, tmp_path):
    changes = {k: v.replace("TOP", str(there)) if isinstance(v, str) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=error) as found: train_distil(run_in(there, tmp_path/"run", scale, **changes))
    assert not (tmp_path/"run").exists() and "\n" not in str(found.value)


@pytest.mark.parametrize("changes, error", [
    (TRUTH, "DistilRun.teacher .*no effect"), ({"crops.first": 5}, "Crops.most must be at least first = 5, got 4"),
    (dict(patch=24, to_teacher=Pull()), "window must lie in"), (dict(margin=16), "margin must be below half of patch")])
def test_what_cannot_be_meant_is_refused_when_the_run_is_made(changes, error, there, tmp_path):
    with pytest.raises(ValueError, match=error): run_in(there, tmp_path, **changes)


def test_a_side_is_rounded_down_to_the_scale(there, tmp_path):
    for scale in (3, 5, 6, 7):
        pool = pool_in(there, tmp_path/str(scale), scale=scale, crops=dict(side=50))
        assert pool.made(0)["gt"].shape[-1] == 50//scale*scale
        assert pool.patches(0, 2, 4*scale, generator(0))[1].shape == (2, 3, 4*scale, 4*scale)
    run = run_in(there, tmp_path/"run", 3, patch=30, teacher=f"{there}/mine.py:triple", **{"crops.side": 50})
    assert (train_distil(run)/"policy/policy.json").is_file()


def test_a_patch_that_the_rounded_side_does_not_hold_is_refused(there, tmp_path):
    "A teacher of stride 32 leaves 32 of the 48 pixels of a crop"
    net = OneStepUNet(OneStepConfig((8,)*4, (1,)*4, 8, 4))
    save_pretrained(Policy(net, Shift(), Shift(), PixelCodec()), tmp_path/"coarse")
    with pytest.raises(ValueError, match="crops.side = 48 leaves 32 pixels, a multiple of 32 .*at least patch = 36"):
        train_distil(run_in(there, tmp_path/"run", teacher=str(tmp_path/"coarse"), patch=36))
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("answer, error", [
    (lambda sr: sr[..., ::2, ::2], r"NAME answers a crop of shape \(1, 3, 12, 12\) with \(1, 3, 24, 24\).*48, 48"),
    (lambda sr: sr*float("nan"), "NAME gave values that are not finite"),
    (lambda sr: sr + 2, r"NAME gave values from 2(\.\d+)? to \d\.?\d*.*\[0, 1\]"), (lambda sr: -.5 - sr, "NAME gave")])
def test_a_teacher_must_give_pictures(answer, error, there, tmp_path):
    pool = pool_in(there, tmp_path, called="NAME")
    plain = pool.teacher
    pool.teacher = lambda lq: answer(plain(lq))
    with pytest.raises(ValueError, match=error): pool.made(0)
    assert not list(tmp_path.glob("*.safetensors"))
    pool.teacher = lambda lq: plain(lq)*1.018 - .009 # what rounding may do
    assert pool.made(0)["taught"].shape == (2, 3, 48, 48)


def test_a_run_names_the_teacher_that_failed(there, tmp_path):
    with pytest.raises(ValueError, match="DistilRun.teacher: .*mine.py:unknown must answer in .*from nan"):
        train_distil(run_in(there, tmp_path/"run", teacher=f"{there}/mine.py:unknown"))


def test_a_student_has_seen_what_its_teacher_has_seen(there, tmp_path):
    save_pretrained(Policy(RRDBNet(RRDBConfig(8, 4, 1, 8)), Shift(), Shift(), PixelCodec()), tmp_path/"teacher")
    (tmp_path/"teacher/photos.json").write_text(json.dumps(["a"*64]))
    out = train_distil(run_in(there, tmp_path/"run", teacher=str(tmp_path/"teacher")))
    assert "a"*64 in json.loads((out/"policy/photos.json").read_text())


@pytest.mark.parametrize("first, fresh, most", [(300, 60, 4000), (300, 60, 300), (6, 2, 7), (5, 9, 5), (1, 1, 1)])
def test_the_crops_in_use_are_the_newest_that_hold_as_many_as_shall_be_kept(first, fresh, most):
    crops = Crops(first=first, fresh=fresh, every=10, most=most)
    def held(numbers): return sum(fresh if k else first for k in numbers)
    for step in range(0, 1500, 10):
        made, used = list(range(step//10+1)), crops.numbers(step)
        assert used == made[-len(used):] and held(used) >= min(most, held(made)) >= first
        assert used == made or held(used[1:]) < most # no older file than needed


def test_ready_pairs_say_what_is_not_used_for_them(there, tmp_path, capsys):
    train_distil(run_in(there, tmp_path/"plain"))
    assert "ready pairs" not in capsys.readouterr().out
    train_distil(run_in(there, tmp_path/"pairs", photos=(str(there/"pairs"),)))
    said = [o for o in capsys.readouterr().out.splitlines() if "ready pairs" in o]
    assert len(said) == 1 and said[0].startswith("2 of 2 photographs")
    assert all(o in said[0] for o in ("degradation", "crops.clean", "crops.mild"))


def test_a_teacher_whom_no_weight_asks_is_not_asked(there, tmp_path, monkeypatch):
    def never(): raise AssertionError("it was asked")
    monkeypatch.setattr(distil, "real_esrgan_net", never)
    out = train_distil(run_in(there, tmp_path/"run", **TRUTH, teacher="real_esrgan"))
    log = pd.read_parquet(out/"log.parquet")
    assert "l1_teacher" not in log and (log.loss - log.l1_truth).abs().max() < 1e-6
    assert "teacher" not in json.loads((out/"config.json").read_text())["params"]["stands_for"]


def test_a_window_is_checked_where_a_weight_asks_for_it(there, tmp_path):
    assert train_distil(run_in(there, tmp_path/"run", patch=16, margin=4, window=96)) == tmp_path/"run"


def test_a_damaged_file_of_crops_is_made_again(there, tmp_path, capsys):
    pool = pool_in(there, tmp_path)
    whole, path = pool.made(1), tmp_path/"00001.safetensors"
    good = path.read_bytes()
    def other(): save_file(dict(lq=torch.zeros(1)), path)
    def smaller(): save_file({n: o[:1].contiguous() for n, o in whole.items()}, path)
    for damage in (lambda: path.write_bytes(good[:-9]), lambda: path.write_bytes(b""), other, smaller):
        damage()
        capsys.readouterr()
        again = pool.made(1)
        assert all(torch.equal(again[n], o) for n, o in whole.items()) and path.read_bytes() == good
        assert f"{path} is damaged" in capsys.readouterr().out


def test_forgotten_files_go_and_who_comes_late_makes_them_again(there, tmp_path):
    "Another process, or a run that goes back to its checkpoint, gets the same patches"
    def files(folder): return sorted(int(o.stem) for o in folder.glob("*.safetensors"))
    one, two = (pool_in(there, tmp_path/"shared", back=2) for _ in range(2))
    alone = pool_in(there, tmp_path/"alone", back=100)
    def same(pool, step):
        drawn = [o.patches(step, 3, 16, generator(step)) for o in (pool, alone)]
        return all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))
    for step in range(8):
        assert same(one, step) and same(two, max(0, step-1))
        assert files(tmp_path/"shared") == list(range(one.crops.numbers(max(0, step-2))[0], step+1))
    assert files(tmp_path/"alone") == list(range(8))
    assert same(pool_in(there, tmp_path/"shared", back=2), 3) # resumed at a step whose crops are gone
    assert same(one, 8) and same(two, 8)


def test_a_resumed_run_survives_that_crops_were_forgotten(there, tmp_path, monkeypatch):
    steps = dict(loop=Loop(steps=7, lr=1e-3, warmup=0, save_every=3, log_every=1))
    whole, made = train_distil(run_in(there, tmp_path/"whole", **steps)), TaughtPool.made
    assert sorted(o.name for o in (whole/"crops").glob("*.s*")) == [f"{k:05d}.safetensors" for k in range(2, 7)]
    def dies(self, k):
        if k == 5: raise KeyboardInterrupt
        return made(self, k)
    monkeypatch.setattr(TaughtPool, "made", dies)
    cut = run_in(there, tmp_path/"cut", **steps)
    with pytest.raises(KeyboardInterrupt): train_distil(cut)
    monkeypatch.setattr(TaughtPool, "made", made)
    for o in Path(cut.out, "crops").glob("*.s*"): o.unlink() # as if nobody had kept any
    train_distil(cut)
    weights = [(o/"policy/model.safetensors").read_bytes() for o in (whole, tmp_path/"cut")]
    assert weights[0] == weights[1]
