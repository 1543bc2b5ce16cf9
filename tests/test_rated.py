"Rated groups: numbers by hand, fresh candidates killed and resumed, the right way on a known reward, what is refused"
import math
from dataclasses import replace

import pandas as pd
import pytest
import torch
from conftest import same_result

import srnb.rated
from srnb.align import Bottom, Candidates, Fresh, Method, Rated, Run, Top, Work, align, cost
from srnb.config import fill
from srnb.core import check_close, generator, to_bytes
from srnb.curation import Group, group_seeds
from srnb.nets import OneStepConfig, OneStepUNet
from srnb.pairs import Logistic
from srnb.paths import Shift
from srnb.policies import PixelCodec, Policy, from_pretrained, save_pretrained
from srnb.preference import dpo_loss
from srnb.rated import (CRD, DGPO, NFT, Advantages, FreshDraw, Ratings, average_snapshot, crd_loss, dgpo_loss,
                        draw_rated, draw_tracked, nft_loss, rated_loss)
from srnb.rewards import Metric, Reward
from srnb.runs import Base, Data, Judging, inputs_of, policy_of
from srnb.training import Loop, latest_checkpoint


def one(*values): return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


def slope(f, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x).sum(), x)[0]


def nft(d, e, r, beta=1., level=None): # v_old = 0, T = e
    return nft_loss(one(*d)-one(*e), -one(*e), torch.tensor(r, dtype=torch.float64), beta, level=level)


# ---------------------------------------------------------------- by hand

def test_nft_by_hand():
    "Fixed point, the minimum, the gradient, and the limits"
    check_close(nft([0.]*3, [2.]*3, [0., .5, 1.]), [4.]*3)
    check_close(nft([.5], [1.], [.75]), [.75])
    check_close(nft([.3], [2.], [.9], 1.5), [.9*(.45-2)**2+.1*(.45+2)**2], atol=1e-12) # away from the fixed point
    def at(d): return nft_loss(d-2., one(-2.), torch.tensor([.9]).double(), 1.5)
    check_close(slope(at, one(.3)), one(2*1.5**2*.3-2*1.5*.8*2), atol=1e-6)
    check_close((at(one(.3+1e-5))-at(one(.3-1e-5)))/2e-5, [2*1.5**2*.3-2*1.5*.8*2], atol=1e-6)
    check_close(slope(lambda d: nft_loss(d-2., one(-2.), torch.tensor([.5]).double()), one(0.)), one(0.))
    check_close(nft([.7, -.7], [1., 1.], [1., 0.]), [.09, .09], atol=1e-12) # the target, and its mirror image


def test_nft_adaptive_by_hand():
    "One value: each branch is its absolute error times the level; the gradient's size is free of the error's"
    level = torch.full((1,), .4, dtype=torch.float64)
    check_close(nft([.5], [2.], [.75], level=level), [.4*(.75*1.5+.25*2.5)], atol=1e-12)
    for e in (.5, 2., 50.):
        def at(d, e=e): return nft_loss(d-e, one(-e), torch.tensor([.75]).double(), level=level)
        check_close(slope(at, one(0.)), one(-2*.4*.5), atol=1e-12)


def test_dgpo_by_hand():
    gap, a = torch.tensor([[.2, -.1]], dtype=torch.float64), torch.tensor([[1., -1.]]).double()
    check_close(dgpo_loss(gap, a, 4.), [math.log(1+math.exp(4*.15))], atol=1e-12) # mean of .2 and .1
    check_close(dgpo_loss(gap, a, 4.), dpo_loss(torch.tensor([-.3], dtype=torch.float64), 2.), atol=1e-12)
    check_close(dgpo_loss(0*gap, a, 4.), [math.log(2)], atol=1e-12)
    w = 1/(1+math.exp(-.6))
    check_close(slope(lambda o: dgpo_loss(o, a, 4.), gap), [[2*w, -2*w]], atol=1e-12)
    for moved in (dgpo_loss(gap+3, a, 4.), dgpo_loss(gap, a+3, 4.)):
        check_close(moved, dgpo_loss(gap, a, 4.), atol=1e-12)


