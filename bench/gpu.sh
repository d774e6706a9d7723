#!/usr/bin/env bash
# Everything that a person with a GPU runs: the tests, the quick profile, one JSON, the report.
# Results go to bench/results/<device>/; commit them. Needs the packages of requirements.txt and a CUDA build of torch.
set -euo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1
device=$(python -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))')
out=bench/results/$device
mkdir -p "$out"
failed=0
timeout 240 pytest -q || failed=1
timeout 270 pytest bench -q --benchmark-json="$out/quick.json" || failed=1
fastals bench report "$out/quick.json" --out "$out"
exit $failed
