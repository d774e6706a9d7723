"""Trainers of TRL with a line search: their metrics count a mini-batch once, and the loss falls."""

import pytest

hf = pytest.importorskip("transformers")
trl = pytest.importorskip("trl")
pytest.importorskip("accelerate")

from datasets import Dataset  # noqa: E402
from helpers.tiny import assert_same  # noqa: E402
from helpers.trainers import first_log, fit, llama, logged, optimizer_of, tokenizer, weights  # noqa: E402

from fastals.integrations.transformers import LineSearch  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:`?gradient_checkpointing:FutureWarning")  # TRL uses the old name


class SFT(LineSearch, trl.SFTTrainer):
    """The trainer of README."""


class DPO(LineSearch, trl.DPOTrainer):
    """Another trainer, with a reference model."""


def text(i):
    return " ".join(f"w{(7 * i + 3 * j) % 60}" for j in range(6 + i % 4))


TEXTS = Dataset.from_dict({"text": [text(i) for i in range(48)]})
PAIRS = Dataset.from_dict({k: [text(i + n) for i in range(48)] for n, k in enumerate(("prompt", "chosen", "rejected"))})


def sft(out, trainer=SFT, **options):
    options = {"max_length": 32, "bf16": False, "processing_class": tokenizer()} | options
    return fit(out, llama(), TEXTS, trainer=trainer, arguments=trl.SFTConfig, **options)


MICRO = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.mark.slow(keep=1)
@pytest.mark.parametrize("options", [{}, MICRO, {"packing": True}, {"bf16": True}], ids=str)
def test_metrics_count_a_mini_batch_once(options, tmp_path):
    """The first step's are those of SFTTrainer, and so are the tokens of every step."""
    plain, trainer = sft(tmp_path, trl.SFTTrainer, **options), sft(tmp_path, **options)
    assert {"num_tokens", "mean_token_accuracy", "entropy"} <= first_log(trainer).keys()
    assert first_log(trainer) == pytest.approx(first_log(plain), rel=1e-5)
    assert logged(trainer, "num_tokens") == logged(plain, "num_tokens")
    assert logged(trainer, "loss")[-1] < logged(trainer, "loss")[0] - 0.3
    assert max(logged(trainer, "als/trials")) > 1


@pytest.mark.parametrize("options", [{}, {"peft_config": ("q_proj", "v_proj")}], ids=["whole", "lora"])
def test_cached_trials_are_right(options, tmp_path):
    """Also beside gradient checkpointing, which is on in SFTConfig, and which changes nothing."""
    if options:
        peft = pytest.importorskip("peft")
        options = {"peft_config": peft.LoraConfig(r=4, target_modules=list(options["peft_config"]))}
    als = {"schedule": "sweep", "trust": 0.1}
    checked = sft(tmp_path, als=als | {"cache": "check"}, **options)
    plain = sft(tmp_path, als=als, gradient_checkpointing=False, **options)
    opt = optimizer_of(checked)
    assert_same(weights(checked.model), weights(plain.model))
    assert opt.reports == optimizer_of(plain).reports
    assert all(r.loss_after < r.loss_before for r in opt.reports)
    assert opt.last_forwards == optimizer_of(plain).last_forwards < 1 + opt.report.trials
    if options:
        moved = {n for n, p in checked.model.named_parameters() if p.requires_grad}
        assert {n.split(".")[-3] for n in moved} == {"lora_A", "lora_B"}
        assert moved == {n for g in optimizer_of(checked).param_groups for n in g["param_names"]}
        assert logged(checked, "loss")[-1] < logged(checked, "loss")[0]


def test_a_reference_model_is_replayed(tmp_path):
    """DPO's, which no trial changes: a trial runs the blocks of the trained model alone."""

    def dpo(trainer, **options):
        return fit(
            tmp_path, llama(), PAIRS, trainer=trainer, arguments=trl.DPOConfig, processing_class=tokenizer(),
            ref_model=llama(), max_length=32, bf16=False, **options,
        )  # fmt: skip

    plain, trainer = dpo(trl.DPOTrainer), dpo(DPO, als={"schedule": "sweep", "cache": "check"})
    assert {"rewards/margins", "logps/chosen", "num_tokens"} <= first_log(trainer).keys()
    assert first_log(trainer) == pytest.approx(first_log(plain), rel=1e-5)
    assert logged(trainer, "num_tokens") == logged(plain, "num_tokens")
    opt = optimizer_of(trainer)
    assert all(r.loss_after < r.loss_before for r in opt.reports)
    assert opt.modules == [trainer.ref_model]
    assert opt.last_forwards < 1 + 0.6 * opt.report.trials
    assert_same(weights(trainer.ref_model), weights(llama()))
