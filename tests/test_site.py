"The site's sources and the scripts that write from them; every check is also seen to fail"
import base64
import json
import os
import shutil
import subprocess
import sys

import nbformat
import pytest
import readme
import runs
import site_checks
import sync
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell


# ---- this repository

@pytest.mark.parametrize("check", site_checks.CHECKS, ids=lambda o: o.__name__)
def test_repository(check, root):
    if problems := check(root): pytest.fail("\n".join(problems), pytrace=False)


def test_readme_is_what_index_says(root):
    assert (root/"README.md").read_text() == readme.readme(nbformat.read(root/"nbs/index.ipynb", as_version=4))


def said(nb): # what a page shows
    return [(o.get("text"), o.get("data")) for c in nb.cells for o in c.get("outputs", [])]


@pytest.mark.parametrize("name", ["index", "api", "refs"])
def test_pages_made_from_the_tree_are_up_to_date(name, root):
    "They show records, the package's source, and its citations and tests"
    from nbclient import NotebookClient
    nb = nbformat.read(root/f"nbs/{name}.ipynb", as_version=4)
    saved = said(nb)
    NotebookClient(nb, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(root/"nbs")}}).execute()
    assert said(nb) == saved, f"nbs/{name}.ipynb shows what was: make pages NB={name}"


# ---- a small tree that passes, then one fault at a time

FIGURE = '#| label: fig-line\n#| fig-cap: "A line."\n#| fig-alt: "It rises."\nplot()'
PNG = base64.b64encode(b"\x89PNG" + bytes(100)).decode()

def write(root, name, *cells):
    nb = new_notebook(cells=list(cells))
    for i, c in enumerate(nb.cells): c["id"] = f"{name[:20].replace('_', '-')}-{i}"
    nbformat.write(nb, root/f"nbs/{name}.ipynb")

def room(root, name, body, outputs=None, text="Words", check="check()"):
    module = name.partition("_")[2]
    shown = [new_output("stream", text="max error 0\n")] if outputs is None else outputs
    write(root, name, new_code_cell(f"#| default_exp {module}"),
          new_markdown_cell(f"# Title of {module}\n\n> Plain words"),
          new_markdown_cell(text), new_code_cell(f"#| exports\n{body}"), new_code_cell(check, outputs=shown))
    (root/f"srnb/{module}.py").write_text(f"__all__ = []\n\n{body}\n")

def experiment(root, name, front="", tags=("parameters",), source='seed = 0\nreward = "offline"\nlr = -1e-3'):
    cells = [new_raw_cell(f"---\n{front}\n---")] if front else []
    write(root, name, *cells, new_markdown_cell(f"# {name}\n\n> What it asks"), new_code_cell(source, metadata={"tags": list(tags)}))

@pytest.fixture
def tree(tmp_path):
    root = tmp_path/"tree"
    for o in ("nbs/_records/demo", "srnb/photos", "tests"): (root/o).mkdir(parents=True)
    (root/"nbs/_records/demo/figure.png").write_bytes(bytes(1000))
    (root/"srnb/__init__.py").write_text('__version__ = "0"\n')
    room(root, "00_core", "import math\n\ndef low(x): return math.sqrt(x)", text="## Two words: here\n\n$x$ and\n\n$$\n\\frac{1}{2}\n$$ {#eq-half}\n\nby @eq-half")
    room(root, "01_paths", "from srnb.core import low\n\ndef high(x): return low(x)",
         outputs=[new_output("display_data", data={"image/png": PNG})], check=FIGURE,
         text="[core](00_core.ipynb#two-words-here), [above](#title-of-paths), [there](00_core.ipynb#low), see @fig-line")
    experiment(root, "train_small")
    experiment(root, "table_small", front="skip_exec: true")
    text = "![What it shows](_records/demo/figure.png) and [core](00_core.ipynb)"
    write(root, "index", new_markdown_cell("# Tree\n\n> A tree"), new_markdown_cell(text), shown("text/html", '<img alt="A dot" src="data:image/png;base64,AA">'))
    contents = [{"section": "Start", "contents": ["index.ipynb", "00_core.ipynb"]}, "01_paths.ipynb",
                "train_small.ipynb", "table_small.ipynb"]
    (root/"_quarto.yml").write_text(json.dumps({"website": {"sidebar": {"contents": contents}}}))
    os.symlink("../_quarto.yml", root/"nbs/_quarto.yml")
    (root/"Makefile").write_text("demo: ## x\n\ttrue\n")
    run = "papermill nbs/train_small.ipynb out.ipynb --log-output --no-progress-bar \\\n    -p lr 1e-3"
    (root/"README.md").write_text(f"[core](nbs/00_core.ipynb)\n\n```bash\nmake demo # or make it\n{run}\n```\n")
    return root

