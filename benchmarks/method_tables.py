"""The measured tables of docs/methods.md, made from the files in benchmarks/results.

    python -m benchmarks.method_tables
    python -m benchmarks.method_tables --check

The first writes every table anew, between its markers (``<!-- table NAME -->`` ... ``<!-- /table NAME -->``). With
``--check`` nothing is written: tables that the results contradict are named, and the exit status is 1.

What the papers claim stands here, beside the figures it is compared with. Most of it is from abstracts, released code
and other people's summaries; values with ~ were read off plots.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import report

PAGE = Path(__file__).resolve().parents[1] / "docs" / "methods.md"
RESULTS = Path(__file__).with_name("results")
FILES = (
    "staged",
    "staged_sampled",
    "accepted_length",
    "accepted_length_long",
    "side_by_side",
    "side_by_side_methods",
    "swift",
    "coupling",
    "s3d",
)

BESIDE = ["", "the paper", "here"]
ABSENT, BELOW = "not measured", "below"
LARGEST = 36  # nodes: the size of the staged paper's trees
LOOKED_UP = 16  # nodes of the n-gram trees that are compared
POINTS = 3  # of a curve, one in so many is shown
SPEEDS = ("plain", "sssd", "vllm_ngram", "vllm_suffix", "llama_cpp", "service_plain", "service")

Result = dict[str, Any]
Results = Mapping[str, Result]


def staged(results: Results) -> str:
    """Every form and size that was replayed."""
    found = results["staged"]
    names = ["form", "nodes", "tokens a round", "by prompt", "draft passes a round", "weights read a token"]
    names += ["by small", "by medium"]
    rows = []
    for row in found["rows"]:
        origins = [f"{100 * row['tokens_by_origin'].get(stage, 0):.1f} %" for stage in ("small", "medium")]
        length, passes = f"{row['accepted_length']:.2f}", f"{row['draft_passes_per_round']:.2f}"
        traffic, spread = f"{row['relative_weight_traffic']:.3f}", row["by_prompt"]
        middle = f"{spread['p10']:.1f} to {spread['p90']:.1f}"
        rows.append([row["form"], str(row["nodes"]), length, middle, passes, traffic, *origins])
    return _with_source(report.table(names, rows), found, f"{found['records']} recorded greedy answers")


def staged_sampled(results: Results) -> str:
    """Trees of one size, by how the answers' tokens were chosen."""
    rows = []
    for name in ("staged", "staged_sampled"):
        found = results[name]
        chosen = "greedy" if not found["temperature"] else f"T={found['temperature']:g}, top-k {found['top_k']}"
        by_form = {row["form"]: row for row in found["rows"] if row["nodes"] == LARGEST}
        lengths = {form: row["accepted_length"] for form, row in by_form.items()}
        gain = lengths["staged, tree"] / max(lengths["small"], lengths["medium, tree"])
        passes = by_form["staged, tree"]["draft_passes_per_round"]
        rows.append([chosen, *(f"{lengths[form]:.2f}" for form in lengths), f"{gain:.2f}", f"{passes:.2f}"])
    names = ["", *lengths, "by the better stage", "draft passes a round"]
    return _with_source(report.table(names, rows), found, f"{found['records']} recorded answers, {LARGEST} nodes")


def staged_paper(results: Results) -> str:
    """Relative weight traffic of the greedy runs, and the sizes behind it."""
    found = results["staged"]
    row = {entry["form"]: entry for entry in found["rows"] if entry["nodes"] == LARGEST}
    read = {form: f"{entry['relative_weight_traffic']:.2f}" for form, entry in row.items()}
    length = {form: entry["accepted_length"] for form, entry in row.items()}
    gain = length["staged, tree"] / max(length["small"], length["medium, tree"])
    rows = [
        ["nodes of a tree", "36", str(LARGEST)],
        ["weights a draft pass reads, by the target's", "1/20 to 1/15", f"1/{1 / found['draft_weight']:.0f}"],
        ["weights read a token, n-grams alone", "none given", read["small"]],
        ["weights read a token, draft model alone, a chain", "0.31", read["medium, chain"]],
        ["weights read a token, staged", "0.23", read["staged, tree"]],
        ["tokens a round, staged by the better stage", "none given", f"{gain:.2f}"],
        ["speed by plain decoding's", "3.16", BELOW],
    ]
    return report.table(BESIDE, rows)


def sssd(results: Results) -> str:
    """Tokens a round and the time of a proposal, by where SSSD looks and how much is stored."""
    found = results["accepted_length"]
    names = ["looks in", "tokens stored", "nodes", "tokens a round", "median µs", "95 % within µs"]
    meaning = {"own": "the text itself", "store": "the store", "both": "both"}
    rows = []
    for row in (row for row in found["rows"] if row["source"] in meaning):
        times = [f"{row['propose_us'][which]:.0f}" for which in ("median", "p95")]
        where = [meaning[row["source"]], f"{row['store_tokens']:,}", str(row["nodes"])]
        rows.append([*where, f"{row['accepted_length']:.2f}", *times])
    return _with_source(report.table(names, rows), found, f"{found['records']} recorded greedy answers")


