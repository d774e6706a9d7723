#!/usr/bin/env bash
# Everything that a person with a GPU runs: the tests of the GPU path, the quick profile, JSON, the report.
# Results go to bench/results/<device>/, or to $OUT if it is set; commit them. Needs a CUDA build of torch, triton,
# transformers, pytest, pytest-benchmark and hypothesis; rivals that are not installed are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
device=$(python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || exit 1
out=${OUT:-bench/results/$device}
mkdir -p "$out"
failed=0
timeout 150 pytest -q tests/test_fused.py tests/test_device.py tests/test_graph.py > "$out/tests.log" 2>&1 || failed=1
for part in kernels graph step; do  # one file each, so that what is done is kept if the time runs out
  timeout 130 pytest -q "bench/bench_$part.py" --benchmark-json="$out/$part.json" > "$out/$part.log" 2>&1 || failed=1
done
fastals bench report "$out"/*.json --out "$out" || failed=1
grep -hE "^(FAILED|ERROR|E  )|passed|failed|^test_.*: " "$out"/*.log | cut -c1-240
exit $failed
