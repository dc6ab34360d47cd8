#!/usr/bin/env python3
"""Extract clean prose + code from the Rust toolchain's HTML documentation (MIT OR Apache-2.0).

usage: extract_corpus.py --html DIR --out DIR [--seed 1] [--jobs 2]
Writes train.txt, valid.txt, heldout.jsonl ({"source","text"} per document) and stats.json.
Documents are whole pages (split by page hash), blocks are deduplicated globally.
"""

import argparse, hashlib, json, os, re, sys
from multiprocessing import Pool
from lxml import html as LH

# The Embedded Rust Book is left out on purpose: its prose is CC-BY-SA-4.0.
BOOKS = [
    "book",
    "reference",
    "nomicon",
    "rust-by-example",
    "cargo",
    "rustc",
    "rustdoc",
    "edition-guide",
    "clippy",
    "style-guide",
    "unstable-book",
    "error_codes",
]
SKIP_DIRS = {"first-edition", "second-edition", "2018-edition", "es", "ja", "ko", "zh", "FontAwesome", "theme"}
SKIP_FILES = {"print.html", "toc.html", "404.html", "all.html", "sidebar-items.html"}
CRATES = ["std", "alloc", "core", "proc_macro", "test"]
CORE_SKIP = ("core/arch", "core/core_arch", "core/stdarch", "std/arch", "core/simd", "std/simd")
WS = re.compile(r"\s+")


def inline(el):
    """text of an inline element; <code> in backticks"""
    out = []

    def rec(e):
        if not isinstance(e.tag, str):
            if e.tail:
                out.append(e.tail)
            return
        cls = e.get("class") or ""
        if (
            e.tag in ("script", "style", "button", "svg", "sup")
            or "anchor" == cls
            or "doc-anchor" in cls
            or "src" in cls.split()
        ):
            pass
        elif e.tag == "br":
            out.append(" ")
        elif e.tag == "code":
            t = WS.sub(" ", e.text_content()).strip()
            if t:
                out.append("`" + t + "`")
        else:
            if e.text:
                out.append(e.text)
            for c in e:
                rec(c)
        if e.tail:
            out.append(e.tail)

    if el.text:
        out.append(el.text)
    for c in el:
        rec(c)
    t = WS.sub(" ", "".join(out)).replace("\u00a7", "").strip()
    return t


def pre_text(el):
    for b in el.xpath('.//span[contains(concat(" ",@class," ")," boring ")] | .//button | .//*[@class="tooltip"]'):
        tail = b.tail
        p = b.getparent()
        prev = b.getprevious()
        if tail:
            if prev is not None:
                prev.tail = (prev.tail or "") + tail
            else:
                p.text = (p.text or "") + tail
        p.remove(b)
    for br in el.xpath(".//br"):
        br.tail = "\n" + (br.tail or "")
    t = el.text_content().replace("\u00a0", " ")
    lines = [l.rstrip() for l in t.split("\n")]
    while lines and not lines[0]:
        lines.pop(0)
    while lines and not lines[-1]:
        lines.pop()
    s = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", s)


def blocks(root):
    """list of (kind, text) under root, in order"""
    out = []

    def walk(e):
        if not isinstance(e.tag, str):
            return
        tag = e.tag
        cls = (e.get("class") or "").split()
        if tag in ("script", "style", "nav", "button", "svg", "aside", "noscript", "iframe", "form"):
            return
        if "nav-wrapper" in cls or "sidebar" in cls or "footnote-definition" in cls:
            return
        if tag in ("h1", "h2", "h3", "h4", "h5", "h6"):
            t = inline(e)
            if t:
                out.append(("h", "#" * int(tag[1]) + " " + t))
        elif tag == "p":
            t = inline(e)
            if t:
                out.append(("p", t))
        elif tag == "pre":
            t = pre_text(e)
            if t:
                out.append(("c", "```\n" + t + "\n```"))
        elif tag in ("ul", "ol"):
            for i, li in enumerate(e):
                if li.tag != "li":
                    continue
                if li.xpath("./p|./pre|./ul|./ol|./div"):
                    sub = len(out)
                    lead = WS.sub(" ", li.text or "").strip()
                    if not li.xpath("./p"):
                        # inline text followed by nested blocks
                        import copy

                        c2 = copy.deepcopy(li)
                        for x in c2.xpath("./pre|./ul|./ol|./div"):
                            x.drop_tree()
                        t = inline(c2)
                        if t:
                            out.append(("l", "- " + t))
                        for x in li.xpath("./pre|./ul|./ol|./div"):
                            walk(x)
                    else:
                        for x in li:
                            walk(x)
                        if len(out) > sub and out[sub][0] == "p":
                            out[sub] = ("l", "- " + out[sub][1])
                else:
                    t = inline(li)
                    if t:
                        out.append(("l", "- " + t))
        elif tag == "table":
            for tr in e.xpath(".//tr"):
                cells = [inline(td) for td in tr.xpath("./td|./th")]
                if any(cells):
                    out.append(("l", "| " + " | ".join(cells) + " |"))
        elif tag == "dt":
            t = inline(e)
            if t:
                out.append(("p", t))
        elif tag == "dd" and not e.xpath("./p|./pre|./ul|./ol"):
            t = inline(e)
            if t:
                out.append(("l", "- " + t))
        else:
            for c in e:
                walk(c)

    walk(root)
    return out


def do_book(path):
    try:
        doc = LH.parse(path).getroot()
    except Exception:
        return []
    m = doc.xpath("//main")
    if not m:
        return []
    return blocks(m[0])


