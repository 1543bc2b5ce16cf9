"What the notebook cannot hold: odd files, other processes, and that the package holds what its manifest says"
import hashlib
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from srnb import data
from srnb.core import bicubic, generator, read_image, to_pil, write_image
from srnb.data import PatchPool, check_copies, check_disjoint, embedded_photos, find_photos, make_pair, paired_folder
from srnb.data import share_of, split_photos
from srnb.degrade import RESSHIFT_TEST, SEESR


def noise(*shape, seed=0): return torch.rand(3, *shape, generator=generator(seed))


@pytest.fixture
def album(tmp_path):
    for k in range(12): write_image(tmp_path/f"album/{k:02d}.png", noise(48, 64, seed=k))
    return find_photos(tmp_path/"album")


def test_manifest_and_folder_agree(root):
    folder = root/"srnb/photos"
    rows = json.loads((folder/"photos.json").read_text(encoding="utf-8"))
    assert {o["file"] for o in rows} | {"photos.json"} == {p.name for p in folder.iterdir()}
    assert len({o["id"] for o in rows}) == len(rows) >= 16
    keys = {"file", "id", "split", "author", "licence", "source", "title", "changes"}
    assert all(set(o) == keys and all(o.values()) for o in rows)
    assert sum(p.stat().st_size for p in folder.iterdir()) <= 4e6


def test_embedded_photos_are_whole_colour_images_without_metadata():
    for p in embedded_photos():
        with Image.open(p.path) as im:
            assert (im.format, im.mode) == ("JPEG", "RGB")
            assert not im.getexif() and min(im.size) >= 384 and not any(o % 8 for o in im.size)
        assert p.read().std((1, 2)).min() > .02 # no channel is flat


def test_embedded_sets_are_disjoint():
    train, held = embedded_photos("train"), embedded_photos("held_out")
    assert len(held) >= 10 and not {p.id for p in train} & {p.id for p in held}
    check_disjoint(train, held)
    assert data.look_distance(train, held).min() > .1


@pytest.mark.parametrize("mode", ["L", "P", "1"])
def test_grey_and_palette_files_are_read(tmp_path, mode):
    to_pil(noise(40, 48)).convert(mode).save(tmp_path/"x.png")
    assert find_photos(tmp_path)[0].read().shape == (3, 40, 48)


@pytest.mark.parametrize("end", ["png", "jpg", "jpeg", "webp", "bmp", "tif", "TIFF", "JPG"])
def test_endings(tmp_path, end):
    to_pil(noise(40, 48)).save(tmp_path/f"x.{end}")
    (tmp_path/"x.txt").write_text("not looked at")
    assert [p.path.name for p in find_photos(tmp_path)] == [f"x.{end}"]


def test_files_that_cannot_serve_are_named(tmp_path):
    deep, alpha = tmp_path/"deep", tmp_path/"alpha"
    deep.mkdir(), alpha.mkdir()
    Image.fromarray((noise(40, 48)[0].numpy()*65535).astype("uint16")).save(deep/"d.png")
    im = to_pil(noise(40, 48))
    im.putalpha(100)
    im.save(alpha/"a.png")
    with pytest.raises(ValueError, match=r"d\.png.*8 bits"): find_photos(deep)
    with pytest.raises(ValueError, match=r"a\.png.*transparent"): find_photos(alpha)


def test_linked_folders_are_searched_and_what_is_missing_is_named(tmp_path, capsys):
    write_image(tmp_path/"disk/a.png", noise(40, 48))
    write_image(tmp_path/"album/b.png", noise(40, 48, seed=1))
    for name, to in (("disk", "../disk"), ("round", "."), ("up", "..")): (tmp_path/"album"/name).symlink_to(to)
    assert [p.id for p in find_photos(tmp_path/"album")] == ["b", "disk_a"]
    for name in ("c.HEIC", "d.gif", "notes.txt"): (tmp_path/"album"/name).write_text("x")
    capsys.readouterr()
    find_photos(tmp_path/"album")
    assert "album: 2 not read (.gif, .heic); convert such pictures to PNG" in capsys.readouterr().out
    (tmp_path/"album/gone").symlink_to("/not/mounted")
    with pytest.raises(FileNotFoundError, match="album/gone"): find_photos(tmp_path/"album")


def test_names_are_safe_and_unique(tmp_path):
    for name in ("a/été 1.png", "b/été 1.png", "..x.png", "b/x.png", "b/x.bmp"):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        to_pil(noise(32, 32)).save(tmp_path/name)
    photos = find_photos(tmp_path)
    ids = [p.id for p in photos]
    assert len(photos) == 4 and len(set(ids)) == 4 # ..x.png is hidden
    assert all(i.isascii() and "/" not in i and " " not in i and not i.startswith(".") for i in ids)


def test_names_that_collide_all_the_same(tmp_path):
    for name in ("a b.png", "a_b.png", "a?b.png"): to_pil(noise(32, 32)).save(tmp_path/name)
    with pytest.raises(ValueError, match="two files give one id"): find_photos(tmp_path)


