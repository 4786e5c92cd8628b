"""Drawings: the structure is complete, the bytes are those that a real step keeps, and the SVG is a document."""

import sys
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from catalogue import mlp
from torch import Tensor, nn

import invfunc as inv
from invfunc.errors import OptionError
from invfunc.plan import profile

SVG = "{http://www.w3.org/2000/svg}"


def linear(size: int = 4) -> nn.Module:
    return nn.Linear(size, size)


def pipeline() -> inv.Invertible:
    """One of each kind of part."""
    return inv.chain(
        linear(8),
        inv.split(2),
        inv.mark(inv.couple(linear(), linear()), "store"),
        inv.mark(inv.chain(inv.couple(linear()), inv.swap()), "recompute"),
        inv.parallel(inv.ops.leaky_relu(0.5), inv.chain(inv.ops.exp(), inv.ops.log())),
        ~inv.couple(inv.ops.exp_scale(nn.Linear(4, 8)), law=inv.affine),
        inv.concat(2),
    )


def texts(drawing: inv.look.Drawing) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(drawing._repr_svg_()).iter(f"{SVG}text")]


# ---- the structure ---------------------------------------------------------------------------------------------------


def test_every_part_is_there() -> None:
    shown = str(inv.draw(pipeline()))
    assert shown.splitlines() == [
        "chain",
        "├─ Linear",
        "├─ split(2, dim=1)",
        "├─ couple(Linear, Linear)                             store",
        "│     x0 += Linear(x1)",
        "│     x1 += Linear(x0)",
        "├─ recompute",
        "│  ├─ couple(Linear)                                  recompute",
        "│  │     x0 += Linear(x1)",
        "│  └─ swap()                                          recompute",
        "├─ parallel",
        "│  ├─ leaky_relu(0.5)",
        "│  └─ chain",
        "│     ├─ exp()",
        "│     └─ log()",
        "├─ invert(couple(exp_scale(Linear), law=affine))",
        "│     x0 = invert(affine(exp_scale(Linear)(x1)))(x0)",
        "└─ concat(2, dim=1)",
    ]


