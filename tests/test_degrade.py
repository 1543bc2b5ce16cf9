"What the degrade notebook cannot hold: properties over all presets and sizes, in other processes and on more threads"
import dataclasses
import functools
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from srnb.core import generator, seed_of
from srnb.degrade import (RESSHIFT_TEST, RESSHIFT_TRAIN, SEESR, Blur, Degradation, Stage, degradation_name, degrade,
                          draw_kernel, mirrored)

PRESETS = (RESSHIFT_TEST, RESSHIFT_TRAIN, SEESR)


def picture(h=64, w=96): # smooth, with edges, 8-bit values
    y, x = torch.meshgrid(torch.linspace(0, 1, h), torch.linspace(0, 1, w), indexing="ij")
    return torch.stack([x, y, ((x*5).floor()+(y*3).floor()) % 2]).mul(255).round().div(255)


def digest(images):
    return hashlib.sha256(b"".join(o.mul(255).round().byte().numpy().tobytes() for o in images)).hexdigest()


@pytest.mark.parametrize("d", PRESETS, ids=lambda d: d.name)
def test_shape_values_and_determinism(d):
    for i, (h, w) in enumerate([(32, 32), (64, 96), (36, 128)]):
        gt = picture(h, w)
        for seed in range(6):
            g, again = generator(seed_of(d.name, i, seed)), generator(seed_of(d.name, i, seed))
            lq = degrade(gt, d, g)
            assert lq.shape == (3, h//4, w//4) and lq.dtype == torch.float32 and not lq.requires_grad
            assert torch.equal(lq, lq.mul(255).round().div(255)) and lq.min() >= 0 and lq.max() <= 1
            assert torch.equal(lq, degrade(gt, d, again)) and torch.equal(g.get_state(), again.get_state())
        assert torch.equal(gt, picture(h, w)) # the input is left alone
    assert len({digest([degrade(gt, d, generator(s))]) for s in range(5)}) == 5


def test_strided_input_is_the_same_image():
    gt = picture(64, 64)
    view = gt.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert torch.equal(degrade(gt, SEESR, generator(3)), degrade(view, SEESR, generator(3)))


def test_same_in_another_process_and_on_two_threads():
    code = ("import torch; torch.set_num_threads(2)\n"
            "from tests.test_degrade import *\n"
            "print(digest([degrade(picture(), d, generator(s)) for d in PRESETS for s in range(4)]))")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
                         env={**os.environ, "PYTHONPATH": root, "PYTHONHASHSEED": "7"})
    assert out.stdout.strip() == digest([degrade(picture(), d, generator(s)) for d in PRESETS for s in range(4)])


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    for d in PRESETS: degrade(picture(), d, generator(0))
    assert torch.equal(before, torch.get_rng_state())


def test_kernels_sum_to_one():
    g = generator(0)
    for blur in (RESSHIFT_TEST.first.blur, RESSHIFT_TRAIN.second.blur, SEESR.first.blur):
        for _ in range(200):
            k = draw_kernel(blur, g)
            assert abs(k.sum()-1) < 1e-12 and k.isfinite().all() and len(k) in blur.sizes


def test_second_stage_happens_as_often_as_asked():
    # a second stage of nothing but grain shows whether it ran
    dark = Stage(Blur((3,), (1., 0., 0., 0., 0., 0.), (.5, .5)), (1., 1.), (0., 0.), (0., 0.))
    grain = dataclasses.replace(dark, gaussian=(255., 255.), gaussian_prob=1.)
    gt, n = torch.full((3, 32, 32), .5), 300
    d = Degradation("probe", first=dark, jpeg=(95, 95), final_jpeg=(95, 95), final_sinc_prob=0., final_sinc_sizes=(3,),
                    second=grain, second_prob=.3)
    d = dataclasses.replace(d, first=dataclasses.replace(dark, gaussian_prob=1.))
    ran = sum(degrade(gt, d, generator(s)).std().item() > .1 for s in range(n))
    assert abs(ran/n-.3) < 4*(.3*.7/n)**.5


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("before, after", [(0, 0), (0, 9), (9, 0), (4, 5), (5, None)])
def test_mirrored(n, before, after):
    "A walk to and fro along the side, however short it is, that passes its start after `before` steps"
    place, step, walk = 0, 1, []
    for _ in range(n+9): # forwards, from the first pixel
        walk.append(place)
        if not 0 <= place+step < n: step = -step
        place = min(max(place+step, 0), n-1)
    wanted = walk[1:before+1][::-1] + walk[:n+(before if after is None else after)]
    assert mirrored(n, before, after).tolist() == wanted


