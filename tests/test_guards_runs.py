"Every kind of run: what each field changes, what is judged and trained on, and how `fit` moves a weight"
import functools
import gc
import hashlib
import json
import math
import re
from dataclasses import fields, replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from srnb import core, data
from srnb.adversary import adversary_loser
from srnb.backbones import BackboneOptions
from srnb.baselines import BASELINES
from srnb.core import bicubic, check_close, generator, to_pil
from srnb.curation import finished_groups, group_seeds, hpo_weights, read_group, top_bottom
from srnb.data import embedded_photos, find_photos, make_pair
from srnb.degrade import RESSHIFT_TEST, SEESR
from srnb.nets import OneStepConfig, OneStepUNet, SmallUNet, UNetConfig
from srnb.paths import SAMPLERS, VPV, Shift
from srnb.policies import PixelCodec, Policy, from_pretrained, load_adapter, save_pretrained
from srnb.rewards import PIQE, PSNR_Y, ST_LPIPS_ALEX, ST_LPIPS_VGG, Reward, hybrid, score_group
from srnb.rewards import GlobalBounds, GroupMinMax # isort: skip
from srnb.spectral import l2_energy

# ---------------------------------------------------------------- today's interface: who changes it changes this part

from srnb.align import AlignRun, train_align # noqa: E402  isort: skip
from srnb.consistency import trajectory_gap # noqa: E402  isort: skip
from srnb.onestep import CTMSRRun, onestep_loss, train_ctmsr # noqa: E402  isort: skip
from srnb.training import ASASRRun, DPORun, Loop, SFTRun, train_asasr, train_dp2o, train_sft # noqa: E402  isort: skip
from srnb.training import evaluate_base, fit, latest_checkpoint # noqa: E402  isort: skip

RUNS = dict(sft=(SFTRun, train_sft), dp2o=(DPORun, train_dp2o), asasr=(ASASRRun, train_asasr),
            align=(AlignRun, train_align), ctmsr=(CTMSRRun, train_ctmsr))
PLACES = {"out_dir", "banks"} # fields that name places alone


def make_run(kind, out, **changes): return RUNS[kind][0](str(out), **changes)
def do(run): return next(f for c, f in RUNS.values() if isinstance(run, c))(run)
def fields_of(kind): return {f.name for f in fields(RUNS[kind][0])}
def field_of(run, name): return getattr(run, name)
def fitted(net, loss, loop, folder, backward=None, memory=None): return fit(net, loss, loop, folder, backward, memory)
def newest(folder): return latest_checkpoint(folder)
def judge_base(out, **what): return evaluate_base(out, **what)


def matching_step(pool, policy):
    "The loss of one micro-batch of CTMSR's second stage"
    def lpips(a, b): return (a-b).square().mean((1, 2, 3))
    loss = onestep_loss(pool, policy, 2, 32, 16, 0, lambda step: 3, lpips, trajectory_gap, lambda step: policy)
    return loss(policy.net, 0, 0)


FEW = Loop(steps=2, lr=1e-2, warmup=1, save_every=2, log_every=1, keep_every=1)
FASTER = replace(FEW, lr=2e-2)


def common(w):
    return dict(backbone=w["tiny"], photos=(w["train"],), held_out=(w["held"],), size=64, places=1, patch=32, steps=2,
                eval_m=2, rank=2, judges=("psnr_y",), precision="no", loop=FEW)


def align(w):
    return common(w) | dict(m=4, n=2, batch=1, reward="offline_nr", cells=2, every=2, capacity=4, refresh=2, kappa=10.,
                            gate=1.)


def small_net(w):
    return dict(photos=(w["train"],), degradation="resshift_test", versions=1, max_side=112, channels=(16, 16),
                blocks=(1, 1), patch=32, batch=2, precision="no", loop=FEW)


def one_step(w):
    return small_net(w) | dict(held_out=(w["held"],), tail=8, window=24, size=64, eval_m=2, judges=("psnr_y",),
                               match_loop=FEW)


def continued(w):
    return {k: v for k, v in one_step(w).items() if k not in ("channels", "blocks", "tail")} | dict(init=w["onestep"])


SETTINGS = dict( # name -> kind of run, and how it is set up
    sft=("sft", lambda w: small_net(w) | dict(mean_channels=8, mean_blocks=1)),
    dp2o=("dp2o", lambda w: common(w) | dict(m=4, n=2, groups=1, reward="offline_nr", kappa=10.)),
    asasr=("asasr", lambda w: common(w) | dict(outputs=("bicubic", "base"), batch=1, adversary_rank=3, kappa=100.,
                                               sft=FEW, imitation=FEW)),
    riesz=("asasr", lambda w: SETTINGS["asasr"][1](w) | dict(loser="riesz", radius=.05)),
    bottom=("align", lambda w: align(w) | dict(winners="top", losers="bottom", link="logistic")),
    own=("align", lambda w: align(w) | dict(winners="expert", losers="policy", link="hinge", batch=2,
                                            loop=replace(FEW, steps=3))),
    adversary=("align", lambda w: align(w) | dict(winners="photograph", losers="adversary", link="logistic",
                                                  outputs=("bicubic", "base"), adversary_rank=3, imitation=FEW)),
    ctmsr=("ctmsr", one_step),
    continued=("ctmsr", continued))
ONE = dict(n=1, hpo="none") # one winner and one loser, whose weight is 1


def given(name): return lambda w: w[name]
def folder(name): return lambda w: (w[name],)


