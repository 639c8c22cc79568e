"""Everything that is committed, made again.

    python -m analysis.all

Rows: none of its own.
Feeds: every figure, table and notebook, by the commands below.

Runs the commands in turn and executes the notebooks. Each skips what its files in analysis/results hold, so
this takes minutes. Delete a file to have it computed anew; all of them take an hour. Trained weights are made
by their own commands (analysis/pocket/models/README.md), R2R's router with its curves among them. Not made
again is what hangs on the machine: latency.json, bench.jsonl, overhead.jsonl, agree.jsonl.
"""
import argparse
import subprocess
import sys
from pathlib import Path

from rstitch_hf.ranks import start

ROOT = Path(__file__).parent.parent
COMMANDS = ["-m analysis.presentation.report", "-m analysis.frontier",
            "-m analysis.label --workers 2 --report", "-m analysis.compare",
            "-m analysis.collect --workers 2", "-m analysis.presentation.figures",
            "-m analysis.demo --json analysis/results/table.json",
            "-m jupyter nbconvert --to notebook --execute --inplace "
            "--ExecutePreprocessor.record_timing=False notebooks/*.ipynb"]


def main() -> None:
    argparse.ArgumentParser(allow_abbrev=False, description=__doc__,
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for command in COMMANDS:
        print(f"\n$ python {command}", flush=True)
        words = [path for word in command.split()
                 for path in (sorted(map(str, ROOT.glob(word))) if "*" in word else [word])]
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True)


if __name__ == "__main__":
    start(main)
