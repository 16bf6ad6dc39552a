"""The command line's options: every command with what it takes, and what carries it out."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from kimi_ops._arguments import (
    Medium,
    Parser,
    add_cache_format,
    add_dtype,
    add_json,
    add_layers,
    add_number,
)
from kimi_ops._version import __version__

Command = Callable[[argparse.Namespace], int]


# Each imports what its command needs: seconds for some, so no command pays for another.


def _doctor() -> Command:
    from kimi_ops import doctor

    return lambda args: doctor.run(as_json=args.json)


def _compile() -> Command:
    from kimi_ops.testing.static import command

    return lambda args: command.run(args.arch, args.op, args.json, args.markdown)


def _verify() -> Command:
    from kimi_ops.testing import compare, verify

    return lambda args: (
        compare.run(args.op)
        if args.compare
        else verify.run(args.op, args.way, args.device, full=args.full, quick=args.quick)
    )


def _tune() -> Command:
    from kimi_ops.tune import command

    return command.run


def _bench() -> Command:
    from kimi_ops.bench import command

    return command.run


def _eval() -> Command:
    from kimi_ops.evaluate import command

    return command.run


def _generate() -> Command:
    from kimi_ops.model import generate_command

    return generate_command.run_generate


def _inspect() -> Command:
    from kimi_ops.model import commands

    return commands.run_inspect


def _make_checkpoint() -> Command:
    from kimi_ops.model import commands

    return commands.run_make_checkpoint


def _plan() -> Command:
    from kimi_ops.model import commands

    return commands.run_plan


def _add(
    commands: Any, name: str, load: Callable[[], Command], short: str, description: str | None
) -> argparse.ArgumentParser:
    """A command; without a description, its one-line help is that too."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=short, description=description)
    parser.set_defaults(load=load, usage_error=parser.error)
    return parser


def _add_verify(commands: Any) -> None:
    parser = _add(
        commands,
        "verify",
        _verify,
        "run each kernel on hostile inputs, against the reference in float64",
        "Runs every op's kernels on the hostile cases of the tests and prints a table in Markdown. "
        "On the CPU, kernels for a GPU run interpreted and in the emulator. Exit code 1 if a case "
        "goes wrong.",
    )
    parser.add_argument("--op", nargs="+", default=[], metavar="OP", help="names of ops (all)")
    parser.add_argument(
        "--way", nargs="+", default=[], metavar="W", help="interpreted, sm_80, sm_90 (all)"
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--full", action="store_true", help="the large cases too: hours on a CPU")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only what runs on the device itself: on a CPU the CPU library, in a minute",
    )
    parser.add_argument(
        "--compare",
        action="store_true",
        help="one row per op: all backends on the cases that all of them take, on the CPU",
    )


def _add_tune(commands: Any) -> None:
    from kimi_ops.tune.command import add_arguments

    what = "search the tiles of the Triton kernels for one GPU"
    add_arguments(_add(commands, "tune", _tune, what, None))


def _add_bench(commands: Any) -> None:
    parser = _add(
        commands,
        "bench",
        _bench,
        "measure each op against this machine's limits and its peers",
        "Measures every op at Kimi K2.5's sizes against what this machine can do and against the "
        "peers that are installed, all taking turns. A result is checked before it is timed. Exit "
        "code 1 if one is wrong. Times for GPUs that are not here are modelled, and say so.",
    )
    parser.add_argument("--op", nargs="+", default=[], metavar="OP", help="names of ops (all)")
    parser.add_argument("--backend", nargs="+", default=[], metavar="B", help="(with kernels here)")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (cpu)")
    parser.add_argument("--cases", nargs="+", default=[], metavar="TEXT", help="a part of the name")
    parser.add_argument(
        "--peers", nargs="+", default=[], metavar="P", help="(all installed); none for none"
    )
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[], metavar="N", help="of torch, on a CPU (all)"
    )
    parser.add_argument(
        "--sections", nargs="+", default=[], metavar="S", help="measured, modelled, step (all)"
    )
    parser.add_argument("--rounds", type=int, default=25, metavar="N", help="at most (25)")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="X", help="of a case (1.5)")
    parser.add_argument("--full", action="store_true", help="all cases: hours on a CPU")
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--out", metavar="DIR", help="write bench.json, .csv, .md and .html")
    parser.add_argument(
        "--compare", metavar="FILE", help="bench.json of another run; exit code 1 if medians differ"
    )


def _add_eval(commands: Any) -> None:
    from kimi_ops.evaluate.command import add_arguments

    what = "how many held-out samples of small tasks a checkpoint answers right"
    add_arguments(_add(commands, "eval", _eval, what, None))


