"What the pages of `srnb.spectral` and `srnb.preference` cannot hold: checks that wrong losses must fail, adapters"
import math

import pytest
import torch
import torch.nn.functional as F

from srnb.nets import SmallUNet, UNetConfig
from srnb.paths import Flow
from srnb.policies import Policy
from srnb.preference import (diagnostics, dpo_loss, group_gradients, group_loss, group_margins, pair_margin,
                             safeguard_scale, two_pass_backward)
from srnb.spectral import energy_gap, l2_energy

LOG2, KAPPA = math.log(2), 2500.
C, H, W = 3, 8, 10

def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def close(a, b, atol=0., rtol=0.):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), atol=atol, rtol=rtol, check_dtype=False)

# ---- a loss is a function of four residuals (B,C,H,W) and kappa, (B,) out

def right(w, l, ref_w, ref_l, kappa): return dpo_loss(pair_margin(energy_gap(w, ref_w), energy_gap(l, ref_l)), kappa)
def as_group(w, l, ref_w, ref_l, kappa): # the group form with one winner and one loser
    return group_loss(energy_gap(w, ref_w)[:, None], energy_gap(l, ref_l)[:, None], kappa)
def flipped(w, l, ref_w, ref_l, kappa): return dpo_loss(-pair_margin(energy_gap(w, ref_w), energy_gap(l, ref_l)), kappa)
def summed(w, l, ref_w, ref_l, kappa): return right(w, l, ref_w, ref_l, kappa*w[0].numel())
def early_mean(w, l, ref_w, ref_l, kappa):
    return dpo_loss(pair_margin(energy_gap(w, ref_w), energy_gap(l, ref_l)).mean(), kappa).expand(len(w))
def swapped(w, l, ref_w, ref_l, kappa): return right(ref_w, ref_l, w, l, kappa)
def left_on(w, l, ref_w, ref_l, kappa): return right(w, l, w.detach(), l.detach(), kappa)
def no_reference(w, l, ref_w, ref_l, kappa): return dpo_loss(pair_margin(l2_energy(w), l2_energy(l)), kappa)
def half_missing(w, l, ref_w, ref_l, kappa): return right(w, l, ref_w, ref_l, kappa/2)
def log_of_sigmoid(w, l, ref_w, ref_l, kappa):
    return -(kappa*pair_margin(energy_gap(w, ref_w), energy_gap(l, ref_l))).sigmoid().log()
def loser_forgotten(w, l, ref_w, ref_l, kappa): return dpo_loss(-energy_gap(w, ref_w), kappa)
def detached(w, l, ref_w, ref_l, kappa): return right(w, l.detach(), ref_w, ref_l, kappa)

def batch(scale=1e-3): # now_w, now_l, ref_w, ref_l of 5 pairs
    ref_w, ref_l, dw, dl = rand(4, 5, C, H, W)
    return ref_w+scale*dw, 1.2*ref_l+scale*dl, ref_w, 1.2*ref_l

def check_fixed_point(loss):
    _, _, w, l = batch()
    x, y = w.clone().requires_grad_(), l.clone().requires_grad_()
    value = loss(x, y, w, l, KAPPA)
    close(value, torch.full((5,), LOG2, dtype=torch.float64), atol=1e-9)
    gw, gl = torch.autograd.grad(value.sum(), [x, y], materialize_grads=True)
    close(gw, KAPPA/2*2*w/(C*H*W), atol=1e-10) # -kappa/2 times the gradient of the margin
    close(gl, -KAPPA/2*2*l/(C*H*W), atol=1e-10)

def check_hand(loss):
    "Energies .30 and .51, the reference's .32 and .50: margin .03, at kappa 100 log(1+exp(-3)). Second pair: 0"
    def const(*energies): return torch.stack([torch.full((C, H, W), e**.5, dtype=torch.float64) for e in energies])
    value = loss(const(.30, .2), const(.51, .4), const(.32, .2), const(.50, .4), 100.)
    close(value, torch.tensor([.0485873516, LOG2], dtype=torch.float64), atol=1e-9)

