"Memory and FLOPs before loading: properties over tiny architectures, and plans against what runs hold"
import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch
from weakref import finalize

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import srnb.train
from srnb.align import ASASR, DP2O, DRO, SFT, Run, Top
from srnb.backbones import BackboneError, BackboneOptions, ControlledFlux, ControlledUNet, write_tiny
from srnb.command import main
from srnb.core import generator
from srnb.distil import DistilRun
from srnb.onestep import BaseRun, CTMSRRun
from srnb.pairs import Pairs, draw_loss, draw_pairs
from srnb.plan import (FLUX, GB, SD2, SDXL, DoesNotFit, Network, Tally, Training, adapt, asasr_layers, autocast, build,
                       cost, course_of, largest, measure, plan, read_architecture, run_layers)
from srnb.runs import Base, Data, add_trained, policy_of
from srnb.train import plan_of, planned, plans_of, presets, train_planned
from srnb.training import Loop, fit

TEXT = (Network("transformers", "T5EncoderModel", dict(d_model=32, d_ff=64, d_kv=16, num_heads=2, num_layers=1,
                                                       vocab_size=99)), 7),
VAE = Network("diffusers", "AutoencoderKL", dict(block_out_channels=(8,)*4, norm_num_groups=4, sample_size=64,
    down_block_types=("DownEncoderBlock2D",)*4, up_block_types=("UpDecoderBlock2D",)*4))
UNET = replace(SD2, name="tiny UNet", texts=TEXT, vae=VAE, denoiser=Network("diffusers", "UNet2DConditionModel", dict(
    block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), layers_per_block=1,
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=32, attention_head_dim=2,
    norm_num_groups=8)))
TRANSFORMER = replace(FLUX, name="tiny FLUX", texts=TEXT, vae=VAE, denoiser=Network("diffusers",
    "FluxTransformer2DModel", dict(guidance_embeds=True, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6))))
BOTH = pytest.mark.parametrize("architecture", [UNET, TRANSFORMER], ids=lambda a: a.name)
WAYS = [None, Training(rank=4), Training(rank=4, checkpointing=True),
        Training(None, checkpointing=True, eight_bit=True)]


@BOTH
@pytest.mark.parametrize("training", [WAYS[0], *WAYS[2:]])
def test_more_pixels_and_more_rows_need_more(architecture, training):
    def step(*a): # before the text encoder or the VAE is the largest
        p = plan(architecture, *a, training)
        return p.momentary["activations"], p.flops, p.bytes
    small, wide, many = step(64, 1), step(128, 1), step(64, 3)
    assert all(a < b for a, b in zip(small[:2], wide[:2], strict=True)) and small[2] <= wide[2]
    assert many[1] == 3*small[1] and small[2] <= many[2]
    if training != WAYS[3]: return
    foretold, there = course_of(architecture, 64, training, 6, torch.bfloat16), cost(architecture, 64, training, 6)
    assert abs(foretold[:, 0].max()/there.peak-1) < .01 and foretold.shape == there.course.shape # it was not measured


@BOTH
def test_checkpointing_saves_memory_and_costs_work(architecture):
    flat, deep = cost(architecture, 128, WAYS[1]), cost(architecture, 128, WAYS[2])
    assert deep.saved < flat.saved and deep.peak < flat.peak and deep.flops > flat.flops


@BOTH
def test_options_change_what_they_say(architecture):
    whole = Training(None, checkpointing=True)
    a, b = [plan(architecture, 64, 1, replace(whole, eight_bit=e)) for e in (False, True)]
    assert {k for k in a.resident if a.resident[k] != b.resident[k]} == {"AdamW"}
    assert a.momentary["AdamW steps"] > b.momentary["AdamW steps"]
    assert b.resident["AdamW"] < a.resident["AdamW"]
    lora = plan(architecture, 64, 1, replace(whole, adapts=WAYS[1].adapts, rank=1))
    assert lora.resident["AdamW"] < a.resident["AdamW"]
    assert plan(architecture, 64, 1, replace(whole, frozen=1)).flops < a.flops


