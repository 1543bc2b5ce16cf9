"Several samples of a picture, and what is kept of them"
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from srnb import images, tiles
from srnb.colour import Colour
from srnb.command import main
from srnb.core import bicubic, generator, quantize, read_image, to_floats
from srnb.images import Samples, best, mean, upscale, upscale_file
from srnb.nets import SmallUNet, UNetConfig
from srnb.paths import sample_ddpm
from srnb.policies import PixelCodec, Policy
from srnb.tiles import check_draws, draw_blended, draw_tiles, plan_tiles, solve_blended, solve_tiles


class Quick:
    "Bicubic plus a little noise"
    codec, stride = PixelCodec(), 16
    def solve(self, lq, noise, steps=None, **more): return quantize(self.codec.upsample(lq)+.02*noise)


class Still(Quick):
    "Bicubic, whatever the noise"
    def solve(self, lq, noise, steps=None, **more): return super().solve(lq, 0*noise)


quick = Quick()


class Counting(Policy):
    "Counts what is encoded"
    encoded = 0
    def encode(self, lq, text=None):
        self.encoded += 1
        return super().encode(lq, text)


def network():
    net, g = SmallUNet(UNetConfig((16, 16), (1, 1), 16)), generator(0)
    with torch.no_grad():
        for p in net.parameters():
            scale = .4*p[0].numel()**-.5 if p.ndim > 1 else .05
            p.copy_(torch.randn(p.shape, generator=g)*scale)
    return Counting(net)


