"ASASR end to end on a tiny network: every loser, killed and resumed, drift, sharing, bad input"
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import same_result
from safetensors.torch import load_file

import srnb.align
from srnb.adversary import adversary_loser
from srnb.align import ASASR, Adversary, Given, Run, Start, Work, align, held_out_preference
from srnb.baselines import BASELINES
from srnb.config import fill
from srnb.core import RunOccupied, read_run, seed_of
from srnb.curation import finished_groups, read_group
from srnb.pairs import Logistic, draw_loss, draw_made, draw_winners, gaps, given_loser
from srnb.policies import Policy, from_pretrained, load_adapter
from srnb.preference import pair_margin
from srnb.rewards import luma
from srnb.runs import Base, Data, Judging
from srnb.spectral import SobolevEnergy, radial_psd
from srnb.training import Loop

FEW = Loop(steps=4, lr=1e-3, warmup=2, save_every=2, log_every=1)


@pytest.fixture(scope="module")
def config(tiny):
    method = replace(ASASR, losers=Adversary(("bicubic", "base"), 3, imitation=FEW), start=Start(FEW))
    return Run("", method, Data(size=64, places=1, take=2), Base(str(tiny), precision="no", sample_steps=2),
               Judging(None, judges=("psnr_y", "lsd"), eval_m=2), replace(FEW, steps=6, keep_every=2), rank=2, batch=2,
               patch=32)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    "A run that nobody disturbed"
    return align(replace(config, out=str(tmp_path_factory.mktemp("runs")/"whole")))


def groups_of(folder): return [read_group(folder, i) for i in finished_groups(folder)]


def saved(folder): return load_file(folder/"adapter_model.safetensors")


def sums_of(weights): return sorted(v.sum().item() for v in weights.values())


def test_record(whole, config):
    conf, metrics = read_run(whole)
    assert conf["params"]["config"]["method"]["energy"]["s"] == 1.5
    assert set(metrics.metric) == {"psnr_y", "lsd", "moved", "spread", "preference_loss", "accuracy"}
    log, drift, psd = (pd.read_parquet(whole/f"{n}.parquet") for n in ("log", "drift", "psd"))
    assert log.step.tolist() == [1, 2, 3, 4, 5, 6] and abs(log.loss[0]-math.log(2)) < 1e-6
    assert log.drift[0] == 0 and log.drift.iloc[-1] > 0
    assert drift.step.tolist() == [2, 4, 6] and drift.chosen.tolist() == [False, False, True]
    assert (drift.drift > 0).all()
    assert set(psd.variant) == {"before", "after", "truth", "bicubic"} and psd.image.nunique() == 2
    ranks = [saved(f/"adapter") for f in (whole/"reference", whole/"reference-adversary-3-0", whole)]
    assert [next(v.shape[0] for k, v in o.items() if "lora_A" in k) for o in ranks] == [2, 3, 2]
    assert not (whole/"bank").exists() # nobody needs samples of the training crops


def test_killed_and_resumed(whole, config, tmp_path, deadly):
    """Killed within reference, samples before, outputs, adversary, policy and the last bank: what was finished is kept,
    the result is the same"""
    run, (count, calls, die) = replace(config, out=str(tmp_path/"cut")), deadly
    count(Policy, "sample")
    for name in ("draw_alone", "draw_made"): count(srnb.align, name)
    stages = [ # before this call of all
        ("draw_alone", 3), # of the reference: steps 0 1 2 | 2 3
        ("sample", 1), # of two before
        ("sample", 3), # of the base's two outputs
        ("draw_alone", 3+2+3), # of the adversary: steps 0 1 2 | 2 3
        ("draw_made", 3), # of the policy: steps 0 1 2 | 2 3 4 5
        ("sample", 5)] # of two after
    for what, n in stages:
        die.clear()
        die[what] = n
        with pytest.raises(KeyboardInterrupt, match=what): align(run)
        assert calls[what] == n
    die.clear()
    same_result(align(run), whole)
    once = dict(sample=6, draw_alone=5+5, draw_made=7+2*2) # of two held-out photographs before and after the last end
    assert {k: calls[k] for k in once} == once
    align(run)
    assert {k: calls[k] for k in once} == once # done: nothing runs


def test_spectra(whole):
    "Every variant's spectrum is that of its own images"
    psd = pd.read_parquet(whole/"psd.parquet")
    for image, d in psd.groupby("image"):
        a, b = read_group(whole/"before", image), read_group(whole/"bank-after", image)
        for variant, sr in dict(before=a.sr, after=b.sr, truth=a.gt[None]).items():
            power = radial_psd(luma(sr)[:, 0]/255)[1].mean(0)
            assert torch.equal(torch.tensor(d[d.variant == variant].power.to_numpy().copy()), power), variant
        assert not torch.equal(a.sr, b.sr)


