"What the page of `srnb.spectral` cannot hold: one property over many sizes, bugs that checks must catch, memory"
import math

import numpy as np
import pytest
import scipy.fft
import torch

from srnb import spectral
from srnb.spectral import (FREQUENCIES, SobolevEnergy, dct2, energy_gap, idct2, l2_energy, log_spectral_distance,
                           radial_psd, sample_coloured, sobolev_weights)

SIZES = [(1, 1), (1, 7), (2, 3), (5, 5), (64, 48), (127, 128), (129, 128), (1, 300), (255, 131)]

def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)

def close(a, b, atol=0., rtol=0.):
    a, b = (torch.as_tensor(o, dtype=torch.float64) for o in (a, b)) # a Python float would become float32
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)

def by_scipy(x, s=1.5, unit_mean=True, mean=True, scale=.5): # energy and gradient, in float64
    def squares(n): return (scale*np.arange(n))**2
    w = (1+squares(x.shape[-2])[:, None]+squares(x.shape[-1]))**s
    if unit_mean: w = w/w.mean()
    n = x[0].numel() if mean else 1
    a = scipy.fft.dctn(x.double().numpy(), axes=(-2, -1), norm="ortho")
    return (w*a*a).sum((1, 2, 3))/n, 2/n*scipy.fft.idctn(w*a, axes=(-2, -1), norm="ortho")

# ---- the transform

@pytest.mark.parametrize("size", SIZES)
def test_scipy(size):
    x = rand(2, 3, *size)
    close(dct2(x), scipy.fft.dctn(x.numpy(), axes=(-2, -1), norm="ortho"), atol=2e-12)
    close(idct2(x), scipy.fft.idctn(x.numpy(), axes=(-2, -1), norm="ortho"), atol=2e-12)
    close(idct2(dct2(x)), x, atol=2e-12)
    close((dct2(x)**2).sum(), (x**2).sum(), rtol=1e-12)
    y = dct2(x.float())
    assert y.dtype == torch.float32 and y.is_contiguous()
    close(y, dct2(x), atol=2e-5)

@pytest.mark.parametrize("size", [(5, 7), (1, 3)])
@pytest.mark.parametrize("limit", [128, 0]) # by matrix, by FFT
def test_derivatives_of_the_transform(size, limit, monkeypatch):
    monkeypatch.setattr(spectral, "_exact", lambda x: bool(limit))
    x = rand(1, 2, *size).requires_grad_()
    for f in (dct2, idct2):
        assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(lambda x, f=f: f(x)**3, x)

def test_views_and_frozen_inputs():
    x = rand(2, 3, 9, 8)
    close(dct2(x.mT), dct2(x).mT, atol=1e-13)
    close(dct2(x[:, :, ::2, 1::3]), dct2(x[:, :, ::2, 1::3].contiguous()), atol=1e-14)
    for shape in ((300, 260), (3, 300, 260), (2, 3, 2, 150, 100)): # more than one portion of planes
        y = rand(*shape).mT
        assert dct2(y).is_contiguous() and dct2(y).shape == y.shape
        close(dct2(y), scipy.fft.dctn(y.numpy(), axes=(-2, -1), norm="ortho"), atol=1e-11)
        close(idct2(dct2(y)), y, atol=1e-11)
    with torch.inference_mode(): dct2(rand(1, 1, 13, 11)), SobolevEnergy(1.25)(rand(1, 1, 13, 11)) # fills the caches
    y = rand(1, 1, 13, 11).requires_grad_()
    w = SobolevEnergy(1.25).weights(y)
    (SobolevEnergy(1.25)(y).sum()+(w*dct2(y)).sum()).backward() # and they can be trained with
    assert y.grad.isfinite().all()

