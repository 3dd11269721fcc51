"""`quicksilver plan`: list presets, show a plan as JSON, validate a plan file."""

from __future__ import annotations

import json

import click

_HELP = {"help_option_names": ["-h", "--help"]}


@click.group("plan", context_settings=_HELP)
def command() -> None:
    """List, show and validate plans.

    \b
    Examples:
      quicksilver plan list
      quicksilver plan show paper > mine.json
      quicksilver plan validate mine.json
    """


@command.command("list", context_settings=_HELP)
def list_plans() -> None:
    """Print the presets, one name per line.

    \b
    Examples:
      quicksilver plan list
    """
    from quicksilver.core.plan import PRESETS

    for name in PRESETS:
        print(name)


@command.command("show", context_settings=_HELP)
@click.argument("plan")
def show(plan: str) -> None:
    """Print PLAN (a preset's name or a file) as JSON, with its version and hash.

    \b
    Examples:
      quicksilver plan show paper > mine.json
    """
    from quicksilver.runtime.loading import resolve_plan

    print(json.dumps(resolve_plan(plan).to_dict(), indent=2))


@command.command("validate", context_settings=_HELP)
@click.argument("plan")
def validate(plan: str) -> None:
    """Check PLAN (a preset's name or a file); exit with status 2 and a reason where it is not valid.

    \b
    Examples:
      quicksilver plan validate mine.json
    """
    from quicksilver.runtime.loading import resolve_plan

    resolved = resolve_plan(plan)
    print(f"{plan}: valid, hash {resolved.hash}")
