"""How many rows a launch of the forward kernels did again, from the workspace that it leaves."""

import pathlib
import re

import numpy as np

_PLAN_H = pathlib.Path(__file__).resolve().parent.parent / "cuda" / "fwd" / "plan.h"


def layout(header=_PLAN_H):
    """{constant: bytes or count} of struct FwdWorkspace, as the header defines it."""
    struct = re.search(r"struct FwdWorkspace \{(.*?)\n\};", header.read_text(), re.DOTALL)
    if struct is None:
        raise ValueError(f"{header}: no struct FwdWorkspace")
    constants: dict[str, int] = {}
    for name, expression in re.findall(r"constexpr int64_t (k\w+) = ([^;]+);", struct[1]):
        constants[name] = eval(expression, {"__builtins__": {}}, constants)  # sums and products
    return constants


def redone(workspace, plan):
    """Groups of 64 query rows that a lazy kernel did again.

    Args:
      workspace: the handler's third result, uint8.
      plan: what the extension's describe_plan says of the launch.
    """
    (ctas,) = re.findall(r" on (\d+) CTAs", plan)
    start = layout()["kRedoCount"]
    counts = np.asarray(workspace)[start : start + 4 * int(ctas)].view(np.uint32)
    return int(counts.sum())


def groups(batch, seqlen, heads):
    """How many such groups a problem has at most: the last of a sequence may be smaller."""
    return batch * heads * -(-seqlen // 64)