# setting -> field -> another value, or what gives one from the folders; what must differ then ("error": it is refused)
PICTURES = dict( # of every run on a small policy
    backbone=(given("tiny2"), "before after metrics"), photos=(folder("others"), "bank adapter"),
    held_out=(folder("others_held"), "before after metrics"), degradation=("seesr", "bank before after"),
    size=(80, "bank before after"), places=(2, "bank adapter"), steps=(3, "before after"),
    eval_m=(3, "before after metrics"), judges=(("ssim_y",), "metrics"), precision=("bf16", "before after adapter"),
    take=(1, "bank before adapter"), seed=(1, "log adapter"), rank=(3, "adapter"), patch=(24, "log adapter"),
    loop=(FASTER, "log adapter"), options=(BackboneOptions(guidance=2.), "error"), prompts=(given("prompts"), "error"))
PATCHES = dict( # of a network trained from patches
    photos=(folder("others"), "log policy"), degradation=("seesr", "log policy"), versions=(2, "log policy"),
    max_side=(64, "log policy"), channels=((16, 32), "policy"), blocks=((1, 2), "policy"), patch=(24, "log policy"),
    batch=(3, "log policy"), seed=(1, "log policy"), precision=("bf16", "log policy"), loop=(FASTER, "policy"))
TABLE = dict(
    sft=PATCHES | dict(mean_channels=(16, "policy"), mean_blocks=(2, "policy"), init=(given("tiny"), "policy")),
    dp2o=PICTURES | dict(
        path=("vp_eps", "bank before after log"), sampler=("ab2", "bank before after"), m=(5, "bank log"),
        n=(1, "log adapter"), reward=("offline_fr", "bounds log metrics"), normaliser=("global", "log"),
        hpo=("none", "log"), kappa=(20., "log"), groups=(2, "log adapter"), safeguard=(True, "log")),
    asasr={f: (v, where.replace("bank", "outputs")) for f, (v, where) in PICTURES.items()} | dict(
        outputs=(("base",), "outputs adversary adapter"), loser=("given", "log adapter"), lam=(.1, "log adapter"),
        s=(0., "log adapter"), frequency=("radian", "log adapter"), unit_mean=(False, "log"), kappa=(200., "log"),
        rank=(3, "reference adapter"), adversary_rank=(4, "adversary log"), batch=(3, "reference adversary log"),
        patch=(24, "reference adversary log"), seed=(1, "adversary log adapter"), drift=(1e-9, "drift adapter"),
        sft=(FASTER, "reference"), imitation=(FASTER, "adversary")),
    riesz=dict(radius=(.1, "log adapter")),
    bottom=PICTURES | dict(
        m=(5, "bank log"), n=(1, "log adapter"), reward=("offline_fr", "bounds log metrics"), hpo=("none", "log"),
        kappa=(20., "log"), safeguard=(True, "log"), s=(1.5, "log adapter"), batch=(2, "log adapter"),
        budget=(16+3*4, "log adapter"), drift=(1e-9, "drift matched metrics"), link=("hinge", "log"),
        losers=("policy", "log adapter"), pairs=(given("pairs"), "log adapter")),
    own=dict(
        winners=("top", "log adapter"), gate=(2., "log"), every=(1, "log"), capacity=(2, "log"), refresh=(1, "log"),
        cells=(3, "log")),
    adversary=dict(
        outputs=(("base",), "outputs adversary log"), adversary_rank=(4, "adversary log"),
        imitation=(FASTER, "adversary log"), seed=(1, "adversary adapter")),
    ctmsr=PATCHES | dict(
        held_out=(folder("others_held"), "after metrics"), size=(80, "after metrics"), eval_m=(3, "after metrics"),
        judges=(("ssim_y",), "metrics"), take=(1, "log policy after"), tail=(16, "policy"), first=(5, "log"),
        last=(2, "log"), match=("sds", "log policy"), match_weight=(.8, "log policy"), weight_inside=(False, "log"),
        refresh=(1, "log"), lpips_weight=(.9, "log policy"), window=(32, "log policy"), match_loop=(FASTER, "policy")),
    continued=dict(init=(given("onestep2"), "log policy")))
OWN_BANKS = {"bank", "before", "outputs", "reference", "adversary"} # a run that must differ there shares nothing
NAMES = {"bank-after": "after", "held_out": "after"} # folders that another kind calls otherwise


def bank_of(setting, run, what):
    "The bank of a run's training crops, or of its held-out photographs before or after"
    (out, shared, _), kind = run, SETTINGS[setting][0]
    if what == "crops": return shared/("outputs" if kind == "asasr" else "bank")
    if what == "before": return shared/("before" if shared == out else "before-2")
    return out/dict(dp2o="after", asasr="after", align="bank-after", ctmsr="held_out")[kind]


def policies_of(setting, w, run, path=None):
    "The policy before, and after"
    out, shared, _ = run
    def base():
        policy = from_pretrained(w["tiny"], path)
        if SETTINGS[setting][0] != "asasr": return policy
        return load_adapter(policy, shared/"reference"/"adapter", "reference")
    return base(), load_adapter(base(), out/"adapter")


PEOPLE = """
import torch
from srnb.training import Pairs
def chosen():
    g, shapes = torch.Generator().manual_seed(0), ((3, 16, 16), (1, 3, 64, 64), (1, 3, 64, 64))
    lq, w, l = (torch.randint(0, 256, (2, *s), generator=g, dtype=torch.uint8) for s in shapes)
    return Pairs(list(lq), list(w), list(l), torch.ones(2, 1, 1))
"""

# ---------------------------------------------------------------- folders and runs that the tests share