def sssd_live(results: Results) -> str:
    """Tokens a round while an empty store fills with the answers, by itself and beside the shipped one."""
    found = results["accepted_length"]
    own, beside = (
        {row["nodes"]: row for row in found["rows"] if row["source"] == source} for source in ("live", "all")
    )
    names = ["nodes", "live tokens stored", "text + live", "text + live + store"]
    rows = []
    for nodes, row in own.items():
        for (size, alone), (_, all_three) in zip(row["by_part"], beside[nodes]["by_part"]):
            rows.append([str(nodes), f"{size:,}", f"{alone:.2f}", f"{all_three:.2f}"])
    what = f"{found['records']} recorded greedy answers in random order, quarter by quarter"
    return _with_source(report.table(names, rows), found, what)


def sssd_long(results: Results) -> str:
    """Tokens a round for the same questions behind a long chat."""
    found = results["accepted_length_long"]
    rows = {(row["source"], row["nodes"]): row for row in found["rows"]}
    sources = {"own": "the text itself", "store": "the store", "both": "both"}
    sizes = sorted({nodes for _, nodes in rows})
    names = ["questions", *(f"{meaning}, {nodes} nodes" for meaning in sources.values() for nodes in sizes)]
    forms = found["rows"][0]["by_category"]
    table = [
        [form, *(f"{rows[source, nodes]['by_category'][form]:.2f}" for source in sources for nodes in sizes)]
        for form in forms
    ]
    slowest = max(rows["both", nodes]["propose_us"]["p95"] for nodes in sizes)
    what = f"{found['records']} recorded greedy answers; 95 % of proposals within {slowest:.0f} µs"
    return _with_source(report.table(names, table), found, what)


def sssd_speed(results: Results) -> str:
    """Speeds beside plain decoding and the peers' look-ups; the report's own table, of fewer engines."""
    found = results["side_by_side"]
    few = {**found, "settings": {**found["settings"], "engines": SPEEDS}}
    return f"{report.throughput_table(few, 0.0)}\n\n{_wrapped(f'Greedy. {report.provenance_line(found)}')}"


def sssd_paper(results: Results) -> str:
    """Speed-up, and whether the two places to look add up."""
    cells = results["side_by_side"]["cells"]
    (cell,) = [cell for cell in cells if (cell["engine"], cell["concurrency"]) == ("sssd", 1)]
    ratio = cell["ratios"]["plain"]
    rows = {row["source"]: row for row in results["accepted_length"]["rows"] if row["nodes"] == LOOKED_UP}
    gain = {source: f"{row['accepted_length'] - 1:.2f}" for source, row in rows.items()}
    beside = [
        ["speed by plain decoding's, one session, chat", "~1.7", f"{ratio['point']:.2f}"],
        ["the same, at most", "2.9", ABSENT],
        ["the same, with a context of 40,000 tokens", "1.23", ABSENT],
        ["the same, beginning with an empty store", "1.1 to 1.23", ABSENT],
        ["accepted tokens a round, text + store", "nearly the sum", f"{gain['own']} + {gain['store']}"],
        ["accepted tokens a round, both together", "nearly the sum", gain["both"]],
    ]
    return report.table(BESIDE, beside)


def swift(results: Results) -> str:
    """Matchness of the shipped sets."""
    found = results["swift"]
    names = ["left out", "found", "even spread", "random, mean", "random, worst to best"]
    rows = []
    for row in found["matchness"]:
        means = [f"{row[kind]:.3f}" for kind in ("found", "uniform", "random_mean")]
        drawn = f"{row['random_worst']:.3f} to {row['random_best']:.3f}"
        rows.append([f"{row['skipped']} of {row['of']}", *means, drawn])
    tokens, texts = found["matchness"][0]["tokens"], found["settings"]["texts"]
    what = f"{tokens} tokens of {texts} recorded greedy answers; {found['settings']['random_sets']} random sets a size"
    return _with_source(report.table(names, rows), found, what)


def swift_rounds(results: Results) -> str:
    """The drafter's own rounds: how matchness becomes accepted tokens, and what early stop and siblings give."""
    found = results["swift"]
    names = ["left out, how", "matchness", "first guess right", "tokens a round", "draft passes", "forecast"]
    rows = []
    for row in found["acceptance"]:
        shares = [f"{row[name]:.3f}" for name in ("matchness", "first_guess")]
        counts = [f"{row[name]:.2f}" for name in ("accepted_length", "passes", "forecast")]
        rows.append([row["case"], *shares, *counts])
    what = f"{found['settings']['acceptance_texts']} recorded greedy answers, trees of 16 nodes"
    return _with_source(report.table(names, rows), found, what)


