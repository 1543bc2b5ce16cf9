"Every kind of random pipeline goes through every kind of step and run; errors come before work is lost"
import gc
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from diffusers import (ControlNetModel, FluxControlNetModel, FluxControlNetPipeline, StableDiffusionControlNetPipeline,
                       StableDiffusionXLControlNetPipeline)
from huggingface_hub.errors import (GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError,
                                    RevisionNotFoundError)
from safetensors.torch import load_file, save_file

from srnb import backbones
from srnb.align import DP2O, Run, Top, Work, align
from srnb.backbones import (NEGATIVE, BackboneError, BackboneOptions, _reading, is_backbone, load_backbone, pack,
                            unpack, write_tiny, write_tiny_control)
from srnb.colour import Colour
from srnb.config import fill
from srnb.core import check_close, generator, quantize, to_bytes
from srnb.curation import Group, fingerprint, group_seeds, read_group
from srnb.data import embedded_photos
from srnb.pairs import (Hinge, Logistic, OnlineDraw, Pairs, draw_alone, draw_loss, draw_made, draw_pairs, given_loser,
                        split_backward)
from srnb.paths import Shift
from srnb.plan import DoesNotFit
from srnb.policies import base_print, load_adapter, save_adapter, text_ids
from srnb.runs import Base, Data, Judging, dtype_of
from srnb.spectral import SobolevEnergy
from srnb.training import Loop, fit, put

KINDS = ("sd", "sdxl", "flux")
CONTROLLED = dict(sd=(StableDiffusionControlNetPipeline, ControlNetModel),
                  sdxl=(StableDiffusionXLControlNetPipeline, ControlNetModel),
                  flux=(FluxControlNetPipeline, FluxControlNetModel))


@pytest.fixture(scope="module")
def folders(tmp_path_factory)->dict[str, Path]:
    "Random pipelines, and `<kind>-control`, random control branches"
    top = tmp_path_factory.mktemp("backbones")
    for kind in KINDS: write_tiny_control(load_backbone(write_tiny(kind, top/kind)), top/f"{kind}-control")
    return {n: top/n for k in KINDS for n in (k, f"{k}-control")}


def backbone(folders, kind, prompts=("a tree",), **options):
    options = BackboneOptions(control=str(folders[f"{kind}-control"]), **options)
    return load_backbone(folders[kind], options, prompts=prompts)


def groups(n=2, m=4)->list[Group]:
    g = generator(0)
    def images(*shape): return to_bytes(torch.rand(shape, generator=g)).float().div(255)
    return [Group(f"p{i}", images(3, 16, 16), images(3, 64, 64), images(m, 3, 64, 64), "a tree" if i else "")
            for i in range(n)]


def pairs()->Pairs:
    bank = groups()
    rows = zip(*((o.lq, o.sr[:2], o.sr[2:]) for o in bank), strict=True)
    lq, winners, losers = ([to_bytes(o) for o in part] for part in rows)
    return Pairs(lq, winners, losers, torch.ones(2, 2, 2), text_ids(o.prompt for o in bank))


def of(pairs, policy): return lambda step, part: draw_pairs(pairs, policy, 1, 64, step)


def steps_of(method, policy): # -> loss, backward, memory, value at the start (None: not known)
    photographs = [replace(o, sr=o.gt[None]) for o in groups()]
    if method == "sft":
        loss = draw_loss(lambda step, part: draw_alone(photographs, policy, 2, 64, step), policy)
        return loss, None, None, None
    if method == "dp2o": return draw_loss(of(pairs(), policy), policy, Logistic(100.)), None, None, math.log(2)
    if method == "asasr":
        def draw(step, part): return draw_made(photographs, policy, 2, 64, step, given_loser(groups()))
        return draw_loss(draw, policy, Logistic(100.), SobolevEnergy(1.5)), None, None, math.log(2)
    draw = OnlineDraw(groups(), policy, 2, 64, 0, cells=2, every=1, capacity=2, refresh=2)
    loss = draw_loss(draw, policy, Hinge(.001))
    return loss, split_backward(policy, safeguard=False), draw, .001 # the gate: both gaps are 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["sft", "dp2o", "asasr", "dro"])