def random_policy(folder, net, *rest, seed=0):
    g = generator(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g)*(.4/p[0].numel()**.5 if p.ndim > 1 else .05))
    return str(save_pretrained(Policy(net, *rest), folder))


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    "Folders of two small photographs each, two bases, two one-step networks, prompts and a reader's own pairs"
    top, photos = tmp_path_factory.mktemp("world"), embedded_photos("train")
    w = dict(tiny=str(tiny), prompts=str(top/"prompts.json"), pairs=f"{top}/people.py:chosen")
    for k, name in enumerate(("train", "held", "others", "others_held")):
        w[name] = str(top/name)
        (top/name).mkdir()
        for p in photos[2*k:2*k+2]: to_pil(p.read()[:, 60:156, 80:192].contiguous()).save(top/name/f"{p.id}.png")
    w["tiny2"] = random_policy(top/"tiny2", SmallUNet(UNetConfig((16, 16), (1, 1), 16)), seed=2)
    for k, name in enumerate(("onestep", "onestep2")):
        net = OneStepUNet(OneStepConfig((16, 16), (1, 1), tail=8))
        w[name] = random_policy(top/name, net, Shift(), Shift(), PixelCodec(), seed=k)
    (top/"prompts.json").write_text(json.dumps({p.id: "a tree" for p in photos[:4]}))
    (top/"people.py").write_text(PEOPLE)
    return w


def traces(*folders):
    "Digests of what a run left: of each table, bank and adapter, not of what it was told, nor of its checkpoints"
    found = {}
    for top in dict.fromkeys(folders):
        for f in sorted(top.rglob("*")):
            parts = f.relative_to(top).parts
            if f.suffix not in (".parquet", ".safetensors") and f.name != "bounds.json": continue
            if {"scores", "kept"} & set(parts) or any(o.startswith("checkpoint") for o in parts): continue
            name = re.sub(r"-\d.*", "", parts[0].split(".")[0])
            found.setdefault(NAMES.get(name, name), []).append((parts[1:], hashlib.sha256(f.read_bytes()).hexdigest()))
    return {n: sorted(o) for n, o in found.items()}


class Runs:
    "Each run is done once: its folder, that of what it shares, and its traces"
    def __init__(self, world, top): self.world, self.top, self.done, self.begun = world, top, {}, 0

    def make(self, setting, shared=False, **changes):
        "A config, in a folder of its own"
        (kind, given), self.begun = SETTINGS[setting], self.begun+1
        if shared and "banks" in fields_of(kind): changes["banks"] = str(self.top/f"banks-{setting}")
        return make_run(kind, self.top/f"run{self.begun}", **given(self.world) | changes)

    def run(self, setting, shared=False, **changes):
        key = setting, shared, repr(changes)
        if key not in self.done:
            run = self.make(setting, shared, **changes)
            out, banks = do(run), self.top/f"banks-{setting}"
            banks = banks if shared and banks.exists() else out
            if not self.done: # a run asks the collector several times, which would look at everything that was imported
                gc.collect()
                gc.freeze()
            self.done[key] = out, banks, traces(out, banks)
        return self.done[key]

    def base(self, setting): return self.run(setting, shared=True)

    def changed(self, setting, field):
        "The run whose one field has another value"
        value, where = TABLE[setting][field]
        if callable(value): value = value(self.world)
        assert field_of(self.make(setting), field) != value
        return self.run(setting, not OWN_BANKS & set(where.split()), **{field: value})


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch: # what costs time and decides nothing
        patch.setattr(data, "open_photo", functools.cache(data.open_photo))
        patch.setattr(core, "git_revision", lambda: None)
        yield Runs(world, tmp_path_factory.mktemp("runs"))
        gc.unfreeze()


def log_of(run): return pd.read_parquet(run[0]/"log.parquet")


# ---------------------------------------------------------------- every field

@pytest.mark.parametrize("kind", RUNS)
def test_every_field_of_every_run_has_an_entry(kind):
    known = {f for s, table in TABLE.items() if SETTINGS[s][0] == kind for f in table}
    assert fields_of(kind) - PLACES == known


@pytest.mark.parametrize("setting, field", [(s, f) for s, table in TABLE.items() for f in table])
def test_every_field_changed_alone_changes_what_a_run_leaves(runs, setting, field):
    where = TABLE[setting][field][1]
    if where == "error":
        with pytest.raises(ValueError, match=field.rstrip("s")): runs.changed(setting, field)
        return
    before, after = runs.base(setting)[2], runs.changed(setting, field)[2]
    assert all(n in after for n in where.split())
    assert [n for n in where.split() if before.get(n) == after[n]] == []


@pytest.mark.parametrize("setting", ["sft", "dp2o", "asasr", "own", "ctmsr"])
def test_the_same_config_leaves_the_same(runs, setting):
    "Without this the test above would show nothing; and sharing changes nothing"
    assert runs.base(setting)[2] == runs.run(setting)[2]


@pytest.mark.parametrize("setting, column", [("sft", "flow"), ("dp2o", "error_w"), ("asasr", "error_w"),
                                             ("bottom", "error_w"), ("own", "error_w"), ("adversary", "error_w"),
                                             ("ctmsr", "consistency")])
def test_every_micro_batch_of_every_step_is_a_draw_of_its_own(runs, setting, column):
    "Two micro-batches are not twice the first; a step that moves nothing is followed by another batch"
    still = field_of(runs.make(setting), "loop")
    still = replace(still, lr=1e-12, keep_every=0)
    one, two = (log_of(runs.run(setting, True, loop=replace(still, parts=p)))[column] for p in (1, 2))
    assert one[0] != pytest.approx(two[0], rel=1e-6) and one[0] != pytest.approx(one[1], rel=1e-6)


# ---------------------------------------------------------------- pictures: what was named, degraded as was named

