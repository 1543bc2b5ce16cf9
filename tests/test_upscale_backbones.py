"Backbones on latents in the function and the command: fields, windows, sizes, memory, options. All weights are random"
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from srnb import plan, tiles
from srnb.backbones import Backbone, BackboneOptions, Cond, LatentCodec, load_backbone, write_tiny, write_tiny_control
from srnb.command import main
from srnb.core import bicubic, generator
from srnb.data import embedded_photos
from srnb.colour import Colour, adain_fix
from srnb.images import load_model, upscale
from srnb.paths import SAMPLERS, Flow, sample_ab2, sample_ddim, sample_ddpm
from srnb.plan import Tally
from srnb.policies import from_pretrained, save_adapter, text_ids
from srnb.tiles import noise_for, noise_window, on_latents, solve_blended, solve_tiles

KINDS = ("sd", "sdxl", "flux")


@pytest.fixture(scope="session")
def folders(tmp_path_factory): # kind -> (pipeline, control branch)
    import diffusers.utils.logging
    import transformers.utils.logging
    for quiet in (diffusers.utils.logging, transformers.utils.logging):
        quiet.disable_progress_bar()
        quiet.set_verbosity_error()
    top = tmp_path_factory.mktemp("backbones")
    return {k: (p := write_tiny(k, top/k), write_tiny_control(load_backbone(p), top/f"control_{k}")) for k in KINDS}


@pytest.fixture(scope="session")
def load(folders):
    known = {}
    def get(kind):
        if kind not in known:
            base, control = folders[kind]
            known[kind] = load_backbone(base, BackboneOptions(control=str(control)), prompts=["a cat"])
        return known[kind]
    return get


@pytest.fixture
def box(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = (255*np.random.default_rng(0).random((9, 13, 3))).astype(np.uint8)
    Image.fromarray(small).resize((26, 18), Image.Resampling.BICUBIC).save("a.png")
    return tmp_path


def pixels(name): return torch.from_numpy(np.asarray(Image.open(name)).copy()).permute(2, 0, 1)/255
def photo(*size): return bicubic(embedded_photos("held_out")[0].read()[None], size)
def whole(policy, lq, steps, seed=0, sampler=None, prompt=""): # untiled; sides must fit
    noise, draw = noise_for(policy, lq, seed)
    cond = policy.encode(lq, text_ids([prompt]))
    return policy.solve(lq, noise, steps, sampler, draw, cond).mul(255).round().byte()


# The field of noise

def test_field_of_pixels_is_what_it_was(): # numbers written down before channels were an argument
    want = [-1.2536378, -.4298838, -.4293378, 1.2449348, 1.4309988, -.7068231, .6789657, -1.4192537]
    assert noise_window(7, 60, 61, 2, 4)[0, 1].flatten().tolist() == pytest.approx(want, abs=1e-6)


def test_fields_of_latents(load):
    for kind, c in (("sd", 4), ("flux", 4)):
        p, lq = load(kind), torch.zeros(1, 3, 24, 40)
        noise, draw = noise_for(p, lq, 3)
        assert noise.shape == (1, c, 12, 20)
        part, draw_part = noise_for(p, lq[..., 8:16, 12:36], 3, 8, 12)
        assert torch.equal(part, noise[..., 4:8, 6:18])
        steps = [(draw(noise), draw_part(part)) for _ in range(3)]
        for a, b in steps: assert torch.equal(b, a[..., 4:8, 6:18])
        assert not torch.equal(steps[0][0], steps[1][0]) and not torch.equal(noise, steps[0][0])
        assert not torch.equal(noise, noise_for(p, lq, 4)[0])


# Windows

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (12, 40)])
def test_one_window_is_the_whole(load, kind, size):
    p, lq = load(kind), photo(*size)
    for sampler in (sample_ddim, sample_ab2, sample_ddpm):
        want = whole(p, lq, 2, 5, sampler, "a cat")
        for solve in (solve_blended, solve_tiles):
            assert torch.equal(solve(p, lq, 5, 64, steps=2, sampler=sampler, prompt="a cat"), want)
    assert not torch.equal(solve_blended(p, lq, 5, 64, steps=2), want)


