"What the notebook of `srnb.paths` cannot hold: diffusers as an oracle, float32, every number of steps, all paths"
import itertools

import pytest
import torch

from srnb.paths import (SAMPLERS, VPV, Flow, Shift, VPEps, convert, flow_of_vp, posterior_var, sample_ab2, sample_ddim,
                        sample_ddpm, sample_euler, vp_of_flow)

PATHS = [Flow(), VPEps(), VPV()]
B, C, H, W = 4, 3, 5, 6
SIGMA = torch.tensor([.05, .4, .75, .98])

def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def net(x, sigma): return torch.tanh(x.roll(1, 1) + .5*x.roll(1, -1)) + sigma.reshape(-1, 1, 1, 1)*x

# fixture 2 of methods.md
@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_errors_convert(path):
    z, eps, delta = rand(3, B, C, H, W)
    sigma = SIGMA.double()
    z_hat, eps_hat = path.estimates(path.state(z, eps, sigma), path.target(z, eps, sigma)+delta, sigma)
    s, a = [t.reshape(-1, 1, 1, 1) for t in (sigma, path.alpha(sigma))]
    factor_z, factor_eps = {Flow: (-s, 1-s), VPEps: (-s/a, torch.ones_like(s)), VPV: (-s, a)}[type(path)]
    torch.testing.assert_close(z_hat-z, factor_z*delta, rtol=0, atol=1e-12)
    torch.testing.assert_close(eps_hat-eps, factor_eps*delta, rtol=0, atol=1e-12)

@pytest.mark.parametrize("a,b", list(itertools.permutations(PATHS, 2)), ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype,tol", [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_convert_there_and_back(a, b, dtype, tol):
    x, sigma = rand(B, C, H, W, dtype=dtype), SIGMA.to(dtype)
    back = convert(convert(net, a, b), b, a)(x, sigma)
    assert back.dtype == dtype
    torch.testing.assert_close(back, net(x, sigma), rtol=tol, atol=tol)

def test_convert_hands_on_the_condition():
    def conditional(x, sigma, cond): return net(x, sigma)+cond
    x, cond = rand(2, B, C, H, W)
    out = convert(conditional, Flow(), VPEps())(x, SIGMA.double(), cond)
    assert (out-convert(net, Flow(), VPEps())(x, SIGMA.double())).abs().max() > .01

def test_change_of_path_in_float32():
    "A VP noise level rounded next to 1 cannot tell alpha exactly: fine below s = .95, 1e-4 at the very end"
    x, s = rand(1000, 1, 2, 2, dtype=torch.float32), torch.linspace(0, 1, 1000)
    back, s_back = flow_of_vp(*vp_of_flow(x, s))
    torch.testing.assert_close(back[:950], x[:950], rtol=0, atol=5e-6)
    torch.testing.assert_close(s_back[:950], s[:950], rtol=0, atol=2e-6)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-4)
    torch.testing.assert_close(s_back, s, rtol=0, atol=1e-4)

@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_every_grid_descends_to_zero(path):
    for steps in range(1, 1001):
        grid = path.sigma_grid(steps)
        assert len(grid) == steps+1 and grid[-1] == 0 and (grid.diff() < 0).all()
        assert grid[0] == path.sigma_grid(1)[0]

