"""Text from a model: prompts in its chat template, sampling, and pieces as they are written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from deltaw.errors import ConfigError, Fault
from deltaw.train.beams import Beams

if TYPE_CHECKING:
    from deltaw.bases import Base

Turn = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Sampling(Beams):
    """How an answer is searched for, and how the next token is chosen."""

    max_new_tokens: int = 256
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time; above, tokens are drawn, and higher is more varied."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw among this many of the likeliest tokens; 0 for all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that occurred are made less likely."""
    seed: int = 0
    """Seed of the draws."""

    def faults(self) -> list[Fault]:
        """What is wrong with the options."""
        ranges = [("max_new_tokens", self.max_new_tokens >= 1, "a whole number >= 1"),
                  ("temperature", 0 <= self.temperature < 100, "0 <= temperature < 100"),
                  ("top_p", 0 < self.top_p <= 1, "0 < p <= 1"), ("top_k", self.top_k >= 0, "a whole number >= 0"),
                  ("repetition_penalty", 0 < self.repetition_penalty < 100, "a number above 0"),
                  ("seed", self.seed >= 0, "a whole number >= 0")]
        return [*super().faults(), *(Fault(f"Sampling.{name}", f"got {getattr(self, name)}", expected)
                                                   for name, right, expected in ranges if not right)]


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes answers with a base as it is: with whatever adapter is on."""

    base: Base
    sampling: Sampling

    def template_tokens(self, turns: Sequence[Turn]) -> list[int]:
        """A conversation in the base's chat template, up to where the assistant's next turn starts."""
        from deltaw import bases

        return self._tokens(bases.render(self.base.tokenizer, turns, True), special=False)

    def plain_tokens(self, text: str) -> list[int]:
        """A text as it is, with the start token where the tokenizer adds one."""
        tokenizer: Any = self.base.tokenizer
        ids = self._tokens(text, special=True)
        while ids and ids[-1] == tokenizer.eos_token_id:  # some tokenizers add it, and nothing would follow it
            ids.pop()
        return ids

    def write(self, prompt: Sequence[int], on_text: Callable[[str], None] | None = None) -> list[int]:
        """The tokens that follow, without the one that ends them; `on_text` gets each piece of text as it is written.

        Raises ConfigError for a prompt that is empty or leaves no room for an answer.
        """
        import torch
        from transformers import GenerationConfig

        from deltaw.bases import stop_tokens, turn_end
        from deltaw.bases.quiet import quiet_transformers
        from deltaw.train.decoding import device_of, no_repeats

        room = self.room(len(prompt))
        model: Any = self.base.model
        chosen, ends = self.sampling, sorted(stop_tokens(model, self.base.tokenizer, [turn_end(self.base.tokenizer)]))
        ids = torch.tensor([list(prompt)], device=device_of(model))
        with torch.random.fork_rng(), torch.no_grad(), quiet_transformers():
            torch.manual_seed(chosen.seed)
            # Every option is named: one that is not would be taken from the model's own generation_config.json.
            config = GenerationConfig(
                do_sample=chosen.temperature > 0, temperature=chosen.temperature or 1.0, top_p=chosen.top_p,
                top_k=chosen.top_k, repetition_penalty=chosen.repetition_penalty, max_new_tokens=room,
                num_beams=chosen.num_beams, length_penalty=chosen.length_penalty,
                eos_token_id=ends or None, pad_token_id=self.base.tokenizer.pad_token_id or 0, use_cache=True)
            streams = on_text is not None and chosen.num_beams == 1  # which beam is the answer shows at its end only
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config,
                                    logits_processor=no_repeats(chosen.no_repeat_ngram_size, len(prompt)),
                                    streamer=_streamer(self.base.tokenizer, on_text) if on_text and streams else None)
        written: list[int] = output[0, len(prompt):].tolist()
        written = written[:-1] if written and written[-1] in ends else written
        if on_text is not None and not streams:
            on_text(self.text(written))
        return written

    def room(self, length: int) -> int:
        """How many tokens may follow a prompt of this length."""
        limit = self.base.max_positions
        room = self.sampling.max_new_tokens if limit is None else min(self.sampling.max_new_tokens, limit - length)
        if length == 0:
            raise ConfigError(Fault("prompt", "is empty", "some text"))
        if room < 1:
            raise ConfigError(Fault("prompt", f"has {length} tokens", f"fewer than {limit}, the longest sequence that "
                                    "the model takes", "Shorten it"))
        return room

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        from deltaw.train.decoding import decode

        return decode(self.base.tokenizer, tokens).strip()

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        return list(self.base.tokenizer(text, add_special_tokens=special)["input_ids"])


def prompt_tokens(writer: Writer, text: str, *, template: Literal["auto", "chat", "none"], shape: str | None,
                  system: str | None) -> list[int]:
    """A prompt as the adapter knows it: in the chat template, or plain where its rows were texts or there is none."""
    has_template = bool(writer.base.tokenizer.chat_template)
    plain = template == "none" or (template == "auto" and (shape == "text" or not has_template))
    if plain:
        if system:
            raise ConfigError(Fault("--system", "is given for a plain prompt", "a chat template"))
        # Rows of instructions without a template are joined to their answers by an empty line.
        return writer.plain_tokens(f"{text}\n\n" if shape == "instruction" else text)
    turns = [{"role": "system", "content": system}] if system else []
    return writer.template_tokens([*turns, {"role": "user", "content": text}])


def _streamer(tokenizer: Any, on_text: Callable[[str], None]) -> Any:
    from transformers import TextStreamer

    class Pieces(TextStreamer):  # type: ignore[misc]  # transformers is not followed by the type checker
        """Gives each finished piece of text to `on_text`."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            """Pass a piece on."""
            if text:
                on_text(text)

    return Pieces(tokenizer, skip_prompt=True, skip_special_tokens=True)
