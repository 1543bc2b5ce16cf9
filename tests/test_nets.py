"Every network that a config.json may name: size, boundary, files, gradients, inputs"
import json
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from srnb import nets
from srnb.core import check_close, generator
from srnb.nets import (NearestConv, OneStepConfig, OneStepUNet, RRDBConfig, SmallUNet, SwinBlock, SwinConfig,
                       SwinUNet, UNetConfig, WindowAttention, boundary_scalings, load_net, save_net)

TINY = dict(SmallUNet=UNetConfig((16, 24), (1, 1), 16, 8, 1), OneStepUNet=OneStepConfig((16, 24), (1, 1), 16, 8),
            SwinUNet=SwinConfig((16, 24), 1, emb=32, width=16, heads=2, window=4), RRDBNet=RRDBConfig(8, 4, 2, 12))
KINDS = [pytest.param(k, id=k) for k in TINY]
ONE_STEP = [pytest.param(k, id=k) for k in TINY if k != "SmallUNet"]


def tiny(kind:str, seed:int=0)->nn.Module:
    "A small network of this kind, no weight zero"
    g, net = generator(seed), getattr(nets, kind)(TINY[kind])
    with torch.no_grad():
        for p in net.parameters():
            scale = .7/p[0].numel()**.5 if p.ndim > 1 else .1
            p.copy_(torch.randn(p.shape, generator=g)*scale)
        for m in net.modules():
            if isinstance(m, nn.GroupNorm): m.weight.add_(1)
    return net.eval()


def inputs(batch=2, h=6, w=10, seed=1): # x, sigma, lq
    g = generator(seed)
    x, sigma = torch.randn(batch, 3, 4*h, 4*w, generator=g), torch.linspace(.3, 1, batch)
    return x, sigma, torch.rand(batch, 3, h, w, generator=g)


def test_every_kind_is_here():
    assert set(TINY) == {k for k, o in vars(nets).items() if hasattr(o, "config_class")}
    for kind, config in TINY.items(): assert getattr(nets, kind).config_class is type(config)


def test_published_size():
    "CTMSR's parameter count, without and with the six convolutions beside changes of resolution; nothing is allocated"
    with torch.device("meta"):
        assert sum(p.numel() for p in SwinUNet().parameters()) == 171_518_529
        assert sum(p.numel() for p in SwinUNet(SwinConfig(side=False)).parameters()) == 170_742_273
        assert SwinUNet().stride == 32


@pytest.mark.parametrize("kind", ONE_STEP)
def test_boundary(kind):
    "At sigma = 0 the answer is the input, to the bit, sample by sample"
    x, _, lq = inputs()
    with torch.no_grad(): out = tiny(kind)(x, torch.tensor([0., .5]), lq)
    assert torch.equal(out[0], x[0]) and (out[1]-x[1]).abs().max() > .1