def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))

def add(root, name, cell): # one more cell in a notebook
    nb = nbformat.read(root/f"nbs/{name}.ipynb", as_version=4)
    cell["id"] = f"extra-{len(nb.cells)}"
    nb.cells.append(cell)
    nbformat.write(nb, root/f"nbs/{name}.ipynb")

def shown(kind, data): return new_code_cell("f()", outputs=[new_output("display_data", data={kind: data})])

def test_tree_passes(tree):
    assert [p for check in site_checks.CHECKS for p in check(tree)] == []

FAULTS = dict(
    stranger=("check_top", "notes.txt", lambda r: (r/"notes.txt").write_text("x")),
    sidebar_lacks=("check_sidebar", "nbs/02_new.ipynb: not in", lambda r: room(r, "02_new", "y = 1")),
    sidebar_extra=("check_sidebar", "train_small.ipynb, which is not", lambda r: (r/"nbs/train_small.ipynb").unlink()),
    sidebar_twice=("check_sidebar", "twice",
        lambda r: edit(r/"_quarto.yml", '"train_small.ipynb"', '"train_small.ipynb", "train_small.ipynb"')),
    sidebar_order=("check_sidebar", "order",
        lambda r: edit(r/"_quarto.yml", '"index.ipynb", "00_core.ipynb"]}, "01_paths.ipynb"',
                                                            '"index.ipynb", "01_paths.ipynb"]}, "00_core.ipynb"')),
    sidebar_link=("check_sidebar", "must be a link", lambda r: (r/"nbs/_quarto.yml").unlink()),
    saved_error=("check_outputs", "saved error ValueError", lambda r: add(r, "index", new_code_cell("f()", outputs=[
        new_output("error", ename="ValueError", evalue="no", traceback=[])]))),
    traceback=("check_outputs", "a traceback", lambda r: add(r, "index", new_code_cell("f()", outputs=[
        new_output("stream", name="stderr", text="Traceback (most recent call last):\n")]))),
    big_figure=("check_outputs", "figure of 101 kB",
        lambda r: add(r, "index",
        shown("image/png", base64.b64encode(bytes(101_000)).decode()))),
    big_notebook=("check_outputs", "MB, at most 1", lambda r: add(r, "index", new_markdown_cell("x"*1_000_000))),
    never_run=("check_outputs", "no saved output", lambda r: room(r, "00_core", "def low(x): return x", outputs=[])),
    no_picture=("check_images", "no picture at", lambda r: (r/"nbs/_records/demo/figure.png").unlink()),
    no_alt=("check_images", "no alt text", lambda r: edit(r/"nbs/index.ipynb", "What it shows", "")),
    far_picture=("check_images", "not in the repository",
        lambda r: edit(r/"nbs/index.ipynb", "_records/demo/figure.png", "https://x.org/a.png")),
    fat_picture=("check_images", "120 kB", lambda r: (r/"nbs/_records/demo/figure.png").write_bytes(bytes(120_000))),
    shown_picture=("check_images", "no picture at gone.png", lambda r: add(r, "index",
        shown("text/markdown", "![Alt](gone.png)"))),
    attachment=("check_images", "no attachment a.png",
        lambda r: add(r, "index", new_markdown_cell("![Alt](attachment:a.png)"))),
    dead_link=("check_links", "gone.ipynb, which is not there",
        lambda r: add(r, "index", new_markdown_cell("[x](gone.ipynb)"))),
    dead_anchor=("check_links", "a heading that is not there",
        lambda r: edit(r/"nbs/00_core.ipynb", "Two words", "Three words")),
    dead_function=("check_links", "00_core.ipynb#low, a heading",
        lambda r: edit(r/"nbs/00_core.ipynb", "#| exports", "#| export")),
    dead_own_anchor=("check_links", "#nowhere", lambda r: add(r, "index", new_markdown_cell("[x](#nowhere)"))),
    dead_readme_link=("check_links", "README.md: link", lambda r: edit(r/"README.md", "nbs/", "")),
    link_outside=("check_links", "which is not there", lambda r: add(r, "index", new_markdown_cell("[x](../../)"))),
    no_title=("check_titles", "0 titles", lambda r: edit(r/"nbs/index.ipynb", "# Tree", "Tree")),
    two_titles=("check_titles", "2 titles", lambda r: add(r, "index", new_markdown_cell("# Another"))),
    no_line=("check_titles", "no line of the form", lambda r: edit(r/"nbs/index.ipynb", "> A tree", "A tree")),
    tex_line=("check_titles", "TeX in the line", lambda r: edit(r/"nbs/index.ipynb", "> A tree", "> A $2$")),
    lost_text=("check_titles", "a cell of its own", lambda r: edit(r/"nbs/index.ipynb", "> A tree", "> A tree\\n\\nLost")),
    no_label=("check_equations", "no label", lambda r: edit(r/"nbs/00_core.ipynb", " {#eq-half}", "")),
    other_label=("check_equations", "must begin with eq-", lambda r: edit(r/"nbs/00_core.ipynb", "{#eq-half}", "{#half}")),
    same_label=("check_equations", "a second eq-half", lambda r: add(r, "00_core", new_markdown_cell("$$1$$ {#eq-half}"))),
    bad_tex=("check_equations", "no MathML", lambda r: edit(r/"nbs/00_core.ipynb", "frac{1}{2}", "nofrac{1}{2")),
    bad_inline=("check_equations", "no MathML", lambda r: add(r, "index", new_markdown_cell(r"a $\frac{1$ b"))),
    bad_output=("check_equations", "no MathML", lambda r: add(r, "index", shown("text/markdown", r"a $\mathbb{ x$ b"))),
    no_caption=("check_figures", "without fig-cap", lambda r: edit(r/"nbs/01_paths.ipynb", "fig-cap", "cap")),
    no_fig_alt=("check_figures", "without fig-alt", lambda r: edit(r/"nbs/01_paths.ipynb", "It rises.", "")),
    same_alt=("check_figures", "repeats", lambda r: edit(r/"nbs/01_paths.ipynb", "It rises.", "A line.")),
    no_fig_label=("check_figures", "without label", lambda r: edit(r/"nbs/01_paths.ipynb", "label:", "tag:")),
    fig_prefix=("check_figures", "must begin with fig-", lambda r: edit(r/"nbs/01_paths.ipynb", "label: fig-", "label: ")),
    unseen=("check_figures", "no text refers", lambda r: edit(r/"nbs/01_paths.ipynb", "see @fig-line", "see")),
    twins=("check_figures", "a second fig-line", lambda r: add(r, "01_paths", new_code_cell(FIGURE,
        outputs=[new_output("display_data", data={"image/png": PNG})]))),
    yaml_caption=("check_figures", "without fig-cap", lambda r: edit(r/"nbs/01_paths.ipynb", '\\"A line.\\"', "A line: no YAML: this")),
    yaml_escape=("check_figures", "without fig-alt", lambda r: edit(r/"nbs/01_paths.ipynb", "It rises.", r"\\sigma rises.")),
    late_options=("check_figures", "without label, fig-cap, fig-alt", lambda r: edit(r/"nbs/01_paths.ipynb", '"#| label: fig-line', '"x = 1\\n",\n    "#| label: fig-line')),
    and_a_table=("check_figures", "2 things shown", lambda r: add(r, "01_paths", new_code_cell(FIGURE.replace("fig-line", "fig-b"),
        outputs=[new_output("display_data", data={"image/png": PNG}), new_output("display_data", data={"text/html": "<table></table>"})]))),
    numbered=("check_lists", "becomes a list: (17) says", lambda r: add(r, "index", new_markdown_cell("By it\n\n(17) says so"))),
    numbered_item=("check_lists", "becomes a list", lambda r: add(r, "index", new_markdown_cell("3. (a) says so"))),
    stderr=("check_outputs", "stderr on the page", lambda r: add(r, "index", new_code_cell("f()", outputs=[new_output("stream", name="stderr", text="Failed\n")]))),
    temporary=("check_outputs", "a temporary path", lambda r: add(r, "index", new_code_cell("f()", outputs=[new_output("stream", text="wrote /tmp/" + "tmpab/x\n")]))),
    html_style=("check_html", "loads @import", lambda r: add(r, "index", shown("text/html", "<style>@import 'a.css'</style>"))),
    html_url=("check_html", "loads url(", lambda r: add(r, "index", shown("text/html", "<style>a { src: url(https://x.org/a) }</style>"))),
    html_fetch=("check_html", "loads fetch(", lambda r: add(r, "index", shown("text/html", "<script>fetch('a')</script>"))),
    two_pictures=("check_figures", "2 things shown", lambda r: add(r, "01_paths", new_code_cell(FIGURE,
        outputs=[new_output("display_data", data={"image/png": PNG})]*2))),
    no_saved=("check_figures", "no saved picture", lambda r: add(r, "01_paths", new_code_cell(FIGURE))),
    nowhere=("check_references", "@eq-none is not", lambda r: add(r, "index", new_markdown_cell("by @eq-none."))),
    other_page=("check_references", "@eq-half is not", lambda r: add(r, "index", new_markdown_cell("by @eq-half"))),
    html_alt=("check_html", "no alt text", lambda r: edit(r/"nbs/index.ipynb", "A dot", "")),
    html_far=("check_html", "loads https", lambda r: add(r, "index", shown("text/html", '<script src="https://x.org/a.js"></script>'))),
    html_big=("check_html", "picture of 150 kB",
        lambda r: add(r, "index", shown("text/html", f'<img alt="A" src="data:image/png;base64,{"A"*200_000}">'))),
    no_target=("check_commands", "no target demos", lambda r: edit(r/"README.md", "make demo", "make demos")),
    no_such_run=("check_commands", "train_big.ipynb, which is not there",
        lambda r: edit(r/"README.md", "train_small", "train_big")),
    no_parameter=("check_commands", "no parameter rate", lambda r: edit(r/"README.md", "-p lr", "-p rate")),
    no_options=("check_commands", "without its options", lambda r: edit(r/"README.md", "--log-output", "")),
    no_skip=("check_experiments", "needs skip_exec", lambda r: experiment(r, "table_small")),
    skip_false=("check_experiments", "needs skip_exec",
        lambda r: experiment(r, "table_small", front="skip_exec: false")),
    no_tag=("check_experiments", "0 cells tagged", lambda r: experiment(r, "train_small", tags=())),
    two_tags=("check_experiments", "2 cells tagged",
        lambda r: add(r, "train_small", new_code_cell("b = 1", metadata={"tags": ["parameters"]}))),
    not_literal=("check_experiments", "must be literals", lambda r: experiment(r, "train_small", source="lr = f(1)")),
    import_there=("check_experiments", "must be literals",
        lambda r: experiment(r, "train_small", source="import os\nlr = 1")),
    not_exported=("check_exports", "never exported", lambda r: (r/"srnb/core.py").unlink()),
    missing_name=("check_exports", "`low` is not in srnb/core.py",
        lambda r: edit(r/"srnb/core.py", "def low", "def other")),
    extra_name=("check_exports", "`extra` is not in nbs/00_core.ipynb",
        lambda r: edit(r/"srnb/core.py", "def low", "extra = 1\ndef low")),
    orphan=("check_exports", "no notebook exports it", lambda r: (r/"srnb/old.py").write_text("")),
    no_default_exp=("check_exports", "without a default_exp",
        lambda r: add(r, "index", new_code_cell("#| export\nx = 1"))),
    wrong_module=("check_exports", "exports to core",
        lambda r: edit(r/"nbs/01_paths.ipynb", "default_exp paths", "default_exp core")),
    upstairs=("check_floors", "floor 0 imports paths",
        lambda r: edit(r/"srnb/core.py", "import math", "from srnb.paths import high")),
    upstairs_relative=("check_floors", "floor 0 imports paths",
        lambda r: edit(r/"srnb/core.py", "import math", "from .paths import high")),
    upstairs_package=("check_floors", "floor 0 imports paths",
        lambda r: edit(r/"srnb/core.py", "import math", "from srnb import paths")),
    upstairs_module=("check_floors", "floor 0 imports paths",
        lambda r: edit(r/"srnb/core.py", "import math", "import srnb.paths")),
    upstairs_inside=("check_floors", "floor 0 imports paths",
        lambda r: edit(r/"srnb/core.py", "return", "from . import paths; return")),
    itself=("check_floors", "floor 1 imports paths", lambda r: edit(r/"srnb/paths.py", "srnb.core", "srnb.paths")),
    no_room=("check_floors", "which no room exports", lambda r: edit(r/"srnb/paths.py", "srnb.core", "srnb.cellar")),
    home=("check_traces", "a machine's path",
        lambda r: (r/"tests/a.py").write_text("p = '/{}/someone/x'".format("home"))),
    checkout=("check_traces", "this checkout's path", lambda r: (r/"tests/a.py").write_text(f"p = '{r}/nbs'")),
    registry=("check_traces", "a registry's address",
        lambda r: (r/"tests/a.txt").write_text("https:" + "//pypi.org/simple")),
    file_index=("check_traces", "a registry's address",
        lambda r: (r/"tests/a.txt").write_text("file:" + "///somewhere")),
    records=("check_sizes", "nbs/_records",
        lambda r: (r/"nbs/_records/demo/metrics.parquet").write_bytes(bytes(3_100_000))),
    photos=("check_sizes", "srnb/photos", lambda r: (r/"srnb/photos/a.jpg").write_bytes(bytes(4_100_000))),
)

