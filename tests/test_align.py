"Four choices, one run: fresh and stale losers, pairs by hand, every combination, killed and resumed, bad input"
import gc
import json
import math
import random
import signal
import weakref
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import get_args

import pandas as pd
import pytest
import torch
from conftest import same_result
from forks import cut
from safetensors.torch import load_file

import srnb.align
import srnb.pairs
import srnb.train
from srnb import rewards
from srnb.align import (Adversary, Bottom, Candidates, Expert, Fresh, Given, Made, Method, Nobody, Own, Photograph,
                        Preferred, Rated, Riesz, Run, Samples, Top, Voted, Work, align, cost)
from srnb.config import fill, record
from srnb.core import RunOccupied, generator, read_run, run_done, write_image
from srnb.curation import Group, finished_groups, read_group
from srnb.data import embedded_photos, make_pair
from srnb.degrade import RESSHIFT_TEST
from srnb.pairs import Draw, Hinge, Logistic, OnlineDraw, draw_loss, split_backward
from srnb.nets import OneStepConfig, OneStepUNet
from srnb.paths import Shift
from srnb.policies import PixelCodec, Policy, from_pretrained, save_pretrained
from srnb.rated import CRD, DGPO, NFT
from srnb.rewards import Metric, Reward
from srnb.runs import Base, Data, Judging, policy_of
from srnb.spectral import SobolevEnergy, l2_energy
from srnb.training import Loop, latest_checkpoint

FEW = Loop(steps=4, lr=1e-3, warmup=2, save_every=2, log_every=1)


# ---------------------------------------------------------------- fixture 10, and pairs by hand

@pytest.fixture(scope="module")
def shipped():
    "The shipped network in eval mode and float32, with a snapshot and a policy, and three photographs"
    policy = from_pretrained("small")
    policy.add_lora(4, name="snapshot")
    policy.off = {"snapshot"}
    policy.add_lora(4)
    policy.net.eval()
    pairs = [(p.id, *make_pair(p, 192, RESSHIFT_TEST)) for p in embedded_photos("train")[:3]]
    return policy, [Group(i, lq, gt, gt[None]) for i, lq, gt in pairs]


def move(policy, seed, by):
    with torch.no_grad():
        for k, layer in enumerate(policy._layers):
            b = layer.lora_B["policy"].weight
            b.add_(by*torch.randn(b.shape, generator=generator(100*seed+k)))


@pytest.mark.parametrize("energy, link", [pytest.param(l2_energy, Hinge(1.), marks=pytest.mark.repeat),
                                          (SobolevEnergy(1.5), Logistic(1.))], ids=["l2-hinge", "sobolev-logistic"])
def test_fixture_10(shipped, energy, link):
    """M = 1 and a fresh buffer: the losers' gradient is under 1e-6 of the experts'. One that saw an older policy has a
    gradient, over 1e-3"""
    # 8 states are predicted at once, when they are made and when they are trained: other kernels for smaller batches
    # round differently, 1e-6 to 4e-6
    policy, groups = shipped
    def ratio(draw, step):
        loss, backward = draw_loss(draw, policy, link, energy), split_backward(policy, safeguard=False)
        logs = backward(*loss(step, 0))
        policy.net.zero_grad()
        return logs["norm_l"]/logs["norm_w"]
    def draw(**change):
        few = dict(n=4, patch=32, seed=0, cells=3, every=1, capacity=8, refresh=8)
        return OnlineDraw(groups, policy, **(few | change))
    for layer in policy._layers: torch.nn.init.zeros_(layer.lora_B["policy"].weight)
    move(policy, 1, .02)
    assert ratio(draw(), 0) < 1e-6
    old, long = draw(every=2), draw(capacity=16)
    assert max(ratio(old, 0), ratio(long, 0)) < 1e-6
    move(policy, 2, .02)
    assert min(ratio(old, 1), ratio(long, 1)) > 1e-3 # an older snapshot; fresh rows beside older ones
    assert ratio(old, 2) < 1e-6 # the next snapshot
    d = old(3, 0)
    level = d.sigma[::2, None, None, None]
    assert torch.equal(d.sigma[::2], d.sigma[1::2]) and torch.equal(d.cond[::2], d.cond[1::2])
    assert d.sigma.unique().numel() == 4
    # the expert's state, level and input belong together: the photograph of a trajectory
    for z, y in zip(d.x[::2]-level*d.target[::2], d.cond[::2, :3], strict=True):
        k = (old.buffer["0.z"]-z).abs().amax((1, 2, 3)).argmin()
        assert (old.buffer["0.z"][k]-z).abs().max() < 1e-5
        assert torch.allclose(policy.codec.upsample(old.buffer["0.lq"][k:k+1])[0]*2-1, y, atol=1e-6)


