"""What other tools have a name for and this one has no field: data, read by `foreign`.

What holds instead is said as of today; a name moves to `foreign_names` when its feature is built.
"""

from __future__ import annotations

from typing import NamedTuple

from qlora_cli.recipe.foreign_names import HF, LLAMA_FACTORY, Names


class Nothing(NamedTuple):
    """Names for what this tool has no field for; `advice` says what holds instead."""

    advice: str
    names: Names


# fmt: off
NOTHING: tuple[Nothing, ...] = (
    # The model
    Nothing("the model's class and configuration are its own, unchanged",
            {"axolotl": "base_model_config model_type model_config type_of_model", HF: "rope_scaling"}),
    Nothing("the tokenizer and its special tokens are the base model's",
            {HF: "tokenizer_name use_fast_tokenizer", "torchtune": "tokenizer",
             "axolotl": "tokenizer_type tokenizer_config tokenizer_use_fast tokenizer_legacy special_tokens tokens "
                        "eot_tokens resize_token_embeddings_to_32x",
             "TRL": "pad_token eos_token", LLAMA_FACTORY: "add_tokens add_special_tokens resize_vocab"}),
    Nothing("attention is what transformers picks for the model, SDPA where it can, or what keeps packed rows apart",
            {HF: "attn_implementation use_flash_attention_2",
             "axolotl": "flash_attention sdp_attention xformers_attention flex_attention eager_attention s2_attention",
             LLAMA_FACTORY: "flash_attn shift_attn"}),
    Nothing("nothing is compiled, and no other tool's kernels are used",
            {HF: "torch_compile torch_compile_backend torch_compile_mode use_liger_kernel", "torchtune": "compile",
             "axolotl": "lora_mlp_kernel lora_qkv_kernel lora_o_kernel use_kernels",
             LLAMA_FACTORY: "enable_liger_kernel use_unsloth use_unsloth_gc"}),
    Nothing("8-bit weights are not offered: `quantization.bits` is 4 or 16",
            {HF: "load_in_8bit llm_int8_threshold llm_int8_has_fp16_weight llm_int8_enable_fp32_cpu_offload"}),
    Nothing("of the linear layers, the output head alone stays unquantised", {HF: "llm_int8_skip_modules"}),
    Nothing("4-bit weights are stored in bytes", {HF: "bnb_4bit_quant_storage"}),
    Nothing("bitsandbytes does the quantising", {LLAMA_FACTORY: "quantization_method", "axolotl": "gptq"}),
    Nothing("float32 products are not rounded to TF32", {HF: "tf32"}),
    Nothing("8-bit floats are not offered", {"axolotl": "fp8"}),
    # What is trained
    Nothing("the base model stays frozen: a LoRA adapter is what is trained",
            {"TRL": "use_peft", LLAMA_FACTORY: "finetuning_type", "mlx-lm": "fine_tune_type",
             "Unsloth": "full_finetuning", "QLoRA": "full_finetune", "PEFT": "peft_type inference_mode"}),
    Nothing("only LoRA layers are trained and saved",
            {"PEFT": "modules_to_save trainable_token_indices",
             "axolotl": "lora_modules_to_save peft_trainable_token_indices unfrozen_parameters",
             LLAMA_FACTORY: "additional_target", "torchtune": "save_adapter_weights_only"}),
    Nothing("LoRA goes on linear layers alone", {"PEFT": "target_parameters", "axolotl": "lora_target_parameters"}),
    Nothing("no bias is trained", {"PEFT": "bias lora_bias"}),
    Nothing("the update is scaled by alpha / rank; for alpha / sqrt(rank), multiply `lora.alpha` by sqrt(rank)",
            {"PEFT": "use_rslora", "axolotl": "peft_use_rslora"}),
    Nothing("DoRA is not offered: the update is plain LoRA", {"PEFT": "use_dora", "axolotl": "peft_use_dora"}),
    Nothing("A starts Kaiming-uniform and B at zero",
            {"PEFT": "init_lora_weights loftq_config eva_config corda_config", "axolotl": "peft_init_lora_weights",
             LLAMA_FACTORY: "pissa_init pissa_iter pissa_convert"}),
    Nothing("`lora.rank` and `lora.alpha` hold for every layer", {"PEFT": "rank_pattern alpha_pattern"}),
    Nothing("which way a weight lies is seen from its layer",
            {"PEFT": "fan_in_fan_out", "axolotl": "lora_fan_in_fan_out"}),
    Nothing("the model keeps the layers that it has",
            {"PEFT": "layer_replication", "axolotl": "peft_layer_replication"}),
    Nothing("A and B have one learning rate", {"axolotl": "loraplus_lr_ratio loraplus_lr_embedding embedding_lr"}),
    Nothing("there is no preference or reward training here",
            {"axolotl": "rl rl_beta dpo_beta reward_model", LLAMA_FACTORY: "pref_beta pref_loss ref_model"}),
    # The rows
    Nothing("rows are padded to the longest of their batch",
            {"axolotl": "pad_to_sequence_len", "TRL": "pad_to_multiple_of"}),
    Nothing("rows of similar length always share a batch",
            {HF: "group_by_length length_column_name train_sampling_strategy"}),
    Nothing("the order is drawn anew for every epoch, from `training.seed`",
            {"torchtune": "shuffle", "TRL": "shuffle_dataset", "axolotl": "shuffle_merged_datasets",
             LLAMA_FACTORY: "disable_shuffling"}),
    Nothing("an answer is learned with its end of turn", {"axolotl": "train_on_eos train_on_eot"}),
    Nothing("a turn has the keys role and content, or from and value; rename others in the data",
            {"axolotl": "message_property_mappings message_field_role message_field_content roles"}),
    Nothing("system turns are those of the rows, and what the chat template adds",
            {"axolotl": "default_system_message drop_system_message"}),
    Nothing("rows are encoded once, by worker processes, and kept in $XDG_CACHE_HOME/qlora or ~/.cache/qlora",
            {HF: "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor preprocessing_num_workers "
                  "overwrite_cache",
             "TRL": "dataset_num_proc dataset_kwargs", "litgpt": "num_workers",
             "axolotl": "dataset_prepared_path dataset_processes skip_prepare_dataset",
             LLAMA_FACTORY: "preprocessing_batch_size tokenized_path"}),
    Nothing("the kind of a file is told by its suffix", {"axolotl": "ds_type"}),
    Nothing("all rows are used, but for the weight of a source in a list, and all in every evaluation",
            {HF: "dataloader_drop_last max_train_samples max_eval_samples", LLAMA_FACTORY: "max_samples",
             "mlx-lm": "val_batches test_batches", "axolotl": "dataset_exact_deduplication shards"}),
    Nothing("columns that the format has no use for are left alone", {HF: "remove_unused_columns"}),
    Nothing("nothing is imported by its path: rows are named in `dataset.train`, their shape in `dataset.format`",
            {"torchtune": "_component_"}),
    # The loop
    Nothing("the batch size is taken as it is written", {HF: "auto_find_batch_size"}),
    Nothing("Adam's epsilon is 1e-8", {HF: "adam_epsilon"}),
    Nothing("after warmup the rate is constant, or falls to 0",
            {HF: "lr_scheduler_kwargs", "axolotl": "cosine_min_lr_ratio cosine_constant_lr_ratio", "litgpt": "min_lr"}),
    Nothing("the optimizers are those of `training.optimizer`, without further arguments",
            {HF: "optim_args optim_target_modules", LLAMA_FACTORY: "use_galore use_apollo use_badam use_adam_mini"}),
    Nothing("checkpointing is the non-reentrant kind",
            {HF: "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
             "TRL": "gradient_checkpointing_use_reentrant", LLAMA_FACTORY: "use_reentrant_gc"}),
    Nothing("activations are kept or recomputed, not moved to the CPU",
            {"TRL": "activation_offloading", "torchtune": "enable_activation_offloading"}),
    Nothing("the loss is cross entropy, its mean over the learned tokens of a whole step, all processes together",
            {HF: "average_tokens_across_devices label_smoothing_factor", "TRL": "loss_type", "torchtune": "loss"}),
    Nothing("no noise is added to the embeddings", {HF: "neftune_noise_alpha"}),
    Nothing("the command trains, and evaluates where there are validation rows",
            {HF: "do_train do_eval do_predict", "litgpt": "final_validation"}),
    Nothing("a metric says itself whether more of it is better", {HF: "greater_is_better"}),
    Nothing("any lower held-out loss is an improvement, for `training.early_stopping_patience` and "
            "`training.load_best`", {HF: "early_stopping_threshold"}),
    Nothing("a run has no time limit; Ctrl-C saves it after the step at hand, and --resume goes on",
            {"litgpt": "max_time"}),
    # The run and where it runs
    Nothing("a run is never overwritten: delete its folder, or name another with --output-dir",
            {HF: "overwrite_output_dir"}),
    Nothing("`qlora train RECIPE --resume` goes on from the newest whole checkpoint of the run",
            {HF: "resume_from_checkpoint ignore_data_skip", "axolotl": "auto_resume_from_checkpoints"}),
    Nothing("a run begins with a new adapter; `qlora train RECIPE --resume` goes on with one of its own",
            {LLAMA_FACTORY: "adapter_name_or_path create_new_adapter", "axolotl": "lora_model_dir",
             "mlx-lm": "resume_adapter_file"}),
    Nothing("a checkpoint always holds what --resume needs", {HF: "save_only_model"}),
    Nothing("weights are always saved as safetensors", {HF: "save_safetensors"}),
    Nothing("there are no trackers: the metrics are in metrics.jsonl in the run folder",
            {HF: "report_to run_name logging_dir trackio_space_id", "torchtune": "metric_logger",
             "axolotl": "wandb_project wandb_entity wandb_name wandb_run_id wandb_watch wandb_mode wandb_log_model "
                        "use_wandb use_tensorboard use_mlflow mlflow_tracking_uri mlflow_experiment_name use_comet "
                        "comet_project_name comet_workspace",
             LLAMA_FACTORY: "use_swanlab swanlab_project plot_loss", "mlx-lm": "wandb", "litgpt": "logger_name"}),
    Nothing("peak memory and tokens per second are always recorded",
            {HF: "include_num_input_tokens_seen skip_memory_metrics", "torchtune": "log_peak_memory_stats",
             "axolotl": "include_tokens_per_second"}),
    Nothing("nothing is uploaded",
            {HF: "push_to_hub hub_model_id hub_strategy hub_private_repo", "axolotl": "push_dataset_to_hub"}),
    Nothing("a recipe holds no access token: log in with `hf auth login`",
            {HF: "token use_auth_token hub_token", "axolotl": "hf_use_auth_token", LLAMA_FACTORY: "hf_hub_token"}),
    Nothing("the environment variable HF_HOME says where downloads are kept", {HF: "cache_dir"}),
    Nothing("every process has a whole copy of the model: it is not sharded",
            {HF: "deepspeed fsdp fsdp_config fsdp_version parallelism_config", "QLoRA": "max_memory_MB",
             "axolotl": "sequence_parallel_degree context_parallel_size tensor_parallel_size max_memory"}),
    Nothing("the whole model goes to `training.device`", {HF: "device_map"}),
    Nothing("several processes are started with `accelerate launch --num_processes N -m qlora_cli train RECIPE`",
            {HF: "num_processes local_rank accelerator_config ddp_backend ddp_timeout ddp_find_unused_parameters "
                  "ddp_bucket_cap_mb ddp_broadcast_buffers", "axolotl": "world_size ddp",
             "litgpt": "devices num_nodes"}),
    Nothing("every key can be overridden with --set, and unknown ones are refused", {"axolotl": "strict"}),
    Nothing("there are no plugins", {"axolotl": "plugins"}),
    Nothing("there is no profiler", {"torchtune": "profiler", "axolotl": "profiler_steps"}),
)
# fmt: on
