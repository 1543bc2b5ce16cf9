"The command and the function against bad input: damaged files, odd arguments, interruptions, every kind of image"
import errno
import io
import os
import re
import struct
import subprocess
import sys
import zlib
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from srnb import images, plan, tiles
from srnb.command import main
from srnb.core import bicubic, generator, quantize
from srnb.files import SAVES
from srnb.colour import Colour
from srnb.images import upscale
from srnb.nets import OneStepConfig, OneStepUNet
from srnb.paths import Shift
from srnb.plan import DoesNotFit
from srnb.policies import PixelCodec, Policy
from srnb.tiles import solve_tiles

FUZZ = dict(deadline=None, derandomize=True, database=None,
            suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


class Quick:
    "Bicubic plus a little noise"
    codec, stride = PixelCodec(), 16
    def solve(self, lq, noise, steps=None): return quantize(self.codec.upsample(lq)+.02*noise)


def network(channels=(16, 16, 16)):
    net, g = OneStepUNet(OneStepConfig(channels, (1, 1, 1), 8, 8)), generator(0)
    with torch.no_grad():
        for p in net.parameters():
            scale = .7*p[0].numel()**-.5 if p.ndim > 1 else .05
            p.copy_(torch.randn(p.shape, generator=g)*scale)
    return Policy(net.eval(), Shift(), Shift(), PixelCodec())


quick = Quick()


def picture(mode="RGB", size=(13, 9), seed=0): # smooth, so that JPEG keeps it
    c, (w, h) = len(Image.new(mode, (1, 1)).getbands()), size
    small = np.random.default_rng(seed).integers(0, 256, (3, 4, c), dtype=np.uint8)
    bands = [Image.fromarray(small[..., i]).resize((w, h), Image.Resampling.BICUBIC) for i in range(c)]
    return bands[0].convert(mode) if c == 1 else Image.merge(mode, bands)


def encoded(im, kind, **kw):
    im.save(b := io.BytesIO(), kind, **kw)
    return b.getvalue()


@pytest.fixture
def loader(monkeypatch): # the stand-in is what every name loads
    monkeypatch.setattr(images, "load_model", lambda *a: quick)


@pytest.fixture
def box(tmp_path, monkeypatch, loader): # an empty working folder
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


# Kinds

@pytest.mark.parametrize("shape", [(9, 13), (9, 13, 1), (9, 13, 3), (9, 13, 4)])
@pytest.mark.parametrize("dtype", ["u1", "u2", ">u2", "f4", "f8"])
def test_arrays(shape, dtype):
    top = {"u1": 255, "f4": 1, "f8": 1}.get(dtype, 65535)
    a = (np.random.default_rng(0).random(shape)*top).astype(dtype)
    before, b = a.copy(), upscale(a, quick)
    assert b.shape == (36, 52, *shape[2:]) and b.dtype == a.dtype and np.array_equal(a, before)
    levels = b.astype("f8")*(255/top)
    assert np.abs(levels-levels.round()).max() < 1e-4 and levels.max() > 150 # 8-bit values, of the right scale
    want = upscale((a/top).astype("f4"), quick)
    assert np.abs(levels-want*255).max() < 1.01
    assert np.array_equal(b, upscale(np.asfortranarray(a), quick))
    assert np.array_equal(b, upscale(a[::-1][::-1], quick))


def test_tensors():
    x = torch.rand(2, 3, 9, 13, generator=generator(0))
    b = upscale(x, quick)
    assert b.shape == (2, 3, 36, 52) and b.dtype == torch.float32 and torch.equal(b, quantize(b))
    assert torch.equal(b[1], upscale(x[1], quick))
    assert torch.equal(b, upscale(x.requires_grad_(), quick)) and not b.requires_grad


@pytest.mark.parametrize("mode", images.PILLOW_MODES)
def test_pillow_modes(mode):
    im = Image.new(mode, (13, 9)) if mode.startswith("I;") or mode == "PA" else picture(mode)
    if mode == "CMYK":
        with pytest.raises(images.Refused, match="CMYK without"): upscale(im, quick)
        im.info["icc_profile"] = cmyk_profile()
    out = upscale(im, quick)
    assert out.mode == images.PILLOW_MODES[mode] and out.size == (52, 36)
    if mode in ("L", "RGB", "LA", "RGBA"):
        small = np.asarray(out.resize((13, 9), Image.Resampling.BOX)).astype(int)
        assert np.abs(small-np.asarray(im)).mean() < 6


def test_transparency():
    for mode, level, want in (("RGB", picture().getpixel((0, 0)), "RGBA"), ("L", 3, "LA"), ("P", 0, "RGBA")):
        im = picture(mode)
        im.info["transparency"] = level
        assert upscale(im, quick).mode == want
    a = np.full((9, 13, 4), 200, np.uint8)
    a[:, 6:] = 0 # invisible black beside 200
    b = upscale(a, Plain())
    assert b[:, :26, :3].min() > 195 and b[:, :20, 3].min() > 190 and b[:, 32:, 3].max() == 0


class Plain(Quick):
    def solve(self, lq, noise, steps=None): return self.codec.upsample(lq)


def test_grey_stays_grey():
    a = np.asarray(picture("L"))
    b, c = upscale(a, Plain()), upscale(np.dstack([a]*3), Plain())
    assert np.array_equal(b, c[..., 0])


def test_sixteen_bits_are_used():
    a = np.linspace(0, 65535, 16*16).reshape(16, 16).astype(np.uint16)
    seen = []
    class Look(Plain):
        def solve(self, lq, noise, steps=None):
            seen.append(lq)
            return super().solve(lq, noise)
    upscale(a, Look())
    grey = seen[-1][0, 0]
    assert len(grey.unique()) == 256 and torch.allclose(grey*65535, torch.tensor(a.astype("f4")), atol=.01)
    im = upscale(Image.fromarray(a), quick)
    assert im.mode == "I;16" and np.asarray(im).max() > 60000


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(tmp_path, orientation):
    from PIL import ImageOps
    im, exif = picture(), Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "maker"
    im.save(tmp_path/"a.png", exif=exif)
    images.upscale_file(tmp_path/"a.png", tmp_path/"b.png", Plain())
    with Image.open(tmp_path/"a.png") as im: want = upscale(ImageOps.exif_transpose(im), Plain())
    with Image.open(tmp_path/"b.png") as out:
        assert np.array_equal(np.asarray(out), np.asarray(want)) and not out.getexif()


@pytest.mark.parametrize("end", SAVES)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_icc_profile_is_kept(tmp_path, end, mode):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture(mode).save(tmp_path/"a.png", icc_profile=icc)
    images.upscale_file(tmp_path/"a.png", tmp_path/f"b{end}", quick)
    with Image.open(tmp_path/f"b{end}") as out:
        assert out.size == (52, 36) and out.info.get("icc_profile") == (None if (end, mode) == (".webp", "L") else icc)
    assert upscale(Image.open(tmp_path/"a.png"), quick).info["icc_profile"] == icc


def cmyk_profile(): # a table of 16 colours: CMYK to Lab, written by hand
    def s15(*v): return b"".join(struct.pack(">i", round(o*65536)) for o in v)
    ramp = bytes(range(256))
    grid = b""
    for i in range(16):
        c, m, y, k = (i >> 3 & 1, i >> 2 & 1, i >> 1 & 1, i & 1)
        light = max(0, 100-30*(c+m+y)-100*k)
        grid += bytes([round(light*2.55), 128-40*c+40*m, 128+40*y-40*c])
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1) + ramp*4 + grid + ramp*3
    text = b"text\0\0\0\0none\0"
    desc = b"desc\0\0\0\0" + struct.pack(">I", 2) + b"x\0" + bytes(78)
    white = b"XYZ \0\0\0\0" + s15(.9642, 1, .8249)
    tags, at, table, data = {b"desc": desc, b"cprt": text, b"wtpt": white, b"A2B0": lut}, 128+4+12*4, b"", b""
    for k, v in tags.items():
        v += bytes(-len(v) % 4)
        table += k + struct.pack(">II", at, len(v))
        data += v
        at += len(v)
    body = struct.pack(">I", 4) + table + data
    head = struct.pack(">I4sI4s4s4s", 128+len(body), b"\0\0\0\0", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp" + bytes(28)
    return head.ljust(68, b"\0") + s15(.9642, 1, .8249) + bytes(48) + body


def test_cmyk(tmp_path):
    im, icc = Image.new("CMYK", (13, 9), (0, 0, 0, 0)), cmyk_profile()
    im.paste((0, 0, 0, 255), (0, 0, 6, 9))
    im.save(tmp_path/"a.jpg", icc_profile=icc, quality=100)
    said = []
    images.upscale_file(tmp_path/"a.jpg", tmp_path/"b.png", Plain(), say=said.append)
    with Image.open(tmp_path/"b.png") as out:
        assert out.mode == "RGB" and "icc_profile" not in out.info and "CMYK" in said[0]
        assert max(out.getpixel((2, 20))) < 40 and min(out.getpixel((50, 20))) > 215
    for bad in ({}, dict(icc_profile=b"damaged")):
        im.save(tmp_path/"c.tif", **bad)
        with pytest.raises(ValueError, match="CMYK with"):
            images.upscale_file(tmp_path/"c.tif", tmp_path/"d.png", quick)
    assert not (tmp_path/"d.png").exists()


def png16(colour, channels, w=5, h=4):
    def chunk(t, d): return struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t+d))
    rows = b"".join(b"\0"+np.arange(w*channels, dtype=">u2").tobytes() for _ in range(h))
    head = struct.pack(">IIBBBBB", w, h, 16, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(w=5, h=4):
    data = np.arange(w*h*3, dtype="<u2").tobytes()
    tags = [(256, 3, 1, w), (257, 3, 1, h), (258, 3, 3, 140-6), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 140),
            (277, 3, 1, 3), (278, 3, 1, h), (279, 4, 1, len(data)), (284, 3, 1, 1)]
    ifd = b"".join(struct.pack("<HHI", t, k, n) + struct.pack("<I", v) for t, k, n, v in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + ifd + bytes(4) + struct.pack("<HHH", 16, 16, 16) + data


@pytest.mark.parametrize("data", [png16(2, 3), png16(4, 2), png16(6, 4), tiff16()])
def test_sixteen_bits_of_colour_are_refused(tmp_path, data):
    with Image.open(io.BytesIO(data)) as im, pytest.raises(ValueError, match="16 bits a channel"): upscale(im, quick)
    (tmp_path/"a.x").write_bytes(data)
    with pytest.raises(ValueError, match="16 bits a channel"): images.open_image(tmp_path/"a.x")


def test_sixteen_bits_of_grey_pass_through_files(tmp_path):
    (tmp_path/"a.png").write_bytes(png16(0, 1))
    for end in (".png", ".tif"):
        said = []
        images.upscale_file(tmp_path/"a.png", tmp_path/f"b{end}", quick, say=said.append)
        with Image.open(tmp_path/f"b{end}") as im: assert im.mode == "I;16"
        assert any("256 levels" in o for o in said)
    with pytest.raises(ValueError, match="no 16-bit grey"):
        images.upscale_file(tmp_path/"a.png", tmp_path/"b.webp", quick)


def test_several_pictures(tmp_path):
    frames = [picture(seed=i) for i in range(3)]
    for end in ("gif", "png", "tif", "webp"):
        frames[0].save(tmp_path/f"a.{end}", save_all=True, append_images=frames[1:])
        with pytest.raises(ValueError, match="holds 3 pictures"): images.open_image(tmp_path/f"a.{end}")
    frames[0].save(tmp_path/"phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    said = []
    images.upscale_file(tmp_path/"phone.jpg", tmp_path/"b.png", quick, say=said.append)
    assert said == ["note: the first of several pictures"]
    frames[0].save(tmp_path/"one.gif")
    images.upscale_file(tmp_path/"one.gif", tmp_path/"c.png", quick)


def test_bombs(tmp_path, monkeypatch):
    picture().save(tmp_path/"a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(ValueError, match="too large"): images.open_image(tmp_path/"a.png")


def test_bad_calls():
    for image, kind, text in (
            (np.zeros((8, 8), bool), TypeError, "must be uint8"), (np.zeros((0, 8)), ValueError, "must have shape"),
            (np.full((8, 8), np.nan), ValueError, "NaN"), (np.full((8, 8, 4), [0, 0, 0, 2.]), ValueError, "alpha"),
            (torch.zeros(8, 8), ValueError, "must have shape"), ([1], TypeError, "got list"),
            (torch.zeros(3, 8, 8).byte(), TypeError, "float32"),
            (Image.new("LAB", (8, 8)), ValueError, "colour mode LAB")):
        with pytest.raises(kind, match=text): upscale(image, quick)
    for bad in (dict(tile=20), dict(overlap=-1), dict(tile=0, overlap=0), dict(seed=-1), dict(colour="x")):
        with pytest.raises(ValueError): upscale(np.zeros((8, 8)), quick, **bad)
    with pytest.raises(ValueError, match="dtype must be one of"): upscale(np.zeros((8, 8)), dtype=torch.float64)


# Tiles

def db(a, b): return -10*torch.log10((a.float()-b.float()).div(255).square().mean()+1e-20).item()


def test_tiles_equal_the_whole():
    p, lq = network(), torch.rand(1, 3, 30, 40, generator=generator(0))
    lq = bicubic(lq, (121, 150))
    whole = solve_tiles(p, lq, 3, 1000)
    noise = tiles.noise_window(3, 0, 0, 4*124, 4*152)
    assert torch.equal(whole, p.solve(tiles.mirror(lq, 4), noise).mul(255).round().byte()[..., :484, :600])
    for tile in (64, 76, 100):
        seen = []
        part = solve_tiles(p, lq, 3, tile, tick=lambda a, b, seen=seen: seen.append((a, b)))
        assert db(part, whole) > 55 and (part.int()-whole.int()).abs().max() <= 4, tile
        assert len(seen) > 1 and seen == [(i+1, len(seen)) for i in range(len(seen))]
    assert db(solve_tiles(p, lq, 4, 64), whole) < 45 # another seed is another image
    assert torch.equal(solve_tiles(p, lq, 3, 64), solve_tiles(p, lq, 3, 64))


def test_every_pixel_of_a_pointwise_policy_is_exact(): # any error of cuts, ramps, bands or noise shows
    class Point(Quick):
        def solve(self, lq, noise, steps=None):
            return quantize(torch.nn.functional.interpolate(lq, scale_factor=4, mode="nearest")*.5 + .1*noise + .2)
    for size in ((1, 1), (8, 8), (65, 64), (130, 67), (200, 331)):
        lq = torch.rand(1, 3, *size, generator=generator(1))
        whole = solve_tiles(Point(), lq, 0, 1000)
        for overlap in (32, 0): assert torch.equal(solve_tiles(Point(), lq, 0, 64, overlap), whole)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (2, 2), (7, 5), (8, 8), (9, 8), (15, 33)])
def test_small_and_odd_sizes(size):
    out = upscale(torch.rand(3, *size, generator=generator(0)), network())
    assert out.shape == (3, 4*size[0], 4*size[1]) and out.isfinite().all()


def test_color_fixes():
    x = bicubic(torch.rand(1, 3, 3, 4, generator=generator(0)), (24, 32))[0]
    class Tint(Plain):
        def solve(self, lq, noise, steps=None): return (self.codec.upsample(lq)*.8).clamp(0, 1)
    y, raw = quick.codec.upsample(x[None])[0], upscale(x, Tint())
    for fix in ("adain", "wavelet"):
        for linear in (False, True):
            far = [(upscale(x, Tint(), colour=Colour(fix, s, linear))-y).abs().mean() for s in (0., .5, 1.)]
            assert far[2] < (.6 if linear else .3)*far[0] and far[2] < far[1] < far[0] # the tint is linear in sRGB
    assert torch.equal(upscale(x, Tint(), colour=Colour("none")), raw)


def test_the_plan_says_what_is_needed(monkeypatch):
    said, lq = [], torch.rand(3, 100, 70)
    upscale(lq, quick, say=said.append)
    assert not said
    upscale(lq, quick, tile=64, say=said.append)
    assert said[0].startswith("70x100 -> 280x400 pixels: 6 tiles of 64, about 0.0") and "left" in said[1]
    need = [tiles.plan_tiles(quick, (1000, 1000), t).bytes for t in (256, 128, 64)]
    assert need == sorted(need, reverse=True)
    for n, tile in zip(need, (256, 128, 64), strict=True):
        monkeypatch.setattr(plan, "free_memory", lambda n=n: int(n/.9)+10)
        assert tiles.plan_tiles(quick, (1000, 1000)).tile == tile
    monkeypatch.setattr(plan, "free_memory", lambda: need[-1])
    with pytest.raises(DoesNotFit, match="1000x1000 pixels need"): tiles.plan_tiles(quick, (1000, 1000))
    with pytest.raises(DoesNotFit, match="take smaller tiles"): tiles.plan_tiles(quick, (1000, 1000), 256)


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's account of a process")
def test_memory_is_about_what_is_said():
    "A process of its own, whose highest memory so far must be that of the measured run"
    code = """
import torch; torch.set_num_threads(1)
from test_upscale import images, network, tiles
p, x = network((32, 32, 32)), torch.rand(3, 400, 400)
def read(): return [int(o.split()[1])*1024 for o in open('/proc/self/status') if o.startswith(('VmHWM', 'VmRSS'))]
images.upscale(x[:, :80, :80], p, tile=64, say=id)
plan = tiles.plan_tiles(p, (400, 400), 256, answer=30)
highest, before = read()
images.upscale(x, p, tile=256, say=id)
after, _ = read()
print(highest, before, after, plan.bytes)
"""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parent), *(p for p in sys.path if p)]))
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    highest, before, after, said = map(int, run.stdout.split())
    assert after > highest and .4 < (after-before)/said < 1.1