def test_crd_by_hand():
    q, a = torch.tensor([[.2, -.1]], dtype=torch.float64), torch.tensor([[1., -1.]]).double()
    check_close(crd_loss(q, a, 2.), [(2*.3-2)**2/16], atol=1e-12)
    check_close(crd_loss(0*q, a, 2.), [1/4], atol=1e-12)
    check_close(crd_loss(a/2, a, 2.), [0.], atol=1e-12)
    check_close(slope(lambda o: crd_loss(o, a, 2.), 0*q), [[-.5, .5]], atol=1e-12) # -A/K, of any beta
    check_close(slope(lambda o: crd_loss(o, a, 200.), 0*q), [[-.5, .5]], atol=1e-12)


def test_advantages_by_hand():
    reward = torch.tensor([[0., 1., 2.], [5., 5., 5.]]).double()
    check_close(Advantages()(reward), [[-1/(reward.std(correction=0).item()+1e-4), 0,
                                        1/(reward.std(correction=0).item()+1e-4)], [0, 0, 0]], atol=1e-9)
    check_close(Advantages(overall=False)(reward), [[-1, 0, 1], [0, 0, 0]], atol=1e-7)
    assert Advantages(overall=False, clip=.3)(reward).unique().tolist() == pytest.approx([-.3, 0, .3])


# ---------------------------------------------------------------- the right way

def shine(): return Metric("shine", "nr", True, lambda: lambda sr, gt: sr.mean((1, 2, 3)).double())


@pytest.fixture
def toy(tiny):
    policy = from_pretrained(tiny)
    policy.add_lora(4, name="snapshot")
    policy.off = {"snapshot"}
    params = policy.add_lora(4)
    groups = [Group(f"p{k}", torch.rand(3, 8, 8, generator=generator(k)), None, torch.empty(0)) for k in range(2)]
    def brightness():
        return torch.stack([policy.sample(o.lq[None], group_seeds(o.id, 4), 2)[0].mean((1, 2, 3)) for o in groups])
    return policy, params, groups, brightness


def trained(policy, params, loss, steps, lr=1e-2):
    opt = torch.optim.Adam(params, lr)
    for k in range(steps):
        opt.zero_grad()
        loss(k, 0)[0].mean().backward()
        opt.step()


AGAIN = pytest.mark.repeat


@pytest.mark.parametrize("link, sign", [
    (NFT(full=2.), 1.), (DGPO(30.), -1.), *(pytest.param(*o, marks=AGAIN) for o in (
        (NFT(full=2.), -1.), (DGPO(30.), 1.), (CRD(30.), 1.), (CRD(30.), -1.)))])
def test_samples_become_what_is_rewarded(toy, link, sign):
    "Offline: the policy's own samples, rated by their brightness or darkness; the same seeds before and after"
    policy, params, groups, brightness = toy
    before = brightness()
    seeds = {o.id: group_seeds(o.id, 8, 1) for o in groups}
    sr = [to_bytes(policy.sample(o.lq[None], seeds[o.id], 2)[0]) for o in groups]
    reward = torch.stack([sign*o.double().mean((1, 2, 3)) for o in sr])
    rated = Ratings([o.lq for o in groups], sr, Advantages(overall=False)(reward))
    trained(policy, params, rated_loss(lambda k, _: draw_rated(rated, policy, 2, 32, k, 6), policy, link), 6)
    after = brightness()
    assert sign*(after-before).mean() > 0 and not torch.equal(before, after), (after-before).mean()


def test_fresh_samples_become_what_is_rewarded(toy):
    "Online: the snapshot follows, and what it samples is rewarded more and more"
    policy, params, groups, brightness = toy
    before = brightness()
    def sample(group, seeds): return policy.sample(group.lq[None], seeds, 2)[0]
    draw = FreshDraw(groups, policy, 2, 32, 0, sample, lambda group, sr: sr.mean((1, 2, 3)), Advantages(), 6, 2, 3, .5,
                     .001)
    trained(policy, params, rated_loss(draw, policy, NFT(full=1.), old=["snapshot"]), 9)
    assert (brightness()-before).mean() > 0
    with policy.using("snapshot"): followed = brightness()
    assert (followed-before).abs().max() > 0