def check_gradient(loss):
    w, l, ref_w, ref_l = batch()
    x, y = w.clone().requires_grad_(), l.clone().requires_grad_()
    gw, gl = torch.autograd.grad(loss(x, y, ref_w, ref_l, KAPPA).sum(), [x, y], materialize_grads=True)
    n = C*H*W
    margin = ((l**2).sum((1, 2, 3))-(ref_l**2).sum((1, 2, 3))-(w**2).sum((1, 2, 3))+(ref_w**2).sum((1, 2, 3)))/n
    slope = (KAPPA*(-KAPPA*margin).sigmoid()).reshape(-1, 1, 1, 1)
    close(gw, slope*2*w/n, atol=1e-9)
    close(gl, -slope*2*l/n, atol=1e-9)

def check_extreme(loss):
    big, small = torch.full((2, C, H, W), 1e3, dtype=torch.float64), torch.zeros(2, C, H, W, dtype=torch.float64)
    for w, l, expected in ((big, small, KAPPA*1e6), (small, big, 0.)): # margins of -1e6 and +1e6
        w = w.clone().requires_grad_()
        value = loss(w, l, small+1e-9, small+1e-9, KAPPA)
        close(value, torch.full((2,), expected, dtype=torch.float64), rtol=1e-6)
        assert torch.autograd.grad(value.sum(), w)[0].isfinite().all()

CHECKS = [check_fixed_point, check_hand, check_gradient, check_extreme]

@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("loss", [right, as_group])
def test_loss(loss, check): check(loss)

WRONG = [flipped, summed, early_mean, swapped, left_on, no_reference, half_missing, log_of_sigmoid, loser_forgotten,
         detached]

@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_losses_fail(wrong):
    failed = []
    for check in CHECKS:
        try: check(wrong)
        except AssertionError: failed.append(check.__name__)
    assert failed, f"no check noticed {wrong.__name__}"

def test_original_letters():
    "The formula of Diffusion-DPO's code, beta 5000 with its one half, is kappa 2500"
    w, l, ref_w, ref_l = batch()
    e = [o.square().mean((1, 2, 3)) for o in (w, l, ref_w, ref_l)]
    close(right(w, l, ref_w, ref_l, 2500.), -F.logsigmoid(-.5*5000*((e[0]-e[1])-(e[2]-e[3]))), atol=1e-9)

# ---- groups

@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("weighted", [False, True])
def test_group_is_the_pair_loop(n, weighted):
    now, ref = rand(3*2*n, C, H, W, dtype=torch.float32), rand(3*2*n, C, H, W, seed=1, dtype=torch.float32)
    now = (ref+1e-3*now).requires_grad_()
    weight = 1+.3*torch.rand(3, n, n, generator=torch.Generator().manual_seed(2)) if weighted else None
    gap = energy_gap(now, ref).reshape(3, 2, n)
    value = group_loss(gap[:, 0], gap[:, 1], KAPPA, weight)
    loop = []
    for g in range(3):
        rows = [(2*n*g+i, 2*n*g+n+j, i, j) for i in range(n) for j in range(n)]
        pairs = [right(now[a:a+1], now[b:b+1], ref[a:a+1], ref[b:b+1], KAPPA)[0] for a, b, _, _ in rows]
        loop.append(sum((weight[g, i, j] if weighted else 1.)*o
                        for o, (_, _, i, j) in zip(pairs, rows, strict=True))/n**2)
    close(value, torch.stack(loop), atol=1e-5)
    ours, theirs = (torch.autograd.grad(o.mean(), now, retain_graph=True)[0] for o in (value, torch.stack(loop)))
    close(ours, theirs, atol=1e-5*theirs.abs().max().item())

