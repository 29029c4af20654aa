"""The config.json of every family of `families.py`, in the spelling of the published files."""

from typing import Any

# Positions up to 128, of which the model was "trained" on 32.
YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 4,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 32,
    "type": "yarn",
}
FP8 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
# The spelling of deepseek-ai/DeepSeek-V3's config.json.
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 96,
    "initializer_range": 0.02,
    "intermediate_size": 200,
    "kv_lora_rank": 32,
    "max_position_embeddings": 128,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 40,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 8,
    "q_lora_rank": 48,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 16,
    "vocab_size": 331,
}
V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "model_type": "deepseek_v2",
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "routed_scaling_factor": 16.0,
    "seq_aux": True,
}
# FP8 wants rows and columns above 128, ragged: kv_a has 128 + 16 rows, experts are 200 wide.
FP8_SIZES = {
    "hidden_size": 192,
    "intermediate_size": 320,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 200,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "q_lora_rank": 136,
    "quantization_config": FP8,
}
V3_FP8 = V3 | FP8_SIZES
# With few heads, many products are all negative, and the scores of their positions all zero: ties,
# of which transformers takes any.
SPARSE = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 32,
    "index_n_heads": 16,
    "index_topk": 48,
}
# The spelling of transformers 5: the base is inside `rope_parameters`, and there is no YaRN. The
# epsilon is large enough to tell the norms of the latents from the others.
GLM = {name: value for name, value in V3.items() if name not in ("rope_scaling", "rope_theta")} | {
    "eos_token_id": [1, 3, 4],
    "n_group": 1,
    "pad_token_id": 1,
    "qk_head_dim": 40,
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "topk_group": 1,
    "v_head_dim": 40,
}
GLM5 = GLM | {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "head_dim": 16,
    "index_head_dim": 32,
    "index_n_heads": 16,
    "index_topk": 48,
    "indexer_rope_interleave": True,
    "moe_router_dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "v2-lite": V2
    | {
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 6,
        "q_lora_rank": None,
        "rope_scaling": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
    },
    # Unlike every released model, cosines and sines are scaled too.
    "v2": V2 | {"rope_scaling": YARN | {"mscale": 1.3, "mscale_all_dim": 0.7}},
    "v3-bf16": V3,
    "v3-fp8": V3_FP8,
    # Every shard of one and of two ranks but the narrow experts' is whole blocks.
    "v3-fp8-whole": V3_FP8
    | {
        "hidden_size": 256,
        "intermediate_size": 512,
        "moe_intermediate_size": 128,
        "q_lora_rank": 256,
        "v_head_dim": 32,
    },
    "v3.1-ue8m0": V3_FP8 | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    # Several pages of which a query attends to fewer positions than one has.
    "v3.2-long": V3
    | SPARSE
    | {
        "index_topk": 40,
        "max_position_embeddings": 512,
        "num_nextn_predict_layers": 1,
        "rope_scaling": YARN | {"factor": 16},
    },
    "v3.2": V3_FP8 | SPARSE | {"quantization_config": FP8 | {"scale_fmt": "ue8m0"}},
    "kimi-k2": V3
    | {
        "hidden_size": 120,
        "model_type": "kimi_k2",
        "n_group": 1,
        "n_routed_experts": 24,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "rope_scaling": YARN | {"beta_fast": 1.0, "beta_slow": 1.0},
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
    },
    "glm-5": GLM5,
    # Shared layers follow one another; FP8 as in V3.2.
    "glm-5.2": GLM5
    | FP8_SIZES
    | {
        "index_share_for_mtp_iteration": True,
        "index_skip_topk_offset": 2,
        "index_topk_freq": 3,
        "index_topk_pattern": None,
        "indexer_types": ["full", "full", "shared", "shared", "full", "shared"],
        "num_hidden_layers": 6,
    },
    "glm-4.7-flash": GLM
    | {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": "glm4_moe_lite",
        "num_attention_heads": 10,
        "num_key_value_heads": 10,
        "partial_rotary_factor": 1.0,
        "routed_scaling_factor": 1.8,
    },
    "kimi-k2.5": V3
    | {
        "n_group": 1,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "rms_norm_eps": 1e-3,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.827,
        "topk_group": 1,
    },
    "moonlight": V3
    | {
        "n_group": 1,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "q_lora_rank": None,
        "rms_norm_eps": 1e-3,
        "rope_scaling": None,
        "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
        "topk_group": 1,
    },
    "unusual": V3
    | {
        "first_k_dense_replace": 0,
        "max_position_embeddings": 128,
        "n_shared_experts": 3,
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-3,
        "rope_interleave": False,
        "rope_scaling": None,
        "torch_dtype": "float32",
    },
}
# Mean and spread of the router's bias. V3.1's is far above the scores and must stay float32; with
# v3-fp8's every biased score is negative, so that groups masked by 0 would win.
BIAS = {"v3.1-ue8m0": (10.0, 0.2), "kimi-k2": (-0.3, 0.2), "v3-fp8": (-1.5, 0.2)}
# Outer model type of a multi-modal model: its config has the text model's inside, its tensor names
# have a prefix, and there are tensors of an image encoder.
WRAPPED = {"kimi-k2.5": "kimi_k25"}
PROMPT_LENGTHS = (1, 2, 7, 45, 90)
