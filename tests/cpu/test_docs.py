"""The code in docs/composition.md runs, its assertions included: the page stays true."""

import functools
import pathlib
import re

import jax
import pytest

import jax_fa3

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "composition.md"
# The sections that the page owes, by the first word of their headings.
OWED = (
    "Which",
    "vmap",
    "Control",
    "Rematerialisation",
    "scan",
    "Second",
    "Gradients",
    "Auto",
    "Explicit",
    "shard_map",
    "Several",
    "Export",
    "CUDA",
    "Flax",
    "Equinox",
)
# What a section needs that jax_fa3 itself does not: jax.export serialises with flatbuffers.
OPTIONAL = {"Export": "flatbuffers", "Flax": "flax", "Equinox": "equinox"}


@functools.cache
def sections():
    """Heading -> the section's code; "" is what stands before the first, which all share."""
    if not PAGE.exists():
        pytest.skip("docs/ is not part of a source distribution")
    found = {}
    for part in re.split(r"(?m)^## ", "## \n" + PAGE.read_text())[1:]:
        heading, _, body = part.partition("\n")
        blocks = re.findall(r"(?ms)^```python\n(.*?)^```$", body)
        found[heading] = "\n".join(blocks)
    return found


def test_the_page_has_a_section_with_code_for_each_composition():
    firsts = {re.match(r"\w*", heading)[0]: code for heading, code in sections().items()}
    assert set(firsts) == {"", *OWED}
    assert all(firsts.values())


@pytest.mark.usefixtures("kernels", "quick_compile")
@pytest.mark.parametrize("section", OWED)
def test_the_code_of_a_section_runs(section, monkeypatch):
    if section in OPTIONAL:
        pytest.importorskip(OPTIONAL[section])
    # Users' devices are their GPUs; these are the CPU's, also on a machine that has a GPU.
    cpu = functools.partial(jax.make_mesh, devices=jax.devices("cpu")[:8])
    monkeypatch.setattr(jax, "make_mesh", cpu)
    # A section may set it: put it back afterwards.
    before = jax_fa3.config.deterministic_backward
    monkeypatch.setattr(jax_fa3.config, "deterministic_backward", before)
    (code,) = (code for heading, code in sections().items() if heading.startswith(section))
    names = {"__name__": "composition"}
    for part, text in (("the page's head", sections()[""]), (section, code)):
        exec(compile(text, f"{PAGE.name}: {part}", "exec"), names)
