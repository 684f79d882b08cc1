"""The table at the end of a run: before and after on held-out data, sizes, time, memory."""

from __future__ import annotations

from typing import Any

from deltaw.train.metrics import SHARES
from deltaw.train.result import TrainResult


def print_summary(result: TrainResult, console: Any = None) -> None:
    """Print the tables of a finished run, to stderr unless a rich console is given."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(stderr=True)
    figures = Table(title=f"held-out, {result.data.get('valid_rows', 0):,} rows", box=box.SIMPLE, title_justify="left")
    for column in ("", "before", "after"):
        figures.add_column(column, justify="left" if not column else "right")
    for name, before, after in figure_rows(result):
        figures.add_row(name, before, f"[bold]{after}[/bold]")
    console.print(figures)
    if result.answers:
        samples = Table(title="answers", box=box.SIMPLE, title_justify="left", show_lines=True)
        for column in ("prompt", "expected", "before", "after"):
            samples.add_column(column, overflow="fold")
        for answer in result.answers:
            samples.add_row(*(Text(shortened(text)) for text in (answer.prompt, answer.expected, answer.before,
                                                                 answer.after)))
        console.print(samples)
    facts = Table(box=None, show_header=False, padding=(0, 2))
    for name, value in cost_rows(result):
        facts.add_row(name, value)
    console.print(facts)


def figure_rows(result: TrainResult) -> list[tuple[str, str, str]]:
    """(name, before, after) of each held-out figure, as text."""
    return [(name, figure(name, result.before[name]) if name in result.before else "", figure(name, after))
            for name, after in result.after.items()]


def cost_rows(result: TrainResult) -> list[tuple[str, str]]:
    """What the run was and cost, as text."""
    share = result.trained_parameters / max(1, result.base_parameters)
    planned = f" of {result.planned_steps:,}" if result.steps < result.planned_steps else ""
    steps = f"{result.steps:,}{planned}"
    rows = [
        ("adapter", result.adapter),
        ("trained", f"{result.trained_parameters:,} parameters, {share:.2%} of the base's {result.base_parameters:,}"),
        ("size", size(result.adapter_bytes)),
        ("steps", steps + (f", the best at {result.best_step:,}" if result.best_step is not None else "")),
        ("time", f"{duration(result.train_seconds)} training, {duration(result.total_seconds)} in all"),
        ("speed", f"{result.tokens_per_second:,.0f} tokens/s"),
    ]
    if result.peak_memory:
        rows.append(("peak memory", size(result.peak_memory)))
    if result.plain_layers:
        rows.append(("not fused", "; ".join(f"{n} layers: {reason}" for reason, n in result.plain_layers.items())))
    return [*rows, ("base", f"{result.base}, {result.precision}")]


def figure(name: str, value: float) -> str:
    """A loss with four digits, a share in per cent."""
    return f"{value:.1%}" if name in SHARES else f"{value:.4f}"


def size(count: float) -> str:
    """Bytes in the largest unit that keeps a digit before the point."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def duration(seconds: float) -> str:
    """Seconds, or minutes and seconds, or hours and minutes."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shortened(text: str, longest: int = 300) -> str:
    """The text, with its middle left out where it is long."""
    text = text.strip()
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]} … {text[-half:]}"