def test_split_follows_content(album, tmp_path):
    assert share_of(replace(album[0], sha256="8"+"0"*63)) == .5
    sides = {p.sha256: p.split for o in split_photos(album, .5) for p in o}
    for k, p in enumerate(album): (tmp_path/f"z{99-k}.png").write_bytes(p.path.read_bytes())
    (tmp_path/"again.png").write_bytes(album[0].path.read_bytes()) # a duplicate lands beside its twin
    moved = [p for p in find_photos(tmp_path) if p.path.parent == tmp_path]
    assert len(moved) == 13
    assert all(sides[p.sha256] == p.split for o in split_photos(moved, .5) for p in o)


@pytest.mark.parametrize("eta", [0, 1, -.1, float("nan")])
def test_split_needs_a_share(album, eta):
    with pytest.raises(ValueError, match="held_out must lie"): split_photos(album, eta)


def test_split_refuses_copies_across(tmp_path):
    x = embedded_photos()[0].read()
    for q in range(60, 96, 3):
        (tmp_path/"q").mkdir(exist_ok=True)
        to_pil(x).save(tmp_path/"q"/f"{q}.jpg", quality=q)
    with pytest.raises(ValueError, match="looks like"): split_photos(find_photos(tmp_path/"q"), .5)


def test_high_and_low_resolution_do_not_mix(tmp_path):
    "Wherever the split puts them; other sizes are left in"
    from srnb.runs import Data, photo_sets
    x = embedded_photos()[0].read()[:, :256, :256]
    for k in range(3):
        for side in (256, 128): to_pil(bicubic(x.roll(64*k, 2)[None], (side, side))[0]).save(tmp_path/f"{k}-{side}.png")
    check_copies(find_photos(tmp_path))
    to_pil(bicubic(x[None], (64, 64))[0]).save(tmp_path/"small.png")
    with pytest.raises(ValueError, match=r"small.png .64×64 pixels. is a copy of .*0-256.png .256×256. at 1/4"):
        photo_sets(Data((str(tmp_path),)), 8, None)


def test_empty_sets_share_nothing(album):
    check_disjoint([], album)
    check_disjoint(album, [])


def digest(photo): return hashlib.sha256(make_pair(photo, 64, RESSHIFT_TEST)[0].numpy().tobytes()).hexdigest()


def test_pairs_do_not_depend_on_the_process(root):
    code = "from test_data import *; print(digest(embedded_photos('held_out')[3]))"
    out = subprocess.run([sys.executable, "-c", code], cwd=root/"tests", check=True, capture_output=True, text=True)
    assert out.stdout.strip() == digest(embedded_photos("held_out")[3])


def blurred(gt, generator, scale): return torch.nn.functional.avg_pool2d(gt, scale)


def test_a_function_in_place_of_settings(album):
    lq, gt = make_pair(album[0], 32, blurred)
    assert torch.equal(lq, blurred(gt, None, 4).mul(255).round().div(255))
    pool = PatchPool(album[:2], blurred, versions=1)
    assert torch.equal(pool.lq[1][0], blurred(pool.gt[1].float().div(255), None, 4).mul(255).round().byte())
    with pytest.raises(TypeError, match="degradation must be a Degradation"): make_pair(album[0], 32, "seesr")


def test_pairs_follow_name_place_and_draw():
    p = embedded_photos("held_out")[0]
    base, gt = make_pair(p, 64, RESSHIFT_TEST)
    others = [make_pair(replace(p, id="other"), 64, RESSHIFT_TEST), make_pair(p, 64, RESSHIFT_TEST, draw=1),
              make_pair(p, 64, SEESR)]
    assert all(torch.equal(o[1], gt) and not torch.equal(o[0], base) for o in others)
    corners = [make_pair(p, 64, RESSHIFT_TEST, place=k)[1] for k in range(5)]
    assert not any(torch.equal(a, b) for i, a in enumerate(corners) for b in corners[:i])
    assert base.dtype == gt.dtype == torch.float32 and base.shape == (3, 16, 16)
    for place in (5, -1):
        with pytest.raises(ValueError, match="place"): make_pair(p, 64, RESSHIFT_TEST, place=place)