@pytest.mark.parametrize("setting", ["dp2o", "asasr", "bottom", "ctmsr"])
def test_banks_hold_the_named_photographs_and_their_named_degradation(runs, setting):
    "Held out: the middle of each; training crops: the middle, then the corners"
    w, run = runs.world, runs.base(setting)
    banks = [(bank_of(setting, run, "after"), w["held"], None)]
    if setting != "ctmsr":
        more = runs.changed(setting, "places")
        banks += [(bank_of(setting, run, "before"), w["held"], None), (bank_of(setting, run, "crops"), w["train"], 1),
                  (bank_of(setting, more, "crops"), w["train"], 2)]
    if setting == "asasr": banks.append((run[1]/"held_out_outputs", w["held"], None))
    for bank, photos, places in banks:
        names = {(p.id if places is None else f"{p.id}-{k}"): (p, k) for p in find_photos(photos)
                 for k in range(places or 1)}
        assert set(finished_groups(bank)) == set(names)
        for i, (p, k) in names.items():
            group, (lq, gt) = read_group(bank, i), make_pair(p, 64, RESSHIFT_TEST, place=k)
            assert torch.equal(group.lq, lq) and torch.equal(group.gt, gt)


@pytest.mark.parametrize("setting, changes", [
    ("dp2o", dict(loop=replace(FEW, ema=.9))), ("dp2o", dict(path="vp_v", sampler="ab2", steps=3)),
    ("asasr", dict(loop=replace(FEW, ema=.9))), ("bottom", dict(loop=replace(FEW, ema=.9)))],
    ids=["dp2o", "ab2", "asasr", "align"])
def test_samples_before_are_the_bases_and_samples_after_the_adapters(runs, setting, changes):
    "Drawn again by hand: the run's path, sampler and steps, and a photograph's own seeds"
    run = runs.run(setting, "sampler" not in changes, **changes)
    path, sampler = VPV() if "path" in changes else None, SAMPLERS.get(changes.get("sampler"))
    policies = dict(zip(("before", "after"), policies_of(setting, runs.world, run, path), strict=True))
    for what, policy in policies.items():
        bank = bank_of(setting, run, what)
        for i in finished_groups(bank):
            group = read_group(bank, i)
            sr = policy.sample(group.lq[None], group_seeds(i, 2), changes.get("steps", 2), sampler)[0]
            assert torch.equal(sr, group.sr), (what, i)
    assert not torch.equal(group.sr, read_group(bank_of(setting, run, "before"), i).sr)


def test_the_crops_of_a_run_are_the_bases_samples_and_outputs(runs):
    run, policy = runs.base("dp2o"), from_pretrained(runs.world["tiny"])
    bank = bank_of("dp2o", run, "crops")
    for i in finished_groups(bank):
        group = read_group(bank, i)
        assert torch.equal(policy.sample(group.lq[None], group_seeds(i, 4), 2)[0], group.sr)
    run = runs.base("asasr")
    for bank in (run[1]/"outputs", run[1]/"held_out_outputs"):
        for i in finished_groups(bank):
            group = read_group(bank, i)
            assert torch.equal(group.sr[0], BASELINES["bicubic"](group.lq[None])[0])
            assert torch.equal(group.sr[1], policy.sample(group.lq[None], [0], 2)[0, 0])


def test_samples_of_a_one_step_run_are_those_of_the_policy_that_it_wrote(runs):
    run = runs.base("ctmsr")
    policy = from_pretrained(run[0]/"policy")
    for i in finished_groups(run[0]/"held_out"):
        group = read_group(run[0]/"held_out", i)
        assert torch.equal(policy.sample(group.lq[None], group_seeds(i, 2), 1)[0], group.sr)


# ---------------------------------------------------------------- metrics, from the banks, by hand

BLIND = Reward("offline_nr", nr=(PIQE,))


def rows_of(metrics, variant, image):
    "metric -> values in the order of the seeds"
    rows = metrics[(metrics.variant == variant) & (metrics.image == image)].sort_values("seed")
    return {n: o.value.tolist() for n, o in rows.groupby("metric")}


def spread_of(sr): # two seeds: their standard deviation is half their distance, times root 2
    return 255*((sr[0]-sr[1]).square()/2).mean().sqrt().item()


def by_hand(sr, gt, reward=None, bounds=None, metrics=(PSNR_Y,)):
    scores = score_group([*metrics, *(reward.metrics if reward else ())], sr, gt)
    if reward: scores["reward"] = hybrid(scores, reward, bounds)
    return {n: v.tolist() for n, v in scores.items()}


@pytest.mark.parametrize("setting, changes, reward", [
    ("dp2o", {}, BLIND), ("asasr", {}, None), ("bottom", dict(drift=1e-9), BLIND)], ids=["dp2o", "asasr", "align"])
def test_every_row_of_the_metrics_is_that_of_the_banks(runs, setting, changes, reward):
    "Before, after, matched and bicubic: scores, the reward on the bounds of the training bank, how far samples moved"
    run = runs.run(setting, True, **changes)
    out, metrics, codec = run[0], pd.read_parquet(run[0]/"metrics.parquet"), from_pretrained(runs.world["tiny"]).codec
    banks = {n: bank_of(setting, run, n) for n in ("before", "after")}
    if changes: banks["matched"] = out/"bank-matched"
    assert set(metrics.variant) == {*banks, "bicubic"}
    bounds = GlobalBounds.load(out/"bounds.json") if reward else None
    for i in finished_groups(banks["before"]):
        first = read_group(banks["before"], i)
        y = bicubic(first.lq[None], first.gt.shape[-2:])
        assert rows_of(metrics, "bicubic", i) == by_hand(y, first.gt, reward, bounds)
        for variant, bank in banks.items():
            group, found = read_group(bank, i), rows_of(metrics, variant, i)
            want = by_hand(group.sr, group.gt, reward, bounds)
            assert {n: found.pop(n) for n in want} == want, variant
            moved = [((a-b)/codec.scale).square().mean().item() for a, b in zip(group.sr, first.sr, strict=True)]
            check_close(found.pop("moved"), moved, rtol=1e-5)
            assert (max(moved) > 0) == (variant != "before")
            if "spread" in found: check_close(found.pop("spread"), [spread_of(group.sr)], rtol=1e-5)
            assert set(found) <= {"as_dpo_loss", "accuracy"} and (not found or variant == "after")


