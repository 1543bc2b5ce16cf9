"CTMSR's losses against sides written here again: fixture 9 of the notes, gradients, fixed points, wrong variants"
from types import SimpleNamespace

import pytest
import torch

from srnb.consistency import (charbonnier, consistency_loss, gap_weight, half_square, intervals_at, matching_loss,
                              node_pair, perceptual_distance, sds_gap, trajectory_gap)
from srnb.core import generator, like_batch, seed_of
from srnb.onestep import onestep_batch, onestep_loss
from srnb.paths import Shift, sample_ddim, sample_ddpm
from srnb.policies import PixelCodec, Policy

B, SHAPE = 3, (3, 3, 8, 12)


@pytest.fixture
def toys():
    g = generator(0)
    z, y, eps, z_hat = torch.randn(4, *SHAPE, generator=g, dtype=torch.float64)
    w = torch.randn(3, 3, 3, 3, generator=g, dtype=torch.float64)*.3

    def net(x, sigma): return x*.5 + torch.tanh(torch.nn.functional.conv2d(x, w, padding=1))*like_batch(sigma, x)
    return Shift().given(y), z, y, eps, z_hat, net


def test_curriculum_of_the_release():
    assert [intervals_at(k, 500_000) for k in (0, 249_999, 250_000, 499_999)] == [4, 4, 3, 3]
    for first, last, steps in ((4, 3, 7), (5, 1, 23), (3, 3, 4), (10, 2, 4)):
        seen = [intervals_at(k, steps, first, last) for k in range(steps)]
        assert seen[0] == first and seen == sorted(seen, reverse=True) and min(seen) >= last


def test_nodes():
    torch.testing.assert_close(Shift().sigma_grid(3), torch.tensor([1, 2/3, 1/3, 0]))
    pairs = [tuple(round(float(s), 6) for s in node_pair(Shift(), 4, i)) for i in range(4)]
    assert pairs == [(.25, 0), (.5, .25), (.75, .5), (1, .75)]
    with pytest.raises(ValueError, match=r"\[0, 4\)"): node_pair(Shift(), 4, -1)


def test_the_line_is_straight_and_two_samplers_walk_it(toys):
    path, z, y, eps, _, _ = toys
    for t in (.2, .5, .9):
        s = torch.full((B,), t, dtype=torch.float64)
        torch.testing.assert_close(path.state(z, eps, s), z + t*((y-z) + eps))
    walk = (lambda x, s: z), path.start(eps), path.sigma_grid(5).double(), path # of a network that knows the photograph
    torch.testing.assert_close(sample_ddim(*walk), z)
    with pytest.raises(ValueError, match="ancestral"): sample_ddpm(*walk, torch.randn_like)


