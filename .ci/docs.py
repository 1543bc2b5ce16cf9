"Render the site into _docs: with the reader's own Quarto, or (--preview) with pandoc, plainer"
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
HELP = """make docs needs Quarto 1.4 or newer, found {}. It comes from quarto.org and not with Python: install it, see
that `quarto --version` answers, and run make docs again. Without it, `make preview` renders the same pages plainly."""


def public(
    cell,        # of a processed notebook
)->list[str]:
    "Names of the functions and classes that it exports for others"
    if cell.cell_type != "code" or SHOWN not in cell.source: return []
    body = ast.parse(cell.source).body
    return [o.name for o in body if isinstance(o, (ast.FunctionDef, ast.ClassDef)) and not o.name.startswith("_")]


def homes(
    pages:dict, # file name -> processed notebook
)->dict:        # name -> "30_preference.ipynb#dpo_loss"; a name that two rooms share is left out
    "Where each exported function and class stands"
    found = [(name, f"{p}#{name.lower()}") for p, nb in pages.items() for c in nb.cells for name in public(c)]
    names = [o for o, _ in found]
    return {name: where for name, where in found if names.count(name) == 1}


def linked(
    text:str,   # markdown
    home:dict,  # from `homes`
    page:str,   # file name of the page, within which an anchor will do
)->str:
    "Make links of the names in backticks that the package exports"
    def one(m): return f"[`{m[1]}`]({home[m[1]].removeprefix(page)})" if m[1] in home else m[0]
    parts = re.split(r"(^```.*?^```|^#[^\n]*$|\[[^\]\n]*\]\([^)\n]*\))", text, flags=re.M|re.S) # code, headings, links
    return "".join(o if i%2 else re.sub(r"(?<!`)`(\w+)`(?!`)", one, o) for i, o in enumerate(parts))


def process(
    root:Path=ROOT, # the repository
)->Path:            # its _proc
    "The notebooks as a renderer takes them: nbdev's processing, a heading above each exported function, links to them"
    work = root/"_proc"
    shutil.rmtree(work, ignore_errors=True) # nbdev trusts a stale one
    run = "from nbdev.serve import proc_nbs; proc_nbs(force=True)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", run], cwd=root, check=True)
    pages = {p.name: nbformat.read(p, as_version=4) for p in sorted(work.glob("*.ipynb"))}
    home = homes(pages)
    for name, nb in pages.items():
        cells = []
        for c in nb.cells:
            heading = "\n\n".join(f"### {o} {{.exported}}" for o in public(c))
            if heading: cells.append(nbformat.v4.new_markdown_cell(heading))
            if c.cell_type == "code": c.source = c.source.replace(f"#| code-fold: show\n{SHOWN}\n", "") # none is folded
            if c.cell_type == "markdown": c.source = linked(c.source, home, name)
            if c.cell_type == "raw": c.source = re.sub(r"^output-file:.*\n", "", c.source, flags=re.M) # as the notebook
            cells.append(c)
        nb.cells = cells
        nbformat.write(nb, work/name)
    shutil.copytree(root/"nbs/_records", work/"_records", dirs_exist_ok=True) # nbdev leaves _ folders behind
    return work


def quarto()->str: # what is wrong, or nothing
    "Whether a Quarto that knows MathML, favicons and dark themes is at hand"
    tool = shutil.which("quarto")
    said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout.strip() if tool else "none"
    return "" if tool and tuple(int(o) for o in re.findall(r"\d+", said)[:2]) >= (1, 4) else HELP.format(said)


def main()->int:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("--preview", action="store_true", help="without Quarto")
    preview, site = a.parse_args().preview, ROOT/"_docs"
    if not preview and (wrong := quarto()):
        print(wrong)
        return 1
    work = process()
    if preview:
        from preview import render
        problems = render(work)
    else: problems = ["Quarto failed"]*bool(subprocess.run(["quarto", "render", "--no-execute"], cwd=work).returncode)
    if (work/"_docs/index.html").exists():
        shutil.rmtree(site, ignore_errors=True)
        shutil.move(work/"_docs", site)
        shutil.rmtree(work)
        print("the site: _docs/index.html")
    for o in problems: print(o)
    return 1 if problems else 0


if __name__ == "__main__": sys.exit(main())
