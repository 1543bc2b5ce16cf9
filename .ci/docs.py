"Render the site into _docs: with the reader's own Quarto, or (--preview) with pandoc and smalldocs from PyPI"
import argparse
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
SHOWN = '#| code-summary: "Exported source"' # nbdev's mark of a cell whose code is in the package


def public(
    source:str, # of a cell
)->list[str]:
    "Names of the functions and classes that it defines for others"
    try: body = ast.parse(re.sub(r"^#\|.*$", "", source, flags=re.M)).body
    except SyntaxError: return []
    return [o.name for o in body if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not o.name.startswith("_")]


def headed(
    cell, # of a processed notebook
)->list:  # it, with a heading before it if it defines something public
    "A heading for each exported function above its source, so that it stands in the contents and can be linked"
    if cell.cell_type != "code" or SHOWN not in cell.source: return [cell]
    cell.source = cell.source.replace(f"#| code-fold: show\n{SHOWN}\n", "") # all of them are open; a page may fold its own
    names = public(cell.source)
    return [nbformat.v4.new_markdown_cell("\n\n".join(f"### {o} {{.exported}}" for o in names)), cell] if names else [cell]


def homes(
    work:Path, # processed notebooks
)->dict:       # name -> "30_preference.ipynb#dpo_loss"; a name that two rooms share is left out
    "Where each exported function and class stands"
    found = {}
    for p in sorted(work.glob("[0-9]*.ipynb")):
        for c in nbformat.read(p, as_version=4).cells:
            if c.cell_type != "code" or SHOWN not in c.source: continue
            for o in public(c.source): found[o] = None if o in found else f"{p.name}#{o.lower()}"
    return {k: v for k, v in found.items() if v}


def linked(
    text:str,   # markdown
    home:dict,  # from `homes`
    page:str,   # file name of the page, within which an anchor will do
)->str:
    "Make links of the names in backticks that the package exports"
    def one(m):
        where = home.get(m[1])
        return f"[`{m[1]}`]({where.removeprefix(page)})" if where else m[0]
    parts = re.split(r"(^```.*?^```|^#[^\n]*$|\[[^\]\n]*\]\([^)\n]*\))", text, flags=re.M|re.S) # not in code, headings, links
    return "".join(o if i%2 else re.sub(r"(?<!`)`(\w+)`(?!`)", one, o) for i, o in enumerate(parts))


def process(
    root:Path=ROOT, # the repository
)->Path:            # its _proc
    "The notebooks as a renderer takes them: nbdev's processing, headings of exported functions, links to them"
    work = root/"_proc"
    shutil.rmtree(work, ignore_errors=True) # nbdev trusts a stale one
    code = "from nbdev.serve import proc_nbs; proc_nbs(force=True)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=root, check=True)
    home = homes(work)
    for p in sorted(work.glob("*.ipynb")):
        nb = nbformat.read(p, as_version=4)
        for c in nb.cells:
            if c.cell_type == "markdown": c.source = linked(c.source, home, p.name)
            if c.cell_type == "raw": c.source = re.sub(r"^output-file:.*\n", "", c.source, flags=re.M) # pages keep their notebook's name
        nb.cells = [o for c in nb.cells for o in headed(c)]
        nbformat.write(nb, p)
    for p in (p for p in (root/"nbs/_records").rglob("*.*") if p.suffix in (".png", ".jpg", ".json")): # nbdev leaves folders that begin with _ behind
        to = work/p.relative_to(root/"nbs")
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(p, to)
    return work


def quarto()->str: # what is wrong, or nothing
    "Whether a Quarto that knows MathML, favicons and dark themes is at hand"
    tool = shutil.which("quarto")
    said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.strip() if tool else "none"
    if tool and tuple(int(o) for o in re.findall(r"\d+", said)[:2]) >= (1, 4): return ""
    return (f"make docs needs Quarto 1.4 or newer, found {said}. It comes from quarto.org and not with Python: install it, see\n"
            "that `quarto --version` answers, and run make docs again. Without it, `make preview` renders the same pages\n"
            "in a plainer way, and the notebooks can be read in Jupyter.")


def main()->int:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--preview", action="store_true", help="without Quarto")
    preview = a.parse_args().preview
    if not preview and (wrong := quarto()):
        print(wrong)
        return 1
    work, site = process(), ROOT/"_docs"
    if preview:
        import preview as renderer
        problems = renderer.render(work)
    else: problems = ["Quarto failed"] if subprocess.run(["quarto", "render", "--no-execute"], cwd=work).returncode else []
    for o in problems: print(o)
    if problems: return 1
    shutil.rmtree(site, ignore_errors=True)
    shutil.move(work/"_docs", site)
    shutil.rmtree(work)
    print("the site: _docs/index.html")
    return 0


if __name__ == "__main__": sys.exit(main())
