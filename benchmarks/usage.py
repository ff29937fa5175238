"""Run a command and say what it took: `python -m benchmarks.usage COMMAND …` prints JSON.

A process of its own between the bench and the command, because Linux counts the memory of a parent towards the
children that it starts. Peak memory is what was resident, model files mapped into memory included.
"""

import json
import resource
import subprocess
import sys
import time


def main(command: list[str]) -> None:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    taken = {"code": done.returncode, "seconds": round(seconds, 1), "cpu_seconds": round(used.ru_utime + used.ru_stime, 1)}
    taken["peak_gib"] = round(used.ru_maxrss / unit, 2)
    print(json.dumps(taken | {"output": done.stdout, "errors": done.stderr[-2000:]}))


if __name__ == "__main__":
    main(sys.argv[1:])
