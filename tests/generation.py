"""Text of models, for tests of how it is drawn."""

from __future__ import annotations

import contextlib
import io

import torch
from transformers import GenerationConfig

from megatron_bit.inference.hf import configuration_bitlm as hf_configuration
from megatron_bit.inference.hf import modeling_bitlm as hf_modeling

STEPS = 5


def run_card(folder):
    """What the code of a converted folder's README.md prints, run beside the folder as it stands there."""
    (code,) = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]
    with contextlib.chdir(folder.parent), contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code.split("```")[0], {})
    return out.getvalue().strip()


def tokens(seed, length):
    return torch.randint(2, 421, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def generate(generator, prompts, count, **more):
    """New ids of rows with prompts of any lengths, padded on the left with an id that would matter if it were read."""
    width = max(map(len, prompts))
    ids = torch.tensor([[77] * (width - len(p)) + p for p in prompts], dtype=torch.int64).view(len(prompts), width)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]).view(len(prompts), width)
    options = {"steps": STEPS, "seed": 9, "eos_token_id": [], **more}
    options = {key: value for key, value in options.items() if value is not None}
    return generator.model.generate(ids, attention_mask=mask, max_new_tokens=count, **options)[:, width:].tolist()


def chain_of(seed, **settings):
    """A chain of random weights large enough that draws depend on the values before them."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 1}
    head = {"head_kind": "chain", "head_hidden_size": 24, "head_intermediate_size": 32, "head_num_attention_heads": 2}
    given = {**sizes, **head, "max_position_embeddings": 24, "condition_drop": 0.5, "initializer_range": 0.3}
    model = hf_modeling.BitLMForCausalLM(hf_configuration.BitLMConfig(**{**given, **settings})).eval()
    model.generation_config = GenerationConfig(
        **({"pad_token_id": 0, "eos_token_id": 0} if settings["vocab_size"] else {})
    )
    return model
