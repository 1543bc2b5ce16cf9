"Write README.md from nbs/index.ipynb: its prose, the code that it shows and the outputs that it saved"
import itertools
import re
import sys
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTE = "<!-- Written from nbs/index.ipynb by `make fmt`: change the notebook, not this file. -->"


def directives(
    source:str, # of a code cell
)->dict:        # name -> value
    "The `#|` lines of a cell"
    found = re.findall(r"^#\|\s*([\w-]+):?[ \t]*(.*)$", source, flags=re.M)
    return {name: value.strip() for name, value in found}


def options(
    source:str, # of a code cell
)->dict:        # label, fig-cap, fig-alt
    "The options of a figure, read as Quarto reads them: YAML, above the code; a line that is no YAML is left out"
    found = {}
    for line in itertools.takewhile(lambda o: o.startswith("#|"), source.splitlines()):
        if not re.match(r"#\|\s*(label|fig-cap|fig-alt):", line): continue
        try: found |= yaml.safe_load(line[2:])
        except yaml.YAMLError: continue
    return {k: v for k, v in found.items() if isinstance(v, str)}


def skip_exec(
    nb, # a notebook
)->bool:
    "Whether its front matter keeps it out of nbdev_test and of the pages that are executed together"
    return any(c.cell_type == "raw" and re.search(r"^skip_exec: true$", c.source, flags=re.M) for c in nb.cells)


def relink(
    text:str, # markdown as it stands in nbs/
)->str:       # the same, seen from the top folder
    "Put nbs/ before relative links and pictures; those that leave nbs/ lose their ../"
    def one(m):
        target = m[2]
        if re.match(r"[a-z]+:|#|/", target): return m[0]
        return m[1] + (target[3:] if target.startswith("../") else f"nbs/{target}") + m[3]
    parts = re.split(r"(^```.*?^```)", text, flags=re.M|re.S)
    return "".join(o if i%2 else re.sub(r"(\]\()([^)\s]+)((?: \"[^\"]*\")?\))", one, o) for i, o in enumerate(parts))


def output(
    out,       # of a code cell
    where:str, # for the error
)->str:        # markdown
    "One saved output as markdown"
    if out.output_type == "error": raise ValueError(f"{where}: a saved error; mend the cell and run it again")
    if out.output_type == "stream": return f"```\n{out.text.rstrip()}\n```"
    if "text/markdown" in out.data: return relink(out.data["text/markdown"].strip())
    kinds = [k for k in out.data if k != "text/plain"]
    if kinds: raise ValueError(f"{where}: README.md cannot hold {kinds[0]}; display Markdown, with pictures as files")
    return f"```\n{out.data['text/plain'].rstrip()}\n```"


def readme(
    nb,    # the index notebook
)->str:    # the text of README.md
    "README.md of an index notebook"
    parts = [NOTE]
    for i, cell in enumerate(nb.cells):
        if cell.cell_type == "markdown": parts.append(relink(cell.source.strip()))
        if cell.cell_type != "code": continue
        d = directives(cell.source)
        if "hide" in d or d.get("include") == "false": continue
        if d.get("echo") != "false":
            code = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip()
            if code: parts.append(f"```python\n{code}\n```")
        if d.get("output") != "false": parts += [output(o, f"index cell {i}") for o in cell.outputs]
    return "\n\n".join(o for o in parts if o) + "\n"


def main()->int:
    source = ROOT/"nbs/index.ipynb"
    if not source.exists():
        print("nbs/index.ipynb is missing: README.md cannot be written")
        return 1
    text, target = readme(nbformat.read(source, as_version=4)), ROOT/"README.md"
    if not target.exists() or target.read_text() != text: target.write_text(text)
    return 0


if __name__ == "__main__": sys.exit(main())