@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, tree):
    check, message, break_it = FAULTS[name]
    break_it(tree)
    found = getattr(site_checks, check)(tree)
    assert any(message in o for o in found), found

def test_every_check_is_seen_to_fail():
    assert {o[0] for o in FAULTS.values()} == {o.__name__ for o in site_checks.CHECKS}

def test_code_is_not_read_as_links(tree):
    add(tree, "index", new_markdown_cell("`a[0](gone)` and\n\n```python\nf[1](gone.ipynb)\n```"))
    assert site_checks.check_links(tree) == []

def test_what_tools_make_is_not_looked_at(tree):
    for o in (".venv/lib/a.py", "srnb/__pycache__/a.txt", "srnb.egg-info/a.txt", "nbs/_runs/a.txt", "build/a.txt"):
        (tree/o).parent.mkdir(parents=True, exist_ok=True)
        (tree/o).write_text("p = '/{}/someone/x'".format("home"))
    assert site_checks.check_traces(tree) == [] and site_checks.check_top(tree) == []
    (tree/".ci").mkdir()
    (tree/".ci/a.py").write_text("p = '/{}/someone/x'".format("home"))
    assert len(site_checks.check_traces(tree)) == 1

def test_ignored_files_are_not_tracked(tree):
    subprocess.run(["git", "init", "-q", str(tree)], check=True)
    (tree/".gitignore").write_text("notes.txt\n")
    (tree/"notes.txt").write_text("x")
    assert site_checks.check_top(tree) == []
    (tree/"other.txt").write_text("x")
    assert site_checks.check_top(tree) == ["other.txt: does not belong at the top level"]


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

