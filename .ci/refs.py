"""Paper -> equation -> function -> notebook -> test. The equations are listed in tables of nbs/refs.ipynb, citations
stand in docstrings. Every check takes the repository's root and returns a list of problems; an empty list is a pass."""
import ast
import re
import sys
from functools import lru_cache
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = {"Wallace+ 2024": (14, 14), "DP2O-SR": None, "ASASR": (1, 47), "CTMSR": (1, 25), "Diffusion-DRO": (1, 31)}
PLACE = r"release|table \d+|[A-Z]\.\d+"               # of a paper, holds no equation: nothing to list
RULED = "spectral paths rewards curation metrics preference adversary consistency online pairs".split() # rooms where
# every public function cites a source or is listed as a helper


# ---- reading

def expand(
    text:str,  # "eqs. 4-6, 12, Algorithm 1" or "pair curation, HPO"
)->list[str]:  # ["4", "5", "6", "12", "Algorithm 1"]
    "The keys that a citation, or a row of a list, names"
    found, kind = [], ""
    for o in (o.strip() for o in text.split(",")):
        m = re.fullmatch(r"(eqs?\.|Algorithms?)? ?(\d+)(?:[-–](\d+))?", o)
        if not m:
            found.append(o)
            continue
        kind = m[1] or kind
        before = "Algorithm " if kind.startswith("A") else ""
        found += [f"{before}{i}" for i in range(int(m[2]), int(m[3] or m[2])+1)]
    return found

def mentions(
    text:str,  # prose: "by (7) and (4)–(6); see eqs. 16-20 and 30"
)->set[str]:   # numbers
    "Equations that the prose of a page names"
    spans = re.findall(r"\((\d+)\)(?:\s*(?:-|–|to)\s*\((\d+)\))?", text)
    for o in re.findall(r"eqs?\. ((?:[\d\-–, ]|and)+)", text): spans += re.findall(r"(\d+)(?:[-–](\d+))?", o)
    return {str(i) for a, b in spans for i in range(int(a), int(b or a)+1)}

@lru_cache(1024)
def parsed(source:str): # of a module or a cell; a cell with magics is no Python
    try: return ast.parse(source)
    except SyntaxError: return ast.parse("")

@lru_cache(4)
def _pages(root, stamp): return {n: nbformat.read(root/f"nbs/{n}.ipynb", as_version=4) for n, _ in stamp}

def pages(root:Path)->dict: # name -> notebook, read again only if a file has changed
    paths = sorted((root/"nbs").glob("[!_.]*.ipynb"))
    return _pages(root, tuple((p.stem, p.stat().st_mtime_ns) for p in paths))

def prose(nb)->str: return "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown")

def rooms(root:Path)->dict: # module -> notebook
    found = {n.partition("_")[2]: n for n in pages(root) if n[0].isdigit()}
    return {m: n for m, n in found.items() if (root/f"srnb/{m}.py").exists()}

def modules(root:Path)->dict: # module -> its syntax tree
    return {m: parsed((root/f"srnb/{m}.py").read_text()) for m in rooms(root)}

def public(root:Path)->list: # (module, qualified name, docstring) of every public function, class and method
    def walk(body, before):
        for o in body:
            if not isinstance(o, (ast.FunctionDef, ast.ClassDef)) or o.name.startswith("_"): continue
            yield before+o.name, ast.get_docstring(o) or ""
            if isinstance(o, ast.ClassDef): yield from walk(o.body, f"{o.name}.")
    return [(m, *o) for m, tree in modules(root).items() for o in walk(tree.body, "")]

def cited(root:Path)->list: # (module, name, source, keys), one for each source that a docstring names
    found = []
    for module, name, doc in public(root):
        for o in (o.strip() for cite in re.findall(r"\[([A-Z]\w[^\[\]]*)\]", doc) for o in cite.split(";")):
            source, _, rest = o.partition(",")
            found.append((module, name, source, expand(rest) if rest else []))
    return found

def equations(root:Path)->dict: # (module, name) -> {(paper, key)}, places of a paper left out
    found = {}
    for module, name, source, keys in cited(root):
        some = {(source, k) for k in keys if source in NUMBERS and not re.fullmatch(PLACE, k)}
        if some: found.setdefault((module, name), set()).update(some)
    return found


# ---- the tables of refs.ipynb

def rows(markdown:str)->list[list[str]]: # the cells of all tables, without their heads
    lines = [o.strip() for o in markdown.splitlines()]
    table = [[c.strip() for c in o.strip("|").split("|")] if o.startswith("|") else [""] for o in lines]
    rule = [o[0].startswith("---") for o in table] + [False]
    return [o for i, o in enumerate(table) if len(o) > 1 and not rule[i] and not rule[i+1]]

