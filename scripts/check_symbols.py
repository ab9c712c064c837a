"""Fails where a shared library needs symbol versions that manylinux_2_28 lacks, or exports what is not its interface.

python scripts/check_symbols.py fa4_ext/libfa4_ext.so
"""

import re
import subprocess
import sys

# PEP 600's limits for glibc 2.28 (auditwheel's policy file).
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
INTERFACE = "fa4_ext_"


def offending_versions(symbols: str) -> list[str]:
    imported = re.findall(r"\*UND\*.*\(((\w+?)_([\d.]+))\)\s+(\S+)", symbols)
    return [
        f"{symbol} needs {text}; manylinux_2_28 has {name}_{'.'.join(map(str, NEWEST[name]))}"
        for text, name, version, symbol in imported
        if name in NEWEST and tuple(map(int, version.split("."))) > NEWEST[name]
    ]


def offending_exports(symbols: str) -> list[str]:
    exported = [line.split()[-1] for line in symbols.splitlines() if re.match(r"[0-9a-f]{16} ", line) and "*UND*" not in line]
    return [f"{symbol} is exported; allowed: {INTERFACE}*" for symbol in exported if not symbol.startswith(INTERFACE)]


def main(path: str) -> int:
    symbols = subprocess.run(["objdump", "-T", path], check=True, capture_output=True, text=True).stdout
    problems = offending_versions(symbols) + offending_exports(symbols)
    for problem in problems:
        print(f"{path}: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
