"""Small random Hugging Face models and PEFT adapters, dropout on, each with a loss of one mini-batch.

Every entry is a function without arguments that returns the model and ``loss_of``, a function of the model; so a copy
of the model has the same loss. :func:`build` makes an entry from a fixed seed, in training mode.
"""

import random
import tempfile

import numpy as np
import torch
import transformers as hf
from torch import nn

IDS = torch.tensor([[3, 5, 7, 9, 11, 4], [2, 8, 6, 1, 9, 3]])
LABELS = torch.tensor([0, 1])
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
DROP = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
LLAMA = SMALL | {"num_key_value_heads": 1, "attention_dropout": 0.2, "head_dim": 8, "pad_token_id": 0}


def build(name):
    """The model in training mode and ``loss_of``; the same weights and data every time."""
    seed_generators(0)
    model, loss_of = (ZOO | ADAPTERS)[name]()
    return model.train(), loss_of


def seed_generators(seed):
    """Seed the generators of torch, NumPy and Python."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def classifier(model):
    return model, lambda m: m(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=LABELS).loss


def language_model(model):
    return model, lambda m: m(input_ids=IDS, labels=IDS).loss


def images(model, size=8, **targets):
    pixels = torch.randn(2, 3, size, size)
    targets = targets or {"labels": LABELS}
    return model, lambda m: m(pixel_values=pixels, **targets).loss


def speech(model):
    sound, labels = torch.randn(2, 200), torch.tensor([[3, 5], [2, 8]])
    return model, lambda m: m(input_values=sound, labels=labels).loss


def pairs(model):
    pixels = torch.randn(2, 3, 8, 8)
    return model, lambda m: m(input_ids=IDS, pixel_values=pixels, return_loss=True).loss


def sequential():
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh()) for _ in range(4)]
    model, x = nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 2)), torch.randn(5, 6)
    return model, lambda m: m(x).square().mean()


def whisper():
    config = hf.WhisperConfig(**WHISPER)
    features = torch.randn(2, 8, 12)
    return hf.WhisperForConditionalGeneration(config), lambda m: m(input_features=features, labels=IDS).loss


def detr():
    backbone = hf.ResNetConfig(**RESNET, out_features=["stage2"])
    config = hf.DetrConfig(backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, **DETR)
    return images(hf.DetrForObjectDetection(config), size=32, labels=boxes())


def yolos():
    config = hf.YolosConfig(**(VIT | {"image_size": [8, 8]}), num_detection_tokens=4)
    return images(hf.YolosForObjectDetection(config), labels=boxes())


def boxes():
    """Two images with one and two objects."""
    return [
        {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])},
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.4], [0.7, 0.6, 0.4, 0.4]])},
    ]


def segformer():
    config = hf.SegformerConfig(**SEGFORMER)
    return images(hf.SegformerForSemanticSegmentation(config), size=32, labels=torch.randint(3, (2, 32, 32)))


def clip():
    return pairs(hf.CLIPModel(hf.CLIPConfig(text_config=TOWER_TEXT, vision_config=TOWER_IMAGE, projection_dim=8)))


def siglip():
    return pairs(hf.SiglipModel(hf.SiglipConfig(text_config=TOWER_TEXT, vision_config=TOWER_IMAGE)))


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
XLNET = {"vocab_size": 40, "d_model": 16, "n_layer": 3, "n_head": 2, "d_inner": 24, "dropout": 0.2}
FUNNEL = {
    "vocab_size": 40, "d_model": 16, "block_sizes": [1, 2], "num_decoder_layers": 1, "n_head": 2, "d_head": 8,
    "d_inner": 24, "hidden_dropout": 0.2,
}  # fmt: skip
LONGFORMER = ROBERTA | {"attention_window": 4, "pad_token_id": 1}
OPT = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 24,
    "max_position_embeddings": 16, "dropout": 0.2, "word_embed_proj_dim": 16, "layerdrop": 0.5,
}  # fmt: skip
BLOOM = {"vocab_size": 40, "hidden_size": 16, "n_layer": 3, "n_head": 2, "hidden_dropout": 0.2}
GPT_NEO = {
    "vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
    "window_size": 2, "max_position_embeddings": 16, "resid_dropout": 0.2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
MIXTRAL = LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}
GPT_OSS = MIXTRAL | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}
DEEPSEEK = SMALL | {
    "num_key_value_heads": 2, "moe_intermediate_size": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4, "v_head_dim": 8, "attention_dropout": 0.2,
}  # fmt: skip
GEMMA3 = LLAMA | {"sliding_window": 4, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
SWITCH = T5 | {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4, "expert_capacity": 8}
MAMBA = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 4, "conv_kernel": 3}
MAMBA2 = MAMBA | {"num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}
JAMBA = SMALL | {
    "num_key_value_heads": 1, "num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2,
    "expert_layer_period": 2, "expert_layer_offset": 1, "mamba_d_state": 4, "mamba_dt_rank": 2,
    "use_mamba_kernels": False, "attention_dropout": 0.2,
}  # fmt: skip
RWKV = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "attention_hidden_size": 16, "context_length": 16}
VIT = {k: v for k, v in SMALL.items() if k != "vocab_size"} | DROP | {"image_size": 8, "patch_size": 4, "num_labels": 2}
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 2,
    "hidden_dropout_prob": 0.2, "drop_path_rate": 0.3, "num_labels": 2,
}  # fmt: skip
CONVNEXT = {"num_stages": 3, "hidden_sizes": [8, 8, 16], "depths": [1, 2, 1], "drop_path_rate": 0.3, "num_labels": 2}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}
SEGFORMER = {
    "num_encoder_blocks": 2, "depths": [1, 2], "sr_ratios": [2, 1], "hidden_sizes": [8, 16], "patch_sizes": [3, 3],
    "strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "decoder_hidden_size": 8, "num_labels": 3,
    "hidden_dropout_prob": 0.2, "drop_path_rate": 0.3,
}  # fmt: skip
DETR = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "num_queries": 4, "dropout": 0.2, "num_labels": 2,
}  # fmt: skip
WAV2VEC2 = SMALL | {
    "conv_dim": [8, 8], "conv_kernel": [5, 3], "conv_stride": [4, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_dropout": 0.2, "attention_dropout": 0.2,
    "feat_proj_dropout": 0.2, "layerdrop": 0.0, "apply_spec_augment": False, "pad_token_id": 0,
}  # fmt: skip
SPEC_AUGMENT = {"apply_spec_augment": True, "mask_time_prob": 0.4, "mask_time_length": 3, "layerdrop": 0.6}
WHISPER = {k: v for k, v in BART.items() if k != "max_position_embeddings"} | {
    "num_mel_bins": 8, "max_source_positions": 6, "max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip
TOWER = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TOWER_TEXT = TOWER | {"vocab_size": 40, "max_position_embeddings": 8, "attention_dropout": 0.2, "eos_token_id": 11}
TOWER_IMAGE = TOWER | {"image_size": 8, "patch_size": 4, "attention_dropout": 0.2}

ZOO = {
    # encoders
    "bert": lambda: classifier(hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **DROP))),
    "distilbert": lambda: classifier(hf.DistilBertForSequenceClassification(hf.DistilBertConfig(**DISTIL))),
    "roberta": lambda: classifier(hf.RobertaForSequenceClassification(hf.RobertaConfig(**ROBERTA))),
    "electra": lambda: classifier(hf.ElectraForSequenceClassification(hf.ElectraConfig(**SMALL, **DROP))),
    "albert": lambda: classifier(hf.AlbertForSequenceClassification(hf.AlbertConfig(**ALBERT))),
    "mpnet": lambda: classifier(hf.MPNetForSequenceClassification(hf.MPNetConfig(**SMALL, **DROP))),
    "deberta": lambda: classifier(hf.DebertaForSequenceClassification(hf.DebertaConfig(**DEBERTA))),
    "deberta-v2": lambda: classifier(hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**DEBERTA))),
    "modernbert": lambda: classifier(hf.ModernBertForSequenceClassification(hf.ModernBertConfig(**MODERN))),
    "xlnet": lambda: classifier(hf.XLNetForSequenceClassification(hf.XLNetConfig(**XLNET))),
    "funnel": lambda: language_model(hf.FunnelForMaskedLM(hf.FunnelConfig(**FUNNEL))),
    "longformer": lambda: classifier(hf.LongformerForSequenceClassification(hf.LongformerConfig(**LONGFORMER))),
    # decoders
    "gpt2": lambda: language_model(hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2))),
    "gpt-neo": lambda: language_model(hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**GPT_NEO))),
    "opt-layerdrop": lambda: language_model(hf.OPTForCausalLM(hf.OPTConfig(**OPT))),
    "bloom": lambda: language_model(hf.BloomForCausalLM(hf.BloomConfig(**BLOOM))),
    "llama": lambda: language_model(hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA))),
    "mistral": lambda: language_model(hf.MistralForCausalLM(hf.MistralConfig(**LLAMA, sliding_window=4))),
    "qwen3": lambda: language_model(hf.Qwen3ForCausalLM(hf.Qwen3Config(**LLAMA))),
    "gemma": lambda: language_model(hf.GemmaForCausalLM(hf.GemmaConfig(**LLAMA))),
    "gemma3": lambda: language_model(hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**GEMMA3))),
    # mixtures of experts
    "mixtral": lambda: language_model(hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTRAL))),
    "mixtral-router-loss": lambda: language_model(
        hf.MixtralForCausalLM(hf.MixtralConfig(**MIXTRAL, output_router_logits=True))
    ),
    "qwen3-moe": lambda: language_model(hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**LLAMA, **EXPERTS))),
    "gpt-oss": lambda: language_model(hf.GptOssForCausalLM(hf.GptOssConfig(**GPT_OSS))),
    "deepseek-v3": lambda: language_model(hf.DeepseekV3ForCausalLM(hf.DeepseekV3Config(**DEEPSEEK))),
    # state-space and recurrent models
    "mamba": lambda: language_model(hf.MambaForCausalLM(hf.MambaConfig(**MAMBA))),
    "mamba2": lambda: language_model(hf.Mamba2ForCausalLM(hf.Mamba2Config(**MAMBA2))),
    "jamba": lambda: language_model(hf.JambaForCausalLM(hf.JambaConfig(**JAMBA))),
    "rwkv": lambda: language_model(hf.RwkvForCausalLM(hf.RwkvConfig(**RWKV))),
    # encoder-decoders
    "t5": lambda: language_model(hf.T5ForConditionalGeneration(hf.T5Config(**T5))),
    "switch": lambda: language_model(
        hf.SwitchTransformersForConditionalGeneration(hf.SwitchTransformersConfig(**SWITCH))
    ),
    "bart": lambda: language_model(hf.BartForConditionalGeneration(hf.BartConfig(**BART))),
    "bart-layerdrop": lambda: language_model(
        hf.BartForConditionalGeneration(hf.BartConfig(**BART, encoder_layerdrop=0.3, decoder_layerdrop=0.3))
    ),
    "pegasus": lambda: language_model(hf.PegasusForConditionalGeneration(hf.PegasusConfig(**BART, pad_token_id=0))),
    # images
    "vit": lambda: images(hf.ViTForImageClassification(hf.ViTConfig(**VIT))),
    "beit-drop-path": lambda: images(hf.BeitForImageClassification(hf.BeitConfig(**VIT, drop_path_rate=0.3))),
    "swin": lambda: images(hf.SwinForImageClassification(hf.SwinConfig(**SWIN)), size=16),
    "convnext": lambda: images(hf.ConvNextForImageClassification(hf.ConvNextConfig(**CONVNEXT)), size=32),
    "resnet": lambda: images(hf.ResNetForImageClassification(hf.ResNetConfig(**RESNET, num_labels=2)), size=32),
    "segformer": segformer,
    "detr": detr,
    "yolos": yolos,
    # speech
    "wav2vec2": lambda: speech(hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**WAV2VEC2))),
    "wav2vec2-spec-augment": lambda: speech(hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config(**(WAV2VEC2 | SPEC_AUGMENT)))),
    "hubert": lambda: speech(hf.HubertForCTC(hf.HubertConfig(**WAV2VEC2))),
    "whisper": whisper,
    # pairs of text and image
    "clip": clip,
    "siglip": siglip,
    # no Hugging Face model
    "sequential": sequential,
}

PROJECTIONS = ["q_proj", "v_proj"]


def llama(**changes):
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(LLAMA | changes)))


def adapted(config, base=llama):
    """A causal language model with the adapter that ``config`` of :mod:`peft` names."""

    def make():
        import peft

        return language_model(peft.get_peft_model(base(), config(peft)))

    return make


def of_tokens(name, **options):
    """An adapter for a causal language model, by the name of its configuration."""
    return adapted(lambda peft: getattr(peft, name)(task_type="CAUSAL_LM", **options))


def of_projections(name, **options):
    """An adapter of the queries and values of every block."""
    return of_tokens(name, target_modules=PROJECTIONS, **options)


def lora(**options):
    return of_projections("LoraConfig", r=2, lora_dropout=0.1, **options)


def tied_llama():
    return llama(tie_word_embeddings=True)


def lora_on_all_linear(peft):
    return peft.LoraConfig(
        r=2, target_modules="all-linear", lora_dropout=0.1, trainable_token_indices=[3, 5], task_type="CAUSAL_LM"
    )


def x_lora():
    """A mixture of two LoRA adapters, weighted by a classifier that reads a first pass of the model."""
    import peft

    with tempfile.TemporaryDirectory() as folder:
        for name in ("0", "1"):
            config = peft.LoraConfig(r=2, target_modules=PROJECTIONS, task_type="CAUSAL_LM", init_lora_weights=False)
            peft.get_peft_model(llama(), config, adapter_name=name).save_pretrained(folder)
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=16, xlora_depth=1, adapters={n: f"{folder}/{n}" for n in ("0", "1")}
        )
        base = llama()
        base.config.use_cache = False
        return language_model(peft.get_peft_model(base, config))


def poly():
    import peft

    config = peft.PolyConfig(task_type="CAUSAL_LM", r=2, n_tasks=2, n_skills=2, target_modules=PROJECTIONS)
    tasks = torch.tensor([0, 1])
    model = peft.get_peft_model(llama(), config)
    return model, lambda m: m(input_ids=IDS, labels=IDS, task_ids=tasks).loss


ADAPTERS = {
    "lora": lora(),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "lora-modules-to-save": lora(modules_to_save=["lm_head"]),
    "lora-all-linear-tied": adapted(lora_on_all_linear, base=tied_llama),
    "adalora": of_projections("AdaLoraConfig", init_r=4, target_r=2, total_step=100, lora_dropout=0.1),
    "ia3": of_tokens("IA3Config", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix-tuning": of_tokens("PrefixTuningConfig", num_virtual_tokens=3),
    "prompt-tuning": of_tokens("PromptTuningConfig", num_virtual_tokens=3),
    "p-tuning": of_tokens("PromptEncoderConfig", num_virtual_tokens=3, encoder_hidden_size=8, encoder_dropout=0.1),
    "adaption-prompt": of_tokens("AdaptionPromptConfig", adapter_len=3, adapter_layers=2),
    "loha": of_projections("LoHaConfig", r=2, rank_dropout=0.2, module_dropout=0.2),
    "lokr": of_projections("LoKrConfig", r=2, rank_dropout=0.2, module_dropout=0.2),
    "oft": of_projections("OFTConfig", r=0, oft_block_size=4, module_dropout=0.1),
    "boft": of_projections("BOFTConfig", boft_block_size=4, boft_dropout=0.1),
    "vera": of_projections("VeraConfig", r=2, vera_dropout=0.1),
    "ln-tuning": of_tokens("LNTuningConfig", target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
    "fourierft": of_projections("FourierFTConfig", n_frequency=6),
    "trainable-tokens": of_tokens("TrainableTokensConfig", token_indices=[3, 5, 9]),
    "vblora": of_projections("VBLoRAConfig", r=2, num_vectors=8, vector_length=4, topk=2, vblora_dropout=0.1),
    "hra": of_projections("HRAConfig", r=2),
    "miss": of_projections("MissConfig", r=2, miss_dropout=0.1),
    "c3a": of_projections("C3AConfig", block_size=4),
    "randlora": of_projections("RandLoraConfig", r=2, randlora_dropout=0.1),
    "shira": of_projections("ShiraConfig", r=1),
    "road": of_projections("RoadConfig", group_size=8),
    "delora": of_projections("DeloraConfig", r=2, module_dropout=0.1),
    "waveft": of_projections("WaveFTConfig", n_frequency=6),
    "poly": poly,
    "x-lora": x_lora,
}