@pytest.mark.parametrize("setting", ["dp2o", "bottom"])
def test_the_bounds_of_the_reward_are_those_of_the_training_bank(runs, setting):
    run = runs.base(setting)
    bank = bank_of(setting, run, "crops")
    scores = torch.cat([score_group([PIQE], read_group(bank, i).sr)["piqe"] for i in finished_groups(bank)])
    worst, best = scores.max().item(), scores.min().item()
    assert GlobalBounds.load(run[0]/"bounds.json").bounds == (("piqe", worst, best),)


def test_every_row_of_a_one_step_runs_metrics_is_that_of_its_bank(runs):
    out = runs.base("ctmsr")[0]
    metrics = pd.read_parquet(out/"metrics.parquet")
    assert set(metrics.variant) == {"sr", "bicubic"}
    for i in finished_groups(out/"held_out"):
        group = read_group(out/"held_out", i)
        found = rows_of(metrics, "sr", i)
        check_close(found.pop("spread"), [spread_of(group.sr)], rtol=1e-5)
        assert found == by_hand(group.sr, group.gt)
        assert rows_of(metrics, "bicubic", i) == by_hand(bicubic(group.lq[None], group.gt.shape[-2:]), group.gt)


def test_every_row_of_a_bases_metrics_is_that_of_its_bank(runs):
    "Samples, their mean and bicubic, of the pictures and the policy that were named"
    w, out = runs.world, runs.run("sft", seed=5)[0]
    table = judge_base(out, held_out=(w["held"],), degradation="seesr", size=64, m=2, steps=2, take=1)
    metrics, photo = pd.read_parquet(out/"metrics.parquet"), find_photos(w["held"])[0]
    assert metrics.equals(table) and metrics.image.unique().tolist() == [photo.id]
    group = read_group(out/"held_out", photo.id)
    lq, gt = make_pair(photo, 64, SEESR)
    assert torch.equal(group.lq, lq) and torch.equal(group.gt, gt) and len(group.sr) == 2
    images = dict(sample=group.sr, mean=group.sr.mean(0, keepdim=True), bicubic=bicubic(lq[None], gt.shape[-2:]))
    for variant, sr in images.items():
        want = by_hand(sr, gt, metrics=[PSNR_Y, ST_LPIPS_ALEX, ST_LPIPS_VGG, PIQE])
        assert rows_of(metrics, variant, photo.id) == want, variant
    sr = from_pretrained(out/"policy", dtype=torch.bfloat16).sample(lq[None], group_seeds(photo.id, 2), 2)[0]
    assert torch.equal(sr, group.sr)


# ---------------------------------------------------------------- what is trained on, and towards what

def curated(bank, n, normaliser):
    "(group, winners, losers, weight) of every crop, from the bank's pictures alone"
    groups = [read_group(bank, i) for i in finished_groups(bank)]
    if normaliser == "global":
        scores = torch.stack([score_group([PIQE], o.sr)["piqe"] for o in groups])
        scale = GlobalBounds((("piqe", scores.max().item(), scores.min().item()),))
    else: scale = GroupMinMax()
    reward = torch.stack([hybrid(score_group([PIQE], o.sr), BLIND, scale) for o in groups])
    w, l = top_bottom(reward, n)
    return list(zip(groups, w, l, hpo_weights(reward, w, l), strict=True))


@pytest.mark.parametrize("setting, field, normaliser", [("dp2o", None, "group"), ("dp2o", "normaliser", "global"),
                                                        ("bottom", None, "group")])
def test_the_first_loss_is_ln_2_times_the_weight_of_a_crop(runs, setting, field, normaliser):
    "Of one group a step, by the normaliser that was named: the other would give other weights"
    run = runs.changed(setting, field) if field else runs.base(setting)
    weights = {}
    for name in ("group", "global"):
        weights[name] = [o[3].mean().item() for o in curated(bank_of(setting, run, "crops"), 2, name)]
    apart = min(abs(a-b) for a in weights["group"] for b in weights["global"])
    found = log_of(run).loss[0]/math.log(2)
    assert min(abs(found-o) for o in weights[normaliser]) < 1e-5 and apart > 1e-4, (found, weights)


def margin(policy, lq, winners, losers, levels=9):
    "How much further the winners' error fell than the losers', mean over noise levels"
    g, sigma = generator(3), torch.linspace(.1, .9, levels)
    eps, gaps = torch.randn(levels, 3, *(4*o for o in lq.shape[-2:]), generator=g), []
    for images in (winners, losers):
        gap = []
        for image in images:
            z = policy.codec.encode(image[None], lq[None]).expand_as(eps)
            x, target = policy.path.state(z, eps, sigma), policy.path.target(z, eps, sigma)
            cond = lq[None].expand(levels, -1, -1, -1)
            with torch.no_grad(): now = l2_energy(policy.residual(x, sigma, target, cond))
            with policy.reference(): gap.append((now-l2_energy(policy.residual(x, sigma, target, cond))).mean())
        gaps.append(torch.stack(gap).mean())
    return (gaps[1]-gaps[0]).item()


