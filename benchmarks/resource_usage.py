"""Run a command and measure what it took: `python -m benchmarks.resource_usage COMMAND …` prints JSON.

It is a process of its own between the benchmark and the command, because Linux counts the memory of a parent towards the children that it
starts. Peak memory is resident memory, model files that are mapped into memory included.
"""

import json
import resource
import subprocess
import sys
import time


def main(command: list[str]) -> None:
    """Run the command and print its exit code, seconds, peak memory and output."""
    start = time.perf_counter()
    process = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, KiB elsewhere
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = round(usage.ru_utime + usage.ru_stime, 1)
    measured = {"code": process.returncode, "seconds": round(seconds, 1), "cpu_seconds": cpu_seconds}
    measured["peak_gib"] = round(usage.ru_maxrss / unit, 2)
    print(json.dumps(measured | {"output": process.stdout, "errors": process.stderr[-2000:]}))


if __name__ == "__main__":
    main(sys.argv[1:])