def test_pool_cuts_the_same_place_from_both(album):
    pool = PatchPool(album, RESSHIFT_TEST, versions=2)
    for i, o in enumerate(list(pool.gt)): # bytes that tell where they are: photograph, column and row of lq
        y, x = torch.meshgrid(torch.arange(48)//4, torch.arange(64)//4, indexing="ij")
        pool.gt[i] = torch.stack([torch.full_like(y, i), y, x]).byte()
        pool.lq[i] = pool.gt[i][None, :, ::4, ::4].repeat(2, 1, 1, 1)
        assert o.shape == pool.gt[i].shape
    lq, gt = pool.batch(400, 16, generator(0))
    assert torch.equal(gt, lq.repeat_interleave(4, -1).repeat_interleave(4, -2))
    first = (lq[:, :, 0, 0]*255).round()
    assert first[:, 0].unique().numel() == 12
    starts = (lq*255).round().amin((2, 3))
    assert starts[:, 1].max() == 8 and starts[:, 2].max() == 12 and starts[:, 1:].min() == 0 # borders are reached


def test_pool_uses_all_versions(album):
    pool = PatchPool(album[:1], RESSHIFT_TEST, versions=3)
    for k in range(3): pool.lq[0][k] = k
    lq, _ = pool.batch(100, 8, generator(0))
    assert set((lq*255).round().unique().tolist()) == {0, 1, 2}
    assert len(pool) == 1 and pool.nbytes == 48*64*3+3*12*16*3


def test_pool_takes_one_draw_a_patch(album):
    "So a run that resumes from the state of its generator goes on with the same patches"
    pool = PatchPool(album, RESSHIFT_TEST, versions=1)
    g = generator(1)
    pool.batch(4, 16, g)
    state = g.get_state()
    want = pool.batch(4, 32, g)
    h = generator(9)
    h.set_state(state)
    assert all(torch.equal(a, b) for a, b in zip(want, pool.batch(4, 32, h), strict=True))


def test_pool_refuses(album, tmp_path):
    held = embedded_photos("held_out")
    with pytest.raises(ValueError, match="is held out"): PatchPool([*album, held[0]], RESSHIFT_TEST)
    with pytest.raises(ValueError, match="same file as"): PatchPool([replace(held[0], split=None)], RESSHIFT_TEST)
    with pytest.raises(ValueError, match="same file as"): PatchPool(album, RESSHIFT_TEST, held_out=album[3:4])
    with pytest.raises(ValueError, match="versions"): PatchPool(album, RESSHIFT_TEST, versions=-1)
    write_image(tmp_path/"tiny/t.png", noise(24, 200))
    with pytest.raises(ValueError, match=r"t\.png has 24×200"): PatchPool(find_photos(tmp_path/"tiny"), RESSHIFT_TEST)


def test_pool_cuts_sizes_to_multiples_of_8(tmp_path):
    write_image(tmp_path/"odd.png", noise(45, 67))
    pool = PatchPool(find_photos(tmp_path), RESSHIFT_TEST, versions=1)
    assert pool.gt[0].shape == (3, 40, 64) and pool.lq[0].shape == (1, 3, 10, 16)
    assert torch.equal(pool.gt[0].float()/255, read_image(tmp_path/"odd.png")[:, 2:42, 1:65])


@pytest.fixture
def ready(tmp_path):
    "A folder of ready pairs: every fourth pixel, so that it shows whether a pair is aligned"
    for k in range(4):
        gt = noise(60, 76, seed=k).mul(255).round().div(255)
        write_image(tmp_path/f"ready/gt/s/{k}.png", gt), write_image(tmp_path/f"ready/lq/{k}.png", gt[:, ::4, ::4])
    return tmp_path/"ready"


def test_ready_pairs(ready):
    "Nothing is degraded, whatever the settings say, and every cut is at the same place in both"
    photos = find_photos(ready)
    assert [p.id for p in photos] == [f"s_{k}" for k in range(4)] and all(p.lq.stem == p.path.stem for p in photos)
    for place in range(5):
        for d in (RESSHIFT_TEST, SEESR):
            lq, gt = make_pair(photos[1], (32, 40), d, place=place)
            assert gt.shape == (3, 32, 40) and torch.equal(lq, gt[:, ::4, ::4])
    pool = PatchPool(photos, SEESR, versions=3, max_side=40)
    assert pool.gt[0].shape == (3, 56, 72) and pool.lq[0].shape == (1, 3, 14, 18)
    pool.lq = [o*0+i for i, o in enumerate(pool.lq)] # which photograph; turns and flips are the pool's, as ever
    pool.gt = [o*0+i for i, o in enumerate(pool.gt)]
    lq, gt = pool.batch(50, 32, generator(0))
    assert torch.equal(lq[:, 0, 0, 0], gt[:, 0, 0, 0]) and len(lq[:, 0, 0, 0].unique()) == 4
    a, b = split_photos(photos, .5)
    assert len(a)+len(b) == 4 and all(p.lq for p in (*a, *b))


def test_ready_pairs_that_do_not_fit(ready, tmp_path):
    with pytest.raises(ValueError, match="not 2 times"): make_pair(find_photos(ready)[0], 32, SEESR, scale=2)
    write_image(ready/"more.png", noise(60, 76))
    with pytest.raises(ValueError, match=r"more\.png beside them"): find_photos(ready)
    (ready/"more.png").unlink()
    (ready/"lq/2.png").unlink()
    with pytest.raises(ValueError, match=r"2\.png has no partner"): find_photos(ready)


def test_paired_folder_wants_both_sides(tmp_path):
    for name, side in (("lq/a", 16), ("gt/a", 64), ("gt/b", 64)): write_image(tmp_path/f"{name}.png", noise(side, side))
    with pytest.raises(ValueError, match=r"b\.png has no partner"): paired_folder(tmp_path/"lq", tmp_path/"gt")
    (tmp_path/"gt/b.png").unlink()
    assert [(a.name, b.name) for a, b in paired_folder(tmp_path/"lq", tmp_path/"gt")] == [("a.png", "a.png")]
