"""The command line: ``sfumato COMMAND ...``.

A command is a module of `sfumato.commands`; a verb of the catalogue is a command that takes a method's name.
Only what the command needs is imported. Exit status: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

from sfumato.errors import BadInput, SfumatoError, unknown
from sfumato.text import visible

COMMANDS = {
    "demo": "erase a concept from the embedded model, audit the result and write a report",
    "methods": "list every method: verb, name, paper, cost, one line",
    "choose": "a short guide: which method for which purpose",
    "sample": "pictures from prompts",
    "steer": "pictures from prompts, drawn under a patch that lasts for the run",
    "edit": "change a picture, or one drawn from a prompt, and look at it on a page",
    "rollout": "frames without end from a model of frames",
    "views": "a scene seen along a path of cameras, with objects removed or taken over from another",
    "customize": "teach a text-to-image model a new word from a few pictures",
    "compose": "declared subjects together, from an anchor picture; every picture marked and read back",
    "graph": "layouts and pictures of scene graphs",
    "jumps": "where the few steps of a model of tokens should be, and samples along them",
    "erase": "take a concept out of a text-to-image model",
    "purify": "take what an erased model no longer draws out of pictures",
    "export": "a model, or what an edit changed, in the files of other tools",
    "audit": "measure what was erased and what was kept, under attack, and write a report",
    "verify": "check the evidence of an audit (hashes, signature, pictures drawn anew), or the marks of pictures",
    "compare": "two audits side by side, or quality against cost of a teacher and its students",
    "bench": "erasers, concepts, seeds and attacks on one model, in one table and one page",
    "attack": "try to bring an erased concept back",
    "attribute": "share out a likeness among the parts of the workflow that made it",
    "protect": "change pictures a little, so that models imitate and edit them badly",
    "compress": "a picture as few bytes, by a model of `train hfd`",
    "decompress": "the picture that they stand for",
    "train": "train a model",
    "classify": "train a classifier of pictures",
    "explain": "judge explanations of a classifier: which attribution finds what it goes by",
    "distill": "from many sampling steps to few",
    "information": "what a model knows at each noise level: mean squared error and mutual information",
    "latents": "how heavy the tails of an autoencoder's latents are, and of their temporal differences",
    "score": "FID, KID, precision, recall and others, of pictures against real ones or prompts",
    "studio": "all of it in the browser: load, draw, steer, erase, attack, audit, compare",
    "ledger": "re-measure the central claim of a method",
    "cite": "the BibTeX of exactly what a method runs",
    "doctor": "check versions, devices, embedded models and disk; say what a model takes in memory",
}

TALKS = ("methods", "choose", "cite", "doctor", "help", "-V", "--version", "--print-completion")
"""What a command writes is what it prints."""
LONGEST = 400
"""Characters of a complaint."""

HELP = """usage: sfumato COMMAND [options]

Example: sfumato demo

Train, speed up, customise, edit, erase and audit image diffusion models.

commands:
{commands}

"sfumato COMMAND --help" explains a command; --debug shows the traceback of an error.
Tab completion: sfumato --print-completion bash (or zsh) >FILE, and "source FILE" in ~/.bashrc (or ~/.zshrc).
MODEL is the name of an embedded model ("sketch", or "sketch-dit", a transformer), a folder written by save_pretrained,
a .safetensors file of Stable Diffusion 1.x, 2.x or XL, or a hub id.
"""


class Tolerant:
    """A stream whose reader may go away or whose disk may fill up: the work goes on; ``lost`` is the first failure."""

    def __init__(self, stream: Any):
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 (closed by who started it: there is none)
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        return self._try(lambda: self.stream.write(text)) or len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, action: Callable[[], Any]) -> Any:
        try:
            return None if self.lost else action()
        except OSError as error:
            self.lost = error
            with contextlib.suppress(OSError, ValueError):  # what is left in the buffer goes nowhere at the end
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status."""
    args = list(sys.argv[1:] if argv is None else argv)
    words = args.index("--") if "--" in args else len(args)
    debug = "--debug" in args[:words]
    args = [arg for i, arg in enumerate(args) if arg != "--debug" or i > words]
    # the libraries below report what is no news to the user of a command
    for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        warnings.showwarning = lambda message, *rest: _complain(f"warning: {message}")
        out, err = Tolerant(sys.stdout), Tolerant(sys.stderr)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = _guarded(args, debug)
            return _unsaid(out.lost, args) if out.lost and not status else status


def _unsaid(lost: OSError, args: list[str]) -> int:
    """The status of a command that did its work, but whose words did not reach stdout."""
    if isinstance(lost, BrokenPipeError):  # the reader, such as `head`, has seen enough
        return 0
    reason = f"what it prints could not be written ({lost.strerror})"
    if not args or args[0] in TALKS or not {"-h", "--help", "--table"}.isdisjoint(args):
        _complain(reason)
        return 2
    _complain(f"{reason}; the output itself is whole")
    return 0


def _guarded(args: list[str], debug: bool) -> int:
    """Dispatch, and turn every way to fail into a sentence and a status."""
    before = None
    try:
        with contextlib.suppress(ValueError):  # not the main thread
            # a polite kill runs the clean-up of whatever is being written
            before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        status = _dispatch(args)
        sys.stdout.flush()
        return status
    except SfumatoError as error:
        _complain(str(error), debug)
        return 2 if isinstance(error, BadInput) else 1
    except KeyboardInterrupt:
        _complain("interrupted; nothing half-written was left behind")
        return 130
    except SystemExit as exit:
        return exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    except Exception as error:
        from sfumato.files import disk_is_full
        from sfumato.memory import out_of_memory

        if out_of_memory(error):
            _complain("out of memory: choose a smaller batch, fewer or smaller pictures, or another dtype", debug)
            return 1
        if disk_is_full(error):
            _complain("the disk is full: free some space and run it again", debug)
            return 2
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            _complain(f"{str(error.filename)[:60]}... is too long for the name of a file: give the name of one", debug)
            return 2
        _complain(f"{type(error).__name__}: {error} (add --debug for the traceback)", debug)
        return 1
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _dispatch(args: list[str]) -> int:
    for arg in args:
        if not _is_text(arg):
            raise BadInput(f"the argument {arg!r} is not UTF-8: write it in UTF-8")
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
        print(HELP.format(commands="\n".join(lines)), end="")
        return 0
    if args[0] in ("-V", "--version"):
        from sfumato import __version__

        print(f"sfumato {__version__}")
        return 0
    if args[0] in ("--print-completion", "--tyro-print-completion"):
        from sfumato.commands.completion import script

        print(script(args[1:], list(COMMANDS)), end="")
        return 0
    if args[0] not in COMMANDS:
        raise unknown("command", args[0], COMMANDS)
    return import_module(f"sfumato.commands.{args[0]}").main(args[1:]) or 0


def _is_text(arg: str) -> bool:
    try:
        arg.encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8 arrive as halves of characters
        return False
    return True


def _complain(sentence: str, debug: bool = False) -> None:
    if debug:
        import traceback

        traceback.print_exc()
    elif len(sentence) > LONGEST:
        sentence = f"{sentence[: LONGEST - 40].rstrip()} ... (--debug shows all of it)"
    sentence = "\n".join(map(visible, sentence.split("\n")))  # what a file or a model is called acts on no terminal
    print(f"sfumato: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
