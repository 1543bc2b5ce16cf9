"What a run holds, loads, encodes and samples, in counts: no more than it trains on"
import json
import os
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

import srnb.runs
from srnb.align import (ASASR, DP2O, DPO, DRO, SFT, Adversary, Bottom, Expert, Method, Own, Photograph, Run, Samples,
                        Start, Top, Work, align, cost)
from srnb.backbones import NEGATIVE, BackboneOptions, LatentCodec, load_backbone, write_tiny, write_tiny_control
from srnb.core import generator, read_run, to_bytes
from srnb.curation import Group, bank_bounds, fingerprint, group_seeds, make_outputs, read_group, score_bank
from srnb.data import embedded_photos
from srnb.nets import SmallUNet, UNetConfig
from srnb.pairs import Hinge, Logistic, Pairs, draw_loss, draw_pairs, draw_winners, row_backward
from srnb.plan import SD2
from srnb.policies import Policy, drop_adapters, load_adapter, text_ids
from srnb.rewards import OFFLINE_NR, GlobalBounds
from srnb.runs import Base, Data, Judging, add_trained, policy_of
from srnb.spectral import SobolevEnergy
from srnb.train import plans_of
from srnb.training import Loop


def held(make):
    "What a call gives, and the most bytes of tensors that it held at a time"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: result = make()
    live, most = 0, 0
    for e in sorted(seen.profiler.kineto_results.events(), key=lambda o: o.start_ns()):
        if e.name() == "[memory]":
            live += e.nbytes()
            most = max(most, live)
    return result, most


def kept_of(result):
    "Bytes of the storages behind pairs or groups, each once"
    parts = [*result.lq, *result.winners, *result.losers] if isinstance(result, Pairs) else [
        o for g in getattr(result, "held", result) for o in (g.lq, g.gt, g.sr)]
    return sum({o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in parts}.values())


# ---------------------------------------------------------------- pairs, group by group

