"""What the documentation says of code, tests and messages is so."""

import re
import sys
from functools import partialmethod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.hf import DEVICE, tiny_bert
from helpers.messages import begins, in_sources, listed
from helpers.pages import PAGES, blocks, sections

import fastals

TESTS = Path(__file__).parent
PROMISES = TESTS.parent / "docs" / "promises.md"
OTHER_PACKAGES = {"accelerate", "lightning", "peft", "sentence_transformers", "trl"}
#: Pages whose blocks are run by tests of their own.
NOT_RUN = {
    "README.md": "test_packaging.py runs its blocks",
    "examples.md": "test_examples.py runs the files",
}
RUN = [s for page in PAGES if page.name not in NOT_RUN for s in sections(page)]


def test_every_promise_names_tests_that_exist():
    rows = [line for line in PROMISES.read_text().splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", row.rsplit(" | ", 1)[1])
        assert named, row
        for file, function in named:
            text = (TESTS / file).read_text()
            assert f"\ndef {function or 'test_'}" in text, (file, function)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_python_compiles(page):
    for block in blocks(page.read_text()):
        compile(block, page.name, "exec")


@pytest.fixture
def known(tmp_path, monkeypatch):
    """What the pages take as known."""
    model = tiny_bert(vocab_size=30, num_labels=3).to(DEVICE).train()
    ids = torch.randint(0, 30, (4, 8, 12), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": i, "labels": i[:, 0] % 3} for i in ids.to(DEVICE)]
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="eager"))
    yield {
        "fastals": fastals, "torch": torch, "folder": tmp_path, "model": model, "batch": batches[0],
        "opt": fastals.ALS(model), "loader": torch.utils.data.DataLoader(batches, batch_size=None),
        "batches": batches, "batches_of_micro_batches": [batches[:2], batches[2:]],
        "data": [{"input_ids": i, "labels": i[0] % 3} for i in ids[0]],
        "generator": torch.nn.Linear(2, 2), "discriminator": torch.nn.Linear(2, 2),
    }  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()
    if state := sys.modules.get("accelerate.state"):  # it would be that of the next test, too
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec.*:FutureWarning",  # of Lightning
    "ignore:.*gradient_checkpointing_enable.*:FutureWarning",  # its name, since transformers 5.23
    "ignore:'pin_memory' argument:UserWarning",  # of the Trainer without a GPU
    "ignore:torch.distributed is disabled:UserWarning",  # a checkpoint of one process
)
@pytest.mark.parametrize("section", RUN, ids=lambda section: f"{section.page}-{section.heading}")
def test_the_blocks_of_a_section_run(section, known):
    try:
        for block in section.blocks:
            exec(compile(block, section.page, "exec"), known)
    except ModuleNotFoundError as missing:
        if missing.name not in OTHER_PACKAGES:
            raise
        pytest.skip(f"{missing.name} is not installed")


def test_every_message_has_an_entry_in_troubleshooting():
    messages, entries = in_sources(), listed()
    assert len(messages) > 100
    assert [m for m in messages if not any(begins(m, entry) for entry in entries)] == []


def test_every_entry_in_troubleshooting_begins_a_message():
    messages = in_sources()
    assert [entry for entry in listed() if not any(begins(m, entry) for m in messages)] == []