def test_step(folders, tmp_path, kind, method):
    policy = backbone(folders, kind, checkpointing=kind == "flux")
    policy.add_lora(4, name="reference")
    if method == "dro":
        policy.add_lora(4, name="snapshot")
        policy.off |= {"snapshot"}
    policy.add_lora(4)
    loss, backward, memory, start = steps_of(method, policy)
    frozen = {n: p.clone() for n, p in policy.net.named_parameters() if not p.requires_grad and "snapshot" not in n}
    trained = {n: p.clone() for n, p in policy.net.named_parameters() if p.requires_grad}
    assert trained and all(".policy." in n for n in trained)
    loop = Loop(steps=2, lr=1e-2, warmup=1, log_every=1, save_every=2)
    weights, log = fit(policy, loss, loop, tmp_path, backward, memory)
    if start is not None: check_close(log.loss[0], start, rtol=1e-5)
    now = dict(policy.net.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in frozen.items())
    assert any((now[n]-p).abs().max() > 1e-3 for n, p in trained.items())
    kept = tmp_path/"checkpoint-00000002"
    changing = torch.load(kept/"state.pt")["changing"]
    assert set(trained) <= set(changing) < set(now) and not (kept/"model.safetensors").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_every_gradient(folders, kind):
    "What is trained of a whole control branch has a gradient: several processes would wait for one that never comes"
    policy = backbone(folders, kind, train="whole", checkpointing=True)
    params = policy.add_copy("controlnet")
    draw_loss(of(pairs(), policy), policy, Logistic(100.))(0, 0)[0].mean().backward()
    named = {n: p for n, p in policy.net.named_parameters() if p.requires_grad}
    assert [n for n, p in named.items() if p.grad is None] == []
    assert {id(p) for p in named.values()} == {id(p) for p in params} and len(named) > 50


def test_learns(folders, tmp_path):
    "Winners and losers in the right places: white wins, black loses, and steps move the margin up"
    def filled(value, *shape): return [torch.full(shape, value, dtype=torch.uint8)]
    white = Pairs(filled(128, 3, 16, 16), filled(255, 2, 3, 64, 64), filled(0, 2, 3, 64, 64), torch.ones(1, 2, 2))
    policy = backbone(folders, "flux")
    policy.keep(tmp_path)
    opt = torch.optim.Adam(policy.add_lora(8), 3e-3)
    loss = draw_loss(of(white, policy), policy, Logistic(50.))
    for k in range(12):
        values, logs, *_ = loss(k, 0)
        opt.zero_grad()
        values.mean().backward()
        opt.step()
    assert logs["gap_w"] < logs["gap_l"] and values.mean() < math.log(2)
    assert len(list((tmp_path/"latents").iterdir())) == 2 # two white ones, two black ones


def test_outputs_of_the_base_have_the_prompt_of_their_photograph(folders, tmp_path):
    "In losers that other models give, too; of the photograph and not of its neighbour"
    (tmp_path/"prompts.json").write_text(json.dumps(dict(p0="", p1="a tree")))
    policy, inputs = backbone(folders, "sd"), [(f"{o.id}-0", o.lq, o.gt) for o in groups()]
    data = Data(size=64, prompts=str(tmp_path/"prompts.json"))
    base = Base(str(folders["sd"]), sample_steps=1, colour=Colour("none"))
    work = Work(Run(str(tmp_path/"run"), data=data, base=base), policy, inputs, [])
    empty, told = work.outputs(("base",), work.crops)
    def sampled(o, prompt):
        return base.colour.images(policy.sample(o.lq[None], [0], 1, prompts=[prompt])[0], o.lq, policy.codec)
    for o, prompt in ((empty, ""), (told, "a tree")):
        assert torch.equal(o.sr, sampled(o, prompt))
    assert not torch.equal(told.sr, sampled(told, ""))


def latents_of_diffusers(pipe, policy, lq): # two steps of its own pipeline, with the noise of `seed 7`
    g, y = generator(7), policy.codec.upsample(lq)
    noise = torch.randn(1, *policy.codec.shape(lq), generator=g)
    more = dict(image=y, latents=noise, guidance_scale=3.5, negative_prompt=NEGATIVE)
    if "Flux" in type(pipe).__name__:
        last = pipe.vae.encoder.conv_out # its pipeline draws the control image's latents: no variance, no draw
        with torch.no_grad():
            last.weight[4:].zero_()
            last.bias[4:] = -30.
        more = dict(control_image=2*y-1, latents=pack(noise), guidance_scale=2.5, height=64, width=64)
    pipe.set_progress_bar_config(disable=True)
    z = pipe(prompt="a tree", num_inference_steps=2, generator=g, output_type="latent", **more).images
    return unpack(z, noise.shape) if z.ndim == 3 else z