class OneNumber:
    "A policy that answers `a` everywhere; its reference answers 0"
    def __init__(self, a):
        self.net, self.on = torch.nn.Linear(1, 1, bias=False), True
        self.net.weight.data.fill_(a)

    @contextmanager
    def reference(self):
        self.on = False
        with torch.no_grad(): yield
        self.on = True

    def residual(self, x, sigma, target, cond): return self.on*self.net.weight[0, 0]*torch.ones_like(target) - target


@pytest.mark.parametrize("link, value, slope", [
    # a = 0.1, the winner's target is 1, the loser's -1: gap_w = 0.9^2 - 1 = -0.19, gap_l = 1.1^2 - 1 = 0.21, margin 0.4
    # d margin/da = d gap_l - d gap_w = 2(a+1) - 2(a-1) = 2.2 + 1.8 = 4
    (Hinge(.5), .1, -4.), # 0.5 - 0.4; slope -1 in the margin
    (Hinge(.4-1e-6), 0., 0.), # the margin has reached the gate
    # kappa*margin = 2: ln(1+e^-2) = 0.126928; -5*0.119203*4 = -2.384058
    (Logistic(5.), math.log(1+math.exp(-2)), -20/(1+math.exp(2)))], ids=["hinge", "closed", "logistic"])
def test_pair_by_hand(link, value, slope):
    policy = OneNumber(.1)
    target = torch.tensor([1., -1]).reshape(2, 1, 1, 1) # winner, loser
    def draw(step, part): return Draw(target, torch.zeros(2), target, None, torch.ones(1, 1, 1))
    values, logs, *apart = draw_loss(draw, policy, link)(0, 0)
    logs = split_backward(policy, safeguard=False)(values, logs, *apart)
    assert values.item() == pytest.approx(value, abs=1e-6)
    assert policy.net.weight.grad.item() == pytest.approx(slope, abs=1e-5)
    assert logs["gap_w"] == pytest.approx(-.19, abs=1e-6) and logs["gap_l"] == pytest.approx(.21, abs=1e-6)
    assert logs["norm_w"] == pytest.approx(abs(slope)*1.8/4, abs=1e-5)
    assert logs["norm_l"] == pytest.approx(abs(slope)*2.2/4, abs=1e-5)


# ---------------------------------------------------------------- every combination

SMALL = {Top: Top(1), Expert: Expert(1), Given: Given(("bicubic", "base")), Riesz: Riesz(.05), Own: Own(2, 4, 2, 2),
         Adversary: Adversary(("bicubic", "base"), 3, imitation=FEW), Logistic: Logistic(10.), Hinge: Hinge(.01),
         type(None): None, Candidates: Candidates(2), Fresh: Fresh(2, 1, 1), DGPO: DGPO(10.), CRD: CRD(10.)}
CHOICES = {f.name: [SMALL[k] if k in SMALL else k() for k in get_args(f.type)] for f in fields(Method)}
MEET = {Bottom: {Top}, Samples: {Photograph}, Given: {Photograph}, Adversary: {Photograph}, Riesz: {Photograph},
        Own: {Photograph, Top, Expert}, Nobody: {Photograph, Top, Expert}, Candidates: {Rated},
        Fresh: {Rated}, Voted: {Preferred}} # losers -> winners that they can lose to


def name(o): return type(o).__name__


def fits(*choices):
    try: return Method(SobolevEnergy(0.), *choices)
    except ValueError: return None


ALL = [(w, l, k) for l in CHOICES["losers"] for w in CHOICES["winners"] for k in CHOICES["link"]]
COMBINATIONS = [o for o in ALL if fits(*o)]


@pytest.fixture(scope="module")
def config(tiny):
    return Run("", data=Data(size=64, places=1, take=2), base=Base(str(tiny), precision="no", sample_steps=1),
               judging=Judging("offline_nr", m=2, judges=("psnr_y",), eval_m=2), loop=FEW, rank=2, batch=2, patch=32)


def voted_on(folder):
    "A folder of one vote"
    g = generator(0)
    for name, side in (("lq", 16), ("candidates/x", 64), ("candidates/y", 64)):
        write_image(folder/name/"one.png", torch.rand(3, side, side, generator=g))
    (folder/"votes.csv").write_text("image,winner,loser\none,x,y\n")
    return str(folder)