GROUPS, M, SIZE = 64, 16, 256


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    "A bank of 64 groups of 16 candidates of 256 x 256: one file of random bytes under 64 names"
    g, top, ids = generator(0), tmp_path_factory.mktemp("bank"), [f"p{k}" for k in range(GROUPS)]
    def images(*shape): return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).float().div(255)
    pictures = images(M, 3, SIZE, SIZE)
    inputs = [("p0", images(3, SIZE//4, SIZE//4), images(3, SIZE, SIZE))]
    folder = make_outputs(top/"bank", {str(k): lambda lq, k=k: pictures[k:k+1] for k in range(M)}, inputs)
    for i in ids[1:]: os.link(folder/"groups"/"p0.safetensors", folder/"groups"/f"{i}.safetensors")
    return folder, [(i, *inputs[0][1:]) for i in ids]


class OfBank(Work):
    "A run at work on a bank that is there, with rewards that differ from group to group"
    def __init__(self, folder, inputs, **method):
        run = Run("x", replace(DP2O, **method), Data(size=SIZE), Base(precision="no"), Judging(m=M))
        policy = Policy(SmallUNet(UNetConfig((16, 16), (1, 1), 16, 16, 1)))
        super().__init__(run, policy, inputs, inputs[:1])
        self.folder, self.reward = folder, torch.rand(len(inputs), M, generator=generator(1))
    @property
    def bank(self): return self.folder
    def rewards(self, frozen=False): return self.reward


OWN = dict(losers=Own(), link=Hinge(.01))
CHOICES = dict(bottom={}, samples=dict(winners=Photograph(), losers=Samples()), top=OWN | dict(winners=Top(4)),
               expert=OWN | dict(winners=Expert(4)))


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_held_while_pictures_of_a_bank_are_chosen(bank, choice):
    """What stays is bytes of the chosen pictures; beside it there is never more than 1.2 times one group. As images of
    the whole bank it was a hundred times as much"""
    folder, inputs = bank
    work = OfBank(folder, inputs if choice != "samples" else inputs[:8], **CHOICES[choice])
    losers = work.run.method.losers
    make = losers.chosen if hasattr(losers, "chosen") else work.run.method.winners.groups
    result, most = held(lambda: make(work))
    group, kept = M*3*SIZE**2, kept_of(result)
    assert kept < len(work.crops)*(M+3)*3*SIZE**2 and most-kept < 1.2*group, f"{(most-kept)/group:.2f} groups"
    assert all(o.dtype == torch.uint8 for o in getattr(result, "winners", ()))
    best = work.reward[3].argsort(descending=True, stable=True)
    stored = to_bytes(next(iter(work.samples())).sr)
    if isinstance(result, Pairs) and choice != "samples":
        assert torch.equal(result.winners[3], stored[best[:4]]) and torch.equal(result.losers[3], stored[best[-4:]])
    if not isinstance(result, Pairs): assert torch.equal(to_bytes(result[3].sr[-4:]), stored[best[:4]])


def test_photographs_of_a_run_are_bytes(bank):
    "As many bytes as the files' pixels have; a draw takes one group after the other"
    folder, inputs = bank
    work = OfBank(folder, inputs[:8])
    pixels = sum(lq.numel()+gt.numel() for _, lq, gt in inputs[:8])
    assert kept_of(work.crops) == pixels
    crops, most = held(lambda: draw_winners(work.crops, work.policy, 1, 32, 0))
    assert most < 4*4*pixels/8 # of one group: picture and winner as images, and one on its way
    images = [Group(i, lq, gt, gt[None]) for i, lq, gt in inputs[:8]]
    assert torch.equal(crops.z, draw_winners(images, work.policy, 1, 32, 0).z)


# ---------------------------------------------------------------- one base, one encoding of each prompt

KINDS = ("sd", "sdxl", "flux")
FEW = Loop(steps=2, lr=1e-2, warmup=1, log_every=1, save_every=1, keep_every=1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Random pipelines, and `<kind>-control`, random control branches"
    top = tmp_path_factory.mktemp("backbones")
    for kind in KINDS: write_tiny_control(load_backbone(write_tiny(kind, top/kind)), top/f"{kind}-control")
    return {n: top/n for k in KINDS for n in (k, f"{k}-control")}


@pytest.fixture
def counted(monkeypatch):
    "Bases that are loaded, prompts that are encoded, pictures that a VAE encodes, and pictures that are sampled"
    loads, prompts, pictures, sampled = [], [], [], []
    real, sample, latents = srnb.runs.load_backbone, Policy.sample, LatentCodec.latents
    monkeypatch.setattr(srnb.runs, "load_backbone", lambda *a, **k: loads.append(a[0]) or real(*a, **k))
    for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline, FluxPipeline):
        def encode(self, prompt, *a, encode=kind.encode_prompt, **k):
            prompts.append(prompt)
            return encode(self, prompt, *a, **k)
        monkeypatch.setattr(kind, "encode_prompt", encode)
    monkeypatch.setattr(LatentCodec, "latents", lambda self, o: pictures.append(len(o)) or latents(self, o))
    monkeypatch.setattr(Policy, "sample", lambda self, *a, **k: sampled.append(1) or sample(self, *a, **k))
    return SimpleNamespace(loads=loads, prompts=prompts, pictures=pictures, sampled=sampled)


def run_of(folders, kind, method, out, train="base", **change):
    "A run on a random pipeline with prompts, two crops and two held-out photographs"
    crops, held_out = (embedded_photos(o)[:2] for o in ("train", "held_out"))
    told = {o.id: f"{o.id} as a photograph" for o in (*crops, *held_out)}
    (out.parent/"prompts.json").write_text(json.dumps(told))
    options = BackboneOptions(control=str(folders[f"{kind}-control"]), train=train)
    data = Data(size=64, places=1, take=2, prompts=str(out.parent/"prompts.json"))
    base = Base(str(folders[kind]), precision="no", sample_steps=1, options=options)
    judging = Judging(None, m=2, judges=("psnr_y",), eval_m=1)
    if train != "whole": change = dict(rank=2) | change
    return Run(str(out), method, data, base, judging, FEW, batch=1, patch=64, **change), set(told.values())


SMALL_LOOP = Loop(steps=1, lr=1e-2, warmup=1, log_every=1, save_every=1)
ASASR_SMALL = Method(SobolevEnergy(1.5), Photograph(), Adversary(("bicubic", "base"), 2, imitation=SMALL_LOOP),
                     Logistic(10.), Start(SMALL_LOOP))
METHODS = dict(asasr=ASASR_SMALL, dpo=Method(losers=Samples(), link=Logistic(10.)),
               dro=Method(losers=Own(1, 2, 2, 2), link=Hinge(.01)))


SLOW = pytest.mark.slow

@pytest.mark.parametrize("kind, method, train", [
    ("sd", "asasr", "base"), pytest.param("sdxl", "dpo", "whole", marks=pytest.mark.repeat),
    pytest.param("flux", "dro", "control", marks=SLOW)])
def test_one_load_and_one_encoding(folders, counted, tmp_path, kind, method, train):
    "With a start, an adversary, samples after and at the matched copy: the base is read once, and each prompt"
    run, told = run_of(folders, kind, METHODS[method], tmp_path/"out", train, drift=1e-9)
    out = align(run)
    assert counted.loads == [str(folders[kind])]
    assert sorted(counted.prompts) == sorted({"", *told} | ({NEGATIVE} if kind != "flux" else set()))
    if kind != "flux": # whose inputs are latents, too
        assert sum(counted.pictures) == len(list((out/"latents").iterdir()))
    policy = policy_of(run.base, run.data.prompts, texts=out/"texts") # read anew, it gives what the run sampled
    found = read_group(out/"bank-after", (i := embedded_photos("held_out")[0].id))
    seeds = group_seeds(i, 1)
    def sample():
        return run.base.colour.images(policy.sample(found.lq[None], seeds, 1, prompts=[found.prompt])[0], found.lq,
                                      policy.codec)
    load_adapter(policy, out/"adapter")
    assert (sample()-found.sr).abs().max() < 1.5/255 and (sample()-read_group(out/"before", i).sr).abs().max() > 0


@pytest.mark.parametrize("train", ["base", "control", "whole"])
def test_nothing_of_an_adapter_is_left(folders, train):
    "Taken off, adapters leave the base bit for bit, by the fingerprint of all its weights"
    options = BackboneOptions(control=str(folders["flux-control"]), train=train)
    policy = load_backbone(folders["flux"], options)
    policy.weights = None # every weight is hashed
    before, names = fingerprint(policy), [n for n, _ in policy.net.named_modules()]
    for again in range(2):
        if train != "whole": policy.add_lora(2, name="reference")
        add_trained(policy, options, 2, seed=again)
        policy.off |= {"snapshot"}
        with torch.no_grad():
            for p in policy.net.parameters():
                if p.requires_grad: p.add_(torch.randn(p.shape, generator=generator(again)))
        assert fingerprint(policy) != before
        drop_adapters(policy)
        assert fingerprint(policy) == before and [n for n, _ in policy.net.named_modules()] == names
        assert not policy.adapters and not policy.off


@SLOW
def test_prompts_and_pictures_are_encoded_once_for_all_runs(folders, counted, tmp_path):
    "Of every method: what one run has encoded lies in the folder that runs share, in half precision"
    banks, told = tmp_path/"banks", set()
    for name, method in METHODS.items():
        run, told = run_of(folders, "sd", method, tmp_path/name, drift=1e-9, banks=str(banks))
        align(run)
        assert sorted(counted.prompts) == sorted({"", NEGATIVE, *told})
        assert sum(counted.pictures) == len(list((banks/"latents").iterdir())) # of outputs, winners and losers
    files = [f for o in ("latents", "texts") for f in (banks/o).iterdir()]
    assert len(files) > 6+len(told) and {o.dtype for f in files for o in load_file(f).values()} == {torch.float16}


def test_other_encoders_in_the_same_place_are_asked_anew(folders, counted, tmp_path):
    "A base that was written over another one does not get the other's prompts"
    base, texts = write_tiny("sd", tmp_path/"sd"), str(tmp_path/"texts")
    def told():
        policy = load_backbone(base, BackboneOptions(texts=texts), prompts=["a tree"])
        return policy.texts(text_ids(["a tree"]))[0]
    first, again = told(), told()
    assert torch.equal(first, again) and counted.prompts.count("a tree") == 1
    shutil.rmtree(base)
    write_tiny("sd", base, seed=1)
    assert not torch.equal(first, told()) and counted.prompts.count("a tree") == 2


# ---------------------------------------------------------------- no more samples than a method trains on

def of_small(tiny, out, method, **judging):
    told = dict(reward="offline_nr", judges=("psnr_y",), eval_m=2) | judging
    return Run(str(out), method, Data(size=64, places=1, take=2), Base(str(tiny), precision="no", sample_steps=1),
               Judging(**told), FEW, rank=2, batch=2, patch=32)


@pytest.mark.parametrize("method", [
    METHODS["dro"], pytest.param(Method(), marks=pytest.mark.repeat), pytest.param(ASASR_SMALL, marks=SLOW)],
    ids=["dro", "sft", "asasr"])
def test_no_samples_that_nobody_trains_on(tiny, drawn, tmp_path, method):
    """The reward's scale is that of the held-out samples before: two photographs are sampled, twice. With M said, the
    training crops are, too, and the adapter stays the same bit for bit"""
    few = align(of_small(tiny, tmp_path/"few", method))
    own = 2*isinstance(method.losers, Adversary) # outputs of the base, which the adversary imitates
    assert len(drawn) == 2*2+own and not (few/"bank").exists()
    scores = score_bank(few/"before", OFFLINE_NR.metrics)
    assert GlobalBounds.load(few/"bounds.json") == bank_bounds(scores, OFFLINE_NR)
    metrics = read_run(few)[1]
    rewards = metrics[(metrics.variant == "before") & (metrics.metric == "reward")].value
    assert rewards.min() == 0 and rewards.max() == 1 # one metric: the best and the worst of these samples
    drawn.clear()
    said = align(of_small(tiny, tmp_path/"said", method, m=3))
    assert len(drawn) == 2*3+own and GlobalBounds.load(said/"bounds.json") == bank_bounds(
        score_bank(said/"bank", OFFLINE_NR.metrics), OFFLINE_NR)
    a, b = (load_file(o/"adapter"/"adapter_model.safetensors") for o in (few, said))
    assert all(torch.equal(a[n], b[n]) for n in a)


def test_who_needs_samples_has_eight():
    "Of every training crop, if M is not said; who needs none has none"
    assert {n: Run("x", m).m for n, m in dict(dp2o=DP2O, dpo=DPO, dro=DRO, asasr=ASASR, sft=SFT).items()} == dict(
        dp2o=8, dpo=8, dro=0, asasr=0, sft=0)
    assert Run("x", DRO, judging=Judging(m=4)).m == 4 and Run("x", DRO, judging=Judging(None, m=4)).m == 0


# ---------------------------------------------------------------- a few states at a time

@pytest.mark.parametrize("method", [
    Method(winners=Top(2), losers=Bottom(), link=Logistic(10.)),
    pytest.param(replace(METHODS["dro"], losers=Own(2, 4, 2, 2)), marks=SLOW),
    Method(SobolevEnergy(1.5), Top(2), Bottom(), Hinge(1.), safeguard=True),
    pytest.param(Method(link=Hinge(.01)), marks=pytest.mark.repeat)],
    ids=["hpo", "own", "safeguard", "gated"])
def test_rows(tiny, tmp_path, method):
    "A run in pieces of three states ends where one in whole batches does, to rounding; its evaluations are counted"
    one = replace(of_small(tiny, tmp_path/"one", method, m=4), loop=replace(FEW, lr=1e-3, parts=2))
    rows = replace(one, out=str(tmp_path/"rows"), rows=3)
    a, b = (align(o) for o in (one, rows))
    logs = [pd.read_parquet(o/"log.parquet") for o in (a, b)]
    assert list(logs[0]) == list(logs[1])
    for n in logs[0]: assert logs[1][n].tolist() == pytest.approx(logs[0][n].tolist(), rel=2e-3, abs=1e-5), n
    x, y = (load_file(o/"adapter"/"adapter_model.safetensors") for o in (a, b))
    moved = torch.cat([o.flatten() for n, o in x.items() if "lora_B" in n])
    apart = moved-torch.cat([o.flatten() for n, o in y.items() if "lora_B" in n])
    assert moved.abs().max() > 1e-4 and apart.norm() < .05*moved.norm()
    states = one.method.losers.states(one)/4 # a forward more of each; with the safeguard one backward less
    assert cost(rows, 2, 1)[1]-cost(one, 2, 1)[1] == (-states if method.safeguard else states)


def test_rows_hold_less(folders):
    "One group of 2N states on a backbone: autograd keeps a fourth of the bytes with a fourth of the states"
    policy = load_backbone(folders["flux"], BackboneOptions(control=str(folders["flux-control"])), prompts=["a tree"])
    policy.add_lora(2)
    def images(*shape): return torch.randint(0, 256, shape, generator=generator(0), dtype=torch.uint8)
    pairs = Pairs([images(3, 16, 16)], [images(4, 3, 64, 64)], [images(4, 3, 64, 64)], torch.ones(1, 4, 4))
    weights, live, peaks = {p.data_ptr() for p in policy.net.parameters()}, [0], {}
    class Kept: # a tensor saved for the backward
        def __init__(self, tensor):
            self.tensor, self.bytes = tensor, 0 if tensor.data_ptr() in weights else tensor.nbytes
            live[0] += self.bytes
            peaks[rows] = max(peaks.get(rows, 0), live[0])
        def __del__(self): live[0] -= self.bytes
    for rows in (0, 2):
        loss = draw_loss(lambda step, part: draw_pairs(pairs, policy, 1, 64, 0), policy, Logistic(10.), rows=rows)
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda o: o.tensor):
            values, logs, *apart = loss(0, 0)
            if rows: row_backward(rows)(values, logs, *apart)
            else: values.mean().backward()
        del values, logs, apart
    assert peaks[2] < 1.1*peaks[0]/4


def test_rows_bad_input(tiny, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="Run.rows must be at least 0, got -1"): Run("x", rows=-1)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP cuts into pieces"):
        align(replace(of_small(tiny, tmp_path/"run", Method(winners=Top(1), losers=Bottom(), link=Logistic())), rows=2))
    assert not (tmp_path/"run").exists()


def test_plan_of_rows():
    "A plan counts the states that are held at once, and samples of training crops if there are any"
    run = Run("x", DP2O, base=Base("owner/name", precision="bf16"), judging=Judging(m=16), patch=128)
    (_, whole), (sampling, pieces) = plans_of(run, SD2), plans_of(replace(run, rows=4), SD2)
    assert whole.batch*2 == 64 and pieces.batch == 4 and pieces.bytes < whole.bytes/2
    few, _ = plans_of(Run("x", DRO, base=run.base, judging=Judging(eval_m=1)), SD2)
    assert sampling.batch == 8 and few.batch == 1
