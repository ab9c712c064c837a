"""Checks that the layers stay apart. None knows those to its left: fa4_ext/ -> csrc/aten/ ->
csrc/core/launch/ -> csrc/core/plan/ -> kernels/.

python scripts/tools/check_layers.py [root]
"""

import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Rule:
    files: str  # glob below the root
    pattern: str
    reason: str


RULES = (
    Rule("csrc/core/**/*", r"#include\s*[<\"](torch|ATen|c10)/", "csrc/core knows no torch"),
    Rule("csrc/core/**/*", r"#include\s*[<\"](Python\.h|pybind11/)", "csrc/core knows no Python"),
    Rule("csrc/core/**/*", r"#include\s*\"(\.\./)*aten/", "csrc/core does not know its callers"),
    Rule("csrc/core/plan/*", r"#include\s*<cuda", "csrc/core/plan knows no CUDA"),
    Rule(
        "csrc/core/plan/*",
        r"#include\s*\"(\.\./)*launch/",
        "csrc/core/plan does not know what launches its plans",
    ),
    Rule(
        "csrc/core/*",
        r"#include\s*(<cuda|\"(plan|launch)/)",
        "what both rooms of csrc/core share knows neither of them",
    ),
    Rule("csrc/aten/*", r"#include\s*<(Python\.h|pybind11/)", "csrc/aten knows no Python"),
    Rule(
        "csrc/aten/*",
        r"#include\s*<(ATen|c10)/",
        "csrc/aten keeps to torch's stable ABI: torch/csrc/stable and the C shim",
    ),
    Rule(
        "csrc/aten/*",
        r"sm(90|100)_|kKernels|block_[mn]\b",
        "kernels are chosen in csrc/core/plan",
    ),
    Rule(
        "csrc/**/*",
        # A variable of torch's is a fact about torch, not a setting of ours.
        r"\bgetenv\b(?!\(\"TORCH_)",
        "our settings come through arguments: the environment is read in Python",
    ),
    Rule(
        "fa4_ext/**/*.py",
        r"^\s*(import|from)\s+(kernels|cutlass|flash_attn|triton)\b",
        "the wheel ships no compiler",
    ),
)


def violations(root: Path) -> list[str]:
    found = []
    for rule in RULES:
        for path in sorted(path for path in root.glob(rule.files) if path.is_file()):
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if re.search(rule.pattern, line):
                    found.append(
                        f"{path.relative_to(root)}:{number}: {rule.reason}: {line.strip()}"
                    )
    return found


def main(root: str = ".") -> int:
    found = violations(Path(root))
    print("\n".join(found), file=sys.stderr, end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
