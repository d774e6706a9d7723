#!/usr/bin/env bash
# Everything that a person with a GPU runs, in under 9 minutes: the tests of the GPU path, the quick profile, JSON, the
# report. Results go to bench/results/<device>/, or to $OUT if it is set; commit them. Nothing is downloaded: it needs a
# CUDA build of torch, triton, transformers, matplotlib, pytest, pytest-benchmark and hypothesis; rivals that are not
# installed are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
$python -P -c 'import fastals.kernels' 2> /dev/null ||
	$python -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
$python -P -c 'import torch; torch.cuda.get_device_name()' || exit 1
out=${OUT:-bench/results/$(dirname "$($python -P -m fastals.stamp)")}
mkdir -p "$out"
rm -f "$out"/{kernels,graph,step}.json  # what this run does not make must not be reported as its own
failed=0

part() {  # name, most seconds, arguments of pytest; an interrupted part still writes its results
	local name=$1 seconds=$2
	shift 2
	timeout -s INT -k 10 "$seconds" $python -P -m pytest -q -rP "$@" > "$out/$name.log" 2>&1
}

# The tests only have to be right, so they share the GPU. All gates of the benchmarks are among them.
part kernels-tests 170 tests/test_fused.py tests/test_device.py & kernels=$!
part graphs-tests 170 tests/test_graph.py -k "not hugging_face" & graphs=$!
part models-tests 170 tests/test_graph.py -k hugging_face & models=$!
part rivals-tests 170 tests/test_reference.py tests/test_benchmarks.py & rivals=$!
for tests in $kernels $graphs $models $rivals; do wait "$tests" || failed=1; done
gates=$([ $failed = 0 ] && echo --gates-passed)  # or each case runs its own again
# One file each, so that what is done is kept if the time runs out.
part kernels 70 bench/bench_kernels.py $gates --benchmark-json="$out/kernels.json" || failed=1
part graph 110 bench/bench_graph.py $gates --benchmark-json="$out/graph.json" || failed=1
part step 110 bench/bench_step.py $gates --benchmark-json="$out/step.json" || failed=1
results=()
for name in kernels graph step; do
	if [ -s "$out/$name.json" ]; then results+=("$out/$name.json"); else rm -f "$out/$name.json"; fi
done
$python -P -m fastals.cli bench report "${results[@]}" --out "$out" || failed=1
grep -hE "^(FAILED|ERROR|E  )|passed|failed|skipped|^test_.*: |^mode " "$out"/*.log | cut -c1-240
exit $failed
