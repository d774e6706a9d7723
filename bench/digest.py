"""Summary of a folder of results: failed tests with their reason, then every figure.

python bench/digest.py FOLDER
"""

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

MAX_FAILED, WIDTH, MAX_TEXT = 15, 230, 5500  # fits a terminal that keeps 12,000 characters


def failures(folder: Path) -> Iterator[str]:
    """A line for each test that failed: its name and the line of the error."""
    for path in sorted(folder.glob("*.xml")):
        try:
            cases = list(ET.parse(path).iter("testcase"))
        except ET.ParseError:
            yield f"{path.name} is cut short"
            continue
        for case in cases:
            for problem in [*case.findall("failure"), *case.findall("error")]:
                reason = " ".join((problem.get("message") or problem.text or "").split())
                yield f"FAILED {case.get('name')}: {reason}"[:WIDTH]


def figures(folder: Path) -> Iterator[str]:
    """The figures of the first light, and a line for each benchmark."""
    for path in sorted(folder.glob("*.json")):
        try:
            result = json.loads(path.read_text())
        except ValueError:
            yield f"{path.name} is empty or cut short"
            continue
        if "figures" in result:
            failed = (f for f in result["figures"] if "failed" in f)
            yield from (f"{f['name']} ({f['batch']}): {f['failed']}"[:WIDTH] for f in failed)
            yield table(result["figures"])
        for case in result.get("benchmarks", ()):
            yield f"{case['name']}: {measures(case['extra_info'])}"[:WIDTH]


def table(entries: list[dict]) -> str:
    """One row per figure: measured / predicted for each mini-batch."""
    rows: dict[tuple[str, str], dict[int, str]] = {}
    for e in entries:
        cell = f"{e['measured']:.4g}" if "measured" in e else "failed" if "failed" in e else "-"
        predicted = "-" if e["predicted"] is None else f"{e['predicted']:.4g}"
        rows.setdefault((e["name"], e["unit"]), {})[e["batch"]] = f"{cell} / {predicted}"
    head = f"{'measured / predicted':<36}{'batch 8':>20}{'batch 32':>20}"
    body = [
        f"{', '.join(filter(None, name)):<36}{cells.get(0) or cells.get(8, ''):>20}{cells.get(32, ''):>20}"
        for name, cells in rows.items()
    ]
    return "\n".join([head, *body])


def measures(info: dict) -> str:
    """The measured values of a benchmark, without its conditions."""
    if "kernels" in info:
        shares = ", ".join(f"{name} {k['gbs']} GB/s {k['of_roof']}" for name, k in info["kernels"].items())
        return f"copy {info['copy_gbs']} GB/s, {shares}"
    keys = (
        "speedup", "spread", "by_forwards", "trials_per_unit", "reference_ms", "fused_ms", "graph_mode", "capture_s",
        "pool_mib", "copy_roof_gbs", "matmul_roof_tflops", "microseconds", "gates",
    )  # fmt: skip
    return ", ".join(f"{k} {info[k]}" for k in keys if k in info)


def main(folder: Path) -> None:
    """Print failures, then figures."""
    failed = list(failures(folder))
    print(*failed[:MAX_FAILED], sep="\n")
    if len(failed) > MAX_FAILED:
        print(f"... and {len(failed) - MAX_FAILED} more")
    text = "\n".join(figures(folder))
    print(text if len(text) <= MAX_TEXT else f"...{text[-MAX_TEXT:]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
