"""The shape of the code: lines too long, tables of names, fields of run classes, Python tokens. Prints the figures;
`--check` fails above the bounds, and modules named as arguments have their tokens counted apart."""
import argparse
import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

from refs import pages, parsed

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 120
BOUNDS = {"long lines": 0, "name tables": 10, "fields of run classes": 91}
RUNS = ["Run", "Method", "Data", "Base", "Judging", "Patches"] # counted beside every class whose name ends in Run
IGNORED = {getattr(tokenize, o) for o in "COMMENT NL NEWLINE INDENT DEDENT ENCODING ENDMARKER".split()}


def modules(root:Path)->dict: # name -> source; what nbdev writes for itself apart
    return {p.stem: p.read_text() for p in sorted((root/"srnb").glob("*.py")) if p.stem != "_modidx"}

def long_lines(root:Path)->list[str]: # "tests/test_a.py:12", "nbs/00_core.ipynb cell 3:12"
    "As ruff counts them: modules in their notebooks, and without the options of a cell, which must stand on one line"
    texts = {f"{o}/{p.name}": p.read_text() for o in ("tests", ".ci") for p in sorted((root/o).glob("*.py"))}
    for name, nb in pages(root).items():
        texts |= {f"nbs/{name}.ipynb cell {i}": c.source for i, c in enumerate(nb.cells) if c.cell_type == "code"}
    lines = [(f"{k}:{n}", o) for k, v in texts.items() for n, o in enumerate(v.splitlines(), 1)]
    return [where for where, o in lines if len(o) > WIDTH and not o.startswith("#|")]

def assigned(tree:ast.Module)->list: # (constant, what it is bound to) at the top of a module
    found = [(t, o.value) for o in tree.body if isinstance(o, ast.Assign) for t in o.targets]
    found += [(o.target, o.value) for o in tree.body if isinstance(o, ast.AnnAssign)]
    return [(t.id, v) for t, v in found if isinstance(t, ast.Name) and t.id.isupper() and t.id[0] != "_"]

def is_name(o)->bool: return isinstance(o, ast.Constant) and isinstance(o.value, str) and o.value.isidentifier()

def kind(o)->str: # "dict" of names, "list" of names, or neither
    if isinstance(o, ast.DictComp) or isinstance(o, ast.Call) and ast.unparse(o.func) == "dict": return "dict"
    if isinstance(o, ast.Dict): return "dict" if o.keys and all(k is None or is_name(k) for k in o.keys) else ""
    elts = o.elts if isinstance(o, (ast.Tuple, ast.List, ast.Set)) else []
    names = [e for e in elts if is_name(e) and e.value.islower()]
    return "list" if names and len(names) == sum(not isinstance(e, ast.Starred) for e in elts) else ""

def name_tables(root:Path)->list[str]: # "training.REWARDS"
    "Public constants that map names, or list them for others to choose from; a list taken by position is none"
    trees = {k: parsed(v) for k, v in modules(root).items()}
    indexed = {ast.unparse(o.value) for t in trees.values() for o in ast.walk(t) if isinstance(o, ast.Subscript)}
    found = [(m, name, kind(value)) for m, tree in trees.items() for name, value in assigned(tree)]
    return [f"{m}.{name}" for m, name, k in found if k == "dict" or k == "list" and name not in indexed]

def run_fields(root:Path, runs:list[str]=RUNS)->dict[str, int]: # "training.DPORun" -> fields of its own
    classes = [(m, o) for m, v in modules(root).items() for o in parsed(v).body if isinstance(o, ast.ClassDef)]
    data = [(m, o) for m, o in classes if any("dataclass" in ast.unparse(d) for d in o.decorator_list)]
    return {f"{m}.{o.name}": sum(isinstance(f, ast.AnnAssign) for f in o.body) for m, o in data
            if o.name.endswith("Run") or o.name in runs}

def tokens(text:str)->int: # comments and line breaks apart
    return sum(o.type not in IGNORED for o in tokenize.generate_tokens(io.StringIO(text).readline))

def problems(root:Path=ROOT)->list[str]:
    "What is above its bound"
    lines, tables, fields = long_lines(root), name_tables(root), run_fields(root)
    found = zip(BOUNDS, (len(lines), len(tables), sum(fields.values())), (lines[:20], tables, fields), strict=True)
    return [f"{what}: {n}, at most {BOUNDS[what]}: {where}" for what, n, where in found if n > BOUNDS[what]]


def main()->int:
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument("modules", nargs="*", help="tokens of these are counted apart, such as training align")
    a.add_argument("--check", action="store_true", help="fail above the bounds")
    a.add_argument("--runs", nargs="+", default=RUNS, metavar="CLASS", help="run classes whose names do not end in Run")
    a.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    a = a.parse_args()
    lines, tables, fields, texts = long_lines(a.root), name_tables(a.root), run_fields(a.root, a.runs), modules(a.root)
    print(f"lines over {WIDTH}: {len(lines)}", dict(Counter(o.partition("/")[0] for o in lines)))
    print(f"name tables: {len(tables)}", *tables)
    print(f"fields of run classes: {sum(fields.values())}", fields)
    print(f"tokens of the package: {sum(map(tokens, texts.values()))}")
    if a.modules: print(f"tokens of {', '.join(a.modules)}: {sum(tokens(texts[o]) for o in a.modules)}")
    found = problems(a.root) if a.check else []
    for o in found: print(o)
    return 1 if found else 0


if __name__ == "__main__": sys.exit(main())