def in_diffusers(folders, kind, policy, lq, adapter)->tuple: # latents without and with a run's adapter
    "A plain ControlNet pipeline of diffusers reads the folder of an adapter that `srnb` wrote"
    pipeline, control = CONTROLLED[kind]
    more = dict(safety_checker=None) if kind == "sd" else {}
    def pipe(branch): return pipeline.from_pretrained(folders[kind], controlnet=control.from_pretrained(branch), **more)
    plain = pipe(folders[f"{kind}-control"])
    before = latents_of_diffusers(plain, policy, lq)
    if (branch := adapter/"controlnet").exists(): return before, latents_of_diffusers(pipe(branch), policy, lq)
    plain.load_lora_weights(adapter)
    assert plain.get_active_adapters()
    return before, latents_of_diffusers(plain, policy, lq)


@torch.no_grad()
def latents_of(policy, lq): # the same noise, steps and prompt
    g, cond = generator(7), policy.encode(lq, text_ids(["a tree"]))
    noise, path = torch.randn(1, *policy.codec.shape(lq), generator=g), policy.path_of(lq)
    def guided(x, sigma): return policy.guided(x, sigma, cond)
    def fresh(x): return torch.randn(x.shape, generator=g)
    return policy.sampler(guided, noise, path.sigma_grid(2), path, fresh)


RUNS = [("sd", "whole", "bf16"), ("sdxl", "control", "no"), ("sd", "base", "no"), ("flux", "control", "no"),
        *(pytest.param(k, "base", "no", marks=pytest.mark.repeat) for k in ("sdxl", "flux"))]

@pytest.mark.parametrize("kind,train,precision", RUNS)
def test_run(folders, tmp_path, kind, train, precision):
    "DP2O-SR end to end with prompts; the adapter is read back and gives the same samples, the base's are untouched"
    ids = [p.id for split in ("train", "held_out") for p in embedded_photos(split)[:1]]
    (tmp_path/"prompts.json").write_text(json.dumps(dict.fromkeys(ids, "a tree")))
    options = BackboneOptions(control=str(folders[f"{kind}-control"]), train=train)
    run = Run(str(tmp_path/"out"), replace(DP2O, winners=Top(1)),
              Data(size=64, places=1, take=1, prompts=str(tmp_path/"prompts.json")),
              Base(str(folders[kind]), precision=precision, sample_steps=2, options=options, colour=Colour("none")),
              Judging("offline_nr", m=2, judges=("psnr_y",), eval_m=1),
              Loop(steps=2, lr=1e-2, warmup=1, log_every=1, save_every=2),
              **({} if train == "whole" else dict(rank=4)), batch=1, patch=64)
    out = align(run)
    before, after = (read_group(out/n, ids[1]) for n in ("before", "bank-after"))
    assert before.prompt == "a tree" and (before.sr-after.sr).abs().max() > 1/255
    policy = load_backbone(folders[kind], options, None, dtype_of(precision), prompts=["a tree"], texts=out/"texts")
    def sample():
        sr = policy.sample(before.lq[None], group_seeds(ids[1], 1), 2, prompts=["a tree"])[0]
        return run.base.colour.images(sr, before.lq, policy.codec)
    moved = (before.sr-after.sr).abs().mean()
    # a run keeps prompts in float16, which moves single pixels by a step; bfloat16's products round as memory lies
    rounding = 1e-5 if precision == "no" else .01
    assert moved > 2*rounding and (sample()-before.sr).abs().mean() < rounding
    load_adapter(policy, out/"adapter")
    if train == "whole":
        assert {p.dtype for n, p in policy.net.named_parameters() if ".policy." in n} == {torch.float32}
    assert (sample()-after.sr).abs().mean() < rounding
    if precision == "no": # README: a run's own folder loads into plain diffusers
        lq = before.lq[None]
        plain, adapted = in_diffusers(folders, kind, policy, lq, out/"adapter")
        with policy.using(): check_close(latents_of(policy, lq), plain, atol=1e-4)
        check_close(latents_of(policy, lq), adapted, atol=1e-4)
        assert (adapted-plain).abs().max() > 1e-3
        here, there = (to_bytes(policy.codec.decode(z, lq)).int() for z in (latents_of(policy, lq), adapted))
        assert (here-there).abs().max() <= 1
    (tmp_path/"prompts.json").write_text(json.dumps({ids[0]: "a tree"}))
    with pytest.raises(ValueError, match=f"prompts.json.*{ids[1]}"): align(replace(run, out=str(tmp_path/"lost")))
    assert not (tmp_path/"lost").exists()


def response(code): return httpx.Response(code, request=httpx.Request("GET", "https://example.org"))

@pytest.mark.parametrize("error,message", [
    (GatedRepoError("gated", response=response(403)), "owner/name is gated: accept its licence"),
    (RepositoryNotFoundError("no", response=response(404)),
     "no owner/name on the Hub.*copy under another owner.*sd2-community.*local folder"),
    (RevisionNotFoundError("no", response=response(404)), "owner/name has no revision 'v9': give a branch"),
    (LocalEntryNotFoundError("offline"), "owner/name@v9: unet cannot be downloaded.*check the network"),
    (OSError("no file named model.safetensors"), "owner/name@v9: unet is missing or damaged")])