def test_flops_of_a_layer_by_hand():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 7, device="meta"), nn.Conv2d(3, 4, 3, padding=1, device="meta")
    net, g = Net().requires_grad_(False), dict(device="meta")
    assert measure(lambda: net.a(torch.zeros(11, 5, **g))).flops == 2*11*5*7
    assert measure(lambda: net.b(torch.zeros(2, 3, 6, 8, **g))).flops == 2*2*6*8*4*3*9
    r, found = 2, adapt({"denoiser": net}, Training(lambda n: True, rank=2))
    assert all(p.dtype == torch.float32 for p in found)
    assert sum(p.numel() for p in found) == r*(5+7)+r*(3*9+4)
    forward = 2*11*(5*7+r*(5+7))
    assert measure(lambda: net.a(torch.zeros(11, 5, **g))).flops == forward
    backward = 2*11*r*(5+7)+2*11*r*7 # of the adapter's weights, and of what lies between them
    assert measure(lambda: net.a(torch.zeros(11, 5, **g)), True).flops == forward+backward


def test_asasr_layers_hold_what_the_release_adapts():
    net = FLUX.denoiser.build()
    found = adapt({"denoiser": net}, Training(asasr_layers, rank=16))
    assert sum(p.numel() for p in found) == 57_951_232 # in bf16 110.5 MiB, its file has 111 MB


@BOTH
def test_largest_is_largest(architecture):
    one = plan(architecture, 128, 1, WAYS[2], allowance=0)
    capacity = max(one.bytes, sum(one.resident.values())+int(3.5*one.momentary["activations"]))
    got = largest(architecture, 128, capacity, [WAYS[2]], allowance=0)
    assert got.bytes <= capacity < plan(architecture, 128, got.batch+1, WAYS[2], allowance=0).bytes
    assert str(got).startswith(f"{architecture.name} at 128²: {got.batch} pair(s), LoRA of rank 4, checkpointing")
    with pytest.raises(DoesNotFit, match="needs .* What to change"): largest(architecture, 128, 1000, WAYS[1:])


def test_the_first_way_that_fits():
    flat, deep = [plan(TRANSFORMER, 128, 1, w, 64, 0).bytes for w in WAYS[1:3]]
    assert deep < flat
    assert largest(TRANSFORMER, 128, flat, WAYS[1:3], 64, 0).training == WAYS[1]
    assert largest(TRANSFORMER, 128, flat-1, WAYS[1:3], 64, 0).training == WAYS[2]


def test_the_scaling_page_holds_what_is_counted(root):
    kept = json.loads((root/"nbs/_records/scaling/costs.json").read_text())["C-SD2"]
    assert cost(SD2, 512).flops == kept["forward"]


def test_pooled_text_of_sdxl():
    assert 2*SDXL.denoiser.build().add_embedding.linear_1.in_features == 2*2816


@pytest.mark.parametrize("bad, words", [(dict(size=100), "multiple of 16"), (dict(size=0), "multiple of 16"),
    (dict(batch=0), "batch must"), (dict(tile=100), "tile must")])
def test_bad_input(bad, words):
    with pytest.raises(ValueError, match=words): plan(**{"architecture": UNET, "size": 64, **bad})


def test_no_way():
    with pytest.raises(ValueError, match="at least one way"): largest(UNET, 64, GB, [])
    with pytest.raises(ValueError, match="frozen must"): Training(frozen=-1)


def test_tally_counts_what_is_made_inside_and_lives():
    given = torch.zeros(1000)
    with Tally() as made:
        view = given.view(10, 100)
        view.add_(1) # neither a view nor what is written in place is new
        kept = view.t()
        assert made.now == 0
        for _ in range(3): kept = given*2 # the last one dies when the next is there
        kept = kept[:10]
    assert (made.now, made.peak, made.flops) == (4000, 8000, 0) and kept.shape == (10,)
    del kept
    assert made.now == 0


# What runs hold

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    top = tmp_path_factory.mktemp("planned")
    return {kind: write_tiny(kind, top/kind) for kind in ("sd", "sdxl", "flux")}


class Held(TorchDispatchMode):
    "The most bytes of tensors that were made inside and were alive together"
    def __init__(self):
        super().__init__()
        self.alive, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(o):
            if isinstance(o, torch.Tensor): return [o.untyped_storage()]
            return [s for p in o for s in storages(p)] if isinstance(o, (list, tuple)) else []
        out = func(*args, **(kwargs or {}))
        given = {s._cdata for s in storages((args, tuple((kwargs or {}).values())))}
        for s in storages(out):
            if s._cdata in given or s._cdata in self.alive: continue
            self.alive[s._cdata] = s.nbytes()
            finalize(s, self.alive.pop, s._cdata)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


