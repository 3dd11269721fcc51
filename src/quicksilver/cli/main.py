"""The `quicksilver` command: finds the subcommand, turns deliberate errors into one line and exit status 2."""

import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper

import click

from quicksilver.errors import QuickSilverError
from quicksilver.version import __version__

_COMMANDS = {
    "eval": "Measure plans against the dense model: perplexity, FLOPs, bytes, seconds.",
    "generate": "Continue a prompt under a plan.",
    "quantize": "Quantize a model's weights in 8-bit codes, to be read at fewer bits where a plan says so.",
    "calibrate": "Find the cheapest plan inside a budget of perplexity; verify it on text it has not seen.",
    "plan": "List, show, validate and fit plans.",
    "models": "List the model families and the embedded models.",
    "demo": "Measure the embedded model on the embedded text and draw the result.",
}


class _LazyGroup(click.Group):
    """Imports a subcommand's module only when it is called; the list needs none."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(f"quicksilver.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quicksilver")
def cli() -> None:
    """Run frozen decoder language models with less work per token, and measure what that costs.

    \b
    Examples:
      quicksilver demo
      quicksilver eval ref-llama --text book.txt --plan paper --plan settled
      quicksilver generate ref-llama "The river rises in" --plan settled --stats
    """


def main() -> None:
    """Run the command line; deliberate errors print one line and exit with status 2."""
    with _stoppable():
        _run()


class _Terminated(BaseException):
    """SIGTERM, raised like an interrupt so that whatever is half done is cleaned up."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise, once: the next ones must not interrupt the cleaning up."""
    reasons: dict[int, type[BaseException]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: _Terminated}
    usual = (signal.SIG_DFL, signal.default_int_handler)  # whatever else holds was set by someone else, nohup say
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in reasons if is_main and signal.getsignal(number) in usual}

    def stop(number: int, _: object) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise reasons[number]

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a letter still gets the rest
    try:
        with cli.make_context("quicksilver", sys.argv[1:]) as context:  # cli.main would hide a broken pipe
            cli.invoke(context)
        sys.stdout.flush()
    except QuickSilverError as error:
        _fail(" ".join(str(error).splitlines()))
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        _refuse(error)
    except (KeyboardInterrupt, click.Abort):
        _stop(128 + signal.SIGINT)
    except _Terminated:
        _stop(128 + signal.SIGTERM)
    except BrokenPipeError:  # the reader of our output went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _refuse(error: click.ClickException) -> None:
    """Say what was wrong with a command, and where its help is."""
    message = error.format_message()
    if message.startswith("Usage: "):  # nothing was asked for, and click answers with all of the help
        error.show()
        sys.exit(2)
    context = getattr(error, "ctx", None)
    hint = "" if context is None else f" (see `{context.command_path} --help`)"
    _fail(f"{message[:1].lower()}{' '.join(message[1:].split()).rstrip('.')}{hint}")


def _fail(message: str) -> None:
    print(f"quicksilver: error: {message}", file=sys.stderr)
    sys.exit(2)


def _stop(status: int) -> None:
    print("quicksilver: interrupted", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    main()
