"Numbers of `srnb.adversary` by hand and by other means, so that an installed package can be checked without its page"
import pytest
import scipy.fft
import torch

from srnb.adversary import adversary_loser, coupled_pair, error_gradient, moving_target, riesz_loser, riesz_step
from srnb.core import check_close, generator
from srnb.paths import Flow, VPEps, VPV
from srnb.policies import from_pretrained
from srnb.spectral import SobolevEnergy

B, H, W, RADIUS = 3, 16, 24, .003
ENERGY = SobolevEnergy(1.5)
NAMES = "reference", "adversary", "policy"


def spread(o): return o.view(-1, 1, 1, 1)
def inner(a, b): return (a*b).sum((1, 2, 3))
def mean_square(o): return o.square().mean((1, 2, 3))


@pytest.fixture
def policy(tiny):
    "A tiny network with three adapters, none of them zero; the adversary is off unless it is asked for"
    policy, g = from_pretrained(tiny), generator(5)
    policy.off = {"adversary"}
    for k, name in enumerate(NAMES): policy.add_lora(4, name=name, seed=k)
    with torch.no_grad():
        for layer in policy._layers:
            for name in NAMES:
                weight = layer.lora_B[name].weight
                weight.copy_(.1*torch.randn(weight.shape, generator=g))
    return policy