# The command

def test_files_folders_patterns(box, capsys):
    (box/"in/deep").mkdir(parents=True)
    for n in ("in/a.png", "in/deep/b.jpg", "in/deep/c[1].webp"): picture().save(n)
    (box/"in/.hidden.png").write_bytes(b"x")
    (box/"in/notes.txt").write_text("x")
    assert main(["upscale", "in", "-o", "out"]) == 0
    assert sorted(files("out")) == ["a.png", "deep/b.png", "deep/c[1].png"]
    said = capsys.readouterr()
    assert said.out == "" and "3/3" in said.err and "s left" in said.err
    assert main(["upscale", "in/**/*.jpg", "in/a.p?g", "-o", "two/x/"]) == 0
    assert sorted(files("two")) == ["x/a.png", "x/deep/b.png"]
    assert main(["upscale", "in/deep/c[1].webp", "-o", "three"]) == 0 and list(files("three")) == ["c[1].png"]
    assert main(["upscale", "in/a.png", "./in/a.png", "-o", "four"]) == 0
    assert main(["upscale", "in/a.png", "-o", "in/up.JPG", "--color-fix", "wavelet", "--seed", "3"]) == 0
    with Image.open("in/up.JPG") as im: assert im.format == "JPEG" and im.size == (52, 36)
    assert main(["upscale", "in", "-o", "in/out"]) == 0 and main(["upscale", "in", "-o", "in/out", "--force"]) == 0
    assert not (box/"in/out/out").exists() # results are no inputs