def sections(root:Path)->dict: # heading -> text below it
    parts = re.split(r"^## (.+)$", prose(pages(root)["refs"]), flags=re.M)
    return {k.strip(): v for k, v in zip(parts[1::2], parts[2::2], strict=True)}

def listed(root:Path)->dict: # paper -> list of (keys, words, state)
    found = {}
    for head, text in sections(root).items():
        paper = next((p for p in NUMBERS if f"[{p}]" in head), None)
        if paper: found[paper] = [(expand(r[0]), *r[1:3]) for r in rows(text)]
    return found

def works(root:Path)->set: # other works that docstrings cite
    return {r[0] for r in rows(sections(root).get("Other works", ""))}

def helpers(root:Path)->set: # functions of the ruled rooms that are nobody's equation
    return {o for r in rows(sections(root).get("What cites nothing", "")) for o in re.findall(r"`(\w+)`", r[0])}


# ---- who exercises a function

def names(node)->set: # names and .attributes that code uses, fixtures, and whether it asserts
    seen = set()
    for o in ast.walk(node):
        if isinstance(o, ast.Name): seen.add(o.id)
        elif isinstance(o, ast.Attribute): seen |= {f".{o.attr}", o.attr}
        elif isinstance(o, ast.arg): seen.add(o.arg)
        elif isinstance(o, ast.Assert): seen.add("assert")
    return seen

@lru_cache(128)
def _tests(source): # test -> names it uses, with those of its file's helpers, fixtures and tables
    top = {}
    for o in parsed(source).body:
        here = [o.name] if hasattr(o, "name") else [t.id for t in getattr(o, "targets", []) if isinstance(t, ast.Name)]
        for n in here: top[n] = names(o)
    def reach(n, seen):
        for o in top[n]-seen:
            seen.add(o)
            if o in top: reach(o, seen)
        return seen
    return {n: reach(n, set()) for n in top if n.startswith("test_")}

@lru_cache(4096)
def _check(source): # names that a cell uses if it checks something and is not exported
    uses = set() if re.search(r"^#\|\s*export", source, flags=re.M) else names(parsed(source))
    return uses if {"check_close", "assert"} & uses else set()

def exercised(root:Path)->dict: # (module, name) -> {"tests/test_a.py": [test, ...], "01_page": [cell, ...]}
    text = {f"tests/{p.name}": p.read_text() for p in sorted((root/"tests").glob("test_*.py"))}
    places = {n: _tests(o) for n, o in text.items()}
    for n, nb in pages(root).items():
        places[n] = {i: _check(c.source) for i, c in enumerate(nb.cells) if c.cell_type == "code"}
    below = {} # class -> its subclasses
    for o in (o for tree in modules(root).values() for o in tree.body if isinstance(o, ast.ClassDef)):
        for b in o.bases: below.setdefault(ast.unparse(b), set()).add(o.name)
    def hits(name, place): # a method is asked by its name, a class also by a subclass's
        owner, _, method = name.partition(".")
        if method and owner not in text.get(place, owner): return []
        asked = {f".{method}"} if method else {name} | below.get(name, set())
        return [n for n, uses in places[place].items() if asked & uses]
    return {(m, n): {o: found for o in places if (found := hits(n, o))} for m, n in equations(root)}


# ---- checks

def check_list(root:Path)->list:
    "Every paper has a list, every number stands in it once, and every row says what became of it"
    bad, lists = [], listed(root)
    for paper, ends in NUMBERS.items():
        keys = [k for r in lists.get(paper, []) for k in r[0]]
        if not keys: bad.append(f"refs.ipynb: no list of {paper}")
        there = range(ends[0], ends[1]+1) if keys and ends else []
        bad += [f"refs.ipynb: {paper}, {i} is missing" for i in there if str(i) not in keys]
        bad += [f"refs.ipynb: {paper}, {k} is listed twice" for k in sorted({k for k in keys if keys.count(k) > 1})]
        bad += [f"refs.ipynb: {paper}, {', '.join(r[0])}: must say `code`, `page` with a link, or `not here: ` and why"
                for r in lists.get(paper, []) if not re.fullmatch(r"code|page\b.*\]\(.*|not here: .{8,}", r[2])]
    return bad