@pytest.mark.parametrize(
    ("op", "lines"),
    [
        (inv.chain(), ["chain()"]),
        (inv.one_way(torch.tanh), ["tanh"]),
        (torch.tanh, ["tanh"]),
        (inv.ops.exp(), ["exp()"]),
        (inv.couple(torch.sin, torch.cos), ["couple(sin, cos)", "   x0 += sin(x1)", "   x1 += cos(x0)"]),
        (~inv.couple(torch.sin), ["invert(couple(sin))", "   x0 -= sin(x1)"]),
        (inv.couple(torch.sin, law=inv.ops.diagonal), ["couple(sin, law=diagonal)", "   x0 = diagonal(sin(x1))(x0)"]),
        (inv.chain(*[inv.ops.exp()] * 3), ["chain", "└─ exp() ×3"]),
        (inv.checkpoint(inv.ops.exp(), mode="store"), ["checkpoint(mode='store')", "└─ exp()                  store"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_text_of(op: inv.Invertible, lines: list[str]) -> None:
    assert str(inv.draw(op)).splitlines() == lines


def test_a_module_is_drawn_as_it_is_lowered() -> None:
    shown = str(inv.draw(inv.nn.Sequential(inv.nn.Linear(8, 8), nn.ReLU()), (4, 8)))
    assert [line.split() for line in shown.splitlines()[1:]] == [
        ["checkpoint", "(4,", "8)"],
        ["├─", "linear(weight,", "bias)", "(4,", "8)", "invert", "0"],
        ["└─", "ReLU", "(4,", "8)", "store", "512", "B"],
        ["in", "all", "512", "B"],
    ]
    assert str(inv.draw(inv.nn.Linear(4, 4).op)) == "linear(weight, bias)"


def test_a_plan_is_drawn_with_its_choices() -> None:
    f = inv.chain(inv.split(2), *[inv.couple(linear(), linear()) for _ in range(3)], inv.concat(2))
    costs = profile(f, (16, 8))
    whole = (("store", 0), ("store", 1), ("invert", 2, 6), ("recompute", 6, (("store", 6),)))
    plan = inv.plan(costs, max_time=1.0).with_modes(whole)
    shown = inv.draw(inv.checkpoint(f, plan=plan), (16, 8))
    ways = [part.way for part in shown.part.parts for _ in range(part.times)]
    assert ways == ["store", "store", "invert", "invert", "recompute"]
    halved = inv.draw(inv.checkpoint(f, plan=plan.with_modes((("store", 0), ("invert", 1, 7)))), (16, 8))
    assert [(part.title, part.way, len(part.steps)) for part in halved.part.parts[1:4]] == [
        ("half(Linear, target=0)", "store", 1),
        ("half(Linear, target=1)", "invert", 1),
        ("couple(Linear, Linear)", "invert", 2),
    ]
    assert halved.kept_bytes > 0


def test_an_exact_pipeline_is_drawn_with_its_codes() -> None:
    net = stack(2)
    kept = [part.keeps for part in inv.draw(inv.checkpoint(inv.exact(net, "codes")), (16, 8)).part.parts]
    assert 0 <= kept[1] - 16 * 8 <= 16 + 12 * 8  # a byte for each element, 12 where it does not fit, two witnesses
    grid = inv.draw(inv.checkpoint(inv.exact(net)), (16, 8)).part.parts[0]
    assert (grid.title, grid.wire, [part.title for part in grid.parts]) == (
        "exact", "(16, 8)", ["split(2, dim=1)", "couple(Sequential, Sequential)", "concat(2, dim=1)"],
    )  # fmt: skip


def test_compiled_stages_are_drawn_as_they_are_without() -> None:
    net = inv.checkpoint(stack(2))
    compiled = inv.draw(inv.compile_stages(net, backend="eager"), (16, 8))
    assert compiled.kept_bytes == inv.draw(net, (16, 8)).kept_bytes
    assert "compile_stages" in str(compiled)


# ---- wires and bytes -------------------------------------------------------------------------------------------------


def stack(depth: int) -> inv.Invertible:
    return inv.chain(inv.split(2), *[inv.couple(mlp(4), mlp(4)) for _ in range(depth)], inv.concat(2))


def held(fn: Callable[[Tensor], Tensor]) -> int:
    """What a real forward leaves alive: what autograd keeps, and the output."""
    return inv.measure(fn, torch.randn(16, 8).requires_grad_()).held_bytes


OUTPUT = 16 * 8 * 8  # bytes


def test_a_lowered_pipeline_keeps_what_a_real_step_keeps() -> None:
    for net in stack(4), inv.chain(stack(2), linear(8), stack(2)):
        assert inv.draw(inv.checkpoint(net), (16, 8)).kept_bytes == held(inv.checkpoint(net))
    assert inv.draw(inv.checkpoint(stack(2)), (16, 8)).kept_bytes == OUTPUT
    assert inv.draw(inv.checkpoint(stack(20)), (16, 8)).kept_bytes == OUTPUT


def test_segments_keep_one_activation_each() -> None:
    fast = inv.checkpoint(stack(6), segments=4)
    drawing = inv.draw(fast, (16, 8))
    assert drawing.kept_bytes == 4 * OUTPUT == held(fast)
    assert [part.keeps for part in drawing.part.parts if part.keeps] == [OUTPUT] * 4


def test_a_plain_pipeline_keeps_its_tape() -> None:
    net = stack(4)
    assert inv.draw(net, (16, 8)).kept_bytes == held(net) - OUTPUT  # nobody saves the output of concat


@pytest.mark.parametrize("way", ["store", "recompute", "invert"])
def test_modes_keep_what_a_real_step_keeps(way: str) -> None:
    fast = inv.checkpoint(inv.chain(stack(2), inv.ops.exp()), mode=way)
    output = {"store": 0, "recompute": OUTPUT, "invert": 0}[way]  # kept by nobody if it can be computed
    assert inv.draw(fast, (16, 8)).kept_bytes == held(fast) - output


def test_wires_are_those_of_a_run() -> None:
    drawing = inv.draw(pipeline(), (32, 8))
    assert drawing.given is not None
    assert drawing.given.wire == "(32, 8)"
    assert [part.wire for part in drawing.part.parts] == [
        "(32, 8)", "((32, 4), (32, 4))", "((32, 4), (32, 4))", "", *["((32, 4), (32, 4))"] * 2, "(32, 8)",
    ]  # fmt: skip


def test_several_inputs_are_one_wire() -> None:
    op = inv.couple(torch.sin)
    assert str(inv.draw(op, (3, 4), (3, 4))) == str(inv.draw(op, ((3, 4), (3, 4))))


def test_nothing_moves() -> None:
    norm = nn.BatchNorm1d(4)
    before, stream = [buffer.clone() for buffer in norm.buffers()], torch.get_rng_state()
    inv.draw(inv.checkpoint(inv.couple(norm, nn.Dropout())), torch.ones(3, 4), torch.ones(3, 4))
    assert all(map(torch.equal, before, norm.buffers()))
    assert torch.equal(torch.get_rng_state(), stream)


def test_an_op_that_looks_at_its_values_runs_on_real_ones() -> None:
    op = ~inv.ops.residual_flow(lambda x: 0.3 * torch.sin(x))
    assert inv.draw(inv.checkpoint(op), (4, 8)).part.parts[0].wire == "(4, 8)"


def test_what_does_not_fit_in_memory_can_be_drawn() -> None:
    rows = 2**32
    op = inv.checkpoint(inv.chain(inv.ops.leaky_relu(), inv.ops.leaky_tanh()))
    assert "32 GiB" in str(inv.draw(op, (rows, 1)))


def test_errors_are_those_of_the_op() -> None:
    with pytest.raises(inv.errors.WireError, match=r"chain stage 0 \(split\): split\(2, dim=1\) of \(3, 5\)"):
        inv.draw(stack(1), (3, 5))


# ---- SVG -------------------------------------------------------------------------------------------------------------


def test_svg_is_well_formed_and_says_the_same() -> None:
    op = pipeline()
    drawing = inv.draw(inv.checkpoint(op), (32, 8))
    found = texts(drawing)
    for word in "checkpoint", "Linear", "split(2, dim=1)", "recompute", "parallel", "exp()", "((32, 4), (32, 4))", "/":
        assert word in found
    assert any("invert, keeps" in text for text in found)
    root = ElementTree.fromstring(drawing._repr_svg_())
    assert root.tag == f"{SVG}svg"
    assert float(root.attrib["width"]) > 0 < float(root.attrib["height"])


def test_names_are_escaped() -> None:
    shown = inv.draw(inv.pair(torch.exp, torch.log, name="a < b & 'c'"))
    assert "a < b & 'c'" in texts(shown)


def test_notebooks_show_the_svg() -> None:
    op = stack(2)
    assert op._repr_html_() == inv.draw(op)._repr_html_()
    assert inv.draw(op)._repr_svg_() in op._repr_html_()


def test_save(tmp_path: Path) -> None:
    drawing = inv.draw(stack(2))
    drawing.save(tmp_path / "net.svg")
    drawing.save(str(tmp_path / "net.txt"))
    assert (tmp_path / "net.svg").read_text(encoding="utf-8") == drawing._repr_svg_()
    assert (tmp_path / "net.txt").read_text(encoding="utf-8") == f"{drawing}\n"
    with pytest.raises(
        OptionError, match=r"^draw: can not save net.pdf, expected a name ending in .svg, .html, .png, "
    ):
        drawing.save(tmp_path / "net.pdf")


def test_save_as_html(tmp_path: Path) -> None:
    drawing = inv.draw(stack(2))
    drawing.save(tmp_path / "net.html")
    page = (tmp_path / "net.html").read_text(encoding="utf-8")
    assert page.startswith("<!DOCTYPE html>") and drawing._repr_svg_() in page


def test_save_as_png_draws_the_svg_to_scale(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    drawing = inv.draw(inv.checkpoint(inv.chain(stack(2), torch.tanh)), (16, 8))
    drawing.save(tmp_path / "net.png")
    pixels = image.imread(tmp_path / "net.png")
    root = ElementTree.fromstring(drawing._repr_svg_())
    sizes = [2 * float(root.attrib[name]) for name in ("height", "width")]
    assert pixels.shape[:2] == pytest.approx(sizes, abs=1)
    for colour in ("#2a9d5c", "#d9822b", "#888888"):  # what is inverted, what is stored, the wires
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (abs(pixels[..., :3] - wanted).max(-1) < 0.02).any(), colour


def test_a_png_needs_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"^a PNG needs matplotlib; pip install matplotlib, or save an .svg$"):
        inv.draw(stack(2)).save(tmp_path / "net.png")


def test_a_drawing_is_a_value() -> None:
    op = stack(2)
    assert inv.draw(op) == inv.draw(op)
    assert repr(inv.draw(op)) == str(inv.draw(op))
