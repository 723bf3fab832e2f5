#!/usr/bin/env python3
"""Plays a fleet with Spark: a partition for each shard, which calls thin_replay and hands its reports back.

    spark-submit recipes/spark.py MANIFEST OUTPUT SHARDS [OPTIONS OF thin_replay]

The manifest and its files are where every executor sees them, and so is thin_replay ($THIN_REPLAY, which may have arguments). Reports are
made in a folder of the executor; OUTPUT becomes a text data set of them, a report on each line, which merge-reports reads and Spark
reads as JSON. A task that fails is tried again by Spark, from its beginning.
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

from pyspark.sql import SparkSession


def play(program, manifest, shards, options):
    """What a partition does with the number of its shard."""

    def reports(numbers):
        for number in numbers:
            with tempfile.TemporaryDirectory() as folder:
                call = [*program, "--quiet", "--jobs", "1", "--shard", f"{number}/{shards}"]
                call += ["--manifest", manifest, "--reports", folder, *options]
                done = subprocess.run(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                if done.returncode != 0:
                    raise RuntimeError(f"shard {number}/{shards}: {done.stderr}")
                for path in sorted(pathlib.Path(folder).glob("*.json")):
                    for report in json.loads(path.read_text()):
                        yield json.dumps(report)

    return reports


def main():
    manifest, output, shards = os.path.abspath(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    program = shlex.split(os.environ.get("THIN_REPLAY", "thin_replay"))
    spark = SparkSession.builder.appName("thin_replay").getOrCreate()
    numbers = spark.sparkContext.parallelize(range(1, shards + 1), shards)
    # saveAsTextFile refuses a folder that exists, and marks a complete one with _SUCCESS.
    numbers.mapPartitions(play(program, manifest, shards, sys.argv[4:])).saveAsTextFile(output)
    spark.stop()


if __name__ == "__main__":
    main()