def swift_search(results: Results) -> str:
    """The search on the fly over one task after another, from an even spread."""
    found = results["swift"]
    stream = found["stream"]
    names = ["tokens so far", "task", "matchness", "even spread's", "sets tried", "adopted"]
    rows = []
    for point in stream["curve"][::POINTS]:
        shares = [f"{point[name]:.3f}" for name in ("found", "uniform")]
        rows.append([f"{point['tokens']:,}", point["category"], *shares, str(point["trials"]), str(point["adopted"])])
    left_out = f"{stream['skipped']} of {found['matchness'][0]['of']} left out"
    share = f"the search took {stream['search_share']:.2%} of the busy time"
    what = f"{stream['tokens']:,} tokens, {left_out}, one point in {POINTS}; {share}"
    return _with_source(report.table(names, rows), found, what)


def swift_proposals(results: Results) -> str:
    """Ways of finding sets to try, at an equal number of trials."""
    found = results["swift"]
    names = ["proposals", "sets tried", "adopted", "matchness before", "after", "CPU seconds"]
    rows = []
    for row in found["proposals"]:
        counts = [str(row[name]) for name in ("trials", "adopted")]
        rows.append([row["proposals"], *counts, f"{row['before']:.3f}", f"{row['after']:.3f}", f"{row['cpu_s']:.0f}"])
    return _with_source(report.table(names, rows), found, "one run each, from an even spread, judged on unseen texts")


def swift_paper(results: Results) -> str:
    """How much is left out, and how often the rest agrees."""
    rows = results["swift"]["matchness"]
    shares = " and ".join(f"{row['skipped'] / row['of']:.2f}" for row in rows)
    agreed = " and ".join(f"{row['found']:.2f}" for row in rows)
    beside = [
        ["share of inner sub-layers left out", "0.45 (13B)", shares],
        ["share of guesses that are right", "0.90 to 1.00 (accepted)", f"{agreed} (matchness)"],
        ["speed by plain decoding's", "1.3 to 1.6", BELOW],
        ["share of all time that the search takes", "0.8 %", f"{results['swift']['stream']['search_share']:.1%}"],
        ["speed with a set tuned for another task", "1.47 falls to 1.01", ABSENT],
    ]
    return report.table(BESIDE, beside)


def coupling(results: Results) -> str:
    """The same drafter with and without knowledge of the target's noise."""
    found = results["coupling"]
    rows = []
    for form, meaning in (("coupled", "by the shared noise"), ("uncoupled", "likeliest tokens")):
        shares = [f"{share:.3f}" for share in found["share_of_rounds_reaching_depth"][form]]
        rows.append([meaning, f"{found['accepted_length'][form]:.3f}", *shares])
    depths = [f"reach depth {depth}" for depth in range(1, len(rows[0]) - 1)]
    text = report.table(["guesses chosen", "tokens a round", *depths], rows)
    low, high = found["interval"]
    settings = found["settings"]
    ratio = f"{found['ratio']:.3f} times as many tokens a round (95 % interval {low:.3f} to {high:.3f})"
    tokens = f"{found['tokens']:,} tokens of {found['prompts']} prompts, temperature {settings['temperature']:g}"
    return _with_source(text, found, f"{ratio}; {tokens}, `{settings['skip']}`, {settings['max_nodes']} nodes")


def s3d(results: Results) -> str:
    """Guesses of several positions in one pass: trained for every size, then untrained ones."""
    found = results["s3d"]
    names = ["masks and adapters", "layers", "guessed", "nodes", "tokens a round", "right by position"]
    names += ["draft pass", "with all around it"]
    rows = []
    for row in [*found["trained"]["rows"], *found["untrained"]["rows"]]:
        right = " / ".join(f"{share:.2f}" for share in row["agreement"])
        size = [" + ".join(map(str, row["kept"])), str(row["gamma"]), str(row["nodes"])]
        costs = [f"{row[part] / row['plain_ms']:.0%}" for part in ("pass_ms", "draft_ms")]
        rows.append([row["adapter"], *size, f"{row['accepted_length']:.2f}", right, *costs, f"{row['forecast']:.2f}"])
    text = report.table([*names, "forecast"], rows)
    part = found["trained"]
    return _with_source(text, part, f"{part['records']} recorded greedy answers; costs by a plain step's")


