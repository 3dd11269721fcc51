"""Print the help of every command as one Markdown page; `make docs` keeps docs/cli.md equal to it."""

from __future__ import annotations

from collections.abc import Iterator

import click

from quicksilver.cli.main import cli

_COLUMNS = 100


def pages(command: click.Command, name: str, parent: click.Context | None = None) -> Iterator[tuple[str, str]]:
    """Yield (full name, help text) of a command and everything under it."""
    settings = {**command.context_settings, "terminal_width": _COLUMNS, "max_content_width": _COLUMNS}
    context = click.Context(command, info_name=name.split()[-1], parent=parent, **settings)
    yield name, command.get_help(context)
    if isinstance(command, click.Group):
        for sub in command.list_commands(context):
            member = command.get_command(context, sub)
            assert member is not None
            yield from pages(member, f"{name} {sub}", context)


def render() -> str:
    """Return the page."""
    parts = ["# Command line\n", "Written by `make docs` from the commands' own help.\n"]
    parts += [f"## {name}\n\n```text\n{text.rstrip()}\n```\n" for name, text in pages(cli, "quicksilver")]
    return "\n".join(parts)


if __name__ == "__main__":
    print(render(), end="")