def test_one_window_is_the_whole_for_small_policies():
    for name, steps in (("small", 3), ("onestep", None)):
        p, lq = from_pretrained(name), photo(16, 24)
        want = p.solve(lq, noise_window(2, 0, 0, 64, 96), steps).mul(255).round().byte()
        assert torch.equal(solve_blended(p, lq, 2, 64, steps=steps), want)
        assert torch.equal(solve_tiles(p, lq, 2, 64, steps=steps), want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_by_hand(load, kind): # two windows of 16, 8 shared; every crop written out
    p, lq = load(kind), photo(16, 24)
    noise, _ = noise_for(p, lq, 0)
    cond = p.encode(lq, text_ids(["a cat"]))
    k = 4 if kind != "flux" else .5
    assert cond.control.shape[-2:] == (16*k, 24*k)
    sigma = p.path_of(lq[..., :16]).sigma_grid(1)[:1]
    def predicted(a, b):
        seen = Cond(cond.control[..., int(2*k*a):int(2*k*b)], cond.text, cond.pooled)
        return p.guided(noise[..., a:b], sigma, seen)
    left, right = predicted(0, 8), predicted(4, 12)
    ramp = torch.tensor([0., .25, .75, 1.]) # 1 latent thrown away, then half a step into each of the two between
    both = left[..., 4:]*(1-ramp_of(4, 1)) + right[..., :4]*ramp_of(4, 1)
    assert torch.equal(ramp, ramp_of(4, 1))
    z, _ = p.path.estimates(noise, torch.cat([left[..., :4], both, right[..., 4:]], -1), sigma)
    got = solve_blended(p, lq, 0, 16, 8, 1, prompt="a cat")
    assert (got.int()-p.codec.decode(z, lq).mul(255).round().int()).abs().max() <= 1


def ramp_of(n, margin): return ((torch.arange(n)+.5-margin)/(n-2*margin)).clamp(0, 1)


def at_borders(sr, where): # difference of neighbouring columns at windows' borders over that elsewhere
    d = sr.float().diff(dim=-1).abs().mean((0, 1, 2))
    hit = torch.zeros(len(d), dtype=torch.bool)
    hit[[o-1 for o in where]] = True
    return (d[hit].mean()/d[~hit].mean()).item()


@pytest.mark.parametrize("kind", KINDS)
def test_the_blend_is_continuous(load, kind): # random weights: it says no more
    p, lq, got = load(kind), photo(16, 96), {}
    for overlap in (0, 16):
        t, at = tiles.layout(p, (16, 96), 40, overlap)[1]
        assert len(at) > 2
        where = sorted({4*o for o in (*at[1:], *(a+t for a in at[:-1]))})
        got[overlap] = at_borders(solve_blended(p, lq, 0, 40, overlap, 3), where)
    print(kind, got)
    assert got[16] < 1.25


def test_windows_of_the_shipped_policy_are_nearer_than_tiles():
    p, lq = from_pretrained("small"), photo(24, 64)
    want = p.solve(lq, noise_window(0, 0, 0, 96, 256), 4).mul(255)
    tiles, blended = ((f(p, lq, 0, 24, 8, 4)-want).square().mean() for f in (solve_tiles, solve_blended))
    assert blended < .9*tiles and blended < 4


# Sizes and proportions

class Pool(torch.nn.Module):
    "A VAE whose latents are means of 8x8 pixels"
    config = SimpleNamespace(block_out_channels=(1,)*4, latent_channels=3, scaling_factor=1., shift_factor=None)
    dtype, device, use_tiling = torch.float32, torch.device("cpu"), False

    def encode(self, x):
        z = torch.nn.functional.avg_pool2d(x, 8)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: z))

    def decode(self, z): return SimpleNamespace(sample=torch.nn.functional.interpolate(z, scale_factor=8))


class Sees(Backbone):
    "Predicts the control image"
    stride, device = 16, torch.device("cpu")

    def __init__(self):
        self.net, self.codec, self.sampler = torch.nn.Identity(), LatentCodec(Pool()), sample_ddim
        self.path, self.trained_on = Flow(), Flow()

    def encode(self, lq, text=None):
        return Cond(self.codec.latents(self.codec.upsample(lq)), torch.zeros(len(lq), 1, 1))

    def guided(self, x, sigma, cond): return (x-cond.control)/sigma.view(-1, 1, 1, 1)


