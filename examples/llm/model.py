"""A random language model, made on the spot: its times, batches and caches are real, what it says is noise.

Each byte is a token. Answers are printable ASCII and never end before their limit, so that text and tokens are the same
thing: what an engine makes of a text is what made it.
"""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

MOST_TOKENS = 32_768
"""Of a prompt and its answer."""
_VOCABULARY = 512
_MARKS = {"bos_token": "<s>", "eos_token": "</s>"}
_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "


def make_model(folder: Path, *, hidden: int = 512, layers: int = 8, exact: bool = False, seed: int = 0) -> None:
    """Save a Llama of this size; 512 and 8 are 25 million parameters.

    `exact` is with 32 bits a number instead of 16: what is computed in another batch is the same to six digits.
    """
    import torch  # noqa: PLC0415 - half a second that only this takes

    tokenizer = _tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(hidden // 64, 1),
        num_key_value_heads=max(hidden // 128, 1),
        max_position_embeddings=MOST_TOKENS,
        bos_token_id=256,
        eos_token_id=257,
        tie_word_embeddings=False,
        initializer_range=0.06,
    )
    model = LlamaForCausalLM(config)
    spoken = [tokenizer.convert_tokens_to_ids(char) for char in string.ascii_letters + string.digits + ",.;:!?-"]
    with torch.no_grad():
        silent = torch.ones(_VOCABULARY, dtype=torch.bool)
        silent[spoken] = False
        model.lm_head.weight[silent] = 0.0
    model.to(torch.float32 if exact else torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokens.add_special_tokens([*_MARKS.values()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokens, model_max_length=MOST_TOKENS, **_MARKS)
    fast.chat_template = _TEMPLATE
    return fast
