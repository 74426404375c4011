"""Runs scripts in forks of one process that has made the slow imports.

Each start is a process of its own, with its own arguments, folder, environment
and exit status, in 0.2 s instead of 3. It reads a JSON object a line, `argv`,
`cwd`, `env`, `out` and `err`, and answers with the exit status. One start
follows another. For refusals only: what is to be repeated to the bit is
started anew, with another seed for hashes.

    python tests/warm_starts.py < starts.jsonl
"""

import gc
import json
import os
import runpy
import signal
import sys
from pathlib import Path

import forks
import matplotlib.pyplot  # noqa: F401
import torch._dynamo  # noqa: F401
import transformers  # noqa: F401

gc.collect()
gc.freeze()  # a collection in a fork would copy all that is shared

for line in sys.stdin:
    job = json.loads(line)
    process = os.fork()
    if not process:
        break  # the child goes on below, as if newly started
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(status, flush=True)
else:
    os._exit(0)

signal.alarm(forks.SECONDS)
for number, path, mode in ((0, os.devnull, os.O_RDONLY),
                           (1, job['out'], os.O_WRONLY | os.O_CREAT),
                           (2, job['err'], os.O_WRONLY | os.O_CREAT)):
    os.dup2(os.open(path, mode), number)
os.chdir(job['cwd'])
os.environ.update(job['env'])
sys.argv = job['argv']
sys.path[0] = str(Path(sys.argv[0]).parent)
forks.finish(lambda: runpy.run_path(sys.argv[0], run_name='__main__'))
