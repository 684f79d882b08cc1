"""The numbers of trained parameters that the LoRA paper prints, counted on the methods themselves, without weights.

Where the printed number does not follow from the paper's own formulas, the exact one stands here with a word on it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from deltaw.baselines import METHODS, BaselineConfig
from deltaw.core import LoraConfig

M, L = {"n_embd": 1024, "n_layer": 24, "n_head": 16}, {"n_embd": 1280, "n_layer": 36, "n_head": 20}
GPT3 = {"n_embd": 12288, "n_layer": 96, "n_head": 96, "n_positions": 2048}
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
XXL = {"hidden_size": 1536, "num_hidden_layers": 48, "num_attention_heads": 24, "intermediate_size": 6144,
       "vocab_size": 128100, "type_vocab_size": 0, "relative_attention": True, "position_buckets": 256,
       "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
       "position_biased_input": False, "conv_kernel_size": 3, "conv_act": "gelu"}


@cache
def model(name: str) -> Any:
    import transformers as t

    with torch.device("meta"):
        match name:
            case "gpt2-m" | "gpt2-l" | "gpt3":
                return t.GPT2LMHeadModel(t.GPT2Config(**{"gpt2-m": M, "gpt2-l": L, "gpt3": GPT3}[name]))
            case "roberta-base" | "roberta-large":
                shape = BASE if name == "roberta-base" else LARGE
                return t.RobertaForSequenceClassification(t.RobertaConfig(**ROBERTA, **shape))
            case _:
                return t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**XXL))


def count(name: str, method: str, lora: LoraConfig | None = None, **options: Any) -> int:
    tuned = METHODS[method](model(name), BaselineConfig(**options), lora=lora)
    number = tuned.count(head=False)
    tuned.remove()
    return number


def attention(r: int, which: str, *names: str) -> LoraConfig:
    """LoRA on parts of GPT-2's fused q, k, v ("q-v"), or on modules of these names."""
    if names:
        return LoraConfig(r=r, target_modules=names)
    return LoraConfig(r=r, target_modules=["c_attn"], target_slices={"c_attn": which})


