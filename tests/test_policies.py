"Adapters as PEFT itself reads them, and the shipped base"
import json
import weakref

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open

from srnb.core import DoesNotFit, check_close, generator
from srnb.data import embedded_photos
from srnb.nets import SmallUNet, UNetConfig, load_net, save_net
from srnb.paths import Flow, Shift, VPEps, VPV, sample_ab2, sample_ddim, sample_ddpm
from srnb.policies import (PixelCodec, Policy, ResidualCodec, base_print, from_pretrained, load_adapter, save_adapter,
                           save_pretrained)


def toy():
    net, g = SmallUNet(UNetConfig((16, 16), (1, 1), 16)), generator(0)
    with torch.no_grad():
        for p in net.parameters(): p.copy_(torch.randn(p.shape, generator=g)*.1)
    return net


def test_peft_reads_the_adapter(tmp_path):
    "An adapter that we wrote gives, through PEFT's own loader, what the policy predicts"
    policy, g = Policy(toy()), generator(1)
    for p in policy.add_lora(3, alpha=6): p.data.normal_(0, .1, generator=g)
    save_adapter(policy, tmp_path/"a")
    x, sigma, lq = torch.randn(2, 3, 32, 32, generator=g), torch.tensor([.2, .9]), torch.rand(2, 3, 8, 8, generator=g)
    theirs = PeftModel.from_pretrained(toy(), tmp_path/"a")
    with torch.no_grad():
        again = load_adapter(Policy(toy()), tmp_path/"a")
        wanted = policy.predict(x, sigma, lq)
        check_close(theirs(x, sigma, lq), wanted, atol=1e-6)
        check_close(again.predict(x, sigma, lq), wanted, atol=1e-6)


