"The site's sources and the scripts that write from them; every check is also seen to fail"
import base64
import os
import shutil
import subprocess
import sys

import docs
import nbformat
import pages
import pytest
import readme
import runs
import shape
import site_checks
import sync
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell


# ---- this repository

@pytest.mark.parametrize("check", [*site_checks.CHECKS, shape.problems], ids=lambda o: f"{o.__module__}.{o.__name__}")
def test_repository(check, root):
    if problems := check(root): pytest.fail("\n".join(problems), pytrace=False)


def test_readme_is_what_index_says(root):
    assert (root/"README.md").read_text() == readme.readme(nbformat.read(root/"nbs/index.ipynb", as_version=4))


@pytest.fixture(scope="module")
def executed(root):
    "Name of a page -> what it shows when it is executed here, without a kernel, and its names"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    def run(name):
        nb, shell, before = read_nb(root/f"nbs/{name}.ipynb"), CaptureShell(), os.getcwd()
        os.chdir(root/"nbs")
        try: shell.run_all(nb, exc_stop=True)
        finally: os.chdir(before)
        return said(nb), shell.user_ns
    return {name: run(name) for name in ("index", "api", "refs")}


def said(nb): # what a page shows
    return [(o.get("text"), o.get("data")) for c in nb.cells for o in c.get("outputs") or []]


@pytest.mark.parametrize("name", ["index", "api", "refs"])
def test_pages_made_from_the_tree_are_up_to_date(name, root, executed):
    "They show records, the package's source, and its citations and tests"
    from execnb.nbio import read_nb
    shown, saved = executed[name][0], said(read_nb(root/f"nbs/{name}.ipynb"))
    assert shown and shown == saved, f"nbs/{name}.ipynb shows what was: make pages NB={name}"


def test_index_table_by_hand(executed):
    pd = pytest.importorskip("pandas")
    rows = [(image, seed, "reward", variant, (1+shift)*x + noise) for image, x in (("a", 1.), ("b", 2.), ("c", 6.))
            for variant, shift in (("before", 0.), ("after", 1.)) for seed, noise in ((0, -.5), (1, .5))]
    table = executed["index"][1]["table"]
    text = table(pd.DataFrame(rows, columns=["image", "seed", "metric", "variant", "value"]))
    # worst of two: x - .5 before, 2x - .5 after; changes 1, 2, 6: mean 3, sd sqrt(7), t(.975, 2) = 4.30265,
    # half = 6.5724
    assert text.splitlines()[-1] == "| reward, Worst@2 |  | 2.5000 | 5.5000 | +3.0000 [-3.5724, +9.5724] |"


# ---- a small tree that passes, then one fault at a time

FIGURE = '#| label: fig-line\n#| fig-cap: "A line."\n#| fig-alt: "It rises."\nplot()'
PNG = base64.b64encode(b"\x89PNG" + bytes(100)).decode()

def write(root, name, *cells):
    nb = new_notebook(cells=list(cells))
    for i, c in enumerate(nb.cells): c["id"] = f"{name[:20].replace('_', '-')}-{i}"
    nbformat.write(nb, root/f"nbs/{name}.ipynb")

def room(root, name, body, outputs=(), text="Words", check="check()"):
    module = name.partition("_")[2]
    write(root, name, new_code_cell(f"#| default_exp {module}"),
          new_markdown_cell(f"# Title of {module}\n\n> Plain words"), new_markdown_cell(text),
          new_code_cell(f"#| exports\n{body}"), new_code_cell(check, outputs=list(outputs)))
    (root/f"srnb/{module}.py").write_text(f"__all__ = []\n\n{body}\n")

def experiment(root, name, *front, tags=("parameters",), source='seed = 0\nreward = "offline"\nlr = -1e-3'):
    cell = new_code_cell(source, metadata={"tags": list(tags)})
    write(root, name, *(new_raw_cell(f"---\n{o}\n---") for o in front), new_markdown_cell(f"# {name}"), cell)

def picture(): return new_output("display_data", data={"image/png": PNG})

@pytest.fixture
def tree(tmp_path):
    root = tmp_path/"tree"
    for o in ("nbs/_records/demo", "srnb/photos", "tests"): (root/o).mkdir(parents=True)
    (root/"srnb/__init__.py").write_text('__version__ = "0"\n')
    room(root, "00_core", "import math\n\ndef low(x): return math.sqrt(x)", [new_output("stream", text="error 0\n")])
    room(root, "01_paths", "from srnb.core import low\n\ndef high(x): return low(x)", [picture()],
         text="See @fig-line", check=FIGURE)
    experiment(root, "train_small")
    experiment(root, "table_small", "skip_exec: true")
    write(root, "index", new_markdown_cell("# Tree"))
    (root/"README.md").write_text("[core](nbs/00_core.ipynb#low), `a[0](no)`, [far](https://x.org)\n")
    return root

