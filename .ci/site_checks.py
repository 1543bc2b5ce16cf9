"""What can be said about the site and the tree without Quarto. Every check takes the repository's root and returns
a list of problems, each naming a file; an empty list is a pass."""
import ast
import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import refs
import yaml
from docs import public
from readme import directives
from refs import pages as notebooks # read again only if a file has changed
from typeset import formulas, mathml, options, pictures, references

FIGURE, NOTEBOOK = 100_000, 1_000_000                           # bytes
FOLDERS = {"nbs/_records": 3e6, "srnb/photos": 4e6, "srnb/weights": 25e6} # bytes
TOP = {"nbs", "srnb", "tests", "settings.ini", "pyproject.toml", "README.md", "_quarto.yml", "Makefile", "LICENSE",
       "CHANGELOG.md", "CONTRIBUTING.md"}


# ---- reading the tree

def front_matter(nb)->dict:
    "Front matter as nbdev reads it: raw cells in YAML, and the list under the first heading"
    found = {}
    for c in nb.cells:
        if c.cell_type == "raw" and (m := re.match(r"---\s*\n(.*?)\n---\s*$", c.source.strip(), flags=re.S)):
            found |= yaml.safe_load(m[1]) or {}
        m = re.search(r"^#\s+(\S.*)$", c.source, flags=re.M)
        if c.cell_type == "markdown" and "title" not in found and m:
            items = re.findall(r"^-\s+(\S.*:.*\S)\s*$", c.source, flags=re.M)
            found |= {"title": m[1].strip()} | (yaml.safe_load("\n".join(items)) if items else {})
    return found

def code(nb)->list: # (index, cell)
    return [(i, c) for i, c in enumerate(nb.cells) if c.cell_type == "code"]

def exported(nb)->list: # (index, cell)
    return [(i, c) for i, c in code(nb) if {"export", "exporti", "exports"} & directives(c.source).keys()]

def tagged(nb)->list: # (index, cell)
    "Cells that papermill takes as the parameters"
    return [(i, c) for i, c in code(nb) if "parameters" in c.metadata.get("tags", [])]

def module_of(nb)->str|None: # "core"
    for _, c in code(nb):
        if "default_exp" in (d := directives(c.source)): return d["default_exp"]
    return None