@pytest.mark.parametrize("size", [(17, 40), (40, 17), (64, 64), (5, 90)])
@pytest.mark.parametrize("tile", [1000, 24])
def test_nothing_is_squeezed(size, tile):
    lq = photo(*size)
    y = bicubic(lq, [4*n for n in size])
    for solve in (solve_blended, solve_tiles):
        sr = solve(Sees(), lq, 0, tile, 8, 1).float()/255 # one step: two would undo weights that add to 2
        assert sr.shape == y.shape
        a, b = (torch.nn.functional.avg_pool2d(o, 8) for o in (sr, y)) # compared on the grid of latents
        assert (a-b).abs().mean() < .01
        if size == (17, 40): # what a square would do: its middle is not the image's
            square = bicubic(lq, (40, 40))[..., 11:28, :]
            assert (torch.nn.functional.avg_pool2d(bicubic(square, y.shape[-2:]), 8)-b).abs().mean() > .05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(17, 40), (1, 1), (3, 50)])
def test_odd_sizes(load, kind, size):
    p, lq = load(kind), photo(*size)
    assert solve_blended(p, lq, steps=1).shape == (1, 3, 4*size[0], 4*size[1])
    assert torch.equal(solve_blended(p, lq, steps=2), whole(p, tiles.mirror(lq, 4), 2)[..., :4*size[0], :4*size[1]])


def test_noise_levels_of_flux_are_those_of_a_window(load, monkeypatch):
    p, seen = load("flux"), []
    grid = type(p.path).sigma_grid
    monkeypatch.setattr(type(p.path), "sigma_grid", lambda self, steps: seen.append(self.tokens) or grid(self, steps))
    solve_blended(p, photo(16, 96), 0, 32, 8, 1)
    assert seen == [4*8] # windows of 16 x 32


# The function and the plan

def test_defaults(load, monkeypatch):
    assert [load(k).sampler for k in KINDS] == [sample_ddpm, sample_ddpm, sample_ddim]
    assert from_pretrained("small").sampler is sample_ab2 and not on_latents(from_pretrained("small"))
    p, x = load("sd"), photo(8, 12)
    noise, draw = noise_for(p, x, 9)
    want = p.solve(x, noise, 3, sample_ddpm, draw)
    assert torch.equal(upscale(x, p, 9, steps=3, colour=Colour("none")), want)
    y = p.codec.upsample(x)
    fixed = adain_fix(want, y).mul(255).round().clamp(0, 255)/255
    assert torch.equal(upscale(x, p, 9, steps=3), fixed) # as the command does
    with pytest.raises(ValueError, match="'a dog'|number"): upscale(x, p, 9, steps=3, prompt="a dog")
    with pytest.raises(ValueError, match="no prompt"): upscale(x, "onestep", prompt="a cat")
    with pytest.raises(ValueError, match="reads no text"): upscale(x, from_pretrained("small"), prompt="a cat")


@pytest.mark.parametrize("kind", KINDS)
def test_plan(load, kind, monkeypatch):
    p = load(kind)
    per_solve, per_decode = plan.bytes_per_pixel(p), plan.bytes_per_pixel(p, plan.run_decoder)
    for run, per in ((plan.run_whole, per_solve), (plan.run_decoder, per_decode)):
        x = torch.zeros(1, 3, 80, 80)
        noise = torch.zeros(1, *p.codec.shape(x))
        with Tally() as made: run(p, x, noise)
        assert .8 < made.peak/80**2/per < 1.25
    monkeypatch.setattr(plan, "free_memory", lambda: 10**13)
    assert [tiles.plan_tiles(p, s).tiles for s in ((128, 128), (129, 129), (20, 300))] == [1, 4, 1]
    assert tiles.plan_tiles(p, (1000, 1000)).tile == 128
    small = tiles.plan_tiles(p, (1000, 1000)).bytes
    assert small > per_decode*10**6
    p.codec.vae.enable_tiling()
    try:
        assert plan.bytes_per_pixel(p) == per_solve and tiles.plan_tiles(p, (1000, 1000)).bytes < .5*small
        assert p.codec.vae.use_tiling
        x, said = photo(48, 48), []
        assert upscale(x, p, steps=1, tile=64, say=said.append).shape == (1, 3, 192, 192)
        plan._BYTES.pop(p)
        assert plan.bytes_per_pixel(p) == per_solve and p.codec.vae.use_tiling
    finally: p.codec.vae.disable_tiling()