FORMS = [dict(losers="Riesz", radius=.05, s=1.), dict(losers=Given(("bicubic", "base")), s=0.),
         dict(losers="Nobody", link=None), dict(lam=.1, unit_mean=False, frequency="radian", kappa=.01)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory): return tmp_path_factory.mktemp("shared")/"banks"


@pytest.mark.parametrize("change", FORMS, ids=lambda o: "-".join(map(str, o)))
def test_forms_and_sharing(config, tmp_path, shared, change):
    "Every way to make losers runs, takes what another run has made, and says which copy is nearest to the drift"
    names = "outputs", "held_out_outputs", "reference", "started-before-2"
    made = {f: f.stat().st_mtime_ns for n in names for f in (shared/n).rglob("*.safetensors")}
    out = align(fill(config, dict(change, out=str(tmp_path/"run"), banks=str(shared), drift=1e-9)))
    _, metrics = read_run(out)
    assert ("preference_loss" in set(metrics.metric)) == (change.get("losers") != "Nobody")
    assert all(f.stat().st_mtime_ns == at for f, at in made.items()) and (shared/"reference"/"adapter").exists()
    assert not (out/"reference").exists()
    assert (shared/"reference-adversary-3-0").exists() == ("lam" in change)
    drift = pd.read_parquet(out/"drift.parquet")
    assert drift.chosen.sum() == 1 and drift.drift[drift.chosen].item() == drift.drift.min()
    steps = dict(adapter=6, **{"matched-adapter": drift.step[drift.chosen].item()})
    for folder, step in steps.items():
        kept = load_file(out/"kept"/f"{step:08d}.safetensors")
        assert sums_of(kept) == sums_of(saved(out/folder))
    assert set(metrics.variant) == {"before", "after", "matched", "bicubic"}


# ---------------------------------------------------------------- losers and margins

def loaded(config, whole):
    "The base with the adapters of a run's stages, its losers waiting"
    policy = load_adapter(from_pretrained(config.base.backbone), whole/"reference"/"adapter", "reference")
    return load_adapter(policy, whole/"reference-adversary-3-0"/"adapter", "adversary", on=False)


def photographs(folder): return [replace(o, sr=o.gt[None]) for o in groups_of(folder)]


def of_adversary(policy, w):
    return adversary_loser(policy, w.z, w.eps, w.sigma, w.cond, adapters=("reference", "adversary"))


def test_the_adversary_is_not_trained(whole, config):
    "In a step only the policy's adapter has a gradient, and the loser comes from the adversary, not from the policy"
    policy = loaded(config, whole)
    params = policy.add_lora(2)
    winners = photographs(whole/"outputs")
    def draw(step, part): return draw_made(winners, policy, 2, 32, 1, of_adversary)
    values, *_ = draw_loss(draw, policy, Logistic(1000.), SobolevEnergy(1.5))(0, 0)
    values.mean().backward()
    assert {id(p) for p in policy.net.parameters() if p.grad is not None} == {id(p) for p in params}
    before = draw(0, 0)
    with torch.no_grad():
        for n, p in policy.net.named_parameters():
            if "lora_B.adversary" in n: p.zero_()
    after = draw(0, 0)
    assert torch.equal(before.x[::2], after.x[::2]) and not torch.equal(before.x[1::2], after.x[1::2]) # losers move


@pytest.fixture
def moved(whole, config):
    "A policy that has moved, with its adversary, and a way to draw with any loser"
    policy = load_adapter(loaded(config, whole), whole/"adapter")
    with torch.no_grad(): # further than six steps do
        for n, p in policy.net.named_parameters():
            if "lora_B.policy" in n: p.mul_(20)
    return policy, photographs(whole/"outputs")


def by_hand(policy, w, z_l, energy):
    "Margins from the definition: four energies a pair, in float64"
    def error(z, adapters):
        s = w.sigma[:, None, None, None]
        with policy.using(*adapters): v = policy.predict((1-s)*z+s*w.eps, w.sigma, w.cond)
        return energy((v-(w.eps-z)).double())
    with_, without = ("reference", "policy"), ("reference",)
    return (error(z_l, with_)-error(z_l, without)) - (error(w.z, with_)-error(w.z, without))