@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_draws_belong_to_the_generator(path):
    a, b = [path.draw_sigma(64, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(a, b) and a.shape == (64,) and a.dtype == torch.float32
    assert 0 <= a.min() and a.max() <= 1 and a.unique().numel() > 32

def test_euler_is_ddim_in_float32():
    x, grid = rand(B, C, H, W, dtype=torch.float32), Flow().sigma_grid(20)
    torch.testing.assert_close(sample_ddim(net, x, grid, Flow()), sample_euler(net, x, grid), rtol=1e-5, atol=1e-5)

def test_batch_of_one_equals_batch():
    x, grid = rand(B, C, H, W), VPV().sigma_grid(5)
    whole = sample_ddim(net, x, grid, VPV())
    single = torch.cat([sample_ddim(net, o[None], grid, VPV()) for o in x])
    torch.testing.assert_close(single, whole, rtol=0, atol=1e-12)

def test_ab2_is_of_second_order():
    "Against SciPy's adaptive solver, on a nonlinear network: halving the step quarters the error, halves Euler's"
    from scipy.integrate import solve_ivp
    x = rand(1, C, H, W)
    def slope(s, flat): return net(torch.from_numpy(flat).view_as(x), torch.tensor([s])).flatten().numpy()
    exact = torch.from_numpy(solve_ivp(slope, (1, 0), x.flatten().numpy(), rtol=1e-11, atol=1e-11).y[:, -1]).view_as(x)
    def error(sampler, n): return (sampler(net, x, Flow().sigma_grid(n).double(), Flow())-exact).norm()
    for sampler, factor in ((sample_ddim, 2), (sample_ab2, 4)):
        assert abs(error(sampler, 64)/error(sampler, 128)-factor) < .1*factor
    assert error(sample_ab2, 16) < error(sample_ddim, 128)

@pytest.mark.parametrize("path", [*PATHS, Shift()], ids=lambda p: type(p).__name__)
def test_ab2_asks_once_a_step_in_float32(path):
    x, calls = rand(B, C, H, W, dtype=torch.float32), []
    path = path.given(rand(B, C, H, W, seed=1, dtype=torch.float32))
    start = path.start(x)
    def counted(x, sigma):
        calls.append(sigma)
        return net(x, sigma)
    out = sample_ab2(counted, start, path.sigma_grid(6), path)
    assert len(calls) == 6 and out.dtype == torch.float32 and out.isfinite().all()
    grid = path.sigma_grid(6).double()
    whole = sample_ab2(net, start.double(), grid, path)
    torch.testing.assert_close(out.double(), whole, rtol=1e-3, atol=1e-3)
    if not isinstance(path, Shift): # whose y belongs to the batch
        single = torch.cat([sample_ab2(net, o[None].double(), grid, path) for o in start])
        torch.testing.assert_close(single, whole, rtol=0, atol=1e-12)

def test_names_of_samplers():
    assert SAMPLERS == dict(ddim=sample_ddim, ab2=sample_ab2, ddpm=sample_ddpm)
    x = rand(B, C, H, W)
    with pytest.raises(ValueError, match="descend strictly"): sample_ab2(net, x, torch.tensor([.5, .5, 0]), Flow())
    with pytest.raises(ValueError, match="alpha = 0"): sample_ab2(net, x, torch.tensor([1., .5, 0]), VPEps())

def test_ddpm_draws_once_a_step_and_not_at_the_end():
    calls = []
    def draw(x):
        calls.append(x.shape)
        return torch.zeros_like(x)
    sample_ddpm(net, rand(B, C, H, W), VPV().sigma_grid(5), VPV(), draw)
    assert calls == [(B, C, H, W)]*4

def test_posterior_var_by_the_joint_covariance():
    "Chain z = 0 -> x' -> x: condition the 2x2 covariance"
    for path, now, after in itertools.product(PATHS, (.9, .5), (.4, .1)):
        now, after = torch.tensor([now, after], dtype=torch.float64)
        r = path.alpha(now)/path.alpha(after)
        cov = torch.stack([torch.stack([after**2, r*after**2]), torch.stack([r*after**2, now**2])])
        torch.testing.assert_close(1/torch.linalg.inv(cov)[0, 0], posterior_var(now, after, path))

def scheduler(kind, path, steps):
    diffusers = pytest.importorskip("diffusers")
    s = getattr(diffusers, kind)(num_train_timesteps=1000, beta_start=.00085, beta_end=.012,
        beta_schedule="scaled_linear", clip_sample=False, timestep_spacing="trailing",
        prediction_type="epsilon" if isinstance(path, VPEps) else "v_prediction",
        **(dict(set_alpha_to_one=True) if kind == "DDIMScheduler" else {}))
    s.set_timesteps(steps)
    return s

@pytest.mark.parametrize("path", PATHS[1:], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("steps", [4, 25])
def test_ddim_equals_diffusers(path, steps):
    s, x = scheduler("DDIMScheduler", path, steps), rand(B, C, H, W, dtype=torch.float32)
    table = path.sigmas().float()
    mine = sample_ddim(net, x, path.sigma_grid(steps), path)
    for t in s.timesteps: x = s.step(net(x, table[t].expand(B)), t, x).prev_sample
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)

@pytest.mark.parametrize("path", PATHS[1:], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("steps", [4, 25])
def test_ddpm_equals_diffusers(path, steps):
    s, x = scheduler("DDPMScheduler", path, steps), rand(B, C, H, W, dtype=torch.float32)
    table, g = path.sigmas().float(), torch.Generator().manual_seed(7)
    mine = sample_ddpm(net, x, path.sigma_grid(steps), path, lambda x: torch.randn(x.shape, generator=g))
    g2 = torch.Generator().manual_seed(7)
    for t in s.timesteps: x = s.step(net(x, table[t].expand(B)), t, x, generator=g2).prev_sample
    torch.testing.assert_close(mine, x, rtol=1e-4, atol=1e-4)

def test_bad_input():
    z, eps = rand(2, B, C, H, W)
    with pytest.raises(ValueError, match="one value per sample"): Flow().state(z, eps, SIGMA[:1])
    with pytest.raises(TypeError, match="map integer timesteps"): VPEps().state(z, eps, torch.arange(B))
    with pytest.raises(ValueError, match="NaN counts as outside"): Flow().state(z, eps, SIGMA*float("nan"))
    with pytest.raises(ValueError, match="alpha = 0"): convert(net, VPEps(), Flow())(z, torch.ones(B).double())
    with pytest.raises(ValueError, match="descend strictly"):
        sample_ddpm(net, z, torch.tensor([.5, .5, 0]), VPV(), torch.randn_like)