# The command

def test_a_policys_sampler(box):
    small, x = from_pretrained("small"), pixels("a.png")
    wants = {name: upscale(x, small, 3, steps=2, sampler=s) for name, s in SAMPLERS.items()}
    for name, more in [("ab2", []), *((o, ["--sampler", o]) for o in SAMPLERS)]:
        assert main(["upscale", "a.png", "-o", "d.png", "--force", "--model", "small", "--dtype", "float32",
                     "--steps", "2", "--seed", "3", *more]) == 0
        assert torch.equal(pixels("d.png"), wants[name]), more
    assert len({w.sum().item() for w in wants.values()}) == len(SAMPLERS)


def test_seeds_prompt_and_steps(folders, box, capsys):
    folder, control = folders["sd"]
    base = ["upscale", "a.png", "--model", str(folder), "--dtype", "float32", "--control", str(control), "--steps", "2"]
    assert main([*base, "-o", "out", "--seed", "3,4"]) == 0
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 3 and "2/2" in said.err
    assert sorted(p.name for p in Path("out").iterdir()) == ["a_seed3.png", "a_seed4.png"]
    assert main([*base, "-o", "b.png", "--seed", "3", "--prompt", ""]) == 0
    assert main([*base, "-o", "c.png", "--seed", "3,5"]) == 0
    assert Path("b.png").read_bytes() == Path("out/a_seed3.png").read_bytes() == Path("c_seed3.png").read_bytes()
    assert Path("c_seed5.png").exists() and not Path("c.png").exists()
    p = load_backbone(folder, BackboneOptions(control=str(control)), prompts=["a cat"])
    x = pixels("a.png")
    assert torch.equal(pixels("b.png"), upscale(x, p, 3, steps=2))
    half = Colour("wavelet", .5, True)
    cases = [(["--color-fix", "none"], dict(colour=Colour("none"))), (["--prompt", "a cat"], dict(prompt="a cat")),
             (["--tile", "64"], {}), (["--color-fix", "wavelet", "--color-strength", ".5", "--color-linear"],
                                      dict(colour=half))]
    cases += [(["--sampler", name], dict(sampler=sampler)) for name, sampler in SAMPLERS.items()]
    for more, want in cases:
        assert main([*base, "-o", "d.png", "--force", "--seed", "3", *more]) == 0
        assert torch.equal(pixels("d.png"), upscale(x, p, 3, steps=2, **want)), more
    q = load_backbone(folder, BackboneOptions(control=str(control), guidance=1.))
    assert main([*base, "-o", "e.png", "--seed", "3", "--guidance", "1"]) == 0
    assert torch.equal(pixels("e.png"), upscale(x, q, 3, steps=2))
    assert not torch.equal(pixels("e.png"), pixels("b.png"))


def test_adapter(folders, box, tiny, capsys):
    for model, control in (folders["flux"], (tiny, None)):
        options = BackboneOptions(control=str(control)) if control else None
        more = ["--control", str(control)] if control else []
        p = load_model(model, "float32", options=options)
        p.add_lora(2)
        with torch.no_grad():
            for n, w in p.net.named_parameters():
                if "lora_B" in n: w.copy_(.5*torch.randn(w.shape, generator=generator(0)))
        save_adapter(p, "adapter")
        base = ["upscale", "a.png", "--model", str(model), "--dtype", "float32", "--steps", "2", "--force", *more]
        assert main([*base, "-o", "a0.png"]) == 0 and main([*base, "-o", "a1.png", "--adapter", "adapter"]) == 0
        want = upscale(pixels("a.png"), p, steps=2)
        assert torch.equal(pixels("a1.png"), want) and not torch.equal(pixels("a0.png"), want)
        for strength, same in (("0", "a0.png"), ("1", "a1.png")): # the base and the adapter, to the bit
            assert main([*base, "-o", "s.png", "--adapter", "adapter", "--strength", strength]) == 0
            assert torch.equal(pixels("s.png"), pixels(same))
        assert main([*base, "-o", "s.png", "--samples", "3", "--keep", "mean"]) == 0 # of a base, here without adapter
        alone = ["upscale", "a.png", "--dtype", "float32", "--steps", "2", "--force", "--adapter", "adapter", *more]
        assert main([*alone, "-o", "a2.png"]) == 0 and torch.equal(pixels("a2.png"), want) # it names its base
        alone = [o for o in alone if o not in more] # which is for a backbone
        assert main([*alone, "-o", "a3.png", "--model", "onestep"]) == 2 and not Path("a3.png").exists()
        assert f"it was trained on {model}" in capsys.readouterr().err