def test_axes_of_the_margins():
    m = group_margins(torch.tensor([[1., 2.]]), torch.tensor([[10., 20.]]))
    close(m, [[[9., 19.], [8., 18.]]])
    weight = torch.tensor([[[2., 0.], [0., 2.]]]) # only w0-l0 and w1-l1
    gaps = torch.tensor([[1e-3, -1e-3]]), torch.tensor([[2e-3, 0.]])
    close(group_loss(*gaps, KAPPA, weight), dpo_loss(torch.tensor([1e-3, 1e-3]), KAPPA).mean()[None], atol=1e-6)

def test_constant_weights_scale():
    gaps = 1e-3*rand(2, 3, 4)
    close(group_loss(*gaps, KAPPA, torch.full((3, 4, 4), 1.7)), 1.7*group_loss(*gaps, KAPPA), rtol=1e-6)

# ---- fixture 1 and 2 of methods.md, on a network with adapters

def tiny_policy(seed=0):
    g, net = torch.Generator().manual_seed(seed), SmallUNet(UNetConfig((8, 8), (1, 1), 8))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g)*(.5/p[0].numel()**.5 if p.ndim > 1 else .1))
    policy = Policy(net)
    return policy, policy.add_lora(4, seed=seed)

def case(G=2, N=2, seed=0):
    g, flow = torch.Generator().manual_seed(seed), Flow()
    z, eps = torch.randn(2, G*2*N, 3, 16, 16, generator=g)
    lq = torch.rand(G*2*N, 3, 4, 4, generator=g)
    sigma = torch.rand(G, generator=g).repeat_interleave(2*N)
    return flow.state(z, eps, sigma), sigma, flow.target(z, eps, sigma), lq

def gaps_of(policy, inputs, G=2):
    with policy.reference(): ref = policy.residual(*inputs)
    now = policy.residual(*inputs)
    return (now, ref, *energy_gap(now, ref).reshape(G, 2, -1).unbind(1))

def test_fresh_adapter():
    policy, params = tiny_policy()
    now, ref, gap_w, gap_l = gaps_of(policy, case())
    assert torch.equal(now, ref) and (gap_w == 0).all() and (gap_l == 0).all()
    loss = group_loss(gap_w, gap_l, KAPPA)
    close(loss, [LOG2]*2, atol=1e-6)
    cw, cl = torch.autograd.grad(loss.sum(), [gap_w, gap_l], retain_graph=True)
    close(cw, torch.full((2, 2), KAPPA/2/2), rtol=1e-6) # each winner is in 2 of 4 pairs
    close(cl, torch.full((2, 2), -KAPPA/2/2), rtol=1e-6)
    grads = torch.autograd.grad(loss.mean(), params)
    assert max(g.abs().max() for g in grads) > 0 and not any(p.grad is not None for p in policy.net.parameters())

def test_reference_is_left_alone():
    policy, params = tiny_policy()
    _, ref, _, _ = gaps_of(policy, case())
    with torch.no_grad():
        for i, p in enumerate(params): p.add_(.02*rand(*p.shape, seed=i, dtype=torch.float32))
    now, ref_after, gap_w, gap_l = gaps_of(policy, case())
    assert torch.equal(ref, ref_after) and not ref_after.requires_grad and not torch.equal(now, ref)
    logs = diagnostics(now, ref, gap_w, gap_l, KAPPA, l2_energy)
    assert logs["drift"] > 0 and all(isinstance(v, float) and math.isfinite(v) for v in logs.values())
    assert {"gap_w", "gap_l", "error_w", "error_l", "accuracy", "saturated", "drift"} <= logs.keys()
    close(logs["error_w"]-ref.square().mean((1, 2, 3)).reshape(2, 2, 2)[:, 0].mean().item(), logs["gap_w"], atol=1e-5)

def test_errors_of_noise_and_velocity():
    "Fixture 2: the gap of noise estimates is (1-sigma)^2 the gap of velocities, in float32"
    x, sigma, target, _ = case()
    pred, ref = rand(2, *x.shape, dtype=torch.float32)
    flow = Flow()
    true = flow.estimates(x, target, sigma)[1]
    gap = energy_gap(flow.estimates(x, pred, sigma)[1]-true, flow.estimates(x, ref, sigma)[1]-true)
    close(gap, (1-sigma)**2*energy_gap(pred-target, ref-target), atol=1e-6)

