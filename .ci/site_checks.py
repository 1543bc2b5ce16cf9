"""What a reader would meet: faults of the notebooks, the package and the tree, and of a rendered site. Every check
takes a folder and returns a list of problems, each naming a file; an empty list is a pass."""
import ast
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import refs
from readme import options, skip_exec
from refs import pages as notebooks # read again only if a file has changed

FIGURE, NOTEBOOK = 100_000, 1_000_000 # bytes
FOLDERS = {"nbs/_records": 3e6, "srnb/photos": 4e6, "srnb/weights": 25e6, "srnb/golden": 1e5} # bytes


# ---- the sources

def code(nb)->list: # (index, cell)
    return [(i, c) for i, c in enumerate(nb.cells) if c.cell_type == "code"]

def check_outputs(root:Path)->list:
    "No saved error or warning, no temporary path, no oversized notebook, and no room that was never run"
    bad = []
    for name, nb in notebooks(root).items():
        file = f"nbs/{name}.ipynb"
        if (size := (root/file).stat().st_size) > NOTEBOOK: bad.append(f"{file}: {size} bytes, at most {NOTEBOOK}")
        outputs = [(i, o) for i, c in code(nb) for o in c.outputs]
        for i, o in outputs:
            if o.output_type == "error": bad.append(f"{file} cell {i}: saved error {o.ename}: {o.evalue[:80]}")
            if o.get("name") == "stderr": bad.append(f"{file} cell {i}: stderr on the page: {o.text.strip()[:60]}")
            said = str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", ""))
            if m := re.search(r"/tmp/\w+", said): bad.append(f"{file} cell {i}: {m[0]} is another path next time")
        if name[0].isdigit() and not outputs: bad.append(f"{file}: no saved output; make pages NB={name}")
    return bad

def check_figures(root:Path)->list:
    "A figure has a label, a caption and alt text, stands alone in its cell, and the text sends the reader to it"
    bad = []
    for name, nb in notebooks(root).items():
        for i, c in code(nb):
            where, said = f"nbs/{name}.ipynb cell {i}", options(c.source)
            label, shown = said.get("label", ""), [o.get("data", {}) for o in c.outputs if "data" in o]
            pictures = [o for o in shown if any(k.startswith("image/") for k in o)]
            if label.startswith("fig-") and not pictures: bad.append(f"{where}: {label} has no saved picture")
            if not pictures: continue
            lacks = [o for o in ("label", "fig-cap", "fig-alt") if not said.get(o)]
            if lacks: bad.append(f"{where}: a figure without {', '.join(lacks)} (YAML, above the code)")
            if len(shown) > 1: bad.append(f"{where}: {len(shown)} outputs under one caption")
            sent = re.search(rf"@{label}(?![\w-])", refs.prose(nb))
            if label and not label.startswith("fig-"): bad.append(f"{where}: the label {label} must begin with fig-")
            elif label and not sent: bad.append(f"{where}: no text refers to @{label}")
    return bad

TAKEN = "_own = parameters(globals(), _before)" # what a parameters cell may say beside literals

def check_experiments(root:Path)->list:
    "Tables and benches stay out of nbdev_test; every experiment has one cell of literals tagged parameters"
    bad = []
    for name, nb in notebooks(root).items():
        kind, file = name.partition("_")[0], f"nbs/{name}.ipynb"
        if kind in ("bench", "table") and not skip_exec(nb): bad.append(f"{file}: front matter needs skip_exec: true")
        if kind not in ("train", "table", "bench"): continue
        tagged = [c for _, c in code(nb) if "parameters" in c.metadata.get("tags", [])]
        if len(tagged) != 1: bad.append(f"{file}: {len(tagged)} cells tagged parameters, must be one")
        for node in (o for c in tagged for o in ast.parse(c.source.replace(TAKEN, "")).body):
            try: ast.literal_eval(node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else node)
            except (ValueError, TypeError): bad.append(f"{file}: no literal among the parameters: {ast.unparse(node)}")
    return bad

def imported(tree)->set: # names of rooms that a module imports, at its top or inside
    used = set()
    for o in ast.walk(tree):
        if isinstance(o, ast.Import): used |= {a.name.split(".")[1] for a in o.names if a.name.startswith("srnb.")}
        if not isinstance(o, ast.ImportFrom): continue
        package, _, room = f"srnb.{o.module or ''}".partition(".") if o.level else o.module.partition(".")
        if package == "srnb": used |= {room.split(".")[0]} if room else {a.name for a in o.names}
    return used - {"__version__"}

def check_floors(root:Path)->list:
    "A numbered notebook exports the module of its name, which imports only from lower numbers"
    floor = {o.partition("_")[2]: int(o.partition("_")[0]) for o in notebooks(root) if re.match(r"\d+_", o)}
    there = {p.stem: p for p in sorted((root/"srnb").glob("*.py")) if not p.stem.startswith("_")}
    bad = [f"srnb/{o}.py: no numbered notebook exports it" for o in sorted(there.keys()-floor)]
    bad += [f"nbs/{floor[o]:02}_{o}.ipynb: there is no srnb/{o}.py" for o in sorted(floor.keys()-there)]
    for module in floor.keys() & there:
        for o in sorted(imported(refs.parsed(there[module].read_text()))):
            if floor.get(o, 1000) >= floor[module]:
                bad.append(f"srnb/{module}.py: floor {floor[module]} imports {o}, floor {floor.get(o, 'unknown')}")
    return bad

