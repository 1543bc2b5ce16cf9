"Rounds: each from what the last one left, one adapter for all, the same when killed; what a run may begin from"
import functools
import gc
import json
from dataclasses import replace

import pandas as pd
import peft
import pytest
import torch
from conftest import same_result
from safetensors.torch import load_file

import srnb.pairs
from srnb import core, data
from srnb.align import ASASR, Bottom, Method, Own, Run, Samples, Top, align, cost, loop_of
from srnb.config import fill
from srnb.core import RunOccupied, generator, read_run
from srnb.curation import finished_groups, group_seeds, read_group
from srnb.data import embedded_photos
from srnb.pairs import Hinge, Logistic
from srnb.policies import Policy, from_pretrained, load_adapter, save_adapter, save_pretrained
from srnb.rewards import Metric, Reward
from srnb.rounds import adapter_digest
from srnb.runs import Base, Data, Judging
from srnb.training import Loop, latest_checkpoint

LOOP = Loop(steps=3, lr=1e-2, warmup=2, save_every=2, log_every=1, ema=.9, log_with="none")
BRIGHT = Metric("bright", "nr", True, lambda: lambda sr, gt: sr.double().mean((1, 2, 3)))


@pytest.fixture(scope="module", autouse=True)
def quick():
    "What costs time and decides nothing is done once: the collector looks at new objects alone"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "open_photo", functools.cache(data.open_photo))
        patch.setattr(core, "git_revision", lambda: None)
        patch.setattr(core, "versions", functools.cache(core.versions))
        patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda *a: None)
        gc.collect()
        gc.freeze()
        yield
        gc.unfreeze()


@pytest.fixture(scope="module")
def config(tiny):
    judging = Judging(Reward("bright", nr=(BRIGHT,)), m=2, judges=("psnr_y",), eval_m=2)
    return Run("", Method(winners=Top(1), losers=Bottom(), link=Logistic(10.)), Data(size=64, places=1, take=2),
               Base(str(tiny), precision="no", sample_steps=1), judging, LOOP, rank=2, batch=2, patch=32, rounds=3)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    "Three rounds that nobody disturbed"
    return align(replace(config, out=str(tmp_path_factory.mktemp("runs")/"whole")))


@pytest.fixture(scope="module")
def one(config, tmp_path_factory):
    "A run of one round"
    return align(replace(config, rounds=1, out=str(tmp_path_factory.mktemp("runs")/"one")))


def weights(folder): return load_file(folder/"adapter"/"adapter_model.safetensors")


def sampled(policy, bank, seed=0):
    "Whether a bank's samples are this policy's"
    for i in finished_groups(bank):
        group = read_group(bank, i)
        m = len(group.sr)
        if not torch.equal(policy.sample(group.lq[None], group_seeds(i, m, seed), 1)[0], group.sr): return False
    return True


def test_the_first_round_is_a_run_of_one(whole, one):
    assert pd.read_parquet(whole/"round-1"/"log.parquet").equals(pd.read_parquet(one/"log.parquet"))
    a, b = weights(whole/"round-1"), weights(one)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert json.loads((one/"config.json").read_text())["params"]["config"]["rounds"] == 1
    metrics = {o: read_run(o)[1] for o in (whole, one)}
    first = [o[o.variant == v].drop(columns="variant").reset_index(drop=True) for o, v in
             ((metrics[whole], "round-1"), (metrics[one], "after"))]
    assert first[0].equals(first[1]) and len(first[0]) # and on one scale
    assert set(metrics[whole].variant) == {"before", "round-1", "round-2", "after", "bicubic"}


def test_every_round_draws_its_bank_from_the_last_policy(whole, config, tiny):
    "With seeds of its own; the held-out samples keep theirs"
    folders = [None, whole/"round-1"/"adapter", whole/"round-2"/"adapter", whole/"adapter"]
    policies = [load_adapter(from_pretrained(tiny), o) if o else from_pretrained(tiny) for o in folders]
    assert [p.net.peft_config["policy"].r for p in policies[1:]] == [2, 4, 6]
    assert all(not (o/"below").exists() for o in folders[1:])
    for k, bank in enumerate((whole/"bank", whole/"crops-round-2", whole/"crops-round-3")):
        assert sampled(policies[k], bank, k), k
    for k, name in enumerate(("before", "bank-round-1", "bank-round-2", "bank-after")):
        assert sampled(policies[k], whole/name) and not sampled(policies[k-1], whole/name), name


def test_every_round_starts_at_its_reference_with_batches_and_weights_of_its_own(whole):
    logs = [pd.read_parquet(o/"log.parquet") for o in (whole/"round-1", whole/"round-2", whole)]
    assert all(o.drift[0] == 0 and o.drift[1:].gt(0).all() for o in logs) # before the first update
    assert len({o.error_w[0] for o in logs}) == 3
    w = weights(whole)
    a = next(v for n, v in sorted(w.items()) if "lora_A" in n)
    assert (a[:2]-a[2:4]).abs().max() > .01 and (a[2:4]-a[4:]).abs().max() > .01
    kept = weights(whole/"round-2") # its factors are the first of the last one's
    for n in kept: assert torch.equal(w[n][:4] if "lora_A" in n else w[n][:, :4], kept[n])
    b = [v for n, v in w.items() if "lora_B" in n]
    assert all(max(v[:, k:k+2].abs().max() for v in b) > 0 for k in (0, 2, 4))