# ---- safeguard

def moved():
    policy, params = tiny_policy()
    with torch.no_grad():
        for i, p in enumerate(params): p.add_(.02*rand(*p.shape, seed=i, dtype=torch.float32))
    return policy, params

def test_two_parts_make_the_gradient():
    policy, params = moved()
    _, _, gap_w, gap_l = gaps_of(policy, case())
    loss = group_loss(gap_w, gap_l, KAPPA, 1+.3*torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0))).mean()
    whole = torch.autograd.grad(loss, params, retain_graph=True)
    a, b = group_gradients(loss, gap_w, gap_l, params)
    for x, y, z in zip(a, b, whole, strict=True): close(x+y, z, atol=2e-6*max(o.abs().max().item() for o in whole))

@pytest.mark.parametrize("fresh", [True, False])
def test_two_passes_of_a_policy_with_adapters(fresh):
    policy, params = tiny_policy() if fresh else moved()
    inputs, n = case(G=1, N=3), 6
    with policy.reference(): ref = policy.residual(*inputs)
    def gap_of(part): return energy_gap(policy.residual(*(o[part] for o in inputs)), ref[part])
    def loss_of(gap): return group_loss(gap[None, :3], gap[None, 3:], 100.).mean()
    one = loss_of(gap_of(slice(None)))
    whole = torch.autograd.grad(one, params)
    close(two_pass_backward(gap_of, n, 4, loss_of), one.detach(), atol=1e-5)
    for p, z in zip(params, whole, strict=True): close(p.grad, z, atol=1e-4*max(o.abs().max().item() for o in whole))
    assert max(o.abs().max() for o in whole) > 0

def scale_without(a, b): return torch.tensor(1.)
def scale_flipped(a, b):
    aa, ab = sum((x*x).sum() for x in a), sum((x*y).sum() for x, y in zip(a, b, strict=True))
    return torch.where(ab > 0, (aa/ab.clamp(min=1e-30)).clamp(max=1.), torch.ones_like(aa))
def scale_square_root(a, b): return safeguard_scale(a, b).sqrt()

def winner_rises(scale): # change of the winners' error to first order, per draw, of steps along -(A + scale*B)
    A, B = rand(2, 300, 2, 4)
    return torch.stack([-(a*(a+scale(list(a), list(b))*b)).sum() for a, b in zip(A, 4*B, strict=True)])

def test_safeguard_holds_to_first_order():
    assert (winner_rises(safeguard_scale) < 1e-10).all()
    lam = torch.stack([safeguard_scale(list(a), list(b)) for a, b in zip(*rand(2, 300, 2, 4), strict=True)])
    assert ((lam >= 0) & (lam <= 1)).all() and (lam == 1).any() and (lam < 1).any()

@pytest.mark.parametrize("wrong", [scale_without, scale_flipped, scale_square_root])
def test_wrong_safeguards_fail(wrong): assert (winner_rises(wrong) > 1e-3).any()

def test_safeguard_is_the_largest_allowed():
    A, B = rand(2, 300, 2, 4)
    for a, b in zip(A, 4*B, strict=True):
        lam = safeguard_scale(list(a), list(b))
        if lam < 1: assert (a*(a+1.01*lam*b)).sum() < 0

@pytest.mark.parametrize("a,b,expected", [
    ([1., 0.], [-4., 3.], .25), ([1., 0.], [-.5, 0.], 1.), ([1., 0.], [0., 1.], 1.), ([0., 0.], [1., 1.], 1.),
    ([1e-12, 0.], [-1e6, 0.], 1e-18)])
def test_safeguard_by_hand(a, b, expected):
    close(safeguard_scale([torch.tensor(a)], [torch.tensor(b)]), expected, rtol=1e-5)

