# ruff: noqa: RUF001  (DeepSeek's tokens are written with fullwidth bars)
"""Chat templates of well-known families, written for the tests, and tokenizers with the special tokens they use.

Each writes what models of its family were trained on, as far as turns, system prompts, reasoning and tools go.
"""

from __future__ import annotations

from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from tests.support.tokenizers import CHATML, tiny_tokenizer

# Splits the opening system message off: sets `system` (empty if there is none) and `turns`.
_SPLIT = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = '' %}{% set turns = messages %}{% endif %}"
)
_ALTERNATE = (
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate: user, assistant, user, assistant') }}{% endif %}"
)

LLAMA2 = (
    _SPLIT + "{% for message in turns %}" + _ALTERNATE + "{% set content = message['content'] %}"
    "{% if loop.first and system %}{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}"
    "{% endfor %}"
)

_LLAMA3_TURNS = (
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
)
_LLAMA3_PROMPT = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
LLAMA3 = "{{ bos_token }}" + _LLAMA3_TURNS + "{% if add_generation_prompt %}" + _LLAMA3_PROMPT + "{% endif %}"
# As first published, and in many models made from it: the generation prompt is always written.
LLAMA3_ALWAYS = "{{ bos_token }}" + _LLAMA3_TURNS + _LLAMA3_PROMPT
# Llama 3.2 tells today's date.
LLAMA3_DATED = (
    "{{- bos_token }}\n"
    "  {%- if strftime_now is defined %}\n"
    '    {%- set date_string = strftime_now("%d %b %Y") %}\n'
    "  {%- endif %}\n"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '<|eot_id|>' -}}\n"
    + _LLAMA3_TURNS
    + "{% if add_generation_prompt %}"
    + _LLAMA3_PROMPT
    + "{% endif %}"
)