LONGER = replace(FEW, steps=16, lr=5e-3, keep_every=0)


SAMPLE = dict(winners="photograph", losers="sample")


@pytest.mark.parametrize("setting, changes", [("dp2o", ONE), ("bottom", ONE), ("asasr", dict(loser="given")),
                                              ("bottom", SAMPLE)], ids=["dp2o", "align", "asasr", "sample"])
def test_training_moves_towards_the_winners_and_away_from_the_losers(runs, setting, changes):
    "Best against worst samples, or the photograph against other pictures, judged on the bank by hand"
    run = runs.run(setting, True, loop=LONGER, **changes)
    policy, bank = policies_of(setting, runs.world, run)[1], bank_of(setting, run, "crops")
    found, curation = [], changes == ONE
    for group, w, l, _ in curated(bank, 1, "group"):
        winners, losers = (group.sr[w], group.sr[l]) if curation else (group.gt[None], group.sr)
        found.append(margin(policy, group.lq, winners, losers))
    assert sum(found) > 0, found


def test_training_moves_towards_the_photograph_and_away_from_what_the_adversary_makes_of_it(runs):
    run = runs.run("asasr", True, loop=LONGER)
    policy = policies_of("asasr", runs.world, run)[1]
    load_adapter(policy, run[1]/"adversary-3-0"/"adapter", "adversary", on=False)
    found = []
    for i in finished_groups(run[1]/"outputs"):
        group = read_group(run[1]/"outputs", i)
        z, cond = policy.codec.encode(group.gt[None], group.lq[None]), policy.encode(group.lq[None])
        eps, sigma = torch.randn(z.shape, generator=generator(1)), torch.tensor([.5])
        loser = policy.codec.decode(adversary_loser(policy, z, eps, sigma, cond), group.lq[None])
        found.append(margin(policy, group.lq, group.gt[None], loser))
    assert sum(found) > 0, found


def logistic(kappa): return lambda o: (1+(-kappa*(o.gap_l-o.gap_w)).map(math.exp)).map(math.log)
def hinge(gate): return lambda o: (gate-(o.gap_l-o.gap_w)).clip(lower=0)


def gated(gate): return lambda o: (gate+o.gap_w+o.drift).clip(lower=0) # without losers


@pytest.mark.parametrize("setting, changes, loss", [
    ("dp2o", ONE, logistic(1e3)), ("asasr", {}, logistic(1e3)), ("asasr", dict(loser="given"), logistic(1e3)),
    ("riesz", {}, logistic(1e3)), ("bottom", ONE, logistic(1e3)), ("bottom", ONE | dict(link="hinge"), hinge(.02)),
    ("bottom", SAMPLE, logistic(1e3)), ("adversary", {}, logistic(1e3)), ("own", dict(batch=1), hinge(.02)),
    ("own", dict(batch=1, link="logistic"), logistic(1e3)), ("own", dict(batch=1, losers="none"), gated(.02))],
    ids=["dp2o", "adversary", "given", "riesz", "bottom", "hinge", "sample", "align-adversary", "own", "own-logistic",
         "none"])
def test_the_loss_of_one_pair_is_the_link_of_its_margin(runs, setting, changes, loss):
    "From the log's own gaps, also where the policy has left its reference"
    known = dict(kappa=1e3, gate=.02)
    known = {n: v for n, v in known.items() if n in fields_of(SETTINGS[setting][0])}
    log = log_of(runs.run(setting, True, **known, **changes, loop=replace(FEW, steps=4, lr=3e-2, keep_every=0)))
    want, still = loss(log), loss(log.assign(gap_w=0., gap_l=0., drift=0.))
    check_close(log.loss.to_numpy(), want.to_numpy(), rtol=1e-4, atol=1e-7)
    assert (want-still).abs().max() > 1e-2*still.max() # the margin is large enough to see another kappa


def test_the_losses_of_a_network_from_patches_are_the_sums_of_their_parts(runs):
    log = log_of(runs.base("sft"))
    check_close(log.loss.to_numpy(), (log.flow+log["mean"]).to_numpy(), rtol=1e-5)
    log = log_of(runs.base("ctmsr"))
    check_close(log.loss.to_numpy(), (log.consistency+1.6*log.match.fillna(0.)).to_numpy(), rtol=1e-5)
    assert log.stage.tolist() == [1, 1, 2, 2] and (log.match[2:] > 0).all()