@pytest.mark.parametrize("out, message", [(new_output("error", ename="E", evalue="e", traceback=[]), "a saved error"),
                                          (new_output("display_data", data={"image/png": PNG}), "image/png")])
def test_readme_refuses(out, message):
    nb = new_notebook(cells=[new_code_cell("f()", outputs=[out])])
    with pytest.raises(ValueError, match=message): readme.readme(nb)


# ---- the table on the index page

def test_index_table_by_hand(root):
    pd = pytest.importorskip("pandas")
    nb, space = nbformat.read(root/"nbs/index.ipynb", as_version=4), {}
    for c in nb.cells:
        if c.cell_type == "code" and "display(" not in c.source: exec(c.source, space)
    rows = [(image, seed, "reward", variant, (1+shift)*x + noise) for image, x in (("a", 1.), ("b", 2.), ("c", 6.))
            for variant, shift in (("before", 0.), ("after", 1.)) for seed, noise in ((0, -.5), (1, .5))]
    text = space["table"](pd.DataFrame(rows, columns=["image", "seed", "metric", "variant", "value"]))
    # worst of two: x - .5 before, 2x - .5 after; changes 1, 2, 6: mean 3, sd sqrt(7), t(.975, 2) = 4.30265, half = 6.5724
    assert text.splitlines()[-1] == "| reward, Worst@2 |  | 2.5000 | 5.5000 | +3.0000 [-3.5724, +9.5724] |"


