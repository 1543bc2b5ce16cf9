"An adapter's strength: from the base over the adapter as it was trained to beyond, without training again"
import json
from pathlib import Path

import pytest
import torch

from srnb.command import main
from srnb.core import check_close, generator
from srnb.curation import fingerprint
from srnb.images import policy_model, upscale
from srnb.nets import SmallUNet, UNetConfig
from srnb.policies import Policy, drop_adapters, from_pretrained, load_adapter, save_adapter

g = generator(1)
x, sigma = torch.randn(2, 3, 32, 48, generator=g), torch.tensor([.2, .9])
lq = torch.rand(2, 3, 8, 12, generator=g)


def toy():
    net, g = SmallUNet(UNetConfig((16, 16), (1, 1), 16)), generator(0)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g)*.1)
    return Policy(net)


def answer(policy):
    with torch.no_grad(): return policy.predict(x, sigma, lq)


def moved(params, seed=2):
    g = generator(seed)
    with torch.no_grad():
        for p in params: p.add_(.1*torch.randn(p.shape, generator=g))


@pytest.fixture(params=["low rank", "copy"])
def adapter(request, tmp_path):
    "(folder, what the policy with it predicts)"
    policy = toy()
    moved(policy.add_lora(3, alpha=6) if request.param == "low rank" else policy.add_copy("embed"))
    return save_adapter(policy, tmp_path/"a"), answer(policy)


def test_ends_are_exact(adapter):
    "0 is the base and 1 the adapter, bit for bit; between them lie neither"
    folder, wanted = adapter
    assert torch.equal(answer(load_adapter(toy(), folder, strength=1)), wanted)
    assert torch.equal(answer(load_adapter(toy(), folder)), wanted)
    none = load_adapter(toy(), folder, strength=0)
    assert torch.equal(answer(none), answer(toy())) and none.adapters == {"policy"}
    with none.using("policy"): assert torch.equal(answer(none), answer(toy()))
    half, more = (answer(load_adapter(toy(), folder, strength=s)) for s in (.5, 2))
    assert all((a-b).abs().max() > 1e-3 for a, b in ((half, wanted), (half, answer(toy())), (more, wanted)))


def test_weights_are_interpolated(tmp_path):
    "Every weight of the network, both kinds of adapters in one policy"
    policy = toy()
    moved(policy.add_copy("embed", "embedding"))
    moved(policy.add_lora(3, alpha=6), 3)
    for name in ("embedding", "policy"): save_adapter(policy, tmp_path/name, name)
    half = load_adapter(toy(), tmp_path/"policy", strength=.25) # brings the copy, as it was trained
    plain = toy()
    weights = dict(plain.net.named_parameters())
    with torch.no_grad():
        for path, layer in ((n, m) for n, m in policy.net.named_modules() if "policy" in getattr(m, "lora_A", ())):
            b, a = layer.lora_B["policy"].weight, layer.lora_A["policy"].weight
            change = .25*2*torch.einsum("orhw,rikl->oikl", b, a)
            weights[path.removeprefix("base_model.model.") + ".weight"].add_(change)
        whole = load_adapter(toy(), tmp_path/"embedding", "embedding")
        copied = whole.net.base_model.model.embed.modules_to_save["embedding"]
        for p, q in zip(plain.net.embed.parameters(), copied.parameters(), strict=True): p.copy_(q)
    check_close(answer(half), answer(plain), atol=1e-3)
    assert (answer(half)-answer(load_adapter(toy(), tmp_path/"policy"))).abs().max() > 1


def test_a_copy_is_interpolated(tmp_path):
    policy = toy()
    moved(policy.add_copy("embed"))
    save_adapter(policy, tmp_path/"a")
    part = policy.net.base_model.model.embed
    want = toy()
    for p, a, b in zip(want.net.embed.parameters(), part.original_module.parameters(),
                       part.modules_to_save["policy"].parameters(), strict=True):
        p.data.copy_(a + 1.75*(b-a))
    check_close(answer(load_adapter(toy(), tmp_path/"a", strength=1.75)), answer(want), atol=1e-3)


def test_below_keeps_its_strength(tmp_path):
    "What an adapter was trained upon stays as it was: 0 is the reference"
    policy = toy()
    moved(policy.add_lora(3, name="reference", seed=5), 4)
    start = answer(policy)
    moved(policy.add_lora(3, seed=6), 5)
    save_adapter(policy, tmp_path/"a")
    again = load_adapter(toy(), tmp_path/"a", strength=0)
    check_close(answer(again), start, atol=1e-6)
    assert again.strength == {"policy": 0} and again.adapters == {"policy", "reference"}
    with again.reference(): check_close(answer(again), start, atol=1e-6)
    save_adapter(policy, tmp_path/"r", "reference")
    weak = load_adapter(toy(), tmp_path/"r", "reference", strength=.5)
    with pytest.raises(ValueError, match="trained upon another adapter 'reference'"): load_adapter(weak, tmp_path/"a")