def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))

def add(root, name, source="f()", *outputs, **metadata): # one more cell in a notebook
    nb = nbformat.read(root/f"nbs/{name}.ipynb", as_version=4)
    nb.cells.append(new_code_cell(source, outputs=list(outputs), metadata=metadata, id=f"extra-{len(nb.cells)}"))
    nbformat.write(nb, root/f"nbs/{name}.ipynb")

def tracked(root, name, text): # a file in a checkout
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    (root/name).write_text(text)

def core(root, new, old="import math"): edit(root/"srnb/core.py", old, new)
def figure(root, old, new): edit(root/"nbs/01_paths.ipynb", old, new)

def test_tree_passes(tree):
    tracked(tree, "tests/a.py", "x = 1\n")
    assert [p for check in site_checks.CHECKS for p in check(tree)] == []

FAULTS = dict( # check, the name and value in its answer, what is done to the tree
    saved_error=("outputs", "ValueError",
                 lambda r: add(r, "index", "f()", new_output("error", ename="ValueError", evalue="no", traceback=[]))),
    stderr=("outputs", "Failed",
            lambda r: add(r, "index", "f()", new_output("stream", name="stderr", text="Failed\n"))),
    temporary=("outputs", "/tmp/" + "tmpab",
               lambda r: add(r, "index", "f()", new_output("stream", text="wrote /tmp/" + "tmpab/x\n"))),
    big_notebook=("outputs", "index.ipynb: 1000", lambda r: add(r, "index", "x"*1_000_000)),
    never_run=("outputs", "00_core", lambda r: room(r, "00_core", "def low(x): return x")),
    no_caption=("figures", "fig-cap", lambda r: figure(r, "fig-cap", "cap")),
    no_alt=("figures", "fig-alt", lambda r: figure(r, "It rises.", "")),
    no_label=("figures", "label", lambda r: figure(r, "label:", "tag:")),
    other_label=("figures", "fig-", lambda r: figure(r, "label: fig-line", "label: line")),
    unseen=("figures", "@fig-line", lambda r: figure(r, "See @fig-line", "See @fig-line-2")),
    yaml_caption=("figures", "fig-cap", lambda r: figure(r, '\\"A line.\\"', "A line: no YAML: this")),
    yaml_escape=("figures", "fig-alt", lambda r: figure(r, "It rises.", r"\\sigma rises.")),
    late_options=("figures", "label, fig-cap, fig-alt",
                  lambda r: figure(r, '"#| label: fig-line', '"x = 1\\n",\n    "#| label: fig-line')),
    two_pictures=("figures", "2", lambda r: add(r, "01_paths", FIGURE, picture(), picture())),
    no_picture=("figures", "fig-line", lambda r: add(r, "01_paths", FIGURE)),
    no_skip=("experiments", "table_small", lambda r: experiment(r, "table_small")),
    skip_false=("experiments", "skip_exec", lambda r: experiment(r, "table_small", "skip_exec: false")),
    no_tag=("experiments", "train_small.ipynb: 0", lambda r: experiment(r, "train_small", tags=())),
    two_tags=("experiments", "train_small.ipynb: 2", lambda r: add(r, "train_small", "b = 1", tags=["parameters"])),
    not_literal=("experiments", "lr = f(1)", lambda r: experiment(r, "train_small", source="lr = f(1)")),
    import_there=("experiments", "import os", lambda r: experiment(r, "train_small", source="import os\nlr = 1")),
    orphan=("floors", "old", lambda r: (r/"srnb/old.py").write_text("")),
    not_exported=("floors", "00_core", lambda r: (r/"srnb/core.py").unlink()),
    upstairs=("floors", "floor 0 imports paths", lambda r: core(r, "from srnb.paths import high")),
    upstairs_relative=("floors", "floor 0 imports paths", lambda r: core(r, "from .paths import high")),
    upstairs_package=("floors", "floor 0 imports paths", lambda r: core(r, "from srnb import paths")),
    upstairs_module=("floors", "floor 0 imports paths", lambda r: core(r, "import srnb.paths")),
    upstairs_inside=("floors", "floor 0 imports paths", lambda r: core(r, "from . import paths; return", "return")),
    itself=("floors", "floor 1 imports paths", lambda r: edit(r/"srnb/paths.py", "srnb.core", "srnb.paths")),
    no_room=("floors", "cellar", lambda r: edit(r/"srnb/paths.py", "srnb.core", "srnb.cellar")),
    home=("traces", "a.py:1", lambda r: tracked(r, "tests/a.py", "p = '/{}/someone/x'".format("home"))),
    checkout=("traces", "a.py:1", lambda r: tracked(r, "tests/a.py", f"p = '{r}/nbs'")),
    registry=("traces", "a.txt:2", lambda r: tracked(r, "tests/a.txt", "\nhttps:" + "//pypi.org/simple")),
    file_index=("traces", "a.txt:1", lambda r: tracked(r, "tests/a.txt", "file:" + "///somewhere")),
    records=("sizes", "nbs/_records", lambda r: (r/"nbs/_records/demo/metrics.parquet").write_bytes(bytes(3_100_000))),
    photos=("sizes", "srnb/photos", lambda r: (r/"srnb/photos/a.jpg").write_bytes(bytes(4_100_000))),
    dead_link=("links", "00_core", lambda r: edit(r/"README.md", "nbs/", "")),
)

