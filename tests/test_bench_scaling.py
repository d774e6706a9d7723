"""Scaling over processes: the counts of a small run, the arithmetic on paper, and the tables in the README."""

import json
import statistics

import pytest
import scaling
from helpers.processes import together
from helpers.results import BENCH


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_count_what_a_step_reduces(parallel):
    case = scaling.Case(parallel, 2, 3, "tiny", first=1, rounds=2, counted=2)
    found = together(2, scaling.measure, case)
    record = scaling.record(case, found)
    units = 4  # embeddings, two blocks, head
    assert record["reductions"] == scaling.reductions(record["trials"], searched=0.5)
    assert record["reduced_bytes"] == record["reductions"] * scaling.frame_bytes(units)
    assert all(f["reductions"] == record["reductions"] for f in found)
    als, adamw = record["collectives"]["als"], record["collectives"]["adamw"]
    if parallel == "ddp":
        assert als["allreduce"] == adamw["allreduce"] == 1  # of the gradients; every trial is without
        assert als["broadcast"] > adamw["broadcast"] == 1  # of buffers, in every evaluation
    else:
        assert (adamw["allgather_base"], adamw["reduce_scatter_base"]) == (5, 3)  # the root stays gathered
        assert als["reduce_scatter_base"] == 3
        assert als["allgather_base"] >= 5 + 1 + 3  # a replay gathers the root, and a joint trial all
    row = scaling.scaling_table([record]).splitlines()[-1]
    assert {"ddp": "DDP", "fsdp2": "FSDP2"}[parallel] in row


def test_a_run_of_both_scalings_is_made_once():
    made = scaling.cases(["ddp"], (1, 2, 4))
    assert [(c.processes, c.texts) for c in made] == [(1, 16), (1, 4), (2, 8), (2, 4), (4, 4)]
    assert scaling.scaling_kinds(4, 4) == "strong and weak"
    assert (scaling.scaling_kinds(2, 8), scaling.scaling_kinds(2, 4)) == ("strong", "weak")


def test_a_step_counts_as_long_as_the_slowest_process_takes():
    case = scaling.Case("ddp", 2, 8)
    rest = {"by_forwards": 1.5, "trials": 1.0, "reductions": 5.0, "reduced_bytes": 400.0}
    rest["collectives"] = {name: {"allreduce": 1.0, "MB": 2.0} for name in ("als", "adamw")}
    found = [{"seconds": {"als": a, "adamw": b}} | rest for a, b in (([1, 4, 6], [2, 1, 2]), ([3, 2, 1], [1, 1, 1]))]
    record = scaling.record(case, found)
    assert (record["ratio"], record["spread"]) == (3.0, [1.5, 4.0])


def test_the_estimate_is_the_one_that_nccl_printed():
    # for 16 GPUs in two nodes, https://github.com/NVIDIA/nccl/issues/1453
    assert scaling.latency(16) == pytest.approx(25.2, abs=0.05)
    assert scaling.latency(8) == pytest.approx(15.2)
    assert scaling.latency(1024) == pytest.approx(15.2 + 2 * 7 * 5.0)
    assert scaling.frame_bytes(34) == 8 * (12 + 5 * 34)
    assert scaling.reductions(trials=1, searched=0) == 5
    assert scaling.gathered_gb(8, 1.0) == pytest.approx(2 * 8.03 * 7 / 8)


def test_trials_on_paper_are_those_of_the_stored_runs():
    lines = (BENCH / "results/intel-r-xeon-r-processor/convergence.jsonl").read_text().splitlines()
    runs = [run for run in map(json.loads, lines) if (run["method"], run["steps"]) == ("als", 240)]
    assert statistics.mean(run["joint_trials"] for run in runs) == pytest.approx(scaling.JOINT, abs=0.005)
    of_units = statistics.mean(run["trials"] - run["joint_trials"] for run in runs)
    assert of_units == pytest.approx(scaling.OF_UNITS, abs=0.005)


def test_the_readme_has_the_tables_that_the_commands_print():
    page = (BENCH / "README.md").read_text()
    assert all(table in page for table in scaling.paper_tables().split("\n\n"))
    stored = sorted((BENCH / "results").glob("*/scaling.json"))
    assert stored
    for path in stored:
        assert scaling.scaling_table(json.loads(path.read_text())["scaling"]) in page