def test_download(error, message):
    "What to do is said, also where diffusers has wrapped the Hub's error in one of its own"
    with pytest.raises(BackboneError, match=message):
        with _reading("owner/name@v9", "unet"): raise error
    with pytest.raises(BackboneError, match=message):
        with _reading("owner/name@v9", "unet"):
            try: raise error
            except Exception as e: raise OSError("wrapped by diffusers") from e


REVISIONS = """
import torch
from srnb.backbones import BackboneError, load_backbone
from srnb.runs import Base
lq = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).mul(255).round()/255
policies = [load_backbone("owner/name"+o) for o in ("", "@v1", "@v2")]
samples = [p.sample(lq, [0], 2) for p in policies]
assert torch.equal(samples[0], samples[2]) and not torch.equal(samples[0], samples[1])
assert policies[1].name == Base("owner/name@v1").backbone == "owner/name@v1"
try: load_backbone("owner/name@v3")
except BackboneError as e: print(e)
"""

@pytest.mark.slow # processes of their own, as the Hub is imported with their cache
def test_revisions(folders, tmp_path):
    "owner/name@revision reads that revision of the Hub's cache and is the policy's name; a folder has none"
    cache = tmp_path/"hub/models--owner--name"
    (cache/"refs").mkdir(parents=True)
    for k, revision in enumerate(("v1", "v2")):
        commit = 40*str(k)
        write_tiny("sd", cache/"snapshots"/commit, seed=k)
        for name in (revision, "main"): (cache/"refs"/name).write_text(commit)
    env = os.environ | dict(HF_HOME=str(tmp_path), HF_HUB_CACHE=str(tmp_path/"hub"), HF_HUB_OFFLINE="1")
    done = subprocess.run([sys.executable, "-c", REVISIONS], capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "owner/name@v3" in done.stdout, done.stderr[-2000:]
    with pytest.raises(BackboneError, match="sd is a folder of this machine, which has no revisions: leave @v1 out"):
        load_backbone(f"{folders['sd']}@v1")
    assert is_backbone("owner/name@v1") and is_backbone(f"{folders['sd']}@v1") and not is_backbone("small@v1")


def test_variant(folders, tmp_path):
    "Files of a variant are read where a variant is named, and only there"
    write_tiny("sd", tmp_path/"sd")
    for file in (tmp_path/"sd").rglob("*.safetensors"): file.rename(file.with_suffix(".fp16.safetensors"))
    a, b = load_backbone(tmp_path/"sd", BackboneOptions(variant="fp16")), load_backbone(folders["sd"])
    for n, p in a.net.unet.state_dict().items(): assert torch.equal(p, b.net.unet.state_dict()[n])
    with pytest.raises(BackboneError, match="missing or damaged"): load_backbone(tmp_path/"sd")
    with pytest.raises(BackboneError, match="options.variant = 'fp32'"):
        load_backbone(tmp_path/"sd", BackboneOptions(variant="fp32"))


def test_packed_base_needs_cuda(folders):
    "4 and 8 bits are refused before anything is read where there is no CUDA"
    for bits in ("4bit", "8bit"):
        with pytest.raises(BackboneError, match=f"options.quantize = '{bits}'.*CUDA.*device is cpu"):
            load_backbone(folders["sd"], BackboneOptions(quantize=bits))
    with pytest.raises(ValueError, match="no, 8bit or 4bit, got '2bit'"): BackboneOptions(quantize="2bit")


def test_packed_base_trains_lora(folders, monkeypatch, tmp_path):
    "8 bits, whose kernels also run on a CPU: frozen weights of one byte, LoRA in float32, for a base in 8 bits alone"
    from diffusers.quantizers.bitsandbytes.bnb_quantizer import BnB8BitDiffusersQuantizer as Quantizer
    monkeypatch.setattr(Quantizer, "validate_environment", lambda self, *a, **k: None)
    monkeypatch.setattr(Quantizer, "update_device_map", lambda self, device_map: {"": "cpu"})
    monkeypatch.setattr("srnb.backbones._check_packing", lambda *a: None)
    packed, plain, lq = backbone(folders, "flux", quantize="8bit"), backbone(folders, "flux"), groups()[0].lq[None]
    assert {p.dtype for n, p in packed.net.transformer.named_parameters() if "attn.to_q.weight" in n} == {torch.int8}
    assert {p.dtype for p in packed.net.controlnet.parameters()} == {torch.float32}
    a, b = latents_of(packed, lq), latents_of(plain, lq)
    assert 1e-4 < (a-b).norm()/b.norm() < .1
    params = packed.add_lora(4)
    draw_loss(of(pairs(), packed), packed, Logistic(100.))(0, 0)[0].mean().backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in params)
    save_adapter(packed, tmp_path/"adapter")
    load_adapter(backbone(folders, "flux", quantize="8bit"), tmp_path/"adapter")
    with pytest.raises(ValueError, match="in 8bit.*read as it was"): load_adapter(plain, tmp_path/"adapter")
    alone = BackboneOptions(quantize="8bit") # the branch is a copy of the base in full
    branch = load_backbone(folders["flux"], alone).net.controlnet.transformer_blocks[0].attn.to_q.weight
    assert torch.equal(branch, plain.net.transformer.transformer_blocks[0].attn.to_q.weight)


