"""A policy that does not read its input is refused before anything is claimed; a fresh control branch is always the
same, learns to read by `srnb train base`, and is what diffusers reads"""
import functools
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_guards_low import backbone, diffusers_latents, own_latents

from srnb.align import DP2O, SFT, Run, align
from srnb.backbones import Backbone, BackboneError, BackboneOptions, load_backbone, write_tiny, write_tiny_control
from srnb.command import main
from srnb.core import check_close, generator
from srnb.curation import fingerprint
from srnb.data import PatchPool, embedded_photos
from srnb.onestep import BaseRun, train_base
from srnb.policies import EMPTY, check_reads, from_pretrained, influence, save_pretrained, text_ids
from srnb.runs import Base, Data
from srnb.training import Loop, latest_checkpoint

KINDS = ("sd", "sdxl", "flux")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "Folders of random pipelines"
    top = tmp_path_factory.mktemp("bare")
    return {kind: write_tiny(kind, top/kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_branch_is_the_same_at_every_load(bare, kind):
    torch.manual_seed(1)
    first = fingerprint(load_backbone(bare[kind]))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert fingerprint(load_backbone(bare[kind])) == first
    assert torch.equal(torch.get_rng_state(), before) # and nobody else's draws are moved


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_without_a_trained_branch_reads_nothing(bare, tmp_path, kind):
    policy = load_backbone(bare[kind])
    assert influence(policy) == 0
    with pytest.raises(ValueError, match=f"{kind}.*options.control.*srnb train base"): check_reads(policy)
    policy.net.controlnet.save_pretrained(tmp_path/"untrained")
    deaf = load_backbone(bare[kind], BackboneOptions(control=str(tmp_path/"untrained")))
    with pytest.raises(ValueError, match="untrained was read, but .* train it longer"): check_reads(deaf)
    write_tiny_control(policy, tmp_path/"control")
    read = load_backbone(bare[kind], BackboneOptions(control=str(tmp_path/"control")))
    assert influence(read) > 5e-6 # tiny random U-Nets hardly look at their skips
    check_reads(read)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind,train", [("sd", "base"), ("flux", "whole"), ("sdxl", "control")])
def test_a_run_on_it_is_refused(bare, tmp_path, idle, kind, train, precision):
    base = Base(str(bare[kind]), precision=precision, sample_steps=1, options=BackboneOptions(train=train))
    run = Run(str(tmp_path/"out"), DP2O, Data(size=64, take=2), base)
    for method in (DP2O, SFT):
        with pytest.raises(ValueError, match="options.control.*srnb train base"): align(replace(run, method=method))
    assert not (tmp_path/"out").exists()


def test_the_command_refuses_it(bare, tmp_path, capsys):
    from PIL import Image
    Image.new("RGB", (20, 16), (90, 120, 60)).save(tmp_path/"a.png")
    line = ["upscale", str(tmp_path/"a.png"), "-o", str(tmp_path/"b.png"), "--steps", "1", "--model"]
    assert main([*line, str(bare["sd"])]) == 2
    said = capsys.readouterr().err
    assert "options.control" in said and "srnb train base" in said and not (tmp_path/"b.png").exists()


def test_a_policy_of_ones_own_that_forgets_its_input(tmp_path, idle):
    (tmp_path/"mine.py").write_text("""
import torch
from srnb.policies import Policy
class Deaf(torch.nn.Module):
    stride = 8
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(3, 3, 3, padding=1)
    def forward(self, x, sigma, lq): return self.inner(x)
def base(): return Policy(Deaf())
""")
    run = Run(str(tmp_path/"out"), SFT, Data(size=64, take=2), Base(f"{tmp_path}/mine.py:base"))
    with pytest.raises(ValueError, match="mine.py:base.*two low-quality images"): align(run)
    assert not (tmp_path/"out").exists()


def test_what_ships_reads(tiny):
    for name in ("small", "onestep", tiny): assert influence(from_pretrained(name)) > .01


def test_a_saved_policy_without_influence(tmp_path):
    "The regression of a base, its evaluation and CTMSR refuse it, too"
    from srnb.nets import SmallUNet, UNetConfig
    from srnb.onestep import evaluate_base
    from srnb.policies import Policy
    net = SmallUNet(UNetConfig((16, 16), (1, 1), 16))
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
    save_pretrained(Policy(net), tmp_path/"deaf"/"policy")
    with pytest.raises(ValueError, match="two low-quality images"):
        evaluate_base(tmp_path/"deaf", Data(size=64, take=2))
    with pytest.raises(ValueError, match="two low-quality images"):
        train_base(BaseRun(str(tmp_path/"out"), init=str(tmp_path/"deaf"), versions=1, max_side=160))
    assert not (tmp_path/"out").exists() and not (tmp_path/"deaf"/"held_out").exists()


# ---------------------------------------------------------------- the stage that trains a control branch

FEW = Loop(steps=8, lr=1e-2, warmup=1, ema=.5, save_every=3, log_every=2, log_with="none")
SHOWN = replace(FEW, log_with="tensorboard")


def branch(out, base, **more):
    "A few steps of `srnb train base` on a random pipeline"
    return BaseRun(str(out), init=str(base), versions=1, max_side=160, batch=2, precision="no",
                   **dict(dict(loop=FEW), **more))


@pytest.fixture(scope="module")
def trained(bare, tmp_path_factory):
    "kind -> folder of a finished run"
    top = tmp_path_factory.mktemp("trained")
    return functools.cache(lambda kind: train_base(branch(top/kind, bare[kind], loop=SHOWN)))


@pytest.mark.parametrize("kind", ["sd", pytest.param("sdxl", marks=pytest.mark.repeat), "flux"])
def test_a_branch_learns_to_read(bare, trained, tmp_path, kind):
    "The influence is 0, then grows; diffusers' ControlNet pipeline reads what is written, and gives the same picture"
    out = trained(kind)
    assert train_base(branch(out, bare[kind], loop=SHOWN)) == out # it is done
    seen = pd.read_parquet(out/"log.parquet").influence
    assert len(seen) == 4 and seen[0] == 0 < seen[1] < seen[3]
    events = EventAccumulator(str(out/"logs")).Reload()
    for p in embedded_photos("held_out")[:2]: # input, sample and photograph side by side
        pictures = events.Images(f"held out/{p.id}")
        assert [o.step for o in pictures] == [3, 6, 8] and (pictures[0].height, pictures[0].width) == (64, 3*64)
    policy = load_backbone(bare[kind], BackboneOptions(control=str(out/"control")))
    check_reads(policy)
    for name, folder in {kind: bare[kind], f"{kind}-control": out/"control"}.items(): (tmp_path/name).symlink_to(folder)
    theirs, own = diffusers_latents(tmp_path, kind, 1.), own_latents(backbone(tmp_path, kind))
    check_close(own, theirs, atol=1e-4*theirs.abs().max().item())
    fresh = own_latents(load_backbone(bare[kind], prompts=["a tree"]))
    assert (fresh-theirs).abs().max() > 1e-3*theirs.abs().max()


SLOW = [pytest.param(k, o, marks=[pytest.mark.slow]+[pytest.mark.repeat]*(k == "sdxl")) # SDXL's branch is SD's class
        for k in KINDS for o in ("control", "whole")]

@pytest.mark.parametrize("kind,train", [("flux", "control"), *SLOW[:-2], SLOW[-1]])
def test_killed_and_resumed(bare, tmp_path, monkeypatch, kind, train):
    "Prompts, half of them left out: the branch of a run that was killed after four steps is that of one that was not"
    ids = [p.id for p in embedded_photos("train")]
    (tmp_path/"prompts.json").write_text(json.dumps(dict.fromkeys(ids, "a tree") | {ids[0]: "a house"}))
    more = dict(prompts=str(tmp_path/"prompts.json"), prompt_dropout=.5, versions=0, loop=replace(FEW, steps=5),
                options=BackboneOptions(train=train, levels="shifted" if kind == "flux" else "uniform"))
    whole = train_base(replace(branch(tmp_path/"whole", bare[kind]), **more))
    real = PatchPool.patches

    def killed(self, n, patch, draws, calls=[]): # noqa: B006
        calls.append(1)
        if len(calls) == 5: raise KeyboardInterrupt
        return real(self, n, patch, draws)
    monkeypatch.setattr(PatchPool, "patches", killed)
    cut = replace(branch(tmp_path/"cut", bare[kind]), **more)
    with pytest.raises(KeyboardInterrupt): train_base(cut)
    monkeypatch.setattr(PatchPool, "patches", real)
    assert latest_checkpoint(tmp_path/"cut").name == "checkpoint-00000003"
    train_base(cut)
    assert pd.read_parquet(whole/"log.parquet").equals(pd.read_parquet(tmp_path/"cut"/"log.parquet"))
    a, b = (load_file(o/"control"/"diffusion_pytorch_model.safetensors") for o in (whole, tmp_path/"cut"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_prompts_and_dropout(bare, tmp_path, monkeypatch):
    "A patch is told the prompt of its photograph, or, as often as prompt_dropout says, none"
    ids, asked = [p.id for p in embedded_photos("train")], []
    (tmp_path/"prompts.json").write_text(json.dumps({i: f"photograph {i}" for i in ids}))
    encode, patches = Backbone.encode, PatchPool.patches
    def told(self, lq, text=None):
        if text is not None: asked.append(text)
        return encode(self, lq, text)
    drawn = []
    def seen(self, n, patch, draws):
        drawn.append((o := patches(self, n, patch, draws))[2])
        return o
    monkeypatch.setattr(Backbone, "encode", told)
    monkeypatch.setattr(PatchPool, "patches", seen)
    for dropout in (0., .5, 1.):
        asked.clear()
        drawn.clear()
        more = dict(prompts=str(tmp_path/"prompts.json"), prompt_dropout=dropout, loop=replace(FEW, steps=20))
        train_base(branch(tmp_path/f"{dropout}", bare["sd"], **more))
        right = text_ids([f"photograph {i}" for o in drawn for i in o])
        found = torch.cat(asked)
        empty = found == EMPTY
        assert len(found) == 40 and (found == right)[~empty].all()
        assert empty.sum() in {0.: [0], .5: range(10, 31), 1.: [40]}[dropout]
    lost = tmp_path/"lost.json"
    lost.write_text("{}")
    with pytest.raises(ValueError, match="prompts: .*lost.json has none for"):
        train_base(branch(tmp_path/"lost", bare["sd"], prompts=str(lost)))
    assert not (tmp_path/"lost").exists()


def test_a_run_is_not_judged_by_what_its_branch_has_seen(bare, trained, tmp_path, idle):
    from srnb.data import find_photos
    seen = json.loads((trained("sd")/"control"/"photos.json").read_text())
    assert seen == sorted(p.sha256 for p in embedded_photos("train"))
    for name, which in (("train", embedded_photos("held_out")[:2]), ("test", embedded_photos("train")[:2])):
        (tmp_path/name).mkdir()
        for p in which: (tmp_path/name/p.path.name).write_bytes(p.path.read_bytes())
    base = Base(str(bare["sd"]), options=BackboneOptions(control=str(trained("sd")/"control")))
    data = Data((str(tmp_path/"train"),), (str(tmp_path/"test"),), size=64)
    with pytest.raises(ValueError, match=f"{find_photos(tmp_path/'test')[0].path}.*was in the training of"):
        align(Run(str(tmp_path/"out"), SFT, data, base))
    assert not (tmp_path/"out").exists()


def test_what_a_branch_refuses(bare, tmp_path):
    for change, message in (
            (dict(options=BackboneOptions()), "BaseRun.options.train must be whole .* or control"),
            (dict(prompt_dropout=1.5), r"prompt_dropout must lie in \[0, 1\], got 1.5"),
            (dict(init=None), "BaseRun.options is for a backbone .* leave it out for a new network"),
            (dict(init="small"), "BaseRun.options .* leave it out for small"),
            (dict(prompts=str(tmp_path/"none.json")), "prompts: no file at")):
        if "init" in change: change = change | dict(options=BackboneOptions(train="control"))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            replace(branch(tmp_path/"out", bare["sd"]), **change)
    with pytest.raises(ValueError, match="patch must be a multiple of the network's stride 16, got 40"):
        train_base(branch(tmp_path/"out", bare["sd"], patch=40))
    with pytest.raises(ValueError, match="levels must be one of uniform, logit_normal, shifted, got 'cosine'"):
        BackboneOptions(levels="cosine")
    with pytest.raises(BackboneError, match="sd is no FLUX"):
        load_backbone(bare["sd"], BackboneOptions(levels="shifted"))
    assert not (tmp_path/"out").exists()


def test_levels_are_told_apart_by_the_record_and_not_by_adapters(bare):
    from srnb.policies import base_print
    even, shifted = (load_backbone(bare["flux"], BackboneOptions(levels=o)) for o in ("uniform", "shifted"))
    assert fingerprint(even) != fingerprint(shifted) and base_print(even) == base_print(shifted)
    lq = torch.zeros(1, 3, 16, 16)
    drawn = [p.path_of(lq).draw_sigma(1000, generator(0)) for p in (even, shifted)]
    check_close(drawn[1], shifted.path_of(lq).shifted(drawn[0]))
    assert (drawn[1] > drawn[0]).float().mean() > .99


def test_no_name_of_a_repository_that_is_gone(root):
    "Stability AI took Stable Diffusion 2 from the Hub in November 2025, and runwayml its 1.5 before"
    gone = ("stabilityai/stable-diffusion-2", "runwayml/")
    for p in (root/"README.md", *(root/"nbs").glob("*.ipynb"), *(root/"srnb").glob("*.py"), *(root/".ci").glob("*.py")):
        assert not any(o in p.read_text() for o in gone), p
