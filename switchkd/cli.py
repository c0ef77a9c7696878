"""The command line, `switchkd VERB`. What a verb needs is imported when it runs, so that --help answers at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand


class Verb(TyperCommand):
    """What the user can mend ends as one line on stderr and exit status 2; anything else keeps its traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            typer.echo(f"switchkd {self.name}: error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from None


class TrainVerb(Verb):
    """Also: an interruption ends as the command that goes on."""

    def invoke(self, ctx: typer.Context) -> Any:
        from switchkd.train import one_line

        raise typer.Exit(one_line(lambda: TyperCommand.invoke(self, ctx), "train"))


# Of a verb that reads a run's configuration: what is no option of its own sets a field.
TAKES_FIELDS = {"ignore_unknown_options": True, "allow_extra_args": True}

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The console script."""
    app(prog_name="switchkd")


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        from switchkd import __version__

        typer.echo(f"switchkd {__version__}")
        for name in ("torch", "transformers", "accelerate", "peft"):
            try:
                typer.echo(f"{name} {version(name)}")
            except PackageNotFoundError:
                typer.echo(f"{name} is not installed")
        raise typer.Exit


@app.callback()
def switchkd(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="This version, and what it uses.")
    ] = False,
) -> None:
    """Make a small vision-language model out of a big one.

    Every verb has --help. On several GPUs training is started by accelerate launch, as `switchkd train --help` says.
    """


def _list_fields(ctx: typer.Context, wanted: bool) -> None:
    if wanted:
        from switchkd.tasks import load_config

        load_config(["--help"], prog=f"switchkd {ctx.info_name}")  # ends the process


CONFIG = Annotated[str, typer.Option("--config", metavar="FILE", help="YAML file of the run, or a shipped one.")]
FIELDS = Annotated[
    bool,
    typer.Option("--fields", callback=_list_fields, is_eager=True, help="List the fields of a run's configuration."),
]


@app.command(cls=Verb, context_settings=TAKES_FIELDS)
def plan(
    ctx: typer.Context,
    config: CONFIG,
    gpu: Annotated[str, typer.Option(help="Kind of GPU.")] = "h100",
    gpus: Annotated[int, typer.Option(help="How many of them.")] = 8,
    engine: Annotated[str, typer.Option(help="How the processes share the work: ddp, zero2, ...")] = "ddp",
    efficiency: Annotated[float, typer.Option(help="Share of the GPU's peak rate that training reaches.")] = 0.25,
    fields: FIELDS = False,
) -> None:
    """What a run will need, before a weight is loaded: samples, steps, memory and time of each stage.

    Any field of the run can be set as well, as in --train.batch_size 8; --fields lists them.
    """
    from switchkd.plan import make_plan, show

    run = _run_config(ctx, config)
    show(make_plan(run, gpu=gpu, gpus=gpus, engine=engine, efficiency=efficiency), Console())


@app.command(cls=Verb, context_settings=TAKES_FIELDS)
def inspect(
    ctx: typer.Context,
    config: CONFIG,
    stage: Annotated[
        str | None,
        typer.Option(metavar="teacher|pretrain|sft|distil", help="Stage whose data is read; left out, the last."),
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Samples to show, picked at random.")] = 3,
    seed: Annotated[int, typer.Option(help="Seed of the pick.")] = 0,
    fields: FIELDS = False,
) -> None:
    """What training will read: a summary of the set, and samples decoded with their answer tokens marked.

    Any field of the run can be set as well, as in --data.max_length 1024; --fields lists them.
    """
    from switchkd.inspect import inspect_data, show

    run = _run_config(ctx, config)
    _quiet_loading()
    with Console(stderr=True).status("reading and checking the data"):
        found = inspect_data(run, stage, samples=samples, seed=seed)
    show(found, Console())


@app.command(cls=Verb)
def ask(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Folders or Hub names of LLaVA models, or run folders.")
    ],
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The picture.")],
    question: Annotated[str, typer.Argument(metavar="QUESTION", help="In quotes.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the boxes of the answers there, a panel a model.")
    ] = None,
) -> None:
    """Put one question about one picture to one or several models, and set their answers side by side.

    A run folder stands for its student. Models are loaded one after the other, on a GPU in bfloat16 where there is
    one, else in float32.
    """
    from switchkd.ask import ask as ask_models
    from switchkd.ask import check_save, located, save_picture, show

    if save is not None:
        check_save(save, image)
    _quiet_loading()
    with Console(stderr=True).status("asking"):
        replies = ask_models(models, image, question, max_new_tokens=max_new_tokens)
    console = Console()
    show(replies, console)
    if save is not None:
        save_picture(replies, image, save)
        console.print(f"drawn: {save}", markup=False, highlight=False, soft_wrap=True)
    elif found := located(replies):
        console.print(f"{found} of {len(replies)} answers hold boxes: --save FILE.png draws them on the picture")


@app.command(cls=Verb)
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder of a TinyLLaVA checkpoint (safetensors).")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="Folder to write.")],
    chat_template: Annotated[
        Path | None, typer.Option(metavar="FILE.jinja", help="Chat template that the model was trained with.")
    ] = None,
) -> None:
    """Write a TinyLLaVA checkpoint as the stock LLaVA class of transformers, without running its code."""
    template = None
    if chat_template is not None:
        if not chat_template.is_file():
            raise FileNotFoundError(f"--chat-template is {chat_template}, which is not a file: name a Jinja file")
        template = chat_template.read_text(encoding="utf-8")

    from switchkd.convert import convert as convert_checkpoint

    _quiet_loading()
    convert_checkpoint(source, target, chat_template=template)


@app.command(cls=TrainVerb, context_settings=TAKES_FIELDS)
def train(
    ctx: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="YAML file, or the name of a shipped one; not needed with --resume."),
    ] = None,
    fields: FIELDS = False,
) -> None:
    """Run every stage of a configuration, judge, and write the run's folder.

    Any field of the run can be set as well, as in --train.lr 1e-3; --fields lists them. An interrupted run goes on with
    --name NAME --resume. On several GPUs: accelerate launch --num_processes 8 -m switchkd train CONFIG.
    """
    from switchkd.configs import find
    from switchkd.tasks import load_config
    from switchkd.train import train as train_run

    words = list(ctx.args)
    if config is not None and config.startswith("-"):  # click takes a field that comes first for CONFIG
        words, config = [config, *words], None
    given = [word.partition("=")[0] for word in words]
    if config is None and "--resume" not in given and "--config" not in given:
        raise ValueError("give CONFIG first, a YAML file or one of `switchkd configs`, or --name NAME --resume")
    if config is not None and "--config" in given:
        raise ValueError(f"CONFIG is {config} and --config is also given: keep one of them")
    default = None if config is None else find(config)
    train_run(load_config(words, default=default, prog="switchkd train"))


@app.command(cls=Verb)
def configs(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Those to copy; none: list all.")
    ] = None,
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="Where copies go.")] = Path(),
) -> None:
    """List the shipped configurations, or copy some to a folder to change them there."""
    from switchkd.configs import copy, shipped, summary

    if names:
        for file in copy(names, to):
            typer.echo(f"copied: {file}")
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for file in shipped():
        table.add_row(file.stem, Text(summary(file)))
    Console().print(table)


def _run_config(ctx: typer.Context, config: str):
    from switchkd.configs import find
    from switchkd.tasks import load_config

    return load_config(["--config", str(find(config)), *ctx.args], prog=f"switchkd {ctx.info_name}")


def _quiet_loading() -> None:
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
