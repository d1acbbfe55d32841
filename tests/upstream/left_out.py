"""Which of Transformers' model tests are left out for our models, and why."""

OTHER_INPUTS = "of images, sound or video, which our models do not read"
OTHER_BACKENDS = "of attention backends that ours are not: config.attention_backend chooses"
NO_SUCH_PART = "of a part that our models do not have"
NOT_HERE = "needs a device, a package, a server or minutes that these tests do not have"
TRANSFORMERS_OWN = "of code of Transformers alone, or of names in it"

# By the beginning of their names.
LEFT_OUT = {
    "test_attn_implementation_composite": NO_SUCH_PART,
    "test_bc_torch_dtype": TRANSFORMERS_OWN,
    "test_can_init_all_missing_weights": TRANSFORMERS_OWN,  # only for listed models
    "test_can_load_from_already_mapped_keys": TRANSFORMERS_OWN,
    "test_can_load_with_device_context_manager": NOT_HERE,
    "test_can_load_with_global_device_set": NOT_HERE,
    "test_can_set_attention_dynamically": OTHER_BACKENDS,
    "test_cpu_offload": NOT_HERE,  # as tests/modeling/test_modules_are_called.py
    "test_disk_offload": NOT_HERE,
    "test_eager_matches_": OTHER_BACKENDS,
    "test_flash_": OTHER_BACKENDS,
    "test_flex_": OTHER_BACKENDS,
    # Of its class here, which lacks the tests of generation: test_generation.py has them.
    "test_generation_tester_mixin_inheritance": TRANSFORMERS_OWN,
    "test_get_": OTHER_INPUTS,
    "test_internal_model_config_and_subconfig": NO_SUCH_PART,
    "test_keep_in_fp32_modules": NO_SUCH_PART,
    "test_kernels_": NOT_HERE,
    "test_model_parallelism": NOT_HERE,
    "test_model_rope_": NO_SUCH_PART,
    "test_moe_": NO_SUCH_PART,
    "test_output_router_logits": NO_SUCH_PART,
    "test_resize_embeddings_untied_with_deepspeed": NOT_HERE,
    "test_resize_position_vector_embeddings": NO_SUCH_PART,
    "test_resize_tokens_embeddings_with_deepspeed": NOT_HERE,
    "test_reverse_loading_mapping": TRANSFORMERS_OWN,
    "test_sdpa_": OTHER_BACKENDS,
    "test_sliding_window_mask": OTHER_BACKENDS,
    "test_tied_head_has_a_tp_plan": NO_SUCH_PART,
    "test_torch_compile_for_training": NOT_HERE,
    "test_tp_plan_matches_params": NO_SUCH_PART,
    "test_vision_axial_rope": OTHER_INPUTS,
}
