#!/usr/bin/python3
"""Predicts the labels of Fashion-MNIST test rows by exact k-nearest-neighbour search, to check the C++ example by.

Shares nothing with it: numpy reads the files, the squared distances are matrix products in double precision (all
terms and sums are integers below 2^53, so each is exact in any order), a stable sort puts the smaller row index
first among equal distances, and argmax the smaller label among equal votes.
"""

import argparse
import gzip
import math
import pathlib
import struct

import numpy as np

BLOCK_ROWS = 100  # test rows at a time: 60,000 distances of 8 bytes each


def read_idx(path: pathlib.Path) -> np.ndarray:
    with gzip.open(path, "rb") as file:
        content = file.read()
    zeros, element_type, dimensions = struct.unpack_from(">HBB", content)
    if zeros != 0 or element_type != 8:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    shape = struct.unpack_from(f">{dimensions}I", content, 4)
    elements = np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions)
    if elements.size != math.prod(shape):
        raise ValueError(f"{path}: {elements.size} elements, but shape {shape}")
    return elements.reshape(shape)


def read_pixels(path: pathlib.Path) -> np.ndarray:
    images = read_idx(path)
    return images.reshape(len(images), -1).astype(np.float64)


def predict(test: np.ndarray, train: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    train_norms = np.einsum("ij,ij->i", train, train)
    predictions = np.empty(len(test), np.uint8)
    for start in range(0, len(test), BLOCK_ROWS):
        block = test[start : start + BLOCK_ROWS]
        block_norms = np.einsum("ij,ij->i", block, block)
        distances = block_norms[:, None] + train_norms - 2 * (block @ train.T)
        nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
        for row, neighbours in enumerate(labels[nearest]):
            predictions[start + row] = np.bincount(neighbours).argmax()
    return predictions


def row_range(text: str) -> slice:
    first, _, last = text.partition(":")
    return slice(int(first), int(last))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--rows", type=row_range, default=slice(0, 500), help="test rows FIRST:END (default 0:500)")
    parser.add_argument("--k", type=int, default=5, help="neighbours that vote (default 5)")
    parser.add_argument("--out", type=pathlib.Path, help="write the labels to this .npy file; else print them")
    options = parser.parse_args()

    train = read_pixels(options.data / "train-images-idx3-ubyte.gz")
    labels = read_idx(options.data / "train-labels-idx1-ubyte.gz")
    test = read_pixels(options.data / "t10k-images-idx3-ubyte.gz")[options.rows]
    predictions = predict(test, train, labels, options.k)
    if options.out is None:
        print(*predictions, sep="\n")
    else:
        np.save(options.out, predictions)


if __name__ == "__main__":
    main()