def test_adapter_does_not_depend_on_the_global_seed():
    def weights(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return [p.detach().clone() for p in Policy(toy()).add_lora(3, seed=7)]
    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


@pytest.mark.parametrize("path", [Flow(), VPEps()], ids=["own", "converted"])
def test_an_answer_of_another_shape_is_refused(path):
    class One(torch.nn.Conv2d):
        def forward(self, x, sigma, lq): return super().forward(x)
    x, sigma = torch.randn(2, 3, 16, 16, generator=generator(0)), torch.full((2,), .5)
    with pytest.raises(ValueError, match=r"\(2, 3, 16, 16\) with \(2, 1, 16, 16\)"):
        Policy(One(3, 1, 1), path).predict(x, sigma, None)
    assert Policy(One(3, 3, 1), path).predict(x, sigma, None).shape == x.shape


class Mine(SmallUNet): pass


def test_own_network(tmp_path):
    "A policy with a network of the reader's own comes back when the class is passed, on any path"
    net = Mine(UNetConfig((16, 16), (1, 1), 16))
    save_pretrained(Policy(net, codec=ResidualCodec(.05)), tmp_path)
    with pytest.raises(ValueError, match=f"is of '{__name__}:Mine', .*net=Mine"): from_pretrained(tmp_path)
    again = from_pretrained(tmp_path, VPEps(), net=Mine)
    assert type(again.net) is Mine and again.path == VPEps() and again.codec == ResidualCodec(.05)
    for a, b in zip(again.net.parameters(), net.parameters(), strict=True): assert torch.equal(a, b)
    with pytest.raises(ValueError, match="is of 'SmallUNet', not of net=Mine"): from_pretrained("small", net=Mine)


@pytest.mark.parametrize("path, codec", [(VPV(), ResidualCodec()), (Shift(sigma_max=.5), PixelCodec()),
                                         (Flow(), PixelCodec()), (Shift(), ResidualCodec())])
def test_what_a_file_cannot_hold_is_not_written(path, codec, tmp_path):
    with pytest.raises(ValueError, match="trained on Flow or Shift, got 'VPV'|holds Flow.*got (Flow|Shift)"):
        save_pretrained(Policy(toy(), path, path, codec), tmp_path/"p")
    assert not (tmp_path/"p").exists()


@pytest.mark.parametrize("field, message", [(dict(trained_on="Flaw"), "on Flow or Shift, got 'Flaw'"),
                                            (dict(sampler="dim"), "sampled with 'dim', none of ddim")])
def test_misspelt_policy_file(field, message, tmp_path):
    save_pretrained(Policy(toy()), tmp_path)
    file = tmp_path/"policy.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | field))
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"): from_pretrained(tmp_path)


def test_shipped_base(tmp_path):
    "bf16 on disk, float32 in use, under its share of the package, finite and in range on a photograph of odd shape"
    policy = from_pretrained("small")
    folder = save_net(policy.net, tmp_path, torch.bfloat16)
    assert (folder/"model.safetensors").stat().st_size < 13e6
    with safe_open(folder/"model.safetensors", "pt") as f:
        assert all(f.get_slice(k).get_dtype() == "BF16" for k in f.keys())
    with torch.no_grad():
        for a, b in zip(load_net(folder).parameters(), policy.net.parameters(), strict=True): check_close(a, b)
    photo = embedded_photos("held_out")[0].read()[None, :, :48, :80]
    lq = torch.nn.functional.avg_pool2d(photo, 4)
    sr = policy.sample(lq, [0], steps=2)
    assert sr.shape == (1, 1, 3, 48, 80) and 0 <= sr.min() and sr.max() <= 1
    assert (sr[0, 0]-photo[0]).square().mean() < .02


def test_a_policy_keeps_its_sampler(tmp_path):
    "Written, read, on another path too; a file without one is DDIM's, an unknown one is refused"
    import json
    lq = torch.rand(1, 3, 8, 8, generator=generator(0))
    policy = from_pretrained(save_pretrained(Policy(toy(), sampler=sample_ab2), tmp_path/"p"))
    assert policy.sampler is sample_ab2 and from_pretrained(tmp_path/"p", VPV()).sampler is sample_ab2
    own, ab2, ddim = (policy.sample(lq, [1], steps=4, sampler=s) for s in (None, sample_ab2, sample_ddim))
    assert torch.equal(own, ab2) and not torch.equal(own, ddim)
    file = tmp_path/"p"/"policy.json"
    meta = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in meta.items() if k != "sampler"}))
    assert from_pretrained(tmp_path/"p").sampler is sample_ddim
    file.write_text(json.dumps(meta | dict(sampler="heun")))
    with pytest.raises(ValueError, match="'heun', none of ddim, ab2, ddpm"): from_pretrained(tmp_path/"p")
    with pytest.raises(ValueError, match="this one has mine"):
        def mine(): pass
        save_pretrained(Policy(toy(), sampler=mine), tmp_path/"q")


def test_shipped_base_has_not_seen_the_held_out_photographs():
    from srnb.policies import policy_folder
    from srnb.runs import check_unseen
    seen, below = (json.loads((policy_folder(o)/"photos.json").read_text()) for o in ("small", "onestep"))
    assert len(seen) > 500 and {*below} <= {*seen} # also what the network below it has seen
    check_unseen(policy_folder("small"), embedded_photos("held_out"))


def test_a_bases_record_is_of_its_weights(root):
    "Sampler, and one sample of one photograph drawn again"
    from srnb.core import read_run
    from srnb.data import make_pair
    from srnb.degrade import RESSHIFT_TEST
    from srnb.rewards import PSNR_Y, score_group
    config, table = read_run(root/"nbs/_records/pictures")
    p, policy, photo = config["params"], from_pretrained("small"), embedded_photos("held_out")[0]
    assert policy.sampler is sample_ab2 and policy.restorer.name == "onestep"
    lq, gt = make_pair(photo, p["size"], RESSHIFT_TEST)
    again = score_group([PSNR_Y], policy.sample(lq[None], [0], steps=p["steps"])[0], gt)["psnr_y"]
    recorded = table.query(f"image == '{photo.id}' and degradation == 'resshift_test' and metric == 'psnr_y'")
    assert abs(again-recorded.set_index("variant").value["small"]) < .02 # the record's arithmetic is bfloat16


