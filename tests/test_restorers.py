"A base that stands on anybody's upscaler, and a restorer distilled from a large one"
import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from srnb import distil
from srnb.align import DP2O, Run, Top, align
from srnb.command import main
from srnb.config import fill
from srnb.core import generator, to_pil
from srnb.curation import fingerprint
from srnb.data import embedded_photos
from srnb.distil import DistilRun, real_esrgan_net, train_distil
from srnb.images import upscale
from srnb.nets import RRDBConfig, RRDBNet, SmallUNet, UNetConfig, pruned
from srnb.onestep import BaseRun, evaluate_base, train_base
from srnb.paths import Shift, sample_ddpm
from srnb.policies import (PixelCodec, Policy, base_print, from_pretrained, load_adapter, named_scale, restorer_of,
                           save_adapter, save_pretrained, stand_on)
from srnb.runs import Base, Data, Judging, check_unseen
from srnb.training import Loop

FEW = Loop(steps=2, lr=1e-3, warmup=1, save_every=2, log_every=1)
SHAPE = UNetConfig((16, 16), (1, 1), 16, 8, 1)
OWN = """
import torch
from srnb.core import bicubic
def larger(lq): return bicubic(lq, [4*n for n in lq.shape[-2:]])
def other(lq): return 1 - larger(lq)
def twice(lq): return bicubic(lq, [2*n for n in lq.shape[-2:]])
"""


