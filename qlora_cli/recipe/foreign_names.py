"""What other tools call things that this one has a field for: data, read by `foreign`, grouped by the field.

The names are those of PEFT's LoraConfig, transformers' TrainingArguments (4 and 5), BitsAndBytesConfig and run_clm,
TRL's SFT, axolotl, LLaMA-Factory, torchtune, Unsloth, mlx-lm, litgpt and the QLoRA paper's own script ("QLoRA"). A name
that several tools have is put down to the one that had it first; one that is also ours does not belong here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

Names = Mapping[str, str]  # tool -> its names, separated by spaces

HF = "Hugging Face"
LLAMA_FACTORY = "LLaMA-Factory"
_ANY = "another tool"  # a common word, nobody's in particular


class Otherwise(NamedTuple):
    """Names for a field whose values are not written as there; `advice` says how they are written here."""

    here: str
    advice: str
    names: Names


# fmt: off
SAME: Mapping[str, Names] = {
    # Sections: their inner names are looked up in turn.
    "lora": {"PEFT": "lora_config peft_config peft adapter_config", "mlx-lm": "lora_parameters"},
    "quantization": {HF: "quantization_config bnb_config bitsandbytes_config bitsandbytes",
                     "axolotl": "bnb_config_kwargs", _ANY: "quant"},
    "dataset": {HF: "data_args data_arguments", "TRL": "script_args dataset_mixture", "mlx-lm": "data hf_dataset"},
    "evaluation": {"lm-eval": "lm_eval", _ANY: "benchmarks"},
    "training": {HF: "training_args training_arguments trainer", "TRL": "sft sft_config"},
    # The model
    "base_model": {HF: "model_name_or_path pretrained_model_name_or_path model_id", "PEFT": "base_model_name_or_path",
                   "Unsloth": "model_name", "mlx-lm": "model"},
    "revision": {HF: "model_revision", "TRL": "base_model_revision", "axolotl": "revision_of_model"},
    "output_dir": {"litgpt": "out_dir"},
    "quantization.bits": {LLAMA_FACTORY: "quantization_bit"},
    "quantization.quant_type": {HF: "bnb_4bit_quant_type", LLAMA_FACTORY: "quantization_type"},
    "quantization.double_quant": {HF: "bnb_4bit_use_double_quant", "TRL": "use_bnb_nested_quant",
                                  LLAMA_FACTORY: "double_quantization"},
    "quantization.compute_dtype": {HF: "bnb_4bit_compute_dtype torch_dtype", "torchtune": "dtype",
                                   "litgpt": "precision"},
    "lora.rank": {"PEFT": "lora_r r", LLAMA_FACTORY: "lora_rank"},
    "lora.alpha": {"PEFT": "lora_alpha"},
    "lora.dropout": {"PEFT": "lora_dropout"},
    "lora.target_modules": {"axolotl": "lora_target_modules", "mlx-lm": "keys"},
    # The rows
    "dataset.train": {"TRL": "dataset_name", HF: "train_file train_dataset", "axolotl": "path datasets",
                      "litgpt": "json_path"},
    "dataset.validation": {HF: "validation_file eval_dataset", "axolotl": "test_datasets"},
    "dataset.validation_fraction": {"TRL": "test_split_size", "litgpt": "val_split_fraction"},
    "dataset.hub_config": {HF: "dataset_config_name", "TRL": "dataset_config"},
    "dataset.train_split": {"axolotl": "split", "TRL": "dataset_train_split"},
    "dataset.validation_split": {"TRL": "dataset_test_split", "mlx-lm": "valid_split"},
    "dataset.format": {LLAMA_FACTORY: "formatting", "torchtune": "conversation_style",
                       "QLoRA": "dataset_format", "axolotl": "type"},
    "dataset.streaming": {"TRL": "dataset_streaming"},
    "dataset.chat_template": {"axolotl": "chat_template_jinja", "TRL": "chat_template_path"},
    "dataset.supervise": {"torchtune": "masking_strategy"},
    "dataset.on_bad_row": {"pandas": "on_bad_lines"},
    "dataset.packing": {"axolotl": "sample_packing", LLAMA_FACTORY: "neat_packing", "torchtune": "packed"},
    "dataset.max_length": {"TRL": "max_seq_length", "axolotl": "sequence_len", LLAMA_FACTORY: "cutoff_len",
                           "torchtune": "max_seq_len", HF: "model_max_length"},
    "dataset.overlong": {"TRL": "truncation_mode", "axolotl": "excess_length_strategy"},
    # The loop
    "training.num_train_epochs": {"axolotl": "num_epochs", "torchtune": "epochs"},
    "training.per_device_train_batch_size": {"axolotl": "micro_batch_size", "torchtune": "batch_size",
                                             HF: "per_gpu_train_batch_size"},
    "training.per_device_eval_batch_size": {"axolotl": "eval_batch_size", HF: "per_gpu_eval_batch_size"},
    "training.gradient_accumulation_steps": {"mlx-lm": "grad_accumulation_steps"},
    "training.learning_rate": {"torchtune": "lr"},
    "training.lr_scheduler_type": {"axolotl": "lr_scheduler"},
    "training.warmup_steps": {"torchtune": "num_warmup_steps", "litgpt": "lr_warmup_steps"},
    "training.optimizer": {HF: "optim"},
    "training.adam_beta1": {"litgpt": "beta1"},
    "training.adam_beta2": {"litgpt": "beta2"},
    "training.max_grad_norm": {"torchtune": "clip_grad_norm", "litgpt": "max_norm", "DeepSpeed": "gradient_clipping"},
    "training.gradient_checkpointing": {HF: "activation_checkpointing", "mlx-lm": "grad_checkpoint",
                                        "torchtune": "enable_activation_checkpointing"},
    "training.logging_steps": {"torchtune": "log_every_n_steps"},
    "training.early_stopping_patience": {LLAMA_FACTORY: "early_stopping_steps"},
    "training.load_best": {HF: "load_best_model_at_end"},
    "training.save_steps": {"litgpt": "save_interval"},
    "training.eval_on_start": {"litgpt": "initial_validation"},
    "training.seed": {"Unsloth": "random_state"},
    # The benchmarks
    "evaluation.tasks": {"axolotl": "lm_eval_tasks"},
    "evaluation.num_fewshot": {LLAMA_FACTORY: "n_shot"},
    "evaluation.limit": {"QLoRA": "max_mmlu_samples"},
    "evaluation.per_device_batch_size": {"axolotl": "lm_eval_batch_size"},
    "evaluation.data_root": {LLAMA_FACTORY: "task_dir"},
    "evaluation.task_path": {"lm-eval": "include_path"},
}

_LAYER_NAMES = "a list with the names of the model's own linear layers, such as q_proj, or all-linear"
_STEPS = "counted in optimizer steps"
_SHARE = "a share above 0 and below 1; without validation rows, leave it out"

OTHERWISE: tuple[Otherwise, ...] = (
    # The model
    Otherwise("base_model", "a hub name or a local folder",
              {HF: "model_args model_arguments", "torchtune": "checkpointer"}),
    Otherwise("base_model", "a hub name or a local folder; checkpoints are kept under `output_dir`",
              {"litgpt": "checkpoint_dir"}),
    Otherwise("task", "causal_lm in place of CAUSAL_LM", {"PEFT": "task_type", "TRL": "lora_task_type"}),
    Otherwise("task", "causal_lm in place of sft", {LLAMA_FACTORY: "stage"}),
    Otherwise("output_dir", "the run folder; the adapter is in adapter/ there",
              {"mlx-lm": "adapter_path"}),
    Otherwise("quantization", "a section with bits, quant_type and double_quant", {"litgpt": "quantize"}),
    Otherwise("quantization.bits", "4 in place of true, 16 in place of false",
              {HF: "load_in_4bit", "torchtune": "quantize_base"}),
    Otherwise("quantization.bits", "4 for qlora, 16 for lora", {"axolotl": "adapter"}),
    Otherwise("quantization.compute_dtype", "bfloat16 in place of true",
              {HF: "bf16", "axolotl": "bfloat16", LLAMA_FACTORY: "pure_bf16"}),
    Otherwise("quantization.compute_dtype", "float32 in place of true", {"axolotl": "float32"}),
    Otherwise("quantization.compute_dtype", "bfloat16 or float32; float16 is not offered",
              {HF: "fp16 mixed_precision", "axolotl": "float16"}),
    Otherwise("lora.alpha", "scale times rank", {"mlx-lm": "scale"}),
    Otherwise("lora.target_modules", "all-linear in place of true", {"axolotl": "lora_target_linear"}),
    Otherwise("lora.target_modules", "a list, or all-linear in place of all", {LLAMA_FACTORY: "lora_target"}),
    Otherwise("lora.target_modules", _LAYER_NAMES,
              {"torchtune": "lora_attn_modules apply_lora_to_mlp apply_lora_to_output",
               "litgpt": "lora_query lora_key lora_value lora_projection lora_mlp lora_head"}),
    Otherwise("lora.target_modules", "a regular expression for whole paths can leave layers out",
              {"PEFT": "exclude_modules layers_to_transform layers_pattern",
               "axolotl": "peft_layers_to_transform peft_layers_pattern", "mlx-lm": "num_layers lora_layers"}),
    # The rows
    Otherwise("dataset.train", "a list, as in [{path: a.jsonl, weight: 0.5}, b.jsonl]",
              {"alignment-handbook": "dataset_mixer"}),
    Otherwise("dataset.train", "a list whose items have weights, as in [{path: a.jsonl, weight: 0.5}, b.jsonl]",
              {LLAMA_FACTORY: "interleave_probs", HF: "probabilities",
               _ANY: "dataset_weights data_weights sampling_weights mixing_weights mixture_weights"}),
    Otherwise("dataset.train", "a list, all of whose rows are mixed; how often each is seen is the weight of its item",
              {LLAMA_FACTORY: "mix_strategy", HF: "stopping_strategy"}),
    Otherwise("dataset.train", "a file, a folder, a glob or a hub name",
              {LLAMA_FACTORY: "dataset_dir", "axolotl": "data_files", "torchtune": "source"}),
    Otherwise("dataset.train", "with `dataset.format: text`", {"axolotl": "pretraining_dataset"}),
    Otherwise("dataset.validation_fraction", _SHARE, {"axolotl": "val_set_size", LLAMA_FACTORY: "val_size"}),
    Otherwise("dataset.validation_fraction", "a share of the rows, not their number", {"QLoRA": "eval_dataset_size"}),
    Otherwise("dataset.validation_fraction", "0.05 in place of 5", {HF: "validation_split_percentage"}),
    Otherwise("dataset.columns", "a mapping, as in {prompt: your_column}",
              {"mlx-lm": "prompt_feature completion_feature", "torchtune": "column_map"}),
    Otherwise("dataset.columns", "a mapping, as in {instruction: your_column}",
              {"axolotl": "field_instruction field_input field_output"}),
    Otherwise("dataset.columns", "a mapping, as in {messages: your_column}",
              {"axolotl": "field_messages", "mlx-lm": "chat_feature", "torchtune": "conversation_column"}),
    Otherwise("dataset.columns", "a mapping, as in {text: your_column}",
              {"TRL": "dataset_text_field", "axolotl": "text_column", "mlx-lm": "text_feature"}),
    Otherwise("dataset.max_length", "the longest row, prompt and answer together",
              {"QLoRA": "source_max_len target_max_len"}),
    Otherwise("dataset.max_length", "the longest row; text is not cut into blocks", {HF: "block_size"}),
    Otherwise("dataset.chat_template", "a Jinja file, the template itself, or plain; without it, the tokenizer's own",
              {LLAMA_FACTORY: "template", "litgpt": "prompt_style", "torchtune": "prompt_template"}),
    Otherwise("dataset.supervise", "everything in place of true, all_assistant in place of false",
              {"axolotl": "train_on_inputs", LLAMA_FACTORY: "train_on_prompt", "torchtune": "train_on_input",
               "QLoRA": "train_on_source"}),
    Otherwise("dataset.supervise", "all_assistant in place of true, everything in place of false",
              {"TRL": "completion_only_loss assistant_only_loss", "mlx-lm": "mask_prompt",
               "Unsloth": "train_on_responses_only"}),
    Otherwise("dataset.supervise", "last_assistant in place of true, all_assistant in place of false",
              {LLAMA_FACTORY: "mask_history"}),
    Otherwise("dataset.supervise", "all_assistant in place of [assistant]; or else last_assistant or everything",
              {"axolotl": "roles_to_train"}),
    Otherwise("dataset.on_bad_row", "skip in place of true, error in place of false",
              {_ANY: "skip_bad_rows skip_invalid_rows skip_bad_lines skip_errors ignore_errors"}),
    Otherwise("dataset.packing", "true or false, for all rows; they are packed by best fit, and none is cut for it",
              {"TRL": "packing_strategy eval_packing", "axolotl": "eval_sample_packing"}),
    Otherwise("dataset.packing", "true puts several rows in one sequence, without padding between them",
              {"TRL": "padding_free", "axolotl": "batch_flattening"}),
    # The loop
    Otherwise("training", "what it holds stands in that section, each by its own name", {"mlx-lm": "optimizer_config"}),
    Otherwise("training.max_steps", _STEPS, {"mlx-lm": "iters"}),
    Otherwise("training.max_steps", "the steps of all epochs together", {"torchtune": "max_steps_per_epoch"}),
    Otherwise("training.max_steps", "steps, not tokens", {"litgpt": "max_tokens"}),
    Otherwise("training.gradient_accumulation_steps",
              "the rows of a step, divided by per_device_train_batch_size and by the number of processes",
              {"litgpt": "global_batch_size"}),
    Otherwise("training.warmup_steps", "a number of steps, not a share of them",
              {HF: "warmup_ratio", "litgpt": "lr_warmup_fraction"}),
    Otherwise("training.lr_scheduler_type", "linear, cosine or constant", {"mlx-lm": "lr_schedule"}),
    Otherwise("training.optimizer", "adamw_8bit in place of true", {"QLoRA": "adam8bit"}),
    Otherwise("training.adam_beta1", "the first of them; the second is `training.adam_beta2`", {"PyTorch": "betas"}),
    Otherwise("training.gradient_checkpointing", "true or false", {"Unsloth": "use_gradient_checkpointing"}),
    Otherwise("training.gradient_checkpointing", "false in place of true",
              {LLAMA_FACTORY: "disable_gradient_checkpointing"}),
    Otherwise("training.eval_steps", "a number of steps; with validation rows there is always one at the end",
              {HF: "eval_strategy evaluation_strategy", "axolotl": "evals_per_epoch", "litgpt": "eval"}),
    Otherwise("training.eval_steps", _STEPS, {"mlx-lm": "steps_per_eval"}),
    Otherwise("training.save_steps", "a number of steps, or null for a checkpoint at the end alone",
              {HF: "save_strategy", "axolotl": "saves_per_epoch"}),
    Otherwise("training.save_steps", _STEPS, {"mlx-lm": "save_every"}),
    Otherwise("training.logging_steps", "a number of steps", {HF: "logging_strategy"}),
    Otherwise("training.logging_steps", _STEPS, {"mlx-lm": "steps_per_report", "litgpt": "log_interval"}),
    Otherwise("training.seed", "one seed for all that is drawn", {HF: "data_seed"}),
    # The benchmarks
    Otherwise("evaluation.tasks", "[mmlu] in place of true", {"QLoRA": "do_mmlu_eval"}),
    Otherwise("evaluation.tasks", "a list of lm-eval's names, as in [mmlu, arc_easy]",
              {"axolotl": "do_bench_eval bench_dataset", "QLoRA": "mmlu_dataset mmlu_split"}),
    Otherwise("evaluation.tasks", "with any tasks, the model is scored at the end",
              {"axolotl": "lm_eval_post_train"}),
    Otherwise("evaluation.keep_best", "a task and its metric, as in mmlu/acc; by held-out loss, it is "
              "`training.load_best`", {HF: "metric_for_best_model"}),
    Otherwise("training.device", "cpu in place of true", {HF: "use_cpu no_cuda"}),
)
# fmt: on
