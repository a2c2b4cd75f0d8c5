"""From a comparison's records to its summary, tables and plot; also by itself, from a file of records or a summary.

    python -m benchmarks.report benchmarks/results/NAME.jsonl
    python -m benchmarks.report benchmarks/results/NAME.json --readme README.md

The first makes summary, tables and plot anew (also of a run that was cut short), the second writes the table between
the README's markers from a kept summary.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import speeds, step_time
from benchmarks.engines import ENGINES

MARKERS = ("<!-- bench -->", "<!-- /bench -->")

Summary = dict[str, Any]
Cell = dict[str, Any]


def summarise(records: Sequence[dict[str, Any]]) -> Summary:
    """Everything that is reported, from all records of one comparison; the first is its header."""
    header = {name: value for name, value in records[0].items() if name != "kind"}
    probes = [record for record in records if record["kind"] == "probe"]
    memory = {record["engine"]: record["peak_rss_mb"] for record in records if record["kind"] == "memory"}
    return {
        **header,
        "cells": speeds.cells(records, header["settings"]["baseline"]),
        "memory_mb": memory,
        "steps": step_time.summarise(step_time.join(probes)) if probes else None,
        "unavailable": {record["engine"]: record["reason"] for record in records if record["kind"] == "unavailable"},
        "mismatches": [record["text"] for record in records if record["kind"] == "mismatch"],
    }


def markdown(summary: Summary) -> str:
    """All tables of a comparison."""
    settings = summary["settings"]
    parts = [provenance_line(summary)]
    for temperature in settings["temperatures"]:
        parts += [f"## Temperature {temperature:g}", throughput_table(summary, temperature)]
        for concurrency in settings["concurrencies"]:
            found = _cells(summary, concurrency, temperature)
            if found:
                title = f"### {concurrency} at once"
                parts += [title, detail_table(found, settings["baseline"])]
                parts += [f"{title}, by category", category_table(found)]
    if summary["steps"]:
        parts += ["## Steps beside the memory limit", step_time.table(summary["steps"])]
    if summary["unavailable"]:
        parts += ["## Not measured", "\n".join(f"* `{name}`: {why}" for name, why in summary["unavailable"].items())]
    if summary["mismatches"]:
        parts += ["## ERRORS: ids that differ", "\n".join(f"* {text}" for text in summary["mismatches"])]
    return "\n\n".join(parts) + "\n"


def provenance_line(summary: Summary) -> str:
    settings = summary["settings"]
    runs = max((len(cell["runs"]) for cell in summary["cells"]), default=0)  # fewer than were wanted after a Ctrl-C
    return (
        f"{settings['prompts_measured']} prompts from {settings['categories']} categories, up to"
        f" {settings['max_tokens']} new tokens, {settings['dtype']},"
        f" {f'median of {runs} interleaved runs' if runs > 1 else 'one run'};"
        f" {summary['cores']} cores of {summary['cpu']}, revision {summary['revision']}, {summary['date']}."
    )


def throughput_table(summary: Summary, temperature: float) -> str:
    """Tokens per second of all sessions together, by concurrency; at one session also against the baseline."""
    settings = summary["settings"]
    concurrencies, base = settings["concurrencies"], settings["baseline"][0]
    head = [*(f"{count} at once" for count in concurrencies), f"× {base}", "tokens a round", "peak MB"]
    lines = _header(["tokens/s", *head])
    for engine in settings["engines"]:
        row = {cell["concurrency"]: cell for cell in _of_engine(summary, engine, temperature)}
        if not row:
            continue
        first = row[min(row)]
        speed = [f"{row[count]['tokens_per_s']:.1f}" if count in row else "" for count in concurrencies]
        length = first["accepted_length"]
        memory = summary["memory_mb"].get(engine)
        last = [_interval(first["ratios"].get(base)), f"{length:.2f}" if length else "", str(memory or "")]
        lines.append(_row([f"`{engine}`", *speed, *last]))
    return "\n".join(lines)


def detail_table(cells: Sequence[Cell], baselines: Sequence[str]) -> str:
    """One concurrency: speed and its spread over the runs, ratios, tokens a round, and where a round's time goes."""
    names = list(speeds.PARTS.values())
    parts = [f"{name} ms" for name in names]
    lines = _header(["engine", "tokens/s (runs)", *(f"× {base}" for base in baselines), "tokens a round", *parts])
    for cell in cells:
        spread = f"{cell['tokens_per_s']:.1f} ({min(cell['runs']):.1f} … {max(cell['runs']):.1f})"
        ratios = [_interval(cell["ratios"].get(base)) for base in baselines]
        length = f"{cell['accepted_length']:.2f}" if cell["accepted_length"] else ""
        times = cell["ms_per_round"]
        spent = [f"{times[name]:.2f}" if times else "" for name in names]
        lines.append(_row([f"`{cell['engine']}`", spread, *ratios, length, *spent]))
    return "\n".join(lines)


