#!/usr/bin/env bash
# Everything that a person with a GPU runs, in under 10 minutes: the tests of the GPU path, the quick profile, JSON, the
# report. Arguments choose among "tests kernels graph step", in several calls if one would take too long; GATES says
# --gates-passed to those whose tests another call has run. Results go to bench/results/<device>/, or to $OUT if it is
# set; commit them. Nothing is downloaded: it needs a CUDA build of torch, triton, transformers, matplotlib, pytest,
# pytest-benchmark and hypothesis; rivals that are not installed are skipped.
set -uo pipefail
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TORCH_CUDNN_SDPA_DEPRIORITIZED=1 # cuDNN may plan attention within a capture
python=${PYTHON:-python3}
$python -P -c 'import fastals.kernels' 2> /dev/null ||
	$python -m pip install --quiet --no-deps --no-build-isolation -e . || exit 1
$python -P -c 'import torch; torch.cuda.get_device_name()' || exit 1
$python -P -c 'import fastals.stamp; print(*fastals.stamp.stamp().items(), sep="\n")'
out=${OUT:-bench/results/$(dirname "$($python -P -m fastals.stamp)")}
mkdir -p "$out"
wanted=" ${*:-tests kernels graph step} "
wants() { [[ $wanted == *" $1 "* ]]; }
failed=0

part() {  # name, most seconds, arguments of pytest; an interrupted part still writes its results
	local name=$1 seconds=$2
	shift 2
	timeout -s INT -k 10 "$seconds" $python -P -m pytest -q -rP -W ignore::DeprecationWarning -W ignore::FutureWarning \
		"$@" > "$out/$name.log" 2>&1
}

bench() {  # name, most seconds, whether its gates have passed: without it each case runs its own again
	rm -f "$out/$1.json"  # what this run does not make must not be reported as its own
	part "$1" "$2" "bench/bench_$1.py" ${GATES:-$([ "$3" = 1 ] && echo --gates-passed)} \
		--benchmark-json="$out/$1.json" || failed=1
	[ -s "$out/$1.json" ] || rm -f "$out/$1.json"
}

kernels=0 graphs=0
if wants tests; then  # they only have to be right, so they share the GPU
	same="tests/test_graph.py::test_graphs_take_the_steps_of_the_eager_path"
	part kernels-tests 240 tests/test_fused.py tests/test_device.py & kernels_tests=$!
	part gates-tests 240 $same tests/test_reference.py tests/test_benchmarks.py \
		-k "take_the or takes_the or same_answers" & gates_tests=$!
	part graphs-tests 240 tests/test_graph.py --deselect $same -k "not hugging_face" & graphs_tests=$!
	part models-tests 240 tests/test_graph.py -k hugging_face & models_tests=$!
	wait $kernels_tests && kernels=1 || failed=1
	wait $gates_tests && graphs=1 || failed=1
	wait $graphs_tests || failed=1
	wait $models_tests || failed=1
fi
# One file each, so that what is done is kept if the time runs out.
wants kernels && bench kernels 100 $kernels
wants graph && bench graph 120 $graphs
wants step && bench step 110 $((kernels * graphs))
results=()
for name in kernels graph step; do [ -s "$out/$name.json" ] && results+=("$out/$name.json"); done
[ ${#results[@]} = 0 ] || $python -P -m fastals.cli bench report "${results[@]}" --out "$out" || failed=1
grep -hE "^(FAILED|ERROR|E  )|passed|failed|skipped|^test_.*: |^mode " "$out"/*.log | cut -c1-240
exit $failed
