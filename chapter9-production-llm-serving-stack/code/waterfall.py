"""A trace as text and as a picture, and what can be wrong with it. Section 9.6."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from http_service import say


def in_order(spans: list[dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
    """The tree of a trace: each span with its depth, children by time below their parent."""
    known = {span["span_id"] for span in spans}
    children: dict[str | None, list[dict[str, Any]]] = {}
    for span in sorted(spans, key=lambda span: span["start_ns"]):
        parent = span["parent_id"] if span["parent_id"] in known else None
        children.setdefault(parent, []).append(span)

    def below(parent: str | None, depth: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for span in children.get(parent, []):
            yield depth, span
            yield from below(span["span_id"], depth + 1)

    return list(below(None, 0))


def services_of(spans: list[dict[str, Any]]) -> set[str]:
    return {span["service"] for span in spans}


def complete(spans: list[dict[str, Any]], services: int = 4) -> bool:
    """Whether all services have written, and each parent is there."""
    known = {span["span_id"] for span in spans} | {None}
    parents = {span["parent_id"] for span in spans}
    return len(services_of(spans)) == services and parents <= known


def outside_parent(spans: list[dict[str, Any]]) -> int:
    """Spans that begin before their parent or end after it."""
    by_id = {span["span_id"]: span for span in spans}
    pairs = [(span, by_id[span["parent_id"]]) for span in spans if span["parent_id"] in by_id]
    return sum(s["start_ns"] < p["start_ns"] or s["end_ns"] > p["end_ns"] for s, p in pairs)


def show(spans: list[dict[str, Any]], width: int = 32) -> None:
    """The waterfall as text."""
    tree = in_order(spans)
    start = min(span["start_ns"] for span in spans)
    total = max(span["end_ns"] for span in spans) - start
    say(f"{'service':<14}{'span':<34}{'from ms':>9}{'took ms':>9}")
    for depth, span in tree:
        first = (span["start_ns"] - start) * width // total
        last = max(first + 1, -(-(span["end_ns"] - start) * width // total))
        bar = " " * first + "█" * (last - first)
        name = "  " * depth + span["name"]
        begin = (span["start_ns"] - start) / 1e6
        took = (span["end_ns"] - span["start_ns"]) / 1e6
        say(f"{span['service']:<14}{name:<34}{begin:9.1f}{took:9.1f}  {bar}".rstrip())
        for event in span["events"]:
            name = "  " * depth + f"· {event['name']}"
            say(f"{'':<14}{name:<34}{(event['time_ns'] - start) / 1e6:9.1f}")


def leaks(text: str, secrets: Sequence[str]) -> int:
    """Lines in which a secret stands, as it is or as JSON writes it."""
    forms = {form for secret in secrets for form in (secret, json.dumps(secret)[1:-1]) if form}
    return sum(any(form in line for form in forms) for line in text.splitlines())


def off(told: list[int | None], usage: dict[str, int]) -> int:
    return abs(max(filter(None, told), default=0) - usage.get("completion_tokens", -1))


def plot(spans: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "ch09"
    import matplotlib.pyplot as plt

    tree = in_order(spans)
    start = min(span["start_ns"] for span in spans)
    services = list(dict.fromkeys(span["service"] for _, span in tree))
    figure, axes = plt.subplots(figsize=(8, 0.42 * len(tree) + 1.3), layout="constrained")
    for row, (_, span) in enumerate(tree):
        begin = (span["start_ns"] - start) / 1e6
        took = (span["end_ns"] - span["start_ns"]) / 1e6
        color = f"C{services.index(span['service'])}"
        axes.barh(row, took, left=begin, height=0.55, color=color)
        for event in span["events"]:
            axes.plot([(event["time_ns"] - start) / 1e6] * 2, [row - 0.4, row + 0.4], "k-", lw=1.2)
    axes.set_yticks(range(len(tree)), [f"{s['service']}: {s['name']}" for _, s in tree])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds since the client asked; black: queued, first token, end")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
