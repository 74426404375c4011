"""Forks of a process that has made the slow imports."""

import os
import signal
import sys
import traceback

SECONDS = 100  # after which SIGALRM ends a fork that hangs


def finish(action):
    """Call `action` as a script's whole work, and end this process with the
    status that the interpreter would give. Not by the interpreter's own end,
    which takes the imported modules apart: tenths of a second."""
    status = 1
    try:
        action()
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run_forked(action) -> int:
    """The exit status of `action` in a fork, -n if signal n killed it; what it
    prints is dropped."""
    process = os.fork()
    if not process:
        signal.alarm(SECONDS)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        finish(action)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