def held(work):
    with Held() as found: work()
    return found.peak


def profiled(work): # what the allocator gave, so with the workspaces of convolutions on a CPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found: work()
    events = (e for e in found.profiler.kineto_results.events() if e.name() == "[memory]")
    now = peak = 0
    for _, n in sorted((e.start_ns(), e.nbytes()) for e in events):
        now += n
        peak = max(peak, now)
    return peak


def foretold(p): return sum(p.resident.values())-p.resident["allowance"]+max(p.momentary.values())


TWICE = Loop(steps=2, parts=2) # in the second micro-batch the gradients of the first are there


def run_on(folder, out, method=DP2O, batch=1, loop=TWICE, precision="no", **options):
    if isinstance(method.winners, Top): method = replace(method, winners=Top(2))
    base = Base(str(folder), precision=precision, options=BackboneOptions(**options))
    rank = Run.rank if base.options.train == "whole" else 4 # a whole branch has none
    return Run(str(out), method, Data(size=64), base, loop=loop, patch=64, rank=rank, batch=batch)


FAST = ("sd", "base", False), ("sdxl", "whole", False), ("flux", "control", True)
WAYS_OF_RUNS = ("base", False), ("control", True), ("whole", False)
ALL = [(kind, *way) for kind in ("sd", "sdxl", "flux") for way in WAYS_OF_RUNS]
TWICE = ("sdxl", "base", False), ("sd", "whole", False), ("sd", "control", True) # another kind goes that way
CASES = [pytest.param(*o, marks=[pytest.mark.slow]*(o not in FAST) + [pytest.mark.repeat]*(o in TWICE)) for o in ALL]


@pytest.mark.parametrize("kind, train, checkpointing", CASES)
def test_a_plan_is_what_the_run_holds(folders, tmp_path, kind, train, checkpointing):
    run = run_on(folders[kind], tmp_path, train=train, checkpointing=checkpointing)
    sampling, training = plans_of(run)
    policy, g = policy_of(run.base), generator(0)
    there = [*policy.net.parameters(), *policy.net.buffers(), *policy.codec.vae.parameters()]
    there = sum({o.untyped_storage()._cdata: o.untyped_storage().nbytes() for o in there}.values())
    images = [torch.randint(0, 256, (2, 3, 64, 64), generator=g).byte() for _ in range(2)]
    pairs = Pairs([o[0, :, ::4, ::4] for o in images], images, images, torch.ones(2, 2, 2))
    sample = lambda: policy.sample(torch.rand(1, 3, 16, 16, generator=g), [*range(8)], 2, batch=8) # noqa: E731
    def step():
        add_trained(policy, run.base.options, run.rank, run.seed)
        loss = draw_loss(lambda step, part: draw_pairs(pairs, policy, 1, 64, step), policy, run.method.link)
        fit(policy, loss, run.loop, run.out)
    assert abs(foretold(sampling)/(there+held(sample))-1) < .1
    count = profiled if kind == "flux" else held # it has hardly a convolution
    assert abs(foretold(training)/(there+count(step))-1) < .1


@pytest.mark.parametrize("kind, net", [("sd", ControlledUNet), ("sdxl", ControlledUNet), ("flux", ControlledFlux)])
def test_a_folder_is_planned_as_it_would_be_loaded(folders, tmp_path, kind, net):
    architecture, policy = read_architecture(folders[kind]), policy_of(Base(str(folders[kind]), precision="no"))
    nets, _ = build(architecture, dtype=torch.float32)
    loaded = dict(denoiser=getattr(policy.net, net.base_name), branch=policy.net.controlnet)
    for n, real in loaded.items():
        assert {k: o.shape for k, o in nets[n].named_parameters()} == {k: o.shape for k, o in real.named_parameters()}
    assert architecture.rows == (1 if kind == "flux" else 2) and len(architecture.texts) == (1 if kind == "sd" else 2)
    for train in ("base", "control", "whole"):
        run = run_on(folders[kind], tmp_path, train=train)
        policy = policy_of(run.base)
        add_trained(policy, run.base.options, run.rank, run.seed)
        trained = sum(p.numel() for p in policy.net.parameters() if p.requires_grad)
        _, planned = build(architecture, Training(run_layers(architecture, train), run.rank))
        assert sum(p.numel() for p in planned) == trained


