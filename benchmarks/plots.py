"""Three plots of a table: memory, time and gradient error, against depth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

LEGEND = 1.0  # inches
FLOOR = 1e-17  # an error of zero, on a logarithmic axis


def draw(name: str, rows: Sequence[dict[str, Any]], folder: Path) -> None:
    """Write the three."""
    networks = list(dict.fromkeys(row["network"] for row in rows))
    memory = {network: {"peak": "peak, in inputs"} for network in networks}
    times = {network: {"time": "step time over plain"} for network in networks}
    errors = {n: {d: f"gradient error, {d}" for d in ("float64", "float32", "bfloat16")} for n in networks}
    for what, panels in {"memory": memory, "time": times, "error": errors}.items():
        grid(rows, panels, "linear" if what == "time" else "log", folder / f"{name}-{what}.png")


def grid(rows: Sequence[dict[str, Any]], panels: dict[str, dict[str, str]], scale: str, path: Path) -> None:
    """A column of panels for each network, one for each measure."""
    count = len(next(iter(panels.values())))
    figure, axes = plt.subplots(count, len(panels), figsize=(4.2 * len(panels), 3.2 * count + LEGEND), squeeze=False)
    for column, (network, measures) in enumerate(panels.items()):
        for at, (key, label) in zip(axes[:, column], measures.items(), strict=True):
            panel(at, [row for row in rows if row["network"] == network], key)
            at.set(title=network, xlabel="depth", ylabel=label, yscale=scale)
            depths = sorted({row["depth"] for row in rows})
            at.set_xscale("log", base=2)
            at.set_xticks(depths, map(str, depths))
            at.minorticks_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, fontsize=7)
    figure.tight_layout(rect=(0, LEGEND / (3.2 * count + LEGEND), 1, 1))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def panel(at: Any, rows: Sequence[dict[str, Any]], key: str) -> None:
    """A line for each engine; ours are solid."""
    at.set_prop_cycle(color=plt.get_cmap("tab20").colors)  # pyright: ignore[reportAttributeAccessIssue]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        points = [(r["depth"], r[key]) for r in rows if r["engine"] == engine and not isinstance(r.get(key, ""), str)]
        depths, values = zip(*points, strict=True) if points else ((), ())
        look: dict[str, Any] = {"ls": "-", "lw": 2} if engine.startswith("invfunc") else {"ls": "--", "lw": 1}
        at.plot(depths, [max(v, FLOOR) for v in values], marker="o", ms=3, label=engine, **look)