@pytest.fixture(scope="module")
def banks(tmp_path_factory): return tmp_path_factory.mktemp("banks")/"all"


def test_online_losers_come_from_the_whole_policy(config, tmp_path, banks, monkeypatch):
    "With the adapter that training starts from, and not from the bare base with the snapshot alone"
    seen = []
    real = srnb.pairs.policy_states
    def states(policy, lq, noise, offset, cells, adapters, text):
        seen.append(tuple(adapters))
        return real(policy, lq, noise, offset, cells, adapters, text)
    monkeypatch.setattr(srnb.pairs, "policy_states", states)
    start = srnb.align.Start(replace(FEW, steps=1, save_every=1))
    method = Method(losers=Own(2, 4, 2, 2), link=Hinge(.01), start=start)
    align(replace(config, out=str(tmp_path/"run"), banks=str(banks), method=method))
    assert {*seen} == {("reference", "snapshot")}


def test_combinations():
    links = {Nobody: {Hinge, type(None)}, Candidates: {NFT, DGPO, CRD}, Fresh: {NFT, DGPO, CRD}}
    assert {(type(w), type(l), type(k)) for w, l, k in COMBINATIONS} == {
        (w, l, k) for l, winners in MEET.items() for w in winners for k in links.get(l, {Logistic, Hinge})}


@pytest.mark.parametrize("winners, losers, link", [
    pytest.param(*o, id="-".join(map(name, o)), marks=[pytest.mark.repeat]*isinstance(o[2], DGPO|CRD))
    for o in COMBINATIONS]) # two links beside NFT's, whose choices are the same
def test_every_combination(config, tmp_path, banks, drawn, winners, losers, link):
    "Bank, training within a budget, two ends, metrics; the bank is drawn once for all; a second call does nothing"
    if type(losers) is Voted: losers = Voted(voted_on(tmp_path/"votes"))
    needed = ["bank", "before-2"]
    if isinstance(losers, (Given, Adversary)): needed += ["outputs"]
    if type(losers) is Given: needed += ["held_out_outputs"]
    missing = [n for n in needed if not (banks/n).exists()] # two crops or photographs each
    method = Method(SobolevEnergy(1.5*isinstance(losers, (Adversary, Riesz, Samples))), winners, losers, link)
    run = replace(config, out=str(tmp_path/"run"), banks=str(banks), method=method, drift=1e-9, budget=10**9)
    before, update = cost(run, 2, 1)
    run = replace(run, budget=int(before+3*update)+1)
    out = align(run)
    assert len(drawn) == 2*len(missing) + 4 + 3*isinstance(losers, Fresh) # both ends; a crop at every update
    log, drift, metrics = (pd.read_parquet(out/f"{n}.parquet") for n in ("log", "drift", "metrics"))
    assert log.step.tolist() == [1, 2, 3] and torch.isfinite(torch.tensor(log.to_numpy(dtype="float64"))).all()
    start = {Logistic: math.log(2), Hinge: .01}.get(type(link))
    if start: assert log.loss[0] == pytest.approx(start, abs=1e-6)
    assert ("norm_l" in log) == isinstance(losers, Own) and ("open" in log) == isinstance(link, Hinge)
    assert drift.step.tolist() == [1, 2, 3] and drift.drift[drift.chosen].tolist() == [drift.drift.min()]
    assert drift.drift.min() > 0
    assert set(metrics.variant) == {"before", "after", "matched", "bicubic"}
    for variant in ("before", "after", "matched"):
        rows = metrics[(metrics.variant == variant) & ~metrics.metric.isin(["preference_loss", "accuracy"])]
        assert set(rows.metric) == {"reward", "moved", "spread", "psnr_y", "piqe"}
        assert not rows.duplicated(["image", "seed", "metric"]).any() and rows.value.notna().all()
        assert rows[rows.metric == "reward"].groupby("image").size().tolist() == [2, 2]
        assert (rows.metric == "spread").sum() == 2
    assert ({"preference_loss", "accuracy"} <= set(metrics.metric)) == isinstance(losers, (Given, Adversary, Riesz))
    moved = metrics[metrics.metric == "moved"].groupby("variant").value.max()
    assert moved["after"] > 0
    for folder, step in (("adapter", 3), ("matched-adapter", drift.step[drift.chosen].item())):
        files = out/"kept"/f"{step:08d}.safetensors", out/folder/"adapter_model.safetensors"
        kept, saved = (sorted(v.sum().item() for v in load_file(f).values()) for f in files)
        assert kept == saved
    assert bool(memory(latest_checkpoint(out))) == isinstance(losers, (Own, Fresh))
    drawn.clear()
    assert align(run) == out and not drawn