def test_refused_before_work(box, capsys, monkeypatch):
    monkeypatch.setattr(images, "load_model", lambda *a: pytest.fail("a model was loaded"))
    (box/"in").mkdir()
    (box/"deep").mkdir()
    for n in ("in/a.png", "in/a.jpg", "b.png", "deep/a.png"): picture().save(n)
    before = files(box)
    b = ["b.png", "-o"]
    for argv, text in (
            (["in/a.png", "deep/a.png", "-o", "out"], "both be written"),
            ([*b, "b.png", "--force"], "is an input"), ([*b, ".", "--force"], "is an input"),
            (["in", "-o", "b.png"], "is a file"), (["in", "-o", "new.png"], "looks like a file"),
            ([*b, "b.gif"], "cannot write .gif"), ([*b, "b.png/c/d"], "cannot write in"),
            (["", "-o", "out"], "is empty"), ([*b, ""], "is empty"), ([*b, "a\0"], "null"),
            ([*b, "out", "--tile", "63"], "at least 64"), ([*b, "out", "--seed", "-1"], "seed"),
            ([*b, "out", "--seed", str(2**63)], "seed"), (["b.png"], "required"), ([], "required"),
            ([*b, "out", "--tile", "x"], "invalid int"), ([*b, "out", "--col", "none"], "unrecognized")):
        assert main(["upscale", *argv]) == 2, argv
        assert text in capsys.readouterr().err, argv
    for argv in ([], ["paint"], ["--tile"]): assert main(argv) == 2
    for argv in (["--version"], ["upscale", "-h"], ["-h"]): assert main(argv) == 0
    capsys.readouterr()
    for argv, text in ((["none.png", "-o", "out"], "none.png: no such file"), (["*.gif", "-o", "out"], "no such file"),
                       (["b\0", "-o", "out"], "no such file"), (["x"*5000, "-o", "out"], "no such file")):
        assert main(["upscale", *argv]) == 1 and text in capsys.readouterr().err
    assert files(box) == before and not (box/"out").exists()


