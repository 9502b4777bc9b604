#!/usr/bin/env python3
"""The job of the benchmark "double" with multiprocessing.Pool.map. Usage: pool_map.py ROWS WORKERS

Prints the seconds that the map takes, from the whole input to the whole output; starting the workers does not count.
"""

import multiprocessing
import sys
import time

import numpy


def twice(chunk):
    return chunk * 2


def main(rows, workers):
    array = numpy.arange(rows, dtype=numpy.int64)
    with multiprocessing.Pool(workers) as pool:
        pool.map(twice, [array[:1]] * workers)  # all of them have started
        start = time.perf_counter()
        doubled = numpy.concatenate(pool.map(twice, numpy.array_split(array, 4 * workers)))
        print(time.perf_counter() - start)
    assert doubled[-1] == 2 * (rows - 1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
