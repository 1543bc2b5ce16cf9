"From equations to functions and tests, and back: this repository, then a small tree with one fault at a time"
import nbformat
import pytest
import refs
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook


# ---- this repository

@pytest.mark.parametrize("check", refs.CHECKS, ids=lambda o: o.__name__)
def test_repository(check, root):
    if problems := check(root): pytest.fail("\n".join(problems), pytrace=False)


def test_supervised_loss_is_flow_matching(tiny):
    "ASASR's (2) by hand, and zero for a network that knows the answer"
    from types import SimpleNamespace

    import torch

    from srnb.core import check_close, generator
    from srnb.onestep import sft_loss
    from srnb.pairs import seed_at
    from srnb.policies import from_pretrained

    class Pool:
        def patches(self, n, patch, g): return *(torch.rand(n, 3, s, s, generator=g) for s in (patch//4, patch)), None
    policy, run = from_pretrained(tiny), SimpleNamespace(batch=3, patch=64, seed=5)
    g = generator(seed_at(5, "sft", 2, 0))
    lq, gt, _ = Pool().patches(3, 64, g)
    z = policy.codec.encode(gt, lq)
    sigma, eps = policy.path.draw_sigma(3, g), torch.randn(z.shape, generator=g)
    s, target = sigma.view(-1, 1, 1, 1), eps-z
    x = (1-s)*z + s*eps
    with torch.no_grad():
        v, mean = policy.net(x, sigma, lq, return_mean=True)
        values, logs = sft_loss(Pool(), policy, run)(2, 0)
    check_close(values, ((v-target)**2).mean((1, 2, 3)) + ((mean-z)**2).mean((1, 2, 3)), rtol=1e-5)
    check_close(logs["flow"], ((v-target)**2).mean().item(), rtol=1e-5)
    assert values.min() > 0

    class Knows(torch.nn.Linear):
        def forward(self, x, sigma, lq, return_mean): return target, z
    policy.net = Knows(1, 1)
    check_close(sft_loss(Pool(), policy, run)(2, 0)[0], torch.zeros(3), atol=1e-10)


# ---- a small tree that passes, then one fault at a time

LISTS = """# References

## The ancestor [Wallace+ 2024]

| equation | in words | here |
|---|---|---|
| 14 | a loss | code |

## First [DP2O-SR]

| rule | in words | here |
|---|---|---|
| pair curation | best against worst | code |
| study | people | not here: nobody was asked |

## Second [ASASR]

| equation | in words | here |
|---|---|---|
| 1 | a line | code |
| 2 | a step | page [01](01_spectral.ipynb) |
| 3-47 | the rest | not here: not in this tree |

## Third [CTMSR]

| equation | in words | here |
|---|---|---|
| 1-25 | all | not here: not in this tree |
| Algorithm 3 | a loss | code |

## Fourth [Diffusion-DRO]

| equation | in words | here |
|---|---|---|
| 1-31 | all | not here: not in this tree |

## Other works

| cited as | work |
|---|---|
| Liu+ 2022 | Rectified flow |

## What cites nothing

| functions | why |
|---|---|
| `guard` | computes nothing |
"""

MODULE = '''"A room"
def line(x): "A line [Liu+ 2022; ASASR, eq. 1, A.2, release]"; return x
def guard(x): "Refuse"; return x
def pick(x): "Best and worst [DP2O-SR, pair curation]"; return x
def _own(x): return x
class Loss:
    "A loss of a pair [Wallace+ 2024, eq. 14]"
    def pull(self, x): "Its gradient [CTMSR, Algorithm 3]"; return x
class Other(Loss):
    "A guard too [Liu+ 2022]"
'''

def write(root, name, *cells):
    nb = new_notebook(cells=list(cells))
    for i, c in enumerate(nb.cells): c["id"] = f"{name.replace('_', '-')}-{i}"
    nbformat.write(nb, root/f"nbs/{name}.ipynb")

@pytest.fixture
def tree(tmp_path):
    root = tmp_path/"tree"
    for o in ("nbs", "srnb", "tests"): (root/o).mkdir(parents=True)
    write(root, "refs", new_markdown_cell(LISTS))
    write(root, "01_spectral", new_markdown_cell("# Room\n\nThe step (2)."), new_code_cell(f"#| export\n{MODULE}"),
          new_code_cell("check_close(line(1), 1)"), new_code_cell("%time line(2)"))
    (root/"srnb/spectral.py").write_text(MODULE)
    (root/"tests/test_a.py").write_text("import pytest\nfrom srnb.spectral import Other\nCASES = [Other]\n\n"
        "@pytest.fixture\ndef loss(): return Other()\n\ndef helper(x): return pick(x)\n\n"
        "def test_one(loss): assert loss.pull(helper(1))\n\ndef test_two(): assert CASES\n# Loss\n")
    return root

def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))

def lists(root, old, new): edit(root/"nbs/refs.ipynb", old, new)
def code(root, old, new): edit(root/"srnb/spectral.py", old, new)
def room(root, old, new): edit(root/"nbs/01_spectral.ipynb", old, new)

def test_tree_passes(tree): assert refs.problems(tree) == []

