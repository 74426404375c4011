"""Runs train.py on several ranks, forks of one process with the slow imports.

A start takes tenths of a second instead of torchrun's six. No agent watches
the ranks: what one does when another dies is its own doing. Reads a JSON
object a line: `argv`, `cwd`, `ranks`, `folder` (for what each rank prints:
out_0, err_0, ...) and `before`, Python source that each rank executes first,
with `rank` defined: where faults are planted. Answers with the process ids,
then, when all have ended, with their exit statuses.

    python tests/warm_ranks.py < starts.jsonl
"""

import gc
import json
import os
import runpy
import signal
import socket
import sys
from pathlib import Path

import forks
import torch._dynamo  # noqa: F401
import torch.distributed.fsdp  # noqa: F401
import transformers  # noqa: F401


def serve():
    """(job, rank, port) in each fork; the parent exits at the end of stdin."""
    for line in sys.stdin:
        job = json.loads(line)
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        processes = []
        for rank in range(job['ranks']):
            process = os.fork()
            if not process:
                return job, rank, port
            processes.append(process)
        print(json.dumps(processes), flush=True)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                    for process in processes]
        print(json.dumps(statuses), flush=True)
    os._exit(0)


gc.collect()
gc.freeze()  # a collection in a fork would copy all that is shared
job, rank, port = serve()
signal.alarm(forks.SECONDS)
folder = Path(job['folder'])
for number, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, folder / f'out_{rank}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, folder / f'err_{rank}', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
    os.dup2(os.open(path, mode), number)
os.chdir(job['cwd'])
if job['ranks'] > 1:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job['ranks']),
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
sys.argv = job['argv']
here = Path(__file__).resolve().parent
sys.path[:1] = [str(here.parent), str(here)]


def run():
    exec(job['before'], {'rank': rank})
    runpy.run_path(sys.argv[0], run_name='__main__')


forks.finish(run)
