"""What every benchmark prints and writes: the machine, the versions, medians with their spread."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any


def machine() -> dict[str, Any]:
    """Describe the hardware, and how busy it is with other work."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
        model = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model
        )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def versions(*packages: str) -> dict[str, str]:
    """Look up installed versions."""
    return {package: metadata.version(package) for package in packages}


@dataclass
class Report:
    """One benchmark's results.

    Attributes:
        title: what was measured, with its unit.
        settings: sizes and options that a reader needs to repeat it.
        packages: whose versions matter.
    """

    title: str
    settings: Mapping[str, Any]
    packages: Sequence[str] = ("gym-sdk",)
    results: list[dict[str, Any]] = field(default_factory=list)

    def add(self, values: Sequence[float], **labels: Any) -> float:
        """Record one measurement's runs; return their median."""
        median = statistics.median(values)
        self.results.append(
            {**labels, "median": median, "min": min(values), "max": max(values), "runs": list(values)}
        )
        return median

    def show(self, rows: str, columns: str, section: str | None = None) -> None:
        """Print medians as tables: labels `rows` down, `columns` across, a table for each `section`."""
        print(f"\n# {self.title}")
        for name, value in {**machine(), **versions(*self.packages), **self.settings}.items():
            print(f"{name}: {value}")
        print("Each cell: median [min - max] of the runs.")
        for part in _unique(self.results, section) if section else [None]:
            chosen = [result for result in self.results if section is None or result[section] == part]
            if section:
                print(f"\n## {part}")
            heads = _unique(chosen, columns)
            table = [[rows, *(str(head) for head in heads)]]
            for label in _unique(chosen, rows):
                cells = {result[columns]: result for result in chosen if result[rows] == label}
                table.append([str(label), *(_cell(cells.get(head)) for head in heads)])
            _print(table)

    def write(self, path: Path) -> None:
        """Write everything as JSON, single runs included."""
        content = {
            "title": self.title,
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": versions(*self.packages),
            "settings": dict(self.settings),
            "results": self.results,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        print(f"\nwritten to {path}")


def _unique(results: Sequence[Mapping[str, Any]], label: str) -> list[Any]:
    return list(dict.fromkeys(result[label] for result in results))


def _cell(result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "-"
    return f"{_number(result['median'])} [{_number(result['min'])} - {_number(result['max'])}]"


def _number(value: float) -> str:
    """Write a number with about three digits, all of those before the point."""
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def _print(table: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for number, row in enumerate(table):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")
        if number == 0:
            print("| " + " | ".join("-" * width for width in widths) + " |")