def test_unknown_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    for name in ("empty", "bad"): Path(name).mkdir()
    Path("bad/config.json").write_text("[")
    Path("bad/model.safetensors").write_text("[")
    for name in ("nothing", "empty", "a.png", "", "bad", "\0"):
        assert main(["upscale", "a.png", "-o", "out", "--model", name]) == 2
        said = capsys.readouterr().err
        assert "\nsrnb: --model" in said and said.count("\n") == 2
    assert not Path("out").exists()


def test_never_overwrites(box, capsys):
    for i, name in enumerate(("a.png", "b.png")): picture(seed=i).save(name)
    Path("out").mkdir()
    Path("out/a.png").write_bytes(b"mine")
    assert main(["upscale", "a.png", "b.png", "-o", "out"]) == 1
    said = capsys.readouterr().err
    assert "a.png exists and is not the whole result; --force replaces it" in said
    assert files("out")["a.png"] == b"mine" and "b.png" in files("out")
    Path("out/b.png").unlink()
    Path("out/b.png").mkdir()
    assert main(["upscale", "a.png", "b.png", "-o", "out", "--force"]) == 1 # a folder is in the way of one
    assert files("out")["a.png"] != b"mine" and list(files("out")) == ["a.png"]


def test_a_file_that_appears_meanwhile(box, monkeypatch, capsys):
    picture().save("a.png")
    class Late(Quick):
        def solve(self, *a):
            Path("out.png").write_bytes(b"mine")
            return super().solve(*a)
    monkeypatch.setattr(images, "load_model", lambda *a: Late())
    assert main(["upscale", "a.png", "-o", "out.png"]) == 1
    assert files(box)["out.png"] == b"mine" and "exists" in capsys.readouterr().err and len(files(box)) == 2


@pytest.mark.parametrize("error, code", [(RuntimeError("no\nmemory"), 1), (KeyboardInterrupt(), 130),
                                         (MemoryError(), 1), (OSError("x"), 1)])
@pytest.mark.parametrize("where", ["solve", "save"])
def test_nothing_is_left_by_a_failure(box, monkeypatch, capsys, error, code, where):
    for i in range(3): picture(seed=i).save(f"{i}.png")
    calls, real = [], Image.Image.save
    def third(*a):
        calls.append(a)
        if len(calls) == 3: raise error
    class Dies(Quick):
        def solve(self, *a):
            if where == "solve" and a[0].shape[-1] != 32 and a[0].shape[-1] != 64: third()
            return super().solve(*a)
    def save(self, path, *a, **k):
        if where == "save":
            Path(path).write_bytes(b"half")
            third()
        return real(self, path, *a, **k)
    monkeypatch.setattr(Image.Image, "save", save)
    monkeypatch.setattr(images, "load_model", lambda *a: Dies())
    assert main(["upscale", "0.png", "1.png", "2.png", "-o", "out"]) == code
    assert sorted(files("out")) == ["0.png", "1.png"]
    said = capsys.readouterr().err
    assert "Traceback" not in said and ("2.png: " in said.splitlines()[-1] if code == 1 else "interrupted" in said)


def test_disk_full(box, monkeypatch, capsys):
    picture().save("a.png")
    def full(self, path, *a, **k):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(Image.Image, "save", full)
    assert main(["upscale", "a.png", "-o", "out"]) == 1
    assert f"cannot write {Path('out/a.png')}: No space left on device" in capsys.readouterr().err and not files("out")


def test_unwritable_folder(box, monkeypatch, capsys):
    picture().save("a.png")
    Path("out").mkdir()
    monkeypatch.setattr(os, "access", lambda p, mode: False) # a test may run as root, whom no mode stops
    assert main(["upscale", "a.png", "-o", "out/new"]) == 2 and "cannot write in out" in capsys.readouterr().err


def test_odd_names_stay_one_line(box, capsys):
    name = "a\n\x1b[31m\udcff.png"
    picture().save(name)
    assert main(["upscale", name, "-o", "out"]) == 0
    said = capsys.readouterr().err
    assert said.count("\n") == 2 and "\x1b" not in said and r"a\n\x1b[31m\udcff.png" in said


def test_no_one_listens(box, monkeypatch):
    class Broken(io.StringIO):
        def write(self, text): raise BrokenPipeError
    picture().save("a.png")
    monkeypatch.setattr(sys, "stderr", Broken())
    assert main(["upscale", "a.png", "-o", "out"]) == 0