@pytest.mark.parametrize("intervals, i", [(1, 0), (3, 0), (3, 2), (4, 1)])
def test_consistency_loss_by_hand(toys, intervals, i):
    path, z, y, eps, _, net = toys
    scale = torch.tensor(.7, dtype=torch.float64, requires_grad=True)
    def square(a, b): return (a-b).square().mean((1, 2, 3))
    value, z_hat = consistency_loss(lambda x, s: scale*net(x, s), path, z, eps, intervals, i, square)
    high, low = (torch.full((B,), k/intervals, dtype=torch.float64) for k in (i+1, i))
    x, x_low = (z + like_batch(s, z)*(y-z+eps) for s in (high, low))
    out, target = net(x, high), z if i == 0 else .7*net(x_low, low)
    torch.testing.assert_close(value, (.7*out-target).square().mean((1, 2, 3)), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(z_hat, .7*out, atol=1e-6, rtol=1e-6)
    slope = torch.autograd.grad(value.sum(), scale)[0] # through the upper node alone
    torch.testing.assert_close(slope, (2*(.7*out-target)*out).mean((1, 2, 3)).sum(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("inside", [True, False])
def test_pseudo_loss_delivers_the_gap(toys, inside):
    "At the output: exactly the weighted gap; at the parameters: (18) over 1 - a"
    path, z, _, eps, z_hat, net = toys
    theta = torch.zeros(SHAPE, dtype=torch.float64, requires_grad=True)
    sigma = torch.full((B,), 1/3, dtype=torch.float64)
    out = z_hat + theta
    gap = trajectory_gap(net, path, out, z, eps, sigma)
    torch.testing.assert_close(gap, net(path.state(z_hat, eps, sigma), sigma)-net(path.state(z, eps, sigma), sigma))
    weighted = gap/(z_hat-z).abs().mean((1, 2, 3), keepdim=True)
    grad = torch.autograd.grad(matching_loss(out, z, gap, half_square, inside).sum(), theta, retain_graph=True)[0]
    torch.testing.assert_close(grad, weighted, atol=1e-9, rtol=0)
    paper = torch.autograd.grad(path.state(out, eps, sigma), theta, weighted)[0] # (18), through the state
    torch.testing.assert_close(paper, (1-1/3)*grad, atol=1e-9, rtol=0)
    assert not torch.allclose(paper, grad)


def test_the_noise_of_both_states_is_shared(toys):
    path, z, _, eps, _, net = toys
    sigma = torch.full((B,), 1/3, dtype=torch.float64)
    assert trajectory_gap(net, path, z, z, eps, sigma).abs().max() == 0
    assert sds_gap(net, path, z, z, eps, sigma).abs().max() > .1 # its fixed point is elsewhere


class Grey: # photographs of one grey, and inputs that are a little darker
    def batch(self, n, side, g): return torch.full((n, 3, side//4, side//4), .4), torch.full((n, 3, side, side), .5)


class Net(torch.nn.Module):
    "A network of one function of its input; `stride` as a policy wants it"
    stride = 4
    def __init__(self, f):
        super().__init__()
        self.f, self.w = f, torch.nn.Parameter(torch.ones(()))
    def forward(self, x, sigma, cond): return self.f(self.w*x)


def cubed(x): return x+x**3 # a teacher that is not linear: on a linear one the noise of both states cancels


def seen_noise(step=2):
    "The noise that a step of matching gives to its gap, what the step drew, and the step's logs; y is -.2, z is 0"
    student, teacher = (Policy(Net(f), Shift(), Shift(), PixelCodec()) for f in (torch.tanh, cubed))
    seen, run = {}, SimpleNamespace(batch=2, patch=16, window=8, seed=3, lpips_weight=.5, last=3)
    def gap(f, path, z_hat, z, eps, sigma):
        seen.update(eps=eps, sigma=sigma, z_hat=z_hat, z=z, gap=trajectory_gap(f, path, z_hat, z, eps, sigma))
        return seen["gap"]
    def lpips(a, b): return (a-b).square().mean((1, 2, 3))
    match = SimpleNamespace(gap_of=gap, weight=1.6, inside=True)
    loss = onestep_loss(Grey(), student, run, lpips, match, lambda k: teacher)
    _, logs = loss(step, 0)
    return seen, onestep_batch(Grey(), student, run, 3, seed_of(3, "matching", step, 0)), logs


def test_matching_draws_its_own_noise():
    "Both trajectories start from fresh noise. From the noise that made the output the gap differs by over a tenth"
    seen, (z, eps, fresh, lq, i, _), logs = seen_noise()
    assert torch.equal(seen["eps"], fresh) and not torch.equal(eps, fresh)
    assert (eps*fresh).mean().abs() < .1 < (eps*eps).mean() # two draws
    y, s = torch.full_like(z, -.2), 1/3
    def state(z, e, s): return z+s*(y-z+e)
    z_hat = torch.tanh(state(z, eps, (i+1)/3))
    def by_hand(e): return cubed(state(z_hat, e, s))-cubed(state(z, e, s))
    torch.testing.assert_close(seen["z_hat"], z_hat, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen["gap"], by_hand(fresh), atol=1e-5, rtol=0)
    assert logs["gap"] == pytest.approx(by_hand(fresh).abs().mean().item(), abs=1e-5)
    assert abs(by_hand(eps).abs().mean()-by_hand(fresh).abs().mean()) > .1*logs["gap"]


def test_guard(toys):
    _, z, _, _, _, _ = toys
    same, zero = z.clone().requires_grad_(), torch.zeros_like(z)
    loss = matching_loss(same, z, zero)
    assert loss.abs().max() == 0 and torch.autograd.grad(loss.sum(), same)[0].abs().max() == 0
    assert matching_loss(same, z, zero, floor=0.).isnan().all()
    torch.testing.assert_close(gap_weight(z+.1, z), torch.full((B,), 10., dtype=torch.float64))
    torch.testing.assert_close(gap_weight(z+1e-9, z), torch.full((B,), 1000., dtype=torch.float64))


def test_no_gradient_reaches_teacher_or_weight(toys):
    path, z, _, eps, z_hat, net = toys
    scale = torch.tensor(1., dtype=torch.float64, requires_grad=True)
    gap = trajectory_gap(lambda x, s: scale*net(x, s), path, z_hat, z, eps, torch.full((B,), 1/3, dtype=torch.float64))
    assert not gap.requires_grad and not gap_weight(z_hat.requires_grad_(), z).requires_grad


def test_distance():
    g = generator(1)
    a, b = torch.rand(2, 2, 3, 20, 30, generator=g)*2 - 1
    def mean_square(u, v): return (u-v).square().mean((1, 2, 3))
    torch.testing.assert_close(charbonnier(a, b), (a-b).abs().mean((1, 2, 3)), atol=1e-5, rtol=0)
    window = ((a-b)[..., 4:12, 6:14]/2).square().mean((1, 2, 3)) # LPIPS sees [0, 1]
    by_hand = .3*window + .7*(a-b).abs().mean((1, 2, 3))
    torch.testing.assert_close(perceptual_distance(mean_square, (4, 6, 8), .3)(a, b), by_hand, atol=1e-5, rtol=0)