def photo(h, w, seed=0): return bicubic(torch.rand(1, 3, h//4+1, w//4+1, generator=generator(seed)), (h, w)).clamp(0, 1)


@pytest.fixture
def box(tmp_path, monkeypatch): # an empty working folder; the stand-in is what every name loads
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(images, "load_model", lambda *a: quick)
    return tmp_path


def save(name, size=(13, 9), seed=0):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    pixels = (255*photo(size[1], size[0], seed)[0].permute(1, 2, 0)).byte().numpy()
    Image.fromarray(pixels).save(name)


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# Tiles

@pytest.mark.parametrize("draw, solve", [(draw_tiles, solve_tiles), (draw_blended, solve_blended)])
@pytest.mark.parametrize("tile", [1000, 64])
def test_several_are_each_alone(draw, solve, tile):
    "Every sample is that of its seed, to the bit, also of an ancestral sampler; the input is encoded once a tile"
    p, lq = network(), photo(70, 120)
    for sampler in (None, sample_ddpm):
        p.encoded = 0
        made = list(draw(p, lq, (3, 7, 4), tile, 8, 2, sampler=sampler))
        pieces = 1 if draw is draw_blended else (1 if tile == 1000 else 2*2)
        assert p.encoded == pieces and [o.dtype for o in made] == [torch.uint8]*3
        for seed, o in zip((3, 7, 4), made, strict=True):
            assert torch.equal(o, solve(p, lq, seed, tile, 8, 2, sampler=sampler))


def test_ticks_count_samples():
    for draw, steps in ((draw_tiles, 1), (draw_blended, 2)):
        seen = []
        list(draw(network(), photo(70, 120), (0, 1, 2), 64, 8, 2, lambda a, b, seen=seen: seen.append((a, b))))
        assert seen == [(i+1, 3*4*steps) for i in range(3*4*steps)]


def test_the_plan_counts_samples(monkeypatch):
    p = network()
    one, eight = (plan_tiles(p, (300, 400), 64, samples=n) for n in (1, 8))
    held = 7*3*16*300*400 # in 8 bit
    assert held < eight.bytes-one.bytes < 4*held and one.bytes == plan_tiles(p, (300, 400), 64).bytes
    assert plan_tiles(quick, (300, 400), 1000, samples=8).bytes == plan_tiles(quick, (300, 400), 1000).bytes+held
    said = []
    upscale(photo(70, 100)[0], quick, tile=64, samples=3, say=said.append)
    assert "6 tiles of 64, 3 samples, about" in said[0]
    assert any(re.match(r"tiles: \d+/18, .* s left", o) for o in said[1:]), said
    monkeypatch.setattr("srnb.plan.free_memory", lambda: int(eight.bytes/.9)-1000)
    assert plan_tiles(p, (300, 400), 64, samples=7).tiles > 1
    with pytest.raises(tiles.DoesNotFit, match="300 pixels need.*smaller tiles or take fewer samples or cut the image"):
        plan_tiles(p, (300, 400), 64, samples=8)


# What is kept

def test_best_is_nearest_to_all():
    made = torch.stack([quantize(torch.rand(3, 8, 12, generator=generator(i))) for i in range(5)])
    lq = torch.rand(3, 2, 3)
    far = [(o-made).square().mean().item() for o in made] # of a sample to all samples
    assert torch.equal(best(made, lq), made[int(np.argmin(far))])
    assert torch.allclose(mean(made, lq), made.mean(0), atol=1e-6)
    stored = Samples(tuple((255*o).round().byte() for o in made))
    assert len(stored) == 5 and torch.equal(best(stored, lq), best(made, lq)) and len(stored[1:]) == 4
    with pytest.raises(AttributeError, match=r"has no 'std'; torch.stack\(list\(samples\)\)"): stored.std(0)


def test_kinds():
    "Pillow, array and tensor, grey, alpha and 16 bit: what is kept has the kind of one sample"
    rng, seeds = np.random.default_rng(0), (5, 6, 7)
    for shape in ((9, 13), (9, 13, 1), (9, 13, 3), (9, 13, 4)):
        for dtype, top in (("u1", 255), ("u2", 65535), ("f4", 1)):
            a = (top*rng.random(shape)).astype(dtype)
            alone = [upscale(a, quick, s) for s in seeds]
            every = upscale(a, quick, 5, samples=3, keep=None)
            assert all(np.array_equal(x, y) for x, y in zip(every, alone, strict=True))
            one = upscale(a, quick, 5, samples=3)
            assert one.dtype == a.dtype and one.shape == alone[0].shape
            assert sum(np.array_equal(one, o) for o in alone) == 1
    im = Image.fromarray((255*rng.random((9, 13, 4))).astype("u1"))
    im.info["dpi"] = (300, 300)
    assert upscale(im, quick, samples=2).mode == "RGBA" and upscale(im, quick, samples=2, keep=mean).info["dpi"]
    x = photo(9, 13)
    both = torch.cat([x, 1-x])
    for keep in (best, mean):
        got = upscale(both, quick, 5, samples=3, keep=keep)
        assert torch.equal(got, torch.stack([upscale(o, quick, 5, samples=3, keep=keep) for o in both]))
    every = upscale(both, quick, 5, samples=3, keep=None)
    assert len(every) == 3 and all(torch.equal(o, upscale(both, quick, s)) for s, o in zip(seeds, every, strict=True))
    alone = torch.stack([upscale(x[0], quick, s) for s in seeds])
    assert (upscale(x[0], quick, 5, samples=3, keep=mean)-alone.mean(0)).abs().max() <= .51/255


def test_colours_are_fixed_before_the_choice():
    class Tint(Quick):
        def solve(self, *a): return super().solve(*a)*.8
    x, seen = photo(9, 13)[0], []
    def first(samples, lq):
        seen.append((samples[0], lq))
        return samples[0]
    got = upscale(x, Tint(), colour=Colour("wavelet"), samples=2, keep=first)
    assert torch.equal(got, upscale(x, Tint(), colour=Colour("wavelet"))) and torch.equal(seen[0][1], x)
    assert torch.equal(seen[0][0], got)


def test_own_keep_is_called_for_one_sample_too():
    assert upscale(photo(9, 13)[0], quick, keep=lambda samples, lq: 0*samples[0]).max() == 0


@pytest.mark.parametrize("keep, text", [
    (lambda s, lq: s, "keep must give one picture of shape (3, 36, 52), got Samples"),
    (lambda s, lq: s[0][:1], "got (1, 36, 52)"), (lambda s, lq: s[0]+1, "what keep gives must lie in [0, 1]"),
    (lambda s, lq: s.stored[0], "float32"),
    ("best", "keep must be a function (samples, lq) -> picture, or None, got 'best'")])
def test_what_keep_may_give(keep, text):
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        upscale(photo(9, 13)[0], quick, samples=2, keep=keep)


def test_refused():
    x = photo(9, 13)[0]
    for n in (0, -1, 2.5, "2"):
        with pytest.raises(ValueError, match="samples must be a whole number of"): upscale(x, quick, samples=n)
    with pytest.raises(ValueError, match="a seed must lie"): upscale(x, quick, seed=2**63-2, samples=3)
    with pytest.raises(ValueError, match="every sample would be the same"): upscale(x, Still(), samples=2)
    upscale(x, Still())
    check_draws(quick)
    check_draws(network())


def test_file(tmp_path):
    save(tmp_path/"a.png")
    with pytest.raises(ValueError, match="every sample would be the same"):
        upscale_file(tmp_path/"a.png", tmp_path/"b.png", Still(), samples=2)
    assert not (tmp_path/"b.png").exists()
    assert upscale_file(tmp_path/"a.png", tmp_path/"b.png", quick, samples=3, keep=mean) == (52, 36)
    want = upscale(read_image(tmp_path/"a.png"), quick, samples=3, keep=mean)
    assert torch.equal(read_image(tmp_path/"b.png"), want)


# The command

def test_command(box, capsys):
    for i, name in enumerate(("in/a.png", "in/b.png")): save(name, seed=i)
    x = read_image("in/a.png")
    for keep, f in dict(best=best, mean=mean).items():
        assert main(["upscale", "in", "-o", keep, "--samples", "4", "--seed", "2", "--keep", keep]) == 0
        assert sorted(files(keep)) == ["a.png", "b.png"]
        assert torch.equal(read_image(f"{keep}/a.png"), upscale(x, quick, 2, samples=4, keep=f))
    assert main(["upscale", "in", "-o", "usual", "--samples", "4", "--seed", "2"]) == 0
    assert files("usual") == files("best")


def test_all(box, capsys):
    "Each under its seed, as several seeds are; what is there is not made again, and the input is encoded once"
    for i, name in enumerate(("in/a.png", "in/b.png")): save(name, seed=i)
    line = ["upscale", "in", "-o", "all", "--samples", "3", "--seed", "4", "--keep", "all"]
    assert main(line) == 0
    assert sorted(files("all")) == [f"{n}_seed{s}.png" for n in "ab" for s in (4, 5, 6)]
    assert main(["upscale", "in", "-o", "seeds", "--seed", "4,5,6"]) == 0 and files("seeds") == files("all")
    before = files("all")
    Path("all/b_seed5.png").unlink()
    capsys.readouterr()
    assert main(line) == 0
    said = capsys.readouterr().err
    assert "5 done before, such as all/a_seed4.png" in said and "1/1 in/b.png -> all/b_seed5.png" in said
    assert files("all") == before
    Path("all/a_seed4.png").write_bytes(b"mine")
    assert main(line) == 1 and files("all")["a_seed4.png"] == b"mine"


def test_encoded_once(box, monkeypatch):
    p = network()
    monkeypatch.setattr(images, "load_model", lambda *a: p)
    save("a.png")
    for more in (["--keep", "all"], ["--keep", "best"]):
        plan_tiles(p, (9, 13), samples=2) # looks once at what a network takes
        p.encoded = 0
        assert main(["upscale", "a.png", "-o", more[1], "--samples", "5", "--steps", "1", *more]) == 0
        assert p.encoded == 1+2 # the picture, and two seeds of the check that samples differ


def test_what_is_done_stays(box, monkeypatch, capsys):
    "A sample is written as soon as it is made; the next call makes the others"
    save("a.png")
    class Breaks(Quick):
        calls = 0
        def solve(self, *a, **more):
            if a[0].shape[-2:] == (12, 16): Breaks.calls += 1 # other sizes are those of plan and check
            if a[0].shape[-2:] == (12, 16) and Breaks.calls == 3: raise RuntimeError("no power")
            return super().solve(*a, **more)
    monkeypatch.setattr(images, "load_model", lambda *a: Breaks())
    line = ["upscale", "a.png", "-o", "out", "--samples", "4", "--keep", "all"]
    assert main(line) == 1 and sorted(files("out")) == ["a_seed0.png", "a_seed1.png"]
    said = capsys.readouterr().err
    assert "4/4 a.png failed" in said and "1 failed:\na.png: RuntimeError: no power" in said
    assert main(line) == 0 and len(files("out")) == 4


def test_own_keep(box, capsys):
    save("a.png")
    Path("mine.py").write_text("def last(samples, lq): return samples[-1]\n\ndef wrong(samples, lq): return lq\n"
                           "def bug(samples, lq):\n    return {}['weights']\n")
    assert main(["upscale", "a.png", "-o", "b.png", "--samples", "3", "--keep", "mine.py:last"]) == 0
    assert torch.equal(read_image("b.png"), upscale(read_image("a.png"), quick, 2))
    for name, text in (("wrong", " must give one picture of shape (3, 36, 52)"),
                       ("bug", ", bug in mine.py, line 5: KeyError: 'weights'")):
        save("d/b.png")
        save("d/c.png")
        assert main(["upscale", "d", "-o", "e", "--samples", "3", "--keep", f"mine.py:{name}"]) == 2
        err = capsys.readouterr().err # at the first picture, not once for each
        assert err.count(f"--keep mine.py:{name}: keep{text}") == 1, err


def test_mistakes(box, capsys, monkeypatch):
    for name in ("a.png", "b/a_seed1.png", "a_seed0.png"): save(name)
    Path("own.py").write_text("number = 3\n")
    before = files(box)
    for more, text in (
            (["--samples", "0"], "--samples must be at least 1"), (["--samples", "x"], "invalid int"),
            (["--samples", "2", "--seed", "1,2"], "--samples 2 takes one --seed, that of the first sample"),
            (["--samples", "2", "--seed", str(2**63-1)], "--seed and --samples: the last seed must lie below 2**63"),
            (["--keep", "best"], "--keep chooses among samples: say how many by --samples"),
            (["--samples", "2", "--keep", "bset"], "--keep: there is no 'bset'; did you mean 'best'?"),
            (["--samples", "2", "--keep", "own.py"], "--keep own.py: say which function of the file, by own.py:NAME"),
            (["--samples", "2", "--keep", "own.py:f"], "--keep: own.py has no 'f'"),
            (["--samples", "2", "--keep", "own.py:number"], "--keep own.py:number: no function, but 3"),
            (["--samples", "2", "--keep", "none.py:f"], "--keep: no file at none.py"),
            (["--adapter", "a", "--adapter", "b"], "--adapter is given twice, and one adapter is taken")):
        assert main(["upscale", "a.png", "-o", "out", *more]) == 2, more
        assert text in capsys.readouterr().err, more
    assert main(["upscale", "a.png", "-o", ".", "--samples", "2", "--keep", "all"]) == 1 # somebody else's, too small
    assert main(["upscale", "a.png", "a_seed0.png", "-o", ".", "--samples", "2", "--keep", "all"]) == 2
    assert "a_seed0.png is an input" in capsys.readouterr().err
    Path("a_seed1.png").unlink(missing_ok=True)
    monkeypatch.setattr(images, "load_model", lambda *a: Still())
    assert main(["upscale", "a.png", "-o", "out", "--samples", "2"]) == 2
    assert "--samples 2: every sample would be the same" in capsys.readouterr().err
    assert main(["upscale", "a.png", "-o", "out", "--seed", "1,2"]) == 2
    assert "--seed, several: every sample would be the same" in capsys.readouterr().err
    assert files(box) == before


def test_memory_of_samples_is_8_bit():
    "Samples are held as bytes, and made float one at a time"
    seen = []
    def look(samples, lq):
        seen.append([(o.dtype, o.device.type) for o in samples.stored])
        return mean(samples, lq)
    upscale(photo(9, 13)[0], quick, samples=4, keep=look)
    assert seen == [[(torch.uint8, "cpu")]*4]
    assert to_floats(torch.tensor([255], dtype=torch.uint8)) == 1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of a process")
def test_memory_is_what_is_said():
    "Eight samples in a process of their own, whose highest memory so far must be that of the measured run"
    code = """
import torch; torch.set_num_threads(1)
from test_samples import best, images, network, plan_tiles
p, x = network(), torch.rand(3, 400, 400)
def read(): return [int(o.split()[1])*1024 for o in open('/proc/self/status') if o.startswith(('VmHWM', 'VmRSS'))]
images.upscale(x[:, :80, :80], p, tile=64, samples=2, steps=1, say=id)
plan = plan_tiles(p, (400, 400), 128, answer=30+48, samples=8)
highest, before = read()
images.upscale(x, p, tile=128, samples=8, steps=1, say=id)
after, _ = read()
print(highest, before, after, plan.bytes)
"""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)]))
    env["MALLOC_ARENA_MAX"] = "1" # what an allocator keeps for itself differs between runs
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    highest, before, after, said = map(int, run.stdout.split())
    print(highest, before, after, said)
    assert after > highest and .4 < (after-before)/said < 1.1