def test_attention(folders):
    "A backend of diffusers computes the same attention in both parts of FLUX, and in no other network"
    plain, math = backbone(folders, "flux"), backbone(folders, "flux", attention="_native_math")
    lq = groups()[0].lq[None]
    def latents(policy): return latents_of(policy, lq)
    check_close(latents(math), latents(plain), atol=1e-4)
    for part, used in ((math.net.transformer, True), (math.net.controlnet, True), (plain.net.transformer, False)):
        names = {p._attention_backend and p._attention_backend.value for p in part.attn_processors.values()}
        assert names == ({"_native_math"} if used else {None})
    assert fingerprint(math) != fingerprint(plain)
    with pytest.raises(BackboneError, match="options.attention = 'flsh' cannot be used here.*flash"):
        backbone(folders, "flux", attention="flsh")
    with pytest.raises(BackboneError, match="UNet2DConditionModel leaves attention to torch"):
        backbone(folders, "sd", attention="native")


@pytest.mark.parametrize("kind", ["sd", pytest.param("flux", marks=pytest.mark.slow)])
def test_compiled(folders, monkeypatch, kind):
    "Compiled blocks predict the same, take adapters, tell policy from reference, and keep the names of all weights"
    compile = torch.nn.Module.compile # Inductor itself takes a minute and is torch's: its front end shows what matters
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="eager"))
    policies = plain, fast = [backbone(folders, kind, compile=o) for o in (False, True)]
    blocks = [m for m in fast.net.modules() if m._compiled_call_impl is not None]
    assert len(blocks) > 2 and not any(m._compiled_call_impl for m in plain.net.modules())
    lq, predictions, gradients = groups()[0].lq[None], [], []
    for policy in policies:
        for p in policy.add_lora(4): p.data.add_(.05*torch.randn(p.shape, generator=generator(p.numel())))
        g, cond = generator(0), policy.encode(lq, text_ids(["a tree"]))
        at = torch.randn(1, *policy.codec.shape(lq), generator=g), torch.tensor([.5]), cond
        with policy.reference(): reference = policy.predict(*at)
        now = policy.predict(*at)
        now.square().mean().backward()
        gradients.append([p.grad for p in policy.net.parameters() if p.requires_grad])
        predictions.append((now.detach(), reference))
        assert (now-reference).abs().max() > 1e-3
    for a, b in zip(*predictions, strict=True): check_close(a, b, atol=1e-5)
    for a, b in zip(*gradients, strict=True): check_close(a, b, atol=1e-5)
    assert plain.net.state_dict().keys() == fast.net.state_dict().keys() and fingerprint(plain) != fingerprint(fast)


def test_the_vae_visits_the_device(folders, monkeypatch):
    "It is moved there to encode and to decode, and back each time; what it computes stays the same"
    stays, visits = backbone(folders, "flux"), backbone(folders, "flux", offload_vae=True)
    moves, to = [], torch.nn.Module.to
    def recorded(self, *a, **k):
        if self is visits.codec.vae: moves.append(str(a[0]))
        return to(self, *a, **k)
    monkeypatch.setattr(type(visits.codec.vae), "to", recorded)
    object.__setattr__(visits.codec, "visits", torch.device("cpu:0")) # another name of the only device
    o = groups()[0]
    z = visits.codec.encode(o.gt[None], o.lq[None])
    assert moves == ["cpu:0", "cpu"] and torch.equal(z, stays.codec.encode(o.gt[None], o.lq[None]))
    assert torch.equal(visits.codec.decode(z, o.lq[None]), stays.codec.decode(z, o.lq[None]))
    assert moves == ["cpu:0", "cpu"]*2 and fingerprint(stays) == fingerprint(visits)


