"""Units and cache on real architectures with small random configurations, dropout on."""

import copy
from collections import Counter

import pytest
import torch
import transformers as hf
from torch import nn

import fastals
from fastals.partition import blocks

pytestmark = pytest.mark.proves(claim="every-architecture")
IDS = torch.tensor([[3, 5, 7, 9, 11, 4], [2, 8, 6, 1, 9, 3]])
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
DROP = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
LLAMA = SMALL | {"num_key_value_heads": 1, "attention_dropout": 0.2, "head_dim": 8, "pad_token_id": 0}


def classifier(model):
    return model, lambda: model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=torch.tensor([0, 1])).loss


def language_model(model):
    return model, lambda: model(input_ids=IDS, labels=IDS).loss


def vit():
    config = hf.ViTConfig(
        **{k: v for k, v in SMALL.items() if k != "vocab_size"}, **DROP, image_size=8, patch_size=4, num_labels=2
    )
    model, pixels = hf.ViTForImageClassification(config), torch.randn(2, 3, 8, 8)
    return model, lambda: model(pixel_values=pixels, labels=torch.tensor([0, 1])).loss


def lora():
    import peft

    base = hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1, task_type="CAUSAL_LM")
    return language_model(peft.get_peft_model(base, config))


def sequential():
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh()) for _ in range(4)]
    model, x = nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 2)), torch.randn(5, 6)
    return model, lambda: model(x).square().mean()


ALBERT = SMALL | DROP | {"embedding_size": 12, "classifier_dropout_prob": 0.1}
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.2,
    "max_position_embeddings": 16,
}  # fmt: skip
T5 = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2,
    "dropout_rate": 0.2, "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
GPT2 = {
    "vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 16, "resid_pdrop": 0.2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
DEBERTA = SMALL | DROP | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
MODERN = SMALL | {"attention_dropout": 0.2, "mlp_dropout": 0.2, "embedding_dropout": 0.2, "pad_token_id": 0}
ROBERTA = SMALL | DROP | {"max_position_embeddings": 32}
DISTIL = {"vocab_size": 40, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24, "dropout": 0.2}
ZOO = {
    "bert": lambda: classifier(hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **DROP))),
    "distilbert": lambda: classifier(hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL))),
    "roberta": lambda: classifier(hf.RobertaForSequenceClassification(hf.RobertaConfig(**ROBERTA))),
    "albert": lambda: classifier(hf.AlbertForSequenceClassification(hf.AlbertConfig(**ALBERT))),
    "deberta-v2": lambda: classifier(hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**DEBERTA))),
    "modernbert": lambda: classifier(hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**MODERN))),
    "gpt2": lambda: language_model(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))),
    "llama": lambda: language_model(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))),
    "qwen3": lambda: language_model(hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA))),
    "gemma": lambda: language_model(hf.GemmaForCausalLM(hf.GemmaConfig(**LLAMA))),
    "t5": lambda: language_model(hf.T5ForConditionalGeneration(hf.T5Config(**T5))),
    "bart": lambda: language_model(hf.BartForConditionalGeneration(hf.BartConfig(**BART))),
    "vit": vit,
    "lora-llama": lora,
    "sequential": sequential,
}
NUMBER_OF_BLOCKS = {"albert": 1, "t5": 5, "bart": 5, "sequential": 6}


def count_forwards(model):
    """Calls of every block, counted in its first leaf, which runs only where the block is computed."""
    counts: Counter = Counter()

    def counted(name, leaf):
        plain = leaf.forward

        def forward(*args, **kwargs):
            counts[name] += 1
            return plain(*args, **kwargs)

        leaf.forward = forward

    for name, block in blocks(model).items():
        counted(name, next(m for m in block.modules() if not list(m.children())) if list(block.children()) else block)
    return counts


@pytest.mark.parametrize("name", ZOO)
def test_units_are_embeddings_blocks_and_head_each_parameter_once(name):
    model, _ = ZOO[name]()
    groups = fastals.units(model)
    names = [n for g in groups for n in g["param_names"]]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    found = [g["name"] for g in groups if g["name"] not in ("embeddings", "head")]
    assert found == list(blocks(model))
    assert len(found) == NUMBER_OF_BLOCKS.get(name, 3)
    assert len(groups) == len(found) if name in ("lora-llama", "sequential") else len(groups) > len(found)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
@pytest.mark.parametrize("name", ZOO)
def test_exact_trial_and_triangular_number_of_block_forwards(name, checkpointing):
    if checkpointing and name in ("sequential", "albert"):
        pytest.skip("this model has no gradient checkpointing")
    model, closure = ZOO[name]()
    model.train()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)  # transformers 5.17 has only the other
        (enable or model.gradient_checkpointing_enable)()
    opt = fastals.ALS(model, c=0.1, trust=0.01)
    opt.step(closure)  # compares a cached trial of every unit with a full forward, bitwise; a difference warns
    assert opt.engine.learned.trusted == {u.name: True for u in opt.report.units}
    counts = count_forwards(model)
    with torch.no_grad():
        closure()
    forward = dict(counts)
    counts.clear()
    closure().backward()
    expected = Counter(counts)
    counts.clear()
    opt.step(closure)
    order = list(blocks(model))
    for unit in opt.report.units:
        start = (
            {"embeddings": 0, "head": len(order)}.get(unit.name) if unit.name not in order else order.index(unit.name)
        )
        expected.update({block: unit.trials * forward[block] for block in order[start:]})
    assert opt.report.trials >= len(opt.report.units)
    assert counts == expected


@pytest.mark.parametrize("name", ZOO)
def test_cached_trials_equal_full_forwards_at_moved_weights(name):
    """Every loss that a search sees, in every order, against a plain forward of a copy of the model."""
    model, closure = ZOO[name]()
    model.train()
    for order in ("top_down", "bottom_up", "random"):
        opt = fastals.ALS(model, order=order, trust=0.02)
        for _ in range(2):
            state = torch.get_rng_state()
            opt.step(closure)
            after = torch.get_rng_state()
            torch.set_rng_state(state)
            with torch.no_grad():
                assert closure().item() == opt.report.loss_after
            torch.set_rng_state(after)


def test_deberta_embeddings_of_relative_positions_are_no_part_of_the_head():
    model, closure = ZOO["deberta-v2"]()
    opt = fastals.ALS(model)
    assert any("rel_embeddings" in n for n in opt.param_groups[-1]["param_names"])
    opt.step(closure)
    assert [g["name"] for g in opt.param_groups][-1] == "head"
    assert not any("encoder" in n for n in opt.param_groups[-1]["param_names"])
    copied = fastals.ALS(copy.deepcopy(model))
    copied.load_state_dict(opt.state_dict())
    assert [g["param_names"] for g in copied.param_groups] == [g["param_names"] for g in opt.param_groups]