GPT2_ROWS = [  # Table 3
    ("gpt2-m", "full", {}, 354_823_168, "354.92M; 0.1M less"),
    ("gpt2-m", "adapter-l", {"bottleneck": 6}, 368_784, "0.37M"),
    ("gpt2-m", "adapter-l", {"bottleneck": 224}, 11_089_152, "11.09M"),
    ("gpt2-m", "adapter-h", {"bottleneck": 112}, 11_064_576, "11.09M, which no r gives: 111 and 113 are further off"),
    ("gpt2-m", "ft-top-k", {"top_layers": 2}, 25_192_448, "25.19M"),
    ("gpt2-m", "prelayer", {"prefix_tokens": 14}, 344_064, "0.35M; 14.4 tokens' worth, so one of many settings"),
    ("gpt2-l", "full", {}, 774_030_080, "774.03M"),
    ("gpt2-l", "adapter-l", {"bottleneck": 8}, 875_808, "0.88M"),
    ("gpt2-l", "adapter-l", {"bottleneck": 248}, 23_002_848, "23.00M"),
    ("gpt2-l", "prelayer", {"prefix_tokens": 16, "infix_tokens": 1}, 783_360, "0.77M; 16.7 tokens' worth"),
]
GLUE_ROWS = [  # Table 2, heads left out
    ("roberta-base", "full", {}, 124_055_040, "125.0M, with the head"),
    ("roberta-base", "bitfit", {}, 102_144, "0.1M"),
    ("roberta-base", "adapter-p", {"bottleneck": 16}, 304_320, "0.3M, AdptD with no layer dropped"),
    ("roberta-base", "adapter-p", {"bottleneck": 48}, 894_528, "0.9M, AdptD with no layer dropped"),
    ("roberta-base", "adapter-d", {"bottleneck": 48, "drop_layers": 5}, 521_808, "7 of 12 layers"),
    ("roberta-large", "full", {}, 354_310_144, "355.0M, with the head"),
    ("roberta-large", "adapter-p", {"bottleneck": 64}, 3_171_840, "3.0M"),
    ("roberta-large", "adapter-p", {"bottleneck": 16}, 811_392, "0.8M"),
    ("roberta-large", "adapter-h", {"bottleneck": 64}, 6_343_680, "6.0M"),
    ("roberta-large", "adapter-h", {"bottleneck": 8}, 835_968, "0.8M"),
]
GPT3_ROWS = [  # Tables 4 and 15
    ("gpt3", "full", {}, 174_604_259_328, "175,255.8M: the formula of GPT-2's architecture gives 0.4 % less"),
    ("gpt3", "bitfit", {}, 12_988_416, "14.2M: as many as 12·d a layer, where there are 11·d of biases"),
    ("gpt3", "preembed", {"prefix_tokens": 32, "infix_tokens": 8}, 491_520, "0.4M, which d·(l_p + l_i) rounds to 0.5M"),
    ("gpt3", "preembed", {"prefix_tokens": 64, "infix_tokens": 8}, 884_736, "0.9M"),
    ("gpt3", "preembed", {"prefix_tokens": 128, "infix_tokens": 8}, 1_671_168, "1.7M"),
    ("gpt3", "preembed", {"prefix_tokens": 256, "infix_tokens": 8}, 3_244_032, "3.2M"),
    ("gpt3", "preembed", {"prefix_tokens": 512, "infix_tokens": 8}, 6_389_760, "6.4M"),
    ("gpt3", "prelayer", {"prefix_tokens": 2, "infix_tokens": 2}, 4_718_592, "5.1M: L·d·(l_p + l_i) is 7 % less"),
    ("gpt3", "prelayer", {"prefix_tokens": 8, "infix_tokens": 0}, 9_437_184, "10.1M: 7 % less"),
    ("gpt3", "prelayer", {"prefix_tokens": 8, "infix_tokens": 8}, 18_874_368, "20.2M: 7 % less"),
    ("gpt3", "prelayer", {"prefix_tokens": 32, "infix_tokens": 4}, 42_467_328, "44.1M: 4 % less"),
    ("gpt3", "prelayer", {"prefix_tokens": 64, "infix_tokens": 0}, 75_497_472, "76.1M: 1 % less"),
    ("gpt3", "adapter-h", {"bottleneck": 1}, 7_078_080, "7.1M"),
    ("gpt3", "adapter-h", {"bottleneck": 4}, 21_234_432, "21.2M"),
    ("gpt3", "adapter-h", {"bottleneck": 8}, 40_109_568, "40.1M"),
    ("gpt3", "adapter-h", {"bottleneck": 16}, 77_859_840, "77.9M"),
    ("gpt3", "adapter-h", {"bottleneck": 64}, 304_361_472, "304.4M"),
]


@pytest.mark.parametrize(("name", "method", "options", "expected", "printed"), GPT2_ROWS + GLUE_ROWS + GPT3_ROWS)
def test_the_papers_rows(name: str, method: str, options: dict[str, Any], expected: int, printed: str) -> None:
    assert count(name, method, **options) == expected, f"the paper prints {printed}"