def do_api(path):
    """rustdoc page: title, declaration, doc blocks; for methods the signature then its docs"""
    try:
        doc = LH.parse(path).getroot()
    except Exception:
        return []
    m = doc.xpath('//section[@id="main-content"]')
    if not m:
        return []
    out = []
    h1 = m[0].xpath(".//h1")
    if h1:
        t = WS.sub(" ", re.sub(r"Copy item path", "", h1[0].text_content())).strip()
        out.append(("h", "# " + t))
    for el in m[0].xpath(
        './/pre[contains(@class,"item-decl")] | .//h4[contains(@class,"code-header")] | .//div[contains(concat(" ",@class," ")," docblock ")]'
    ):
        cls = el.get("class") or ""
        if "code-header" in cls:
            t = WS.sub(" ", el.text_content().replace("\u00a0", " ")).strip()
            out.append(("s", "```\n" + t + "\n```"))
        elif "item-decl" in cls:
            t = pre_text(el)
            if t and len(t) < 3000:
                out.append(("c", "```\n" + t + "\n```"))
        else:
            b = blocks(el)
            out += b
    # signatures without docs after them are noise: drop "s" blocks not followed by a doc block
    res = []
    for i, (k, t) in enumerate(out):
        if k == "s" and (i + 1 >= len(out) or out[i + 1][0] == "s"):
            continue
        res.append((k, t))
    return res


def job(a):
    kind, path, rel = a
    b = do_book(path) if kind == "b" else do_api(path)
    return rel, b


def main():
    ap = argparse.ArgumentParser()
    ap.add_argument("--html", required=True)
    ap.add_argument("--out", required=True)
    ap.add_argument("--jobs", type=int, default=2)
    a = ap.parse_args()
    os.makedirs(a.out, exist_ok=True)
    jobs = []
    for b in BOOKS:
        for d, ds, fs in os.walk(os.path.join(a.html, b)):
            ds[:] = sorted(x for x in ds if x not in SKIP_DIRS)
            for f in sorted(fs):
                if f.endswith(".html") and f not in SKIP_FILES:
                    p = os.path.join(d, f)
                    jobs.append(("b", p, os.path.relpath(p, a.html)))
    for b in CRATES:
        for d, ds, fs in os.walk(os.path.join(a.html, b)):
            rel = os.path.relpath(d, a.html)
            if rel.startswith(CORE_SKIP):
                ds[:] = []
                continue
            ds.sort()
            for f in sorted(fs):
                if f.endswith(".html") and f not in SKIP_FILES:
                    p = os.path.join(d, f)
                    if os.path.getsize(p) < 1500:
                        continue
                    jobs.append(("a", p, os.path.relpath(p, a.html)))
    print(len(jobs), "pages", file=sys.stderr)
    seen = set()
    docs = []
    raw = 0
    with Pool(a.jobs) as pool:
        for rel, bl in pool.imap(job, jobs, chunksize=16):
            keep = []
            for k, t in bl:
                raw += len(t)
                if k == "h":
                    keep.append((k, t))
                    continue
                if len(t) > 24:
                    h = hashlib.blake2b(re.sub(r"\s+", "", t).encode(), digest_size=8).digest()
                    if h in seen:
                        continue
                    seen.add(h)
                keep.append((k, t))
            # drop signatures whose docs went away, and headings with nothing under them
            res = []
            for i, (k, t) in enumerate(keep):
                nxt = keep[i + 1][0] if i + 1 < len(keep) else None
                if k == "s" and nxt in (None, "s", "h"):
                    continue
                if k == "h" and (nxt is None or (nxt == "h" and i > 0)):
                    continue
                res.append((k, t))
            if sum(len(t) for k, t in res if k != "h") < 150:
                continue
            txt = ""
            for i, (k, t) in enumerate(res):
                if i:
                    txt += "\n" if (k == "l" and res[i - 1][0] == "l") else "\n\n"
                txt += t
            txt = (
                txt.replace("\u2019", "'")
                .replace("\u2018", "'")
                .replace("\u201c", '"')
                .replace("\u201d", '"')
                .replace("\u2013", "-")
                .replace("\u2014", "--")
                .replace("\u2026", "...")
                .replace("\u200b", "")
                .replace("\u00a0", " ")
            )
            na = sum(ord(c) > 127 for c in txt)
            if na > 0.05 * len(txt):
                continue
            docs.append((rel, txt))
    split = {"train": [], "valid": [], "heldout": []}
    for rel, t in docs:
        h = int.from_bytes(hashlib.blake2b(rel.encode(), digest_size=4).digest(), "big") % 100
        # huge pages and the near-duplicate integer/float pages never leave the training split
        if len(t) > 20000 or "primitive." in rel or rel.startswith("std/num/") or "CHANGELOG" in rel:
            h = 99
        split["valid" if h < 3 else "heldout" if h < 6 else "train"].append((rel, t))
    stats = {"pages": len(jobs), "docs": len(docs), "raw_chars": raw}
    for s, ds in split.items():
        with open(os.path.join(a.out, s + ".jsonl"), "w") as f:
            for rel, t in ds:
                f.write(json.dumps({"source": rel, "text": t}, ensure_ascii=False) + "\n")
        stats[s] = {"docs": len(ds), "bytes": sum(len(t.encode()) for _, t in ds)}
    by = {}
    for rel, t in docs:
        by[rel.split("/")[0]] = by.get(rel.split("/")[0], 0) + len(t.encode())
    stats["bytes_by_source"] = by
    json.dump(stats, open(os.path.join(a.out, "stats.json"), "w"), indent=1)
    print(json.dumps(stats, indent=1))


main()