def test_rounded_products_are_not_used(monkeypatch):
    "Where the caller lets float32 products be rounded, only the FFT is used; the setting stays as it was"
    x, products = rand(2, 3, 32, 24, dtype=torch.float32), []
    monkeypatch.setattr(spectral, "_matrix", lambda *a, f=spectral._matrix: products.append(a) or f(*a))
    before = torch.get_float32_matmul_precision()
    try:
        for precision, used in (("highest", True), ("high", False), ("medium", False)):
            torch.set_float32_matmul_precision(precision)
            products.clear()
            close(dct2(x), dct2(x.double()), atol=1e-5)
            assert any(a[1] == torch.float32 for a in products) == used
            assert torch.get_float32_matmul_precision() == precision
    finally: torch.set_float32_matmul_precision(before)

def test_the_setting_of_a_gpu_is_read(monkeypatch):
    "A stand-in for a tensor on a GPU: what counts there is that backend's own flag"
    class OnGPU: dtype, is_cuda = torch.float32, True
    try:
        for allow in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = allow
            assert spectral._exact(OnGPU) == (not allow)
    finally: torch.backends.cuda.matmul.allow_tf32 = False

# ---- weights: fixtures 3 and 4

def test_fixture_3_and_4():
    for n, half, full, folded, ratio in ((64, 19919.2, 20606.6, 10769.5, .523),
                                         (128, 161798., 164521.9, 84123.3, .511)):
        close(sobolev_weights(n, n, unit_mean=False, dtype=torch.float64).mean(), half, atol=.05)
        f = torch.fft.fftfreq(n, dtype=torch.float64)*n
        w = (1+f[:, None]**2+f**2)**1.5
        close(w.mean(), full, atol=.05)
        close(w[:, :n//2+1].sum()/n**2, folded, atol=.05)
        close(w[:, :n//2+1].sum()/n**2/w.mean(), ratio, atol=5e-4)
    x = rand(2, 3, 6, 5)
    close(SobolevEnergy(0, mean=False)(x), 90*l2_energy(x), rtol=1e-14)

def test_expectation_of_white_noise():
    "Fixture 4: the mean over draws approaches the mean weight; its standard error is known"
    energy, x = SobolevEnergy(unit_mean=False), rand(64, 8, 64, 64, dtype=torch.float32)
    w = energy.weights(x)
    error = (2*w.double().square().sum()/8/64).sqrt()/64**2
    close(energy(x).double().mean(), w.double().mean(), atol=4*error.item())

@pytest.mark.parametrize("name", FREQUENCIES)
def test_units(name):
    w = sobolev_weights(6, 9, s=2, frequency=name, unit_mean=False, dtype=torch.float64)
    step = {"half": (.5, .5), "index": (1, 1), "radian": (math.pi/6, math.pi/9)}[name]
    close(w[2, 3], (1+(2*step[0])**2+(3*step[1])**2)**2, rtol=1e-13)
    close(sobolev_weights(6, 9, s=2, frequency=FREQUENCIES[name], dtype=torch.float64), w/w.mean(), rtol=1e-14)

# ---- energies

ENERGIES = [SobolevEnergy(), SobolevEnergy(0), SobolevEnergy(1, "radian", mean=False),
            SobolevEnergy(2.5, "index", unit_mean=False)]

@pytest.mark.parametrize("energy", ENERGIES)
@pytest.mark.parametrize("size", [(5, 7), (1, 4), (1, 1)])
def test_gradcheck(energy, size):
    x, ref = rand(2, 2, *size).requires_grad_(), rand(2, 2, *size, seed=1)
    for f in (energy, lambda x: energy.gap(x, ref), lambda x: energy.inner(x, ref), lambda x: energy.power(x, -.5)):
        assert torch.autograd.gradcheck(f, x) and torch.autograd.gradgradcheck(f, x)

def test_second_order_through_a_graph():
    "Gradient of a norm of the gradient, as an adversary needs it; closed form 2 (2/n)^2 W W x"
    energy, x = SobolevEnergy(), rand(3, 2, 9, 6).requires_grad_()
    value = energy(x)
    grad, = torch.autograd.grad(value.sum(), x, create_graph=True)
    second, = torch.autograd.grad(grad.square().sum(), x, retain_graph=True)
    both, = torch.autograd.grad(value.sum()+grad.square().sum(), x)
    close(both, second+grad, atol=1e-13)
    close(second, 2*(2/(2*9*6))**2*energy.power(x.detach(), 2), atol=1e-13)
    # and a weight that depends on x itself: both paths of the product
    y = rand(3, seed=4).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x, y: energy(x)*y, (x.detach()[:, :1, :3, :4].requires_grad_(), y))

@pytest.mark.parametrize("size", [(64, 64), (33, 65), (160, 96)])
def test_accuracy(size): # G1c
    x = rand(3, 4, *size, dtype=torch.float32).requires_grad_()
    energy = SobolevEnergy()(x)
    grad, = torch.autograd.grad(energy.sum(), x)
    true, true_grad = by_scipy(x.detach())
    close(energy.detach(), true, rtol=1e-6)
    close(grad, true_grad, atol=2e-6*np.abs(true_grad).max())

def kept(f, x):
    sizes = {}
    def pack(o):
        sizes[o.untyped_storage().data_ptr()] = o.untyped_storage().nbytes()
        return o
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda o: o): out = f(x)
    assert out.requires_grad
    return sum(sizes.values())/(x.numel()*x.element_size())

@pytest.mark.parametrize("size", [(32, 32), (150, 140)])
def test_one_tensor_is_kept(size):
    x, ref = rand(2, 16, *size, dtype=torch.float32).requires_grad_(), rand(2, 16, *size, seed=1, dtype=torch.float32)
    energy = SobolevEnergy()
    for f in (energy, lambda x: energy.gap(x, ref), SobolevEnergy(0)): assert kept(f, x) <= 1.05
    assert kept(lambda x: dct2(x).sum(), x) == 0

def test_gap():
    x, ref = rand(2, 4, 3, 6, 7)
    for energy in ENERGIES:
        close(energy.gap(x, ref), energy(x)-energy(ref), rtol=1e-9)
        close(energy_gap(x, ref, energy), energy.gap(x, ref))
        close(energy.gap(x, x), torch.zeros(4))
        close(energy.gap(x, ref), energy.inner(x-ref, x+ref), rtol=1e-12)
    close(energy_gap(x, ref, SobolevEnergy(0)), energy_gap(x, ref))
    close(energy_gap(x, ref, l2_energy), energy_gap(x, ref))

@pytest.mark.parametrize("size", [(1, 1, 1, 1), (5, 3, 7, 9), (2, 16, 33, 40)])
@pytest.mark.parametrize("options", [{}, dict(frequency="radian"), dict(unit_mean=False)], ids=str)
def test_order_zero_is_the_mean_square(size, options):
    "To the bit, value and gradient, in both precisions, alone and as a gap: 0 may stand for Diffusion-DPO's energy"
    for dtype in (torch.float32, torch.float64):
        x, ref = (3e3*rand(*size, seed=k, dtype=dtype) for k in (0, 1))
        x.requires_grad_()
        zero = SobolevEnergy(0., **options)
        by_hand = ((x-ref)*(x+ref)).sum((1, 2, 3))/x[0].numel()
        for a, b in ((zero(x), l2_energy(x)), (zero.gap(x, ref), by_hand), (zero.gap(x, ref), energy_gap(x, ref)),
                     (energy_gap(x, ref, zero), energy_gap(x, ref, l2_energy))):
            assert torch.equal(a, b) and a.dtype == b.dtype == dtype
            assert torch.equal(*(torch.autograd.grad(o.sum(), x, retain_graph=True)[0] for o in (a, b)))

def test_autocast_and_half_precision():
    x, ref = rand(2, 4, 3, 16, 16, dtype=torch.float32)
    energy = SobolevEnergy()
    def everything():
        y = x.clone().requires_grad_()
        grad, = torch.autograd.grad(energy.gap(y, ref).sum(), y)
        return energy(x), energy.gap(x, ref), energy.power(x, .5), energy.inner(x, ref), dct2(x), grad
    outside = everything()
    with torch.autocast("cpu", torch.bfloat16): inside = everything()
    for a, b in zip(inside, outside, strict=True): assert a.dtype == torch.float32 and torch.equal(a, b)
    for dtype in (torch.bfloat16, torch.float16, torch.uint8, torch.int64):
        for f in (energy, lambda x: energy.gap(ref, x), lambda x: energy.power(x, 1)):
            with pytest.raises(TypeError, match="before subtracting"): f(x.to(dtype))

def margin_error(gap, delta=1e-3): # G1d
    target, ref, change = rand(3, 48, 16, 32, 32, seed=3, dtype=torch.float32)
    now = ref+delta*change
    def margin(g): return g[24:]-g[:24]
    true = margin(SobolevEnergy().gap(now.double()-target, ref.double()-target))
    return ((margin(gap(now-target, ref-target))-true).square().mean()/true.square().mean()).sqrt().item()

def test_margin_precision():
    energy = SobolevEnergy()
    with torch.autocast("cpu", torch.bfloat16):
        assert margin_error(energy.gap) <= 2e-3
        assert margin_error(lambda x, r: energy(x)-energy(r)) <= 2e-2
        assert margin_error(lambda x, r: energy(x).bfloat16().float()-energy(r).bfloat16().float()) > .9 # all margins 0

def test_fixture_12():
    e = torch.arange(10950., 11050., .25)
    worst = (e.bfloat16().float()-e).abs().max()
    assert worst == 32 and 2.5e5 < 4*worst*2000 < 2.6e5

# ---- operators

@pytest.mark.parametrize("energy", ENERGIES)
def test_power(energy):
    x, y = rand(2, 3, 2, 6, 5)
    close(energy.power(energy.power(x, -.5), -.5), energy.power(x, -1), atol=1e-12)
    close(energy.power(energy.power(x, -1), 1), x, atol=1e-11)
    close((energy.power(x, .7)*y).sum(), (x*energy.power(y, .7)).sum(), rtol=1e-10)
    close(energy.inner(x, y), (x*energy.power(y, 1)).sum((1, 2, 3))/energy._scale(x), atol=1e-10)
    close(energy(sample_coloured(x, energy)), x.square().sum((1, 2, 3))/energy._scale(x), rtol=1e-10) # whitened

@pytest.mark.parametrize("size", [(8, 6), (150, 7)])
def test_stencil(size):
    laplacian = SobolevEnergy(1, lambda k, n: 2*(math.pi*k/(2*n)).sin(), unit_mean=False, mean=False)
    x = rand(3, 2, *size)
    close(laplacian(x), sum(o.square().sum((1, 2, 3)) for o in (x, x.diff(dim=-1), x.diff(dim=-2))), rtol=1e-12)

# ---- seeded bugs: each of these energies must differ from SciPy's by more than the tolerance

def wrong_unit(x): return SobolevEnergy(frequency="index")(x)
def wrong_power(x): return SobolevEnergy(.75)(x)
def raw_weights(x): return SobolevEnergy(unit_mean=False)(x)
def a_sum(x): return SobolevEnergy(mean=False)(x)
def transposed(x): return (sobolev_weights(*x.shape[:-3:-1], dtype=x.dtype).T.flip(0)*dct2(x)**2).mean((1, 2, 3))
def bare_transform(x):
    a = torch.from_numpy(scipy.fft.dctn(x.numpy(), axes=(-2, -1)))
    return (sobolev_weights(*x.shape[-2:], dtype=x.dtype)*a**2).mean((1, 2, 3))
def half_spectrum(x):
    w, a = sobolev_weights(*x.shape[-2:], dtype=x.dtype), dct2(x)
    return (w*a**2)[..., :x.shape[-1]//2+1].sum((1, 2, 3))/x[0].numel()
def fourier(x):
    h, w = (torch.fft.fftfreq(n, dtype=x.dtype)*n for n in x.shape[-2:])
    weights = (1+h[:, None]**2+w**2)**1.5
    return (weights/weights.mean()*torch.fft.fft2(x, norm="ortho").abs()**2).mean((1, 2, 3))
def inverse_weights(x): return (dct2(x)**2/sobolev_weights(*x.shape[-2:], dtype=x.dtype)).mean((1, 2, 3))
def one_axis(x):
    w, a = sobolev_weights(*x.shape[-2:], dtype=x.dtype), dct2(x.unsqueeze(-2))[..., 0, :]
    return (w*a**2).mean((1, 2, 3))

def check(energy): close(energy(rand(3, 2, 10, 12)), by_scipy(rand(3, 2, 10, 12))[0], rtol=1e-10)

def test_right_one_passes(): check(SobolevEnergy())

@pytest.mark.parametrize("bug", [wrong_unit, wrong_power, raw_weights, a_sum, transposed, bare_transform, half_spectrum,
                                 fourier, inverse_weights, one_axis])
def test_bugs_fail(bug):
    with pytest.raises(AssertionError): check(bug)

# ---- spectra

@pytest.mark.parametrize("options", [{}, dict(window=False), dict(bins=5)])
@pytest.mark.parametrize("size", [(48, 48), (33, 40)])
def test_white_psd(options, size):
    f, p = radial_psd(3*rand(800, 1, *size, dtype=torch.float32), **options)
    bins = options.get("bins", min(size)//2)
    assert p.shape == (800, bins) and (f.diff() > 0).all() and 0 < f[0] and f[-1] <= .5+.5/bins
    error = p.std(0)/800**.5
    assert ((p.mean(0)-9).abs() < 5*error).all()

def test_psd_of_a_wave():
    "A wave of 8 cycles on 64 pixels, amplitude 1, has the variance 1/2, all in the ring at 1/8"
    wave = (2*math.pi*8*torch.arange(64)/64).sin().expand(1, 64, 64)
    f, p = radial_psd(wave, window=False)
    assert abs(f[p[0].argmax()]-.125) < .01 and p[0].max() > 1e3*p[0].sort().values[-2]
    close(radial_psd(wave+5)[1], radial_psd(wave)[1], atol=1e-3) # the mean does not count

def test_fixture_11():
    a, b = rand(2, 300, 1, 64, 64)
    theory = 10/math.log(10)*math.pi/3**.5
    close(theory, 7.88, atol=5e-3)
    close(log_spectral_distance(a, b).square().mean().sqrt(), theory, rtol=.01)
    close(log_spectral_distance(a, b), log_spectral_distance(b, a), atol=1e-12)
    assert log_spectral_distance(a, b, radial=True).mean() < 2

# ---- errors

def test_errors():
    x = rand(2, 3, 8, 8, dtype=torch.float32)
    energy = SobolevEnergy()
    for s in (-1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="Sobolev index s"): SobolevEnergy(s)
    with pytest.raises(ValueError, match="half, index, radian"): SobolevEnergy(frequency="hertz")
    for f in (energy.gap, energy.inner, energy_gap, lambda a, b: energy_gap(a, b, energy)):
        with pytest.raises(ValueError, match="one shape"): f(x, x[..., :7])
        with pytest.raises(ValueError, match="one device, got cpu and meta"): f(x, x.to("meta"))
    with pytest.raises(ValueError, match="no_grad"): energy.gap(x, x.clone().requires_grad_())
    with pytest.raises(ValueError, match="B,C,H,W"): energy(x[0])
    for value in (float("nan"), float("inf")):
        bad = x.clone()
        bad[1, 2, 3, 4] = value
        for e in (energy, SobolevEnergy(0)):
            with pytest.raises(FloatingPointError, match=r"gamma holds NaN or infinity in sample\(s\) \[1\]"): e(bad)
            with pytest.raises(FloatingPointError, match=r"gamma_ref holds NaN or infinity"): e.gap(x, bad)
    with pytest.raises(FloatingPointError, match="overflows"): energy(1e25*x)
    with pytest.raises(TypeError, match="float32 or float64"): dct2(x.bfloat16())
    with pytest.raises(ValueError, match="no empty axis"): dct2(x[:, :, :0])
    with pytest.raises(ValueError, match="luma"): radial_psd(x)
    with pytest.raises(ValueError, match="cannot fill"): radial_psd(x[:, 0], bins=9)
    with pytest.raises(ValueError, match="one shape"): log_spectral_distance(x[:, 0], x[:1, 0])