FAULTS = dict( # check, the name and value in its answer, what is done to the tree
    no_list=("list", "CTMSR", lambda r: lists(r, "Third [CTMSR]", "Third")),
    number_lost=("list", "ASASR, 47", lambda r: lists(r, "| 3-47 |", "| 3-46 |")),
    listed_twice=("list", "ASASR, 2", lambda r: lists(r, "| 3-47 |", "| 2-47 |")),
    no_state=("list", "pair curation", lambda r: lists(r, "best against worst | code", "best against worst | yes")),
    no_reason=("list", "study", lambda r: lists(r, "not here: nobody was asked", "not here: ")),
    page_without_link=("list", "ASASR, 2", lambda r: lists(r, "page [01](01_spectral.ipynb)", "page 01")),
    unknown_paper=("citations", "line cites Liu+ 2023", lambda r: code(r, "Liu+ 2022; A", "Liu+ 2023; A")),
    old_name=("citations", "pick cites Wu+ 2025", lambda r: code(r, "DP2O-SR", "Wu+ 2025")),
    unknown_number=("citations", "ASASR, 48", lambda r: code(r, "eq. 1,", "eqs. 1, 48,")),
    unknown_rule=("citations", "DP2O-SR, pairs", lambda r: code(r, "pair curation", "pairs")),
    list_lacks_it=("citations", "ASASR, 1", lambda r: lists(r, "| 1 | a line", "| one | a line")),
    list_denies_it=("citations", "not here: forgotten",
                    lambda r: lists(r, "a line | code", "a line | not here: forgotten")),
    no_equation=("citations", "pick cites DP2O-SR", lambda r: code(r, "DP2O-SR, pair curation", "DP2O-SR")),
    uncited_work=("citations", "Ho+ 2020", lambda r: lists(r, "| Liu+ 2022 |", "| Ho+ 2020 |")),
    no_function=("implemented", "ASASR, 1", lambda r: code(r, "ASASR, eq. 1", "ASASR, eq. 2")),
    no_algorithm=("implemented", "CTMSR, Algorithm 3", lambda r: code(r, " [CTMSR, Algorithm 3]", "")),
    no_page=("implemented", "09_gone", lambda r: lists(r, "(01_spectral.ipynb)", "(09_gone.ipynb)")),
    page_is_silent=("implemented", "(2)", lambda r: room(r, "(2).", "two.")),
    page_checks_nothing=("implemented", "01_spectral", lambda r: room(r, "check_close(line(1), 1)", "line(1)")),
    no_check=("exercised", "line", lambda r: room(r, "check_close(line(1), 1)", "line(1)")),
    no_test=("exercised", "pick", lambda r: edit(r/"tests/test_a.py", "pick(x)", "x")),
    helper_is_no_test=("exercised", "pick",
                       lambda r: edit(r/"tests/test_a.py", "loss.pull(helper(1))", "loss.pull(1)")),
    no_method_test=("exercised", "Loss.pull", lambda r: edit(r/"tests/test_a.py", "loss.pull(", "loss.push(")),
    no_subclass_test=("exercised", "Loss", lambda r: edit(r/"tests/test_a.py", "Other", "Else")),
    export_is_no_check=("exercised", "line",
                        lambda r: room(r, "check_close(line(1), 1)", "#| export\\ncheck_close(line(1), 1)")),
    uncovered=("covered", "guard", lambda r: lists(r, "`guard`", "guard")),
    helper_cites=("covered", "line", lambda r: lists(r, "`guard`", "`guard`, `line`")),
    helper_gone=("covered", "lost", lambda r: lists(r, "`guard`", "`guard`, `lost`")),
)

@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, tree):
    check, said, break_it = FAULTS[name]
    break_it(tree)
    found = getattr(refs, f"check_{check}")(tree)
    assert any(said in o for o in found), found

def test_every_check_is_seen_to_fail():
    assert {f"check_{o[0]}" for o in FAULTS.values()} == {o.__name__ for o in refs.CHECKS}

def test_page_not_numbered(tree):
    room(tree, "(2).", "two.")
    lists(tree, "page [01]", "page, unnumbered, [01]")
    assert refs.problems(tree) == []

def test_other_rooms_may_be_silent(tree, monkeypatch):
    lists(tree, "| `guard` | computes nothing |", "")
    assert refs.check_covered(tree)
    monkeypatch.setattr(refs, "RULED", ["paths"])
    assert refs.check_covered(tree) == []

def test_ruled_rooms_are_there(root): assert set(refs.RULED) <= set(refs.rooms(root))

@pytest.mark.parametrize("text, keys", [
    ("eq. 14", ["14"]), ("eqs. 4-6, 12", ["4", "5", "6", "12"]), ("Algorithms 1, 2", ["Algorithm 1", "Algorithm 2"]),
    ("eq. 18, Algorithm 3, release", ["18", "Algorithm 3", "release"]), ("16-18", ["16", "17", "18"])])
def test_expand(text, keys): assert refs.expand(text) == keys

def test_mentions():
    assert refs.mentions("(4)–(6), (12) to (13), f(x), eqs. 20-22 and 30.") == {*"4 5 6 12 13 20 21 22 30".split()}

def test_mapping(tree):
    room = "[01_spectral](01_spectral.ipynb)"
    assert refs.mapping("DP2O-SR", tree).splitlines()[2:] == [
        f"| pair curation | [`pick`](01_spectral.ipynb#pick) | {room} | `test_a.py`: `test_one` |"]
    assert refs.mapping("ASASR", tree).splitlines()[2:] == [
        f"| (1) | [`line`](01_spectral.ipynb#line) | {room} | the page's own checks |"]
    assert "[`Loss.pull`](01_spectral.ipynb#loss)" in refs.mapping("CTMSR", tree)
    assert "`test_a.py`: `test_one`, `test_two` |" in refs.mapping("Wallace+ 2024", tree)
