"The site as a reader gets it without Quarto: every page, link, anchor and equation; and the parts that make it"
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import docs
import nbformat
import preview
import pytest
import typeset
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output


# ---- the whole site

class Page(HTMLParser):
    "Identifiers, links and pictures of a rendered page"
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.bare, self.maths = set(), [], [], 0
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if "id" in a: self.ids.add(a["id"])
        if tag == "a" and a.get("href"): self.links.append(a["href"])
        if tag == "img" and not (a.get("alt") or "").strip(): self.bare.append(a.get("src", "")[:60])
        self.maths += tag == "math"


@pytest.fixture(scope="module")
def site(tmp_path_factory, root):
    "Processed and rendered in a copy, as `make preview` does"
    copy = tmp_path_factory.mktemp("site")/"copy"
    copy.mkdir()
    for o in ("nbs", "srnb", "settings.ini", "pyproject.toml", "_quarto.yml", "README.md"):
        if (root/o).is_dir(): shutil.copytree(root/o, copy/o, symlinks=True, ignore=shutil.ignore_patterns("weights", "photos", "_runs", "__pycache__"))
        else: shutil.copy(root/o, copy/o)
    problems = preview.render(docs.process(copy))
    return SimpleNamespace(problems=problems, pages={p.name: Page(p) for p in sorted((copy/"_proc/_docs").glob("*.html"))}, root=copy)


def test_renders_without_a_word(site):
    assert site.problems == []


def test_every_notebook_is_a_page(site, root):
    assert {p.stem for p in (root/"nbs").glob("[!_.]*.ipynb")} == {o.removesuffix(".html") for o in site.pages if o != "404.html"}


def test_links_and_anchors(site):
    bad = []
    for name, page in site.pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link) or link == "#": continue
            file, _, anchor = link.partition("#")
            file = file.removeprefix("./") or name
            if file not in site.pages:
                if not (site.root/"_proc/_docs"/file).exists(): bad.append(f"{name}: {link}")
            elif anchor and anchor not in site.pages[file].ids: bad.append(f"{name}: {link}, no such place")
    assert not bad, "\n".join(bad)


def test_pictures_say_what_they_show(site):
    assert {k: v.bare for k, v in site.pages.items() if v.bare} == {}