def check_citations(root:Path)->list:
    "Every citation names a known work, and an equation that the list calls code"
    known = {(p, k): state for p, some in listed(root).items() for keys, _, state in some for k in keys}
    bad, others, all = [], works(root), cited(root)
    for module, name, source, keys in all:
        where = f"srnb/{module}.py: {name} cites {source}"
        if source not in NUMBERS: bad += [f"{where}, which is neither a paper nor another work"]*(source not in others)
        elif not keys: bad.append(f"{where} without an equation")
        for k in keys if source in NUMBERS else []:
            if re.fullmatch(PLACE, k): continue
            if (source, k) not in known: bad.append(f"{where}, {k}, which the list lacks")
            elif known[source, k] != "code": bad.append(f"{where}, {k}, of which the list says: {known[source, k]}")
    return bad + [f"refs.ipynb: no docstring cites {o}" for o in sorted(others - {o[2] for o in all})]

def check_implemented(root:Path)->list:
    "What is listed as code has a function; what is listed on a page stands on a page that names it and computes"
    have, bad = set().union(*equations(root).values()), []
    for paper, keys, state in ((p, keys, state) for p, some in listed(root).items() for keys, _, state in some):
        lost = [k for k in keys if state == "code" and (paper, k) not in have]
        bad += [f"refs.ipynb: {paper}, {k}: no docstring cites it" for k in lost]
        for page in re.findall(r"\]\((\w+)\.ipynb", state) if state.startswith("page") else []:
            where, nb = f"refs.ipynb: {paper}, {', '.join(keys)}: {page}", pages(root).get(page)
            if nb is None:
                bad.append(f"{where} is not there")
                continue
            computes = any("check_close" in _check(c.source) for c in nb.cells if c.cell_type == "code")
            if not computes: bad.append(f"{where} checks nothing")
            named = mentions(prose(nb)) if "unnumbered" not in state else keys
            bad += [f"{where} does not name ({k})" for k in keys if k not in named]
    return bad

def check_exercised(root:Path)->list:
    "A test, or a check on a page, uses every function that cites an equation"
    idle = [o for o, where in exercised(root).items() if not where]
    return [f"srnb/{m}.py: {n} cites an equation, and no test or check uses it" for m, n in idle]

def check_covered(root:Path)->list:
    "In the ruled rooms a public function cites a source or is listed as a helper, and not both"
    all, known, bad = public(root), helpers(root), []
    have = {(m, n) for m, n, _, _ in cited(root)}
    for m, n in ((m, n) for m, n, _ in all if "." not in n and m in RULED):
        cites = (m, n) in have
        if not cites and n not in known: bad.append(f"srnb/{m}.py: {n} cites nothing and is not listed as a helper")
        if cites and n in known: bad.append(f"refs.ipynb: {n} is listed as a helper and cites a source")
    return bad + [f"refs.ipynb: helper {o} is not in the package" for o in sorted(known - {o[1] for o in all})]


CHECKS = [check_list, check_citations, check_implemented, check_exercised, check_covered]

def problems(root:Path=ROOT)->list: return [o for check in CHECKS for o in check(root)]


# ---- the page

def used_by(
    where:dict,    # of one function, from `exercised`
    own:str,       # its page
    most:int=2,    # tests that are named
)->str:            # markdown
    "Who exercises a function, in a few words"
    others = [o for o in where if o[0].isdigit() and o != own]
    tests = [(o, t) for o in where if o.startswith("tests/") for t in where[o]]
    found = ["the page's own checks"] if own in where else [f"checks of [{o}]({o}.ipynb)" for o in others[:1]]
    for file in dict.fromkeys(o for o, _ in tests[:most]):
        found.append(f"`{file[6:]}`: " + ", ".join(f"`{t}`" for o, t in tests[:most] if o == file))
    return "; ".join(found) + (f" and {len(tests)-most} more" if len(tests) > most else "")

def mapping(
    paper:str,      # a key of NUMBERS
    root:Path=ROOT, # the repository
)->str:             # markdown
    "Table from a paper's equations to functions, notebooks and checks"
    who, where, page = equations(root), exercised(root), rooms(root)
    out = ["| equation | function | notebook | exercised by |", "|---|---|---|---|"]
    for key in (k for keys, _, state in listed(root)[paper] for k in keys if state == "code"):
        shown = f"({key})" if key.isdigit() else key
        for m, n in (o for o in who if (paper, key) in who[o]): # nbdev gives every function a heading
            link = f"[`{n}`]({page[m]}.ipynb#{n.partition('.')[0].lower()})"
            out.append(f"| {shown} | {link} | [{page[m]}]({page[m]}.ipynb) | {used_by(where[m, n], page[m])} |")
            shown = ""
    return "\n".join(out)

def main()->int:
    found = problems()
    for o in found: print(o)
    return 1 if found else 0


if __name__ == "__main__": sys.exit(main())