@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, tree):
    check, said, break_it = FAULTS[name]
    break_it(tree)
    found = getattr(site_checks, f"check_{check}")(tree)
    assert len(found) == 1 and said in found[0], found

def test_every_check_is_seen_to_fail():
    assert {f"check_{o[0]}" for o in FAULTS.values()} == {o.__name__ for o in site_checks.CHECKS}

def test_ignored_files_leave_no_trace(tree):
    tracked(tree, ".gitignore", "notes.txt\n")
    (tree/"notes.txt").write_text("p = '/{}/someone/x'".format("home"))
    assert site_checks.check_traces(tree) == []


# ---- the shape of the code

def test_shape_by_hand(tree):
    core(tree, '''from dataclasses import dataclass
NETS = dict(small=1, large=2) # a comment is no token
LOSERS = ("given", "none")
BOTH = (*LOSERS, "both")
MODES = ("area", "cubic")
ENDS, _HIDDEN, SIZE, WORDS = (".png", ".jpg"), dict(a=1), 3, "given"
JPEG = {".jpg": 95}
@dataclass(frozen=True)
class MyRun:
    kappa:float = 1.
    steps:int = 2
    def longer(self): return MODES[0]
@dataclass
class Data:
    size:int = 1
''')
    add(tree, "index", f"x = '{'a'*120}'\ny = 1")
    assert shape.name_tables(tree) == ["core.NETS", "core.LOSERS", "core.BOTH"]
    assert shape.run_fields(tree) == {"core.MyRun": 2, "core.Data": 1}
    assert shape.run_fields(tree, []) == {"core.MyRun": 2}
    assert shape.long_lines(tree) == ["nbs/index.ipynb cell 1:1"]
    assert shape.tokens("def f(x):\n    # why\n    return x+1 # so\n\n") == 10

def test_shape_above_its_bounds(tree, monkeypatch):
    core(tree, "NETS = dict(small=1)")
    for o in shape.BOUNDS: monkeypatch.setitem(shape.BOUNDS, o, 0)
    [found] = shape.problems(tree)
    assert "name tables" in found and "core.NETS" in found


# ---- README.md

def test_readme_hides_shows_and_relinks():
    nb = new_notebook(cells=[
        new_markdown_cell("# T\n\n[a](00_core.ipynb#b) ![c](_records/f.png) [d](https://x.org) [e](#f) "
                          "[g](../LICENSE)\n\n```\n[h](i)\n```"),
        new_code_cell("#| hide\nsecret = 1", outputs=[new_output("stream", text="secret\n")]),
        new_code_cell("#| echo: false\nsecret()", outputs=[
            new_output("display_data", data={"text/markdown": "| [x](y.ipynb) |", "text/plain": "?"})]),
        new_code_cell("#| output: false\nshown = 1", outputs=[new_output("stream", text="silent\n")]),
        new_code_cell("1+1", outputs=[new_output("execute_result", data={"text/plain": "2"})])])
    text = readme.readme(nb)
    assert text.startswith(readme.NOTE)
    assert ("[a](nbs/00_core.ipynb#b) ![c](nbs/_records/f.png) [d](https://x.org) [e](#f) [g](LICENSE)\n\n"
            "```\n[h](i)\n```") in text
    assert "secret" not in text and "silent" not in text and "#|" not in text
    assert text.endswith("| [x](nbs/y.ipynb) |\n\n```python\nshown = 1\n```\n\n```python\n1+1\n```\n\n```\n2\n```\n")

@pytest.mark.parametrize("out, name", [(new_output("error", ename="E", evalue="e", traceback=[]), "error"),
                                       (picture(), "image/png")])
def test_readme_refuses(out, name):
    nb = new_notebook(cells=[new_code_cell("f()", outputs=[out])])
    with pytest.raises(ValueError, match=name): readme.readme(nb)


# ---- the sync check, papermill runs, pages and make

