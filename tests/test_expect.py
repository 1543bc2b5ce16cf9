"What people expect of a trainer: trackers, pictures as it goes, half precision, versions in the records"
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args, get_type_hints

import pytest
import torch
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from srnb.core import generator, seed_of
from srnb.training import Loop, fit, log_pictures

LOOP = Loop(steps=8, lr=1e-2, warmup=1, parts=2, ema=.9, save_every=3, log_every=1)


def toy(dtype=torch.float32, overflow=(), die_at=None): # owner and loss
    owner = SimpleNamespace(net=torch.nn.Linear(4, 3), dtype=dtype)
    owner.net.load_state_dict(dict(weight=torch.eye(4)[:3], bias=torch.zeros(3)))
    def loss(step, part):
        if step == die_at: raise KeyboardInterrupt("killed")
        x = torch.randn(8, 4, generator=generator(seed_of("toy", step, part)))
        values = (owner.net(x)-x[:, :3].flip(1)).square().mean(1)
        return values*(1e36 if step in overflow and part == 1 else 1.), {} # finite, but its scaled gradient is not
    return owner, loss


def test_every_tracker_of_accelerate(tmp_path):
    "Each has a name in `Loop.log_with`; a missing package is one sentence, before anything is written"
    kinds = set(get_args(get_type_hints(Loop)["log_with"]))
    assert kinds == {*LOGGER_TYPE_TO_CLASS, "none"}
    with pytest.raises(ValueError, match="Loop.log_with: there is no 'wandbb'; did you mean 'wandb'"):
        Loop(log_with="wandbb")
    from accelerate.tracking import get_available_trackers
    missing = min(kinds-{"none", *map(str, get_available_trackers())})
    with pytest.raises(ValueError, match=f"Loop.log_with = '{missing}'.*pip install.*tensorboard"):
        fit(*toy(), replace(LOOP, log_with=missing), tmp_path/"out")
    assert not (tmp_path/"out").exists()
    fit(*toy(), replace(LOOP, log_with="none"), tmp_path/"none")
    assert not (tmp_path/"none/logs").exists()


def test_pictures_at_every_checkpoint(tmp_path):
    "`show` is called after a checkpoint with the step and the trackers, and does not change what is learnt"
    steps = []
    def show(step, trackers):
        steps.append(step)
        log_pictures(trackers, {"held out/a": torch.full((3, 6, 8), .2)}, step)
    shown, _ = fit(*toy(), LOOP, tmp_path/"shown", show=show)
    plain, _ = fit(*toy(), LOOP, tmp_path/"plain")
    assert steps == [3, 6, 8] and all(torch.equal(shown[n], plain[n]) for n in plain)
    events = EventAccumulator(str(tmp_path/"shown/logs")).Reload()
    images = events.Images("held out/a")
    assert [o.step for o in images] == steps and (images[0].height, images[0].width) == (6, 8)


def test_half_precision_skips_what_overflows(tmp_path):
    "Steps whose scaled gradient overflows are skipped and the scale halved; a resumed run does the same, bit for bit"
    half = torch.float16
    with pytest.raises(KeyboardInterrupt): fit(*toy(half, (2, 4), die_at=5), LOOP, tmp_path/"killed")
    again, log_b = fit(*toy(half, (2, 4)), LOOP, tmp_path/"killed")
    whole, log = fit(*toy(half, (2, 4)), LOOP, tmp_path/"whole")
    assert all(torch.equal(again[n], whole[n]) for n in whole) and log.equals(log_b)
    assert log.skipped.tolist() == [0, 0, 1, 0, 1, 0, 0, 0] and log.loss_scale.iloc[-1] == 2.**14
    assert log.grad_norm.isna().tolist() == [bool(o) for o in log.skipped]
    owner, loss = toy(half)
    owner.net.weight.register_hook(lambda grad: grad/0)
    with pytest.raises(FloatingPointError, match="overflow.*bf16"):
        fit(owner, loss, replace(LOOP, steps=40), tmp_path/"lost")


def test_half_precision_learns_the_same(tmp_path):
    "Where nothing overflows, a scale that is a power of two changes no bit"
    half, single = (fit(*toy(o), LOOP, tmp_path/str(o))[0] for o in (torch.float16, torch.float32))
    assert all(torch.equal(half[n], single[n]) for n in single)
