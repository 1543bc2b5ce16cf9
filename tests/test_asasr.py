"ASASR end to end on a tiny network: every loser, killed and resumed, drift, sharing, bad input"
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import same_result
from safetensors.torch import load_file

import srnb.training as training
from srnb.adversary import adversary_loser
from srnb.core import RunOccupied, read_run, seed_of
from srnb.curation import finished_groups, read_group
from srnb.policies import Policy, from_pretrained, load_adapter
from srnb.preference import pair_margin
from srnb.rewards import luma
from srnb.spectral import SobolevEnergy, radial_psd
from srnb.training import ASASRRun, Loop, as_dpo_gaps, as_dpo_loss, output_batch, train_asasr


@pytest.fixture(scope="module")
def config(tiny):
    few = Loop(steps=4, lr=1e-3, warmup=2, save_every=2, log_every=1)
    return ASASRRun("", backbone=str(tiny), size=96, places=1, patch=32, batch=2, steps=2, eval_m=2, take=2, rank=2, adversary_rank=3, radius=.05,
                    outputs=("bicubic", "base"), judges=("psnr_y", "lsd"), precision="no", sft=few, imitation=few, loop=replace(few, steps=6, keep_every=2))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    "A run that nobody disturbed"
    return train_asasr(replace(config, out_dir=str(tmp_path_factory.mktemp("runs")/"whole")))


def test_record(whole, config):
    conf, metrics = read_run(whole)
    assert conf["params"]["s"] == 1.5 and "out_dir" not in conf["params"]
    assert set(metrics.metric) == {"psnr_y", "lsd", "moved", "as_dpo_loss", "accuracy"}
    log, drift, psd = (pd.read_parquet(whole/f"{n}.parquet") for n in ("log", "drift", "psd"))
    assert log.step.tolist() == [1, 2, 3, 4, 5, 6] and abs(log.loss[0]-math.log(2)) < 1e-6 and log.drift[0] == 0 and log.drift.iloc[-1] > 0
    assert drift.step.tolist() == [2, 4, 6] and drift.chosen.tolist() == [False, False, True] and (drift.drift > 0).all()
    assert set(psd.variant) == {"before", "after", "truth", "bicubic"} and psd.image.nunique() == 2
    ranks = [load_file(f/"adapter"/"adapter_model.safetensors") for f in (whole/"reference", whole/"adversary-3-0", whole)]
    assert [next(v.shape[0] for k, v in o.items() if "lora_A" in k) for o in ranks] == [2, 3, 2]


def test_killed_and_resumed(whole, config, tmp_path, deadly):
    "Killed within outputs, reference, adversary, policy and the last bank: what was finished is kept, the result is the same"
    cfg, (count, calls, die) = replace(config, out_dir=str(tmp_path/"cut")), deadly
    count(Policy, "sample"), count(training, "output_batch")
    moments = ("sample", 1), ("output_batch", 3), ("output_batch", 3+4), ("output_batch", 3+4+5), ("output_batch", 3+4+5+5), ("sample", 4+1)
    for what, n in moments: # within each stage
        die.clear()
        die[what] = n
        with pytest.raises(KeyboardInterrupt, match=what): train_asasr(cfg)
    die.clear()
    same_result(train_asasr(cfg), whole)
    assert calls["sample"] == 4+4 # the base's outputs of four photographs, two before, two after: none twice
    again = dict(calls)
    train_asasr(cfg)
    assert calls == again # done: nothing runs


def test_spectra(whole):
    "Every variant's spectrum is that of its own images"
    psd = pd.read_parquet(whole/"psd.parquet")
    for image, d in psd.groupby("image"):
        a, b = read_group(whole/"before", image), read_group(whole/"after", image)
        for variant, sr in dict(before=a.sr, after=b.sr, truth=a.gt[None]).items():
            power = radial_psd(luma(sr)[:, 0]/255)[1].mean(0)
            assert torch.equal(torch.tensor(d[d.variant == variant].power.to_numpy().copy()), power), variant
        assert not torch.equal(a.sr, b.sr)


