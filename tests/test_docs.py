"The site as a reader gets it without Quarto: every page, link, picture and formula; and the parts that make it"
import shutil
import subprocess
from types import SimpleNamespace

import docs
import nbformat
import preview
import pypandoc
import pytest
import readme
import site_checks
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


# ---- the whole site

@pytest.fixture(scope="module")
def site(tmp_path_factory, root):
    "Processed and rendered in a copy, as `make preview` does"
    copy = tmp_path_factory.mktemp("site")/"copy"
    copy.mkdir()
    left = shutil.ignore_patterns("weights", "photos", "_runs", "__pycache__")
    for o in ("nbs", "srnb"): shutil.copytree(root/o, copy/o, symlinks=True, ignore=left)
    for o in ("settings.ini", "pyproject.toml", "_quarto.yml", "README.md"): shutil.copy(root/o, copy)
    problems = preview.render(docs.process(copy))
    return SimpleNamespace(problems=problems, folder=copy/"_proc/_docs")


def test_renders_without_a_word(site):
    "No formula that pandoc cannot set, no dead link, nothing from elsewhere, no picture without alt text"
    assert not site.problems, "\n".join(site.problems)


def test_every_notebook_is_a_page(site, root):
    assert {p.stem for p in site.folder.glob("*.html")} == {p.stem for p in (root/"nbs").glob("[!_.]*.ipynb")}


def test_figures_formulas_and_functions_arrive(site, root):
    for p in (root/"nbs").glob("[!_.]*.ipynb"):
        nb, page = nbformat.read(p, as_version=4), (site.folder/f"{p.stem}.html").read_text()
        places = [readme.options(c.source).get("label") for c in nb.cells if c.cell_type == "code"]
        for c in (c for c in nb.cells if "exports" in readme.directives(c.source)):
            places += [o.lower() for o in docs.public(new_code_cell(f"{docs.SHOWN}\n{c.source}"))]
        assert [o for o in places if o and f'id="{o}"' not in page] == [], p.stem
        shown = [c.source for c in nb.cells if c.cell_type == "markdown"]
        assert page.count('<math display="block"') == sum(o.count("$$") for o in shown)//2, p.stem


# ---- a small site, then one fault at a time

@pytest.fixture
def small(tmp_path):
    nav = '<a href="index.html">a</a><a href="other.html">o</a>'
    body = '<h1>A</h1><h2 id="here">B</h2><a href="#here">b</a><a href="other.html#there">c</a>'
    dot = '<img alt="A dot" src="data:image/png;base64,AA"><img alt="A file" src="_records/a.png">'
    code = "<a href='https://x.org'>d</a><pre>@import 'a.css' fetch(1)</pre>"
    (tmp_path/"index.html").write_text(nav + body + dot + code)
    (tmp_path/"other.html").write_text(f'{nav}<h1>O</h1><p id="there"></p>')
    (tmp_path/"_records").mkdir()
    (tmp_path/"_records/a.png").write_bytes(b"x")
    return tmp_path

def test_small_site_passes(small): assert site_checks.check_site(small) == []

FAULTS = dict( # the name and value in the answer, what stands in index.html, what is put there
    dead_link=("gone.html", "other.html#there", "gone.html"),
    dead_place=("other.html#nowhere", "#there", "#nowhere"),
    dead_own_place=("#nowhere", 'href="#here"', 'href="#nowhere"'),
    outside=("../a.html", "other.html#there", "../a.html"),
    no_picture=("b.png", "_records/a.png", "_records/b.png"),
    no_alt=("_records/a.png", "A file", ""),
    far_picture=("https://x.org/a.png", "_records/a.png", "https://x.org/a.png"),
    far_script=("//x.org/a.js", "</h2>", '</h2><script src="//x.org/a.js"></script>'),
    style=("@import", "</h2>", "</h2><style>@import 'a.css'</style>"),
    url=("url(https", "</h2>", "</h2><style>a { src: url(https://x.org/a) }</style>"),
    fetch=("fetch(", "</h2>", "</h2><script>fetch('a')</script>"),
    big=("150016", "base64,AA", f"base64,{'A'*200_000}"),
    twice=("here", "</h2>", '</h2><p id="here">'),
    titles=("2", "</h2>", "</h2><h1>C</h1>"),
    unlisted=("_quarto.yml", "other.html", "index.html"),
)