MISTRAL = (
    "{{ bos_token }}{% for message in messages %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
# From v0.3 on, the system prompt stands in the last turn of the user.
MISTRAL_V3 = (
    "{{ bos_token }}" + _SPLIT + "{% for message in turns %}" + _ALTERNATE + "{% if message['role'] == 'user' %}"
    "{% set last = turns[loop.index0 + 1:] | selectattr('role', 'equalto', 'user') | list | length == 0 %}"
    "{{ '[INST] ' + (system + '\n\n' if system and last else '') + message['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)

_GEMMA_TURN = (
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + PREFIXmessage['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}" + _ALTERNATE + _GEMMA_TURN.replace("PREFIX", "")
)
GEMMA3 = (
    "{{ bos_token }}"
    + _SPLIT
    + "{% for message in turns %}"
    + _ALTERNATE
    + _GEMMA_TURN.replace("PREFIX", "(system + '\n\n' if loop.first and system else '') + ")
)

# The end of sequence stands at the very end alone.
PHI3 = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)

QWEN25 = (
    "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set system = 'You are Qwen.' %}{% endif %}"
    "{{ '<|im_start|>system\n' + system }}"
    "{% if tools %}{{ '\n\n# Tools\n<tools>' }}{% for tool in tools %}{{ '\n' + tool | tojson }}{% endfor %}"
    "{{ '\n</tools>' }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for message in messages %}"
    "{% if message.role == 'user' or (message.role == 'system' and not loop.first) %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% elif message.role == 'assistant' %}"
    "{{ '<|im_start|>assistant' }}"
    "{% if message.content or not message.tool_calls %}{{ '\n' + message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}{% set call = call.function %}"
    "{{ '\n<tool_call>\n{\"name\": \"' + call.name + '\", \"arguments\": ' + call.arguments | tojson + '}' }}"
    "{{ '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}"
    "{% elif message.role == 'tool' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The reasoning of turns before the user's last is dropped; the last turn always has a block of it, be it empty.
QWEN3 = (
    "{% set ns = namespace(query=-1) %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}"
    "{% endfor %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% set content = message.content %}"
    "{% if message.role == 'assistant' %}{% set reasoning = message.reasoning_content or '' %}"
    "{% if not reasoning and '</think>' in content %}"
    "{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.query and (loop.last or reasoning) %}"
    "{{ '<think>\n' + reasoning + '\n</think>\n\n' }}{% endif %}{% endif %}"
    "{{ content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

DEEPSEEK_V2 = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_DEEPSEEK_TURNS = (
    "{{ bos_token }}" + _SPLIT + "{{ system }}{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% else %}{{ '<｜Assistant｜>' + CONTENT + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜>PROMPT' }}{% endif %}"
)
DEEPSEEK_V3 = _DEEPSEEK_TURNS.replace("CONTENT", "message['content']").replace("PROMPT", "")
# Opens a block of reasoning when it generates, and leaves the block out of the conversation.
DEEPSEEK_R1 = _DEEPSEEK_TURNS.replace("CONTENT", "message['content'].split('</think>')[-1]").replace(
    "PROMPT", "<think>\\n"
)

SMOLLM2 = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are SmolLM.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_TAGGED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}BODY"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TAGGED_WITH_END = _TAGGED.replace("BODY", "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}")
TAGGED_WITHOUT_END = _TAGGED.replace(
    "BODY", "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' }}"
)
TAGGED_WITH_NEWLINE = _TAGGED.replace(
    "BODY", "{% generation %}{{ message['content'] + '<|im_end|>\n' }}{% endgeneration %}"
)


class Family(NamedTuple):
    """A template, and the special tokens of the tokenizers it goes with."""

    template: str
    bos: str | None
    eos: str
    special: tuple[str, ...] = ()


_LLAMA3_SPECIAL = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_GEMMA_SPECIAL = ("<start_of_turn>", "<end_of_turn>")
_DEEPSEEK_SPECIAL = ("<｜User｜>", "<｜Assistant｜>")
_DEEPSEEK_ENDS = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")

FAMILIES = {
    "chatml": Family(CHATML, None, "<|im_end|>"),
    "llama-2": Family(LLAMA2, "<s>", "</s>"),
    "llama-3": Family(LLAMA3, "<|begin_of_text|>", "<|eot_id|>", _LLAMA3_SPECIAL),
    "llama-3-always": Family(LLAMA3_ALWAYS, "<|begin_of_text|>", "<|end_of_text|>", _LLAMA3_SPECIAL),
    "llama-3-dated": Family(LLAMA3_DATED, "<|begin_of_text|>", "<|eot_id|>", _LLAMA3_SPECIAL),
    "mistral": Family(MISTRAL, "<s>", "</s>"),
    "mistral-v3": Family(MISTRAL_V3, "<s>", "</s>", ("[INST]", "[/INST]")),
    "gemma": Family(GEMMA, "<bos>", "<eos>", _GEMMA_SPECIAL),
    "gemma-3": Family(GEMMA3, "<bos>", "<eos>", _GEMMA_SPECIAL),
    "phi-3": Family(PHI3, "<s>", "<|endoftext|>", ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "qwen-2.5": Family(QWEN25, None, "<|im_end|>", ("<|endoftext|>",)),
    "qwen-3": Family(QWEN3, None, "<|im_end|>", ("<|endoftext|>",)),
    "zephyr": Family(ZEPHYR, "<s>", "</s>"),
    "deepseek-v2": Family(DEEPSEEK_V2, *_DEEPSEEK_ENDS),
    "deepseek-v3": Family(DEEPSEEK_V3, *_DEEPSEEK_ENDS, _DEEPSEEK_SPECIAL),
    "deepseek-r1": Family(DEEPSEEK_R1, *_DEEPSEEK_ENDS, _DEEPSEEK_SPECIAL),
    "smollm2": Family(SMOLLM2, "<|im_start|>", "<|im_end|>", ("<|endoftext|>",)),
    "tagged, with end": Family(TAGGED_WITH_END, None, "<|im_end|>"),
    "tagged, without end": Family(TAGGED_WITHOUT_END, None, "<|im_end|>"),
    "tagged, with newline": Family(TAGGED_WITH_NEWLINE, None, "<|im_end|>"),
}


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A small tokenizer with a family's template and special tokens."""
    family = FAMILIES[name]
    ends = tuple(token for token in (family.bos, family.eos) if token)
    tokenizer = tiny_tokenizer(family.template, extra_special=(*family.special, *ends))
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    return tokenizer
