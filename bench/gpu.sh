#!/usr/bin/env bash
# The checks and measurements that need a GPU, in two parts of a few minutes each:
#
#   bench/gpu.sh a    under 4 minutes: the riskiest tests, and the figures of bench/first_light.py beside their predictions
#   bench/gpu.sh b    under 9 minutes: all tests of the GPU path, then the benchmarks that bench/GPU_QUEUE.md asks for
#
# Names of stages behind the letter run those alone. With --dry-run nothing needs a GPU: every stage prints its
# command, tests and benchmarks are collected, and the first light runs on a tiny model. Every stage is a process of its own
# with its own limit. All results are packed into results-<part>-<time>.tar.gz after each stage: in $OUT if it is set, else
# in bench/results/<device>/. Benchmarks run even if tests fail; each result says which failed. Nothing is installed or
# downloaded; Python (or $PYTHON) needs a CUDA build of torch, triton, transformers, pytest, pytest-benchmark and
# hypothesis. A tree without .git names its commit in FASTALS_COMMIT; GATES names a folder of unpacked results of an earlier
# part b of the same commit. Exit code: 0 if all passed, 1 if anything failed, 2 without a GPU, 64 for wrong arguments.
set -uo pipefail
from=$PWD
cd "$(dirname "$0")/.." || exit 1
declare -A stages=(
	[a]=" smoke kernels-tests device-tests graph-tests models-tests first-light "
	[b]=" kernels-tests device-tests graph-tests same-tests models-tests captured kernels schedules stages depth rest "
)
part=${1:-} dry=0 only=
[[ " $* " != *" --help "* ]] || { sed -n '2,/^set/{/^#/p}' bench/gpu.sh | cut -c3-; exit 0; }
[[ $part == [ab] ]] || { echo "usage: bench/gpu.sh a|b [--dry-run] [stage ...]" >&2; exit 64; }
for word in "${@:2}"; do
	if [ "$word" = --dry-run ]; then
		dry=1
	elif [[ ${stages[$part]} == *" $word "* ]]; then
		only="${only:- }$word "
	else
		echo "bench/gpu.sh: part $part has no stage $word; it has${stages[$part]}" >&2
		exit 64
	fi