def _add_generate(commands: Any) -> None:
    parser = _add(
        commands,
        "generate",
        _generate,
        "answer a prompt, a conversation, or a chat on the terminal",
        "Answers a prompt with pictures and clips. Exit code 130 after Ctrl-C. Defaults come from "
        "the checkpoint's generation_config.json where it has them.",
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="the user's message")
    what.add_argument("--messages", metavar="FILE", help="JSON list of messages, OpenAI format")
    what.add_argument("--interactive", action="store_true", help="chat, read from stdin")
    parser.add_argument("--system", metavar="TEXT", help="system message")
    for kind, name in (("--image", "pictures"), ("--video", "clips")):
        parser.add_argument(
            kind,
            action=Medium,
            nargs="+",
            dest="media",
            default=[],
            metavar="F",
            help=f"{name} before the prompt, in the order given",
        )
    parser.add_argument("--instant", action="store_true", help="answer without reasoning first")
    parser.add_argument("--tools", metavar="F", help="JSON list of tools, OpenAI format")
    add_json(parser, "one JSON object on stdout")
    parser.add_argument("--no-stream", action="store_true", help="print the answer when complete")
    add_number(parser, "--max-new-tokens", "(the checkpoint's, else 1024)")
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="X",
        help="0 is greedy (the checkpoint's, else 1.0; instant 0.6)",
    )
    parser.add_argument("--top-p", type=float, metavar="X", help="(the checkpoint's, else 0.95)")
    add_number(parser, "--seed", "of the sampling (0)", 0)
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (cpu)")
    add_dtype(parser, "of the float weights")
    add_cache_format(parser)
    add_layers(parser, "load only these decoder layers, such as 0-3")


def _add_inspect(commands: Any) -> None:
    parser = _add(
        commands,
        "inspect",
        _inspect,
        "check a checkpoint and describe it",
        "Checks everything of a checkpoint but the weights themselves.",
    )
    parser.add_argument(
        "directory", metavar="DIR", help="checkpoint, config.json, or kimi-k2.5 (the released one)"
    )
    parser.add_argument("--config-only", action="store_true", help="look at the config alone")
    add_layers(parser, "decoder layers that must be present, such as 0-3")
    add_json(parser)


def _add_make_checkpoint(commands: Any) -> None:
    parser = _add(
        commands,
        "make-checkpoint",
        _make_checkpoint,
        "write a random checkpoint in the released format",
        "Writes a complete checkpoint whose weights are random numbers.",
    )
    parser.add_argument("directory", metavar="DIR", help="where to; must be empty or not exist")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", choices=("tiny", "kimi-k2.5"), help="(tiny)")
    size.add_argument("--config", metavar="FILE", help="sizes from this config.json")
    add_number(parser, "--num-hidden-layers", "a model of this many decoder layers")
    add_layers(parser, "write only these decoder layers, such as 0-1")
    add_number(parser, "--seed", "of the weights (0)", 0)
    add_dtype(parser, "of the float tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier checkpoint")


def _add_plan(commands: Any) -> None:
    parser = _add(
        commands,
        "plan",
        _plan,
        "memory that a model needs on given devices",
        "Memory per device, from the config alone. Exit code 1 if it does not fit.",
    )
    parser.add_argument("--devices", required=True, help="8x141GB, 80GiB or cpu:768GB")
    add_number(parser, "--context", "tokens (the config's limit)")
    add_number(parser, "--batch", "sequences (1)", 1)
    parser.add_argument("--parallel", metavar="P", help="none, tp8, ep8, tp8ep8 (tp over all)")
    parser.add_argument("--weights", choices=("int4", "bf16"), default="int4", help="(int4)")
    add_cache_format(parser)
    parser.add_argument("--config", metavar="FILE", help="a config.json (that of Kimi K2.5)")
    add_json(parser)


def make_parser() -> argparse.ArgumentParser:
    """The parser; each request has its `load`, which gives the command."""
    parser = Parser(
        prog="kimi-ops", description="Fused kernels for Kimi K2.5, and the model made of them."
    )
    parser.add_argument("--version", action="version", version=f"kimi-ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = _add(commands, "doctor", _doctor, "versions, devices, and who runs each op here", None)
    add_json(doctor)
    compile_ = _add(
        commands, "compile", _compile, "registers, memory, instructions of each kernel", None
    )
    compile_.add_argument("--arch", nargs="+", default=[], metavar="A", help="sm_90a, ... (all)")
    compile_.add_argument("--op", nargs="+", default=[], metavar="OP", help="names of ops (all)")
    form = compile_.add_mutually_exclusive_group()
    form.add_argument("--markdown", metavar="FILE", help="write a page, or these ops' part of it")
    form.add_argument("--json", action="store_true", help="the same as JSON")
    _add_verify(commands)
    _add_tune(commands)
    _add_bench(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_inspect(commands)
    _add_make_checkpoint(commands)
    _add_plan(commands)
    return parser


def check_combinations(args: argparse.Namespace) -> None:
    """What one option alone cannot tell; exits with a usage error."""
    verify = args.command == "verify"
    if verify and args.quick and (args.way or args.full or args.compare):
        args.usage_error("--quick goes with --op and --device alone")
    if verify and args.compare and (args.way or args.full or args.device != "cpu"):
        args.usage_error("--compare goes with --op alone")
    if args.command != "generate":
        return
    if args.messages is not None and (args.media or args.system is not None):
        args.usage_error("--system, --image and --video belong into the file of --messages")
    if args.interactive and args.json:
        args.usage_error("--json is not for --interactive")
