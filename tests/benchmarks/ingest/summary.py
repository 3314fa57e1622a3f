"""From passes to the table."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
from collections import Counter
from typing import Any

from contenders import CONTENDERS

MEDIANS = ("steady", "epoch", "cpu_steady", "cpu_epoch", "first_s", "longest_wait_s", "start_s")
"""Figures of a pass of which the medians of the rounds count."""
HEADER = (
    "loader | workers | clips/s steady | of the limit | clips/s epoch | CPU s / 1,000 clips | with start-up "
    "| first batch s | memory MB above idle (in all) | spilled MB | clips lost, doubled, wrong | exact order kept?"
)
Pass = dict[str, Any]


def summarise(
    name: str, inspected: list[Pass], rounds: list[Pass], touched: dict[str, int], args: argparse.Namespace
) -> dict[str, Any]:
    """One loader's figures: medians of the rounds, memory and orders of the inspection."""
    variant = rounds[0]["variant"]
    summary: dict[str, Any] = {"variant": variant, "clips": rounds[0]["clips"]}
    for key in MEDIANS:
        values = [result[key] for result in rounds if result.get(key) is not None]
        summary[key] = statistics.median(values) if values else None
    summary["steady_rounds"] = [result["steady"] for result in rounds]
    summary["memory"] = next((p.get("memory") for p in inspected if p["variant"] == variant and name != "limit"), None)
    summary["inspected"] = [{k: p.get(k) for k in ("variant", "steady", "epoch", "first_s")} for p in inspected]
    for key in ("spilled_bytes", "fallback_bytes"):
        if key in rounds[0]:
            summary[key] = max(result[key] for result in [*inspected, *rounds])
    if "ids" in rounds[0]:
        summary |= delivered(rounds[0], touched if CONTENDERS[name].exact else None, args)
        summary["order"] = order_kept([*inspected, *rounds])
    return summary


def delivered(result: Pass, touched: dict[str, int] | None, args: argparse.Namespace) -> dict[str, int | None]:
    """Clips that did not come in an epoch, though they fill a batch; that came twice; whose bytes were wrong."""
    counts, epochs = Counter(result["ids"]), args.epochs
    wanted = result["clips"] // args.batch * args.batch * epochs
    doubled = sum(max(0, count - epochs) for count in counts.values())
    wrong = None
    if touched is not None:
        wrong = sum(touched[clip] != value for clip, value in zip(result["ids"], result["touched"], strict=True))
    return {
        "lost": max(0, wanted - (len(result["ids"]) - doubled)),
        "doubled": doubled,
        "wrong": wrong,
    }


def order_kept(passes: list[Pass]) -> str:
    """Compares the clip ids of all passes, in order."""
    by_variant: dict[Any, list[list[str]]] = {}
    for result in passes:
        by_variant.setdefault(result["variant"], []).append(result["ids"])
    orders = [ids for group in by_variant.values() for ids in group]
    if all(ids == orders[0] for ids in orders):
        return "any workers" if len(by_variant) > 1 else "repeatable"
    if all(ids == group[0] for group in by_variant.values() for ids in group):
        return "same workers"
    return "no"


def report(figures: dict[str, Any]) -> str:
    """The table, in Markdown."""
    loaders = figures["loaders"]
    limit = (loaders.get("limit") or {}).get("steady")
    lines = [f"| {HEADER} |", f"|{'---|' * (HEADER.count('|') + 1)}"]
    for name, contender in CONTENDERS.items():
        if name in loaders:
            lines.append(f"| {' | '.join([contender.title, *cells(loaders[name], limit)])} |")
        elif name in figures["failed"]:
            lines.append(f"| {contender.title} | {figures['failed'][name]} |")
    what = f"{figures['clips']} clips, batches of {figures['batch']}, medians of {figures['rounds']} rounds"
    lines += [f"{CONTENDERS[name].title}: {why}" for name, why in figures["failed"].items() if name in loaders]
    return "\n".join([f"{what}; {figures['machine']['cores']} cores", *lines, *remarks(loaders)])


def remarks(loaders: dict[str, Any]) -> list[str]:
    """What the table has no column for."""
    ours, mds, lines = loaders.get("ours", {}), loaders.get("mds", {}), []
    for name in ("ours", "ours_roomy"):
        if loaders.get(name, {}).get("steady") and mds.get("steady"):
            title = CONTENDERS[name].title
            lines.append(f"{title}: {loaders[name]['steady'] / mds['steady']:.2f} times {CONTENDERS['mds'].title}")
    if "from_middle_first_s" in ours:
        same = "the same order" if ours["from_middle_same_order"] else "ANOTHER ORDER"
        lines.append(
            f"ours, from the middle of the epoch: first batch after {ours['from_middle_first_s']:.1f} s, {same}"
        )
    if memory := ours.get("memory"):
        peaks = ", ".join(f"{(peak - memory['idle']['total']) / 1e6:,.0f}" for peak in memory["peak_of_thirds"])
        lines.append(f"ours, memory above idle in each third of the epochs: {peaks} MB")
    return lines


def cells(loader: dict[str, Any], limit: float | None) -> list[str]:
    memory, steady = loader["memory"], loader["steady"]
    losses = [loader.get(key) for key in ("lost", "doubled", "wrong")]
    return [
        str(loader["variant"] or "its own"),
        number(steady),
        f"{steady / limit:.0%}" if steady and limit else "-",
        number(loader["epoch"]),
        number(loader["cpu_steady"], 1),
        number(loader["cpu_epoch"], 1),
        number(loader["first_s"], 1),
        f"{memory['above_idle'] / 1e6:,.0f} ({memory['peak']['total'] / 1e6:,.0f})" if memory else "-",
        number(loader["spilled_bytes"] / 1e6) if "spilled_bytes" in loader else "-",
        ", ".join(map(str, losses)) if losses[0] is not None else "-",
        loader.get("order", "-"),
    ]


def number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cores": os.cpu_count(), "memory_gb": round(memory / 1e9, 1), "python": platform.python_version()}
