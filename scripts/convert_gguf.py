"""Turn SmolLM2's GGUF file into an ordinary Hugging Face folder, and tell whether such a folder is right.

scripts/get_demo_model.py imports this once it has something to convert or to check, not before. The heavy imports
are within the functions, because a folder from the hub is checked without gguf.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

CONTEXT_LENGTH = 8192
SYSTEM_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
ROUND_TRIP_SAMPLES = [
    "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\n#### 72",
    " leading space,  two spaces\n\n\tand  12 tabs , don't . !",
    "déjà vu, 漢字, 😀",
    "<|im_start|>user\nHi<|im_end|>\n",
]


def convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model and tokenizer to `folder` as transformers would have saved the original."""
    try:
        import gguf as _  # noqa: F401  transformers says this only after a traceback
        import torch
        import transformers
    except ImportError as error:
        raise ImportError(f"{error.name} is missing: pip install -e '.[demo]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    loaded = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # `loaded` remembers that it came from GGUF and cannot be saved; a fresh model does not.
    model = transformers.LlamaForCausalLM(clean_config(loaded.config))
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model = model.to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.save_pretrained(folder)
    clean_tokenizer(gguf).save_pretrained(folder)


def clean_config(config: Any) -> Any:
    """Return the configuration without GGUF's traces: the 4-bit mark, and 1e-5 read through float32."""
    import transformers

    values = config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version", "dtype"):
        values.pop(key, None)
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")
    return transformers.LlamaConfig(**values)


def clean_tokenizer(gguf: Path) -> Any:
    """Return the GGUF's tokenizer with what the GGUF format, or its reader, dropped.

    GGUF names SmolLM2's pre-tokenizer ("smollm") instead of spelling it out, and transformers then builds GPT-2's.
    SmolLM2 first cuts every digit off by itself, which shows after spaces: `x  1` is `x`, `␠␠`, `1`, where GPT-2's
    rule gives `x`, `␠`, `␠`, `1`. A model trained on the one reads the other badly.
    """
    import transformers
    from tokenizers import pre_tokenizers

    read = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=read.bos_token,
        eos_token=read.eos_token,
        unk_token=read.unk_token,
        pad_token=read.pad_token,
        chat_template=read.chat_template,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def tokenizer_problems(tokenizer: Any) -> list[str]:
    """Return what is wrong with a tokenizer that should be SmolLM2-Instruct's."""
    problems = []
    if not tokenizer.is_fast:
        return ["it is not a fast tokenizer, so it has no offsets"]
    for token, expected in (("<|im_start|>", 1), ("<|im_end|>", 2)):
        if (got := tokenizer.encode(token)) != [expected]:
            problems.append(f"{token} encodes to {got}, expected [{expected}]")
    if tokenizer.eos_token != "<|im_end|>":
        problems.append(f"eos is {tokenizer.eos_token}, expected <|im_end|>")
    if tokenizer.pad_token is None:
        problems.append("there is no pad token")
    if (got := tokenizer.tokenize("x  1 42")) != ["x", "ĠĠ", "1", "Ġ", "4", "2"]:
        problems.append(f"digits are not cut off one by one: {got}")
    for text in ROUND_TRIP_SAMPLES:
        encoded = tokenizer(text, return_offsets_mapping=True)
        if (got := tokenizer.decode(encoded["input_ids"])) != text:
            problems.append(f"{text!r} comes back as {got!r}")
        if encoded["offset_mapping"][-1][1] != len(text):
            problems.append(f"the offsets of {text!r} do not reach its end")
    expected_chat = (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    chat = [{"role": "user", "content": "Hi"}]
    if tokenizer.chat_template is None:
        problems.append("there is no chat template")
    elif tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) != expected_chat:
        problems.append("the chat template does not render SmolLM2's default system prompt")
    return problems


def ask_for_paris(folder: Path) -> str:
    """Return the model's greedy answer to one question, to see that it is a language model and not noise."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=24)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