done
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
export TORCH_CUDNN_SDPA_DEPRIORITIZED=1 # cuDNN may plan attention within a capture
here() { [[ $1 == /* ]] && echo "$1" || echo "$from/$1"; } # a path, relative to the caller's folder
python=${PYTHON:-python3}
[[ $python != */* ]] || python=$(here "$python")
[ $dry = 0 ] || export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=
if ! "$python" -P -c 'import torch'; then
	echo "bench/gpu.sh: $python cannot import torch, so nothing was run; PYTHON names another" >&2
	exit 1
elif [ $dry = 0 ] && ! "$python" -P -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
	echo "bench/gpu.sh: $python sees no CUDA device, so nothing was run; --dry-run runs without one"
	exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# fastals without installing it: the package, with kernels/ as its part
mkdir -p "$work/path/fastals" "$work/results"
ln -s "$PWD"/fastals/* "$PWD/kernels" "$work/path/fastals/"
export PYTHONPATH=$work/path
if [ -z "${FASTALS_COMMIT:-}" ] && [ "$(git rev-parse --show-toplevel 2> /dev/null)" = "$PWD" ]; then
	FASTALS_COMMIT=$(git rev-parse --short HEAD)$([ -z "$(git status --porcelain -- . ':!bench/results')" ] || echo -dirty)
fi
export FASTALS_COMMIT=${FASTALS_COMMIT:-unknown}
echo "$FASTALS_COMMIT" > "$work/results/commit"
if [ -n "${GATES:-}" ]; then
	GATES=$(here "$GATES")
	cmp -s "$GATES/commit" "$work/results/commit" || {
		echo "bench/gpu.sh: the test results in $GATES are not of commit $FASTALS_COMMIT (its file commit says)" >&2
		exit 64
	}
fi
[ $dry = 0 ] || OUT=${OUT:-$(mktemp -d)}
out=$([ -n "${OUT:-}" ] && here "$OUT" || echo "$PWD/bench/results/$(dirname "$("$python" -P bench/stamp.py)")")
mkdir -p "$out" && [ -w "$out" ] || { echo "bench/gpu.sh: results cannot be written to $out" >&2; exit 1; }
packed=$out/results-$part-$(date +%H%M%S).tar.gz
declare -A limit=([a]=230 [b]=520)
slow=$((dry ? 5 : 1)) # a dry run may be on a slow machine, with kernels interpreted
most=$((slow * ${MOST_SECONDS:-${limit[$part]}})) # seconds of all stages together
failed=0

stage() {  # name, most seconds, command: run it, print a line with its outcome, pack the results
	local name=$1 seconds=$2 begin=$SECONDS log=$work/results/$1.log code
	shift 2
	[[ -z $only || $only == *" $name "* ]] || return 0
	[ $dry = 0 ] || echo "$name would run within $seconds s: ${command:-$*}"
	seconds=$((slow * seconds))
	seconds=$((most - SECONDS < seconds ? most - SECONDS : seconds))
	[ $seconds -gt 5 ] || { echo "$name: no time left"; return 1; }
	env --default-signal=INT timeout -s INT -k 10 "$seconds" "$@" > "$log" 2>&1 # background jobs ignore SIGINT by default
	code=$?
	printf '%-18s %3d s  exit %3d  %s\n' "$name" $((SECONDS - begin)) $code \
		"$([ $code != 124 ] || echo "stopped at its limit: ")$(tail -n 1 "$log" | cut -c1-160)"
	pack 9> "$work/lock"
	return $code
}

pack() {  # one at a time; tar exits with 1 if a log grows meanwhile
	flock 9
	tar czf "$packed.part" -C "$work/results" . || [ $? = 1 ]
	mv "$packed.part" "$packed"
}

tests() {  # name, most seconds, arguments of pytest
	local name=$1 seconds=$2 command="pytest ${*:3}"
	shift 2
	[ $dry = 1 ] && set -- --collect-only "$@"
	stage "$name" "$seconds" "$python" -P -m pytest -v --tb=short -o faulthandler_timeout=40 -p no:cacheprovider \
		-W ignore::DeprecationWarning -W ignore::FutureWarning --junit-xml="$work/results/$name.xml" "$@"
}

bench() {  # name, most seconds, arguments of pytest
	local name=$1 seconds=$2 command="pytest ${*:3}" gates=()
	shift 2
	[ $dry = 1 ] && set -- --collect-only "$@" || set -- --benchmark-json="$work/results/$name.json" "$@"
	mapfile -t gates < <(compgen -G "$work/results/*-tests.xml"; compgen -G "${GATES:-/none}/*-tests.xml")
	stage "$name" "$seconds" "$python" -P -m pytest -q --tb=short -p no:cacheprovider -W ignore::DeprecationWarning \
		-W ignore::FutureWarning --gates="$(IFS=, && echo "${gates[*]:-not-run}")" "$@"
}

together() {  # calls of functions: make them in parallel
	local call job jobs=()
	for call in "$@"; do $call & jobs+=($!); done
	for job in "${jobs[@]}"; do wait "$job" || failed=1; done
}

graph=tests/test_graph_gpu.py
graphs=(tests/test_graph_*.py tests/test_cuda_bindings.py)
same=$graph::test_graphs_take_the_steps_of_the_eager_path
risky=(
	$graph::test_a_loop_on_the_device_ends_when_its_flag_says_so
	$graph::test_loops_run_on_the_device_where_bindings_and_driver_know_them
	$graph::test_a_forward_without_gradients_has_the_masks_and_the_loss_of_one_with
	"$same[sweep-bottom_up-host]" "$same[sweep-bottom_up-while]" "$same[relay-while]"
	$graph::test_dropout_masks_are_held_in_a_step_and_change_between_steps
	$graph::test_searches_without_a_step_and_refused_steps_leave_the_weights_bitwise
	$graph::test_a_loss_that_waits_for_the_device_is_not_captured_and_steps_go_on
)

kernel_tests() { tests kernels-tests "$1" tests/test_fused.py; }
device_tests() { tests device-tests "$1" tests/test_device_*.py; }
risky_tests() { tests graph-tests "$1" -x "${risky[@]}"; }
graph_tests() { tests graph-tests "$1" "${graphs[@]}" --deselect $same -k "not hugging_face and not profiled"; }
same_tests() {
	tests same-tests "$1" $same tests/test_bench_runs.py tests/test_reference.py -k "take_the or takes_the or same_answers"
}
model_tests() { tests models-tests "$1" $graph -k "$2"; }
few_model_tests() { model_tests "$1" "hugging_face and not compiled"; }
all_model_tests() { model_tests "$1" "hugging_face or profiled"; }

run_a() {
	stage smoke 40 "$python" bench/smoke.py || failed=1
	together "kernel_tests 80" "device_tests 80" "risky_tests 80" "few_model_tests 80"
	stage first-light 120 "$python" bench/first_light.py "$work/results/first_light.json" \
		$([ $dry = 1 ] && echo --dry-run) || failed=1
}

run_b() {
	together "kernel_tests 160" "device_tests 160" "graph_tests 160" "same_tests 160" "all_model_tests 160"
	bench captured 100 bench/bench_graph.py --full -k "floor or sweep" || failed=1
	bench kernels 60 bench/bench_kernels.py -k "roofs or look or bert_base" || failed=1
	bench schedules 60 bench/bench_graph.py -k "test_captured and (relay or joint or cycle)" || failed=1
	bench stages 50 bench/bench_step.py -k test_stage || failed=1
	bench depth 80 bench/bench_graph.py -k depth || failed=1
	bench rest 100 bench/bench_step.py bench/bench_kernels.py -k "host_time or instead or (lora and not bert)" || failed=1
}

"run_$part"
echo "packed into $packed; bench/GPU_QUEUE.md says how to make a page of it"
"$python" bench/digest.py "$work/results"
exit $failed