def tracked(root:Path)->list: # paths
    "Files that git tracks or would add; outside a checkout every file that is not made by a tool"
    cmd = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try: found = subprocess.run(cmd, check=True, capture_output=True, text=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        made = re.compile(r"(^|/)(\.(?!ci/|git)[^/]*|\.git|__pycache__|[^/]*\.egg-info|_runs|_docs|_proc|build|dist)/")
        found = [o for p in root.rglob("*") if not made.search(o := p.relative_to(root).as_posix())]
    return sorted({root/o for o in found if o and (root/o).is_file()})

def prose(text:str)->str:
    "Markdown without code, in which brackets are not links"
    return re.sub(r"^```.*?^```|`[^`\n]*`", "", text, flags=re.M|re.S)

def anchors(markdown:str)->set:
    "Identifiers that pandoc gives to the headings, and explicit ones"
    found = set(re.findall(r"\{#([\w:.-]+)", markdown))
    for h in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", re.sub(r"^```.*?^```", "", markdown, flags=re.M|re.S), flags=re.M):
        h = re.sub(r"\{[^}]*\}\s*$|\$[^$]*\$|[*`]|\]\([^)]*\)", "", h).lower()
        found.add(re.sub(r"^[^a-z]+", "", re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", h).strip())))
    return found

def targets(text:str, picture:bool)->list: # (text, target)
    "Links or pictures of markdown, with what they say"
    sign = "!" if picture else "(?<!!)"
    return re.findall(rf"{sign}\[([^\]]*)\]\(([^)\s]+)(?: \"[^\"]*\")?\)", prose(text))


# ---- checks

def check_top(root:Path)->list:
    "The top level holds what the design lists, and dotfiles"
    there = {p.relative_to(root).parts[0] for p in tracked(root)}
    return [f"{o}: does not belong at the top level" for o in sorted(there)
            if o not in TOP and not o.startswith(".")]

def check_sidebar(root:Path)->list:
    "Sidebar and notebooks name each other, rooms in the order of their numbers"
    def entries(o): # every file under a sidebar node
        if isinstance(o, str): return [o]
        if isinstance(o, list): return [p for q in o for p in entries(q)]
        return [o["href"] for _ in range("href" in o)] + entries(o.get("contents", []))
    sidebar = yaml.safe_load((root/"_quarto.yml").read_text())["website"]["sidebar"]
    listed, there = entries(sidebar.get("contents", [])), {f"{o}.ipynb" for o in notebooks(root)}
    bad = [f"_quarto.yml: the sidebar lists {o}, which is not in nbs/" for o in listed if o not in there]
    bad += [f"nbs/{o}: not in the sidebar of _quarto.yml" for o in sorted(there-set(listed))]
    bad += [f"_quarto.yml: the sidebar lists {o} twice" for o in sorted({o for o in listed if listed.count(o) > 1})]
    numbers = [o for o in listed if o[0].isdigit()]
    if numbers != sorted(numbers): bad.append(f"_quarto.yml: rooms are not in the order of their numbers: {numbers}")
    link = root/"nbs/_quarto.yml"
    if not (link.is_symlink() and link.resolve() == (root/"_quarto.yml").resolve()):
        bad.append("nbs/_quarto.yml: must be a link to ../_quarto.yml")
    return bad

def check_outputs(root:Path)->list:
    "No saved error, no oversized figure or notebook, and no room that was never run"
    bad = []
    for name, nb in notebooks(root).items():
        size, some = (root/f"nbs/{name}.ipynb").stat().st_size, False
        if size > NOTEBOOK: bad.append(f"nbs/{name}.ipynb: {size/1e6:.2f} MB, at most {NOTEBOOK/1e6:g}")
        for i, c in code(nb):
            for o in c.outputs:
                some, where = True, f"nbs/{name}.ipynb cell {i}"
                if o.output_type == "error": bad.append(f"{where}: saved error {o.ename}: {o.evalue[:80]}")
                if o.output_type == "stream" and "Traceback (most recent call last)" in o.text:
                    bad.append(f"{where}: a traceback among the outputs")
                if o.get("name") == "stderr": bad.append(f"{where}: stderr on the page: {o.text.strip()[:60]}")
                if re.search(r"/tmp/\w", str(o.get("text", "")) + str(o.get("data", {}).get("text/plain", ""))):
                    bad.append(f"{where}: a temporary path, which is another one next time")
                for kind, data in o.get("data", {}).items():
                    if not kind.startswith("image/"): continue
                    n = len(data) if kind == "image/svg+xml" else len(base64.b64decode(data))
                    if n > FIGURE: bad.append(f"{where}: figure of {n/1000:.0f} kB, at most {FIGURE//1000}")
        if name[0].isdigit() and not some: bad.append(f"nbs/{name}.ipynb: no saved output; make pages NB={name}")
    return bad

def check_images(root:Path)->list:
    "Pictures that the prose names exist, are small and say what they show"
    bad = []
    for name, nb in notebooks(root).items():
        for i, c in enumerate(nb.cells):
            text = c.source if c.cell_type == "markdown" else ""
            if c.cell_type == "code":
                text = "\n".join(str(o.get("data", {}).get("text/markdown", "")) for o in c.outputs)
            for alt, target in targets(text, picture=True):
                where, path = f"nbs/{name}.ipynb cell {i}", root/"nbs"/target
                if not alt.strip(): bad.append(f"{where}: picture {target} has no alt text")
                if target.startswith("attachment:"):
                    if target[11:] not in c.get("attachments", {}): bad.append(f"{where}: no attachment {target[11:]}")
                elif re.match(r"[a-z]+:", target): bad.append(f"{where}: picture {target} is not in the repository")
                elif not path.is_file(): bad.append(f"{where}: no picture at {target}")
                elif (n := path.stat().st_size) > FIGURE: bad.append(f"{where}: {target} has {n/1000:.0f} kB")
    return bad

def headed(nbs:dict, key:str)->set: # anchors
    "What the site sets above the source of exported functions and classes, see docs.py"
    nb = nbs.get(Path(key).stem)
    return {o.lower() for _, c in code(nb) if "exports" in directives(c.source) for o in public(c.source)} if nb else set()

def check_links(root:Path)->list:
    "Links inside the repository lead to a file, and to a heading of it where they name one"
    nbs = notebooks(root)
    text = {f"nbs/{o}.ipynb": "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
            for o, nb in nbs.items()}
    shown = {f"nbs/{o}.ipynb": "\n\n".join(str(out.data["text/markdown"]) for _, c in code(nb) for out in c.outputs
                                           if "text/markdown" in out.get("data", {})) for o, nb in nbs.items()}
    text |= {o: (root/o).read_text() for o in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (root/o).exists()}
    bad = []
    for source, markdown in text.items():
        for _, target in targets(markdown + "\n\n" + shown.get(source, ""), picture=False):
            if re.match(r"[a-z]+:", target): continue
            file, _, anchor = target.partition("#")
            to = ((root/source).parent/file).resolve() if file else (root/source).resolve()
            if not to.exists() or not to.is_relative_to(root.resolve()):
                bad.append(f"{source}: link to {target}, which is not there")
            elif anchor:
                key = str(to.relative_to(root.resolve()))
                if anchor not in anchors(text.get(key, "") + "\n\n" + shown.get(key, "")) | headed(nbs, key):
                    bad.append(f"{source}: link to {target}, a heading that is not there")
    return bad

def check_titles(root:Path)->list:
    "A page has one title and, below it, one plain line that says what it is about"
    bad = []
    for name, nb in notebooks(root).items():
        text = "\n\n".join(prose(c.source) for c in nb.cells if c.cell_type == "markdown")
        if (n := len(re.findall(r"^# ", text, flags=re.M))) != 1: bad.append(f"nbs/{name}.ipynb: {n} titles, must be one")
        said = re.search(r"^# .+\n+> (.+)$", text, flags=re.M)
        if not said: bad.append(f"nbs/{name}.ipynb: no line of the form `> what it is about` under the title")
        for c in nb.cells: # nbdev turns the cell of the title into front matter and drops the rest of it
            rest = re.sub(r"^# .+|^> .+|^- [\w-]+: .+", "", c.source, flags=re.M).strip()
            if c.cell_type == "markdown" and re.match(r"# ", c.source) and rest:
                bad.append(f"nbs/{name}.ipynb: a cell of its own for what follows the title: {rest[:40]}")
        if said and "$" in said[1]: bad.append(f"nbs/{name}.ipynb: TeX in the line under the title")
    return bad

def check_equations(root:Path)->list:
    "A displayed equation has a label of its own on its page, and pandoc, which Quarto calls, makes MathML of every formula"
    bad, found = [], []
    for name, nb in notebooks(root).items():
        seen = set()
        for i, c in enumerate(nb.cells):
            text = [c.source] if c.cell_type == "markdown" else [str(o.data["text/markdown"]) for o in c.get("outputs", [])
                                                                  if "text/markdown" in o.get("data", {})]
            where = f"nbs/{name}.ipynb cell {i}"
            for tex, alone, label in (f for t in text for f in formulas(t)):
                found.append((where, (tex, alone, label)))
                if not alone: continue
                if not label: bad.append(f"{where}: no label, such as {{#eq-gap}}, after $${tex[:40]}")
                elif not label.startswith("eq-"): bad.append(f"{where}: the label {label} must begin with eq-")
                elif label in seen: bad.append(f"{where}: a second {label} on the page")
                seen.add(label)
    made = mathml([f for _, f in found])
    return bad + [f"{w}: no MathML from {f[0][:60]}" for (w, f), m in zip(found, made, strict=True) if m is None]

def check_lists(root:Path)->list:
    "No paragraph begins with a number in brackets, which pandoc takes for an item of a list"
    bad = []
    for name, nb in notebooks(root).items():
        for i, c in enumerate(nb.cells):
            if c.cell_type != "markdown": continue
            for m in re.finditer(r"^\s*(?:\d+[.)]\s+|[-*]\s+)?\(\w{1,3}\)\s.*", prose(c.source), flags=re.M):
                bad.append(f"nbs/{name}.ipynb cell {i}: begin with a word, this becomes a list: {m[0].strip()[:40]}")
    return bad

def check_figures(root:Path)->list:
    "A figure has a label, a caption and alt text, stands alone in its cell, and the text sends the reader to it"
    bad = []
    for name, nb in notebooks(root).items():
        sent, seen = {r for c in nb.cells if c.cell_type == "markdown" for r in references(c.source)}, set()
        for i, c in code(nb):
            n, said, where = pictures(c), options(c.source), f"nbs/{name}.ipynb cell {i}"
            if not n:
                if said.get("label", "").startswith("fig-"): bad.append(f"{where}: {said['label']} has no saved picture")
                continue
            lacks = [o for o in ("label", "fig-cap", "fig-alt") if not said.get(o)]
            if lacks: bad.append(f"{where}: a figure without {', '.join(lacks)} (YAML, above the code)")
            shows = sum(o.output_type in ("display_data", "execute_result") for o in c.outputs)
            if shows > 1: bad.append(f"{where}: {shows} things shown in one cell, which one caption cannot name")
            label = said.get("label", "")
            if not label: continue
            if not label.startswith("fig-"): bad.append(f"{where}: the label {label} must begin with fig-")
            if label in seen: bad.append(f"{where}: a second {label} on the page")
            if label not in sent: bad.append(f"{where}: no text refers to @{label}")
            if said.get("fig-alt") and said.get("fig-alt") == said.get("fig-cap"): bad.append(f"{where}: alt text repeats the caption")
            seen.add(label)
    return bad

def check_references(root:Path)->list:
    "What a text calls by @ is on the same page"
    bad = []
    for name, nb in notebooks(root).items():
        texts = [(i, c.source) for i, c in enumerate(nb.cells) if c.cell_type == "markdown"]
        there = {label for _, t in texts for _, _, label in formulas(t)} | {options(c.source).get("label") for _, c in code(nb)}
        bad += [f"nbs/{name}.ipynb cell {i}: @{r} is not on this page" for i, t in texts for r in references(t) if r not in there]
    return bad

class _Page(HTMLParser): # what an HTML output asks for
    def __init__(self): super().__init__(); self.bad = []
    def handle_data(self, data): # of styles and scripts too
        if m := re.search(r"@import\b.*|url\([\"']?(https?:)?//.*|\bfetch\(.*", data): self.bad.append(f"loads {m[0][:60]}")
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag == "img" and not (a.get("alt") or "").strip(): self.bad.append("a picture has no alt text")
        for key in ("src", "href", "srcset", "data"):
            value = (a.get(key) or "").strip()
            far = re.match(r"(https?:)?//", value)
            if far and tag != "a": self.bad.append(f"<{tag}> loads {value[:60]}, and pages load nothing from elsewhere")
            if value.startswith("data:image") and (n := len(value)*3//4) > FIGURE:
                self.bad.append(f"picture of {n/1000:.0f} kB, at most {FIGURE//1000}")

def check_html(root:Path)->list:
    "HTML among the outputs loads nothing from elsewhere, and its pictures are small and say what they show"
    bad = []
    for name, nb in notebooks(root).items():
        for i, c in code(nb):
            for o in c.outputs:
                page = _Page()
                page.feed(str(o.get("data", {}).get("text/html", "")))
                bad += [f"nbs/{name}.ipynb cell {i}: {p}" for p in page.bad]
    return bad

def check_experiments(root:Path)->list:
    "Tables and benches stay out of nbdev_test; every experiment has one cell of literals tagged parameters"
    bad = []
    for name, nb in notebooks(root).items():
        if name.startswith(("bench_", "table_")) and front_matter(nb).get("skip_exec") is not True:
            bad.append(f"nbs/{name}.ipynb: front matter needs skip_exec: true")
        if not name.startswith(("train_", "table_", "bench_")): continue
        cells = tagged(nb)
        if len(cells) != 1: bad.append(f"nbs/{name}.ipynb: {len(cells)} cells tagged parameters, must be one")
        for i, c in cells:
            for node in ast.parse(c.source).body:
                value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else node
                try: ast.literal_eval(value)
                except (ValueError, TypeError):
                    bad.append(f"nbs/{name}.ipynb cell {i}: parameters must be literals, not `{ast.unparse(node)}`")
    return bad

def check_commands(root:Path)->list:
    "README's commands name targets of the Makefile, notebooks of nbs/ and parameters that these have"
    text, bad = (root/"README.md").read_text(), []
    goals = set(re.findall(r"^([a-z-]+):", (root/"Makefile").read_text(), flags=re.M))
    for block in re.findall(r"^```bash\n(.*?)^```", text, flags=re.M|re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["make"]:
                bad += [f"README.md: no target {o} in the Makefile" for o in words[1:] if o not in goals]
            if not any(o.endswith("papermill") for o in words[:1]): continue
            path = root/words[1]
            if not path.exists():
                bad.append(f"README.md: papermill runs {words[1]}, which is not there")
                continue
            there = set().union(*[_defined(c.source) for _, c in tagged(nbformat.read(path, as_version=4))])
            bad += [f"README.md: {words[1]} has no parameter {b}" for a, b in zip(words, words[1:], strict=False)
                    if a == "-p" and b not in there]
            if not {"--log-output", "--no-progress-bar"} <= set(words):
                bad.append(f"README.md: papermill without its options: {line}")
    return bad

def _defined(source:str)->set: # names of functions, classes and constants at the top of a module
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)): found.add(node.name)
        if isinstance(node, ast.Assign): found |= {t.id for t in node.targets if isinstance(t, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name): found.add(node.target.id)
    return found - {"__all__"}

def check_exports(root:Path)->list:
    "What notebooks export is in their modules, and modules hold nothing else"
    bad, owner = [], {}
    for name, nb in notebooks(root).items():
        module = module_of(nb)
        if module is None:
            bad += [f"nbs/{name}.ipynb cell {i}: exports without a default_exp" for i, _ in exported(nb)]
            continue
        if module in owner: bad.append(f"nbs/{name}.ipynb: exports to {module} as nbs/{owner[module]}.ipynb does")
        owner[module], path = name, root/f"srnb/{module.replace('.', '/')}.py"
        if name[0].isdigit() and name.partition("_")[2] != module: bad.append(f"nbs/{name}.ipynb: exports to {module}")
        if not path.exists():
            bad.append(f"nbs/{name}.ipynb: srnb/{module}.py was never exported")
            continue
        here, there = set(), _defined(path.read_text())
        for _, c in exported(nb): here |= _defined(c.source)
        bad += [f"nbs/{name}.ipynb: `{o}` is not in srnb/{module}.py; run make fmt" for o in sorted(here-there)]
        bad += [f"srnb/{module}.py: `{o}` is not in nbs/{name}.ipynb; run make fmt" for o in sorted(there-here)]
    for p in sorted((root/"srnb").glob("*.py")):
        if p.stem not in {*owner, "__init__", "_modidx"}: bad.append(f"srnb/{p.name}: no notebook exports it")
    return bad

def check_floors(root:Path)->list:
    "A room imports only from lower numbers"
    names = {o.partition("_")[2]: int(o.partition("_")[0]) for o in notebooks(root) if re.match(r"\d+_", o)}
    bad = []
    for module, floor in names.items():
        path = root/f"srnb/{module}.py"
        if not path.exists(): continue
        used = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                used |= {a.name.split(".")[1] for a in node.names if a.name.startswith("srnb.")}
            if isinstance(node, ast.ImportFrom):
                parts = (node.module or "").split(".")
                inside = parts if node.level else parts[1:] if parts[0] == "srnb" else None
                if inside is None: continue
                used |= {inside[0]} if inside and inside[0] else {a.name for a in node.names}
        for o in sorted(used):
            if o not in {*names, "__version__"}: bad.append(f"srnb/{module}.py: imports {o}, which no room exports")
            elif o in names and names[o] >= floor:
                bad.append(f"srnb/{module}.py: floor {floor} imports {o}, which is floor {names[o]}")
    return bad

def check_traces(root:Path)->list:
    "No path of a machine and no address of a package registry in a tracked file"
    rules = {"a machine's path": r"(?<![\w.~>)\]}-])/(?:home|root|Users|work|opt|mnt)/[\w.-]",
             "a machine's path ": r"\b[A-Z]:\\+Users\\",
             "a registry's address": r"https?://[^\s\"')]*(?:pypi|pythonhosted|/simple\b)|file:/{2}|index-url[ =]\S*:"}
    here = {"this checkout's path": str(root), "this home folder": str(Path.home())}
    bad = []
    for p in tracked(root):
        if p.name == "LICENSE": continue
        data = p.read_bytes()
        if b"\0" in data[:8000] or len(data) > 5e6: continue
        for n, line in enumerate(data.decode(errors="replace").splitlines(), 1):
            if '"image/png"' in line: continue
            what = [k.strip() for k, v in rules.items() if re.search(v, line)]
            what += [k for k, v in here.items() if f"{v}/" in line]
            if what: bad.append(f"{p.relative_to(root)}:{n}: {what[0]}: {line.strip()[:100]}")
    return bad

def check_sizes(root:Path)->list:
    "Records, photographs and weights stay within what the package allows"
    bad = []
    for folder, most in FOLDERS.items():
        size = sum(p.stat().st_size for p in (root/folder).rglob("*") if p.is_file())
        if size > most: bad.append(f"{folder}: {size/1e6:.1f} MB, at most {most/1e6:g}")
    return bad


CHECKS = [check_top, check_sidebar, check_titles, check_outputs, check_images, check_links, check_equations, check_lists, check_figures,
          check_references, check_html, check_commands, check_experiments, check_exports, check_floors, check_traces,
          check_sizes]

def main()->int:
    root, count = Path(__file__).resolve().parent.parent, 0
    every = [*CHECKS, *refs.CHECKS]
    for check in every:
        found = check(root)
        count += len(found)
        for o in found: print(f"{check.__name__}: {o}")
    print(f"{len(every)} checks, {count} problems")
    return 1 if count else 0


if __name__ == "__main__": sys.exit(main())
