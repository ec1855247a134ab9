"""`saeffect`: the commands, and where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from typing import Annotated

import typer

from saeffect.cli.check import check
from saeffect.cli.console import show, show_error, still_writable, wait_for_peer_error
from saeffect.cli.diff import diff
from saeffect.cli.export import export
from saeffect.cli.finetune import finetune
from saeffect.cli.gate import gate
from saeffect.cli.guard import guard
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
from saeffect.parallel import keep_freed_memory, use_large_pages, wait_politely

__all__ = ["app", "main"]

_STOPPED = 130  # the exit code after Ctrl-C

app = typer.Typer(
    name="saeffect",
    help="What did fine-tuning do to the features inside this language model, and is the difference real?",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command(
    "run",
    help="Run a whole study; finished stages are skipped. Steering shared over processes:"
    " torchrun --nproc-per-node=N -m saeffect run ...",
)(run)
app.command(
    "diff",
    help="Compare a model with its fine-tune, without a study file. The first findings come in minutes.",
)(diff)
app.command("check", help="Validate a study without computing anything.")(check)
app.command("plan", help="Predict a study's time, memory and disk. Rates are measured here; no weights are needed.")(
    plan
)
app.command(
    "gate",
    help="Judge whether an SAE fits a model, and its fine-tune. What is wrong is named: saeffect gate MODEL SAE; exit"
    " code 1 where it does not fit. With one argument: this stage of a study.",
)(gate)
for _stage, _help in STAGE_HELP.items():
    if _stage != "gate":
        app.command(_stage, help=_help + " The stages before it must have been run.")(stage_command(_stage))
app.command("serve", help="Open a run directory in the browser: look, judge, try. Also while a study is running.")(
    serve
)
app.command("verify", help="Recompute a finished run's numbers from its tables. Exit code 1 if one disagrees.")(verify)
app.command(
    "export",
    help="Write features of a finished run for other programs. Steering vector (.safetensors), control vector for"
    " llama.cpp (.gguf), Neuronpedia-style list (.json), .csv.",
)(export)
app.command(
    "label",
    help="Label features of a run by a language model. Each label is scored on contexts that it was not made from. The"
    " endpoint: OPENAI_BASE_URL, SAEFFECT_LABEL_MODEL, OPENAI_API_KEY.",
)(label)
app.command(
    "reproduce", help="Recompute the figures of Gupta & Sica (2024). From their published files: paper, ours, verdict."
)(reproduce)
app.add_typer(verdicts, name="verdicts", help="Export or import people's verdicts on features.")
app.command("finetune", help="Train a LoRA adapter and measure what it does to perplexity.")(finetune)
app.command(
    "train-sae",
    help="Train sparse autoencoders on a model's activations. Stopped, the same command goes on. Many processes:"
    " torchrun --nproc-per-node=N -m saeffect train-sae ...",
)(train_sae)
app.command(
    "guard", help="Judge a fine-tune by a budget of what it may change. Exit code 0: kept, 1: broken, 2: wrong input."
)(guard)
app.command("saes", help="List published SAEs by model, with the names to write. Nothing is fetched.")(saes)
app.command("convert-sae", help="Rewrite an SAE in SAELens' layout. Also a pickled ae.pt: no pickled code is run.")(
    convert_sae_command
)
app.command("harvest", help="Write a model's activations to disk, for train-sae. Also under torchrun.")(harvest)


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
    wait_politely()
    # typer itself prints the help.
    shows_help = "--help" in sys.argv
    try:
        with still_writable(sys.stdout, "standard output") if shows_help else contextlib.nullcontext():
            code = app(standalone_mode=False)
        if code == _STOPPED:  # what typer makes of Ctrl-C
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
        sys.exit(_STOPPED)
    except Exception as error:
        wait_for_peer_error(error)
        # Wrong options and arguments; anything else is a bug and keeps its traceback.
        if not hasattr(error, "format_message"):
            raise
        show_error(f"Usage: {error.format_message()}\n  fix: see saeffect --help.")
        sys.exit(2)
