"""Equations and figures of a page: what the sources say (labels, references, TeX), and what Quarto makes of it (numbers,
links, MathML), made here with pandoc, which is what Quarto itself calls."""
import html
import itertools
import logging
import re

import pypandoc
import yaml

logging.getLogger("pypandoc").setLevel(logging.ERROR) # what it cannot read is told by the callers

CODE = r"^(?:```|~~~).*?^(?:```|~~~)|`+[^`\n]+`+|<!--.*?-->"       # in which nothing is TeX or a reference
DISPLAY = r"\$\$(?P<tex>.+?)\$\$(?:[ \t]*\{#(?P<label>[\w-]+)\})?"
INLINE = r"(?<![\\$\w])\$(?=[^\s$])(?P<in>(?:\\.|[^$\\])+?)(?<!\s)\$(?![\d$])" # pandoc's rule: no space inside, no digit after
REFERENCE = r"(?<![\w@\[/.-])@(?P<ref>(?:eq|fig|tbl)-[\w-]*\w)"
OPTION = r"#\|\s*((?:label|fig-cap|fig-alt):.*)"


def formulas(
    text:str, # markdown
)->list[tuple[str, bool, str|None]]: # TeX, whether it stands alone, its label
    "The formulas of a text, outside code"
    found = re.finditer(f"(?P<code>{CODE})|{DISPLAY}|{INLINE}", text, flags=re.M|re.S)
    return [(m["tex"] or m["in"], bool(m["tex"]), m["label"]) for m in found if not m["code"]]


def references(
    text:str, # markdown
)->list[str]: # eq-gap, fig-loss
    "What a text refers to by @"
    found = re.finditer(f"(?P<code>{CODE})|{DISPLAY}|{INLINE}|{REFERENCE}", text, flags=re.M|re.S)
    return [m["ref"] for m in found if m["ref"]]


def options(
    source:str, # of a code cell
)->dict:        # label, fig-cap, fig-alt
    "Quarto's options of a figure, read as Quarto does: YAML, above the code; a line that is no YAML is left out"
    found = {}
    for line in itertools.takewhile(lambda o: o.startswith("#|"), source.splitlines()):
        try: found |= yaml.safe_load(m[1]) if (m := re.fullmatch(OPTION, line)) else {}
        except yaml.YAMLError: continue
    return {k: v for k, v in found.items() if isinstance(v, str)}


def pictures(
    cell, # of a notebook
)->int:
    "How many pictures a code cell has saved"
    return sum(any(k.startswith("image/") for k in o.get("data", {})) for o in cell.get("outputs", []))


def mathml(
    found:list[tuple[str, bool, str|None]], # from `formulas`
)->list[str|None]:                          # <math>…</math>; None where pandoc cannot read the TeX
    "TeX to MathML, all in one call"
    if not found: return []
    marks = ["$$" if alone else "$" for _, alone, _ in found]
    text = "\n\n".join(f"::: {{#m{i}}}\n{d}{tex.strip()}{d}\n:::" for i, ((tex, *_), d) in enumerate(zip(found, marks, strict=True)))
    made = pypandoc.convert_text(text, "html", "markdown", extra_args=["--mathml", "--wrap=none"])
    parts = dict(re.findall(r'<div id="m(\d+)">(.*?)</div>', made, flags=re.S))
    return [(re.search(r"<math.*</math>", parts.get(str(i), ""), flags=re.S) or [None])[0] for i in range(len(found))]


def plain(
    shown:str, # MathML
)->str:        # on one line, in which no Markdown reader finds a mark of its own
    "MathML that survives inside Markdown: the TeX in it goes, and signs such as * become entities"
    shown = re.sub(r"\s*\n\s*", " ", re.sub(r"<annotation.*?</annotation>", "", shown, flags=re.S))
    coded = lambda m: ">" + re.sub(r"(&#?\w+;)|([!-/:@\[-`{-~])", lambda s: s[1] or f"&#{ord(s[2])};", m[1]) + "<" # noqa: E731
    return re.sub(r">([^<]+)<", coded, shown)


def typeset(
    nb, # as a renderer takes it
)->list[str]: # problems
    "Number the equations and figures of a page, link what refers to them and turn TeX into MathML, in place"
    texts = [c for c in nb.cells if c.cell_type == "markdown"]
    outputs = [o.data for c in nb.cells for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    every = [c.source for c in texts] + [str(o["text/markdown"]) for o in outputs]
    found = [f for t in every for f in formulas(t)]
    made, labels, numbers = iter(mathml(found)), [f[2] for f in found if f[2]], {}
    for i, o in enumerate(labels, 1): numbers[o] = ("Equation", i)
    count = 0
    for c in nb.cells:
        label = options(c.source).get("label", "") if c.cell_type == "code" else ""
        if not label.startswith("fig-"): continue
        count += 1
        numbers[label] = ("Figure", count)
        c.source = re.sub(r'^(#\|\s*fig-cap:\s*")', rf"\g<1>Figure {count}: ", c.source, flags=re.M)
    bad = []
    def one(m):
        if m["code"]: return m[0]
        if m["ref"]:
            if m["ref"] not in numbers:
                bad.append(f"nothing is labelled {m['ref']}")
                return m[0]
            kind, n = numbers[m["ref"]]
            return f"[{kind} {n}](#{m['ref']})"
        shown = next(made)
        if shown is None:
            bad.append(f"pandoc cannot read {m['tex'] or m['in']}")
            return f"<code>{html.escape(m[0])}</code>"
        shown = plain(shown)
        if not m["tex"]: return shown
        number = f'<span class="number">({numbers[m["label"]][1]})</span>' if m["label"] else ""
        return f'\n\n<div class="equation"{" id=" + chr(34) + m["label"] + chr(34) if m["label"] else ""}>{shown}{number}</div>\n\n'
    def whole(text): return re.sub(f"(?P<code>{CODE})|{DISPLAY}|{INLINE}|{REFERENCE}", one, text, flags=re.M|re.S)
    for c in texts: c.source = whole(c.source)
    for o in outputs: o["text/markdown"] = whole(str(o["text/markdown"]))
    return bad
