"""The command line: `kimi-ops COMMAND`.

Exit codes: 0 done, 1 something was found wrong, 2 the request could not be carried out (one line
on stderr says why), 130 ended by Ctrl-C, 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from kimi_ops._dispatch import BackendError, parse_choice
from kimi_ops._version import __version__
from kimi_ops.model.errors import KimiError

# Top-level modules of the packages that `kimi-ops[model]` adds.
MODEL_PACKAGES = ("av", "jinja2", "PIL", "regex", "safetensors", "tiktoken", "tqdm")


def _run_doctor(args: argparse.Namespace) -> int:
    from kimi_ops import doctor

    return doctor.run(as_json=args.json)


def _run_compile(args: argparse.Namespace) -> int:
    from kimi_ops.testing.static import command

    return command.run(args.arch, args.op, args.json)


def _run_generate(args: argparse.Namespace) -> int:
    from kimi_ops.model import generate_command

    return generate_command.run_generate(args)


def _run_inspect(args: argparse.Namespace) -> int:
    from kimi_ops.model import commands

    return commands.run_inspect(args)


def _run_make_checkpoint(args: argparse.Namespace) -> int:
    from kimi_ops.model import commands

    return commands.run_make_checkpoint(args)


def _run_plan(args: argparse.Namespace) -> int:
    from kimi_ops.model import commands

    return commands.run_plan(args)


class _Medium(argparse.Action):
    """Collects --image and --video in one list, so that their order is kept."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        kind = "image" if option_string == "--image" else "video"
        namespace.media = [*namespace.media, *((kind, path) for path in values)]


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="answer a prompt, a conversation, or a chat on the terminal",
        description="Answers a prompt with pictures and clips. Exit code 130 after Ctrl-C.",
        allow_abbrev=False,
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
            action=_Medium,
            nargs="+",
            dest="media",
            default=[],
            metavar="F",
            help=f"{name} before the prompt, in the order given",
        )
    parser.add_argument("--instant", action="store_true", help="answer without reasoning first")
    parser.add_argument("--tools", metavar="F", help="JSON list of tools, OpenAI format")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--no-stream", action="store_true", help="print the answer when complete")
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help="(1024)")
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="0 is greedy (thinking 1.0, instant 0.6)"
    )
    parser.add_argument("--top-p", type=float, metavar="X", help="(0.95)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (0)")
    parser.add_argument("--device", default="cpu", metavar="D", help="cpu, cuda or cuda:N (cpu)")
    _add_dtype(parser, "of the float weights")
    _add_layers(parser, "load only these decoder layers, such as 0-3")
    parser.set_defaults(run=_run_generate, usage_error=parser.error)


def _add_dtype(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help=f"{what} (bf16)"
    )


def _add_layers(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--layers", metavar="A-B", help=what)


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="check a checkpoint and describe it",
        description="Checks everything of a checkpoint but the weights themselves.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "directory", metavar="DIR", help="checkpoint, config.json, or kimi-k2.5 (the released one)"
    )
    parser.add_argument("--config-only", action="store_true", help="look at the config alone")
    _add_layers(parser, "decoder layers that must be present, such as 0-3")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=_run_inspect)


def _add_make_checkpoint(commands: Any) -> None:
    parser = commands.add_parser(
        "make-checkpoint",
        help="write a random checkpoint in the released format",
        description="Writes a complete checkpoint whose weights are random numbers.",
        allow_abbrev=False,
    )
    parser.add_argument("directory", metavar="DIR", help="where to; must be empty or not exist")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--size", choices=("tiny", "kimi-k2.5"), help="(tiny)")
    size.add_argument("--config", metavar="FILE", help="sizes from this config.json")
    parser.add_argument(
        "--num-hidden-layers", type=int, metavar="N", help="a model of this many decoder layers"
    )
    _add_layers(parser, "write only these decoder layers, such as 0-1")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the weights (0)")
    _add_dtype(parser, "of the float tensors")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier checkpoint")
    parser.set_defaults(run=_run_make_checkpoint)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="memory that a model needs on given devices",
        description="Memory per device, from the config alone. Exit code 1 if it does not fit.",
        allow_abbrev=False,
    )
    parser.add_argument("--devices", required=True, help="8x141GB, 80GiB or cpu:768GB")
    parser.add_argument("--context", type=int, metavar="N", help="tokens (the config's limit)")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (1)")
    parser.add_argument("--parallel", metavar="P", help="none, tp8, ep8, tp8ep8 (tp over all)")
    parser.add_argument("--weights", choices=("int4", "bf16"), default="int4", help="(int4)")
    parser.add_argument("--config", metavar="FILE", help="a config.json (that of Kimi K2.5)")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=_run_plan)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kimi-ops",
        description="Fused kernels for Kimi K2.5, and the model made of them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kimi-ops {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    doctor = commands.add_parser("doctor", help="versions, devices, and who runs each op here")
    doctor.add_argument("--json", action="store_true", help="the same as JSON")
    doctor.set_defaults(run=_run_doctor)
    compile_ = commands.add_parser("compile", help="registers, memory, instructions of each kernel")
    compile_.add_argument("--arch", nargs="+", default=[], metavar="A", help="sm_90a, ... (all)")
    compile_.add_argument("--op", nargs="+", default=[], metavar="OP", help="names of ops (all)")
    compile_.add_argument("--json", action="store_true", help="the same as JSON")
    compile_.set_defaults(run=_run_compile)
    _add_generate(commands)
    _add_inspect(commands)
    _add_make_checkpoint(commands)
    _add_plan(commands)
    return parser


def _check_combinations(args: argparse.Namespace) -> None:
    """What one option alone cannot tell; exits with a usage error."""
    if args.command != "generate":
        return
    if args.messages is not None and (args.media or args.system is not None):
        args.usage_error("--system, --image and --video belong into the file of --messages")
    if args.interactive and args.json:
        args.usage_error("--json is not for --interactive")


def _refuse(reason: object) -> int:
    print(f"kimi-ops: error: {' '.join(str(reason).splitlines())}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code.

    Args:
        argv: arguments without the program's name; those of the process if None.

    Raises:
        SystemExit: --help, --version, and usage errors (code 2).
    """
    args = _parser().parse_args(argv)
    _check_combinations(args)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks must not end an answer.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            parse_choice(os.environ.get("KIMI_OPS_BACKEND", ""))
        except ValueError as error:
            return _refuse(f"KIMI_OPS_BACKEND: {error}")
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except KimiError as error:
        return _refuse(error)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in MODEL_PACKAGES:
            raise
        return _refuse(f"{error.name} is not installed: pip install 'kimi-ops[model]'")
    except BackendError as error:
        return _refuse(error)
    except (MemoryError, RuntimeError) as error:
        # torch has a class of its own for this on CUDA, but only a text on the CPU.
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not memory and "can't allocate memory" not in str(error):
            raise
        return _refuse(f"not enough memory ({error}); `kimi-ops plan` tells what a model needs")
    except KeyboardInterrupt:
        print("kimi-ops: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # What is still buffered would fail again at exit, where nobody can catch it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


if __name__ == "__main__":
    sys.exit(main())
