"""Tiny models of families without a stanza: errata finds their parts by probing.

Mixtures of experts, language models inside a larger one that reads images too, and hybrids of
attention and recurrence. `tests.families.build` builds them.
"""

from __future__ import annotations

from typing import Any

from tests.sizes import CONTEXT, HEADS, HIDDEN, LAYERS, MLP

_TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "num_key_value_heads": 2, "intermediate_size": MLP, "max_position_embeddings": CONTEXT,
    "initializer_range": 0.1,
}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 24}
_VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
_QWEN_VISION = {
    "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2,
    "out_hidden_size": HIDDEN, "patch_size": 8,
}  # fmt: skip
_QWEN_IMAGES = {
    "image_token_id": 8, "video_token_id": 9, "vision_start_token_id": 10,
    "vision_end_token_id": 11,
}  # fmt: skip
_DELTA_NET = {
    **_TEXT, "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}  # fmt: skip
_LLAMA4 = {
    **_TEXT, "intermediate_size_mlp": 40, "num_local_experts": 2, "num_experts_per_tok": 1,
    "head_dim": 8, "moe_layers": [1],
}  # fmt: skip

_GEMMA4 = {
    **_TEXT, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 600,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
}  # fmt: skip

MORE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "mixtral": (
        "MixtralConfig", "MixtralForCausalLM",
        {**_TEXT, "num_local_experts": 2, "num_experts_per_tok": 1}, "bytes",
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig", "Qwen2MoeForCausalLM",
        {**_TEXT, **_EXPERTS, "num_experts": 2, "shared_expert_intermediate_size": 40,
         "mlp_only_layers": [0]}, "bytes",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM",
        {**_TEXT, **_EXPERTS, "num_experts": 2, "head_dim": 8, "mlp_only_layers": [2]}, "bytes",
    ),
    "olmoe": (
        "OlmoeConfig", "OlmoeForCausalLM", {**_TEXT, "num_experts": 2, "num_experts_per_tok": 1},
        "bytes",
    ),
    "gpt_oss": (
        "GptOssConfig", "GptOssForCausalLM",
        {**_TEXT, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}, "bytes",
    ),
    "deepseek_v3": (
        "DeepseekV3Config", "DeepseekV3ForCausalLM",
        {**_TEXT, "num_key_value_heads": HEADS, "n_routed_experts": 4, "num_experts_per_tok": 2,
         "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1,
         "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
         "v_head_dim": 8}, "bytes",
    ),
    "phimoe": (
        "PhimoeConfig", "PhimoeForCausalLM",
        {**_TEXT, "num_local_experts": 2, "num_experts_per_tok": 1}, "bytes",
    ),
    "llama4": (
        "Llama4Config", "Llama4ForConditionalGeneration",
        {"text_config": _LLAMA4,
         "vision_config": {**_VISION, "vision_output_dim": 64, "projector_input_dim": 16,
                           "projector_output_dim": 16}}, "bytes",
    ),
    "gemma3": (
        "Gemma3Config", "Gemma3ForConditionalGeneration",
        {"text_config": {**_TEXT, "head_dim": 8}, "vision_config": _VISION,
         "mm_tokens_per_image": 4, "image_token_index": 8, "boi_token_index": 9,
         "eoi_token_index": 10}, "sentencepiece",
    ),
    "gemma4_text": ("Gemma4TextConfig", "Gemma4ForCausalLM", _GEMMA4, "sentencepiece"),
    "gemma4": (
        "Gemma4Config", "Gemma4ForConditionalGeneration",
        {"text_config": _GEMMA4, "vision_config": _VISION, "audio_config": None}, "sentencepiece",
    ),
    "mistral3": (
        "Mistral3Config", "Mistral3ForConditionalGeneration",
        {"text_config": {**_TEXT, "model_type": "mistral", "head_dim": 8},
         "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
         "image_token_index": 8}, "sentencepiece",
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration",
        {"text_config": {**_TEXT, "rope_parameters": {
            "rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}},
         "vision_config": {**_QWEN_VISION, "fullatt_block_indexes": [0]}, **_QWEN_IMAGES}, "bytes",
    ),
    "llava": (
        "LlavaConfig", "LlavaForConditionalGeneration",
        {"text_config": {**_TEXT, "model_type": "llama"},
         "vision_config": {**_VISION, "model_type": "clip_vision_model"}, "image_token_index": 8},
        "sentencepiece",
    ),
    "qwen3_5": (
        "Qwen3_5Config", "Qwen3_5ForConditionalGeneration",
        {"text_config": _DELTA_NET,
         "vision_config": {**_QWEN_VISION, "deepstack_visual_indexes": [0]}, **_QWEN_IMAGES},
        "bytes",
    ),
    "qwen3_5_text": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _DELTA_NET, "bytes"),
    "qwen3_next": (
        "Qwen3NextConfig", "Qwen3NextForCausalLM",
        {**_DELTA_NET, **_EXPERTS, "num_experts": 2, "shared_expert_intermediate_size": 40},
        "bytes",
    ),
    "lfm2": (
        "Lfm2Config", "Lfm2ForCausalLM",
        {**_TEXT, "layer_types": ["conv", "full_attention", "conv"],
         "block_auto_adjust_ff_dim": False}, "bytes",
    ),
    "jamba": (
        "JambaConfig", "JambaForCausalLM",
        {**_TEXT, "num_experts": 2, "num_experts_per_tok": 1, "attn_layer_period": 2,
         "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
         "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}, "bytes",
    ),
    "bamba": (
        "BambaConfig", "BambaForCausalLM",
        {**_TEXT, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16,
         "mamba_d_state": 8, "mamba_expand": 2}, "bytes",
    ),
    "falcon_h1": (
        "FalconH1Config", "FalconH1ForCausalLM",
        {**_TEXT, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8,
         "mamba_n_groups": 1, "head_dim": 8}, "bytes",
    ),
    "mpt": (
        "MptConfig", "MptForCausalLM",
        {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "expansion_ratio": 2,
         "max_seq_len": CONTEXT, "initializer_range": 0.1}, "bytes",
    ),
}  # fmt: skip
