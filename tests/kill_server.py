"""Runs commands in forks of a process that has imported everything and started no thread: one request a line, as JSON.

A process that has computed with torch or OpenCV has threads, which a fork lacks and may wait for.
"""

import importlib
import json
import os
import signal
import sys

SECONDS = 120  # against what would never end
# Of `open` only what may write; `os.replace` is told as a rename.
EVENTS = ('open', 'os.mkdir', 'os.rename', 'os.remove', 'os.rmdir')
MODULES = (
    'basicsr.train', 'matplotlib.backends.backend_agg', 'matplotlib.backends.backend_svg', 'lora_sr.basicsr.pipelines',
    'lora_sr.basicsr.rank_allocation', 'lora_sr.data.degrade', 'lora_sr.data.prepare', 'lora_sr.deploy.adapters',
    'lora_sr.deploy.exports.chainner', 'lora_sr.deploy.merge', 'lora_sr.deploy.submission', 'lora_sr.deploy.upscale',
    'lora_sr.report.comparison', 'lora_sr.report.curves',
)  # fmt: skip


def start(argv, inputs, out, kill_at):
    """Run a command in another process, and kill it before one of its file operations under a folder.

    Returns:
        Its status, negative after a signal; and how many such operations it began.
    """
    read_end, write_end = os.pipe()
    process = os.fork()
    if process:
        os.close(write_end)
        with os.fdopen(read_end, 'rb') as pipe:
            count = len(pipe.read())
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), count
    try:
        signal.alarm(SECONDS)
        os.dup2(2, 1)
        os.chdir(inputs)
        own, seen = os.getpid(), [0]

        def watch(event, arguments):
            if event not in EVENTS or os.getpid() != own or not is_written(event, arguments, out):
                return
            if seen[0] == kill_at:
                os.kill(own, signal.SIGKILL)
            seen[0] += 1
            os.write(write_end, b'.')

        sys.addaudithook(watch)
        status = importlib.import_module('lora_sr.cli.main').main(argv)
        if kill_at is not None:  # more than there are: after the last
            os.kill(own, signal.SIGKILL)
        os._exit(status)
    finally:
        os._exit(99)


def is_written(event, arguments, out):
    paths = [os.fspath(path) for path in arguments[:2] if isinstance(path, (str, os.PathLike))]
    if event == 'open' and not (
        isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    ):
        return False
    return any(os.path.abspath(path).startswith(out) for path in paths)


def serve():
    for name in MODULES:
        importlib.import_module(name)
    # A process that takes seconds.
    importlib.import_module('lora_sr.deploy.submission')._verify = lambda *args: 0.0
    for line in sys.stdin:
        print(json.dumps(start(**json.loads(line))), flush=True)


if __name__ == '__main__':
    import lora_sr  # noqa: F401  (plugs into BasicSR)

    serve()
