"""What a folder of results says, in few lines: failed tests with their reason, then every figure.

python bench/digest.py FOLDER
"""

import json
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

import first_light

MOST_FAILED, WIDTH = 30, 230


def failures(folder: Path) -> Iterator[str]:
    """A line for each test that failed: its name and the line of the error."""
    for path in sorted(folder.glob("*.xml")):
        for case in ET.parse(path).getroot().iter("testcase"):
            for problem in [*case.findall("failure"), *case.findall("error")]:
                reason = " ".join((problem.get("message") or problem.text or "").split())
                yield f"FAILED {case.get('name')}: {reason}"[:WIDTH]


def figures(folder: Path) -> Iterator[str]:
    """The figures of the first light, and a line for each benchmark."""
    for path in sorted(folder.glob("*.json")):
        text = path.read_text()
        if not text:
            continue
        result = json.loads(text)
        if "figures" in result:
            yield from (
                f"{f['name']} ({f['batch']}): {f['failed']}"[:WIDTH] for f in result["figures"] if "failed" in f
            )
            yield first_light.table(result["figures"])
        for case in result.get("benchmarks", ()):
            yield f"{case['name']}: {measures(case['extra_info'])}"[:WIDTH]


def measures(info: dict) -> str:
    """What a benchmark has measured, without its conditions."""
    if "kernels" in info:
        shares = ", ".join(f"{name} {k['gbs']} GB/s {k['of_roof']}" for name, k in info["kernels"].items())
        return f"copy {info['copy_gbs']} GB/s, {shares}"
    wanted = (
        "speedup", "spread", "by_forwards", "trials_per_unit", "reference_ms", "fused_ms", "graph_mode", "capture_s",
        "pool_mib", "copy_roof_gbs", "matmul_roof_tflops", "microseconds", "gates",
    )  # fmt: skip
    return ", ".join(f"{k} {info[k]}" for k in wanted if k in info)


def main(folder: Path) -> None:
    """Print it, the figures last."""
    found = list(failures(folder))
    print(*found[:MOST_FAILED], sep="\n")
    if len(found) > MOST_FAILED:
        print(f"... and {len(found) - MOST_FAILED} more")
    print(*figures(folder), sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