def test_works_without_pyiqa(tmp_path, tiny, clean_env, root):
    picture().save(tmp_path/"a.png")
    code = """
import sys
class Block:
    def find_spec(self, name, *a):
        gone = ("pyiqa", "lpips", "stlpips_pytorch", "pycvvdp", "cvvdp", "matplotlib")
        if name.split(".")[0] in gone: raise ImportError(name)
sys.meta_path.insert(0, Block())
from srnb.command import main
sys.exit(main())
"""
    argv = ["upscale", tmp_path/"a.png", "-o", tmp_path/"out", "--model", tiny]
    run = subprocess.run([sys.executable, "-c", code, *argv], env=clean_env, cwd=root, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert list(files(tmp_path/"out")) == ["a.png"] and run.stdout == "" and "\n1/1" in run.stderr


# Fuzz

KINDS = [encoded(picture(m), k, **kw) for m, k, kw in (
    ("RGB", "PNG", {}), ("RGBA", "PNG", {}), ("L", "PNG", {}), ("P", "PNG", {}), ("1", "PNG", {}), ("RGB", "JPEG", {}),
    ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("CMYK", "JPEG", dict(icc_profile=cmyk_profile())), ("RGB", "WEBP", {}),
    ("RGBA", "WEBP", dict(lossless=True)), ("RGB", "TIFF", {}), ("L", "TIFF", dict(compression="tiff_lzw")),
    ("RGB", "TIFF", dict(compression="jpeg")), ("P", "GIF", {}),
    ("RGB", "GIF", dict(save_all=True, append_images=[picture()])), ("RGB", "BMP", {}), ("RGB", "MPO", {}),
    ("RGB", "PPM", {}), ("RGB", "AVIF", {}), ("RGB", "JPEG2000", {}), ("L", "JPEG2000", {}))]
KINDS += [png16(0, 1), png16(2, 3), tiff16()]
with_exif = Image.Exif()
with_exif[0x0112] = 6
KINDS += [encoded(picture(), k, exif=with_exif) for k in ("JPEG", "PNG", "WEBP")]


JUNK = (b"\xff"*4, b"\0"*4, b"\x7f\xff\xff\xff", b"\0\0\xff\xff")


@st.composite
def damaged(draw): # a sound file of some kind, then cut, changed, or with a part twice
    data = bytearray(draw(st.sampled_from(KINDS)))
    for how in draw(st.lists(st.sampled_from(("cut", "byte", "byte", "byte", "twice", "word")), max_size=4)):
        at = draw(st.integers(0, max(len(data)-1, 0)))
        if how == "cut": del data[at:]
        elif how == "byte" and data: data[at] = draw(st.integers(0, 255))
        elif how == "twice": data[at:at] = data[at:at+40]
        elif how == "word": data[at:at+4] = draw(st.sampled_from(JUNK))
    return bytes(data)


def guarded(folder, argv, inputs, capsys): # what holds whatever was given
    before = {p: p.read_bytes() for p in inputs} # --force may replace a file that is no input of this run
    code = main(argv)
    said = capsys.readouterr()
    assert code in (0, 1, 2) and "Traceback" not in said.err+said.out
    assert not [p for p in Path(folder).rglob("*") if p.name.startswith(".part-")]
    assert "--force" in argv or all(p.read_bytes() == b for p, b in before.items())
    for p in Path(folder).rglob("*"):
        if p.suffix in SAVES and p not in before and p.is_file():
            with Image.open(p) as im: im.load()
    return code, said.err


WHY = ("damaged image|not an image of a kind|holds \\d+ pictures|colour mode|16 bits a channel|16-bit grey|CMYK with|"
       "too large|pixels need|bits a channel|the file is empty|package more")


@settings(max_examples=600, **FUZZ)
@given(data=st.one_of(damaged(), st.binary(max_size=200)))
def test_fuzz_of_image_bytes(data, loader, capsys, monkeypatch):
    monkeypatch.setattr(plan, "free_memory", lambda: 10**8) # so that a header that lies about its size costs nothing
    with TemporaryDirectory() as folder:
        source, target = Path(folder)/"a.img", Path(folder)/"out.png"
        source.write_bytes(data)
        code, said = guarded(folder, ["upscale", str(source), "-o", str(target)], [source], capsys)
        assert (code == 0) == target.exists() and (code == 0 or re.search(WHY, said)), said


@settings(max_examples=100, **FUZZ)
@given(mode=st.sampled_from(sorted(images.PILLOW_MODES)+["HSV", "YCbCr", "LAB", "I", "F"]), w=st.integers(1, 70),
       h=st.integers(1, 70), end=st.sampled_from([".png", ".tif", ".webp", ".jpg", ".gif", ".bmp"]),
       out=st.sampled_from([*SAVES, "", ".gif"]), tile=st.sampled_from([None, 64, 66]))
def test_fuzz_of_modes_and_sizes(mode, w, h, end, out, tile, loader, capsys):
    with TemporaryDirectory() as folder:
        source = Path(folder)/f"in{end}"
        try: Image.new(mode, (w, h)).save(source)
        except (OSError, ValueError, KeyError): return # Pillow writes no such file
        argv = ["upscale", str(source), "-o", f"{folder}/out{out}", *(["--tile", str(tile)] if tile else [])]
        if guarded(folder, argv, [source], capsys)[0] == 0:
            (made,) = (p for p in Path(folder).rglob("*") if p.is_file() and p != source)
            with Image.open(made) as im: assert im.size == (4*w, 4*h)


OPTIONS = ["upscale", "-o", "--out", "--out=o", "--model", "--model=x", "--tile", "--tile=64", "--tile=-1", "--seed",
           "--seed=7", "--color-fix", "--color-fix=adain", "--dtype", "auto", "none", "bfloat16", "--force", "--", "-",
           "-h", "--version"]
NAMES = ["a.png", "b.jpg", "bad.png", "in", "in/c.png", "*.png", "in/*", "**", "[", "out", "out.png", "out.webp",
         "out/", "0", "64", "1e9", "9"*30, "", " ", ".", "a.png/x", "@a.png"]
words, names = st.sampled_from(OPTIONS+NAMES), st.sampled_from(NAMES)
TEXT = st.text(st.characters(exclude_characters="/.~", exclude_categories=["Cs"]), max_size=8) # stays in the folder


@settings(max_examples=300, **FUZZ)
@given(argv=st.one_of(st.lists(st.one_of(words, TEXT), max_size=8),
                      st.builds(lambda ins, out, more: ["upscale", *ins, "-o", out, *more],
                                st.lists(names, min_size=1, max_size=3), names, st.lists(words, max_size=3))))
def test_fuzz_of_arguments(argv, loader, capsys):
    with TemporaryDirectory() as folder, chdir(folder):
        Path("in").mkdir()
        sources = [Path(folder)/n for n in ("a.png", "b.jpg", "in/c.png")]
        for p in sources: picture().save(p)
        (bad := Path(folder)/"bad.png").write_bytes(b"\x89PNG")
        guarded(folder, argv, [*sources, bad], capsys)


# What a reviewer found

def test_gif_in_a_folder(box):
    (box/"in").mkdir()
    picture("L").save(box/"in"/"a.gif")
    assert main(["upscale", "in", "-o", "out"]) == 0 and (box/"out"/"a.png").exists()


def test_terminated(box, monkeypatch):
    "SIGTERM while a file is written: nothing half written stays"
    import signal
    picture().save(box/"a.png")

    def save(self, *a, **k): os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(Image.Image, "save", save)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["upscale", "a.png", "-o", "out"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before and [p.name for p in box.rglob("*") if p.is_file()] == ["a.png"]


def test_rights_of_files(box):
    "The user's umask holds, and a replaced file keeps its rights"
    picture().save(box/"a.png")
    old = os.umask(0o077)
    try:
        assert main(["upscale", "a.png", "-o", "b.png"]) == 0 and (box/"b.png").stat().st_mode & 0o777 == 0o600
        os.umask(0o022)
        assert main(["upscale", "a.png", "-o", "b.png", "--force"]) == 0
        assert (box/"b.png").stat().st_mode & 0o777 == 0o600
        assert main(["upscale", "a.png", "-o", "c.png"]) == 0 and (box/"c.png").stat().st_mode & 0o777 == 0o644
    finally: os.umask(old)


def test_an_answer_that_is_no_number(box, monkeypatch, capsys):
    class Nan(Quick):
        def solve(self, lq, noise, steps=None): return torch.full(noise.shape, float("nan"))
    monkeypatch.setattr(images, "load_model", lambda *a: Nan())
    picture().save(box/"a.png")
    assert main(["upscale", "a.png", "-o", "b.png"]) == 1
    assert "not finite" in capsys.readouterr().err and not (box/"b.png").exists()


def test_dropout_is_off():
    "The same seed gives the same image though the network was left in train mode"
    policy = network()
    policy.net.drop = torch.nn.Dropout(.5)
    features = policy.net.features
    policy.net.features = lambda *a: policy.net.drop(features(*a))
    policy.net.train()
    image = np.asarray(picture())
    assert (upscale(image, policy) == upscale(image, policy)).all() and policy.net.training


# What a folder holds

def said_of(capsys, *argv): # exit code and lines
    code = main(["upscale", *map(str, argv)])
    return code, capsys.readouterr().err.splitlines()


def test_pictures_that_are_not_read_are_named(box, capsys):
    (box/"in/deep").mkdir(parents=True)
    picture().save("in/a.png")
    for name in ("phone.heic", "new.jxl", "raw.NEF", "layers.psd", "empty.png", "deep/cut.jpg"):
        Path("in", name).write_bytes(b"" if "empty" in name else b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"+bytes(99))
    for name in ("Thumbs.db", "notes.txt", ".hidden.png", "._mac.png"): Path("in", name).write_text("x")
    Path("in/gone.png").symlink_to("nowhere.png")
    Path("in/disk").symlink_to("/not/mounted")
    code, said = said_of(capsys, "in", "-o", "out")
    assert code == 1 and list(files("out")) == ["a.png"] and "8 failed:" in said
    for name in ("phone.heic", "new.jxl", "raw.NEF", "layers.psd", "empty.png", "deep/cut.jpg", "gone.png", "disk"):
        assert sum(o.startswith(f"in/{name}: ") for o in said) == 1, name
    assert "in: passed over 2 files without a picture's ending (.db, .txt)" in said
    text = "\n".join(said)
    assert "the file is empty" in text and "nowhere.png, which is not there" in text and "pillow-heif" in text
    assert "a .nef file, which is not read here" in text and "hidden" not in text and "_mac" not in text
    Path("none").mkdir()
    Path("none/notes.txt").write_text("x")
    assert said_of(capsys, "none", "-o", "out")[0] == 1 # nothing was meant, or all of it is missing
    for name in ("raw.NEF", "layers.psd"): # though some of them begin as a TIFF does
        picture().save(f"in/{name}", "TIFF")
        assert said_of(capsys, f"in/{name}", "-o", "x.png")[0] == 1 and not Path("x.png").exists()


def test_a_folder_that_cannot_be_listed(box, capsys, monkeypatch):
    (box/"in/shut").mkdir(parents=True)
    picture().save("in/a.png")
    real = os.listdir
    def listdir(path):
        if os.path.basename(os.fspath(path)) == "shut": raise PermissionError(errno.EACCES, "Permission denied")
        return real(path)
    monkeypatch.setattr(os, "listdir", listdir)
    code, said = said_of(capsys, "in", "-o", "out")
    assert code == 1 and list(files("out")) == ["a.png"] and any(o.startswith("in/shut: ") for o in said)


def test_linked_folders(box):
    "They are searched, each as often as it is linked; a link into its own surroundings ends the way"
    for name in ("in/a", "in/b", "elsewhere"): (box/name).mkdir(parents=True)
    picture().save("elsewhere/x.png")
    for link, to in (("in/one", "../elsewhere"), ("in/two", "../elsewhere"), ("in/loop", "."), ("in/a/up", ".."),
                     ("in/a/over", "../b"), ("in/b/back", "../a")): Path(link).symlink_to(to)
    picture().save("in/a/y.png")
    assert main(["upscale", "in", "-o", "out"]) == 0
    assert sorted(files("out")) == ["a/y.png", "b/back/y.png", "one/x.png", "two/x.png"]


def test_patterns_take_folders_and_links_too(box, capsys):
    (box/"in/deep").mkdir(parents=True)
    for name in ("in/a.png", "in/deep/b.png"): picture().save(name)
    Path("in/gone.png").symlink_to("nowhere.png")
    code, said = said_of(capsys, "in/*", "-o", "in/out")
    assert code == 1 and sorted(files("in/out")) == ["a.png", "deep/b.png"] and said[-1].startswith("in/gone.png: ")
    Path("in/gone.png").unlink()
    assert said_of(capsys, "in/*", "in/**/*.png", "-o", "in/out", "--force")[0] == 0 # what it wrote is no input
    assert sorted(files("in/out")) == ["a.png", "deep/b.png"]


@pytest.mark.parametrize("kind, end", [("AVIF", ".avif"), ("JPEG2000", ".jp2"), ("TGA", ".tga"), ("PPM", ".ppm"),
                                       ("PPM", ".pgm"), ("JPEG", ".jpg")])
def test_other_kinds_are_read(box, kind, end):
    (box/"in").mkdir()
    im = picture("L" if end == ".pgm" else "RGB", (40, 30))
    im.save(f"in/a{end}", kind)
    assert main(["upscale", "in", "-o", "out"]) == 0
    with Image.open("out/a.png") as out:
        assert out.size == (160, 120) and out.mode == im.mode
        assert np.abs(np.asarray(out.resize((40, 30), Image.Resampling.BOX)).astype(int)-np.asarray(im)).mean() < 6
    with Image.open(f"in/a{end}") as im:
        im.load() # closes the file
        assert upscale(im, quick).size == (160, 120)


def test_a_file_is_a_tga_only_by_its_name(box, capsys):
    picture().save("a.tga") # nothing in its first bytes says what it is
    Path("a.png").write_bytes(Path("a.tga").read_bytes())
    assert said_of(capsys, "a.png", "-o", "out")[0] == 1 and said_of(capsys, "a.tga", "-o", "out")[0] == 0


def deep_files(): # more than 8 bits a channel in colour, of which Pillow keeps 8
    jp2 = bytearray(encoded(picture(), "JPEG2000"))
    size = jp2.index(b"\xff\x4f\xff\x51")
    jp2[size+42:size+51:3] = b"\x0f"*3 # Ssiz: bits less one
    yield from ((".jp2", bytes(jp2)), (".j2k", bytes(jp2[size:])))
    yield from ((".ppm", b"P6 2 2 65535\n"+bytes(24)), (".ppm", b"P3 1 1 1023\n1000 1000 1000\n"))


@pytest.mark.parametrize("end, data", [*deep_files()], ids=["jp2", "j2k", "ppm", "plain"])
def test_deep_colour_of_other_kinds_is_refused(tmp_path, end, data):
    (tmp_path/f"a{end}").write_bytes(data)
    with pytest.raises(images.Refused, match="bits a channel in colour"): images.open_image(tmp_path/f"a{end}")


def test_depth_of_avif():
    data = encoded(picture(), "AVIF")
    with Image.open(io.BytesIO(data)) as im:
        assert images.bits_of(im) == 8
        at = data.index(b"av1C")+6
        im.fp = io.BytesIO(data[:at]+bytes([data[at] | 0x40])+data[at+1:]) # high_bitdepth
        with pytest.raises(images.Refused, match="bits a channel in colour"): images.check_pillow(im)


def test_the_refusal_says_what_the_picture_is(tmp_path):
    for colour, channels, text in ((2, 3, "in colour"), (4, 2, "in grey with alpha"), (6, 4, "in colour")):
        (tmp_path/"a.png").write_bytes(png16(colour, channels))
        with pytest.raises(images.Refused, match=f"16 bits a channel {text}"): images.open_image(tmp_path/"a.png")
    head = struct.pack("<IHHIIiiHHIIiiII", 70, 0, 0, 66, 40, 4, 4, 1, 16, 3, 32, 0, 0, 0, 0)
    masks = struct.pack("<III", 0xf800, 0x7e0, 0x1f)
    (tmp_path/"a.bmp").write_bytes(b"BM"+head+masks+bytes(range(32))) # 5, 6 and 5 bits
    images.open_image(tmp_path/"a.bmp").load()


def jxl(depth, animated=False): # the first bytes of a codestream of 8 by 8 pixels
    bits, at = 0, 0
    extra = [(1, 1), (0, 3), (0, 1), (0, 1), (1, 1)] if animated else [(0, 1)]
    sample = [(0, 1), {8: (0, 2), 10: (1, 2), 12: (2, 2)}.get(depth, (3, 2))] + [(depth-1, 6)]*(depth == 16)
    for value, n in [(1, 1), (0, 5), (1, 3), (0, 1), *extra, *sample]:
        bits |= value << at
        at += n
    return b"\xff\x0a" + bits.to_bytes(20, "little")


@pytest.mark.parametrize("wrap", [b"", b"\0\0\0\x0cJXL \r\n\x87\n"+bytes(30)+b"jxlc",
                                  b"\0\0\0\x0cJXL \r\n\x87\n"+bytes(30)+b"jxlp\0\0\0\0"],
                         ids=["bare", "box", "parts"])
def test_depth_of_jpeg_xl(wrap):
    for depth in (8, 10, 12, 16): assert images.jxl_form(wrap+jxl(depth)) == (depth, False)
    assert images.jxl_form(wrap+jxl(8, True)) == (8, True)
    assert images.jxl_form(b"\xff\x0a"+bytes([0b1000000, 0b1010])) # all default


def test_plugins_are_used_where_they_are(box, monkeypatch, capsys):
    "A HEIC file asks for its package; once that has registered itself, files are read, whatever they are called"
    import types
    seen = []
    def factory(fp, name):
        im = picture()
        im.format, im.info["bit_depth"], im.fp = "HEIF", seen[-1], None
        return im
    def register():
        Image.register_open("HEIF", factory, lambda head: head[4:12] == b"ftypheic")
        monkeypatch.setitem(Image.OPEN, "HEIF", Image.OPEN["HEIF"])
    head = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"+bytes(99)
    for name in ("a.heic", "b.jpg"): Path(name).write_bytes(head)
    Path("c.jxl").write_bytes(jxl(8))
    monkeypatch.setitem(sys.modules, "pillow_heif", None) # not installed
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    code, said = said_of(capsys, "a.heic", "b.jpg", "c.jxl", "-o", "out")
    assert code == 1 and [o.partition(":")[0] for o in said[-3:]] == ["a.heic", "b.jpg", "c.jxl"]
    assert "pip install pillow-heif" in said[-2] and "pip install pillow-jxl-plugin" in said[-1]
    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    seen.append(8)
    assert said_of(capsys, "a.heic", "b.jpg", "-o", "out")[0] == 0 and sorted(files("out")) == ["a.png", "b.png"]
    seen.append(10)
    code, said = said_of(capsys, "a.heic", "-o", "deep")
    assert code == 1 and "10 bits a channel in colour" in said[-1]
    Image.OPEN.pop("HEIF")
    if "HEIF" in Image.ID: Image.ID.remove("HEIF")


# Names of what is written

def test_equal_stems_keep_their_endings(box, capsys):
    (box/"in").mkdir()
    for name in ("in/a.jpg", "in/a.png", "in/b.png"): picture().save(name)
    assert said_of(capsys, "in", "-o", "out")[0] == 0
    assert sorted(files("out")) == ["a.jpg.png", "a.png.png", "b.png"]
    assert said_of(capsys, "in", "-o", "two", "--seed", "1,2")[0] == 0 and "a.jpg_seed2.png" in files("two")
    (box/"same").mkdir()
    picture().save("same/a.jpg")
    assert said_of(capsys, "same", "-o", "same")[0] == 0 and sorted(files("same")) == ["a.jpg", "a.png"]
    code, said = said_of(capsys, "same", "-o", "same") # what it wrote is no second picture
    assert code == 2 and "same/a.png is an input" in said[-1]
    picture().save("in/a.jpg.webp")
    picture().save("in/b.jpg.webp")
    for name in ("in/b.jpg", "a.png", "b.png"): picture().save(name)
    code, said = said_of(capsys, "in", "a.png", "-o", "three")
    assert code == 2 and "in/a.jpg and in/a.jpg.webp would both be written to three/a.jpg.png" in said[-1]
    assert "in/b.jpg and in/b.jpg.webp" in said[-1] and "in/a.png and a.png would both" in said[-1]
    assert not Path("three").exists()


def test_results_beside_their_folder(box, capsys):
    (box/"photos/2020").mkdir(parents=True)
    picture().save("photos/2020/a.jpg")
    assert said_of(capsys, "photos/2020", "-o", "photos")[0] == 0 and sorted(files("photos")) == ["2020/a.jpg", "a.png"]
    code, said = said_of(capsys, "none.png", "-o", "x.png")
    assert code == 1 and said[-1] == "none.png: no such file or folder"


def test_a_folder_with_a_dot(box, capsys):
    picture().save("a.png")
    assert said_of(capsys, "a.png", "-o", "v1.5")[0] == 0 and list(files("v1.5")) == ["a.png"]
    for out in ("b.gif", "b.bmp", "b.HEIC"): assert said_of(capsys, "a.png", "-o", out)[0] == 2, out
    picture().save("b.png")
    assert said_of(capsys, "a.png", "b.png", "-o", "new.gif")[0] == 2


# Going on

def test_going_on(box, capsys):
    (box/"in/deep").mkdir(parents=True)
    for i, name in enumerate(("in/a.png", "in/b.jpg", "in/deep/c.png")): picture(seed=i).save(name)
    assert said_of(capsys, "in/b.jpg", "-o", "out")[0] == 0
    before = files("out")["b.png"]
    code, said = said_of(capsys, "in", "-o", "out") # the same line again goes on
    assert code == 0 and "1 done before, such as out/b.png; --force makes them anew, which another model or other " \
        "options need" in said
    assert sorted(files("out")) == ["a.png", "b.png", "deep/c.png"]
    for skip in ([], ["--skip"]): # done, and no failure
        code, said = said_of(capsys, "in", "-o", "out", *skip)
        assert code == 0 and said[-1].startswith("3 done before") and files("out")["b.png"] == before
    code, said = said_of(capsys, "in/a.png", "-o", "out") # one picture was asked for, and nothing was done
    assert code == 1 and said[-1] == "in/a.png: out/a.png exists already; --skip leaves it, --force replaces it"
    assert said_of(capsys, "in/a.png", "-o", "out", "--skip")[0] == 0
    Path("out/a.png").write_bytes(Path("out/a.png").read_bytes()[:-40]) # somebody else's, or a broken disk's
    picture().save("out/b.png")
    code, said = said_of(capsys, "in", "-o", "out", "--skip")
    assert code == 1 and "2 failed:" in said and all("is not the whole result" in o for o in said[-2:])
    assert said_of(capsys, "in", "-o", "out", "--skip", "--force")[0] == 2
    assert said_of(capsys, "in/a.png", "-o", "o.png")[0] == 0
    assert said_of(capsys, "in/a.png", "-o", "o.png", "--skip", "--seed", "0")[0] == 0


def test_turned_pictures_are_whole(box, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(size=(40, 30)).save("a.jpg", exif=exif)
    for code in (0, 0): assert said_of(capsys, "a.jpg", "-o", "out", "--skip")[0] == code


def test_what_the_dead_left_is_taken_away(box, capsys):
    from srnb.core import part_start
    (box/"in").mkdir()
    (box/"out").mkdir()
    picture().save("in/a.png")
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    dead, alive = (Path(f"out/{part_start()}{o}-x.png") for o in (int(child.stdout), os.getppid()))
    other = [Path("out/.part-otherhost-1-x.png"), Path("out/.part-x.png"), Path("out/.parted")]
    for p in (dead, alive, *other): p.write_bytes(b"half")
    assert said_of(capsys, "in", "-o", "out")[0] == 0
    assert not dead.exists() and alive.exists() and all(p.exists() for p in other)


# What is said

def test_loading_is_said_and_not_timed(box, monkeypatch, capsys):
    for i, size in enumerate(((8, 8), (8, 8), (200, 200))): picture(size=size).save(f"{i}.png")
    clock = [0.]
    class Warms(Quick):
        def solve(self, lq, noise, steps=None):
            clock[0] += 2. if clock[0] else 100. # the first call of a process takes long
            return super().solve(lq, noise)
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    monkeypatch.setattr(images, "load_model", lambda *a: Warms())
    code, said = said_of(capsys, "0.png", "1.png", "2.png", "-o", "out", "--model", "small")
    assert code == 0 and said[0].startswith("srnb upscale: loading") and "left" not in said[1]
    assert "about 20 s left" in said[2], said # 2 s for what counts as 64x64 pixels


def test_dpi_and_profile(box, capsys):
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for end in (".png", ".jpg", ".tif"):
        picture().save(f"a{end}", dpi=(300, 150), icc_profile=icc)
        assert said_of(capsys, f"a{end}", "-o", f"b{end}")[0] == 0
        with Image.open(f"b{end}") as im:
            assert np.allclose([float(o) for o in im.info["dpi"]], (300, 150), atol=.1) and im.info["icc_profile"]
    code, said = said_of(capsys, "a.png", "-o", "b.webp")
    assert code == 0 and any("WebP holds no dots per inch" in o for o in said)
    picture("L").save("grey.png", icc_profile=icc)
    code, said = said_of(capsys, "grey.png", "-o", "c.webp")
    assert code == 0 and any("profile is left out" in o for o in said)
    for i, bad in enumerate((b"garbage"*20, lab)):
        picture().save(f"bad{i}.png", icc_profile=bad)
        code, said = said_of(capsys, f"bad{i}.png", "-o", "out")
        assert code == 0 and any("note:" in o and "profile is left out" in o for o in said)
        with Image.open(f"out/bad{i}.png") as im: assert "icc_profile" not in im.info
    exif = Image.Exif()
    exif[0x0112] = 6 # lies on its side
    picture().save("turned.png", dpi=(300, 150), exif=exif)
    assert said_of(capsys, "turned.png", "-o", "out")[0] == 0
    with Image.open("out/turned.png") as im: assert np.allclose(im.info["dpi"], (150, 300), atol=.1)
    picture().save("odd.tif", dpi=(1e-9, 4e9))
    assert said_of(capsys, "odd.tif", "-o", "odd.jpg")[0] == 0


@pytest.mark.parametrize("kind", ["BMP", "TGA"])
def test_alpha_that_hides_everything(box, capsys, kind):
    "In these formats the fourth byte is often padding; in a PNG it is meant"
    im = picture("RGB", (4, 2))
    im.putalpha(0)
    im.save("b.png")
    if kind == "TGA": im.save("a.tga")
    else: # Pillow writes no such header
        masks = struct.pack("<IIII", 0xff0000, 0xff00, 0xff, 0xff000000)
        head = struct.pack("<IiiHHIIiiII", 108, 4, 2, 1, 32, 3, 32, 0, 0, 0, 0) + masks + b"BGRs" + bytes(48)
        Path("a.bmp").write_bytes(b"BM" + struct.pack("<IHHI", 154, 0, 0, 122) + head + bytes((1, 2, 3, 0))*8)
    code, said = said_of(capsys, f"a.{kind.lower()}", "-o", "out")
    assert code == 0 and any("note:" in o and "alpha" in o for o in said)
    with Image.open("out/a.png") as out: assert out.mode == "RGB"
    assert said_of(capsys, "b.png", "-o", "out")[0] == 0
    with Image.open("out/b.png") as out: assert out.mode == "RGBA"