def test_what_a_run_changes_its_plan_changes(folders, tmp_path):
    def parts(**changes): # of the training plan, and sampling's
        sampling, training = plans_of(run_on(folders["sd"], tmp_path, **changes))
        return training.resident | training.momentary | {"flops": training.flops, "decodes": sampling.momentary}
    plain = parts()
    def changed(**changes):
        now = parts(**changes)
        return {k for k in plain.keys() | now.keys() if plain.get(k) != now.get(k)}
    adapter = {"trained, float32", "gradients", "AdamW", "AdamW steps", "flops"}
    assert changed(train="whole") == adapter | {"activations"}
    assert changed(batch=2) == {"activations", "flops"}
    assert changed(loop=Loop(parts=2, ema=.9)) == {"average"}
    whole, small = [parts(train="whole", loop=Loop(parts=2, optimiser=o)) for o in ("adamw", "adamw_8bit")]
    assert {k for k in whole if whole[k] != small[k]} == {"AdamW", "AdamW steps"}
    assert changed(precision="bf16") >= {"denoiser, bf16", "branch, bf16", "activations"}
    assert {"frozen adapters", "gradients apart"} <= changed(method=DRO)
    assert parts(method=ASASR)["frozen adapters"] == plain["trained, float32"]*(4+16)/4 # the start's, the adversary's
    assert "frozen adapters" not in parts(method=SFT) and parts(method=SFT)["activations"] < plain["activations"]
    assert parts(guidance=1.)["decodes"]["activations"] < plain["decodes"]["activations"]
    tiled, whole = [replace(run_on(folders["sd"], tmp_path, tile_vae=t), data=Data(size=1024)) for t in (True, False)]
    assert plans_of(tiled)[0].momentary["VAE decodes"] < plans_of(whole)[0].momentary["VAE decodes"]


def test_a_stage_that_makes_a_backbone_read_is_planned(folders, tmp_path):
    run = BaseRun(str(tmp_path), init=str(folders["sd"]), batch=2, precision="no", loop=Loop(ema=.9))
    training, = plans_of(run) # it samples nothing, and has no reference
    assert str(training).startswith(f"{folders['sd']} at 64²: 2 crop(s), the whole branch")
    assert training.resident["average"] == training.resident["trained, float32"] > 0
    assert training.flops < plans_of(run_on(folders["sd"], tmp_path, train="whole"))[1].flops