# ---- the sync check, papermill runs, pages and make

def test_drift_names_every_change(tree):
    before = sync.snapshot(tree)
    assert sync.drift(before, sync.snapshot(tree)) == []
    edit(tree/"srnb/core.py", "math", "cmath")
    (tree/"srnb/new.py").write_text("")
    (tree/"README.md").unlink()
    assert sync.drift(before, sync.snapshot(tree)) == ["gone: README.md", "rewritten: srnb/core.py", "new: srnb/new.py"]

def test_export_drift_fails(tmp_path, root, clean_env):
    copy = tmp_path/"copy"
    shutil.copytree(root/".ci", copy/".ci")
    (copy/"nbs").mkdir()
    (copy/"srnb").mkdir()
    (copy/"srnb/__init__.py").write_text("")
    for o in ("settings.ini", "pyproject.toml"): shutil.copy(root/o, copy)
    room(copy, "00_core", "def low(x): return x")
    write(copy, "index", new_markdown_cell("# Tree"))
    env = clean_env | {"IN_TEST": "1"} # must not silence the export
    def run(): return subprocess.run([sys.executable, ".ci/sync.py"], cwd=copy, env=env, capture_output=True, text=True)
    first = run()
    assert first.returncode == 1, first.stderr
    assert "new: README.md" in first.stdout and "rewritten: srnb/core.py" in first.stdout
    assert run().returncode == 0
    edit(copy/"srnb/core.py", "return x", "return -x")
    again = run()
    assert again.returncode == 1 and "rewritten: srnb/core.py" in again.stdout
    assert "return x" in (copy/"srnb/core.py").read_text()