def test_the_bank_is_the_bases(config, tmp_path, drawn):
    "With a reward or without, whoever comes first: the bank's samples are those of the base without adapters"
    method = Method(losers=Samples(), link=Logistic(10.))
    run = replace(config, banks=str(tmp_path/"banks"), method=method, loop=replace(FEW, steps=1))
    align(fill(run, dict(out=str(tmp_path/"a"), reward=None)))
    assert len(drawn) == 6
    align(replace(run, out=str(tmp_path/"b"))) # the same bank, which says of which policy it is
    assert len(drawn) == 8


def test_the_batch_that_fits_is_kept_for_the_rest_of_a_run(config, tmp_path):
    "The base has what its config says; what was halved since stays so when the base is read again"
    run = fill(config, dict(out=str(tmp_path/"run"), sample_batch=3))
    work = Work(run, policy_of(run.base), [], [])
    assert work.policy.batch == 3
    work.policy.batch = 1
    work.renew()
    assert work.policy.batch == 1


def test_every_candidate_is_scored_once_by_models_that_are_gone_while_training(config, tmp_path, monkeypatch):
    """Under each metric: the bank, both ends, the enlarged inputs. A model is made once before training and once after
    it, computes where the policy does, and is off the device while the bank is drawn"""
    seen, models, fit, parked = {"a": [], "b": []}, [], srnb.align.fit, []
    class Model(torch.nn.Linear):
        def to(self, device):
            self.at = torch.device(device)
            return self
    def metric(name):
        def build():
            model = Model(1, 1)
            models.append(weakref.ref(model))
            def scorer(sr, gt):
                assert rewards._at(model, sr).at == policy_of(config.base).device
                seen[name] += sr.unbind()
                return sr.mean((1, 2, 3)).double()
            return scorer
        return Metric(name, "nr", True, build)
    def trained(*args):
        gc.collect()
        assert len(models) == 2 and not any(o() for o in models)
        return fit(*args)
    monkeypatch.setattr(srnb.align, "park_scorers", lambda: parked.append(len(models)) or rewards.park_scorers())
    monkeypatch.setattr(srnb.align, "fit", trained)
    a, b = metric("a"), metric("b")
    judging = Judging(Reward("both", nr=(a, b)), m=4, judges=(b,), eval_m=2)
    method = Method(winners=Top(1), losers=Bottom(), link=Logistic(10.))
    rewards.drop_scorers()
    align(replace(config, out=str(tmp_path/"run"), method=method, judging=judging))
    assert len(models) == 4 and parked == [2]
    ramp, crops, photographs = 1, 2, 2
    for images in seen.values(): assert len(images) == ramp + crops*4 + photographs*(2+2+1)


def test_safeguard_and_no_drift(config, tmp_path):
    "Top against bottom with the safeguard, no budget, no copies: the last step alone is judged"
    method = Method(winners=Top(1), losers=Bottom(False, False), link=Logistic(10.), safeguard=True)
    out = align(replace(config, out=str(tmp_path/"run"), method=method))
    log, metrics = pd.read_parquet(out/"log.parquet"), read_run(out)[1]
    assert log.step.tolist() == [1, 2, 3, 4] and ((log.safeguard > 0) & (log.safeguard <= 1)).all()
    assert set(metrics.variant) == {"before", "after", "bicubic"}
    assert (out/"before").exists() and (out/"bank").exists()
    assert not any((out/n).exists() for n in ("kept", "drift.parquet", "matched-adapter", "bank-matched"))
    spread = metrics[(metrics.metric == "spread") & (metrics.variant == "after")].set_index("image").value
    assert len(spread) == 2
    for image, value in spread.items(): # two seeds: their standard deviation is half their distance, times root 2
        a, b = read_group(out/"bank-after", image).sr.double()
        assert value == pytest.approx(255*((a-b).square()/2).mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("losers, link", [(Own(2, 4, 2, 2), Hinge(.01)), (Bottom(), Logistic(10.)), (Nobody(), None)],
                         ids=name)
def test_one_step(config, tmp_path, losers, link):
    "A one-step network that heeds its noise goes the same way, with one step of its sampler"
    net, g = OneStepUNet(OneStepConfig((16, 16), (1, 1), 16, 8)), generator(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g)*(.4/p[0].numel()**.5 if p.ndim > 1 else .05))
    save_pretrained(Policy(net, Shift(), Shift(), PixelCodec()), tmp_path/"one")
    run = fill(config, dict(out=str(tmp_path/"run"), backbone=str(tmp_path/"one"), take=1, sample_steps=3))
    method, loop = Method(winners=Top(1), losers=losers, link=link), Loop(steps=2, lr=1e-3, save_every=2, log_every=1)
    out = align(replace(run, method=method, loop=loop))
    log, metrics = pd.read_parquet(out/"log.parquet"), read_run(out)[1]
    assert len(log) == 2 and metrics[(metrics.metric == "moved") & (metrics.variant == "after")].value.max() > 0
    assert "drift" not in log or (log.drift[0] == 0 and log.drift[1] > 0)