def test_drift_names_every_change(tree):
    before = sync.snapshot(tree)
    assert sync.drift(before, sync.snapshot(tree)) == []
    core(tree, "import cmath")
    (tree/"srnb/new.py").write_text("")
    (tree/"README.md").unlink()
    assert sync.drift(before, sync.snapshot(tree)) == ["gone: README.md", "rewritten: srnb/core.py", "new: srnb/new.py"]

def test_export_drift_fails(tmp_path, root, monkeypatch, capsys):
    "A module that was changed by hand is written again, under IN_TEST too, and a missing README.md is made"
    copy = tmp_path/"copy"
    shutil.copytree(root/".ci", copy/".ci")
    for o in ("nbs", "srnb"): (copy/o).mkdir()
    (copy/"srnb/__init__.py").write_text("")
    for o in ("settings.ini", "pyproject.toml"): shutil.copy(root/o, copy)
    room(copy, "00_core", "def low(x): return x")
    write(copy, "index", new_markdown_cell("# Tree"))
    edit(copy/"srnb/core.py", "return x", "return -x")
    monkeypatch.setattr(sync, "ROOT", copy)
    monkeypatch.setenv("IN_TEST", "1") # must not silence the export
    assert sync.main() == 1
    text = capsys.readouterr().out
    assert "new: README.md" in text and "rewritten: srnb/core.py" in text
    assert "return x" in (copy/"srnb/core.py").read_text()

def started(monkeypatch, *rcs): # commands that runs.py starts; each ends with one of the return codes
    commands, left = [], list(rcs)
    def run(cmd, cwd):
        commands.append(cmd[1:])
        return subprocess.CompletedProcess(cmd, left.pop(0))
    monkeypatch.setattr(runs.subprocess, "run", run)
    return commands

def ran(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["runs.py", *words])
    return runs.main()

def test_runs_passes_parameters_and_failures(tree, monkeypatch, capsys):
    monkeypatch.setattr(runs, "ROOT", tree)
    commands = started(monkeypatch, 0, 1, 0)
    assert ran(monkeypatch, "table_small", "--out", "x", "-p", "n", "3") == 0
    want = "-m papermill nbs/table_small.ipynb nbs/_runs/x.ipynb --log-output --no-progress-bar -p n 3"
    assert commands == [want.split()]
    assert ran(monkeypatch, "*_small") == 1
    assert "nbs/_runs/train_small.ipynb" in commands[2]
    assert capsys.readouterr().out.endswith("failed: table_small\n")

def test_runs_says_when_there_is_nothing(tree, monkeypatch, capsys):
    monkeypatch.setattr(runs, "ROOT", tree)
    assert started(monkeypatch) == []
    assert ran(monkeypatch, "nothing_*") == 0 and "nbs/nothing_*.ipynb" in capsys.readouterr().out
    assert ran(monkeypatch, "nothing") == 1

def test_pages_executes_in_place_and_keeps_the_file_on_an_error(tmp_path, monkeypatch):
    path = tmp_path/"a.ipynb"
    cells = [new_code_cell("1+1"), new_code_cell("#| hide\nnbdev_export()"), new_code_cell("#| eval: false\n1/0")]
    nbformat.write(new_notebook(cells=cells), path)
    pages.execute(path)
    nb = nbformat.read(path, as_version=4)
    assert nb.cells[0].outputs[0].data["text/plain"] == "2"
    assert [c.source for c in nb.cells] == [c.source for c in cells]
    def fails(client): raise pages.CellExecutionError("1/0", "ZeroDivisionError", "")
    monkeypatch.setattr(pages.NotebookClient, "execute", fails)
    before = path.read_bytes()
    with pytest.raises(pages.CellExecutionError): pages.execute(path)
    assert path.read_bytes() == before

def test_make_help_lists_every_target(root):
    text = (root/"Makefile").read_text()
    targets = text.split(".PHONY:")[1].splitlines()[0].split()
    shown = subprocess.run(["make", "-s", "help"], cwd=root, check=True, capture_output=True, text=True).stdout
    assert [o.split()[1] for o in shown.splitlines()] == targets
    assert "speed" in targets and "bench" not in targets # which is `srnb bench` alone

def test_docs_without_quarto_says_what_to_do(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["docs.py"])
    assert docs.main() == 1 and "quarto.org" in capsys.readouterr().out

def test_a_run_without_tests_fails(tmp_path, root, clean_env):
    shutil.copy(root/"tests/conftest.py", tmp_path)
    (tmp_path/"test_skipped.py").write_text("import pytest\n\n@pytest.mark.skip\ndef test_a(): pass\n")
    cmd = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    assert subprocess.run(cmd, cwd=tmp_path, env=clean_env, capture_output=True).returncode == 5 # nothing collected