def test_an_adapter_goes_onto_its_own_base_alone(tmp_path):
    policy = from_pretrained("small")
    for p in policy.add_lora(2): p.data.normal_()
    save_adapter(policy, tmp_path/"a")
    assert json.loads((tmp_path/"a"/"adapter_config.json").read_text())["base_model_name_or_path"] == "small"
    load_adapter(from_pretrained("small", dtype=torch.bfloat16), tmp_path/"a") # the precision of arithmetic may differ
    again = from_pretrained("small")
    next(again.net.parameters()).data.mul_(1.01)
    shallower = from_pretrained(save_pretrained(Policy(toy()), tmp_path/"shallower"))
    for other in (again, from_pretrained("onestep"), shallower):
        with pytest.raises(ValueError, match=f"was trained on small .*this is {other.name} .*its own base"):
            load_adapter(other, tmp_path/"a")
        assert not hasattr(other.net, "peft_config") # nothing was put on it


@pytest.mark.parametrize("name, said", [
    ("onestp", "no policy 'onestp': .*did you mean 'onestep'"), (".", "holds no policy"),
    ("smal", "did you mean 'small'"), ("first", "there is no such folder; there is small, onestep, a folder"),
    ("run", "run holds an adapter: name its base")])
def test_a_name_that_is_no_policy_is_answered_with_what_there_is(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"run"/"adapter").mkdir(parents=True)
    with pytest.raises((FileNotFoundError, ValueError), match=said): from_pretrained(name)


def test_the_folder_of_a_run_stands_for_the_policy_that_it_trained(tmp_path):
    save_pretrained(from_pretrained("small"), tmp_path/"run"/"policy")
    assert from_pretrained(tmp_path/"run").source == tmp_path/"run"/"policy"


@pytest.mark.parametrize("part", ["head", "middle", "last"])
def test_the_print_of_a_base_sees_every_tensor_and_no_adapter(part):
    policy = from_pretrained("small")
    before, names = base_print(policy), [n for n, _ in policy.net.named_parameters()]
    name = names[dict(head=0, middle=len(names)//2, last=-1)[part]]
    with torch.no_grad(): dict(policy.net.named_parameters())[name].add_(.01)
    moved = base_print(policy)
    for p in policy.add_lora(2): p.data.normal_()
    assert before != moved == base_print(policy)


class Narrow(torch.nn.Module):
    "A network in a memory that has room for few states at once"
    def __init__(self, most):
        super().__init__()
        self.net, self.most, self.asked, self.held, self.stride = toy(), most, [], [], 2

    def forward(self, x, sigma, cond):
        assert all(o() is None for o in self.held), "what did not fit is still in memory"
        self.asked.append(len(x))
        if len(x) > self.most:
            large = torch.empty(len(x))
            self.held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return self.net(x, sigma, cond)


@pytest.mark.parametrize("most, asked", [(1, [7, 3, 1, *[1]*6]), (2, [7, 3, 1, *[1]*6]), (3, [7, 3, 3, 1]), (7, [7])])
def test_a_batch_that_does_not_fit_is_halved(most, asked):
    "Samples are those of an ancestral sampler that had room; the policy keeps what fits"
    policy, lq = Policy(Narrow(most), VPEps()), torch.rand(1, 3, 8, 8, generator=generator(1))
    wanted = Policy(toy(), VPEps()).sample(lq, range(7), 1, sample_ddpm)
    check_close(policy.sample(lq, range(7), 1, sample_ddpm, batch=7), wanted, atol=1.01/255)
    fits = max(n for n in asked if n <= most)
    assert policy.net.asked == asked and policy.batch == (fits if len(asked) > 1 else 0)
    policy.net.asked.clear()
    policy.sample(lq, range(7), 1, sample_ddpm)
    assert set(policy.net.asked) <= {fits, 7 % fits or fits, 1}


def test_a_sample_that_does_not_fit():
    policy, lq = Policy(Narrow(0)), torch.rand(1, 3, 8, 8, generator=generator(1))
    policy.batch = 4
    with pytest.raises(DoesNotFit, match=r"not even one sample .* options.tile_vae.*2.00 GiB"):
        policy.sample(lq, range(3), 1)
    assert policy.net.asked == [3, 1] and issubclass(DoesNotFit, MemoryError)
