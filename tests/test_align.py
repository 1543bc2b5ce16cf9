"Four choices, one run: fresh and stale losers, pairs by hand, every combination end to end, killed and resumed, bad input"
import json
import math
import random
import signal
from contextlib import contextmanager
from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch
from conftest import same_result
from forks import cut
from safetensors.torch import load_file

import srnb.align as align
from srnb.align import LINKS, MEET, AlignRun, OnlineDraw, evaluations, train_align
from srnb.core import RunOccupied, generator, read_run, run_done
from srnb.curation import Group, read_group
from srnb.data import embedded_photos, make_pair
from srnb.degrade import RESSHIFT_TEST
from srnb.policies import Policy, from_pretrained
from srnb.preference import dpo_loss, hinge_loss
from srnb.spectral import SobolevEnergy, l2_energy
from srnb.training import Loop, latest_checkpoint, margin_loss

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
        for k, layer in enumerate(policy._layers): layer.lora_B["policy"].weight.add_(by*torch.randn(layer.lora_B["policy"].weight.shape, generator=generator(100*seed+k)))


@pytest.mark.parametrize("energy, link", [(l2_energy, lambda m: hinge_loss(m, 1.)), (SobolevEnergy(1.5), lambda m: dpo_loss(m, 1.))], ids=["l2-hinge", "sobolev-logistic"])
def test_fixture_10(shipped, energy, link):
    "M = 1 and a fresh buffer: the losers' gradient is under 1e-6 of the experts'. One that saw an older policy has a gradient, over 1e-3"
    # 8 states are predicted at once, when they are made and when they are trained: other kernels for smaller batches round differently, 1e-6 to 4e-6
    policy, groups = shipped
    def ratio(draw, step):
        loss, backward = margin_loss(draw, policy, link, 1., energy, apart=True)
        logs = backward(None, *loss(policy.net, step, 0))
        policy.net.zero_grad()
        return logs["norm_l"]/logs["norm_w"]
    def draw(**change): return OnlineDraw(groups, policy, **(dict(n=4, patch=32, seed=0, cells=3, every=1, capacity=8, refresh=8) | change))
    for layer in policy._layers: torch.nn.init.zeros_(layer.lora_B["policy"].weight)
    move(policy, 1, .02)
    assert ratio(draw(), 0) < 1e-6
    old, long = draw(every=2), draw(capacity=16)
    assert max(ratio(old, 0), ratio(long, 0)) < 1e-6
    move(policy, 2, .02)
    assert min(ratio(old, 1), ratio(long, 1)) > 1e-3 # an older snapshot; fresh rows beside older ones
    assert ratio(old, 2) < 1e-6 # the next snapshot
    x, sigma, target, cond, _ = old(3, 0)
    level = sigma[::2, None, None, None]
    assert torch.equal(sigma[::2], sigma[1::2]) and torch.equal(cond[::2], cond[1::2]) and sigma.unique().numel() == 4
    for z, y in zip(x[::2]-level*target[::2], cond[::2, :3], strict=True): # the expert's state, level and input belong together: the photograph of a trajectory
        k = (old.buffers[0].rows["z"]-z).abs().amax((1, 2, 3)).argmin()
        assert (old.buffers[0].rows["z"][k]-z).abs().max() < 1e-5 and torch.allclose(policy.codec.upsample(old.buffers[0].rows["lq"][k:k+1])[0]*2-1, y, atol=1e-6)


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
    # a = 0.1, the winner's target is 1, the loser's -1.    gap_w = 0.9^2 - 1 = -0.19    gap_l = 1.1^2 - 1 = 0.21    margin = 0.4
    # d margin/da = d gap_l - d gap_w = 2(a+1) - 2(a-1) = 2.2 + 1.8 = 4
    (lambda m: hinge_loss(m, .5), .1, -4.),                             # 0.5 - 0.4; slope -1 in the margin
    (lambda m: hinge_loss(m, .4-1e-6), 0., 0.),                         # the margin has reached the gate
    (lambda m: dpo_loss(m, 5.), math.log(1+math.exp(-2)), -20/(1+math.exp(2))), # kappa*margin = 2: ln(1+e^-2) = 0.126928; -5*0.119203*4 = -2.384058
    ], ids=["hinge", "closed", "logistic"])