def test_hub_name_offline(monkeypatch):
    "A name on the Hub that cannot be reached says so, and is not searched for ever"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BackboneError, match="owner/none"): load_backbone("owner/none")


def test_out_of_memory(folders, tmp_path):
    def loss(step, part): raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(DoesNotFit, match="step 0 .*checkpointing.*adamw_8bit.*2.00 GiB"):
        fit(SimpleNamespace(net=torch.nn.Linear(2, 2)), loss, Loop(steps=2), tmp_path)


def test_eight_bits(tmp_path):
    "The 8-bit optimiser trains, and its states are bytes"
    from bitsandbytes.optim import AdamW8bit
    owner, seen = SimpleNamespace(net=torch.nn.Linear(64, 128)), []
    def loss(step, part):
        seen.extend(o for o in gc.get_objects() if isinstance(o, AdamW8bit) and step == 4)
        return owner.net(torch.ones(4, 64)).square().mean(1), {}
    loop = Loop(steps=5, lr=1e-2, warmup=1, log_every=1, save_every=5, optimiser="adamw_8bit")
    _, log = fit(owner, loss, loop, tmp_path)
    assert log.loss.iloc[-1] < log.loss.iloc[0]
    assert any(s["state1"].dtype == torch.uint8 for o in seen for s in o.state.values())
    with pytest.raises(ValueError, match="optimiser.*'sgd'.*adamw, adamw_8bit"): Loop(optimiser="sgd")


def test_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="path of pixels"): load_backbone(folders["sd"], path=Shift())
    tiny = dict(backbone=str(folders["sd"]), control=str(folders["sd-control"]), patch=64, size=64)
    for name, change, named in (("a", dict(guidance=2.), "small"), ("b", tiny | dict(size=72), "size.*16.*72"),
                                ("c", tiny | dict(patch=56), "patch.*16.*56")):
        run = fill(Run(str(tmp_path/name), DP2O), change)
        with pytest.raises(ValueError, match=named): align(run)
        assert not (tmp_path/name).exists()
    (tmp_path/"p.json").write_text("[1]")
    with pytest.raises(ValueError, match="prompts.*p.json"): Data(prompts=str(tmp_path/"p.json"))
    with pytest.raises(FileNotFoundError, match="prompts.*q.json"): Data(prompts=str(tmp_path/"q.json"))


def test_v_prediction(folders, tmp_path):
    "SD2.1's prediction type is read from its scheduler; the sample differs from that of noise prediction"
    a, b = (load_backbone(write_tiny("sd", tmp_path/p, prediction=p)) for p in ("epsilon", "v_prediction"))
    lq = quantize(torch.rand(1, 3, 16, 16, generator=generator(0)))
    assert type(b.path).__name__ == "SDV" and (a.sample(lq, [0], 3)-b.sample(lq, [0], 3)).abs().max() > .02


def test_fingerprint_by_files(folders, tmp_path, monkeypatch):
    "A second start hashes no weight of the base and reads no file; what differs from the files is hashed from memory"
    hashed, read, no_notes = [], [], shutil.ignore_patterns(".*")
    for n in ("sd", "sd-control"): shutil.copytree(folders[n], tmp_path/n, ignore=no_notes)
    def load(source=tmp_path/"sd", **options):
        return load_backbone(source, BackboneOptions(control=str(tmp_path/"sd-control"), **options))
    raw, file_digest = backbones._raw, hashlib.file_digest
    monkeypatch.setattr(backbones, "_raw", lambda p: hashed.append(tuple(p.shape)) or raw(p))
    monkeypatch.setattr(hashlib, "file_digest", lambda f, how: read.append(f.name) or file_digest(f, how))
    first = fingerprint(load())
    assert not hashed and [Path(o).parent.name for o in read] == ["text_encoder", "vae", "unet", "sd-control"]
    read.clear()
    policy = load()
    assert fingerprint(policy) == first and not hashed and not read
    policy.add_lora(2)
    adapted = fingerprint(policy)
    assert adapted != first and not read
    assert len(hashed) == sum("lora_" in n for n in policy.net.state_dict()) > 0
    with torch.no_grad(): next(p for n, p in policy.net.named_parameters() if "lora_B" in n).add_(1.)
    assert fingerprint(policy) not in (first, adapted)
    assert fingerprint(load(shutil.copytree(tmp_path/"sd", tmp_path/"copy"))) == first # the folder's name counts not
    assert fingerprint(load(guidance=2.)) != first