def test_one_step_without_noise_ranks_nothing(config, tmp_path):
    run = fill(config, dict(out=str(tmp_path/"run"), backbone="onestep", take=1))
    with pytest.raises(ValueError, match="'onestep' answers without its noise.*a base that samples"):
        align(replace(run, method=Method(winners=Top(1), losers=Bottom(), link=Logistic(10.))))
    assert not (tmp_path/"run").exists()


# ---------------------------------------------------------------- killed and resumed

@pytest.fixture(scope="module")
def dro(config):
    "Own losers from a snapshot of every third update, in a buffer that two micro-batches fill"
    loop = Loop(steps=21, lr=1e-2, warmup=2, save_every=8, log_every=1, keep_every=1)
    return replace(config, method=Method(winners=Expert(1), losers=Own(3, 4, 2, 2), link=Hinge(1.)), batch=4, loop=loop)


@pytest.fixture(scope="module")
def whole(dro, tmp_path_factory):
    "A run that nobody disturbed"
    return align(replace(dro, out=str(tmp_path_factory.mktemp("runs")/"whole")))


def memory(folder): return torch.load(folder/"state.pt")["memory"]


def test_memory(whole):
    "The checkpoint holds the buffer: four rows of each kind, finite and not all alike; its losers had a gradient"
    rows = memory(latest_checkpoint(whole))
    assert {k: tuple(v.shape) for k, v in rows.items()} == {
        "0.x": (4, 2, 3, 32, 32), "0.target": (4, 2, 3, 32, 32), "0.sigma": (4, 2), "0.lq": (4, 3, 8, 8),
        "0.z": (4, 3, 32, 32), "0.text": (4,)}
    for k, v in rows.items(): assert torch.isfinite(v).all() and (k == "0.text" or not torch.equal(v[0], v[2])), k
    log = pd.read_parquet(whole/"log.parquet")
    assert log.norm_l[0] < 1e-6*log.norm_w[0] and (log.norm_l[1:] > 1e-5*log.norm_w[1:]).all()


def test_killed_and_resumed(whole, dro, tmp_path, deadly, monkeypatch):
    """Killed at step 13, neither a checkpoint's (8, 16) nor a snapshot's (12, 15): the result is the same; with a
    buffer that was lost it is not"""
    count, calls, die = deadly
    count(srnb.pairs, "draw_winners")
    a, b = tmp_path/"a", tmp_path/"b"
    for out in (a, b):
        calls["draw_winners"], die["draw_winners"] = 0, 13
        with pytest.raises(KeyboardInterrupt, match="draw_winners"): align(replace(dro, out=str(out)))
        last = latest_checkpoint(out)
        assert last.name == "checkpoint-00000008" and len(memory(last)["0.x"]) == 4
        die.clear()
    same_result(align(replace(dro, out=str(a))), whole)
    assert calls["draw_winners"] == 13+13 # of both: 0 .. 12 | 8 .. 20
    monkeypatch.setattr(OnlineDraw, "restore", lambda self, tensors: None)
    with pytest.raises(AssertionError): same_result(align(replace(dro, out=str(b))), whole)
    logs = [pd.read_parquet(o/"log.parquet") for o in (whole, b)]
    assert logs[0][:8].equals(logs[1][:8]) and not logs[0].equals(logs[1])