def test_formulas_and_numbers_arrive(site, root):
    for p in (root/"nbs").glob("[!_.]*.ipynb"):
        nb = nbformat.read(p, as_version=4)
        texts = [c.source for c in nb.cells if c.cell_type == "markdown"]
        texts += [str(o.data["text/markdown"]) for c in nb.cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
        found = [f for t in texts for f in typeset.formulas(t)]
        title = len([f for t in texts if t.startswith("# ") for f in typeset.formulas(t)])
        assert site.pages[f"{p.stem}.html"].maths == len(found)-title, p.stem
        assert {label for *_, label in found if label} <= site.pages[f"{p.stem}.html"].ids, p.stem
        figures = {typeset.options(c.source)["label"] for c in nb.cells if c.cell_type == "code" and typeset.pictures(c)}
        assert figures <= site.pages[f"{p.stem}.html"].ids, p.stem


# ---- what a source says

@pytest.mark.parametrize("text, want", [
    ("$a$ and $b$", [("a", False, None), ("b", False, None)]),
    ("$$\nx\n$$ {#eq-x}", [("\nx\n", True, "eq-x")]),
    ("`$a$` costs $5 and $6, $ a $ not", []),
    ("```\n$a$\n```\n$b$", [("b", False, None)]),
    (r"\$a\$", []),
    (r"$\$$", [(r"\$", False, None)]),
    ("a $|x|$, b $y$.", [("|x|", False, None), ("y", False, None)]),
])
def test_formulas(text, want):
    assert typeset.formulas(text) == want


def test_references():
    assert typeset.references("by @eq-gap, @fig-a-b. `@eq-no` me@eq-no.org [@smith] $@eq-no$ (@eq-two)") == ["eq-gap", "fig-a-b", "eq-two"]


def test_options():
    assert typeset.options('#| echo: false\n#| label: fig-a\n#| fig-cap: "B: c."\nplot()\n#| fig-alt: no') == {"label": "fig-a", "fig-cap": "B: c."}
    assert typeset.options('#| fig-cap: A: b\n#| fig-alt: "\\sigma"\n#| label: fig-b') == {"label": "fig-b"}


def test_mathml_by_hand():
    half, bad = typeset.mathml([(r"\frac12", False, None), (r"\nofrac{", True, None)])
    assert "<mfrac><mn>1</mn><mn>2</mn></mfrac>" in half and bad is None


def test_no_mark_of_markdown_is_left():
    [shown] = typeset.mathml([(r"p^*_{[a]} \| b_1 \log x", False, None)])
    text = re.sub(r"<[^>]*>", "", typeset.plain(shown))
    assert "*" not in text and not re.search(r"[\[\]_|]", text) and "&amp;#" not in text and "\n" not in typeset.plain(shown)


def test_numbers_in_the_order_of_the_page():
    figure = '#| label: fig-{0}\n#| fig-cap: "{0}."\n#| fig-alt: "x"\nf()'
    nb = new_notebook(cells=[new_markdown_cell("@fig-b, @eq-two\n\n$$1$$ {#eq-one}\n\n$$2$$ {#eq-two}"), new_code_cell(figure.format("a")),
                             new_code_cell(figure.format("b"), outputs=[new_output("display_data", data={"text/markdown": "see @eq-one, $x$"})])])
    assert typeset.typeset(nb) == []
    text = nb.cells[0].source
    assert text.startswith("[Figure 2](#fig-b), [Equation 2](#eq-two)") and '<div class="equation" id="eq-one"><math' in text and "(1)</span>" in text
    assert '"Figure 2: b."' in nb.cells[2].source and nb.cells[2].outputs[0].data["text/markdown"].startswith("see [Equation 1](#eq-one), <math")


def test_problems_are_told():
    nb = new_notebook(cells=[new_markdown_cell(r"@eq-none and $\nofrac{$ or $$\nofrac{$$")])
    assert typeset.typeset(nb) == ["nothing is labelled eq-none", r"pandoc cannot read \nofrac{", r"pandoc cannot read \nofrac{"]


# ---- headings and links of what the package exports

def test_headings_and_links(tmp_path):
    code = f"#| code-fold: show\n{docs.SHOWN}\n@dataclass\nclass Big: pass\ndef small(x): return x\ndef _own(): pass"
    nbformat.write(new_notebook(cells=[new_code_cell(code), new_code_cell("def unseen(): pass")]), tmp_path/"10_a.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell(f"{docs.SHOWN}\ndef twice(): pass")]), tmp_path/"11_b.ipynb")
    nbformat.write(new_notebook(cells=[new_code_cell(f"{docs.SHOWN}\ndef twice(): pass")]), tmp_path/"12_c.ipynb")
    home = docs.homes(tmp_path)
    assert home == {"Big": "10_a.ipynb#big", "small": "10_a.ipynb#small"}
    text = "`small`, `Big` `twice` `small(x)`\n# `small`\n`Big`\n```\n`small`\n```\n[`small`](x)"
    want = "[`small`](#small), [`Big`](#big) `twice` `small(x)`\n# `small`\n[`Big`](#big)\n```\n`small`\n```\n[`small`](x)"
    assert docs.linked(text, home, "10_a.ipynb") == want
    assert docs.linked("`small`", home, "11_b.ipynb") == "[`small`](10_a.ipynb#small)"
    heading, source = docs.headed(new_code_cell(code))
    assert heading.source == "### Big {.exported}\n\n### small {.exported}" and source.source.startswith("@dataclass")
    assert [c.source for c in docs.headed(new_code_cell("x = 1"))] == ["x = 1"]