@pytest.mark.parametrize("change", [
    lambda p: p.net.unet.conv_in.weight.data[3, 2, 1].add_(1e-3), # `.data` leaves the version of a tensor alone
    lambda p: p.net.unet.conv_out.weight.data.copy_(p.net.unet.conv_out.weight.flip(3)), # the same numbers
    lambda p: p.net.unet.conv_in.weight.data[0, 0, 0, 1].neg_() and p.net.unet.conv_in.weight.data[1, 0, 0, 0].neg_(),
    lambda p: put(p.net, {"controlnet.conv_in.bias": torch.ones(8)}),
    lambda p: setattr(p.net.controlnet, "conv_in", torch.nn.Conv2d(4, 8, 3)),
    lambda p: p.add_copy("controlnet"),
], ids=["data", "flipped", "signs", "put", "layer", "copy"])
def test_changed_weights_are_not_the_files(folders, change):
    "Weights that differ from the files never get the files' fingerprint, and get it again once they are put back"
    policy = backbone(folders, "sd")
    first, held = fingerprint(policy), {n: p.clone() for n, p in policy.net.state_dict().items()}
    change(policy)
    assert fingerprint(policy) != first
    if policy.net.state_dict().keys() == held.keys():
        policy.net.load_state_dict(held)
        assert fingerprint(policy) == first


def test_changed_file(folders, tmp_path):
    "A file that was changed in place has another fingerprint, and a policy that was read before is hashed from memory"
    source = shutil.copytree(folders["flux"], tmp_path/"flux")
    file = source/"transformer"/"diffusion_pytorch_model.safetensors"
    policy = load_backbone(source)
    first = fingerprint(policy)
    state = load_file(file)
    state["x_embedder.bias"] += 1.
    save_file(state, file, dict(format="pt"))
    after = fingerprint(load_backbone(source))
    assert after != first and fingerprint(policy) not in ("", after)


def test_what_the_files_were_turned_into(folders):
    "Weights of one file in two types have two fingerprints, whatever else the policy says of itself"
    policy = backbone(folders, "sd")
    first, files = fingerprint(policy), {"unet.": [f for f in policy.weights.files if f.parent.name == "unet"]}
    policy.weights = backbones.weights_of(policy.net, files)
    whole = fingerprint(policy) # the branch is hashed from memory
    policy.net.unet.half()
    policy.weights = backbones.weights_of(policy.net, files)
    assert len({first, whole, fingerprint(policy)}) == 3


@pytest.mark.parametrize("beside", [True, False])
def test_note_of_a_digest(tmp_path, monkeypatch, beside):
    "It lies beside the file, or in the Hub's cache where nothing can be written there; a damaged one is made anew"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path/"cache"))
    file, note = tmp_path/"a.safetensors", tmp_path/".a.safetensors.json"
    file.write_bytes(b"weights")
    if not beside: note.mkdir() # nothing can take its place
    first = backbones.file_digest(file)
    note = note if beside else next((tmp_path/"cache"/"srnb").iterdir())
    assert json.loads(note.read_text()) == dict(stamp=backbones._stamp(file), digest=first)
    note.write_text('{"stamp": ')
    assert backbones.file_digest(file) == first == json.loads(note.read_text())["digest"]
    file.write_bytes(b"others!")
    assert backbones.file_digest(file) != first