def test_killed_while_judging(dro, tmp_path, deadly):
    """Killed within the samples of either end: nothing is drawn twice, and both ends are those of a run that nobody
    disturbed"""
    run, (count, calls, die) = replace(dro, drift=1e-9, loop=replace(dro.loop, steps=6, save_every=4)), deadly
    count(Policy, "sample")
    a, b = (tmp_path/n for n in "ab")
    align(replace(run, out=str(a)))
    assert calls["sample"] == 2+2+2+2 # crops, photographs before, after, matched
    for n in (5, 2, None): # the second photograph after, the second at the matched copy
        calls["sample"], die["sample"] = 0, n
        if n: pytest.raises(KeyboardInterrupt, align, replace(run, out=str(b)))
        else: align(replace(run, out=str(b)))
    assert calls["sample"] == 1
    same_result(b, a)
    assert pd.read_parquet(a/"drift.parquet").equals(pd.read_parquet(b/"drift.parquet"))
    x, y = (load_file(o/"matched-adapter"/"adapter_model.safetensors") for o in (a, b))
    assert all(torch.equal(x[k], y[k]) for k in x)
    assert set(read_run(b)[1].variant) == {"before", "after", "matched", "bicubic"}


@pytest.mark.slow
def test_kill_9(whole, dro, tmp_path, capsys, forked):
    """The command line, by SIGKILL at three moments: while the bank is drawn, and twice between two checkpoints while
    the buffer is full"""
    out, path, chance = tmp_path/"killed", tmp_path/"config.json", random.Random(0)
    path.write_text(json.dumps(dict(run="Run", config=record(replace(dro, out=str(out))))))
    def kept(): return max((int(f.stem) for f in (out/"kept").glob("????????.safetensors")), default=0) # last step
    moments = [("srnb.policies.Policy.sample", 1), ("srnb.pairs.draw_winners", chance.randint(10, 13)),
               ("srnb.pairs.draw_winners", chance.randint(17, 19)-8)]
    for what, call in moments:
        run = forked(cut, what, call, chance.uniform(0, .01), srnb.train.main, [str(path)])
        assert run.wait() == -signal.SIGKILL and not run_done(out), run.err
        assert finished_groups(out/"bank")
        if what.endswith("draw_winners"): # steps are lost, the buffer is not
            last = latest_checkpoint(out)
            assert int(last.name[-8:]) < kept() and len(memory(last)["0.x"]) == 4
    same_result(align(replace(dro, out=str(out))), whole) # its config is the command line's
    assert "resumed at step 16" in capsys.readouterr().out


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("change, named", [
    (dict(losers="worst"), "losers.*'worst'.*Bottom"),
    (dict(winners="Top", losers="Samples"), "Samples.*Photograph.*Top"),
    (dict(losers="Nobody", link="Logistic"), "Nobody.*Hinge.*Logistic"), (dict(link=None), "Own.*Logistic.*NoneType"),
    (dict(refresh=5), "refresh = 5.*4"), (dict(capacity=0), "capacity.*0"), (dict(every=0), "every.*0"),
    (dict(cells=0), "cells.*0"), (dict(losers="Nobody", safeguard=True), "safeguard"), (dict(n=2), "N = 2, M = 2"),
    (dict(gate=-1.), "gate.*-1"), (dict(link="Logistic", kappa=0.), "kappa.*0"), (dict(budget=-1), "budget.*-1"),
    (dict(drift=-.1), "drift.*-0.1"), (dict(drift=.1, keep_every=0), "keep_every"), (dict(s=-1.), "s=-1"),
    (dict(reward=None), "reward"), (dict(judges="psnr"), "judges.*'psnr'"), (dict(patch=128), "patch = 128"),
    (dict(train="whole"), "train")])
def test_config(dro, change, named):
    with pytest.raises(ValueError, match=named): fill(dro, change)


def test_refused_before_any_work(whole, dro, tmp_path, idle):
    """Another config's folder, a budget that pays for nothing, an adversary without noise: nothing is sampled, no
    folder is made"""
    with pytest.raises(RunOccupied, match="every"): align(fill(dro, dict(out=str(whole), every=1)))
    with pytest.raises(ValueError, match="budget of 9 "): align(fill(dro, dict(out=str(tmp_path/"a"), budget=9)))
    for n, losers in (("b", "Adversary"), ("c", "Riesz"), ("d", "Given")):
        change = dict(out=str(tmp_path/n), backbone="onestep", winners="Photograph", losers=losers)
        with pytest.raises(ValueError, match=f"one-step.*{losers}"): align(fill(dro, change))
    assert not any((tmp_path/n).exists() for n in "abcd")


def test_a_made_loser_without_its_function_is_refused_when_it_is_written():
    with pytest.raises(TypeError, match="Empty.*loser"):
        class Empty(Made): "Makes nothing"