def s3d_staged(results: Results) -> str:
    """N-grams, the adapter, and both as stages."""
    found = results["s3d"]["beside"]
    names = ["nodes", "n-grams alone", "S3D alone", "staged", "by the better stage"]
    rows = []
    for row in found["rows"]:
        gain = row["staged"] / max(row["small"], row["medium"])
        rows.append([str(row["nodes"]), *(f"{row[name]:.2f}" for name in ("small", "medium", "staged")), f"{gain:.2f}"])
    what = f"tokens a round, one draft pass in each; {found['records']} recorded greedy answers"
    return _with_source(report.table(names, rows), found, what)


def s3d_paper(results: Results) -> str:
    """The best number of guesses, one pass against several, memory."""
    trained = results["s3d"]["trained"]["rows"]
    best = max(trained, key=lambda row: row["forecast"])
    longest = max(trained, key=lambda row: row["accepted_length"])
    right, kept, gamma = longest["agreement"][0], longest["draft_ms"] / longest["plain_ms"], longest["gamma"]
    one_by_one = (1 - right ** (gamma + 1)) / (1 - right) / (1 + gamma * kept)
    at_once = longest["accepted_length"] / (1 + kept)
    beside = [
        ["best number of tokens guessed in a pass, by forecast", "about 4", str(best["gamma"])],
        [f"speed if verifying were free: {longest['nodes']} nodes of one pass", "not known", f"{at_once:.2f}"],
        [f"the same: chain of {gamma}, a pass of these layers for each", "not known", f"{one_by_one:.2f}"],
        ["memory added to the target's", "about none", f"{longest['extra_memory']:.1%}"],
        ["speed beside EAGLE, both in 8 bit, on an A10G, at most", "3.9", ABSENT],
        ["speed of Phi-3 in half precision beside quantised EAGLE", "1.4 to 2", ABSENT],
        ["memory of these two, GiB", "8.06 and 9.63", ABSENT],
    ]
    return report.table(BESIDE, beside)


def methods_speed(results: Results) -> str:
    """All drafters beside plain decoding, the governor deciding for each, and what they hold beside the target."""
    found = results["side_by_side_methods"]
    added = {
        "plain": 0.0,
        "swift": 0.0,
        "s3d": results["s3d"]["trained"]["rows"][-1]["extra_memory"],
        "mlp_speculator": results["staged"]["draft_weight"],
    }
    cells = {cell["engine"]: cell for cell in found["cells"]}
    rows = []
    for engine in found["settings"]["engines"]:
        ratio, memory = cells[engine]["ratios"]["plain"], added.get(engine)
        by_memory = ["", ""] if memory is None else [f"{memory:.1%}", f"{ratio['point'] / (1 + memory):.2f}"]
        speed = f"{ratio['point']:.2f} ({ratio['low']:.2f} … {ratio['high']:.2f})"
        rows.append([f"`{engine}`", speed, f"{cells[engine]['accepted_length']:.2f}", *by_memory])
    names = ["", "× plain", "tokens a round", "memory added to the target's", "× plain, by memory"]
    return f"{report.table(names, rows)}\n\n{_wrapped(f'Greedy, one at once. {report.provenance_line(found)}')}"


_STAGED, _SSSD = (staged, staged_sampled, staged_paper), (sssd, sssd_live, sssd_long, sssd_speed, sssd_paper)
_SWIFT, _S3D = (swift, swift_rounds, swift_search, swift_proposals, swift_paper, coupling), (s3d, s3d_staged, s3d_paper)
_ALL = (*_STAGED, *_SSSD, *_SWIFT, *_S3D, methods_speed)
TABLES: dict[str, Callable[[Results], str]] = {table.__name__: table for table in _ALL}


def read_results() -> dict[str, Result]:
    return {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in FILES}


def write_one(text: str, name: str, results: Results) -> str:
    """``text`` with this table made anew. Raises ``ValueError`` where it has no place for it."""
    return report.between(text, (f"<!-- table {name} -->", f"<!-- /table {name} -->"), f"\n{TABLES[name](results)}\n")


def stale(text: str, results: Results) -> list[str]:
    """The tables that differ from what the results say."""
    return [name for name in TABLES if write_one(text, name, results) != text]


def _with_source(table: str, result: Result, what: str) -> str:
    """``table``, and below it what was measured, where and when."""
    where = f"{result['cores']} cores of {result['cpu']}, revision {result['revision']}, {result['date']}"
    return f"{table}\n\n{_wrapped(f'{what}; {where}.')}"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_on_hyphens=False)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="name the tables that are stale instead of writing")
    args = parser.parse_args(argv)
    text, results = PAGE.read_text(), read_results()
    for name in (old := stale(text, results)):
        print(f"{PAGE.name}: table {name} {'is stale' if args.check else 'is written'}", file=sys.stderr)
        text = write_one(text, name, results)
    if not args.check:
        PAGE.write_text(text)
    return int(args.check and bool(old))


if __name__ == "__main__":
    raise SystemExit(main())
