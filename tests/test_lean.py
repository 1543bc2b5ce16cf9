"What a run holds, loads, encodes and samples, in counts: no more than it trains on"
import os
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from srnb.align import DP2O, Expert, Own, Photograph, Run, Samples, Top, Work
from srnb.core import generator, to_bytes
from srnb.curation import Group, make_outputs
from srnb.pairs import Hinge, Pairs, draw_winners
from srnb.policies import from_pretrained
from srnb.runs import Base, Data, Judging


def held(make):
    "What a call gives, and the most bytes of tensors that it held at a time"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: result = make()
    live, most = 0, 0
    for e in sorted(seen.profiler.kineto_results.events(), key=lambda o: o.start_ns()):
        if e.name() == "[memory]":
            live += e.nbytes()
            most = max(most, live)
    return result, most


def kept_of(result):
    "Bytes of the storages behind pairs or groups, each once"
    parts = [*result.lq, *result.winners, *result.losers] if isinstance(result, Pairs) else [
        o for g in getattr(result, "held", result) for o in (g.lq, g.gt, g.sr)]
    return sum({o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in parts}.values())


# ---------------------------------------------------------------- pairs, group by group

GROUPS, M, SIZE = 64, 16, 256


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    "A bank of 64 groups of 16 candidates of 256 x 256: one file of random bytes under 64 names"
    g, top, ids = generator(0), tmp_path_factory.mktemp("bank"), [f"p{k}" for k in range(GROUPS)]
    def images(*shape): return torch.randint(0, 256, shape, generator=g, dtype=torch.uint8).float().div(255)
    pictures = images(M, 3, SIZE, SIZE)
    inputs = [("p0", images(3, SIZE//4, SIZE//4), images(3, SIZE, SIZE))]
    folder = make_outputs(top/"bank", {str(k): lambda lq, k=k: pictures[k:k+1] for k in range(M)}, inputs)
    for i in ids[1:]: os.link(folder/"groups"/"p0.safetensors", folder/"groups"/f"{i}.safetensors")
    return folder, [(i, *inputs[0][1:]) for i in ids]


class OfBank(Work):
    "A run at work on a bank that is there, with rewards that differ from group to group"
    def __init__(self, folder, inputs, **method):
        run = Run("x", replace(DP2O, **method), Data(size=SIZE), Base(precision="no"), Judging(m=M))
        super().__init__(run, from_pretrained("small"), inputs, inputs[:1])
        self.folder, self.reward = folder, torch.rand(len(inputs), M, generator=generator(1))
    @property
    def bank(self): return self.folder
    def rewards(self, frozen=False): return self.reward


OWN = dict(losers=Own(), link=Hinge(.01))
CHOICES = dict(bottom={}, samples=dict(winners=Photograph(), losers=Samples()), top=OWN | dict(winners=Top(4)),
               expert=OWN | dict(winners=Expert(4)))


@pytest.mark.parametrize("choice", CHOICES)
def test_what_is_held_while_pictures_of_a_bank_are_chosen(bank, choice):
    """What stays is bytes of the chosen pictures; beside it there is never more than 1.2 times one group. As images of
    the whole bank it was a hundred times as much"""
    folder, inputs = bank
    work = OfBank(folder, inputs if choice != "samples" else inputs[:8], **CHOICES[choice])
    losers = work.run.method.losers
    make = losers.chosen if hasattr(losers, "chosen") else work.run.method.winners.groups
    result, most = held(lambda: make(work))
    group, kept = M*3*SIZE**2, kept_of(result)
    assert kept < len(work.crops)*(M+3)*3*SIZE**2 and most-kept < 1.2*group, f"{(most-kept)/group:.2f} groups"
    assert all(o.dtype == torch.uint8 for o in getattr(result, "winners", ()))
    best = work.reward[3].argsort(descending=True, stable=True)
    stored = to_bytes(next(iter(work.samples())).sr)
    if isinstance(result, Pairs) and choice != "samples":
        assert torch.equal(result.winners[3], stored[best[:4]]) and torch.equal(result.losers[3], stored[best[-4:]])
    if not isinstance(result, Pairs): assert torch.equal(to_bytes(result[3].sr[-4:]), stored[best[:4]])


def test_photographs_of_a_run_are_bytes(bank):
    "As many bytes as the files' pixels have; a draw takes one group after the other"
    folder, inputs = bank
    work = OfBank(folder, inputs[:8])
    pixels = sum(lq.numel()+gt.numel() for _, lq, gt in inputs[:8])
    assert kept_of(work.crops) == pixels
    crops, most = held(lambda: draw_winners(work.crops, work.policy, 1, 32, 0))
    assert most < 4*2.2*pixels/8
    images = [Group(i, lq, gt, gt[None]) for i, lq, gt in inputs[:8]]
    assert torch.equal(crops.z, draw_winners(images, work.policy, 4, 32, 0).z)
