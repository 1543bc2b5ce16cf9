"What the shipped networks draw: no mesh, flat where it is flat, and no worse than bicubic on clean inputs"
import json

import pytest
import torch

from srnb.core import bicubic, generator, read_run
from srnb.curation import fingerprint
from srnb.data import embedded_photos, make_pair
from srnb.degrade import RESSHIFT_TRAIN
from srnb.policies import from_pretrained
from srnb.rewards import PSNR_Y, luma_yiq, score
from srnb.runs import dtype_of
from srnb.spectral import flat_std, line_excess

SIDE = 240 # pixels of the middle, on which a line excess is measured


def luma(images): return luma_yiq(images)[:, 0] # (B,3,H,W) -> (B,H,W), 8-bit levels


def middle(planes):
    cut = (planes.shape[-1]-SIDE)//2
    return planes[..., cut:cut+SIDE, cut:cut+SIDE]


@pytest.fixture(scope="module")
def pairs():
    "Inputs and truths of the embedded held-out photographs"
    lq, gt = zip(*(make_pair(p, 256, RESSHIFT_TRAIN) for p in embedded_photos("held_out")), strict=True)
    assert len(gt) == 12
    return torch.stack(lq), torch.stack(gt)


@pytest.fixture(scope="module")
def drawn(pairs):
    "name -> one sample of every photograph, drawn once"
    found = {}
    def of(name):
        if name not in found: found[name] = from_pretrained(name).sample(pairs[0], [0])[:, 0]
        return found[name]
    return of


def fails(reason): return pytest.mark.xfail(strict=True, raises=AssertionError, reason=reason)


DIRTY = fails("this network leaves 2.9 levels on flat areas, the truth has 1.3")
UNEVEN = fails("this network makes black 2 levels green")
GRAINY = fails("this base draws 5 levels of grain on flat areas, the truth has 1.3")


@pytest.mark.parametrize("name", ["onestep", pytest.param("small", marks=pytest.mark.slow)])
def test_no_mesh(pairs, drawn, name):
    """Line excess at most 1.3 times the truth's, mean over lines and pictures; the network that shipped before had 16
    times as much"""
    truth, found = (line_excess(middle(luma(o))).mean() for o in (pairs[1], drawn(name)))
    assert 1.5 < truth < 2 # of photographs
    assert found <= 1.3*truth


@pytest.mark.parametrize("name", [pytest.param("onestep", marks=DIRTY),
                                  pytest.param("small", marks=[pytest.mark.slow, GRAINY])])
def test_flat_areas(pairs, drawn, name):
    "Standard deviation where the truth is flat, at most one level above the truth's"
    gt = luma(pairs[1])
    truth, found = (flat_std(o, gt, most=2.) for o in (gt, luma(drawn(name))))
    assert 8 <= truth.isfinite().sum() # pictures with a flat block
    assert found.nanmean() <= truth.nanmean()+1


@pytest.mark.parametrize("level, noise", [
    pytest.param(0, 0, marks=UNEVEN), (10, 0), (128, 0), (245, 0), (0, 1), (10, 1), (128, 1), (245, 1)])
def test_flat_input(level, noise):
    "Stays flat: no pixel is further than one level from what came in"
    shape, g = (1, 3, 32, 40), generator(level)
    lq = (level + torch.randint(-noise, noise+1, shape, generator=g).float()).clamp(0, 255)/255
    sr = 255*from_pretrained("onestep").sample(lq, [0])[:, 0]
    assert (sr-level).abs().max() <= 1+noise+1e-3


def test_flat_patch(pairs):
    "Inside a picture, away from its border, it stays flat"
    lq = pairs[0][:2].clone()
    lq[:, :, 16:48, 16:48] = 128/255
    sr = 255*from_pretrained("onestep").sample(lq, [0])[:, 0]
    assert (sr[:, :, 4*26:4*38, 4*26:4*38]-128).abs().max() <= 1+1e-3


def test_clean_input(pairs):
    "A photograph reduced by bicubic interpolation: not below bicubic by more than 0.5 dB of PSNR-Y"
    policy, lost = from_pretrained("onestep"), []
    for gt in pairs[1]:
        lq = bicubic(gt[None], [n//4 for n in gt.shape[1:]])
        sr, y = policy.sample(lq, [0])[:, 0], bicubic(lq, gt.shape[1:])
        lost.append(score(PSNR_Y, y, gt)-score(PSNR_Y, sr, gt))
    assert torch.cat(lost).mean() <= .5


def test_record(root):
    "What the page of pictures says was measured on the weights that ship"
    folder = root/"nbs/_records/pictures"
    config, table = read_run(folder)
    recorded = json.loads((folder/"models.json").read_text())
    for name in ("onestep", "small"):
        policy = from_pretrained(name, dtype=dtype_of(config["params"]["precision"]))
        assert recorded[name] == fingerprint(policy)
    assert {p.id for p in embedded_photos("held_out")} == set(config["params"]["photos"]["embedded"])
    assert {"bicubic", "onestep", "onestep_before", "small", "small_mean", "real_esrgan", "truth"} == {*table.variant}
    for sheet in folder.glob("sheet*.webp"): assert sheet.stat().st_size < 100_000
