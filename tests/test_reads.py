"A policy that does not read its input is refused before anything is claimed; a fresh control branch is always the same"
from dataclasses import replace

import pytest
import torch

from srnb.align import DP2O, SFT, Run, align
from srnb.backbones import BackboneOptions, load_backbone, write_tiny, write_tiny_control
from srnb.command import main
from srnb.curation import fingerprint
from srnb.policies import check_reads, from_pretrained, influence, save_pretrained
from srnb.runs import Base, Data

KINDS = ("sd", "sdxl", "flux")


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    "Folders of random pipelines"
    top = tmp_path_factory.mktemp("bare")
    return {kind: write_tiny(kind, top/kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_branch_is_the_same_at_every_load(bare, kind):
    torch.manual_seed(1)
    first = fingerprint(load_backbone(bare[kind]))
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert fingerprint(load_backbone(bare[kind])) == first
    assert torch.equal(torch.get_rng_state(), before) # and nobody else's draws are moved


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_without_a_trained_branch_reads_nothing(bare, tmp_path, kind):
    policy = load_backbone(bare[kind])
    assert influence(policy) == 0
    with pytest.raises(ValueError, match=f"{kind}.*options.control.*srnb train base"): check_reads(policy)
    write_tiny_control(policy, tmp_path/"control")
    read = load_backbone(bare[kind], BackboneOptions(control=str(tmp_path/"control")))
    assert influence(read) > 5e-6 # tiny random U-Nets hardly look at their skips
    check_reads(read)


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("kind,train", [("sd", "base"), ("flux", "whole"), ("sdxl", "control")])
def test_a_run_on_it_is_refused(bare, tmp_path, idle, kind, train, precision):
    base = Base(str(bare[kind]), precision=precision, sample_steps=1, options=BackboneOptions(train=train))
    run = Run(str(tmp_path/"out"), DP2O, Data(size=64, take=2), base)
    for method in (DP2O, SFT):
        with pytest.raises(ValueError, match="options.control.*srnb train base"): align(replace(run, method=method))
    assert not (tmp_path/"out").exists()


def test_the_command_refuses_it(bare, tmp_path, capsys):
    from PIL import Image
    Image.new("RGB", (20, 16), (90, 120, 60)).save(tmp_path/"a.png")
    line = ["upscale", str(tmp_path/"a.png"), "-o", str(tmp_path/"b.png"), "--steps", "1", "--model"]
    assert main([*line, str(bare["sd"])]) == 2
    said = capsys.readouterr().err
    assert "options.control" in said and "srnb train base" in said and not (tmp_path/"b.png").exists()


def test_a_policy_of_ones_own_that_forgets_its_input(tmp_path, idle):
    (tmp_path/"mine.py").write_text("""
import torch
from srnb.policies import Policy
class Deaf(torch.nn.Module):
    stride = 8
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Conv2d(3, 3, 3, padding=1)
    def forward(self, x, sigma, lq): return self.inner(x)
def base(): return Policy(Deaf())
""")
    run = Run(str(tmp_path/"out"), SFT, Data(size=64, take=2), Base(f"{tmp_path}/mine.py:base"))
    with pytest.raises(ValueError, match="mine.py:base.*two low-quality images"): align(run)
    assert not (tmp_path/"out").exists()


def test_what_ships_reads(tiny):
    for name in ("small", "onestep", "first", tiny): assert influence(from_pretrained(name)) > .01


def test_a_saved_policy_without_influence(tmp_path):
    "The regression of a base, its evaluation and CTMSR refuse it, too"
    from srnb.nets import SmallUNet, UNetConfig
    from srnb.onestep import BaseRun, evaluate_base, train_base
    from srnb.policies import Policy
    net = SmallUNet(UNetConfig((16, 16), (1, 1), 16))
    with torch.no_grad():
        for p in net.parameters(): p.zero_()
    save_pretrained(Policy(net), tmp_path/"deaf"/"policy")
    with pytest.raises(ValueError, match="two low-quality images"):
        evaluate_base(tmp_path/"deaf", Data(size=64, take=2))
    with pytest.raises(ValueError, match="two low-quality images"):
        train_base(BaseRun(str(tmp_path/"out"), init=str(tmp_path/"deaf"), versions=1, max_side=160))
    assert not (tmp_path/"out").exists() and not (tmp_path/"deaf"/"held_out").exists()
