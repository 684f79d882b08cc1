"""PEFT's config for the two methods that both have: prompt tuning and prefix tuning, each one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaw.baselines.tuned import Baseline

PROMPT = "prompt_embeddings"
"""PEFT's name for the tensor."""


def peft_config(tuned: Baseline) -> dict[str, Any] | None:
    """The content of adapter_config.json, or None for what PEFT has no file for.

    PEFT's prompts stand before the tokens only, and it keeps a classifier's head in a form of its own.
    """
    from deltaw.baselines.past import Past
    from deltaw.baselines.virtual import VirtualTokens

    if len(tuned.parts) != 1 or tuned.recipe.config.infix_tokens:
        return None
    part = tuned.parts[0]
    if isinstance(part, VirtualTokens) and part.kind == "preembed":
        own: dict[str, Any] = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM",
                               "token_dim": part.stack.width,
                               "num_attention_heads": part.stack.config.num_attention_heads}
    elif isinstance(part, Past):
        width = part.heads * part.head_width
        own = {"peft_type": "PREFIX_TUNING", "prefix_projection": False, "token_dim": width,
               "encoder_hidden_size": width, "num_attention_heads": part.heads}
    else:
        return None
    stack = part.stack
    return {**own, "task_type": "CAUSAL_LM" if stack.is_causal else None, "inference_mode": True,
            "num_virtual_tokens": tuned.recipe.config.prefix_tokens, "num_transformer_submodules": 1,
            "num_layers": len(stack.layers), "base_model_name_or_path": tuned.facts.get("base_model"),
            "revision": None}