class Grey: # photographs of one grey, z = 0 and y = 0, so that a state is its noise alone
    def batch(self, n, patch, g): return torch.full((n, 3, patch//4, patch//4), .5), torch.full((n, 3, patch, patch), .5)


class Zero(torch.nn.Module): # answers 0, and remembers the states that it was asked about, in units of their noise
    def __init__(self):
        super().__init__()
        self.weight, self.asked = torch.nn.Parameter(torch.zeros(())), []
    def forward(self, x, sigma, lq):
        self.asked.append(x/sigma[:, None, None, None])
        return self.weight*x


def test_the_two_trajectories_share_their_noise_and_it_is_not_that_of_the_consistency_loss():
    policy = Policy(Zero(), Shift(), Shift(), PixelCodec())
    matching_step(Grey(), policy)
    first, *_, a, b = policy.net.asked
    check_close(a, b, atol=1e-5)
    assert (a-first).abs().mean() > .5 and (a[0]-a[1]).abs().mean() > .5


# ---------------------------------------------------------------- leaks

def seen_by(w, source, top, photos):
    "A copy of a policy's folder that says that it was trained on these photographs"
    policy = from_pretrained(w[source])
    save_pretrained(policy, top)
    (top/"photos.json").write_text(json.dumps([p.sha256 for p in photos]))
    return str(top)


@pytest.mark.parametrize("setting, field, source", [
    *((s, "backbone", "tiny") for s in ("dp2o", "asasr", "bottom", "own")), ("continued", "init", "onestep")])
def test_a_run_refuses_a_photograph_that_its_base_has_seen(runs, tmp_path, setting, field, source):
    "Among those to report on, and before anything is written; a base that has seen others is taken"
    held, others = (find_photos(runs.world[n]) for n in ("held", "others"))
    base = seen_by(runs.world, source, tmp_path/"base", [*others, held[1]])
    run = runs.make(setting, **{field: base})
    with pytest.raises(ValueError, match=f"{held[1].id}.* was in the training of"): do(run)
    assert not (runs.top/f"run{runs.begun}").exists()
    seen_by(runs.world, source, tmp_path/"base", others)
    out = do(run)
    if setting == "continued": # what a network has seen it has seen for ever
        train = find_photos(runs.world["train"])
        assert json.loads((out/"policy"/"photos.json").read_text()) == sorted(p.sha256 for p in (*train, *others))


def test_a_base_is_not_judged_by_what_it_has_seen(runs):
    "A run notes what it trained on; the photographs that ship as held out are refused as training photographs"
    out = runs.base("sft")[0]
    train = find_photos(runs.world["train"])
    assert json.loads((out/"policy"/"photos.json").read_text()) == sorted(p.sha256 for p in train)
    with pytest.raises(ValueError, match="was in the training of"):
        judge_base(out, held_out=(runs.world["train"],), size=64)
    with pytest.raises(ValueError, match="held out"):
        do(runs.make("sft", photos=(str(embedded_photos("held_out")[0].path.parent),)))


@pytest.mark.parametrize("setting", ["dp2o", "asasr", "bottom", "ctmsr"])
def test_a_run_refuses_to_report_on_what_it_trains_on(runs, setting):
    with pytest.raises(ValueError, match="same file"): do(runs.make(setting, held_out=(runs.world["train"],)))


# ---------------------------------------------------------------- the average of the weights is what a run leaves

ADAPTER = "adapter/adapter_model.safetensors"


def weights_of(file): # as PEFT names them, without the adapter's own name
    return {re.sub(r"\.(policy|reference|adversary)\.", ".", n): v for n, v in load_file(file).items()}


@pytest.mark.parametrize("setting, stages", [ # stage: field of its loop, its folder, what it wrote
    ("sft", [("loop", "", "policy/model.safetensors")]), ("dp2o", [("loop", "", ADAPTER)]),
    ("asasr", [("loop", "", ADAPTER), ("sft", "reference", ADAPTER), ("imitation", "adversary-3-0", ADAPTER)]),
    ("bottom", [("loop", "", ADAPTER)]),
    ("adversary", [("loop", "", ADAPTER), ("imitation", "adversary-3-0", ADAPTER)]),
    ("ctmsr", [("match_loop", "stage2", "../policy/model.safetensors")])])
def test_what_a_run_leaves_is_the_average_and_not_the_last_step(runs, setting, stages):
    out, _, _ = runs.run(setting, **{name: replace(FEW, ema=.9) for name, _, _ in stages})
    for _, stage, file in stages:
        kept, saved = weights_of(out/stage/file), newest(out/stage)
        average, last = (weights_of(saved/f"{n}.safetensors") for n in ("average", "trained"))
        assert average and set(average) <= set(kept)
        assert all(torch.equal(kept[n], v) for n, v in average.items())
        assert any(not torch.equal(kept[n], last[n]) for n in average)


# ---------------------------------------------------------------- fit: one weight, a linear loss, a path known by hand

SLOPES = [.3, -2., .05, 4., -.1, 1.] # of the loss in the weight, step by step
FACTORS = [.5, 1., 1., 1., 2/3, 1/3] # of the rate: two steps of warm-up, and a fall over the last half
TOY = Loop(steps=6, lr=.1, warmup=2, decay=.5, weight_decay=.2, clip=1., save_every=2, log_every=1, keep_every=1)


def adamw(slopes, factors=FACTORS, w=.5, lr=.1, decay=.2, clip=1.):
    "Weights after each step of AdamW (betas .9 and .999, eps 1e-8) with the gradient's norm bounded"
    m, v, path = 0., 0., []
    for k, g in enumerate(slopes, 1):
        g *= min(1., clip/(abs(g)+1e-6))
        m, v, rate = .9*m+.1*g, .999*v+.001*g*g, lr*factors[k-1]
        w -= rate*decay*w
        w -= rate*(m/(1-.9**k))/((v/(1-.999**k))**.5+1e-8)
        path.append(w)
    return path


class Sum: # remembers the slopes that it was asked for
    def __init__(self): self.total = torch.zeros(1)
    def tensors(self): return dict(total=self.total.clone())
    def restore(self, tensors): self.total = tensors["total"].clone()


def scheduled(step, part): return SLOPES[step]


def toy(top, loop=TOY, slope=scheduled, backward=None, stop=None, shape=(1, 1), memory=None):
    "Fit a weight of .5 to slope*weight, the mean of two samples: the weights that come back, log, kept weights, calls"
    net, calls = torch.nn.Linear(*shape, bias=False), []
    torch.nn.init.constant_(net.weight, .5)
    def loss(model, step, part):
        if step == stop: raise KeyboardInterrupt
        calls.append((step, part))
        if memory: memory.total += slope(step, part)
        return model(torch.tensor([[.5], [1.5]]).expand(2, shape[0])).mean(1)*slope(step, part), dict(part=float(part))
    weights, log = fitted(net, loss, loop, top, backward, memory)
    kept = {int(f.stem): load_file(f)["weight"].mean().item() for f in sorted((top/"kept").glob("*.safetensors"))}
    return weights["weight"].mean().item(), log, kept, calls


def test_a_weights_path_is_that_of_adamw_with_clipped_gradients_and_scheduled_rates(tmp_path):
    last, log, kept, calls = toy(tmp_path)
    assert list(kept) == [1, 2, 3, 4, 5, 6] and calls == [(k, 0) for k in range(6)]
    check_close(list(kept.values()), adamw(SLOPES), rtol=1e-5)
    check_close(last, kept[6])
    check_close(log.grad_norm.to_numpy(), [abs(o) for o in SLOPES], rtol=1e-5) # before it is bounded
    check_close(log.loss.to_numpy(), [g*w for g, w in zip(SLOPES, [.5, *adamw(SLOPES)[:5]], strict=True)], rtol=1e-5)
    for wrong in (dict(clip=1e9), dict(decay=0.), dict(factors=[1.]*6), dict(factors=[*FACTORS[1:], 0.])):
        assert max(abs(a-b) for a, b in zip(adamw(SLOPES, **wrong), kept.values(), strict=True)) > 1e-3, wrong


def own(accelerator, values, logs): # a backward of the caller's own
    values.mean().backward()
    return dict(logs, own=1.)


@pytest.mark.parametrize("backward", [None, own], ids=["mean", "own"])
def test_the_micro_batches_of_a_step_are_apart_and_averaged(tmp_path, backward):
    "With the loop's backward, and with one of the caller's own"
    spread = [-.2, .3, .5]
    _, log, kept, calls = toy(tmp_path, replace(TOY, parts=3), lambda step, part: SLOPES[step]+spread[part], backward)
    assert calls == [(k, p) for k in range(6) for p in range(3)]
    check_close(log.grad_norm.to_numpy(), [abs(o+.2) for o in SLOPES], rtol=1e-5)
    check_close(list(kept.values()), adamw([o+.2 for o in SLOPES]), rtol=1e-5)
    assert (log.part == 1.).all() and ("own" in log) == (backward is own) # logs are means over the parts


def test_the_average_is_what_comes_back(tmp_path):
    "decay min(.8, (1+k)/(10+k)) of the path's weights, from the first"
    last, _, kept, _ = toy(tmp_path, replace(TOY, ema=.15))
    average = .5
    for k, w in enumerate(kept.values()):
        d = min(.15, (1+k)/(10+k))
        average = d*average + (1-d)*w
    check_close(last, average, rtol=1e-5)
    check_close(list(kept.values()), adamw(SLOPES), rtol=1e-5) # what is kept is the path itself
    assert abs(average-kept[6]) > 1e-4


def left(top, memory=None, **changes):
    "What a loop leaves that is stopped before step 5 and goes on"
    loop, shape = replace(TOY, **changes), (64, 128) if changes.get("optimiser") else (1, 1)
    def slope(step, part): return SLOPES[step % 6]*(1+part)
    with pytest.raises(KeyboardInterrupt): toy(top, loop, slope, stop=min(5, loop.steps-1), shape=shape, memory=memory)
    saved = newest(top).name if newest(top) else None
    last, log, kept, calls = toy(top, loop, slope, shape=shape, memory=Sum() if memory else None)
    return dict(last=last, log=log.to_dict("list"), kept=kept, calls=calls, saved=saved)


LOOP = dict( # field -> another value, what it changes
    steps=(4, "calls"), lr=(.2, "kept"), warmup=(1, "kept"), decay=(.25, "kept"), parts=(2, "calls"),
    weight_decay=(0., "kept"), clip=(.5, "kept"), ema=(.9, "last"), save_every=(3, "saved"), log_every=(2, "log"),
    keep_every=(2, "kept"), optimiser=("adamw_8bit", "kept"))


def test_every_field_of_a_loop_has_an_entry():
    assert {f.name for f in fields(Loop)} == set(LOOP)


@pytest.mark.parametrize("field", LOOP)
def test_every_field_of_a_loop_changed_alone_changes_what_fit_does(tmp_path, field):
    value, where = LOOP[field]
    change = dict(optimiser="adamw") if field == "optimiser" else {}
    before, after = left(tmp_path/"a", **change), left(tmp_path/"b", **{field: value})
    assert before[where] != after[where]
    if field == "save_every": assert (before["saved"], after["saved"]) == ("checkpoint-00000004", "checkpoint-00000003")
    if field == "log_every": # rows are means over their steps
        rows = torch.tensor(before["log"]["loss"]).view(3, 2).mean(1)
        check_close(after["log"]["loss"], rows, rtol=1e-6)
        assert after["log"]["step"] == [2, 4, 6]


@pytest.mark.parametrize("ema", [0., .9])
def test_a_loop_that_was_stopped_goes_on_as_if_it_was_not(tmp_path, ema):
    "Weights, average, log and what the loss remembers"
    memory, loop = Sum(), replace(TOY, ema=ema)
    last, log, kept, _ = toy(tmp_path/"whole", loop, memory=memory)
    with pytest.raises(KeyboardInterrupt): toy(tmp_path/"cut", loop, stop=5, memory=Sum())
    again = Sum()
    last_cut, log_cut, kept_cut, calls = toy(tmp_path/"cut", loop, memory=again)
    assert calls == [(4, 0), (5, 0)] and (last, kept) == (last_cut, kept_cut) and log.equals(log_cut)
    assert torch.equal(memory.total, again.total)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    def slope(step, part): return [1., 1., math.nan][step]
    with pytest.raises(FloatingPointError, match="step 2"): toy(tmp_path, slope=slope)