@pytest.mark.parametrize("safe", [False, True])
def test_winner_after_one_step(safe):
    "Winner and loser alike, the loser worse: plain DPO raises the winner's error, the safeguarded step does not"
    X = rand(4, 8, 6)
    X = X[:1]+.2*X
    y = X @ rand(6, seed=3)
    y[2:] *= 2.5
    theta = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    def gaps(t): return energy_gap((X @ t-y).reshape(4, 1, 1, 8), -y.reshape(4, 1, 1, 8)).reshape(1, 2, 2).unbind(1)
    gap_w, gap_l = gaps(theta)
    a, b = group_gradients(group_loss(gap_w, gap_l, 5.).mean(), gap_w, gap_l, [theta])
    lam = safeguard_scale(a, b) if safe else 1.
    after_w, after_l = gaps((theta-1e-5*(a[0]+lam*b[0])).detach())
    assert after_l.mean() > 0
    if safe: assert after_w.mean() < 1e-3*after_l.mean() # what is left is of second order in the rate
    else: assert after_w.mean() > .1*after_l.mean()

# ---- precision

def two_energies(p, r): return l2_energy(p)-l2_energy(r)

@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("gap,bound", [(energy_gap, 2e-3), (two_energies, 2e-2)])
def test_precision_of_the_margin(gap, bound, autocast):
    ref, target, d = rand(3, 128, 16, 16, 16, dtype=torch.float32)
    now = ref+1e-3*d
    true = pair_margin(*energy_gap(now.double()-target, ref.double()-target).chunk(2))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        margin = pair_margin(*gap(now-target, ref-target).chunk(2))
        loss = dpo_loss(margin, KAPPA)
    assert margin.dtype == loss.dtype == torch.float32
    assert ((margin-true).square().mean()/true.square().mean()).sqrt() < bound

def test_a_lowered_energy_misses_the_bound():
    ref, target, d = rand(3, 128, 16, 16, 16, dtype=torch.float32)
    now = ref+1e-3*d
    true = pair_margin(*energy_gap(now.double()-target, ref.double()-target).chunk(2))
    with torch.autocast("cpu", torch.bfloat16):
        flat = [o.flatten(1) for o in (now-target, ref-target)]
        e = [torch.einsum("bi,bi->b", o, o).float()/o[0].numel() for o in flat]
    margin = pair_margin(*(e[0]-e[1]).chunk(2))
    assert ((margin-true).square().mean()/true.square().mean()).sqrt() > .5 # nothing of the margin is left

# ---- bad input

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_half_precision_is_refused(dtype):
    o = torch.ones(2, 3, 4, 4, dtype=dtype)
    with pytest.raises(TypeError, match="before subtracting"): l2_energy(o)
    with pytest.raises(TypeError, match="before subtracting"): energy_gap(torch.ones(2, 3, 4, 4), o)
    with pytest.raises(TypeError, match="half precision"): group_margins(o[0, 0], o[0, 0])

def test_shapes_are_refused():
    o = torch.ones(2, 3, 4, 4)
    for bad in (o[0], o[:0], o.flatten(1)):
        with pytest.raises(ValueError, match="B,C,H,W"): l2_energy(bad)
    with pytest.raises(ValueError, match="one shape"): energy_gap(o, o[:1])
    with pytest.raises(ValueError, match="every winner needs"): pair_margin(torch.ones(3), torch.ones(1))
    with pytest.raises(ValueError, match="one weight per pair"):
        group_loss(torch.ones(1, 3), torch.ones(1, 3), 1., torch.ones(3, 3))
    with pytest.raises(ValueError, match="residuals of 8"):
        diagnostics(o, o, torch.ones(1, 4), torch.ones(1, 4), 1., l2_energy)
    x = torch.ones(2, requires_grad=True)
    gap = (2*x).reshape(1, 2)
    with pytest.raises(ValueError, match="very tensors"):
        group_gradients(group_loss(gap, gap, 1.).sum(), gap[:, :1], gap[:, 1:], [x])

@pytest.mark.parametrize("kappa", [0, -1., float("nan")])
def test_kappa_is_positive(kappa):
    with pytest.raises(ValueError, match="kappa must be positive"): dpo_loss(torch.ones(2), kappa)