def test_the_average_ends_a_round(whole):
    "A round's adapter, which is the next reference, is the average of its weights"
    state = torch.load(latest_checkpoint(whole/"round-2")/"state.pt")
    w = weights(whole/"round-2")
    for n, v in state["average"].items():
        name, part = n.replace(".policy.", "."), slice(2, None)
        found = w[name][part] if "lora_A" in n else w[name][:, part]
        assert torch.equal(found, v) and not torch.equal(v, state["changing"][n]) or v.abs().max() == 0


@pytest.mark.slow
def test_killed_in_every_round(whole, config, tmp_path, deadly, capsys):
    "Between two checkpoints of a round, while the next bank is drawn, and in the last: the result is the same"
    count, calls, die = deadly
    count(srnb.pairs, "draw_crops")
    count(Policy, "sample")
    cut = tmp_path/"cut"
    run = replace(config, out=str(cut))
    for name, n in (("draw_crops", 2), ("sample", 3), ("draw_crops", 5)): # 1 | the third of round 2's bank | 3
        calls.update(dict.fromkeys(calls, 0))
        die.clear()
        die[name] = n
        with pytest.raises(KeyboardInterrupt, match=name): align(run)
        here = cut/"round-1" if n == 2 else cut
        if name == "draw_crops": assert latest_checkpoint(here).name == "checkpoint-00000002"
        else: assert len(finished_groups(cut/"crops-round-2")) == 1
        assert (cut/"round-1"/"adapter").exists() == (n > 2) and (cut/"round-2"/"adapter").exists() == (n == 5)
    die.clear()
    same_result(align(run), whole)
    for k in (1, 2): same = weights(cut/f"round-{k}"), weights(whole/f"round-{k}")
    assert all(torch.equal(same[0][n], same[1][n]) for n in same[0])
    calls["draw_crops"] = calls["sample"] = 0
    assert align(run) == cut and not any(calls.values())
    assert "resumed at step 2" in capsys.readouterr().out


def test_a_budget_pays_for_all_rounds(config):
    one = replace(config, rounds=1)
    (bank, update), (banks, same) = cost(one, 2, 1), cost(config, 2, 1)
    assert banks == 3*bank > 0 and same == update
    run = replace(config, budget=int(banks+3*2*update)+1)
    assert loop_of(run, 2, 1).steps == 2 and loop_of(replace(run, budget=run.budget-2), 2, 1).steps == 1
    assert loop_of(config, 2, 1) is config.loop


@pytest.mark.slow
def test_the_bare_base_and_an_adapter_share_a_folder_of_banks(one, config, tmp_path):
    banks = str(tmp_path/"banks")
    for k, adapter in enumerate((str(one), None)):
        out = align(replace(config, out=str(tmp_path/str(k)), rounds=1, banks=banks,
                            base=replace(config.base, adapter=adapter)))
    same_result(out, one)
    for name in ("begun", "begun-bank", "begun-before-2", "bank", "before-2"): assert (tmp_path/"banks"/name).is_dir()


@pytest.mark.repeat
def test_rounds_of_other_methods(config, tmp_path):
    "Samples against photographs without a reward; a supervised start; the policy's own states"
    started = Method(losers=Samples(), link=Logistic(10.), start=replace(ASASR.start, start_loop=LOOP))
    online = Method(winners=Top(1), losers=Own(2, 2, 1, 2), link=Hinge(1.))
    for k, (method, more) in enumerate(((started, dict(reward=None)), (online, {}))):
        run = replace(config, out=str(tmp_path/str(k)), method=method, rounds=2, loop=replace(LOOP, steps=2))
        out = align(fill(run, more))
        ranks = [json.loads((o/"adapter"/"adapter_config.json").read_text())["r"] for o in (out/"round-1", out)]
        assert ranks == ([4, 6] if method.start else [2, 4])
        policy = load_adapter(from_pretrained(config.base.backbone), out/"adapter")
        assert sampled(policy, out/"bank-after")


# ---------------------------------------------------------------- from an adapter of an earlier run