def test_pair_by_hand(link, value, slope):
    policy = OneNumber(.1)
    target = torch.tensor([1., -1]).reshape(2, 1, 1, 1) # winner, loser
    def draw(step, part): return target, torch.zeros(2), target, None, torch.ones(1, 1, 1)
    loss, backward = margin_loss(draw, policy, link, 5., apart=True)
    values, logs = loss(policy.net, 0, 0)
    logs = backward(None, values, logs)
    assert values.item() == pytest.approx(value, abs=1e-6) and policy.net.weight.grad.item() == pytest.approx(slope, abs=1e-5)
    assert logs["gap_w"] == pytest.approx(-.19, abs=1e-6) and logs["gap_l"] == pytest.approx(.21, abs=1e-6)
    assert logs["norm_w"] == pytest.approx(abs(slope)*1.8/4, abs=1e-5) and logs["norm_l"] == pytest.approx(abs(slope)*2.2/4, abs=1e-5)


# ---------------------------------------------------------------- every combination

@pytest.fixture(scope="module")
def config(tiny):
    few = Loop(steps=4, lr=1e-3, warmup=2, save_every=2, log_every=1)
    return AlignRun("", backbone=str(tiny), size=96, places=1, m=2, n=1, patch=32, batch=2, steps=1, eval_m=2, take=2, rank=2, adversary_rank=3, every=2, capacity=4, refresh=2, cells=2,
                    outputs=("bicubic", "base"), reward="offline_nr", judges=("psnr_y",), precision="no", kappa=10., gate=.01, imitation=few, loop=few)


COMBINATIONS = [(w, l, k) for l, winners in MEET.items() for w in winners for k in LINKS[l]]


@pytest.mark.parametrize("winners, losers, link", COMBINATIONS, ids=map("-".join, COMBINATIONS))
def test_every_combination(config, tmp_path, tmp_path_factory, monkeypatch, winners, losers, link):
    "Bank, training within a budget, two ends, metrics; the bank is drawn once for all; a second call does nothing"
    calls, sample = [], Policy.sample
    monkeypatch.setattr(Policy, "sample", lambda *a, **k: calls.append(1) or sample(*a, **k))
    banks = tmp_path_factory.getbasetemp()/"align-banks"
    first, adversary = not (banks/"bank").exists(), losers == "adversary" and not (banks/"outputs").exists()
    cfg = replace(config, out_dir=str(tmp_path/"run"), banks=str(banks), winners=winners, losers=losers, link=link, s=1.5 if losers in ("adversary", "sample") else 0., drift=1e-9, budget=10**9)
    before, update = evaluations(cfg, 2, 1)
    cfg = replace(cfg, budget=int(before+3*update)+1)
    out = train_align(cfg)
    assert len(calls) == 4*first + 2*adversary + 4 # crops and photographs before, outputs of the base, both ends
    log, drift, metrics = (pd.read_parquet(out/f"{n}.parquet") for n in ("log", "drift", "metrics"))
    assert log.step.tolist() == [1, 2, 3] and torch.isfinite(torch.tensor(log.to_numpy(dtype="float64"))).all()
    start = dict(logistic=math.log(2), hinge=.01).get(link)
    if start: assert log.loss[0] == pytest.approx(start, abs=1e-6)
    assert ("norm_l" in log) == (losers == "policy") and ("open" in log) == (link == "hinge")
    assert drift.step.tolist() == [1, 2, 3] and drift.drift[drift.chosen].tolist() == [drift.drift.min()] and drift.drift.min() > 0
    assert set(metrics.variant) == {"before", "after", "matched", "bicubic"}
    for variant in ("before", "after", "matched"):
        rows = metrics[metrics.variant == variant]
        assert {"reward", "moved", "spread", "psnr_y", "piqe"} <= set(rows.metric) and not rows.duplicated(["image", "seed", "metric"]).any()
        assert rows.value.notna().all() and rows[rows.metric == "reward"].groupby("image").size().tolist() == [2, 2] and (rows.metric == "spread").sum() == 2
    moved = metrics[metrics.metric == "moved"].groupby("variant").value.max()
    assert moved["after"] > 0
    for folder, step in (("adapter", 3), ("matched", drift.step[drift.chosen].item())):
        kept, saved = load_file(out/"kept"/f"{step:08d}.safetensors"), load_file(out/folder/"adapter_model.safetensors")
        assert sorted(v.sum().item() for v in kept.values()) == sorted(v.sum().item() for v in saved.values())
    assert (latest_checkpoint(out)/"memory-0.safetensors").exists() == (losers == "policy")
    calls.clear()
    assert train_align(cfg) == out and not calls


