#!/usr/bin/env python3
"""Writes packaging/THIRD-PARTY-LICENSES: what is linked into the executables that are installed, with each licence's text.

    packaging/licenses.py            writes it anew
    packaging/licenses.py --check    fails if it is not what it would write

Asks cargo what the packages `volume` and `datapath` are linked with (normal dependencies, without what runs only while
building), and takes the texts from the crates' own sources. Where a crate offers a choice, its MIT text is the one
that is used; a crate without a text of its own is an error.
"""

import json
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
FILE = ROOT / "packaging" / "THIRD-PARTY-LICENSES"
SHIPPED = ["volume", "datapath"]
TARGET = "x86_64-unknown-linux-gnu"

HEAD = """\
The executables of xapi-storage-qcow2 are free software under the GNU Lesser General Public License, version 2.1 or any
later version (LICENSE). They are linked with the libraries below, each under its own licence, and with Rust's standard
library, which is available under the MIT licence or the Apache License, version 2.0
(https://www.rust-lang.org/policies/licenses); one that is linked statically also with musl, under the MIT licence
(https://git.musl-libc.org/cgit/musl/tree/COPYRIGHT). Made by packaging/licenses.py.
"""


def cargo(*arguments):
    """Runs cargo on the committed Cargo.lock and gives what it prints."""
    command = ["cargo", *arguments, "--locked", "--manifest-path", str(ROOT / "Cargo.toml")]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def linked():
    """Gives the names and versions of what is linked in."""
    packages = [word for name in SHIPPED for word in ("--package", name)]
    tree = cargo("tree", *packages, "--edges", "normal,no-proc-macro", "--target", TARGET, "--prefix", "none",
                 "--format", "{p}")
    found = set()
    for line in tree.splitlines():
        words = line.split()
        if words and not any(word.startswith("(/") for word in words):
            found.add((words[0], words[1].removeprefix("v")))
    return found


def texts(directory, expression):
    """Gives the names of the files with the text that is used."""
    files = sorted(path for path in directory.iterdir()
                   if path.is_file() and path.name.upper().startswith(("LICENSE", "LICENCE", "COPYING")))
    if "MIT" in expression:
        mit = [path for path in files if "MIT" in path.name.upper()]
        if mit:
            return mit
    return [path for path in files if "APACHE" not in path.name.upper()] or files


def document():
    """Gives the whole file: the list, then each text once."""
    metadata = json.loads(cargo("metadata", "--format-version", "1", "--filter-platform", TARGET))
    packages = {(package["name"], package["version"]): package for package in metadata["packages"]}
    rows, by_text = [], {}
    for key in sorted(linked()):
        package = packages[key]
        expression = package["license"] or "see its text"
        files = texts(pathlib.Path(package["manifest_path"]).parent, expression)
        if not files:
            sys.exit(f"licenses.py: {key[0]} {key[1]} has no licence's text among its sources")
        rows.append(f"{key[0]} {key[1]}: {expression}")
        text = "\n\n".join(path.read_text(errors="replace").strip() for path in files)
        text = "\n".join(line.rstrip() for line in text.splitlines())
        by_text.setdefault(text, []).append(f"{key[0]} {key[1]}")
    parts = [HEAD, "\n".join(rows) + "\n"]
    for text, names in sorted(by_text.items(), key=lambda item: item[1]):
        parts.append("=" * 80 + "\n" + ", ".join(names) + "\n" + "-" * 80 + "\n" + text + "\n")
    return "\n".join(parts)


def main():
    wanted = document()
    if sys.argv[1:] == ["--check"]:
        if not FILE.is_file() or FILE.read_text() != wanted:
            sys.exit(f"licenses.py: {FILE.relative_to(ROOT)} is not what is linked in: run packaging/licenses.py")
    elif sys.argv[1:]:
        sys.exit(__doc__)
    else:
        FILE.write_text(wanted)


main()