def category_table(cells: Sequence[Cell]) -> str:
    """Tokens per second of a session, and in brackets the ratio to the baseline."""
    categories = list(cells[0]["categories"])
    lines = _header(["tokens/s", *categories])
    for cell in cells:
        found = [cell["categories"].get(category) for category in categories]
        lines.append(_row([f"`{cell['engine']}`", *(_speed_and_ratio(entry) for entry in found)]))
    return "\n".join(lines)


def readme_section(summary: Summary) -> str:
    """What stands in the README: the first temperature's speeds, and which engine is what."""
    measured = dict.fromkeys(cell["engine"] for cell in summary["cells"])
    meanings = "; ".join(f"`{name}`: {ENGINES[name].meaning}" for name in measured)
    base = summary["settings"]["baseline"][0]
    temperature = summary["settings"]["temperatures"][0]
    return "\n\n".join(
        [
            f"Tokens per second at temperature {temperature:g}. {provenance_line(summary)}",
            throughput_table(summary, temperature),
            f"“× {base}” is the geometric mean over prompts of paired ratios at the first concurrency, with its 95 %"
            f" bootstrap interval; “tokens a round” counts the bonus token. {meanings}.",
        ]
    )


def write_readme(readme: Path, summary: Summary) -> None:
    """Replace what stands between the markers. Raises ``ValueError`` where they are missing."""
    readme.write_text(between(readme.read_text(), MARKERS, readme_section(summary)))


def between(text: str, markers: tuple[str, str], content: str) -> str:
    """``text`` with ``content`` between its markers. Raises ``ValueError`` where they are missing."""
    start, end = (text.find(marker) for marker in markers)
    if start < 0 or end < start:
        raise ValueError(f"there is no {markers[0]} ... {markers[1]} in the text")
    return f"{text[: start + len(markers[0])]}\n{content}\n{text[end:]}"


def plot(summary: Summary, file: Path) -> bool:
    """Speed by concurrency, one panel a temperature, as ``file``.png and .svg; False where matplotlib is missing."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    temperatures = summary["settings"]["temperatures"]
    figure, panels = pyplot.subplots(
        1, len(temperatures), figsize=(6.5 * len(temperatures), 5.5), squeeze=False, sharey=True
    )
    for panel, temperature in zip(panels[0], temperatures):
        for number, engine in enumerate(summary["settings"]["engines"]):
            found = sorted(_of_engine(summary, engine, temperature), key=lambda cell: int(cell["concurrency"]))
            where, speed = [cell["concurrency"] for cell in found], [cell["tokens_per_s"] for cell in found]
            ours = ENGINES[engine].family.ours
            panel.plot(where, speed, "o-" if ours else "s--", label=engine, color=f"C{number % 10}", markersize=4)
        panel.set(title=f"temperature {temperature:g}", xlabel="sessions at once", xscale="log", yscale="log")
        panel.set_xticks(summary["settings"]["concurrencies"], summary["settings"]["concurrencies"], minor=False)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("tokens/s, all sessions")
    panels[0][-1].legend(fontsize=7, ncols=2)
    figure.tight_layout()
    for kind in (".png", ".svg"):
        figure.savefig(file.with_suffix(kind), dpi=130)
    pyplot.close(figure)
    return True


def write_all(records: Sequence[dict[str, Any]], file: Path) -> Summary:
    """``file``.json, .md and the plot; returns the summary."""
    summary = summarise(records)
    file.with_suffix(".json").write_text(json.dumps(summary, indent=1) + "\n")
    file.with_suffix(".md").write_text(markdown(summary))
    if not plot(summary, file):
        print("no plot: matplotlib is missing (pip install -e '.[bench]')", file=sys.stderr)
    return summary


def _cells(summary: Summary, concurrency: int, temperature: float) -> list[Cell]:
    return [
        cell
        for engine in summary["settings"]["engines"]
        for cell in _of_engine(summary, engine, temperature)
        if cell["concurrency"] == concurrency
    ]


def _of_engine(summary: Summary, engine: str, temperature: float) -> list[Cell]:
    return [cell for cell in summary["cells"] if (cell["engine"], cell["temperature"]) == (engine, temperature)]


def _interval(ratio: dict[str, float] | None) -> str:
    return f"{ratio['point']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})" if ratio else ""


def _speed_and_ratio(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return ""
    return f"{entry['tokens_per_s']:.1f}" + (f" ({entry['ratio']:.2f})" if entry["ratio"] else "")


def table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are figures."""
    return "\n".join([*_header(names), *(_row(cells) for cells in rows)])


def _header(names: Sequence[str]) -> list[str]:
    return [_row(names), _row(["---", *["---:"] * (len(names) - 1)])]


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="records (.jsonl) or a summary (.json)")
    parser.add_argument("--readme", type=Path, default=None, help="write the table into this file, between its markers")
    args = parser.parse_args(argv)
    if args.file.suffix == ".jsonl":
        records = [json.loads(line) for line in args.file.read_text().splitlines()]
        summary = write_all(records, args.file)
    else:
        summary = json.loads(args.file.read_text())
    if args.readme:
        write_readme(args.readme, summary)
    else:
        print(markdown(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