def test_the_snapshot_is_a_moving_average(toy):
    policy, *_ = toy
    def held(name): return torch.cat([o.lora_B[name].weight.flatten() for o in policy._layers])
    average_snapshot(policy, 0.)
    for layer in policy._layers: layer.lora_B["policy"].weight.data += 1
    average_snapshot(policy, .75)
    check_close(held("snapshot"), .25*held("policy"), atol=1e-6)


# ---------------------------------------------------------------- runs

@pytest.fixture(scope="module")
def config(tiny):
    loop = Loop(steps=5, lr=1e-2, warmup=1, save_every=2, log_every=1)
    return Run("", data=Data(size=64, places=1, take=2), base=Base(str(tiny), precision="no", sample_steps=1),
               judging=Judging(Reward("shining", nr=(shine(),)), m=4, judges=("psnr_y",), eval_m=1), loop=loop, rank=2,
               batch=1, patch=32)


ONLINE = Method(winners=Rated(frozen=False), losers=Fresh(3, 1, 3, ramp=.1), link=NFT(full=2.))


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    "A run that nobody disturbed; candidates are renewed at updates 0 and 3, checkpoints are at 2, 4, 5"
    return align(replace(config, out=str(tmp_path_factory.mktemp("runs")/"whole"), method=ONLINE))


def killed(config, out, deadly):
    "An online run, killed at update 2, between two sets of candidates; its checkpoint holds the candidates in use"
    count, calls, die = deadly
    count(srnb.rated, "draw_rated")
    die["draw_rated"] = 2
    run = replace(config, out=str(out), method=ONLINE)
    with pytest.raises(KeyboardInterrupt, match="draw_rated"): align(run)
    rows = torch.load(latest_checkpoint(out)/"state.pt")["memory"]
    shapes = {"0.item": (1,), "0.sr": (1, 3, 3, 64, 64), "0.reward": (1, 3)}
    assert {k: tuple(v.shape) for k, v in rows.items()} == shapes
    die.clear()
    return run


def test_killed_and_resumed(whole, config, tmp_path, deadly):
    same_result(align(killed(config, tmp_path/"run", deadly)), whole)


@pytest.mark.slow
def test_candidates_that_were_lost_show(whole, config, tmp_path, deadly, monkeypatch):
    run = killed(config, tmp_path/"run", deadly)
    monkeypatch.setattr(FreshDraw, "restore", lambda self, tensors: None)
    with pytest.raises(AssertionError): same_result(align(run), whole)


def test_what_an_online_run_logs(whole):
    log = pd.read_parquet(whole/"log.parquet")
    assert log.drift[0] == 0 and (log.drift[1:3] > 0).all() and {"gap_w", "gap_l", "error"} <= set(log)
    assert 0 < log.drift[3] < .5*log.drift[2] # the old policy has just come closer


def test_an_online_budget_is_never_exceeded(config):
    "The first set of candidates is paid for; later ones share it among their updates"
    run = replace(config, method=ONLINE)
    before, update = cost(run, 2, 1)
    states = 3*1*(2+1+1)*(32/64)**2 # two forwards, a backward's one more, the old policy
    whole_set = 3*1*(64/64)**2
    assert update == pytest.approx(states+whole_set/3) and before == pytest.approx(whole_set*2/3)
    for steps in range(1, 8): assert before+steps*update >= steps*states+math.ceil(steps/3)*whole_set-1e-9


@pytest.mark.parametrize("losers", [
    pytest.param(Candidates(2), marks=AGAIN), pytest.param(Fresh(2, 1), marks=AGAIN)], ids=["bank", "fresh"])