def tracked(root:Path)->list: # paths
    "Files that git tracks or would add; none outside a checkout"
    cmd = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try: found = subprocess.run(cmd, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError): return []
    return sorted(root/o for o in found if o and (root/o).is_file())

def check_traces(root:Path)->list:
    "No path of a machine and no address of a package registry in a tracked file"
    rules = {"a machine's path": r"(?<![\w.~>)\]}-])/(?:home|root|Users|work|opt|mnt)/[\w.-]|\b[A-Z]:\\+Users\\",
             "a registry's address": r"https?://[^\s\"')]*(?:pypi|pythonhosted|/simple\b)|file:/{2}|index-url[ =]\S*:",
             "this checkout's or home's path": f"(?:{re.escape(str(root))}|{re.escape(str(Path.home()))})/"}
    bad = []
    for p in tracked(root):
        data = p.read_bytes()
        if p.name == "LICENSE" or b"\0" in data[:8000] or len(data) > 5e6: continue
        for n, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if '"image/' in line: continue
            what = [k for k, v in rules.items() if re.search(v, line)]
            if what: bad.append(f"{p.relative_to(root)}:{n}: {what[0]}: {line.strip()[:100]}")
    return bad

def check_sizes(root:Path)->list:
    "Records, photographs and weights stay within what the package allows"
    size = {o: sum(p.stat().st_size for p in (root/o).rglob("*") if p.is_file()) for o in FOLDERS}
    return [f"{o}: {size[o]/1e6:.1f} MB, at most {most/1e6:g}" for o, most in FOLDERS.items() if size[o] > most]

def check_links(root:Path)->list:
    "Links of the files beside the notebooks lead to a file; those of the notebooks are checked on the rendered site"
    bad = []
    for p in sorted(root.glob("*.md")):
        text = re.sub(r"^```.*?^```|`[^`\n]*`", "", p.read_text(), flags=re.M|re.S)
        links = [o for o in re.findall(r"\]\(([^)\s#]+)", text) if not re.match(r"[a-z]+:", o)]
        bad += [f"{p.name}: nothing at {o}" for o in links if not (root/o).exists()]
    return bad


# ---- a rendered site

class Page(HTMLParser):
    "What a page holds (identifiers), where it sends the reader, which files it shows, and its own faults"
    def __init__(self, text:str):
        super().__init__()
        self.ids, self.links, self.bad, self.titles = [], [], [], 0
        self.feed(text)

    def handle_data(self, data): # of styles and scripts
        m = re.search(r"@import\b.*|url\([\"']?(https?:)?//.*|\bfetch\(.*", data) if self.cdata_elem else None
        if m: self.bad.append(f"loads {m[0][:60]}")

    def handle_starttag(self, tag, attrs):
        a = {k: (v or "").strip() for k, v in attrs}
        self.titles += tag == "h1"
        if "id" in a: self.ids.append(a["id"])
        if tag == "img" and not a.get("alt"): self.bad.append(f"a picture without alt text: {a.get('src', '')[:60]}")
        for value in (a[k] for k in ("src", "href", "srcset", "data") if a.get(k)):
            if re.match(r"(https?:)?//", value) and tag != "a": self.bad.append(f"<{tag}> loads {value[:60]}")
            size = len(value)*3//4 if value.startswith("data:image") else 0
            if size > FIGURE: self.bad.append(f"a picture of {size} bytes, at most {FIGURE}")
            if not re.match(r"[a-z]+:|//|#$", value): self.links.append(value)

def check_site(site:Path)->list:
    "Every link leads to a file and a place in it; pages load nothing from elsewhere, and pictures say what they show"
    pages = {p.name: Page(p.read_text()) for p in sorted(site.glob("*.html"))}
    bad = [f"{name}: {o}" for name, page in pages.items() for o in page.bad]
    for name, page in pages.items():
        if page.titles != 1: bad.append(f"{name}: {page.titles} titles")
        bad += [f"{name}: {o} stands there twice" for o in sorted({o for o in page.ids if page.ids.count(o) > 1})]
        for link in page.links:
            file, _, anchor = unquote(link).partition("#")
            to = (site/file).resolve() if file else site.resolve()/name
            there = pages[to.name].ids if to.name in pages else [anchor]
            if not to.is_relative_to(site.resolve()) or not to.is_file(): bad.append(f"{name}: nothing at {link}")
            elif anchor and anchor not in there: bad.append(f"{name}: no such place: {link}")
    listed = set(pages).intersection(*([o.partition("#")[0] for o in page.links] for page in pages.values()))
    return bad + [f"{o}: the sidebar of _quarto.yml does not list it" for o in pages if o not in listed]


CHECKS = [check_outputs, check_figures, check_experiments, check_floors, check_traces, check_sizes, check_links]

def main()->int:
    root = Path(__file__).resolve().parent.parent
    found = [(check.__name__, o) for check in [*CHECKS, *refs.CHECKS] for o in check(root)]
    for o in found: print(*o, sep=": ")
    print(f"{len(CHECKS)+len(refs.CHECKS)} checks, {len(found)} problems")
    return 1 if found else 0


if __name__ == "__main__": sys.exit(main())