@pytest.mark.parametrize("change", [dict(loser="riesz", s=1.), dict(loser="given", s=0.), dict(loser="none"), dict(lam=.1, unit_mean=False, frequency="radian", kappa=.01)],
                         ids=lambda o: "-".join(map(str, o.values())))
def test_forms_and_sharing(config, tmp_path, tmp_path_factory, change):
    "Every way to make losers runs, takes what another run has made, and says which copy it kept"
    shared = tmp_path_factory.getbasetemp()/"shared"
    made = {f: f.stat().st_mtime_ns for n in ("outputs", "held_out_outputs", "reference", "before-2") for f in (shared/n).rglob("*.safetensors")}
    cfg = replace(config, out_dir=str(tmp_path/"run"), banks=str(shared), drift=1e-9, **change)
    out = train_asasr(cfg)
    _, metrics = read_run(out)
    assert ("as_dpo_loss" in set(metrics.metric)) == (change.get("loser") != "none")
    assert all(f.stat().st_mtime_ns == at for f, at in made.items()) and (shared/"reference"/"adapter").exists()
    assert not (out/"reference").exists() and (shared/"adversary-3-0").exists() == ("loser" not in change)
    drift = pd.read_parquet(out/"drift.parquet")
    assert drift.chosen.sum() == 1 and drift.drift[drift.chosen].item() == drift.drift.min()
    kept, adapter = load_file(out/"kept"/f"{drift.step[drift.chosen].item():08d}.safetensors"), load_file(out/"adapter"/"adapter_model.safetensors")
    assert sorted(v.sum().item() for v in kept.values()) == sorted(v.sum().item() for v in adapter.values())


def test_the_adversary_is_not_trained(whole, config):
    "In a step of AS-DPO only the policy's adapter has a gradient, and the loser comes from the adversary, not from the policy"
    policy = load_adapter(load_adapter(from_pretrained(config.backbone), whole/"reference"/"adapter", "reference"), whole/"adversary-3-0"/"adapter", "adversary", on=False)
    params = policy.add_lora(2)
    groups = [read_group(whole/"outputs", i) for i in finished_groups(whole/"outputs")]
    def loser(policy, z, eps, sigma, cond, given): return adversary_loser(policy, z, eps, sigma, cond)
    values, _ = as_dpo_loss(groups, policy, 1000., SobolevEnergy(1.5), loser, 2, 32, 0)(policy.net, 0, 0)
    values.mean().backward()
    assert {id(p) for p in policy.net.parameters() if p.grad is not None} == {id(p) for p in params}
    before = as_dpo_gaps(policy, output_batch(groups, policy, 2, 32, 1), SobolevEnergy(1.5), loser)
    with torch.no_grad():
        for n, p in policy.net.named_parameters():
            if "lora_B.adversary" in n: p.zero_()
    after = as_dpo_gaps(policy, output_batch(groups, policy, 2, 32, 1), SobolevEnergy(1.5), loser)
    assert torch.equal(before[2][:2], after[2][:2]) and not torch.equal(before[2][2:], after[2][2:]) # winners stay, losers move


@pytest.fixture
def moved(whole, config):
    "A policy that has moved, with its adversary, and a batch"
    policy = load_adapter(load_adapter(from_pretrained(config.backbone), whole/"reference"/"adapter", "reference"), whole/"adversary-3-0"/"adapter", "adversary", on=False)
    load_adapter(policy, whole/"adapter")
    with torch.no_grad(): # further than six steps do
        for n, p in policy.net.named_parameters():
            if "lora_B.policy" in n: p.mul_(20)
    return policy, output_batch([read_group(whole/"outputs", i) for i in finished_groups(whole/"outputs")], policy, 4, 32, 1)