def restoring(scale=4, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Policy(RRDBNet(RRDBConfig(8, 4, 2, 8, scale)).eval(), Shift(), Shift(), PixelCodec(factor=scale))


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    "One restorer of each kind"
    from spandrel.architectures.Compact import Compact
    top = tmp_path_factory.mktemp("restorers")
    (top/"mine.py").write_text(OWN)
    save_pretrained(restoring(), top/"policy")
    (top/"policy/photos.json").write_text(json.dumps(["a"*64]))
    for scale in (2, 4):
        with torch.random.fork_rng():
            torch.manual_seed(1)
            save_file(Compact(num_feat=4, num_conv=1, upscale=scale).state_dict(), top/f"x{scale}.safetensors")
    return top


def run_on(restorer, out, **more):
    return BaseRun(str(out), max_side=96, patch=32, batch=2, precision="no", net=SHAPE, versions=1, loop=FEW,
                   restorer=restorer, **more)


@pytest.mark.parametrize("kind", ["policy", "x4.safetensors", "mine.py:larger"])
def test_a_base_on_any_restorer_is_trained_read_back_and_aligned(kind, there, tmp_path):
    base = train_base(run_on(str(there/kind), tmp_path/"base"))/"policy"
    policy = from_pretrained(base)
    assert policy.restorer.name == str(there/kind) and policy.net.config.restored
    assert policy.net.config.features == (8 if kind == "policy" else 0)
    assert "restorer" in json.loads((tmp_path/"base/config.json").read_text())["params"]["stands_for"]
    table = evaluate_base(tmp_path/"base", Data(take=2, size=64), m=2, steps=2)
    assert {"sample", "mean", "bicubic"} == set(table.variant)
    out = align(Run(str(tmp_path/"run"), replace(DP2O, winners=Top(1)), Data(size=64, places=1, take=2),
                    Base(str(base), precision="no", sample_steps=2),
                    Judging("offline_nr", m=2, judges=("psnr_y",), eval_m=2), FEW, rank=2, batch=2, patch=32))
    adapted = load_adapter(from_pretrained(base), out/"adapter")
    lq = torch.rand(1, 3, 17, 23, generator=generator(0))
    assert upscale(lq, adapted, steps=2, say=lambda o: None).shape == (1, 3, 68, 92)


def test_who_stands_on_a_policy_has_seen_its_photographs(there, tmp_path):
    base = train_base(run_on(str(there/"policy"), tmp_path/"base"))/"policy"
    assert "a"*64 in json.loads((base/"photos.json").read_text())


def test_a_restorer_is_asked_once_for_an_image(there):
    asked = []
    def counted(lq):
        asked.append(len(lq))
        return restorer_of(str(there/"mine.py:larger"))(lq)[0]
    policy = stand_on(Policy(SmallUNet(UNetConfig((16, 16), (1, 1), 16, 8, 1, restored=True))), counted)
    asked.clear()
    policy.sample(torch.rand(2, 3, 8, 8, generator=generator(0)), [0, 1, 2], 4)
    assert asked == [1, 1]


def test_the_restorer_decides_the_picture(there):
    "Another restorer, another picture, another fingerprint"
    g = generator(3)
    net = SmallUNet(UNetConfig((16, 16), (1, 1), 16, 8, 1, restored=True))
    with torch.no_grad():
        for p in net.parameters(): p.copy_(.1*torch.randn(p.shape, generator=g))
    lq = torch.rand(1, 3, 8, 8, generator=g)
    found = []
    for name in ("larger", "other"):
        policy = stand_on(Policy(net), str(there/f"mine.py:{name}"))
        found.append((policy.sample(lq, [0], 2), base_print(policy), fingerprint(policy)))
    assert all(not torch.equal(a, b) if isinstance(a, torch.Tensor) else a != b for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("restorer, error", [
    ("onestp", "BaseRun.restorer: no policy 'onestp': .*did you mean 'onestep'"),
    ("no.safetensors", "no weights at"), ("no.py:f", "no file at"), ("x2.safetensors", "scale 2|enlarges 2 times"),
    ("mine.py:twice", "enlarges 2 times"), ("mine.py:nothing", "has no 'nothing'")])
def test_what_cannot_be_stood_on_is_refused_when_the_run_is_made(restorer, error, there, tmp_path, monkeypatch):
    monkeypatch.chdir(there)
    with pytest.raises((FileNotFoundError, ValueError), match=error): run_on(restorer, tmp_path)


def test_a_missing_package_is_named(there, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    with pytest.raises(ImportError, match="spandrel.*pip install"): run_on(str(there/"x4.safetensors"), tmp_path)


def test_an_init_brings_its_own_restorer(there, tmp_path):
    with pytest.raises(ValueError, match="leave restorer or init out"):
        BaseRun(str(tmp_path), init="small", restorer=str(there/"policy"))


def test_an_adapter_of_another_restorer_is_refused(there, tmp_path):
    net = SmallUNet(UNetConfig((16, 16), (1, 1), 16, 8, 1, restored=True))
    policy = stand_on(Policy(net), restoring(seed=1))
    policy.add_lora(2)
    save_adapter(policy, tmp_path/"adapter")
    fresh = SmallUNet(net.base_model.model.config if hasattr(net, "base_model") else net.config)
    with pytest.raises(ValueError, match="does not fit this network"):
        load_adapter(stand_on(Policy(fresh), restoring(seed=2)), tmp_path/"adapter")


# ---------------------------------------------------------------- distillation

def test_pruned_real_esrgan_is_the_student_s_start(tmp_path):
    large = real_esrgan_net()
    assert len(large.blocks) == 23
    less = pruned(large, (0, 22))
    assert all(torch.equal(less.state_dict()[f"blocks.1.{n}"], v) for n, v in large.blocks[22].state_dict().items())


def test_a_distillation_goes_on_where_it_was_stopped(there, tmp_path, monkeypatch):
    "Killed in its second crops and run again: the same crops, log and weights"
    run = fill(DistilRun("x", teacher=str(there/"mine.py:larger"), init=str(there/"policy"), patch=40, margin=4,
                         window=32, batch=2, max_side=96, precision="no", loop=replace(FEW, steps=4, save_every=1)),
               {"crops.side": 48, "crops.first": 3, "crops.fresh": 2, "crops.every": 2})
    whole = train_distil(fill(run, dict(out=str(tmp_path/"whole"))))
    made, calls = distil.TaughtPool.made, []
    def dies(self, k):
        calls.append(k)
        if k == 1: raise KeyboardInterrupt
        return made(self, k)
    monkeypatch.setattr(distil.TaughtPool, "made", dies)
    cut = fill(run, dict(out=str(tmp_path/"cut")))
    with pytest.raises(KeyboardInterrupt): train_distil(cut)
    monkeypatch.setattr(distil.TaughtPool, "made", made)
    train_distil(cut)
    for o in ("crops/00000.safetensors", "crops/00001.safetensors", "policy/model.safetensors"):
        assert (whole/o).read_bytes() == (tmp_path/"cut"/o).read_bytes(), o
    check_unseen(whole/"policy", embedded_photos("held_out"))


def larger(lq): return torch.nn.functional.interpolate(lq, scale_factor=4)


class Moving(torch.nn.Module): # answers otherwise while it is trained
    def __init__(self, seed=0):
        super().__init__()
        self.norm, self.last = torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 3, 1)
        with torch.no_grad(): self.last.weight.copy_(torch.rand(self.last.weight.shape, generator=generator(seed))/9)

    def forward(self, lq): return larger(self.last(self.norm(lq))).clamp(0, 1)


def test_a_foreign_restorer_sees_one_picture_of_its_own():
    "It may index the first picture, and work in place"
    def first(lq): return larger(lq[:1].mul_(.5))
    lq = torch.rand(3, 3, 8, 8, generator=generator(0))
    before, sr = lq.clone(), restorer_of(first)(lq)[0]
    assert torch.equal(lq, before) and torch.equal(sr, larger(lq*.5))


def test_a_network_as_restorer_is_frozen_and_the_caller_s_stays():
    net = Moving().train()
    restorer, lq = restorer_of(net), torch.rand(1, 3, 8, 8, generator=generator(0))
    sr = restorer(lq)[0]
    with torch.no_grad(): net.last.weight.add_(1)
    assert torch.equal(restorer(lq)[0], sr) and net.training and net.last.weight.requires_grad
    assert not net.norm.running_mean.any() and restorer.said != restorer_of(Moving(1)).said


def test_a_policy_as_restorer_is_frozen_and_the_caller_s_stays():
    policy = restoring()
    restorer, lq = restorer_of(policy), torch.rand(1, 3, 8, 8, generator=generator(0))
    sr = restorer(lq)[0]
    with torch.no_grad(): policy.net.last.bias.add_(1)
    assert torch.equal(restorer(lq)[0], sr) and policy.net.last.bias.requires_grad


def test_a_restorer_with_a_large_stride_is_asked_for_what_it_takes():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        deep = Policy(SmallUNet(UNetConfig((8,)*5, (1,)*5, 8, 8, 1)))
    assert deep.stride == 64 and restorer_of(deep).scale == 4
    deep.sampler = sample_ddpm # noise on the way is none: the answer is a function of the input
    assert restorer_of(deep).scale == 4


def restless(lq, calls=[0]): # noqa: B006
    calls[0] += 1
    return larger(lq).mul(.1*(calls[0] % 3)+.5)


def late(lq): return larger(lq) if lq.shape[-1] == 24 else larger(lq)*float("nan")
def wide(lq): return larger(lq) if lq.shape[-1] == 24 else larger(lq)*1.05 # not by much
def broken(lq): raise KeyError("weights")
def three(lq): return larger(lq), lq, lq
def words(lq): return larger(lq), "features"
def flat(lq): return larger(lq), lq[0]


@pytest.mark.parametrize("of, named", [
    (restless, "differently each time"), (broken, "broken fails on a picture of 16x24: KeyError: 'weights'"),
    (three, "three answers .* with tuple"), (words, r"features of .*words.* got str"),
    (flat, r"features of .*flat.* got \(3, 16, 24\)"), (Moving, "got the class Moving: give one of its kind")])
def test_a_restorer_that_goes_wrong_is_named_at_once(of, named):
    with pytest.raises((TypeError, ValueError), match=named): restorer_of(of)


@pytest.mark.parametrize("of", [late, wide])
def test_a_restorer_that_goes_wrong_later_is_named(of):
    restorer = restorer_of(of)
    with pytest.raises(ValueError, match=rf"function {of.__name__} must answer in \[0, 1\]"):
        restorer(torch.rand(1, 3, 8, 8, generator=generator(0)))


def test_a_base_stands_once(there):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Policy(SmallUNet(replace(SHAPE, restored=True)))
    stand_on(base, str(there/"mine.py:larger"))
    with pytest.raises(ValueError, match="stands upon function larger.* already: read it anew"):
        stand_on(base, str(there/"mine.py:other"))


def test_a_restorer_is_found_beside_its_base(there, tmp_path, monkeypatch):
    "From any working folder, as long as the two lie as they lay; where they do not, both remedies are named"
    (tmp_path/"a/out").mkdir(parents=True)
    (tmp_path/"a/mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path/"a")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = Policy(SmallUNet(replace(SHAPE, restored=True)))
    save_pretrained(stand_on(base, "mine.py:larger"), "out/base")
    monkeypatch.chdir(tmp_path)
    assert from_pretrained("a/out/base").restorer.said == base.restorer.said
    (tmp_path/"a/mine.py").rename(tmp_path/"a/other.py")
    with pytest.raises(ValueError, match=r"no file at mine.py.*from_pretrained\(..., restorer=...\), or srnb upscale"):
        from_pretrained("a/out/base")
    again = from_pretrained("a/out/base", restorer=str(tmp_path/"a/other.py:larger"))
    assert again.restorer.said == base.restorer.said


def test_checkpoints_given_as_functions_are_told_apart(there):
    from srnb.baselines import spandrel_model
    a, b = (restorer_of(spandrel_model(there/f"x{n}.safetensors")).said for n in (2, 4))
    assert a != b and "checkpoint" in a and b == restorer_of(str(there/"x4.safetensors")).said


def test_the_command_takes_a_restorer_that_has_moved(there, tmp_path, capsys):
    base, g = Policy(SmallUNet(replace(SHAPE, restored=True))), generator(0)
    with torch.no_grad():
        for p in base.net.parameters(): p.copy_(.1*torch.randn(p.shape, generator=g))
    (tmp_path/"gone.py").write_text(OWN)
    save_pretrained(stand_on(base, str(tmp_path/"gone.py:larger")), tmp_path/"base")
    (tmp_path/"gone.py").rename(tmp_path/"here.py")
    to_pil(torch.rand(3, 16, 16, generator=generator(0))).save(tmp_path/"a.png")
    line = ["upscale", str(tmp_path/"a.png"), "-o", str(tmp_path/"b.png"), "--model", str(tmp_path/"base"),
            "--steps", "1"]
    assert main(line) == 2 and "srnb upscale --restorer" in capsys.readouterr().err
    assert main([*line, "--restorer", str(tmp_path/"here.py:larger")]) == 0 and (tmp_path/"b.png").exists()
    assert main([*line, "--force", "--restorer", str(tmp_path/"here.py:other")]) == 2 # another one than it knows
    assert "was trained upon the restorer" in capsys.readouterr().err


def test_a_named_restorer_says_what_it_gives(there, tmp_path):
    with pytest.raises(ValueError, match="net.restored and features are set by naming a restorer"):
        BaseRun(str(tmp_path/"run"), restorer=str(there/"policy"), net=replace(SHAPE, restored=True, features=3))


def test_a_policy_whose_file_says_no_scale_enlarges_4_times(there, tmp_path):
    policy = save_pretrained(restoring(), tmp_path/"old")
    said = json.loads((policy/"config.json").read_text())
    said.pop("scale")
    (policy/"config.json").write_text(json.dumps(said))
    assert named_scale(policy) == from_pretrained(policy).codec.factor == 4