def test_a_run_that_does_not_fit_is_told_before_it_starts(folders, tmp_path, monkeypatch, capsys):
    run = run_on(folders["sd"], tmp_path)
    assert "WARNING" not in plan_of(run, free=10*GB)
    assert "WARNING: training will not fit: it needs 1.5 GB, the card has 0.1 GB free" in plan_of(run, free=GB//10)
    card = SimpleNamespace(is_available=lambda: True, mem_get_info=lambda: (GB//10, GB))
    monkeypatch.setattr(srnb.train.torch, "cuda", card)
    monkeypatch.setattr(srnb.train, "train", lambda run: print("trains") or run.out)
    assert train_planned(run) == run.out
    said = capsys.readouterr().out
    assert said.index("pair(s), LoRA of rank 4") < said.index("WARNING: sampling") < said.index("trains")
    (tmp_path/"config.json").touch() # it goes on, and has said it
    assert train_planned(run) == run.out and capsys.readouterr().out == "trains\n"
    (tmp_path/"config.json").unlink()
    monkeypatch.setenv("RANK", "1") # of several processes one says it
    assert train_planned(run) == run.out and capsys.readouterr().out == "trains\n"


def test_the_command_plans_folders_and_names(folders, tmp_path, capsys):
    words = ["dp2o", "--base.backbone", str(folders["sdxl"]), "--data.size", "64", "--out", str(tmp_path/"out")]
    assert main(["plan", *words]) == 0
    said = capsys.readouterr().out
    assert f"{folders['sdxl']} at 64²: 8 image(s), sampling" in said and "8 pair(s), LoRA of rank 16" in said
    assert "denoiser, bf16" in said and not (tmp_path/"out").exists()
    assert main(["plan", *words, "--base.precision", "no"]) == 0
    assert "denoiser, float32" in capsys.readouterr().out
    assert main(["plan", "dp2o"]) == 2 and "this run has no backbone; put sd2" in capsys.readouterr().err
    assert main(["plan", "dp2o", "--base.backbone", str(tmp_path/"nothing")]) == 1


def test_a_revision_is_planned_and_told_before_training(folders, tmp_path, monkeypatch, capsys):
    asked, real = [], srnb.plan._place
    def place(source): # the Hub is that folder
        asked.append(real(source))
        return dict(pretrained_model_name_or_path=str(folders["sd"]))
    monkeypatch.setattr(srnb.plan, "_place", place)
    monkeypatch.setattr(srnb.train, "train", lambda run: run.out)
    run = run_on("owner/name@abc", tmp_path)
    assert train_planned(run) == run.out and "owner/name@abc at 64²" in capsys.readouterr().out
    assert all(o == dict(pretrained_model_name_or_path="owner/name", revision="abc") for o in asked) and asked
    monkeypatch.setattr(srnb.plan, "_place", real)
    with pytest.raises(BackboneError, match="is a folder of this machine, which has no revisions: leave @abc out"):
        plan_of(run_on(f"{folders['sd']}@abc", tmp_path))


@pytest.mark.parametrize("preset", presets())
def test_every_known_name_plans_every_preset(preset, monkeypatch, capsys):
    seen, real = [], srnb.train.plan_of
    def plan_of(run, *more):
        return real(run, *more) if isinstance(run, CTMSRRun|DistilRun) else seen.append((run, *more)) or "planned"
    monkeypatch.setattr(srnb.train, "plan_of", plan_of)
    at = "--" if preset == "base" else "--base."
    for name, architecture in planned().items():
        if preset in ("ctmsr", "distil"):
            assert main(["plan", name, preset]) == 2 and "takes no backbone" in capsys.readouterr().err
            continue
        options = [f"{at}options.checkpointing"], [f"{at}precision", "no"]
        for more in ([], *(options if name == "sd2" else ())):
            assert main(["plan", name, preset, *more]) == 0, more
            run, of = seen.pop()
            options, precision = (o.options, o.precision) if isinstance(o := run, BaseRun) else (
                o.base.options, o.base.precision)
            assert of == architecture and precision == ("no" if "no" in more else "bf16")
            assert options.checkpointing == ("options.checkpointing" in "".join(more))


def test_the_first_word_of_a_plan_is_a_backbone(folders, tmp_path, capsys):
    small = "--data.size", "64", "--out", str(tmp_path/"out")
    for words in (["dp2o", *small], small): # dp2o, if there is no preset
        assert main(["plan", str(folders["sd"]), *words]) == 0
        assert f"{folders['sd']} at 64²: 8 pair(s), LoRA of rank 16" in capsys.readouterr().out
    assert main(["plan", str(folders["sd"]), "base"]) == main(["plan", "base", "--init", str(folders["sd"])]) == 0
    assert capsys.readouterr().out.count("16 crop(s), the whole branch") == 2
    assert main(["plan", f"{folders['sd']}@abc"]) == 1 and "has no revisions" in capsys.readouterr().err
    assert main(["plan", "SD2"]) == 1 and "no backbone and no preset 'SD2'; did you mean 'sd2'?" in (
        capsys.readouterr().err)
    assert main(["plan", "ctmsr"]) == 2 and "takes no backbone" in capsys.readouterr().err
    assert main(["plan", "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("usage: srnb plan [sd2|sd15|sdxl|flux|FOLDER|OWNER/NAME] PRESET|CONFIG.json|FILE.py:NAME")
    assert "srnb plan sdxl dp2o --data.size 512 --patch 512" in said and "DP2O-SR" in said


def test_packed_weights_and_a_vae_in_main_memory_are_planned(folders, tmp_path):
    import bitsandbytes.functional as bnb
    sampling, training = plans_of(run_on(folders["flux"], tmp_path, precision="bf16"))
    net = read_architecture(folders["flux"]).denoiser.build("cpu")
    linear = [m.weight for m in net.modules() if isinstance(m, nn.Linear)]
    rest = 2*(sum(p.numel() for p in net.parameters())-sum(w.numel() for w in linear))
    four = [bnb.quantize_4bit(w.float(), quant_type="nf4") for w in linear]
    four = rest+sum(o.nbytes+state.absmax.nbytes for o, state in four)
    eight = rest+sum(w.numel()+4*len(w) for w in linear) # a scale for each row
    for bits, there in (("4bit", four), ("8bit", eight)):
        for plain, packed in zip((sampling, training), plans_of(run_on(folders["flux"], tmp_path, precision="bf16",
                                                                        quantize=bits)), strict=True):
            assert abs(packed.resident[f"denoiser, {bits}"]/there-1) < .01
            assert "denoiser, bf16" not in packed.resident and packed.bytes <= plain.bytes
            assert packed.resident["branch, bf16"] == plain.resident["branch, bf16"] # it is never packed
    away = plans_of(run_on(folders["flux"], tmp_path, precision="bf16", offload_vae=True))
    for plain, moved, works in zip((sampling, training), away, ("VAE decodes", "VAE encodes"), strict=True):
        assert "VAE, float32" not in moved.resident
        assert moved.momentary[works] == plain.momentary[works]+plain.resident["VAE, float32"]
        assert moved.momentary["activations"] == plain.momentary["activations"]


def test_a_plan_ends_with_what_to_change(folders, tmp_path):
    run = run_on(folders["sd"], tmp_path, batch=2)
    *_, patch, smaller = plan_of(run).splitlines()
    assert "made for pictures of 512 pixels or more" in patch and patch.endswith(": --data.size 512 --patch 512")
    assert smaller == "smaller: --base.options.checkpointing, --batch 1"
    base = BaseRun(str(tmp_path), init=str(folders["sd"]), batch=2)
    *_, patch, smaller = plan_of(base).splitlines()
    assert patch.endswith("patches of 64: --patch 512") and smaller == "smaller: --options.checkpointing, --batch 1"
    done = replace(run_on(folders["sd"], tmp_path, checkpointing=True), data=Data(size=256), patch=256)
    assert plan_of(done).splitlines()[-1].startswith("  before ")


@pytest.mark.slow # two programs
def test_commands_leave_out_what_libraries_remark(tmp_path):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONWARNINGS", "CUDA_VISIBLE_DEVICES")}
    line = ("import runpy, sys; from srnb.command import main; sys.argv = ['', 'flux', sys.argv[1]]; "
            "runpy.run_module('srnb.backbones', run_name='__main__'); "
            "sys.exit(main(['plan', sys.argv[2], '--data.size', '64']))")
    done = subprocess.run([sys.executable, "-W", "ignore::RuntimeWarning:runpy", "-c", line, str(tmp_path/"flux")],
                          env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "gemm_4bit" not in done.stderr and "Warning" not in done.stderr, done.stderr
    assert "LoRA of rank 16" in done.stdout


@contextmanager
def on_a_card(): # torch's own autocast, which `torch.autocast` would not switch on where there is no card
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try: yield
    finally:
        if torch.autocast_decrement_nesting() == 0: torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)


def forward_of(architecture, training, card):
    (nets, _), fake = build(architecture, training), FakeTensorMode(allow_non_fake_inputs=True)
    def there(p):
        with fake: return torch.empty(p.shape, dtype=p.dtype, device="cuda")
    def attention(query, key, value, **kwargs):
        return torch.ops.aten._scaled_dot_product_flash_attention(*(o.bfloat16() for o in (query, key, value)))[0]
    for m in [m for net in nets.values() for m in net.modules()]*card:
        for n, p in m._parameters.items():
            if p is not None: m._parameters[n] = nn.Parameter(there(p), p.requires_grad)
        for n, p in m._buffers.items(): m._buffers[n] = there(p)
    def run():
        with on_a_card() if card else autocast("meta", torch.bfloat16):
            return architecture.run(architecture, nets["denoiser"], nets.get("branch"), 64, 2).float()
    if not card: return measure(run, training is not None)
    with fake, patch.object(F, "scaled_dot_product_attention", attention), Tally() as tally:
        with torch.set_grad_enabled(training is not None): out = run()
        return tally.now, out


@BOTH
@pytest.mark.parametrize("training", [pytest.param(None, marks=pytest.mark.repeat), WAYS[1], Training(None)],
                         ids=["sample", "LoRA", "whole"])
def test_arithmetic_is_that_of_a_card(architecture, training):
    saved, _ = forward_of(architecture, training, card=True)
    assert abs(forward_of(architecture, training, card=False).saved/saved-1) < .06 # the norm of queries is fused there