def test_scalings():
    "The release's values at the levels of a training"
    got = torch.stack(boundary_scalings(torch.tensor([0., 1/4, 1/3, 1.])), 1)
    wanted = [[1, 0, -1.5537], [.0385, .9806, -.3446], [.0220, .9889, -.2732], [.00249, .99875, .0005]]
    check_close(got, torch.tensor(wanted), atol=6e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_files(kind, tmp_path):
    "A network comes back from its folder to the bit, in bf16 nearly"
    net, (x, sigma, lq) = tiny(kind), inputs()
    again = load_net(save_net(net, tmp_path/"a"))
    assert again.config == net.config and not again.training
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    with torch.no_grad():
        whole = net(x, sigma, lq)
        assert torch.equal(again(x, sigma, lq), whole)
        lower = load_net(save_net(net, tmp_path/"b", torch.bfloat16))
        check_close(lower(x, sigma, lq), whole, atol=.05*whole.abs().max())
    other = json.loads((tmp_path/"a/config.json").read_text()) | dict(emb=8)
    (tmp_path/"a/config.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="does not fit"): load_net(tmp_path/"a")


STRANGE = ["Other", "smallunet", "OneStep", "WindowAttention", "nn", "load_net", "__builtins__", None]


@pytest.mark.parametrize("kind", STRANGE)
def test_no_network_of_this_room(kind, tmp_path):
    "A misspelt name, a class without a config_class, and what is no network at all"
    save_net(tiny("OneStepUNet"), tmp_path)
    (tmp_path/"config.json").write_text(json.dumps(dict(kind=kind)))
    with pytest.raises(ValueError, match=f"config.json is of '{kind}', none of SmallUNet, OneStepUNet, SwinUNet"):
        load_net(tmp_path)


def test_misspelt_field(tmp_path):
    save_net(tiny("OneStepUNet"), tmp_path)
    (tmp_path/"config.json").write_text(json.dumps(dict(kind="OneStepUNet", chanels=[16, 24])))
    with pytest.raises(ValueError, match="config.json does not fit OneStepUNet: .*'chanels'"): load_net(tmp_path)


@dataclass(frozen=True)
class MineConfig:
    width:int = 5


class Mine(nn.Conv2d):
    config_class = MineConfig
    def __init__(self, config):
        super().__init__(3, config.width, 1)
        self.config = config


class NoConfig(Mine): config_class = None


def test_own_network(tmp_path):
    "Its file names module and class, and is read with the class alone"
    folder, mine = save_net(Mine(MineConfig(7)), tmp_path/"own"), f"{__name__}:Mine"
    assert json.loads((folder/"config.json").read_text()) == dict(kind=mine, width=7)
    with pytest.raises(ValueError, match=f"config.json is of '{mine}', .*net=Mine"): load_net(folder)
    again = load_net(folder, net=Mine)
    assert type(again) is Mine and again.config == MineConfig(7)
    with pytest.raises(ValueError, match=f"is of '{mine}', not of net=SmallUNet"): load_net(folder, net=SmallUNet)
    with pytest.raises(TypeError, match="must be a class"): load_net(folder, net=again)


def test_a_file_imports_nothing(tmp_path, monkeypatch):
    "The module that a config.json names stays unread, whether a class is passed or not"
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/"trap.py").write_text("raise SystemExit('imported')")
    save_net(Mine(MineConfig(7)), tmp_path)
    (tmp_path/"config.json").write_text(json.dumps(dict(kind="trap:Mine", width=7)))
    with pytest.raises(ValueError, match="is of 'trap:Mine'"): load_net(tmp_path)
    assert type(load_net(tmp_path, net=Mine)) is Mine and "trap" not in sys.modules


def test_own_network_from_another_module(tmp_path):
    "The same class may be __main__'s when it is written and a file's when it is read; so may one inside a function"
    class Inner(Mine): pass
    for own, kind in ((Mine, "__main__:Mine"), (Inner, f"{__name__}:{Inner.__qualname__}"), (Mine, "Mine")):
        save_net(own(MineConfig(4)), tmp_path)
        if own is Mine: (tmp_path/"config.json").write_text(json.dumps(dict(kind=kind, width=4)))
        assert json.loads((tmp_path/"config.json").read_text())["kind"] == kind
        assert type(load_net(tmp_path, net=own)) is own


def test_config_class_is_missing(tmp_path):
    "Said before anything is written, and when a file is read with such a class"
    with pytest.raises(ValueError, match="NoConfig needs a class attribute config_class"):
        save_net(NoConfig(MineConfig()), tmp_path/"none")
    assert not (tmp_path/"none").exists()
    save_net(Mine(MineConfig()), tmp_path/"mine")
    with pytest.raises(ValueError, match="NoConfig needs a class attribute config_class"):
        load_net(tmp_path/"mine", net=NoConfig)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind):
    "Every parameter is trained by a loss on the answer (and on the mean, where there is one)"
    net, (x, sigma, lq) = tiny(kind).train(), inputs()
    if kind == "SmallUNet": sum(o.square().mean() for o in net(x, sigma, lq, return_mean=True)).backward()
    else: net(x, sigma, lq).square().mean().backward()
    def trained(p): return p.grad is not None and p.grad.isfinite().all() and p.grad.abs().max() > 0
    none = [n for n, p in net.named_parameters() if not trained(p)]
    assert not none, none


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_mix(kind):
    "A sample's answer does not depend on the rest of its batch, nor on the memory format"
    net, (x, sigma, lq) = tiny(kind), inputs(3)
    with torch.no_grad():
        whole = net(x, sigma, lq)
        check_close(net(x[1:2], sigma[1:2], lq[1:2]), whole[1:2], atol=1e-5)
        last = dict(memory_format=torch.channels_last)
        check_close(net.to(**last)(x.to(**last), sigma, lq), whole, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind):
    "Under autocast, and with its own weights in bf16 too, the answer is nearly the same and the boundary holds"
    net, (x, sigma, lq) = tiny(kind), inputs()
    with torch.no_grad():
        whole = net(x, sigma, lq)
        for o in (net, net.bfloat16()):
            with torch.autocast("cpu", torch.bfloat16): half = o(x, sigma, lq)
            check_close(half.float(), whole, atol=.1*whole.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_bad_inputs(kind):
    net, (x, sigma, lq) = tiny(kind), inputs()
    with pytest.raises(ValueError, match=f"multiples of {net.stride} pixels"): net(x[..., :38], sigma, lq[..., :9])
    with pytest.raises(ValueError, match="4 times lq"): net(x, sigma, lq[..., :8])


def test_bad_configs():
    with pytest.raises(ValueError, match="scale 3"): SwinConfig(scale=3)
    with pytest.raises(ValueError, match="from 1 to 8, got 9"): OneStepConfig(scale=9)
    with pytest.raises(ValueError, match="one number of blocks"): OneStepConfig((16, 16), (1,))
    with pytest.raises(ValueError, match="heads must divide width"): SwinConfig(heads=5)


def written_twice(net:SwinUNet, x, c_noise, lq): # the published network once more, from its description, in loops
    p, n, root = dict(net.named_parameters()), net.config.window, .5**.5
    def conv(name, x):
        kernel = p[f"{name}.weight"]
        return F.conv2d(x, kernel, p[f"{name}.bias"], padding=kernel.shape[-1]//2)
    def lin(name, x): return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]
    def silu(x): return x*torch.sigmoid(x)
    def norm(name, x): # groups of four channels, over the picture
        o = x.reshape(len(x), -1, 4, *x.shape[2:])
        o = (o - o.mean((2, 3, 4), keepdim=True))/(o.var((2, 3, 4), unbiased=False, keepdim=True) + 1e-6).sqrt()
        return o.reshape(x.shape)*p[f"{name}.weight"][:, None, None] + p[f"{name}.bias"][:, None, None]
    def attend(name, x): # (C,h,w), one window after the other
        out, (c, h, w), heads = torch.empty_like(x), x.shape, net.config.heads
        bias = p[f"{name}.bias"].reshape(2*n-1, 2*n-1, heads)
        for top in range(0, h, n):
            for left in range(0, w, n):
                part = x[:, top:top+n, left:left+n]
                at = torch.cartesian_prod(torch.arange(part.shape[1]), torch.arange(part.shape[2]))
                off = at[:, None] - at + n-1 # query minus key
                q, k, v = lin(f"{name}.qkv", part.flatten(1).T).reshape(-1, 3, heads, c//heads).unbind(1)
                score = torch.einsum("ihd,jhd->hij", q, k)/(c//heads)**.5
                score = score + bias[off[..., 0], off[..., 1]].permute(2, 0, 1)
                got = torch.einsum("hij,jhd->ihd", score.softmax(-1), v).flatten(1)
                out[:, top:top+n, left:left+n] = lin(f"{name}.proj", got).T.reshape(part.shape)
        return out
    def layer(name, x):
        t = conv(f"{name}.enter", x)
        t = t + torch.stack([attend(f"{name}.attention", o) for o in norm(f"{name}.norm1", t)])
        m = F.gelu(lin(f"{name}.mlp.0", norm(f"{name}.norm2", t).movedim(1, -1)))
        return (x + conv(f"{name}.mix", conv(f"{name}.leave", t + lin(f"{name}.mlp.2", m).movedim(-1, 1))))*root
    def block(name, x, resample=lambda x: x, swin=False):
        h = conv(f"{name}.conv1", resample(silu(norm(f"{name}.norm1", x))))
        h = h + lin(f"{name}.shift", emb)[:, :, None, None]
        h = conv(f"{name}.conv2", silu(norm(f"{name}.norm2", h)))
        side = conv(f"{name}.skip", resample(x)) if f"{name}.skip.weight" in p else resample(x)
        return layer(f"{name}.swin", (side + h)*root) if swin else (side + h)*root
    def half(x): return (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2] + x[..., 1::2, 1::2])/4
    def twice(x): return x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    m = net.config.channels[0]//2
    angle = c_noise[:, None]*torch.tensor([1e-4**(i/(m-1)) for i in range(m)], dtype=x.dtype)
    emb = silu(lin("embed.2", silu(lin("embed.0", torch.cat([angle.sin(), angle.cos()], 1)))))
    folded = x.reshape(len(x), 3, lq.shape[-2], 4, lq.shape[-1], 4).permute(0, 1, 3, 5, 2, 4)
    folded = folded.reshape(len(x), 48, *lq.shape[-2:])
    a = conv("head", torch.cat([folded, 2*lq - 1], 1)) # two levels, one block each
    b = block("down.0", a, swin=True)
    c = block("down.1", b, half)
    d = block("down.2", c, swin=True)
    h = block("middle.1", block("middle.0", d, swin=True))
    h = block("up.1", torch.cat([block("up.0", torch.cat([h, d], 1)), c], 1), swin=True)
    h = block("up.3", torch.cat([block("up.2", h, twice), b], 1))
    h = conv("out", silu(norm("norm", block("up.4", torch.cat([h, a], 1), swin=True))))
    for k in range(2): h = F.leaky_relu(conv(f"enlarge.{k}", twice(h)), .2)
    return conv("tail", h)


@pytest.mark.parametrize("size", [(8, 16), (6, 10)])
def test_published_layout(size):
    "The network equals its description, written a second time in loops; windows whole and cut"
    net, (x, _, lq) = tiny("SwinUNet", 6).double(), inputs(2, *size)
    x, lq, c_noise = x.double(), lq.double(), torch.tensor([-1.5, 0.], dtype=torch.float64)
    with torch.no_grad(): got, wanted = net.features(x, c_noise, lq), written_twice(net, x, c_noise, lq)
    check_close(got, wanted, atol=1e-6) # its angles are float32


def test_fresh_blocks():
    "A fresh block is the identity times the root of a half, once more after attention"
    x, emb, config = torch.randn(2, 16, 6, 10, generator=generator(7)), torch.zeros(2, 32), TINY["SwinUNet"]
    with torch.no_grad():
        for swin, factor in ((False, .5**.5), (True, .5)):
            check_close(SwinBlock(16, 16, config, swin=swin).eval()(x, emb), factor*x, atol=1e-4)


@pytest.mark.parametrize("size", [(8, 8), (8, 5), (3, 2)])
def test_windows_are_apart(size):
    "A window's answer stays when every other window changes, also where the border cuts windows"
    net, x = WindowAttention(8, 2, 4), torch.randn(1, *size, 8, generator=generator(2))
    other = torch.full_like(x, 9.)
    other[:, :4, :4] = x[:, :4, :4]
    with torch.no_grad():
        check_close(net(other)[:, :4, :4], net(x)[:, :4, :4], atol=1e-6)
        if size == (3, 2): # one cut window: the same as attention among its six places, with the bias of their offsets
            q, k, v = net.qkv(x.reshape(6, 8)).reshape(6, 3, 2, 4).permute(1, 2, 0, 3)
            at = torch.tensor([4*i + j for i in range(3) for j in range(2)])
            bias = net.bias[net.index[at][:, at]].permute(2, 0, 1)
            by_hand = net.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(0, 1).reshape(6, 8))
            check_close(net(x).reshape(6, 8), by_hand, atol=1e-6)


def test_relative_positions():
    "Two places that swap roles have opposite offsets; equal offsets share a bias"
    index = WindowAttention(8, 2, 4).index
    assert torch.equal(index + index.T, torch.full_like(index, 7*7-1)) and index.unique().numel() == 49
    assert index[0, 1] == index[5, 6] != index[0, 4] == index[5, 9]


def test_nearest_conv():
    "The enlarged picture's convolution and its gradients, computed before the enlargement"
    conv = NearestConv(6).double()
    x = torch.randn(2, 6, 3, 5, generator=generator(3), dtype=torch.float64, requires_grad=True)
    w = torch.randn(2, 6, 6, 10, generator=generator(4), dtype=torch.float64)
    plain = F.conv2d(F.interpolate(x, scale_factor=2), conv.weight, conv.bias, padding=1)
    inputs = [x, conv.weight, conv.bias]
    wanted = torch.autograd.grad((plain*w).sum(), inputs)
    check_close(conv(x), plain, atol=1e-12)
    got = torch.autograd.grad((conv(x)*w).sum(), inputs)
    for a, b in zip(got, wanted, strict=True): check_close(a, b, atol=1e-12)


def test_dropout_acts_in_training_only():
    net, (x, sigma, lq) = tiny("SwinUNet"), inputs()
    with torch.no_grad():
        assert torch.equal(net(x, sigma, lq), net(x, sigma, lq))
        net.train()
        assert not torch.equal(net(x, sigma, lq), net(x, sigma, lq))


def test_a_level_survives_the_norm():
    "Groups have at least four channels: with one channel a group, the norm would undo what the level adds"
    net, (x, _, lq) = tiny("SwinUNet"), inputs()
    assert all(m.num_channels//m.num_groups >= 4 for m in net.modules() if isinstance(m, nn.GroupNorm))
    with torch.device("meta"): norms = [m for m in SwinUNet().modules() if isinstance(m, nn.GroupNorm)]
    assert {m.num_groups for m in norms} == {32}
    with torch.no_grad(): near, far = (net.features(x, torch.full((2,), c), lq) for c in (0., -.35))
    assert (near-far).abs().mean() > 1e-3


def test_flow_starts_linear():
    "An untrained flow answers with the best linear estimate"
    x, _, lq = inputs(2)
    with torch.no_grad(): v = SmallUNet(TINY["SmallUNet"])(x, torch.tensor([0., 1.]), lq)
    check_close(v, torch.stack([-x[0], x[1]]), atol=1e-6)


def test_fresh_one_step_answers_with_the_enlargement():
    from srnb.core import bicubic
    x, _, lq = inputs()
    with torch.no_grad(): f = OneStepUNet(TINY["OneStepUNet"]).features(x, torch.zeros(2), lq)
    check_close(f, 2*bicubic(lq, x.shape[-2:])-1)