def test_runs_says_when_there_is_nothing(root):
    def run(*a): return subprocess.run([sys.executable, ".ci/runs.py", *a], cwd=root, capture_output=True, text=True)
    none = run("nothing_*")
    assert none.returncode == 0 and "There is no nbs/nothing_*.ipynb" in none.stdout
    assert run("nothing").returncode == 1

def test_runs_passes_parameters_and_failures(tmp_path, root, monkeypatch, capsys):
    (tmp_path/"nbs/_runs").mkdir(parents=True)
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    for name, source in dict(table_a="assert n == 3", table_b="raise ValueError('boom')").items():
        cells = [new_code_cell("n = 1", metadata={"tags": ["parameters"]}), new_code_cell(source)]
        nbformat.write(new_notebook(cells=cells, metadata=kernel), tmp_path/f"nbs/{name}.ipynb")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["runs.py", "table_a", "--out", "x", "-p", "n", "3"])
    assert runs.main() == 0
    assert (tmp_path/"nbs/_runs/x.ipynb").exists()
    monkeypatch.setattr(sys, "argv", ["runs.py", "table_*", "-p", "n", "3"])
    assert runs.main() == 1
    assert "failed: table_b" in capsys.readouterr().out

def test_pages_executes_in_place_and_keeps_the_file_on_an_error(tmp_path):
    import pages
    path = tmp_path/"a.ipynb"
    cells = [new_code_cell("1+1"), new_code_cell("#| hide\nnbdev_export()"), new_code_cell("#| eval: false\n1/0")]
    nbformat.write(new_notebook(cells=cells), path)
    pages.execute(path)
    nb = nbformat.read(path, as_version=4)
    assert nb.cells[0].outputs[0].data["text/plain"] == "2"
    assert [c.source for c in nb.cells] == [c.source for c in cells]
    nb.cells.append(new_code_cell("1/0"))
    nbformat.write(nb, path)
    before = path.read_bytes()
    with pytest.raises(Exception, match="ZeroDivisionError"): pages.execute(path)
    assert path.read_bytes() == before

def test_make_help_lists_every_target(root):
    text = (root/"Makefile").read_text()
    targets = text.split(".PHONY:")[1].splitlines()[0].split()
    shown = subprocess.run(["make", "-s", "help"], cwd=root, check=True, capture_output=True, text=True).stdout
    assert [o.split()[1] for o in shown.splitlines()] == targets

def test_docs_without_quarto_says_what_to_do(root, clean_env):
    env = clean_env | {"PATH": "/nowhere"}
    out = subprocess.run([sys.executable, ".ci/docs.py"], cwd=root, env=env, capture_output=True, text=True)
    assert out.returncode == 1 and "quarto.org" in out.stdout

def test_a_run_without_tests_fails(tmp_path, root, clean_env):
    shutil.copy(root/"tests/conftest.py", tmp_path)
    (tmp_path/"test_skipped.py").write_text("import pytest\n\n@pytest.mark.skip\ndef test_a(): pass\n")
    cmd = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    assert subprocess.run(cmd, cwd=tmp_path, env=clean_env, capture_output=True).returncode != 0
    (tmp_path/"test_real.py").write_text("def test_b(): pass\n")
    assert subprocess.run(cmd, cwd=tmp_path, env=clean_env, capture_output=True).returncode == 0