def by_hand(policy, z, z_l, eps, sigma, lq, energy):
    "Margins from the definition: four energies a pair, in float64"
    def error(z, adapters):
        s = sigma[:, None, None, None]
        with policy.using(*adapters): v = policy.predict((1-s)*z+s*eps, sigma, lq)
        return energy((v-(eps-z)).double())
    with_, without = ("reference", "policy"), ("reference",)
    return (error(z_l, with_)-error(z_l, without)) - (error(z, with_)-error(z, without))


def test_margins_by_hand(moved):
    policy, (z, given, eps, sigma, lq, text) = moved
    energy = SobolevEnergy(1.5)
    def loser(policy, z, eps, sigma, cond, given): return adversary_loser(policy, z, eps, sigma, cond)
    def own(policy, z, eps, sigma, cond, given): return adversary_loser(policy, z, eps, sigma, cond, adapters=("reference", "policy"))
    def margins(loser, eps=eps):
        with torch.no_grad(): return pair_margin(*as_dpo_gaps(policy, (z, given, eps, sigma, lq, text), energy, loser)[:2])
    for f in (loser, training.given_loser):
        right = by_hand(policy, z, f(policy, z, eps, sigma, lq, given), eps, sigma, lq, energy)
        assert torch.allclose(margins(f).double(), right, rtol=1e-2, atol=1e-6) and right.abs().min() > 1e-5
    right = by_hand(policy, z, loser(policy, z, eps, sigma, lq, given), eps, sigma, lq, energy)
    for wrong in (margins(own), margins(loser, eps.flip(0)), -margins(loser)): # its own loser, another noise, exchanged
        assert not torch.allclose(wrong.double(), right, rtol=5e-2, atol=1e-6)


def test_held_out_preference(moved, whole):
    "The loss and accuracy of every photograph are those of the margins; without the policy's adapter, ln 2 and none"
    policy, _ = moved
    groups, energy = [read_group(whole/"held_out_outputs", i) for i in finished_groups(whole/"held_out_outputs")], SobolevEnergy(1.5)
    table = training.held_out_preference(policy, groups, energy, 1e3, training.given_loser, 32, draws=3).set_index(["image", "metric"]).value
    for o in groups:
        z, given, eps, sigma, lq, _ = output_batch([o], policy, 3, 32, seed_of("held out", o.id))
        margin = by_hand(policy, z, given, eps, sigma, lq, energy)
        assert abs(table[o.id, "as_dpo_loss"]-torch.log1p((-1e3*margin).exp()).mean().item()) < 1e-3
        assert table[o.id, "accuracy"] == pytest.approx((margin > 0).double().mean().item())
    with torch.no_grad():
        for n, p in policy.net.named_parameters():
            if "lora_B.policy" in n: p.zero_()
    table = training.held_out_preference(policy, groups, energy, 1e3, training.given_loser, 32, draws=3).set_index("metric").value
    assert torch.allclose(torch.tensor(table["as_dpo_loss"].to_numpy().copy()), torch.tensor(math.log(2), dtype=torch.float64)) and (table["accuracy"] == 0).all()


@pytest.mark.parametrize("change, message", [(dict(s=-1.), "s=-1"), (dict(loser="amg"), "loser must be one of"), (dict(outputs=()), "outputs must be a list"),
                                             (dict(kappa=0.), "kappa must be positive"), (dict(radius=-1.), "radius must be positive"), (dict(frequency="hertz"), "frequency must be one of"),
                                             (dict(drift=.1, loop=Loop()), "set keep_every"), (dict(drift=.1, loop=Loop(steps=5, keep_every=9)), "from 1 to 5"), (dict(patch=200), "patch 200 is larger"), (dict(batch=0), "batch must be at least 1")])
def test_config(config, change, message):
    with pytest.raises(ValueError, match=message): replace(config, **change)


def test_occupied_folder(whole, config):
    with pytest.raises(RunOccupied, match="lam differ"): train_asasr(replace(config, out_dir=str(whole), lam=.1))