LORA_ROWS = [
    ("gpt2-m", attention(4, "q-v"), 393_216, "0.35M, which is 0.1 % of the model; the released file has 393,216"),
    ("gpt2-l", attention(4, "q-v"), 737_280, "0.77M, which is 0.1 % of the model"),
    ("roberta-base", attention(8, "", "query", "value"), 294_912, "0.3M"),
    ("roberta-large", attention(8, "", "query", "value"), 786_432, "0.8M"),
    ("deberta-xxl", attention(16, "", "query_proj", "value_proj"), 4_718_592, "4.7M, which fits r = 16 and not the 8 "
     "of Table 10"),
    ("gpt3", attention(1, "q-v"), 4_718_592, "4.7M"),
    ("gpt3", attention(2, "--v"), 4_718_592, "4.7M"),
    ("gpt3", attention(2, "q-v"), 9_437_184, "9.4M"),
    ("gpt3", attention(4, "q-v"), 18_874_368, "18.8M, cut and not rounded; 18M in Table 5"),
    ("gpt3", attention(8, "q-v"), 37_748_736, "37.7M"),
    ("gpt3", attention(64, "q-v"), 301_989_888, "301.9M, cut and not rounded"),
    ("gpt3", attention(8, "q--"), 18_874_368, "18M, Table 5"),
    ("gpt3", attention(8, "-k-"), 18_874_368, "18M, Table 5"),
    ("gpt3", attention(8, "--v"), 18_874_368, "18M, Table 5"),
    ("gpt3", LoraConfig(r=8, target_modules=r".*\.attn\.c_proj"), 18_874_368, "18M, Table 5: Wo"),
    ("gpt3", attention(4, "qk-"), 18_874_368, "18M, Table 5"),
]


@pytest.mark.parametrize(("name", "lora", "expected", "printed"), LORA_ROWS)
def test_the_papers_rows_of_lora(name: str, lora: LoraConfig, expected: int, printed: str) -> None:
    assert count(name, "lora", lora) == expected, f"the paper prints {printed}"


def test_lora_on_all_four_matrices_of_gpt3() -> None:
    """Tables 4, 5 and 15: 9.4M, 18.8M (18M in Table 5), 37.7M and 603.8M, which is 604.0M.

    Appendix D.4 says r = 2 for 37.7M, which is r = 4.
    """
    for r, expected in ((1, 9_437_184), (2, 18_874_368), (4, 37_748_736), (64, 603_979_776)):
        lora = LoraConfig(r=r, target_modules=r".*\.attn\.c_(attn|proj)", target_slices={"c_attn": "qkv"})
        assert count("gpt3", "lora", lora) == expected


def test_lora_with_trained_tokens_adds_up() -> None:
    """Table 15: l_p = 8, l_i = 4 beside r_q = r_v = 8, 32 and 64; 37.8M, 151.1M and 302.1M with PreEmbed.

    52.8M is printed with PreLayer at r = 8, for 51.9M here: more than L·d·(l_p + l_i), as in PreLayer's own rows.
    """
    tokens = {"prefix_tokens": 8, "infix_tokens": 4}
    assert count("gpt3", "lora+pe", attention(8, "q-v"), **tokens) == 37_748_736 + 12 * 12288 == 37_896_192
    assert count("gpt3", "lora+pe", attention(32, "q-v"), **tokens) == 151_142_400
    assert count("gpt3", "lora+pe", attention(64, "q-v"), **tokens) == 302_137_344
    assert count("gpt3", "lora+pl", attention(8, "q-v"), **tokens) == 37_748_736 + 96 * 12 * 12288 == 51_904_512


def test_deberta_xxl_is_the_sum_of_its_parts() -> None:
    """Table 2 prints 1500.0M for 1,564.5M: the number of the published model is said as 1.5B."""
    d, f, layers, vocabulary, buckets, kernel = 1536, 6144, 48, 128_100, 256, 3
    norm, square = 2 * d, d * d + d
    layer = 4 * square + norm + (d * f + f) + (f * d + d) + norm  # q, k, v, output; positions share q's and k's
    embeddings = vocabulary * d + norm  # no positions of words, no types
    encoder = layers * layer + 2 * buckets * d + norm + kernel * d * d + d + norm  # distances, convolution
    assert count("deberta-xxl", "full") == embeddings + encoder == 1_564_549_632


@pytest.mark.parametrize(("method", "options", "norms"), [("adapter-h", {"bottleneck": 8}, 2 * 24)])
def test_norms_are_counted_where_they_are_trained(method: str, options: dict[str, Any], norms: int) -> None:
    """|Θ| = L̂_adpt·(2dr + r + d) + 2·L̂_LN·d (Hu et al., section 5.1)."""
    without = count("roberta-large", method, **options)
    assert count("roberta-large", method, train_norms=True, **options) - without == 2 * norms * 1024