def test_one_step_networks(config, tmp_path, losers):
    "A one-step network that heeds its noise is trained; one that does not is refused"
    net, g = OneStepUNet(OneStepConfig((16, 16), (1, 1), 16, 8)), generator(1)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g)*(.4/p[0].numel()**.5 if p.ndim > 1 else .05))
    save_pretrained(Policy(net, Shift(), Shift(), PixelCodec()), tmp_path/"one")
    method = replace(ONLINE, losers=losers)
    run = replace(fill(config, dict(backbone=str(tmp_path/"one"), out=str(tmp_path/"run"), steps=2)), method=method)
    assert pd.read_parquet(align(run)/"log.parquet").drift.tolist()[1] > 0
    with pytest.raises(ValueError, match="'onestep' answers without its noise"):
        align(replace(fill(run, dict(backbone="onestep", out=str(tmp_path/"no"))), judging=replace(run.judging, m=2)))
    assert not (tmp_path/"no").exists()


@pytest.mark.parametrize("change, named", [
    (dict(link="Hinge"), "Candidates go with NFT, DGPO or CRD, got Hinge"), (dict(link=None), "got NoneType"),
    (dict(winners="Top"), "Candidates lose to Rated, got Top"), (dict(k=5), "Candidates.k = 5.*M = 4"),
    (dict(losers="Nobody"), "Nobody lose to .*got Rated"), (dict(safeguard=True), "rated candidates are not parted"),
    (dict(reward=None), "rated candidates need one"), ({"how.clip": 0.}, "clip must be positive"),
    (dict(k=1), "k must be at least 2"), (dict(beta=0.), "beta must be positive"),
    (dict(full=-1.), "full must be positive"), (dict(losers="Fresh", train="whole"), "needs LoRA")])
def test_refused(config, change, named):
    run = replace(config, method=Method(winners=Rated(), losers=Candidates(2), link=NFT()))
    with pytest.raises(ValueError, match=named): fill(run, change)


def test_rated_links_are_for_rated_candidates():
    with pytest.raises(ValueError, match="Bottom go with Logistic or Hinge, got NFT"):
        Method(winners=Top(1), losers=Bottom(), link=NFT())
    with pytest.raises(ValueError, match="Nobody go with None or Hinge, got CRD"): Method(link=CRD())
    with pytest.raises(ValueError, match="Fresh.decay must lie in"): Fresh(decay=1.)


@pytest.mark.parametrize("change, named", [
    (dict(sampler="ddpm"), "sample_ddpm draws noise on its way"), (dict(backbone="onestep"), "nothing of a one-step")])
def test_noise_that_cannot_be_tracked_is_refused(config, tmp_path, change, named):
    method = Method(winners=Top(1), losers=Bottom(tracked=True), link=Logistic(10.))
    run = replace(fill(config, dict(change, out=str(tmp_path/"run"))), method=method)
    with pytest.raises(ValueError, match=named): align(run)
    assert not (tmp_path/"run").exists()
    with pytest.raises(ValueError, match="Bottom.tracked needs the noise of a bank"): Bottom(pairs=dict, tracked=True)


def test_tracked_states_hold_the_noise_of_the_bank(config, tmp_path):
    "The seeds of winners and losers are those by which the bank drew them: the states' noise gives the samples again"
    run = replace(config, out=str(tmp_path/"run"), patch=64,
                  method=Method(winners=Top(2), losers=Bottom(tracked=True), link=Logistic(10.)))
    policy = policy_of(run.base)
    work = Work(run, policy, *inputs_of(run.data, policy, run.base.backbone))
    pairs = run.method.losers.chosen(work)
    d = draw_tracked(pairs, policy, 2, 64, 0)
    s = d.sigma[:, None, None, None]
    eps = d.x+(1-s)*d.target
    pictures = torch.cat([torch.cat([w, l]) for w, l in zip(pairs.winners, pairs.losers, strict=True)])
    for k in range(8):
        again = [to_bytes(policy.solve(lq[None].float()/255, eps[k:k+1], 1)) for lq in pairs.lq]
        assert min((o.int()-pictures.int()).abs().flatten(1).amax(1).min() for o in again) <= 1
