"""`saeffect`: the commands, and where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from saeffect.cli.check import check
from saeffect.cli.console import show, show_error, wait_for_peer_error, writing_to
from saeffect.cli.diff import diff
from saeffect.cli.export import export
from saeffect.cli.finetune import finetune
from saeffect.cli.gate import gate
from saeffect.cli.guard import guard
from saeffect.cli.help import Command, CommandGroup
from saeffect.cli.label import label
from saeffect.cli.plan import plan
from saeffect.cli.reproduce import reproduce
from saeffect.cli.run import STAGE_HELP, run, stage_command
from saeffect.cli.saes import convert_sae_command, saes
from saeffect.cli.serve import serve
from saeffect.cli.train_sae import harvest, train_sae
from saeffect.cli.verdicts import verdicts
from saeffect.cli.verify import verify
from saeffect.errors import SaeffectError
from saeffect.parallel import keep_freed_memory, limit_spinning, use_large_pages

__all__ = ["app", "main"]

_INTERRUPTED = 130  # the exit code after Ctrl-C

app = typer.Typer(
    name="saeffect",
    cls=CommandGroup,
    help="What did fine-tuning do to the features inside this language model, and is the difference real?",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
_COMMANDS: dict[str, tuple[tuple[str, Callable[..., None], str], ...]] = {
    "Compare models": (
        (
            "diff",
            diff,
            "Compare a model with its fine-tune, without a study file. The first findings come in minutes.",
        ),
        (
            "run",
            run,
            "Run a whole study; finished stages are skipped. Steering shared over processes:"
            " torchrun --nproc-per-node=N -m saeffect run ...",
        ),
        ("check", check, "Validate a study without computing anything."),
        ("plan", plan, "Predict a study's time, memory and disk. Rates are measured here; no weights are needed."),
        (
            "guard",
            guard,
            "Judge a fine-tune by a budget of what it may change. Exit code 0: kept, 1: broken, 2: wrong input.",
        ),
        (
            "reproduce",
            reproduce,
            "Recompute the figures of Gupta & Sica (2024). From their published files: paper, ours, verdict.",
        ),
    ),
    "Finished runs": (
        ("serve", serve, "Open a run directory in the browser: look, judge, try. Also while a study is running."),
        (
            "label",
            label,
            "Label features of a run by a language model. Each label is scored on contexts that it was not made from."
            " The endpoint: OPENAI_BASE_URL, SAEFFECT_LABEL_MODEL, OPENAI_API_KEY.",
        ),
        (
            "export",
            export,
            "Write features of a finished run for other programs. Steering vector (.safetensors), control vector for"
            " llama.cpp (.gguf), Neuronpedia-style list (.json), .csv.",
        ),
        ("verify", verify, "Recompute a finished run's numbers from its tables. Exit code 1 if one disagrees."),
    ),
    "SAEs and fine-tunes": (
        ("saes", saes, "List published SAEs by model, with the names to write. Nothing is fetched."),
        (
            "gate",
            gate,
            "Judge whether an SAE fits a model, and its fine-tune. What is wrong is named: saeffect gate MODEL SAE;"
            " exit code 1 where it does not fit. With one argument: this stage of a study.",
        ),
        (
            "train-sae",
            train_sae,
            "Train sparse autoencoders on a model's activations. Stopped, the same command goes on. Many processes:"
            " torchrun --nproc-per-node=N -m saeffect train-sae ...",
        ),
        ("harvest", harvest, "Write a model's activations to disk, for train-sae. Also under torchrun."),
        (
            "convert-sae",
            convert_sae_command,
            "Rewrite an SAE in SAELens' layout. Also a pickled ae.pt: no pickled code is run.",
        ),
        ("finetune", finetune, "Train a LoRA adapter and measure what it does to perplexity."),
    ),
    "Stages of a study, of which the gate is the first": tuple(
        (stage, stage_command(stage), f"{text} The stages before it must have been run.")
        for stage, text in STAGE_HELP.items()
        if stage != "gate"
    ),
}
for _section, _entries in _COMMANDS.items():
    for _name, _command, _text in _entries:
        app.command(_name, help=_text, cls=Command, rich_help_panel=_section)(_command)
app.add_typer(
    verdicts,
    name="verdicts",
    help="Export or import people's verdicts on features.",
    rich_help_panel="Finished runs",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        show(f"saeffect {version('saeffect')}")
        raise typer.Exit


@app.callback()
def _all_commands(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    del version
    if context.invoked_subcommand is None:
        show(context.get_help())


def main() -> None:
    """Run the command line: exit code 0 done, 1 broken (guard), not fitting (gate) or in disagreement (verify), 2 wrong
    input, 130 stopped by Ctrl-C.
    """
    # Tokenizers warn about forks that this program never makes.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes, where it is installed, warns of kernels that only quantised models would use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    keep_freed_memory()
    use_large_pages()
    limit_spinning()
    # typer itself prints the help.
    shows_help = "--help" in sys.argv
    try:
        with writing_to(sys.stdout, "standard output") if shows_help else contextlib.nullcontext():
            code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        if code:
            sys.exit(code)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except SaeffectError as error:
        wait_for_peer_error(error)
        show_error(str(error))
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        # torchrun passes Ctrl-C on to all processes; only the first one reports it.
        if os.environ.get("RANK", "0") == "0":
            show_error("Interrupted: stopped. What is finished is kept; run the same command again to go on.")
        sys.exit(_INTERRUPTED)
    except Exception as error:
        wait_for_peer_error(error)
        # Wrong options and arguments; anything else is a bug and keeps its traceback.
        if not hasattr(error, "format_message"):
            raise
        show_error(f"Usage: {error.format_message()}\n  fix: see saeffect --help.")
        sys.exit(2)