def test_safeguard_and_no_drift(config, tmp_path):
    "Top against bottom with the safeguard, no budget, no copies: the last step alone is judged"
    out = train_align(replace(config, out_dir=str(tmp_path/"run"), winners="top", losers="bottom", link="logistic", safeguard=True, hpo="none"))
    log, metrics = pd.read_parquet(out/"log.parquet"), read_run(out)[1]
    assert log.step.tolist() == [1, 2, 3, 4] and ((log.safeguard > 0) & (log.safeguard <= 1)).all() and set(metrics.variant) == {"before", "after", "bicubic"}
    assert (out/"before").exists() and (out/"bank").exists() and not (out/"matched").exists()
    spread = metrics[(metrics.metric == "spread") & (metrics.variant == "after")].set_index("image").value
    for image, value in spread.items(): # two seeds: their standard deviation is half their distance, times root 2
        a, b = read_group(out/"bank-after", image).sr.double()
        assert value == pytest.approx(255*((a-b).square()/2).mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("losers, link", [("policy", "hinge"), ("bottom", "logistic"), ("none", "none")])
def test_one_step(config, tmp_path, losers, link):
    "The shipped one-step network goes the same way, with one step of its sampler"
    out = train_align(replace(config, out_dir=str(tmp_path/"run"), backbone="onestep", size=64, take=1, winners="top", losers=losers, link=link, loop=Loop(steps=2, lr=1e-3, save_every=2, log_every=1)))
    log, metrics = pd.read_parquet(out/"log.parquet"), read_run(out)[1]
    assert len(log) == 2 and metrics[(metrics.metric == "moved") & (metrics.variant == "after")].value.max() > 0
    assert "drift" not in log or (log.drift[0] == 0 and log.drift[1] > 0)


# ---------------------------------------------------------------- killed and resumed

@pytest.fixture(scope="module")
def dro(config):
    "Own losers from a snapshot of every third update, in a buffer that two micro-batches fill"
    return replace(config, losers="policy", winners="expert", link="hinge", gate=1., every=3, capacity=4, refresh=2, batch=4, loop=Loop(steps=21, lr=1e-2, warmup=2, save_every=8, log_every=1, keep_every=1))


@pytest.fixture(scope="module")
def whole(dro, tmp_path_factory):
    "A run that nobody disturbed"
    return train_align(replace(dro, out_dir=str(tmp_path_factory.mktemp("runs")/"whole")))


def test_memory(whole):
    "The checkpoint holds the buffer: four rows of each kind, finite and not all alike; its losers had a gradient"
    rows = load_file(latest_checkpoint(whole)/"memory-0.safetensors")
    assert {k: tuple(v.shape) for k, v in rows.items()} == {"0.x": (4, 2, 3, 32, 32), "0.target": (4, 2, 3, 32, 32), "0.sigma": (4, 2), "0.lq": (4, 3, 8, 8), "0.z": (4, 3, 32, 32), "0.text": (4,)}
    assert all(torch.isfinite(v).all() and (k == "0.text" or not torch.equal(v[0], v[2])) for k, v in rows.items())
    log = pd.read_parquet(whole/"log.parquet")
    assert log.norm_l[0] < 1e-6*log.norm_w[0] and (log.norm_l[1:] > 1e-5*log.norm_w[1:]).all()


def test_killed_and_resumed(whole, dro, tmp_path, deadly, monkeypatch):
    "Killed at step 13, neither a checkpoint's (8, 16) nor a snapshot's (12, 15): the result is the same; with a buffer that was lost it is not"
    count, calls, die = deadly
    count(align, "output_batch")
    for name in ("a", "b"):
        calls["output_batch"], die["output_batch"] = 0, 13
        with pytest.raises(KeyboardInterrupt, match="output_batch"): train_align(replace(dro, out_dir=str(tmp_path/name)))
        assert latest_checkpoint(tmp_path/name).name == "checkpoint-00000008" and len(load_file(tmp_path/name/"checkpoint-00000008"/"memory-0.safetensors")["0.x"]) == 4
        die.clear()
    same_result(train_align(replace(dro, out_dir=str(tmp_path/"a"))), whole)
    assert calls["output_batch"] == 13+13 # of both: 0 .. 12 | 8 .. 20
    monkeypatch.setattr(OnlineDraw, "restore", lambda self, tensors: None)
    with pytest.raises(AssertionError): same_result(train_align(replace(dro, out_dir=str(tmp_path/"b"))), whole)
    logs = [pd.read_parquet(o/"log.parquet") for o in (whole, tmp_path/"b")]
    assert logs[0][:8].equals(logs[1][:8]) and not logs[0].equals(logs[1])


def test_killed_while_judging(dro, tmp_path, deadly):
    "Killed within the samples of either end: nothing is drawn twice, and both ends are those of a run that nobody disturbed"
    cfg, (count, calls, die) = replace(dro, drift=1e-9, loop=replace(dro.loop, steps=6, save_every=4)), deadly
    count(Policy, "sample")
    a, b = (replace(cfg, out_dir=str(tmp_path/n)) for n in "ab")
    train_align(a)
    assert calls["sample"] == 2+2+2+2 # crops, photographs before, after, matched
    for n in (5, 2, None): # the second photograph after, the second at the matched copy
        calls["sample"], die["sample"] = 0, n
        if n: pytest.raises(KeyboardInterrupt, train_align, b)
        else: train_align(b)
    assert calls["sample"] == 1
    same_result(tmp_path/"b", tmp_path/"a")
    assert pd.read_parquet(tmp_path/"a"/"drift.parquet").equals(pd.read_parquet(tmp_path/"b"/"drift.parquet"))
    x, y = (load_file(tmp_path/n/"matched"/"adapter_model.safetensors") for n in "ab")
    assert all(torch.equal(x[k], y[k]) for k in x) and set(read_run(tmp_path/"b")[1].variant) == {"before", "after", "matched", "bicubic"}


def test_kill_9(whole, dro, tmp_path, capsys, forked):
    "The command line, by SIGKILL at three moments: while the bank is drawn, and twice between two checkpoints while the buffer is full"
    out, path, chance = tmp_path/"killed", tmp_path/"config.json", random.Random(0)
    path.write_text(json.dumps(asdict(dro) | dict(run="align", out_dir=str(out))))
    def last(): return max((int(f.stem) for f in (out/"kept").glob("????????.safetensors")), default=0) # step
    for name, call in (("srnb.policies.Policy.sample", 1), ("srnb.align.output_batch", chance.randint(10, 13)), ("srnb.align.output_batch", chance.randint(17, 19)-8)):
        run = forked(cut, name, call, chance.uniform(0, .01), align.main, [str(path)], align.RUNS)
        assert run.wait() == -signal.SIGKILL and not run_done(out), run.err
        assert (out/"bank"/"manifest.jsonl").exists()
        if name.endswith("output_batch"):
            saved = int(latest_checkpoint(out).name[-8:])
            assert saved < last() and len(load_file(latest_checkpoint(out)/"memory-0.safetensors")["0.x"]) == 4 # steps are lost, the buffer is not
    same_result(train_align(replace(dro, out_dir=str(out))), whole) # its config is the command line's
    assert "resumed at step 16" in capsys.readouterr().out


# ---------------------------------------------------------------- preferences from a file

PEOPLE = """
import torch
from srnb.training import Pairs
def chosen():
    lq, w, l = torch.load("chosen.pt")
    return Pairs(list(lq), list(w), list(l), torch.ones(len(lq), 1, 1))
def uneven(): p = chosen(); return Pairs(p.lq[:1], p.winners, p.losers, p.weight)
def floats(): p = chosen(); return Pairs(p.lq, [w.float() for w in p.winners], p.losers, p.weight)
def table(): return {}
"""


@pytest.fixture
def people(tmp_path, monkeypatch):
    "The working folder holds people.py, whose pairs lie beside it"
    monkeypatch.chdir(tmp_path)
    (tmp_path/"people.py").write_text(PEOPLE)
    g = generator(0)
    torch.save([torch.randint(0, 256, (3, *shape), generator=g, dtype=torch.uint8) for shape in ((3, 12, 16), (1, 3, 48, 64), (1, 3, 48, 64))], tmp_path/"chosen.pt")
    return lambda config, **change: replace(config, **dict(winners="top", losers="bottom", link="logistic", out_dir="run", pairs="people.py:chosen") | change)


def test_given_pairs(config, people, tmp_path):
    "They are what is trained on, they are in the record, and another bank of them is another run"
    cfg = people(config)
    out = train_align(cfg)
    params = json.loads((out/"config.json").read_text())["params"]
    assert params["pairs"] == "people.py:chosen" and len(params["pairs_sha256"]) == len(params["given"]) == 64
    plain = train_align(people(config, pairs=None, out_dir="plain"))
    assert not {"pairs", "pairs_sha256", "given"} & set(json.loads((plain/"config.json").read_text())["params"]) # as before there was such a field
    a, b = (pd.read_parquet(o/"log.parquet") for o in (out, plain))
    assert a.loss[0] == pytest.approx(math.log(2)) and not a.gap_w.equals(b.gap_w) and set(read_run(out)[1].metric) == set(read_run(plain)[1].metric)
    lq, w, l = torch.load(tmp_path/"chosen.pt")
    torch.save([lq, l, w], tmp_path/"chosen.pt")
    with pytest.raises(RunOccupied, match="given"): train_align(cfg)


@pytest.mark.parametrize("change, message", [(dict(pairs="people.py:uneven"), "one lq, winners, losers and weight a group; got 1, 3, 3, 3"), (dict(pairs="people.py:floats"), "group 0: need bytes"),
    (dict(patch=64), "sides of at least patch = 64"), (dict(pairs="people.py:table"), "must give Pairs, got a dict"), (dict(losers="sample", winners="photograph"), "pairs take the place")])
def test_given_pairs_that_do_not_fit(config, people, monkeypatch, change, message):
    monkeypatch.setattr(Policy, "sample", lambda *a, **k: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=message): train_align(people(config, **change))


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("change, message", [(dict(losers="worst"), "losers must be one of"), (dict(winners="top", losers="sample", link="logistic"), "winners must be one of photograph"),
    (dict(losers="none", link="logistic"), "link must be one of none, hinge"), (dict(losers="policy", link="none"), "link must be one of logistic, hinge"),
    (dict(refresh=5), "refresh = 5 new trajectories do not fit into a buffer of 4"), (dict(capacity=0), "capacity must be at least 1"), (dict(safeguard=True), "safeguard works on top against bottom"),
    (dict(n=2), "N = 2, M = 2"), (dict(gate=-1.), "gate 0 or more"), (dict(kappa=0.), "kappa must be positive"), (dict(budget=-1), "budget and drift must be 0 or more"), (dict(drift=.1), "keep_every"),
    (dict(s=-1.), "s=-1"), (dict(judges=()), "judges must be a list"), (dict(patch=128), "patch 128 is larger")])
def test_config(config, change, message):
    with pytest.raises(ValueError, match=message): replace(config, **change)


def test_refused_before_any_work(whole, dro, tmp_path, monkeypatch):
    "Another config's folder, a budget that pays for nothing, an adversary without noise: nothing is sampled, no folder is made"
    monkeypatch.setattr(Policy, "sample", lambda *a, **k: pytest.fail("sampled"))
    with pytest.raises(RunOccupied, match="every"): train_align(replace(dro, out_dir=str(whole), every=1))
    with pytest.raises(ValueError, match="does not pay for one update"): train_align(replace(dro, out_dir=str(tmp_path/"a"), budget=9))
    with pytest.raises(ValueError, match="one-step network has none"): train_align(replace(dro, out_dir=str(tmp_path/"b"), backbone="onestep", winners="photograph", losers="adversary"))
    assert not (tmp_path/"a").exists() and not (tmp_path/"b").exists()
