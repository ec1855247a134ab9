"""Chat templates in the shape of some families, and a small tokenizer that has their marks."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# {g} and {/g} stand where a template may mark what the assistant writes.
_FAMILIES = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{g}{{ message['content'] + '<|im_end|>' }}{/g}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{% if message['role'] == 'assistant' %}{g}{{ message['content'] | trim }}{{ '<|eot_id|>' }}{/g}"
        "{% else %}{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}{g}{{ message['content'] | trim }}"
        "{{ '<end_of_turn>' }}{/g}{{ '\n' }}"
        "{% else %}{{ '<start_of_turn>user\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    # The system message goes into the last user's turn.
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
        "{% set turns = messages[1:] %}{% else %}{% set turns = messages %}{% endif %}{% for message in turns %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('After the optional system message, roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{% if loop.last and system is defined %}"
        "{{ '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
        "{% else %}{{ '[INST] ' + message['content'] + '[/INST]' }}{% endif %}"
        "{% else %}{{ ' ' }}{g}{{ message['content'] + eos_token }}{/g}{% endif %}{% endfor %}"
    ),
    # Reasoning in earlier turns is dropped, and a system message of its own is written where there is none.
    "thinking": (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nThink first.<|im_end|>\n' }}{% endif %}"
        "{% for message in messages %}{% set said = message['content'] %}"
        "{% if message['role'] == 'assistant' and not loop.last and '</think>' in said %}"
        "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{g}{{ said + '<|im_end|>' }}{/g}"
        "{% else %}{{ said + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
}
FAMILIES = {name: text.replace("{g}", "").replace("{/g}", "") for name, text in _FAMILIES.items()}
MARKED = {
    name: text.replace("{g}", "{% generation %}").replace("{/g}", "{% endgeneration %}")
    for name, text in _FAMILIES.items()
}
BOS = {"chatml": None, "llama3": "<|begin_of_text|>", "gemma": "<bos>", "mistral": "<s>", "thinking": None}
EOS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<eos>", "mistral": "</s>", "thinking": "<|im_end|>"}
_MARKS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]"),
)
_TEXTS = (
    "The patient asked the doctor about a fever and a dose of insulin. ",
    "Be brief and kind. user model assistant",
)


def chat_tokenizer(family: str, *, metaspace: bool = False, template: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer of some 350 tokens with a family's BOS and EOS; byte-level BPE, or BPE with a mark for spaces."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=metaspace, unk_token="<|endoftext|>" if metaspace else None))
    if metaspace:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
        alphabet = sorted({*"".join(_TEXTS), *"é?!.\n▁abcdefghijklmnopqrstuvwxyzWSOH</>"})
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=list(_MARKS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    names: dict[str, Any] = {"bos_token": BOS[family]} if BOS[family] else {}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS[family], **names)
    fast.add_special_tokens({"additional_special_tokens": list(_MARKS)})
    if template:
        fast.chat_template = FAMILIES[family]
    return fast
