"""A tiny config and random inputs for every family: generic tests run on all of them."""

from __future__ import annotations

import copy
import dataclasses
import datetime
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig

from hf_prune.model.families import FAMILIES

BASE = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
ENCODER = {**BASE, "max_position_embeddings": 64}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {**BASE, **TOKENS, "num_key_value_heads": 2, "max_position_embeddings": 64}

CONFIGS: dict[str, dict[str, Any]] = {
    "bert": ENCODER,
    "roberta": {**ENCODER, "pad_token_id": 0},
    "electra": {**ENCODER, "embedding_size": 16},
    "distilbert": {
        "vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64,
    },
    "gpt2": {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64, **TOKENS},
    "opt": {
        "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": 64, "word_embed_proj_dim": 32, **TOKENS,
    },
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma2": {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16},
    "gemma3_text": {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16},
    "phi3": GROUPED,
    "vit": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "image_size": 16, "patch_size": 4,
    },
    "t5": {
        "vocab_size": 99, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2,
    },
    "bart": {
        "vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "decoder_start_token_id": 2, "forced_eos_token_id": None, **TOKENS,
    },
}  # fmt: skip
ROBERTA = {**ENCODER, "pad_token_id": 0}
PICTURES = CONFIGS["vit"]
HEAD_DIM = {**GROUPED, "head_dim": 16}
MHA = {**BASE, **TOKENS, "max_position_embeddings": 64}
BART = CONFIGS["bart"]
TOWERS = {"text_config": MHA, "vision_config": PICTURES}
BESIDE = {"image_token_id": 98, "tie_word_embeddings": False}
MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
LLAMA = {**GROUPED, "model_type": "llama"}
SMOL = {"text_config": LLAMA, "vision_config": PICTURES, **BESIDE, "scale_factor": 1}
EYE = {"hidden_size": 32, "out_hidden_size": 32, "depth": 1, "num_heads": 4, "intermediate_size": 48}
NO_WIDTH = {key: value for key, value in PICTURES.items() if key != "intermediate_size"}
SOUND = {
    **BASE, "conv_dim": [8, 8], "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
HYBRID = {"num_hidden_layers": 6, "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2}
LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
WINDOWS = {
    "num_hidden_layers": 6, "sliding_window": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
}  # fmt: skip
QWEN_MOE = {**EXPERTS, **HYBRID, **LINEAR, "head_dim": 16, "shared_expert_intermediate_size": 24}
WINDOWED = {**GROUPED, **WINDOWS}
CONFIGS |= {
    **dict.fromkeys(("xlm-roberta", "camembert", "data2vec-text", "xlm-roberta-xl", "roberta-prelayernorm"), ROBERTA),
    **dict.fromkeys(("ernie", "bert-generation", "megatron-bert", "layoutlm", "splinter", "mpnet"), ENCODER),
    "rembert": {**ENCODER, "input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {
        **ENCODER, "pronunciation_embed_dim": 8, "shape_embed_dim": 8, "pronunciation_vocab_size": 59,
        "shape_vocab_size": 69,
    },
    "roformer": {**ENCODER, "embedding_size": 32},
    "markuplm": {**ENCODER, "xpath_unit_hidden_size": 4, "max_depth": 4},
    "deberta": {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
    "deberta-v2": {**ENCODER, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "modernbert": {
        **MHA, "num_hidden_layers": 6, "local_attention": 8, "layer_types": WINDOWS["layer_types"], "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "nomic_bert": {**ENCODER, "head_dim": 8, "pad_token_id": 0},
    "eurobert": GROUPED,
    "biogpt": MHA,
    "xglm": {
        "vocab_size": 99, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48,
        "max_position_embeddings": 64, **TOKENS,
    },
    **dict.fromkeys(("granite", "smollm3", "olmo", "cohere", "stablelm", "arcee", "apertus", "jais2"), GROUPED),
    **dict.fromkeys(("starcoder2", "phi", "nanochat", "olmo2"), GROUPED),
    "nemotron": {**GROUPED, "head_dim": 8},
    **dict.fromkeys(("seed_oss", "ernie4_5", "hunyuan_v1_dense", "gemma", "glm", "glm4"), HEAD_DIM),
    **dict.fromkeys(("cohere2", "exaone4", "olmo3"), WINDOWED),
    **dict.fromkeys(("ministral", "ministral3", "cwm"), HEAD_DIM),
    "helium": {**GROUPED, "head_dim": 8},
    "gpt_neox": MHA,
    "gptj": {**CONFIGS["gpt2"], "rotary_dim": 4},
    "codegen": {**CONFIGS["gpt2"], "rotary_dim": 4},
    "gpt_bigcode": CONFIGS["gpt2"],
    "falcon": {**MHA, "ffn_hidden_size": 48},
    "bloom": {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4, **TOKENS},
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_moe": {**EXPERTS, "head_dim": 16, "mlp_only_layers": [1]},
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "ernie4_5_moe": {
        **EXPERTS, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1,
    },
    "gpt_oss": {**HEAD_DIM, "num_local_experts": 4, "num_experts_per_tok": 2, **WINDOWS},
    "deepseek_v3": {
        **GROUPED, "num_hidden_layers": 3, "moe_intermediate_size": 16, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "kv_lora_rank": 8,
        "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "qwen3_5_text": {**HEAD_DIM, **HYBRID, **LINEAR},
    "qwen3_next": {
        **EXPERTS, **HYBRID, **LINEAR, "head_dim": 16, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1],
    },
    "qwen3_5_moe_text": QWEN_MOE,
    "qwen3_5": {"text_config": {**HEAD_DIM, **HYBRID, **LINEAR, **MROPE}, "vision_config": EYE, **BESIDE},
    "qwen3_5_moe": {"text_config": {**QWEN_MOE, **MROPE}, "vision_config": EYE, **BESIDE},
    "granitemoe": {**GROUPED, "num_local_experts": 4},
    "hy_v3": {**EXPERTS, "first_k_dense_replace": 1, "head_dim": 16, "num_local_experts": 4},
    "lfm2": {
        **GROUPED, "num_hidden_layers": 6, "layer_types": ["conv", "conv", "full_attention"] * 2,
        "block_auto_adjust_ff_dim": False,
    },
    **dict.fromkeys(("mt5", "umt5"), CONFIGS["t5"]),
    **dict.fromkeys(("marian", "blenderbot-small", "plbart", "mvp", "mbart", "pegasus", "m2m_100", "blenderbot"), BART),
    **dict.fromkeys(("deit", "vit_mae", "vit_msn", "ijepa", "dinov3_vit", "data2vec-vision"), PICTURES),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), PICTURES),
    **dict.fromkeys(("clip_text_model", "siglip_text_model", "siglip2_text_model"), MHA),
    **dict.fromkeys(("clip", "siglip"), TOWERS),
    "siglip2": {"text_config": MHA, "vision_config": {**PICTURES, "num_patches": 16}},
    "beit": {**PICTURES, "use_relative_position_bias": True},
    "yolos": {**PICTURES, "image_size": [16, 16], "num_detection_tokens": 4, "use_mid_position_embeddings": False},
    "llava": {"text_config": LLAMA, "vision_config": {**PICTURES, "model_type": "clip_vision_model"}, **BESIDE},
    "internvl": {
        "text_config": {**GROUPED, "model_type": "qwen2"}, **BESIDE, "downsample_ratio": 1.0,
        "vision_config": {**PICTURES, "image_size": [16, 16], "patch_size": [4, 4]},
    },
    "gemma3": {
        "text_config": {**CONFIGS["gemma3_text"], **WINDOWS}, "vision_config": PICTURES, **BESIDE,
        "mm_tokens_per_image": 16, "boi_token_index": 97, "eoi_token_index": 96,
    },
    "paligemma": {
        "text_config": {**HEAD_DIM, "model_type": "gemma"}, **BESIDE, "projection_dim": 32,
        "vision_config": {**PICTURES, "vision_use_head": False, "projection_dim": 32},
    },
    **dict.fromkeys(("smolvlm", "idefics3"), SMOL),
    "mistral3": {
        "text_config": {**GROUPED, "model_type": "mistral"}, "vision_config": {**PICTURES, "model_type": "pixtral"},
        **BESIDE,
    },
    "qwen2_vl": {"text_config": {**GROUPED, **MROPE}, "vision_config": {**EYE, "embed_dim": 32}, **BESIDE},
    "qwen2_5_vl": {"text_config": {**GROUPED, **MROPE}, "vision_config": EYE, **BESIDE},
    "qwen3_vl": {
        "text_config": {**HEAD_DIM, **MROPE}, "vision_config": {**EYE, "deepstack_visual_indexes": []}, **BESIDE,
    },
    "audio-spectrogram-transformer": {
        **PICTURES, "max_length": 16, "num_mel_bins": 16, "frequency_stride": 4, "time_stride": 4,
    },
    "dinov2": {**NO_WIDTH, "mlp_ratio": 2},
    "dinov2_with_registers": {**NO_WIDTH, "mlp_ratio": 2, "use_swiglu_ffn": True, "num_register_tokens": 2},
    **dict.fromkeys(("wav2vec2", "hubert", "unispeech", "unispeech-sat", "wavlm", "data2vec-audio"), SOUND),
    "whisper": {
        **BART, "num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 64, "suppress_tokens": None,
        "begin_suppress_tokens": None, "forced_decoder_ids": None,
    },
}  # fmt: skip

STAGED = {"hidden_sizes": [8, 12], "depths": [2, 2], "embedding_size": 8}
CONFIGS |= {
    "resnet": {**STAGED, "layer_type": "basic"},
    "regnet": {**STAGED, "hidden_sizes": [12, 16], "groups_width": 4},
    "convnext": {**STAGED, "num_stages": 2, "image_size": 16, "patch_size": 2, "layer_scale_init_value": 0.5},
    "mobilenet_v2": {"image_size": 16, "depth_multiplier": 0.25, "depth_divisible_by": 4, "min_depth": 4},
}

ALL_CLASSES: dict[str, tuple[str, ...]] = {
    "bert": (
        "BertForSequenceClassification", "BertForQuestionAnswering", "BertForTokenClassification", "BertForMaskedLM",
    ),
    "roberta": ("RobertaForSequenceClassification", "RobertaForMaskedLM"),
    "electra": ("ElectraForSequenceClassification", "ElectraForQuestionAnswering"),
    "distilbert": ("DistilBertForSequenceClassification", "DistilBertForQuestionAnswering"),
    "gpt2": ("GPT2LMHeadModel", "GPT2ForSequenceClassification"),
    "opt": ("OPTForCausalLM", "OPTForSequenceClassification"),
    "llama": ("LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForTokenClassification"),
    "mistral": ("MistralForCausalLM",),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    "qwen3": ("Qwen3ForCausalLM",),
    "gemma2": ("Gemma2ForCausalLM",),
    "gemma3_text": ("Gemma3ForCausalLM",),
    "phi3": ("Phi3ForCausalLM",),
    "vit": ("ViTForImageClassification",),
    "t5": ("T5ForConditionalGeneration", "T5ForSequenceClassification", "T5EncoderModel"),
    "bart": (
        "BartForConditionalGeneration", "BartForSequenceClassification", "BartForQuestionAnswering", "BartForCausalLM",
    ),
}  # fmt: skip
ALL_CLASSES |= {
    "xlm-roberta": ("XLMRobertaForSequenceClassification",),
    "camembert": ("CamembertForSequenceClassification",),
    "data2vec-text": ("Data2VecTextForSequenceClassification",),
    "ernie": ("ErnieForSequenceClassification",),
    "bert-generation": ("BertGenerationEncoder",),
    "layoutlm": ("LayoutLMForSequenceClassification",),
    "rembert": ("RemBertForSequenceClassification",),
    "roc_bert": ("RoCBertForSequenceClassification",),
    "roformer": ("RoFormerForSequenceClassification",),
    "splinter": ("SplinterModel",),
    "markuplm": ("MarkupLMForSequenceClassification",),
    "xlm-roberta-xl": ("XLMRobertaXLForSequenceClassification",),
    "roberta-prelayernorm": ("RobertaPreLayerNormForSequenceClassification",),
    "megatron-bert": ("MegatronBertForSequenceClassification",),
    "deberta-v2": ("DebertaV2ForSequenceClassification",),
    "deberta": ("DebertaForSequenceClassification",),
    "mpnet": ("MPNetForSequenceClassification",),
    "modernbert": ("ModernBertForSequenceClassification",),
    "nomic_bert": ("NomicBertForSequenceClassification",),
    "eurobert": ("EuroBertForSequenceClassification",),
    "biogpt": ("BioGptForCausalLM",),
    "xglm": ("XGLMForCausalLM",),
    "granite": ("GraniteForCausalLM",),
    "smollm3": ("SmolLM3ForCausalLM",),
    "olmo": ("OlmoForCausalLM",),
    "cohere": ("CohereForCausalLM",),
    "cohere2": ("Cohere2ForCausalLM",),
    "helium": ("HeliumForCausalLM",),
    "seed_oss": ("SeedOssForCausalLM",),
    "ernie4_5": ("Ernie4_5ForCausalLM",),
    "hunyuan_v1_dense": ("HunYuanDenseV1ForCausalLM",),
    "ministral": ("MinistralForCausalLM",),
    "ministral3": ("Ministral3ForCausalLM",),
    "stablelm": ("StableLmForCausalLM",),
    "cwm": ("CwmForCausalLM",),
    "gemma": ("GemmaForCausalLM",),
    "exaone4": ("Exaone4ForCausalLM",),
    "glm": ("GlmForCausalLM",),
    "glm4": ("Glm4ForCausalLM",),
    "arcee": ("ArceeForCausalLM",),
    "apertus": ("ApertusForCausalLM",),
    "nemotron": ("NemotronForCausalLM",),
    "jais2": ("Jais2ForCausalLM",),
    "starcoder2": ("Starcoder2ForCausalLM",),
    "nanochat": ("NanoChatForCausalLM",),
    "phi": ("PhiForCausalLM",),
    "gpt_neox": ("GPTNeoXForCausalLM",),
    "gptj": ("GPTJForCausalLM",),
    "falcon": ("FalconForCausalLM",),
    "codegen": ("CodeGenForCausalLM",),
    "gpt_bigcode": ("GPTBigCodeForCausalLM",),
    "bloom": ("BloomForCausalLM",),
    "olmo2": ("Olmo2ForCausalLM",),
    "olmo3": ("Olmo3ForCausalLM",),
    "mixtral": ("MixtralForCausalLM",),
    "qwen2_moe": ("Qwen2MoeForCausalLM",),
    "qwen3_moe": ("Qwen3MoeForCausalLM",),
    "glm4_moe": ("Glm4MoeForCausalLM",),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM",),
    "gpt_oss": ("GptOssForCausalLM",),
    "deepseek_v3": ("DeepseekV3ForCausalLM",),
    "qwen3_5_text": ("Qwen3_5ForCausalLM",),
    "qwen3_next": ("Qwen3NextForCausalLM",),
    "lfm2": ("Lfm2ForCausalLM",),
    "qwen3_5_moe_text": ("Qwen3_5MoeForCausalLM",),
    "qwen3_5": ("Qwen3_5ForConditionalGeneration",),
    "qwen3_5_moe": ("Qwen3_5MoeForConditionalGeneration",),
    "granitemoe": ("GraniteMoeForCausalLM",),
    "hy_v3": ("HYV3ForCausalLM",),
    "mt5": ("MT5ForConditionalGeneration",),
    "umt5": ("UMT5ForConditionalGeneration",),
    "marian": ("MarianMTModel",),
    "blenderbot-small": ("BlenderbotSmallForConditionalGeneration",),
    "plbart": ("PLBartForConditionalGeneration",),
    "mvp": ("MvpForConditionalGeneration",),
    "mbart": ("MBartForConditionalGeneration",),
    "pegasus": ("PegasusForConditionalGeneration",),
    "m2m_100": ("M2M100ForConditionalGeneration",),
    "blenderbot": ("BlenderbotForConditionalGeneration",),
    "deit": ("DeiTForImageClassification",),
    "vit_mae": ("ViTMAEModel",),
    "vit_msn": ("ViTMSNForImageClassification",),
    "ijepa": ("IJepaForImageClassification",),
    "yolos": ("YolosModel",),
    "data2vec-vision": ("Data2VecVisionForImageClassification",),
    "beit": ("BeitForImageClassification",),
    "dinov2": ("Dinov2ForImageClassification",),
    "dinov2_with_registers": ("Dinov2WithRegistersForImageClassification",),
    "dinov3_vit": ("DINOv3ViTModel",),
    "audio-spectrogram-transformer": ("ASTForAudioClassification",),
    "clip_text_model": ("CLIPTextModel",),
    "clip_vision_model": ("CLIPVisionModel",),
    "siglip_text_model": ("SiglipTextModel",),
    "siglip_vision_model": ("SiglipVisionModel",),
    "siglip2_text_model": ("Siglip2TextModel",),
    "clip": ("CLIPModel",),
    "siglip": ("SiglipModel",),
    "siglip2": ("Siglip2Model",),
    "wav2vec2": ("Wav2Vec2ForCTC",),
    "hubert": ("HubertForCTC",),
    "unispeech": ("UniSpeechForCTC",),
    "unispeech-sat": ("UniSpeechSatForCTC",),
    "data2vec-audio": ("Data2VecAudioForCTC",),
    "wavlm": ("WavLMForCTC",),
    "whisper": ("WhisperForConditionalGeneration",),
    **{
        family: (f"{name}ForImageClassification",)
        for family, name in (
            ("resnet", "ResNet"),
            ("regnet", "RegNet"),
            ("convnext", "ConvNext"),
            ("mobilenet_v2", "MobileNetV2"),
        )
    },
    "llava": ("LlavaForConditionalGeneration",),
    "internvl": ("InternVLForConditionalGeneration",),
    "gemma3": ("Gemma3ForConditionalGeneration",),
    "paligemma": ("PaliGemmaForConditionalGeneration",),
    "smolvlm": ("SmolVLMForConditionalGeneration",),
    "idefics3": ("Idefics3ForConditionalGeneration",),
    "mistral3": ("Mistral3ForConditionalGeneration",),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration",),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration",),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration",),
}


def is_generic(family: str) -> bool:
    """Whether all oracles fit: every layer has attention and an FFN that can go, and the class a loss that is known."""
    stacks, sublayers = FAMILIES[family].stacks, [s for stack in FAMILIES[family].stacks for s in stack.sublayers]
    whole = {stack.name for stack in stacks} <= {"encoder", "decoder"} and not any(s.optional for s in sublayers)
    both = {s.kind for s in sublayers} >= {"attention", "ffn"} and not EXPERTS_IN & CONFIGS[family].keys()
    taught = not ALL_CLASSES[family][0].endswith(("Model", "Encoder", "ForCTC")) or family in ("gpt2", "marian")
    return whole and both and taught and family not in OTHERS


# other inputs; no float64 (XGLM); or MACs for each pair of tokens (DeBERTa) or outside the layers (MarkupLM) that are
# not counted
OTHERS = ("whisper", "audio-spectrogram-transformer", "xglm", "deberta", "deberta-v2", "markuplm")
EXPERTS_IN = {"num_experts", "num_local_experts"}
GENERIC = sorted(filter(is_generic, CONFIGS))

CORE = ("bert", "distilbert", "gpt2", "llama", "gemma3_text", "phi3", "t5", "bart", "vit")  # one of each kind
A_DAY = 2  # of the others


def todays(date: datetime.date, asked: str = "") -> list[str]:
    """The families that the generic tests run on: those of `CORE` and a few others, that change from day to day; all
    with HF_PRUNE_FAMILIES=all, or those that it lists."""
    if asked:
        return sorted(GENERIC if asked == "all" else {*GENERIC} & {*asked.split(",")})
    others = sorted(set(GENERIC) - {*CORE})
    first = date.toordinal() * A_DAY
    return sorted({*CORE, *(others[(first + i) % len(others)] for i in range(A_DAY))})


FAMILY_NAMES = todays(datetime.date.today(), os.environ.get("HF_PRUNE_FAMILIES", ""))
CLASSES = {family: ALL_CLASSES[family] for family in FAMILY_NAMES}
FAMILY_OF = {name: family for family, names in ALL_CLASSES.items() for name in names}
EVERY_CLASS = [(family, name) for family in FAMILY_NAMES for name in CLASSES[family]]
FIXED = sorted({*CORE, "electra", "opt"})  # where tests name heads and classes
FIXED_CLASSES = [(family, name) for family in FIXED for name in ALL_CLASSES[family]]


def tiny_model(family: str, class_name: str | None = None, seed: int = 0, **changes: Any) -> Any:
    """A randomly initialised model with weights large enough that every unit matters, in evaluation mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    model = getattr(transformers, class_name or ALL_CLASSES[family][0])(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if not parameter.requires_grad:
                continue  # sines of positions, which no checkpoint holds
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_(noise * 0.05 if "weight" in name else noise * 0.1)
    return model.eval()


def tiny_batch(model: Any, batch: int = 8, length: int = 12, seed: int = 0, padded: bool = True) -> dict[str, Any]:
    """Random inputs with labels that fit the model; the second half of the examples is right-padded."""
    generator = torch.Generator().manual_seed(seed)
    config = model.config

    def ids(rows: int, columns: int) -> torch.Tensor:
        return torch.randint(5, 99, (rows, columns), generator=generator)

    if model.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
        if config.model_type == "vit_mae":  # which patches it sees
            inputs["noise"] = torch.rand(batch, 16, generator=generator)
        return {**inputs, "labels": torch.randint(config.num_labels, (batch,), generator=generator)}
    if model.main_input_name == "input_values":
        shape = (batch, 16, 16) if config.model_type == "audio-spectrogram-transformer" else (batch, 64)
        return {"input_values": torch.randn(*shape, generator=generator)}
    if model.main_input_name == "input_features":
        return {"input_features": torch.randn(batch, 8, 24, generator=generator), "labels": ids(batch, length)}
    inputs = {"input_ids": ids(batch, length), "attention_mask": torch.ones(batch, length, dtype=torch.long)}
    if padded:
        inputs["attention_mask"][batch // 2 :, length - 4 :] = 0
        inputs["input_ids"][inputs["attention_mask"] == 0] = config.get_text_config().pad_token_id or 0
    if hasattr(config, "vision_config"):
        inputs = with_pictures(config, inputs, generator)
    last = inputs["attention_mask"].sum(1) - 1
    inputs["input_ids"][torch.arange(batch), last] = 2  # one eos each: BART's classifier reads there
    real = inputs["attention_mask"] == 1
    name = type(model).__name__
    if "SequenceClassification" in name:
        inputs["labels"] = torch.randint(config.num_labels, (batch,), generator=generator)
    elif "QuestionAnswering" in name:
        inputs["start_positions"] = torch.randint(length - 4, (batch,), generator=generator)
        inputs["end_positions"] = torch.randint(length - 4, (batch,), generator=generator)
    elif "TokenClassification" in name:
        inputs["labels"] = torch.randint(config.num_labels, (batch, length), generator=generator).masked_fill(
            ~real, -100
        )
    elif config.is_encoder_decoder and ("ForConditionalGeneration" in name or "MTModel" in name):
        inputs["labels"] = ids(batch, length - 3)
        inputs["labels"][batch // 2 :, -2:] = -100
    elif "LM" in name or "ForConditionalGeneration" in name:
        inputs["labels"] = inputs["input_ids"].masked_fill(~real, -100)
    return inputs


PLACES = ("llava", "internvl", "gemma3", "paligemma", "smolvlm", "idefics3")  # tokens of a picture among those of text


def with_pictures(config: Any, inputs: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A picture beside each text, for models of both."""
    batch = len(inputs["input_ids"])
    pixels = torch.randn(batch, 3, 16, 16, generator=generator)
    if config.model_type in ("clip", "siglip"):
        return {**inputs, "pixel_values": pixels}
    if config.model_type == "siglip2":  # a list of patches, of any number
        shapes = torch.full((batch, 2), 4)
        mask = torch.ones(batch, 16, dtype=torch.long)
        pixels = torch.randn(batch, 16, 48, generator=generator)
        return {**inputs, "pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    text = {**inputs, "input_ids": inputs["input_ids"].clamp_max(90)}
    if config.model_type not in PLACES:
        return text
    before = {"input_ids": torch.full((batch, 16), 98), "attention_mask": torch.ones(batch, 16, dtype=torch.long)}
    both = {key: torch.cat([before[key], value], 1) for key, value in text.items()}
    if config.model_type == "gemma3":
        both["token_type_ids"] = (both["input_ids"] == 98).long()
    several = config.model_type in ("smolvlm", "idefics3")  # pictures a text
    return {**both, "pixel_values": pixels[:, None] if several else pixels}


def keep(site: Any, units: Iterable[int] | None = None, axis: str = "") -> Any:
    """What a plan keeps of a site: these units of an axis, by default all of the inner one."""
    from hf_prune.plan import Kept

    of = site.sizes[axis or site.inner.name]
    return Kept(site.key, axis or site.inner.name, of, tuple(range(of) if units is None else units))


def cut_everywhere(anatomy: Any, uniform: bool = False) -> Any:
    """A plan that removes something at every site; tied sites alike."""
    from hf_prune.plan import PruningPlan

    shifts = [0 if uniform or site.inner.tied else site.layer for site in anatomy.sites]
    return PruningPlan(anatomy.model_type, tuple(map(_cut_somewhere, anatomy.sites, shifts)))


def _cut_somewhere(site: Any, shift: int) -> Any:
    units, groups = site.sizes[site.inner.name], site.sizes[site.outer.name]
    if site.routed:  # whole experts in the odd layers, narrower ones in the even ones
        narrower = [unit for unit in range(units) if (unit % site.share) % 2 == (unit // site.share) % 2]
        return keep(site, [0, *range(2, groups)], site.outer.name) if shift % 2 else keep(site, narrower)
    if not site.inner.mixes:
        return keep(site, [i for i in range(units) if i % 3 != 1][: units // 2 + 3 * shift])
    if groups == units:
        return keep(site, (1, 2) if shift else (0, 2, 3))
    if shift:  # whole groups in the odd layers, one head of each group in the even ones
        return keep(site, (1,), site.outer.name)
    return keep(site, [group * site.share + group % site.share for group in range(groups)])


def by_layer(anatomy: Any, stack: str) -> list[list[Any]]:
    """The sites of a stack, layer by layer."""
    here = [site for site in anatomy.sites if site.stack == stack]
    return [[site for site in here if site.layer == layer] for layer in dict.fromkeys(site.layer for site in here)]


def layers_of(model: Any, anatomy: Any, stack: str) -> list[Any]:
    """The layers of a stack."""
    return [model.get_submodule(sites[0].path) for sites in by_layer(anatomy, stack)]


def tiny(class_name: str, **changes: Any) -> Any:
    """`tiny_model` by class name alone."""
    return tiny_model(FAMILY_OF[class_name], class_name, **changes)


def rows(batch: Mapping[str, torch.Tensor], index: Any) -> dict[str, torch.Tensor]:
    """Some examples of a batch."""
    return {key: value[index] for key, value in batch.items()}


def singles(batch: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The examples of a batch, one at a time."""
    return [rows(batch, slice(i, i + 1)) for i in range(len(next(iter(batch.values()))))]


@torch.no_grad()
def outputs(model: Any, batch: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """All tensors that a model gives, in fp32, without a cache."""
    inputs = {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in batch.items()}
    return [x.float() for x in model(**inputs).to_tuple() if isinstance(x, torch.Tensor)]


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest absolute difference between two lists of outputs."""
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def cut(model: Any, plan: Any) -> Any:
    """The same model, cut to a plan, without repair."""
    from hf_prune import PruningConfig, prune

    return prune(model, [tiny_batch(model)], PruningConfig(repair="none", batch_norm=False), plan=plan).model


def cut_tiny(class_name: str, shapes: str, **changes: Any) -> Any:
    """A tiny model cut at every site: "uniform" or "per_layer"; "stock" cuts what the stock config can say."""
    from hf_prune import PruningConfig, describe, prune

    model = tiny(class_name, **changes)
    if shapes == "stock":
        config = within_reach(
            model, PruningConfig(metric="params", criterion="magnitude", repair="none", batch_norm=False)
        )
        return prune(model, [tiny_batch(model)], config).model
    return cut(model, cut_everywhere(describe(model), uniform=shapes == "uniform"))


def within_reach(model: Any, config: Any) -> Any:
    """The same configuration, with `keep` halfway between all and the least that its units and shapes can reach."""
    from hf_prune import describe
    from hf_prune.decide.allocate import reachable
    from hf_prune.decide.units import default_align

    anatomy = describe(model)
    least = reachable(anatomy, config, config.align or default_align(anatomy, "cpu"))
    return dataclasses.replace(config, keep=(1 + least) / 2)


def snapshot(model: Any) -> dict[str, Any]:
    """All that pruning may change or must leave alone: weights, config, flags and hooks."""
    return {
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "config": copy.deepcopy(model.config.to_dict()),
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
    }


def changed(before: Mapping[str, Any], model: Any) -> Iterator[str]:
    """What differs, bit by bit, from a snapshot."""
    after = snapshot(model)
    yield from (key for key in before if key != "weights" and before[key] != after[key])
    old, new = before["weights"], after["weights"]
    yield from sorted(set(old) ^ set(new))
    yield from (k for k in old if k in new and not (old[k].shape == new[k].shape and torch.equal(old[k], new[k])))