@pytest.fixture(scope="module")
def draw(): # winners, noise, levels, input
    g = generator(7)
    z, eps = .3*torch.randn(B, 3, H, W, generator=g), torch.randn(B, 3, H, W, generator=g)
    return z, eps, torch.tensor([.25, .5, .8]), torch.rand(B, 3, H//4, W//4, generator=g)


def state(z, eps, sigma): return (1-spread(sigma))*z + spread(sigma)*eps # of a flow, whose target is eps - z


# ---- the target of a state that has moved

def one(*values): return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


@pytest.mark.parametrize("path, x, still, by_image, by_noise", [
    # sigma .25 and .5, z = 2 and 0, eps = -1 and 4; x moves by .3 and by -1
    (Flow(), [1.25, 2.], [-3., 4.], [-3.4, 6.], [-1.8, 2.]),
    # alpha .8 at sigma .6, z = 2, eps = -1: v = alpha eps - sigma z; x moves by .4
    (VPV(), [1.], [-2.], [-2.3], [-.8/3-1.2]),
    (VPEps(), [1.], [-1.], [-1.], [-1/3]),
])
def test_moving_target_by_hand(path, x, still, by_image, by_noise):
    flow = len(x) == 2
    z, eps = (one(2., 0.), one(-1., 4.)) if flow else (one(2.), one(-1.))
    sigma = torch.tensor([.25, .5] if flow else [.6], dtype=torch.float64)
    x, moved = one(*x), one(*x) + (one(.3, -1.) if flow else one(.4))
    image, noise = moving_target(path, sigma, eps=eps), moving_target(path, sigma, z=z) # which of them absorbs the move
    check_close(path.state(z, eps, sigma), x, atol=1e-12)
    for f in (image, noise): check_close(f(x), one(*still), atol=1e-12)
    check_close(image(moved), one(*by_image), atol=1e-12)
    check_close(noise(moved), one(*by_noise), atol=1e-12)


def test_exactly_one_is_held_fixed():
    for held in ({}, dict(z=one(1.), eps=one(1.))):
        with pytest.raises(ValueError, match="exactly one of z and eps"):
            moving_target(Flow(), torch.tensor([.5]), **held)


# ---- the gradient of the error

@pytest.mark.parametrize("held", [None, "z", "eps"])
def test_error_gradient_is_that_of_autograd(policy, draw, held):
    z, eps, sigma, lq = draw
    x, s = state(z, eps, sigma).requires_grad_(), spread(sigma)
    target = {None: eps-z, "z": (x-(1-s)*z)/s-z, "eps": eps-(x-s*eps)/(1-s)}[held]
    error = (policy.net(x, sigma, lq)-target).square().mean((1, 2, 3))
    want, = torch.autograd.grad(error.sum(), x)
    given = eps-z if held is None else moving_target(policy.path, sigma, **{held: dict(z=z, eps=eps)[held]})
    with torch.no_grad(): grad = error_gradient(policy, x, sigma, given, lq) # as where a loser is made
    check_close(grad, want, atol=1e-6*want.abs().max().item())
    assert not grad.requires_grad and all(p.grad is None for p in policy.net.parameters())


def test_error_gradient_of_a_wrapped_network(policy, draw):
    "Several processes wrap the network; its hooks would wait for gradients of the weights"
    z, eps, sigma, lq = draw
    want = error_gradient(policy, state(z, eps, sigma), sigma, eps-z, lq)
    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module
        def forward(self, *inputs): raise AssertionError("the wrapper was called")
    net = policy.net
    policy.net = wrapper = Wrapper(net)
    check_close(error_gradient(policy, state(z, eps, sigma), sigma, eps-z, lq), want)
    narrow = state(z, eps, sigma)[..., :3]
    with pytest.raises(ValueError, match="multiples of 8"): error_gradient(policy, narrow, sigma, narrow, lq)
    assert policy.net is wrapper


# ---- the closed form

def test_riesz_step_by_hand():
    "Two pixels, weights 1 and 1.25: (3, 1) has the coefficients sqrt(2)(2, 1); divided, sqrt(2)(2, .8) of energy 4.8"
    energy, down = SobolevEnergy(1., unit_mean=False), torch.tensor([2.8, 1.2], dtype=torch.float64)
    check_close(energy.weights(down[None]), [[1., 1.25]])
    grad = torch.tensor([3., 1.], dtype=torch.float64).view(1, 1, 1, 2)
    check_close(riesz_step(grad, energy, 3.).flatten(), -3*down/4.8**.5, atol=1e-12)
    check_close(riesz_step(grad, energy).flatten(), -down/4.8**.5, atol=1e-12)
    plain = riesz_step(grad, SobolevEnergy(0.)) # s = 0: the gradient, of mean square 5
    check_close(plain.flatten(), torch.tensor([-3., -1.])/5**.5, atol=1e-6)


@pytest.mark.parametrize("energy", [ENERGY, SobolevEnergy(1., "index", mean=False), SobolevEnergy(.5, unit_mean=False)])
def test_riesz_step_against_scipy(energy):
    grad = torch.randn(B, 2, 5, 7, generator=generator(0), dtype=torch.float64)
    radius, w = torch.tensor([.1, 1., 7.], dtype=torch.float64), energy.weights(grad).numpy()
    a = scipy.fft.dctn(grad.numpy(), axes=(-2, -1), norm="ortho")
    down = torch.from_numpy(scipy.fft.idctn(a/w, axes=(-2, -1), norm="ortho"))
    square = (a*a/w).sum((1, 2, 3))/(grad[0].numel() if energy.mean else 1) # of down, in the norm
    length = torch.from_numpy(square).sqrt()
    step = riesz_step(grad, energy, radius)
    check_close(step, -spread(radius/length)*down, rtol=1e-9)
    check_close(energy(step).sqrt(), radius, rtol=1e-9)


def test_nothing_on_the_ball_goes_further_down():
    grad, g = torch.randn(B, 2, 5, 7, generator=generator(0), dtype=torch.float64), generator(1)
    best = inner(grad, riesz_step(grad, ENERGY, 2.))
    for power in (0, -.5, -1):
        for _ in range(50):
            d = ENERGY.power(torch.randn(grad.shape, generator=g, dtype=torch.float64), power)
            assert (inner(grad, d)*spread(2/ENERGY(d).sqrt()).flatten() > best).all()


def test_the_scale_of_a_gradient_cancels():
    grad = torch.randn(B, 2, 5, 7, generator=generator(0))
    step = riesz_step(grad, ENERGY, .5)
    for scale in (1e-30, 1e6): check_close(riesz_step(scale*grad, ENERGY, .5), step, atol=1e-5)
    check_close(riesz_step(-grad, ENERGY, .5), -step)
    check_close(riesz_step(0*grad, ENERGY, .5), 0*grad)
    with pytest.raises(ValueError, match="radius must be positive"): riesz_step(grad, ENERGY, 0.)


# ---- losers

def test_a_pair_shares_noise_and_level(draw):
    "Winners first, losers second; on a flow the state moves by (1 - sigma) and the target by -1 times the image's move"
    z, eps, sigma, _ = draw
    z_l = z+torch.arange(1., B+1).view(-1, 1, 1, 1)
    x, target = coupled_pair(Flow(), z, z_l, eps, sigma)
    check_close(x[:B], state(z, eps, sigma), atol=1e-6)
    check_close(target[:B], eps-z, atol=1e-6)
    check_close((x[B:]-x[:B])[:, 0, 0, 0], [.75*1, .5*2, .2*3], atol=1e-6)
    check_close((target[B:]-target[:B])[:, 0, 0, 0], [-1., -2., -3.], atol=1e-6)
    check_close(x[B:], state(z_l, eps, sigma), atol=1e-6)


@pytest.mark.parametrize("lam", [0., .1, .5, 1.])
def test_the_adversarys_loser(policy, draw, lam):
    "`lam` of the way from the winner to the clean estimate x - sigma v at the winner's state"
    z, eps, sigma, lq = draw
    x = state(z, eps, sigma)
    with policy.using("reference", "adversary"): v = policy.net(x, sigma, lq)
    z_l = adversary_loser(policy, z, eps, sigma, lq, lam)
    check_close(z_l, (1-lam)*z + lam*(x-spread(sigma)*v), atol=1e-5)
    if lam == 0: assert torch.equal(z_l, z)
    if lam == 1: check_close(z_l, adversary_loser(policy, z, eps, sigma, lq))


def test_the_adapters_that_are_on_while_the_adversary_looks(policy, draw, monkeypatch):
    z, eps, sigma, lq = draw
    seen, predict = [], policy.predict
    def look(*inputs):
        seen.append({frozenset(layer._active_adapter) for layer in policy._layers})
        assert not torch.is_grad_enabled()
        return predict(*inputs)
    monkeypatch.setattr(policy, "predict", look)
    before = [list(layer._active_adapter) for layer in policy._layers]
    default = adversary_loser(policy, z, eps, sigma, lq)
    sets = ("reference", "adversary"), ("reference", "policy"), ("adversary",), ()
    losers = [adversary_loser(policy, z, eps, sigma, lq, adapters=names) for names in sets]
    assert seen == [{frozenset(o)} for o in (sets[0], *sets)]
    check_close(default, losers[0])
    for other in losers[1:]: assert (other-default).abs().max() > 1e-2
    assert [list(layer._active_adapter) for layer in policy._layers] == before and "adversary" not in before[0]
    assert not default.requires_grad


def test_the_riesz_loser(policy, draw):
    "Its state moves by the closed form, whose length is radius sigma (1 - sigma); the noise is the winner's"
    z, eps, sigma, lq = draw
    x, s = state(z, eps, sigma).requires_grad_(), spread(sigma)
    error = mean_square(policy.net(x, sigma, lq)-(eps-(x-s*eps)/(1-s)))
    grad, = torch.autograd.grad(error.sum(), x)
    a = scipy.fft.dctn(grad.double().numpy(), axes=(-2, -1), norm="ortho")
    down = torch.from_numpy(scipy.fft.idctn(a/ENERGY.weights(grad).numpy(), axes=(-2, -1), norm="ortho"))
    z_l = riesz_loser(policy, z, eps, sigma, lq, ENERGY, RADIUS)
    check_close(z_l-z, -RADIUS*s*down/spread(ENERGY(down).sqrt()), atol=1e-6)
    check_close(ENERGY(state(z_l, eps, sigma)-x.detach()).sqrt(), RADIUS*sigma*(1-sigma), rtol=1e-3)
    check_close(riesz_loser(policy, z, eps, sigma, lq, ENERGY), z_l) # the default radius
    assert all(p.grad is None for p in policy.net.parameters())


def test_the_riesz_loser_of_pure_noise(policy, draw):
    "At sigma = 1 the state holds no image: the level is held at .999"
    z, eps, _, lq = draw
    z_l, near = (riesz_loser(policy, z, eps, torch.full((B,), o), lq, ENERGY, RADIUS) for o in (1., .999))
    check_close(z_l, near)
    check_close(ENERGY(z_l-z).sqrt(), [.999*RADIUS]*B, rtol=1e-3)


# ---- red, green, blue of one pixel of each loser, minus the winner

GOLDEN = dict(
    adversary=[[.0054, -.0070, .0418], [-.0501, -.0005, -.0104], [-.0573, .1052, .0088]],
    riesz=[[.0191, .0077, .0083], [-.0080, -.0052, .0234], [.0030, -.0596, -.0123]])


@pytest.mark.parametrize("name, make", [
    ("adversary", lambda *o: adversary_loser(*o, lam=.1)), ("riesz", lambda *o: riesz_loser(*o, ENERGY))])
def test_losers_are_the_same_as_ever(policy, draw, name, make):
    check_close((make(policy, *draw)-draw[0])[:, :, 5, 9], GOLDEN[name], atol=1e-4)