@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_seen(name, small):
    said, old, new = FAULTS[name]
    text = (small/"index.html").read_text()
    assert old in text
    (small/"index.html").write_text(text.replace(old, new))
    found = site_checks.check_site(small)
    assert any(said in o for o in found), found


# ---- what stands on a page

def html(*cells):
    cmd = [pypandoc.get_pandoc_path(), "--from=markdown-citations", "--mathml", "--wrap=none", "--fail-if-warnings"]
    return subprocess.run(cmd, input=preview.markdown(new_notebook(cells=list(cells))), capture_output=True, text=True)

def test_labels_references_and_figures():
    figure = '#| label: fig-a\n#| fig-cap: "A line."\n#| fig-alt: "It \\"rises\\"."\nplot()'
    png = new_output("display_data", data={"image/png": "AA==\n", "text/plain": "<Figure>"})
    prose = new_markdown_cell("By @eq-one and @fig-a.\n\n$$\\frac12$$ {#eq-one}")
    text = html(prose, new_code_cell(figure, outputs=[png])).stdout
    assert '<a href="#eq-one">eq-one</a>' in text and '<a href="#fig-a">fig-a</a>' in text
    assert '<span id="eq-one"><math' in text and "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in text
    assert '<figure id="fig-a">' in text and "<figcaption>A line.</figcaption>" in text
    assert 'src="data:image/png;base64,AA==" alt=""' in html(new_code_cell("plot()", outputs=[png])).stdout
    assert 'src="data:image/png;base64,AA==" alt="It ”rises”."' in text and "plot()" in text and "#|" not in text

def test_outputs():
    some = [{"text/html": "<b>bold</b>", "text/plain": "?"}, {"text/markdown": "**strong**"}, {"text/plain": "2"}]
    some = [new_output("stream", text="said\n"), *(new_output("display_data", data=o) for o in some)]
    text = html(new_code_cell("#| echo: false\nhidden()", outputs=some)).stdout
    for o in ("<code>said</code>", "<b>bold</b>", "<strong>strong</strong>", "<code>2</code>"): assert o in text
    assert "hidden" not in text

def test_a_formula_that_cannot_be_set_is_told():
    assert html(new_markdown_cell("$x$")).returncode == 0
    done = html(new_markdown_cell(r"$\nofrac{$"))
    assert done.returncode and "nofrac" in done.stderr


# ---- headings and links of what the package exports

def test_links_to_functions():
    def page(*names): return new_notebook(cells=[new_code_cell(f"{docs.SHOWN}\ndef {o}(): pass") for o in names])
    both = new_code_cell(f"{docs.SHOWN}\n@dataclass\nclass Big: pass\ndef small(x): return x\ndef _own(): pass")
    assert docs.public(both) == ["Big", "small"] and docs.public(new_code_cell("def unseen(): pass")) == []
    first, second, third = new_notebook(cells=[both]), page("twice"), page("twice", "once")
    home = docs.homes({"10_a.ipynb": first, "11_b.ipynb": second, "12_c.ipynb": third})
    assert home == {"Big": "10_a.ipynb#big", "small": "10_a.ipynb#small", "once": "12_c.ipynb#once"}
    text = "`small`, `Big` `twice` `small(x)`\n# `small`\n`Big`\n```\n`small`\n```\n[`small`](x)"
    want = "[`small`](#small), [`Big`](#big) `twice` `small(x)`\n# `small`\n[`Big`](#big)\n```\n`small`\n```\n"
    assert docs.linked(text, home, "10_a.ipynb") == f"{want}[`small`](x)"
    assert docs.linked("`small`", home, "11_b.ipynb") == "[`small`](10_a.ipynb#small)"
