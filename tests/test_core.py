"Image files of every kind, and records that a crash or a full disk leaves whole"
import errno
import json
import os
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from srnb import core
from srnb.core import check_close, generator, open_run, read_image, write_image, write_json, write_table


def png16(path, rgb):
    "A 16-bit RGB PNG, which Pillow reads as 8 bit without a word"
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rgb)
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", rgb.shape[1], rgb.shape[0], 16, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.fixture
def rgb(): return torch.randint(0, 256, (9, 7, 3), generator=generator(0), dtype=torch.uint8).numpy()


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "RGBA", "LA"])
def test_readable(tmp_path, rgb, mode):
    "Grey is repeated, a palette is looked up, an opaque alpha channel is dropped"
    im = Image.fromarray(rgb).convert(mode)
    im.save(tmp_path/"x.png")
    want = torch.from_numpy(np.array(im.convert("RGB"))).permute(2, 0, 1)/255
    check_close(read_image(tmp_path/"x.png"), want, atol=1e-7)


def test_orientation_tag(tmp_path, rgb):
    im, exif = Image.fromarray(rgb), Image.Exif()
    exif[274] = 6 # rotate by 90 degrees
    im.save(tmp_path/"x.png", exif=exif)
    assert read_image(tmp_path/"x.png").shape == (3, 7, 9)


def test_refused(tmp_path, rgb):
    alpha = np.concatenate([rgb, np.full((9, 7, 1), 254, np.uint8)], 2)
    Image.fromarray(alpha).save(tmp_path/"alpha.png")
    Image.fromarray((rgb[..., 0].astype(np.uint16)*257)).save(tmp_path/"grey16.png")
    png16(tmp_path/"rgb16.png", rgb.astype(np.uint16)*257)
    Image.fromarray(rgb).convert("CMYK").save(tmp_path/"cmyk.jpg")
    Image.fromarray(np.tile(rgb, (20, 20, 1))).save(tmp_path/"whole.jpg")
    (tmp_path/"cut.jpg").write_bytes((tmp_path/"whole.jpg").read_bytes()[:2000])
    (tmp_path/"empty.png").write_bytes(b"")
    for name, message in (("alpha.png", "flatten"), ("grey16.png", "8-bit"), ("rgb16.png", "8-bit"),
                          ("cmyk.jpg", "CMYK"), ("cut.jpg", "truncated"), ("empty.png", "not an image")):
        with pytest.raises(ValueError, match=f"{name}.*{message}"): read_image(tmp_path/name)
    with pytest.raises(FileNotFoundError, match="nowhere.png"): read_image(tmp_path/"nowhere.png")
    with pytest.raises(ValueError, match="png"): write_image(tmp_path/"x.jpg", torch.zeros(3, 2, 2))


def write_2_json(path): write_json(path, dict(a=2))
def write_2_table(path): write_table(path, pd.DataFrame(dict(a=[2])))


@pytest.mark.parametrize("write", [write_2_json, write_2_table], ids=["json", "table"])
def test_full_disk(tmp_path, monkeypatch, write):
    "What stood there before still stands, and nothing half written stays"
    path = tmp_path/"x"
    path.write_text("before")
    def full(*a): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"): write(path)
    assert path.read_text() == "before" and [o.name for o in tmp_path.iterdir()] == ["x"]


def test_moved_run(tmp_path):
    "A run folder may be moved; its config decides, not its place"
    open_run(tmp_path/"a", dict(kappa=1.))
    (tmp_path/"a").rename(tmp_path/"b")
    open_run(tmp_path/"b", dict(kappa=1.))
    assert json.loads((tmp_path/"b"/"config.json").read_text())["params"] == dict(kappa=1.)


@pytest.fixture
def clock(monkeypatch):
    "Seconds, which the test advances by hand"
    now = [100.]
    monkeypatch.setattr(core, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_progress(clock, capsys):
    "A line at least five seconds after the last, and one at the end; what an earlier run did takes no time"
    def seen(seconds, **kw):
        for k, _ in enumerate(core.progress(range(len(seconds)), "steps", **kw)): clock[0] += seconds[k]
        return capsys.readouterr().out.splitlines()
    assert seen([3]*5) == ["steps: 2/5, 6 s, 9 s left", "steps: 4/5, 12 s, 3 s left", "steps: 5/5, 15 s, 0 s left"]
    assert seen([1]*4) == [] and seen([0]*0) == []
    assert seen([1]*2, every=0.) == ["steps: 1/2, 1 s, 1 s left", "steps: 2/2, 2 s, 0 s left"]
    assert seen([8, 1], start=2, total=4, note=lambda: "loss 1") == ["steps: 3/4, 8 s, 8 s left loss 1",
                                                                     "steps: 4/4, 9 s, 0 s left loss 1"]


def test_clock(clock):
    "At once after the first of several, not of one; at any pace of its caller; through any channel"
    def said(calls, total, **kw):
        lines = []
        tick = core.Clock("tiles", lines.append, **kw)
        for seconds, done in calls:
            clock[0] += seconds
            tick(done, total)
        return lines
    assert said([(2, 1), (2, 2), (2, 3)], 3, at_once=True) == ["tiles: 1/3, 2 s, 4 s left", "tiles: 3/3, 6 s, 0 s left"]
    assert said([(2, 1)], 1, at_once=True) == said([(2, 1), (2, 2)], 2) == []
    assert said([(2, 6)], 9, at_once=True, start=5) == ["tiles: 6/9, 2 s, 6 s left"]
    slow = said([(60, 1), (1, 2), (5, 7)], 9, every=0., at_once=True) # the first one warms up
    assert slow == ["tiles: 1/9, 60 s, 480 s left", "tiles: 2/9, 61 s, 7 s left", "tiles: 7/9, 66 s, 2 s left"]
    waits = said([(6, 4), (6, 4), (1, 8)], 12, start=4) # nothing new at first
    assert waits == ["tiles: 4/12, 6 s, 48 s left", "tiles: 4/12, 12 s, 96 s left"]


def test_a_run_takes_away_what_its_dead_processes_left(tmp_path):
    import subprocess
    import sys
    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    run = core.open_run(tmp_path/"run", dict(seed=0))
    (run/"bank").mkdir()
    dead, alive = (run/f"bank/{core.part_start()}{o}-x.parquet" for o in (int(child.stdout), os.getpid()))
    for p in (dead, alive): p.write_text("half")
    core.open_run(run, dict(seed=0))
    assert not dead.exists() and alive.exists()
    seen = []
    core.replace_file(run/"a.txt", seen.append)
    assert seen[0].startswith(f"{run}/{core.part_start()}{os.getpid()}-")