@pytest.mark.parametrize("strength", [-.1, 2.1, float("nan"), float("inf"), "1", None])
def test_refused(adapter, strength):
    policy = toy()
    with pytest.raises(ValueError, match=r"strength must be a number in \[0, 2\].*0 is the base"):
        load_adapter(policy, adapter[0], strength=strength)
    assert not policy.adapters # nothing has happened


@pytest.mark.parametrize("more", [dict(use_dora=True), dict(bias="all"), dict(peft_type="LOHA")])
def test_what_is_no_plain_lora(adapter, more):
    "0 would not be the base"
    file = adapter[0]/"adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    with pytest.raises(ValueError, match="its strength cannot be changed.*strength 1"):
        load_adapter(toy(), adapter[0], strength=.5)


def test_not_trained_nor_written(adapter, tmp_path):
    with pytest.raises(ValueError, match="is trained has strength 1, got 0.5"):
        load_adapter(toy(), adapter[0], train=True, strength=.5)
    policy = load_adapter(toy(), adapter[0], strength=.5)
    with pytest.raises(ValueError, match="strength 0.5.*copy the folder"): save_adapter(policy, tmp_path/"b")
    with pytest.raises(ValueError, match="'policy' has 0.5: load that with strength 1"): policy.add_lora(2, name="upon")
    assert not (tmp_path/"b").exists()


def test_records_tell(adapter):
    "Another strength is another fingerprint, and another source of a benchmark"
    def of(*strength): return load_adapter(toy(), adapter[0], **dict(zip(["strength"], strength, strict=False)))
    prints = [fingerprint(of(*s)) for s in ((), (1,), (.5,), (0,), (2,))]
    assert prints[0] == prints[1] and len({*prints}) == 4
    assert "strength policy 0.5" in policy_model(of(.5)).identity and "strength" not in policy_model(of(1)).identity
    policy = of(.5)
    drop_adapters(policy)
    assert policy.strength == {} and fingerprint(policy) == fingerprint(toy())
    load_adapter(policy, adapter[0])
    assert fingerprint(policy) == prints[0]


def test_command(tmp_path, tiny, monkeypatch, capsys):
    from srnb.core import read_image, write_image
    monkeypatch.chdir(tmp_path)
    write_image("a.png", torch.rand(3, 12, 16, generator=generator(0)))
    policy = from_pretrained(tiny)
    moved(policy.add_lora(2))
    save_adapter(policy, "adapter")
    line = ["upscale", "a.png", "--dtype", "float32", "--steps", "2", "--force", "-o"]
    def made(*more):
        assert main([*line, "b.png", *more]) == 0, capsys.readouterr().err
        return read_image("b.png")
    base, one = made("--model", str(tiny)), made("--adapter", "adapter")
    assert torch.equal(made("--adapter", "adapter", "--strength", "0"), base) and not torch.equal(base, one)
    assert torch.equal(made("--adapter", "adapter", "--strength", "1"), one)
    half = upscale(read_image("a.png"), load_adapter(from_pretrained(tiny), "adapter", strength=.5), steps=2)
    assert torch.equal(made("--adapter", "adapter", "--strength", ".5"), half)
    assert not torch.equal(half, base) and not torch.equal(half, one)
    for more, text in ((["--strength", ".5"], "--strength is that of an adapter: name one by --adapter"),
                       (["--adapter", "adapter", "--strength", "3"], "--strength must lie in [0, 2], got 3"),
                       (["--adapter", "adapter", "--strength", "nan"], "--strength must lie in [0, 2], got nan"),
                       (["--adapter", "adapter", "--strength", "x"], "invalid float")):
        assert main([*line, "c.png", *more]) == 2 and not Path("c.png").exists()
        assert text in capsys.readouterr().err


def test_strength_is_set_and_not_multiplied(adapter):
    "A name that is there is read anew"
    folder, wanted = adapter
    policy = load_adapter(toy(), folder, strength=.5)
    half = answer(policy)
    for s in (0, .5, 2, .5): load_adapter(policy, folder, strength=s)
    assert torch.equal(answer(policy), half) and policy.strength == {"policy": .5}
    assert torch.equal(answer(load_adapter(policy, folder)), wanted) and not policy.strength and not policy.off