def test_presets_are_plain_data():
    for d in PRESETS:
        assert json.loads(json.dumps(dataclasses.asdict(d)))["name"] == d.name
        hash(d)


def every_fourth(gt, generator, scale):
    image = gt[:, ::scale, ::scale]
    return image + .02*torch.rand(image.shape, generator=generator)


def no_tensor(gt, generator, scale): return None
def large(gt, generator, scale): return gt
def bright(gt, generator, scale): return gt[:, ::4, ::4]*300
def in_bytes(gt, generator, scale): return gt[:, ::4, ::4].byte()


def test_a_function_degrades():
    "8-bit values of the right size, by the generator alone; the photograph stays as it is"
    gt = picture()*.9
    lq = degrade(gt, every_fourth, generator(3))
    assert lq.shape == (3, 16, 24) and torch.equal(lq, lq.mul(255).round().div(255))
    assert torch.equal(lq, degrade(gt, every_fourth, generator(3)))
    assert not torch.equal(lq, degrade(gt, every_fourth, generator(4)))
    assert degradation_name(every_fourth) == "every_fourth" and degradation_name(SEESR) == "seesr"
    def spoils(gt, generator, scale): return gt.zero_()[:, ::scale, ::scale]
    assert not degrade(gt, spoils, generator(0)).any() and gt.any()


@pytest.mark.parametrize("bad, error, message", [
    (lambda: degrade(picture(62, 64), SEESR, generator(0)), ValueError, "multiples of 4"),
    (lambda: degrade(picture(28, 64), SEESR, generator(0)), ValueError, "at least 32"),
    (lambda: degrade(picture()[:1], SEESR, generator(0)), ValueError, r"\(3,H,W\)"),
    (lambda: degrade(picture()*2, SEESR, generator(0)), ValueError, r"\[0, 1\]"),
    (lambda: degrade(picture()*float("nan"), SEESR, generator(0)), ValueError, "NaN"),
    (lambda: degrade(picture().half(), SEESR, generator(0)), TypeError, "float32"),
    (lambda: degrade(picture().numpy(), SEESR, generator(0)), TypeError, "torch tensor"),
    (lambda: degrade(picture(), "seesr", generator(0)), TypeError, "Degradation"),
    (lambda: degrade(picture(), functools.partial(every_fourth), generator(0)), TypeError, "with a name, got partial"),
    (lambda: degrade(picture(), no_tensor, generator(0)), ValueError, "must give a tensor of shape"),
    (lambda: degrade(picture(), large, generator(0)), ValueError, r"\(3, 16, 24\), got \(3, 64, 96\)"),
    (lambda: degrade(picture(), bright, generator(0)), ValueError, r"\[0, 1\]"),
    (lambda: degrade(picture(), in_bytes, generator(0)), TypeError, "float32"),
    (lambda: degrade(picture(), SEESR, 0), TypeError, "generator"),
    (lambda: degrade(picture(), SEESR, generator(0), scale=2.5), ValueError, "whole number"),
    (lambda: dataclasses.replace(SEESR, jpeg=(60, 101)), ValueError, "ends at 100"),
    (lambda: dataclasses.replace(SEESR, second=None), ValueError, "no second stage"),
    (lambda: dataclasses.replace(SEESR, final_sinc_sizes=(4,)), ValueError, "odd"),
    (lambda: dataclasses.replace(SEESR.first, resize=(1.1, 1.5)), ValueError, "around 1"),
    (lambda: Blur((3,), (.5, .4, 0., 0., 0., 0.), (.2, 1.)), ValueError, "sum to 1"),
])
def test_bad_input_is_named(bad, error, message):
    with pytest.raises(error, match=message): bad()
