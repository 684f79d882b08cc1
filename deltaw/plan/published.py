"""The page of published figures, each computed here from shapes, with the assumption that makes it so.

`deltaw plan --published docs/published_figures.md` writes it; a test compares it with what stands in the repository.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from deltaw.core.config import LoraConfig
from deltaw.plan import counts
from deltaw.plan.config import PlanConfig
from deltaw.plan.devices import find_device
from deltaw.plan.forecast import Forecast, Setting
from deltaw.plan.shapes import read_shapes
from deltaw.plan.table import size

COMMAND = "deltaw plan --published docs/published_figures.md"
_HEAD = f"""# Published figures, planned

Written by `{COMMAND}`. Every figure in the column "planned" is computed from shapes by the code that
plans your runs; no weight is loaded. GB and TB are decimal. "Follows" says whether the published figure comes out under
the stated assumption (within 5 % where it is exact arithmetic, within 25 % where it is a measured total).
"""


class Row(NamedTuple):
    """One published figure."""

    what: str
    published: str
    planned: str
    follows: str
    why: str


def page() -> str:
    """The page, in Markdown."""
    sections = (("GPT-3 175B (LoRA paper, section 4.2 and footnote 4)", gpt3()),
                ("LLaMA and QLoRA", qlora()),
                ("Trained parameters of the LoRA paper's tables", tables()))
    text = _HEAD
    for title, rows in sections:
        text += f"\n## {title}\n\n| figure | published | planned | follows | assumption, or why not |\n"
        text += "|---|---|---|---|---|\n"
        text += "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return text


def setting(model: str, lora: LoraConfig, **options: object) -> Setting:
    """A published shape in 16 bits on a card."""
    task = "seq-cls" if model.startswith(("roberta", "deberta")) else "causal-lm"
    config = PlanConfig(**{"model": model, "task": task, "lora": lora, "device": "a100-80gb", **options})  # type: ignore[arg-type]
    return Setting(config, read_shapes(model, task=task), find_device(config.device), "bfloat16", None)


def gpt3() -> Iterator[Row]:
    """Memory, checkpoints and a hundred tasks."""
    lora = LoraConfig(r=4, target_modules=("c_attn",), target_slices={"c_attn": "q-v"})
    base = setting("gpt3-175b", lora)
    values, trained = base.network.values, Forecast(base, "lora").trained(4)
    frozen, whole = 2 * values, (2 + 2 + 2) * values
    yield Row("training memory, full fine-tuning", "1.2 TB", size(whole), judge(1.2e12, whole),
              "weights and both Adam moments in 16 bits, nothing else: the paper's \"up to 2/3\" is the share of the "
              f"moments. With gradients it is {size(8 * values)}; with float32 moments and master weights, the usual "
              f"mixed precision, {size(16 * values)}: 1.2 TB is 6.9 bytes a parameter and comes out of no whole recipe")
    yield Row("training memory, LoRA", "350 GB", size(frozen), judge(350e9, frozen),
              f"the frozen weights in 16 bits; adapter, gradients and moments ({size(16 * trained)}) and all "
              "activations are left out")
    yield Row("checkpoint, full", "350 GB", size(frozen), judge(350e9, frozen), "16 bits a parameter")
    yield Row("checkpoint, r=4 on q and v", "35 MB", size(2 * trained), judge(35 * 2**20, 2 * trained),
              f"{trained:,} values in 16 bits: {2 * trained / 2**20:.1f} MiB, with MB of 2^20 bytes. 35 MB is rounded "
              f"from 350 GB / 10,000; deltaw and PEFT keep float32, {size(4 * trained)}")
    yield Row("100 tasks, LoRA", "354 GB", size(frozen + 100 * 2 * trained), judge(354e9, frozen + 200 * trained),
              "one base and 100 adapters in 16 bits")
    yield Row("100 tasks, full", "35 TB", size(100 * frozen), judge(35e12, 100 * frozen), "100 copies in 16 bits")


_QLORA = (("llama-7b", 6.9), ("llama-13b", 11.3), ("llama-33b", 24.7), ("llama-65b", 45.0))


def qlora() -> Iterator[Row]:
    """LLaMA's adapters, and the totals of the QLoRA paper."""
    q_v = LoraConfig(r=8, target_modules=("q_proj", "v_proj"))
    small = Forecast(setting("llama-7b", q_v), "lora").trained(8)
    yield Row("LLaMA-7B adapter, r=8 on q and v", "8 MB", size(2 * small), judge(8e6, 2 * small),
              f"{small:,} values in 16 bits: {2 * small / 2**20:.1f} MiB; in float32 twice that")
    wide = LoraConfig(r=64, lora_alpha=16)
    options = {"batch_size": 1, "max_length": 512, "gradient_checkpointing": "layer", "optimizer": "adamw8bit"}
    for model, published in _QLORA:
        base = setting(model, wide, **options)
        forecast = Forecast(base, "qlora")
        memory = forecast.peak("train")
        parts = memory.parts
        yield Row(f"QLoRA, {model.replace('llama', 'LLaMA').replace('b', 'B')}, total", f"{published} GB",
                  size(memory.total), judge(published * 1e9, memory.total, 0.25),
                  f"NF4 with double quantization (4.127 bits) for linear layers, embeddings in 16 bits: "
                  f"{size(parts['weights'])}, one layer's buffer included; r=64 on all linear layers in float32 with "
                  "8-bit moments; 1 x 512 tokens, layers recomputed")
    base = setting("llama-7b", wide, **options)
    packed = Forecast(base, "qlora").peak("load").parts["weights"]
    yield Row("QLoRA, LLaMA-7B, 4-bit base", "5,048 MB", size(packed), judge(5048e6, packed),
              f"4.127 bits a weight of a linear layer, 16 bits an embedding. The published figure is "
              f"{5048e6 * 8 / base.network.values:.1f} bits a parameter, which NF4 does not explain: with both "
              f"embeddings in float32 it is {size(packed + 2 * 2 * 32000 * 4096)}")
    wide_count = Forecast(base, "qlora").trained(64)
    yield Row("QLoRA, LLaMA-7B, adapter", "26 MB", size(2 * wide_count), judge(26e6, 2 * wide_count),
              f"{wide_count:,} values in 16 bits. The paper counts 0.2 % of the base, which is about r=5 on all linear "
              "layers, and not the r=64 that it trains with")
    memory = Forecast(base, "qlora").peak("train")
    yield Row("\"7B on a single GPU with 14 GB\"", "under 14 GB", size(memory.total),
              "yes" if memory.total < 14e9 else "no",
              "the same run; and so does r=8 on q and v with 4 x 512 tokens: "
              + size(Forecast(setting("llama-7b", q_v, **{**options, "batch_size": 4}), "qlora").peak("train").total))