def test_margins_by_hand(moved, whole):
    policy, winners = moved
    energy, w = SobolevEnergy(1.5), draw_winners(winners, policy, 4, 32, 1)
    given = given_loser(groups_of(whole/"outputs"))
    def own(policy, w): return adversary_loser(policy, w.z, w.eps, w.sigma, w.cond, adapters=("reference", "policy"))
    def elsewhere(policy, w): return of_adversary(policy, replace(w, eps=w.eps.flip(0)))
    def margins(loser):
        with torch.no_grad(): gap, *_ = gaps(policy, draw_made(winners, policy, 4, 32, 1, loser), energy)
        return pair_margin(gap[::2], gap[1::2]).double()
    for loser in (of_adversary, given):
        right = by_hand(policy, w, loser(policy, w), energy)
        assert torch.allclose(margins(loser), right, rtol=1e-2, atol=1e-6) and right.abs().min() > 1e-5
    right = by_hand(policy, w, of_adversary(policy, w), energy)
    for wrong in (margins(own), margins(elsewhere), -margins(of_adversary)): # its own loser, another noise, exchanged
        assert not torch.allclose(wrong, right, rtol=5e-2, atol=1e-6)


def test_held_out_preference(moved, whole, config):
    "The loss and accuracy of every photograph are those of the margins; without the policy's adapter, ln 2 and none"
    policy, _ = moved
    method = replace(config.method, losers=Given(("bicubic", "base")), link=Logistic(1e3))
    probes = groups_of(whole/"before") # samples in place of other models' outputs
    run = replace(config, method=method, out=str(whole))
    work = Work(run, policy, [], [(o.id, o.lq, o.gt) for o in probes])
    work.outputs = lambda names, groups: probes
    table = held_out_preference(work, draws=3).set_index(["image", "metric"]).value
    for o in probes:
        w = draw_winners([replace(o, sr=o.gt[None])], policy, 3, 32, seed_of("held out", o.id))
        margin = by_hand(policy, w, given_loser(probes)(policy, w), method.energy)
        assert abs(table[o.id, "preference_loss"]-torch.log1p((-1e3*margin).exp()).mean().item()) < 1e-3
        assert table[o.id, "accuracy"] == pytest.approx((margin > 0).double().mean().item())
    with torch.no_grad():
        for n, p in policy.net.named_parameters():
            if "lora_B.policy" in n: p.zero_()
    table = held_out_preference(work, draws=3).set_index("metric").value
    assert table["preference_loss"].tolist() == pytest.approx([math.log(2)]*2) and (table["accuracy"] == 0).all()


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("change, named", [
    (dict(s=-1.), "s=-1"), (dict(losers="amg"), "losers.*'amg'.*Adversary"), (dict(frequency="hertz"), "'hertz'"),
    (dict(outputs=[]), "Adversary.outputs"), (dict(losers="Given", outputs=[]), "Given.outputs"),
    (dict(outputs=["swinir"]), "outputs.*'swinir'.*dat_light"), (dict(kappa=0.), "kappa.*0"),
    (dict(losers="Riesz", radius=-1.), "radius.*-1"), (dict(lam=0.), "lam.*0"),
    (dict(adversary_rank=0), "adversary_rank.*0"), (dict(drift=.1, keep_every=0), "drift.*keep_every.*6"),
    (dict(drift=.1, keep_every=9), "keep_every.*6"), (dict(patch=200), "patch = 200"), (dict(batch=0), "batch.*0"),
    (dict(train="whole", backbone="some/backbone"), "train"), (dict(winners="Top"), "Adversary.*Photograph.*Top"),
    (dict(reward=None, judges=[]), "judges")])
def test_config(config, change, named):
    with pytest.raises(ValueError, match=named): fill(config, change)


def test_occupied_folder(whole, config):
    with pytest.raises(RunOccupied, match="lam"): align(fill(config, dict(out=str(whole), lam=.1)))


@pytest.mark.parametrize("loop", ["loop", "start_loop", "imitation"])
def test_uneven_parts(config, tmp_path, monkeypatch, loop):
    "Micro-batches that the processes cannot share are said before any work, of whatever stage they are"
    class Asked(Exception): "In place of work"
    def asked(*loops): raise Asked([o.parts for o in loops])
    monkeypatch.setattr(srnb.align, "processes", asked)
    with pytest.raises(Asked) as e: align(fill(config, {"out": str(tmp_path/"x"), f"{loop}.parts": 3}))
    assert sorted(e.value.args[0]) == [1, 1, 3]


def test_a_missing_package_is_found_before_any_work(config, tmp_path, monkeypatch, idle):
    "Other models answer once before the folder is claimed"
    def gone(lq): raise ModuleNotFoundError("no spandrel")
    monkeypatch.setitem(BASELINES, "dat_light", gone)
    for losers in ("Given", "Adversary"):
        run = fill(config, dict(out=str(tmp_path/"x"), losers=losers, outputs=["dat_light", "base"]))
        with pytest.raises(ModuleNotFoundError, match="spandrel"): align(run)
    assert not (tmp_path/"x").exists()