def test_mistakes(folders, box, capsys, monkeypatch):
    sd, flux = str(folders["sd"][0]), str(folders["flux"][0])
    Path("empty").mkdir()
    Path("a.bin").write_bytes(b"x")
    other, of_sd = str(folders["sdxl"][1]), str(folders["sd"][1]) # control branches
    shifts = "onestep shifts residuals"
    for argv, text in (
            (["--prompt", "a cat"], "--model onestep: it is no backbone"), (["--control", "."], "no backbone"),
            (["--guidance", "2"], "no backbone"), (["--tile-vae"], "no backbone"),
            (["--sampler", "ddpm"], f"--sampler ddpm: {shifts}"), (["--sampler", "ab2"], f"--sampler ab2: {shifts}"),
            (["--adapter", "none"], "--adapter none: no adapter_config.json"),
            (["--adapter", "empty", "--model", sd], "--adapter empty: no adapter_config.json"),
            (["--steps", "0"], "--steps must be at least 1"),
            (["--steps", "1000", "--model", sd, "--control", of_sd], "--steps: steps must lie in [1, 999]"),
            (["--model", sd], f"--model {sd}: {sd} predicts the same for two low-quality images"),
            (["--guidance", "nan", "--model", sd], "--guidance must be"), (["--guidance", "-1"], "--guidance must be"),
            (["--seed", "1,1"], "names a seed twice"), (["--seed", "1,x"], "whole numbers"),
            (["--seed", ""], "whole numbers"), (["--seed", "1,-1"], "must lie in"),
            (["--sampler", "euler"], "invalid choice"), (["--device", "nonsense"], "device nonsense cannot be used"),
            (["--control", "none", "--model", sd], "--control none: no such file or folder"),
            (["--control", "a.bin", "--model", sd], "pickled"),
            (["--control", other, "--model", sd], "is no control branch of this base"),
            (["--control", of_sd, "--model", flux], "control branch"),
            (["--model", "empty"], "--model empty: no policy 'empty': it holds no policy.json"),
            (["--model", "no/such/folder"], "no policy 'no/such/folder': there is no such folder")):
        assert main(["upscale", "a.png", "-o", "out", *argv]) == 2, argv
        said = capsys.readouterr().err
        assert text in said and "Traceback" not in said and "BackboneError" not in said, (argv, said)
        assert "\nusage" in said or said.count("\n") == 2, said # the first line: it is loading
    assert not Path("out").exists()
    os.rename(folders["sd"][0]/"vae", folders["sd"][0]/"vae_")
    try:
        assert main(["upscale", "a.png", "-o", "out", "--model", sd]) == 2
        assert "vae is missing or damaged" in capsys.readouterr().err
    finally: os.rename(folders["sd"][0]/"vae_", folders["sd"][0]/"vae")


def test_load_model(folders, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    sd, control = folders["sd"]
    options = BackboneOptions(control=str(control))
    assert isinstance(load_model(sd, "float32", options=options), Backbone)
    assert not isinstance(load_model("small"), Backbone)
    assert load_model(sd, torch.bfloat16, options=options).dtype == torch.bfloat16
    options = replace(options, guidance=2., tile_vae=True)
    p = load_model(sd, "float32", options=options, prompts=["a cat"])
    assert p.guidance == 2 and p.codec.vae.use_tiling
    assert p.encode(torch.zeros(1, 3, 8, 8), text_ids(["a cat"])).text.shape[0] == 1