def test_a_run_goes_on_from_an_earlier_one(one, config, tmp_path, tiny):
    "Its adapter draws the bank, is judged as before, is the reference, and is in what is written"
    base = replace(config.base, adapter=str(one))
    banks = tmp_path/"banks"
    out = align(replace(config, out=str(tmp_path/"next"), base=base, rounds=1, banks=str(banks)))
    earlier, later = (load_adapter(from_pretrained(tiny), o/"adapter") for o in (one, out))
    assert sampled(earlier, banks/"begun-bank") and sampled(earlier, banks/"begun-before-2")
    assert sampled(later, out/"bank-after") and not sampled(later, banks/"begun-bank")
    a, b = weights(out), weights(one)
    for n in b: assert torch.equal(a[n][:2] if "lora_A" in n else a[n][:, :2], b[n])
    assert pd.read_parquet(out/"log.parquet").drift[0] == 0
    said, plain = (json.loads((o/"config.json").read_text())["params"]["stands_for"] for o in (out, one))
    assert said["adapter"] == adapter_digest(one/"adapter") and "adapter" not in plain and said["base"] == plain["base"]
    one.rename(tmp_path/"moved") # it may be moved, and it is the same run
    moved = replace(config, out=str(out), base=replace(base, adapter=str(tmp_path/"moved"/"adapter")), rounds=1)
    assert align(replace(moved, banks=str(banks))) == out
    (tmp_path/"moved").rename(one)
    with pytest.raises(RunOccupied, match="adapter"):
        align(replace(config, out=str(tmp_path/"other"), rounds=1, banks=str(banks),
                      base=replace(base, adapter=str(out))))
    with pytest.raises(RunOccupied, match="adapter"): align(replace(config, out=str(out), rounds=1))


def test_what_an_adapter_was_trained_on_is_not_judged(one, config, tmp_path, idle):
    seen = json.loads((one/"adapter"/"photos.json").read_text())
    photos = embedded_photos("train")[:2]
    assert set(seen) >= {p.sha256 for p in photos}
    base = replace(config.base, adapter=str(one))
    (tmp_path/"pictures").mkdir()
    for p in photos: (tmp_path/"pictures"/p.path.name).write_bytes(p.path.read_bytes())
    (tmp_path/"others").mkdir()
    for p in embedded_photos("train")[2:4]: (tmp_path/"others"/p.path.name).write_bytes(p.path.read_bytes())
    data = replace(config.data, photos=(str(tmp_path/"others"),), held_out=(str(tmp_path/"pictures"),))
    with pytest.raises(ValueError, match=f"was in the training of {one}.*held_out"):
        align(replace(config, out=str(tmp_path/"out"), base=base, data=data))
    assert not (tmp_path/"out").exists()


def test_an_adapter_of_another_base_is_refused(config, one, tmp_path, idle):
    policy = from_pretrained(config.base.backbone)
    with torch.no_grad():
        for p in policy.net.parameters(): p.add_(.01*torch.randn(p.shape, generator=generator(1)))
    save_pretrained(policy, tmp_path/"other")
    run = fill(replace(config, out=str(tmp_path/"out")), dict(adapter=str(one), backbone=str(tmp_path/"other")))
    with pytest.raises(ValueError, match="does not fit this network.*load it onto its own base"): align(run)
    copied = from_pretrained(config.base.backbone)
    copied.add_copy("embed")
    save_adapter(copied, tmp_path/"copied")
    with pytest.raises(ValueError, match="copied is no plain LoRA"):
        align(fill(run, dict(adapter=str(tmp_path/"copied"), backbone=config.base.backbone)))
    assert not (tmp_path/"out").exists()


@pytest.mark.parametrize("change, named", [
    (dict(rounds=0), "rounds.*0"), (dict(winners="Photograph", losers="Given"), "rounds = 3.*Given"),
    (dict(winners="Photograph", losers="Nobody", link=None), "rounds = 3.*Nobody"),
    (dict(drift=.1, budget=10**6), "drift = 0.1.*rounds = 3"), (dict(train="whole"), "LoRA"),
    (dict(adapter="nowhere"), "nowhere")])
def test_config(config, change, named):
    with pytest.raises((ValueError, FileNotFoundError), match=named): fill(config, change)


def test_two_references_are_refused(config, one):
    with pytest.raises(ValueError, match="Base.adapter.*Method.start"):
        replace(config, rounds=1, base=replace(config.base, adapter=str(one)), method=ASASR, judging=Judging(None))


def test_tracked_noise_is_that_of_the_rounds_own_bank(config, tmp_path, monkeypatch):
    "Sampled again from these seeds by the policy of its round, each picture is that of the bank"
    real, seen = Bottom.chosen, []
    def chosen(self, work):
        pairs, m = real(self, work), work.run.m
        for o, lq, w, l, seeds in zip(work.ids, pairs.lq, pairs.winners, pairs.losers, pairs.seeds, strict=True):
            assert {*seeds.tolist()} <= {*group_seeds(o, m, work.round-1)}
            sr = work.policy.sample(core.to_floats(lq[None]), seeds.tolist(), work.steps, work.sampler)[0]
            far = core.to_bytes(work.run.base.colour.images(sr, core.to_floats(lq), work.policy.codec)).int()
            seen.append((work.round, (far-torch.cat([w, l]).int()).abs().max().item()))
        return pairs
    monkeypatch.setattr(Bottom, "chosen", chosen)
    method = replace(config.method, losers=Bottom(tracked=True))
    base = replace(config.base, sampler="ddim")
    align(replace(config, out=str(tmp_path/"run"), method=method, base=base, rounds=2, patch=64))
    assert {k for k, _ in seen} == {1, 2} and max(far for _, far in seen) <= 1