_Q_V_BERT = ["query", "value"]


def tables() -> Iterator[Row]:
    """Counts of tables 2, 3 and 4, and of section 1's appendix D."""
    for name, r, published, why in (
            ("roberta-base", 8, 0.3e6, "r=8 on q and v, without the head"),
            ("roberta-large", 8, 0.8e6, "r=8 on q and v, without the head"),
            ("deberta-v2-xxlarge", 8, 4.7e6, "r=8 on q and v, as table 10 says: half of it. The count is that of r=16, "
                                             "which the published scripts use")):
        names = ["query_proj", "value_proj"] if name.startswith("deberta") else _Q_V_BERT
        base = setting(name, LoraConfig(r=r, target_modules=tuple(names)))
        count = Forecast(base, "lora").trained(r) - base.network.head
        yield row_of(f"{name}, LoRA", published, count, why)
    twice = setting("deberta-v2-xxlarge", LoraConfig(r=16, target_modules=("query_proj", "value_proj")))
    count = Forecast(twice, "lora").trained(16) - twice.network.head
    yield row_of("deberta-v2-xxlarge, LoRA", 4.7e6, count, "r=16 on q and v")
    for name, published in (("gpt2-medium", 0.35e6), ("gpt2-large", 0.77e6)):
        base = setting(name, LoraConfig(r=4, target_modules=("c_attn",), target_slices={"c_attn": "q-v"}))
        yield row_of(f"{name}, LoRA", published, Forecast(base, "lora").trained(4),
                     f"r=4 on q and v. The published figure is 0.1 % of the base ({base.network.values / 1e9:.3f} G)")
    for name, m, published in (("gpt2-medium", 6, 0.37e6), ("gpt2-medium", 224, 11.09e6), ("gpt2-large", 8, 0.88e6),
                               ("gpt2-large", 248, 23.0e6)):
        yield row_of(f"{name}, AdapterL", published, counts.lin(dims(name), m),
                     f"bottleneck {m}, which the paper does not state, biases and one LayerNorm a layer")
    for m, published in ((8, 0.8e6), (64, 6.0e6)):
        yield row_of("roberta-large, AdapterH", published, counts.houlsby(dims("roberta-large"), m),
                     f"bottleneck {m}, with biases; LayerNorms not counted")
    for m, published in ((16, 0.8e6), (64, 3.0e6)):
        yield row_of("roberta-large, AdapterP", published, counts.pfeiffer(dims("roberta-large"), m), f"bottleneck {m}")
    yield from _gpt3_counts()


def _gpt3_counts() -> Iterator[Row]:
    """Table 4."""
    gpt3 = dims("gpt3-175b")
    base = setting("gpt3-175b", LoraConfig(r=1, target_modules=("c_attn",), target_slices={"c_attn": "q-v"}))
    whole = base.network
    yield row_of("gpt3-175b, full", 175_255.8e6, whole.values, "laid out as GPT-2 with a tied head; an untied head "
                 f"gives {whole.values + 50257 * 12288:,}")
    yield row_of("gpt3-175b, BitFit", 14.2e6, whole.biases, f"11 biases of width d in each layer and one at the end; "
                 f"12·L·d = {12 * gpt3.layers * gpt3.width:,} would be the published figure")
    yield row_of("gpt3-175b, PreEmbed", 3.2e6, counts.prompt(gpt3, 256 + 8), "256 tokens before the prompt and 8 after")
    yield row_of("gpt3-175b, PreLayer", 20.2e6, counts.prelayer(gpt3, 8 + 8), "8 and 8 tokens by the paper's formula "
                 "L·d·n; the published figure has 17.1 of them")
    for m, published in ((1, 7.1e6), (8, 40.1e6)):
        yield row_of("gpt3-175b, AdapterH", published, counts.houlsby(gpt3, m), f"bottleneck {m}, with biases")
    for r, published in ((1, 4.7e6), (8, 37.7e6)):
        yield row_of("gpt3-175b, LoRA", published, Forecast(base, "lora").trained(r), f"r={r} on q and v"
                     + (". Appendix D.4 says \"all four, r=2\" for 37.7M; that has 18.9M" if r == 8 else ""))


def dims(model: str) -> counts.Dimensions:
    """A published shape's dimensions."""
    return counts.Dimensions.of(read_shapes(model).config)


def row_of(what: str, published: float, count: int, why: str) -> Row:
    """A row of counts."""
    return Row(what, f"{published / 1e6:,.6g}M", f"{count:,}", judge(published, count), why)


def judge(published: float, planned: float, near: float = 0.05) -> str:
    """Whether the published figure comes out."""
    off = planned / published - 1
    return "yes" if abs(off) <= near else f"no ({off:+.0%})"


__all__ = ["COMMAND", "page"]
