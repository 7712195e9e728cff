"""The page ``docs/reference/cli.md``, made from the commands themselves.

``python -m netslot.cli.reference > docs/reference/cli.md`` writes it; a test keeps the committed one current.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import click

from netslot.cli.main import cli

_HEAD = """# The command line

Made from the code: `netslot COMMAND --help` says the same.

People's output goes to stdout, progress and errors to stderr. With `--json`, stdout holds one JSON document and
nothing else. An error is one line, with one line of hint where there is something to do; `--debug` shows the
traceback.

| exit status | meaning |
| --- | --- |
| 0 | done |
| 1 | failed |
| 2 | wrong usage, or a spec with mistakes |
| 3 | the answer is 'no': drift found, no slot free, not provable |
| 4 | the host lacks something: a capability, a kernel feature, a tool |

## Shell completion
Commands, options and their choices are completed by bash, zsh and fish. `--state-dir` can stand in the environment as
`NETSLOT_STATE_DIR`.

```sh
_NETSLOT_COMPLETE=bash_source netslot > ~/.local/share/bash-completion/completions/netslot
_NETSLOT_COMPLETE=zsh_source netslot > ~/.zfunc/_netslot         # a directory of $fpath
_NETSLOT_COMPLETE=fish_source netslot > ~/.config/fish/completions/netslot.fish
```
"""


def page() -> str:
    """The whole page, as Markdown."""
    head = f"{_HEAD}\n## Global options\nThey stand before the command.\n"
    return "\n".join([head, *_options(cli), *_verbs(cli, "netslot")])


def _section(command: click.Command, name: str) -> Iterator[str]:
    yield f"## `{name}`"
    yield f"```\n{' '.join([name, *_usage(command)])}\n```\n"
    yield from _help(command)
    yield from _options(command)
    if isinstance(command, click.Group):
        yield from _verbs(command, name)


def _options(command: click.Command) -> Iterator[str]:
    options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    if options:
        yield "| option | meaning |\n| --- | --- |"
        yield from (f"| {_spelling(option)} | {_meaning(option)} |" for option in options)
        yield ""


def _verbs(group: click.Group, name: str) -> Iterator[str]:
    context = click.Context(group, info_name=name)
    for verb in group.list_commands(context):
        command = group.get_command(context, verb)
        assert command is not None
        yield from _section(command, f"{name} {verb}")


def _help(command: click.Command) -> Iterator[str]:
    """The command's text; what click keeps as it is (marked by a backspace character) becomes a block of code."""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        if not paragraph.startswith("\b"):
            yield f"{' '.join(paragraph.split())}\n"
            continue
        lines = [line for line in paragraph.splitlines()[1:] if not line.startswith("Example")]
        yield "```sh\n" + inspect.cleandoc("\n" + "\n".join(lines)) + "\n```\n"


def _usage(command: click.Command) -> Iterator[str]:
    if any(isinstance(parameter, click.Option) for parameter in command.params):
        yield "[OPTIONS]"
    for parameter in command.params:
        if isinstance(parameter, click.Argument):
            word = parameter.metavar or (parameter.name or "").upper()
            word += "..." if parameter.nargs == -1 and not word.endswith("...") else ""
            yield word if parameter.required or word.startswith("[") else f"[{word}]"
    if isinstance(command, click.Group):
        yield "COMMAND"


def _spelling(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    if option.is_flag or option.count:
        return names
    if isinstance(option.type, click.Choice):
        value = " \\| ".join(f"`{choice}`" for choice in option.type.choices)
        return f"{names} {value}"
    kind = "NUMBER" if isinstance(option.type, click.types.FloatParamType | click.types.IntParamType) else "TEXT"
    kind = "PATH" if isinstance(option.type, click.Path) else kind
    return f"{names} `{option.metavar or kind}`"


def _meaning(option: click.Option) -> str:
    parts = [(option.help or "").replace("|", "\\|")]
    if option.required:
        parts.append("Required.")
    if option.show_default and not option.is_flag:
        parts.append(f"Default: `{option.default}`.")
    return " ".join(part for part in parts if part)


if __name__ == "__main__":
    click.echo(page(), nl=False)