def test_weight_files(tmp_path, monkeypatch):
    "Local, one file, of a variant, or a name on the Hub that lies in the cache; none if they cannot be told"
    unet = tmp_path/"hub"/"models--owner--name"/"snapshots"/"1"/"unet"
    unet.mkdir(parents=True)
    names = ["config.json", *(f"w{v}-0000{k}-of-00002.safetensors" for v in ("", ".fp16") for k in (1, 2))]
    for n in names: (unet/n).touch()
    (unet.parents[2]/"refs").mkdir()
    (unet.parents[2]/"refs"/"main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path/"hub"))
    def found(*args): return [f.name for f in backbones.weight_files(*args)]
    assert found(unet.parent, "unet") == found("owner/name", "unet") == names[1:3] == found("owner/name@main", "unet")
    assert found("owner/name@other", "unet") == []
    assert found(unet.parent, "unet", "fp16") == found("owner/name", "unet", "fp16") == names[3:]
    assert found(unet/names[1]) == names[1:2] and found("owner/other", "unet") == found(tmp_path/"none") == []


def test_a_small_change_of_a_bfloat16_branch_is_written_whole(folders, tmp_path):
    "LoRA is merged in float32: bfloat16 would round a change of one in ten thousand away"
    options = BackboneOptions(control=str(folders["sd-control"]), train="control")
    policy = load_backbone(folders["sd"], options, dtype=torch.bfloat16)
    for p in policy.add_lora(2): p.data.add_(2e-4*torch.randn(p.shape, generator=generator(1)))
    layers = [(n, m) for n, m in policy.net.named_modules() if hasattr(m, "lora_A")]
    written = load_file(backbones.save_control(policy, tmp_path/"control")/"diffusion_pytorch_model.safetensors")
    assert layers and all(o.dtype == torch.float32 for o in written.values())
    for name, layer in layers:
        change = layer.get_delta_weight("policy").detach().float()
        found = written[name.partition("controlnet.")[2] + ".weight"] - layer.get_base_layer().weight.float()
        assert (found-change).norm() < 1e-2*change.norm()


def test_an_adapter_says_what_differs_under_the_same_name(folders, tmp_path):
    policy = backbone(folders, "sd")
    policy.add_lora(2)
    save_adapter(policy, tmp_path/"adapter")
    with pytest.raises(ValueError, match="control branch in options.control.*same name"):
        load_adapter(load_backbone(folders["sd"]), tmp_path/"adapter")


def changed_encoder(source):
    file = next((source/"text_encoder").glob("*.safetensors"))
    state = load_file(file)
    save_file(state | {n: 1.1*p for n, p in state.items() if "embed" in n}, file, dict(format="pt"))


def changed_config(source, part, **change):
    file = source/part/"config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize("change", [
    changed_encoder, lambda o: (o/"tokenizer"/"more.json").write_text("{}"),
    lambda o: changed_config(o, "unet", norm_eps=1e-3), lambda o: changed_config(o, "vae", scaling_factor=.2),
], ids=["encoder", "tokenizer", "unet", "vae"])
def test_every_part_of_a_base_is_in_its_fingerprints(folders, tmp_path, change):
    "Text encoders, tokenizers and the parts' configs decide samples, too"
    source = shutil.copytree(folders["sd"], tmp_path/"sd", ignore=shutil.ignore_patterns(".*"))
    def prints(o): return [f(load_backbone(o)) for f in (fingerprint, base_print)]
    before = prints(source)
    assert before == prints(folders["sd"])
    change(source)
    assert all(a != b for a, b in zip(before, prints(source), strict=True))


def test_encoders_of_a_name_on_the_hub(folders, tmp_path, monkeypatch):
    "A name on the Hub has the digest of a folder with the same files"
    top = tmp_path/"models--owner--name"
    snapshot = shutil.copytree(folders["sd"], top/"snapshots"/"1", ignore=shutil.ignore_patterns(".*"))
    (top/"refs").mkdir()
    (top/"refs"/"main").write_text("1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    first = backbones._encoders("owner/name")
    assert first == backbones._encoders("owner/name@main") == backbones._encoders(str(folders["sd"]))
    changed_encoder(snapshot)
    assert backbones._encoders("owner/name") != first


def test_settings_and_vae_changed_in_memory_are_seen(folders):
    policy = backbone(folders, "sd")
    first = fingerprint(policy)
    def told(owner, name, value):
        before = getattr(owner, name)
        setattr(owner, name, value)
        found = fingerprint(policy)
        setattr(owner, name, before)
        return found
    weight = policy.codec.vae.decoder.conv_in.weight
    held = weight.clone()
    weight.data.mul_(1.01)
    vae = fingerprint(policy)
    weight.data.copy_(held)
    policy.add_lora(2)
    adapted = fingerprint(policy)
    inside = policy.net.base_model.model
    assert told(inside, "control_scale", .5) != adapted and told(policy, "guidance", 1.) != adapted
    assert vae != first and fingerprint(policy) == adapted


def test_options_without_sense_or_effect_are_refused(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for wrong, named in ((dict(max_tokens=0), "max_tokens.*at least 1"), (dict(guidance=-1.), "guidance.*0 or more"),
                         (dict(guidance=math.nan), "guidance.*0 or more"),
                         (dict(control_scale=math.nan), "control_scale.*finite"),
                         (dict(negative="a house", guidance=1.), "negative.*guidance 1")):
        with pytest.raises(ValueError, match=named): BackboneOptions(**wrong)
    file, none = tmp_path/"file", str(tmp_path/"none")
    file.touch()
    for kind, wrong, named in (("flux", dict(negative="a house"), "leave options.negative out"),
                               ("sd", dict(max_tokens=64), "leave options.max_tokens out"),
                               ("sd", dict(control=none), f"options.control: there is no folder or file {none}"),
                               ("sd", dict(control="no/folder"), r"no/folder.*of options.control \(there is no such"),
                               ("sd", dict(texts=str(file)), "options.texts.*is a file"),
                               ("sd", dict(variant="fp16"), "options.variant = 'fp16'")):
        with pytest.raises(BackboneError, match=named): load_backbone(folders[kind], BackboneOptions(**wrong))
